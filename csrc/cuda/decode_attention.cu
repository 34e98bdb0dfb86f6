// Attention of one query a sequence to keys and values in a cache: kernels/ops/decode_attention.py.
//
//     out[b, h] = sum over keys j of softmax_j(q[b, h] . k[j, h / G] / sqrt(D)) v[j, h / G]
//
// The keys of sequence b are those of the prefix, which all sequences share, and then its own. The G query heads of a key
// head are rows of one tile of 16, so that each key and value is read once for all of them, and one of the prefix once for
// the tiles of a block: 4 warps of 16 rows, whole sequences each.
//
// Blocks of the prefix come first: (tiles / 4, key heads, parts of the prefix). A block copies 64 keys and values to
// shared memory, and each warp's tile reads them. The other blocks are (sequences, key heads, splits of the keys): four
// warps take runs of 16 keys in turn, straight from memory to the registers of the matrix instructions, and are combined
// in shared memory. Every block leaves maximum, sum and weighted values in fp32. Whoever comes last to a sequence and key
// head adds them in a fixed order, so that equal inputs give equal bits.
//
// 16-bit dtypes use mma.m16n8k16. The order of a product's terms is free: a lane takes 8 dimensions next to each other
// (16 bytes) where the instruction's layout has four pairs, for queries and keys alike, and a column of the values is any
// dimension. fp32 multiplies in fp32, one row after the other.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "numbers.cuh"
#include "softmax.cuh"

namespace cria {

constexpr int WARPS = 4, RUN = 16, PREFIX_TILE = 64, ROWS = 16;

// Bytes from key to key in shared memory: lanes that read at once then hit different banks.
__host__ __device__ constexpr int k_bytes(int dim) { return (2 * dim + 63) / 128 * 128 + 64; }
__host__ __device__ constexpr int v_bytes(int dim) { return 2 * dim + 16; }

struct Cache {  // strides in elements
    const char *k, *v;
    int64_t page_stride, key_stride, head_stride;
};

struct Decode {
    const char* q;
    char* out;
    int64_t q_stride;        // from sequence to sequence; heads lie next to each other. out is contiguous
    Cache own, prefix;
    const int32_t* table;    // (B, table_width): the pages of a sequence; null: page b
    const int64_t* lengths;  // (B,)
    float* parts;            // (n_prefix_parts + splits, B, H, D) and then (..., 2): values; maximum, sum
    uint32_t* tickets;       // (B, K): 0 before and after
    int batch, heads, kv_heads, group, table_width, page_size, n_prefix, n_prefix_parts, splits, keys_a_split;
    float scale;             // log2(e) / sqrt(D)
};

// ---- where partial results lie ----

__device__ inline float* values_of(const Decode& a, int part, int b, int h, int dim) {
    return a.parts + (int64_t(part * a.batch + b) * a.heads + h) * dim;
}
__device__ inline float2* sums_of(const Decode& a, int part, int b, int h, int dim) {
    float* after = a.parts + int64_t((a.n_prefix_parts + a.splits) * a.batch) * a.heads * dim;
    return reinterpret_cast<float2*>(after) + int64_t(part * a.batch + b) * a.heads + h;
}

template <class T> __device__ inline void put(char* out, int64_t at, float x) {
    if constexpr (sizeof(T) == 4) reinterpret_cast<float*>(out)[at] = x;
    else if constexpr (std::is_same_v<T, __half>) reinterpret_cast<__half*>(out)[at] = __float2half_rn(x);
    else reinterpret_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(x);
}

// Adds the parts of the heads of a key head of sequence b. Called by `n` threads, of which this is number i.
template <class T, int D> __device__ void combine(const Decode& a, int b, int kv_head, int i, int n) {
    const int n_parts = a.n_prefix_parts + a.splits;
    for (int at = i; at < a.group * D; at += n) {
        const int h = kv_head * a.group + at / D;
        float most = MINUS_INF, sum = 0, value = 0;
        for (int part = 0; part < n_parts; part++) most = fmaxf(most, __ldcg(sums_of(a, part, b, h, D)).x);
        for (int part = 0; part < n_parts; part++) {
            const float2 one = __ldcg(sums_of(a, part, b, h, D));
            if (one.y == 0) continue;  // no keys
            const float weight = exp2_fast(one.x - most);
            sum = fmaf(one.y, weight, sum);
            value = fmaf(__ldcg(values_of(a, part, b, h, D) + at % D), weight, value);
        }
        put<T>(a.out, int64_t(b * a.heads + h) * D + at % D, sum > 0 ? value / sum : sum == 0 ? 0.f : sum);
    }
}

__device__ inline bool is_last(const Decode& a, int b, int kv_head) {
    __threadfence();
    const auto n_parts = uint32_t(a.n_prefix_parts + a.splits);
    const bool last = atomicInc(a.tickets + b * a.kv_heads + kv_head, n_parts - 1) == n_parts - 1;
    __threadfence();
    return last;
}

// ---- a tile of 16 rows in 16 bits ----

template <class T> __device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes of a run of keys or values. Chunk c of a row is its dimensions 8c to 8c + 7.
struct FromGlobal {
    uint64_t at;         // of key 0
    uint64_t row_bytes;
    __device__ void load(int key, int chunk, uint32_t* words) const {
        load_words<4>(at + uint64_t(key) * row_bytes + uint64_t(chunk) * 16, words);
    }
};
struct FromShared {
    uint32_t at, row_bytes;
    __device__ void load(int key, int chunk, uint32_t* words) const {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(at + uint32_t(key) * row_bytes + uint32_t(chunk) * 16));
    }
};

template <class T, int D> struct Tile {
    static constexpr int CHUNKS = D / 8, K_VECTORS = (D + 31) / 32, V_VECTORS = (D + 63) / 64;

    uint32_t q[K_VECTORS * 2][4];
    float o[V_VECTORS * 8][4], most[2], sum[2];  // of rows lane / 4 and lane / 4 + 8

    // Rows first to first + n of (sequence, head of the group); others are 0.
    __device__ void begin(const Decode& a, int first_sequence, int kv_head, int n, int lane) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = lane / 4 + 8 * half;
            const int b = first_sequence + row / a.group, h = kv_head * a.group + row % a.group;
            const uint64_t at = reinterpret_cast<uint64_t>(a.q) + uint64_t(b * a.q_stride + h * D) * 2;
#pragma unroll
            for (int i = 0; i < K_VECTORS; i++) {
                const int chunk = lane % 4 + 4 * i;
                uint32_t words[4] = {0, 0, 0, 0};
                if (row < n && chunk < CHUNKS) load_words<4>(at + uint64_t(chunk) * 16, words);
                q[2 * i][half] = words[0], q[2 * i][2 + half] = words[1];
                q[2 * i + 1][half] = words[2], q[2 * i + 1][2 + half] = words[3];
            }
            most[half] = MINUS_INF, sum[half] = 0;
        }
#pragma unroll
        for (auto& x : o) x[0] = x[1] = x[2] = x[3] = 0;
    }

    // Takes 16 keys, of which the first n exist, 1 at least.
    template <class From> __device__ void add(const From& keys, const From& values, int n, float scale, int lane) {
        const int g = lane / 4, t = lane % 4;
        uint32_t k[2][K_VECTORS][4], v[4][V_VECTORS][4];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < K_VECTORS; i++) {
                k[j][i][0] = k[j][i][1] = k[j][i][2] = k[j][i][3] = 0;
                if (g + 8 * j < n && t + 4 * i < CHUNKS) keys.load(g + 8 * j, t + 4 * i, k[j][i]);
            }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < V_VECTORS; i++) {
                const int key = 2 * t + j % 2 + 8 * (j / 2);
                v[j][i][0] = v[j][i][1] = v[j][i][2] = v[j][i][3] = 0;
                if (key < n && g + 8 * i < CHUNKS) values.load(key, g + 8 * i, v[j][i]);
            }

        float s[2][4] = {};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 2 * K_VECTORS; i++)
                multiply_add<T>(s[j], q[i], k[j][i / 2][i % 2 * 2], k[j][i / 2][i % 2 * 2 + 1]);
        float now[2] = {most[0], most[1]};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = 2 * t + i % 2 + 8 * j < n ? s[j][i] * scale : MINUS_INF;
                now[i / 2] = fmaxf(now[i / 2], s[j][i]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 1));
            now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 2));
        }
        if (__any_sync(~0u, now[0] != most[0] || now[1] != most[1])) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float factor = exp2_fast(most[half] - now[half]);
                sum[half] *= factor, most[half] = now[half];
#pragma unroll
                for (auto& x : o) x[2 * half] *= factor, x[2 * half + 1] *= factor;
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = exp2_fast(s[j][i] - most[i / 2]);
                sum[i / 2] += s[j][i];
            }
        const uint32_t p[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]), pack<T>(s[1][0], s[1][1]),
                               pack<T>(s[1][2], s[1][3])};
#pragma unroll
        for (int i = 0; i < V_VECTORS; i++)
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const uint32_t half = e % 2 ? 0x7632 : 0x5410;
                multiply_add<T>(o[8 * i + e], p, __byte_perm(v[0][i][e / 2], v[1][i][e / 2], half),
                                __byte_perm(v[2][i][e / 2], v[3][i][e / 2], half));
            }
    }

    // Calls write(row, maximum, sum) and write8(row, first dimension, 8 values) for rows under n.
    template <class Sums, class Values> __device__ void end(int n, int lane, Sums write, Values write8) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
            const int row = lane / 4 + 8 * half;
            if (row >= n) continue;
            if (lane % 4 == 0) write(row, most[half], sum[half]);
#pragma unroll
            for (int i = 0; i < V_VECTORS; i++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    const int chunk = 2 * (lane % 4) + odd + 8 * i;
                    if (chunk >= CHUNKS) continue;
                    float x[8];
#pragma unroll
                    for (int e = 0; e < 8; e++) x[e] = o[8 * i + e][2 * half + odd];
                    write8(row, chunk * 8, x);
                }
        }
    }
};

// ---- rows in fp32, one after the other: the same interface for one row at a time ----

template <int D> struct Row {
    static constexpr int CHUNKS = D / 4, VECTORS = (D + 15) / 16;
    float q[VECTORS][4], o[4], most, sum;  // o: of dimensions 4 lane to 4 lane + 3

    __device__ void begin(const float* from, int lane) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            uint32_t words[4] = {0, 0, 0, 0};
            const int chunk = lane % 4 + 4 * i;
            if (chunk < CHUNKS) load_words<4>(reinterpret_cast<uint64_t>(from + chunk * 4), words);
#pragma unroll
            for (int j = 0; j < 4; j++) q[i][j] = __uint_as_float(words[j]);
        }
        o[0] = o[1] = o[2] = o[3] = 0, most = MINUS_INF, sum = 0;
    }

    // Takes 8 keys, of which the first n exist, 1 at least.
    __device__ void add(const FromGlobal& keys, const FromGlobal& values, int n, float scale, int lane) {
        const int key = lane / 4;
        float s = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            uint32_t words[4] = {0, 0, 0, 0};
            if (key < n && lane % 4 + 4 * i < CHUNKS) keys.load(key, lane % 4 + 4 * i, words);
#pragma unroll
            for (int j = 0; j < 4; j++) s = fmaf(q[i][j], __uint_as_float(words[j]), s);
        }
        s += __shfl_xor_sync(~0u, s, 1);
        s += __shfl_xor_sync(~0u, s, 2);
        s = key < n ? s * scale : MINUS_INF;
        float now = fmaxf(most, s);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
        const float factor = exp2_fast(most - now), p = exp2_fast(s - now);
        most = now, sum = sum * factor + (lane % 4 == 0 ? p : 0.f);
#pragma unroll
        for (int j = 0; j < 4; j++) o[j] *= factor;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float weight = __shfl_sync(~0u, p, 4 * i);
            uint32_t words[4] = {0, 0, 0, 0};
            if (i < n && lane < CHUNKS) values.load(i, lane, words);
#pragma unroll
            for (int j = 0; j < 4; j++) o[j] = fmaf(weight, __uint_as_float(words[j]), o[j]);
        }
    }

    template <class Sums, class Values> __device__ void end(int row, int lane, Sums write, Values write4) {
#pragma unroll
        for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) write(row, most, sum);
        if (lane < CHUNKS) write4(row, lane * 4, o);
    }
};

// ---- blocks ----

template <int SIZE> __device__ inline FromGlobal run_of(const char* base, int64_t element, int64_t key_stride) {
    return {reinterpret_cast<uint64_t>(base) + uint64_t(element) * SIZE, uint64_t(key_stride) * SIZE};
}

// The keys of one split of one sequence's own.
template <class T, int D> __device__ void attend_own(const Decode& a, int block, char* shared) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = a.group;
    const int split = block % a.splits, kv_head = block / a.splits % a.kv_heads, b = block / a.splits / a.kv_heads;
    const int first = split * a.keys_a_split, after = min(first + a.keys_a_split, int(a.lengths[b]));
    // Of each warp: values (group, D), then maxima and sums (group, 2).
    float* values = reinterpret_cast<float*>(shared);
    float2* sums = reinterpret_cast<float2*>(values + WARPS * group * D);
    auto write = [&](int row, float most, float sum) { sums[warp * group + row] = make_float2(most, sum); };
    auto run = [&](int key, const char* from) {
        const int64_t page = a.table ? a.table[int64_t(b) * a.table_width + key / a.page_size] : b;
        const int64_t within = a.table ? key % a.page_size : key;
        return run_of<sizeof(T)>(from, page * a.own.page_stride + within * a.own.key_stride + kv_head * a.own.head_stride,
                                 a.own.key_stride);
    };
    if constexpr (sizeof(T) == 4) {
        auto write4 = [&](int row, int at, const float* x) {
            *reinterpret_cast<float4*>(values + (warp * group + row) * D + at) = make_float4(x[0], x[1], x[2], x[3]);
        };
        for (int row = 0; row < group; row++) {
            Row<D> tile;
            tile.begin(reinterpret_cast<const float*>(a.q) + b * a.q_stride + (kv_head * group + row) * D, lane);
            for (int key = first + warp * 8; key < after; key += WARPS * 8)
                tile.add(run(key, a.own.k), run(key, a.own.v), min(after - key, 8), a.scale, lane);
            tile.end(row, lane, write, write4);
        }
    } else {
        Tile<T, D> tile;
        tile.begin(a, b, kv_head, group, lane);
        for (int key = first + warp * RUN; key < after; key += WARPS * RUN)
            tile.add(run(key, a.own.k), run(key, a.own.v), min(after - key, RUN), a.scale, lane);
        tile.end(group, lane, write, [&](int row, int at, const float* x) {
            auto* to = reinterpret_cast<float4*>(values + (warp * group + row) * D + at);
            to[0] = make_float4(x[0], x[1], x[2], x[3]), to[1] = make_float4(x[4], x[5], x[6], x[7]);
        });
    }
    __syncthreads();
    for (int at = int(threadIdx.x); at < group * D; at += WARPS * 32) {
        const int row = at / D;
        float most = MINUS_INF, sum = 0, value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, sums[w * group + row].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 one = sums[w * group + row];
            const float weight = one.y == 0 ? 0.f : exp2_fast(one.x - most);
            sum = fmaf(one.y, weight, sum);
            value = fmaf(values[w * group * D + at], weight, value);
        }
        const int part = a.n_prefix_parts + split, h = kv_head * group + row;
        values_of(a, part, b, h, D)[at % D] = value;
        if (at % D == 0) *sums_of(a, part, b, h, D) = make_float2(most, sum);
    }
    __syncthreads();
    if (__syncthreads_or(threadIdx.x == 0 && is_last(a, b, kv_head)))
        combine<T, D>(a, b, kv_head, int(threadIdx.x), WARPS * 32);
}

// One part of the prefix for the rows of four tiles.
template <class T, int D> __device__ void attend_prefix(const Decode& a, int block, char* shared) {
    constexpr int K_BYTES = k_bytes(D), V_BYTES = v_bytes(D);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = a.group;
    const int part = block % a.n_prefix_parts, kv_head = block / a.n_prefix_parts % a.kv_heads;
    const int sequences = ROWS / group;  // of a tile
    const int b = (block / a.n_prefix_parts / a.kv_heads * WARPS + warp) * sequences;
    const int n = max(min(a.batch - b, sequences), 0);
    const int runs = (a.n_prefix + RUN - 1) / RUN, runs_a_part = (runs + a.n_prefix_parts - 1) / a.n_prefix_parts;
    const int first = part * runs_a_part * RUN, after = min(first + runs_a_part * RUN, a.n_prefix);
    auto write = [&](int row, float most, float sum) {
        *sums_of(a, part, b + row / group, kv_head * group + row % group, D) = make_float2(most, sum);
    };
    auto to = [&](int row, int at) {
        return reinterpret_cast<float4*>(values_of(a, part, b + row / group, kv_head * group + row % group, D) + at);
    };
    if constexpr (sizeof(T) == 4) {
        auto run = [&](int key, const char* from) {
            return run_of<4>(from, key * a.prefix.key_stride + kv_head * a.prefix.head_stride, a.prefix.key_stride);
        };
        for (int row = 0; row < n * group; row++) {
            Row<D> tile;
            tile.begin(reinterpret_cast<const float*>(a.q) + (b + row / group) * a.q_stride +
                           (kv_head * group + row % group) * D, lane);
            for (int key = first; key < after; key += 8)
                tile.add(run(key, a.prefix.k), run(key, a.prefix.v), min(after - key, 8), a.scale, lane);
            tile.end(row, lane, write, [&](int r, int at, const float* x) {
                *to(r, at) = make_float4(x[0], x[1], x[2], x[3]);
            });
        }
    } else {
        Tile<T, D> tile;
        tile.begin(a, b, kv_head, n * group, lane);
        const auto k_at = uint32_t(__cvta_generic_to_shared(shared)), v_at = k_at + PREFIX_TILE * K_BYTES;
        for (int start = first; start < after; start += PREFIX_TILE) {
            const int keys = min(after - start, PREFIX_TILE);
            __syncthreads();
#pragma unroll 1
            for (int i = int(threadIdx.x); i < keys * (D / 8); i += WARPS * 32) {
                const int key = i / (D / 8), chunk = i % (D / 8);
                const int64_t from = (start + key) * a.prefix.key_stride + kv_head * a.prefix.head_stride + chunk * 8;
                const uint32_t k = k_at + uint32_t(key * K_BYTES + chunk * 16), v = v_at + uint32_t(key * V_BYTES + chunk * 16);
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(k), "l"(a.prefix.k + from * 2) : "memory");
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(v), "l"(a.prefix.v + from * 2) : "memory");
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncthreads();
            for (int key = 0; key < keys; key += RUN)
                tile.add(FromShared{k_at + uint32_t(key * K_BYTES), uint32_t(K_BYTES)},
                         FromShared{v_at + uint32_t(key * V_BYTES), uint32_t(V_BYTES)}, min(keys - key, RUN), a.scale, lane);
        }
        tile.end(n * group, lane, write, [&](int row, int at, const float* x) {
            to(row, at)[0] = make_float4(x[0], x[1], x[2], x[3]), to(row, at)[1] = make_float4(x[4], x[5], x[6], x[7]);
        });
    }
    __syncwarp();
    const uint32_t last = __ballot_sync(~0u, lane < n && is_last(a, b + lane, kv_head));
    for (int i = 0; i < n; i++)
        if (last >> i & 1) combine<T, D>(a, b + i, kv_head, lane, 32);
}

// The arguments are the fields of Decode, and the number of blocks of the prefix.
#define DECODE_PARAMETERS                                                                                              \
    const void *q, void *out, int64_t q_stride, const void *k, const void *v, int64_t page_stride, int64_t key_stride, \
        int64_t head_stride, const void *prefix_k, const void *prefix_v, int64_t prefix_key_stride,                    \
        int64_t prefix_head_stride, const int32_t *table, const int64_t *lengths, float *parts, uint32_t *tickets,     \
        int64_t batch, int64_t heads, int64_t kv_heads, int64_t table_width, int64_t page_size, int64_t n_prefix,      \
        int64_t n_prefix_parts, int64_t splits, int64_t keys_a_split, float scale, int64_t prefix_blocks

template <class T, int D> __global__ void __launch_bounds__(WARPS * 32, 2) decode(DECODE_PARAMETERS) {
    extern __shared__ __align__(16) char dynamic[];
    const auto bytes = [](const void* at) { return static_cast<const char*>(at); };
    const Decode a{bytes(q), static_cast<char*>(out), q_stride,
                   {bytes(k), bytes(v), page_stride, key_stride, head_stride},
                   {bytes(prefix_k), bytes(prefix_v), 0, prefix_key_stride, prefix_head_stride},
                   table, lengths, parts, tickets, int(batch), int(heads), int(kv_heads), int(heads) / int(kv_heads),
                   int(table_width), int(page_size), int(n_prefix), int(n_prefix_parts), int(splits), int(keys_a_split), scale};
    const int block = int(blockIdx.x), own = block - int(prefix_blocks);
    if (own < 0) attend_prefix<T, D>(a, block, dynamic);
    else attend_own<T, D>(a, own, dynamic);
}

using DecodeKernel = void (*)(DECODE_PARAMETERS);

template <class T> DecodeKernel choose_decode(int dim) {
    return dim == 64 ? decode<T, 64> : dim == 80 ? decode<T, 80> : dim == 96 ? decode<T, 96> : dim == 128 ? decode<T, 128> : nullptr;
}

}  // namespace cria

// dtype: 0 bf16, 1 fp16, 2 fp32. dim: 64, 80, 96 or 128.
EXPORT int cria_decode_attention(DECODE_PARAMETERS, int dtype, int dim, void* stream) {
    using namespace cria;
    const DecodeKernel kernel = dtype == 0   ? choose_decode<__nv_bfloat16>(dim)
                                : dtype == 1 ? choose_decode<__half>(dim)
                                : dtype == 2 ? choose_decode<float>(dim)
                                             : nullptr;
    if (!kernel) return BAD_MODE;
    if (batch < 1 || kv_heads < 1 || heads % kv_heads || heads / kv_heads > ROWS || splits < 1) return BAD_SIZE;
    const int64_t blocks = prefix_blocks + batch * kv_heads * splits;
    if (blocks > INT32_MAX) return BAD_SIZE;
    const size_t own_bytes = size_t(WARPS * (heads / kv_heads) * (dim + 2)) * 4;
    const size_t prefix_bytes = prefix_blocks && dtype < 2 ? size_t(PREFIX_TILE * (k_bytes(dim) + v_bytes(dim))) : 0;
    kernel<<<unsigned(blocks), WARPS * 32, std::max(own_bytes, prefix_bytes), static_cast<cudaStream_t>(stream)>>>(
        q, out, q_stride, k, v, page_stride, key_stride, head_stride, prefix_k, prefix_v, prefix_key_stride,
        prefix_head_stride, table, lengths, parts, tickets, batch, heads, kv_heads, table_width, page_size, n_prefix,
        n_prefix_parts, splits, keys_a_split, scale, prefix_blocks);
    return check_launch();
}

// Forward of attention for sm_90a: kernels/ops/attention_hopper.py.
//
//     o_i = sum_j softmax_j(q_i k_j / sqrt(D)) v_j        lse_i = log2(sum_j exp(q_i k_j / sqrt(D)))
//
// A block stays on its SM and takes items in turn: 128 queries of a head of 128, or 192 of one of 64. The first warp of
// its first warpgroup asks for queries, keys and values: bulk copies of tiles (TMA), 64 keys or values at once, into
// rings of shared memory. The other warpgroups, two or three, multiply (wgmma), 64 queries each, and wait for nothing
// but full tiles. Each passes over the tiles of keys that none of its own queries sees, so that short documents cost
// little more than with tiles of 64 x 64, but every key is copied once for all. The next item is copied while one ends.
//
// A warpgroup keeps its queries in registers, and their place in shared memory for the results. It starts the scores of a
// tile and the values of the tile before together: the softmax of one runs beside the product of the other. A tile's
// rows of no document may hold NaN, which passes a weight of 0: such a tile of values is copied by the warp itself, which
// writes zeros there.
#include <cuda.h>  // types alone
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "numbers.cuh"
#include "softmax.cuh"
#include "warpgroup.cuh"

namespace cria {

constexpr int ROWS = 64, KEYS = 64, STAGES = 4;
// Warpgroups that multiply. Heads of 64 have half the products for as many exponentials: three hide more of each other.
__host__ __device__ constexpr int groups(int dim) { return dim == 64 ? 3 : 2; }
__host__ __device__ constexpr int threads(int dim) { return 128 * (groups(dim) + 1); }
constexpr float LEAST = -1e38f;  // under every score; finite, so that a row that sees nothing is not NaN

template <int D> struct Places {  // in shared memory. A tile has 64 rows: D / 64 panels of 128 bytes a row, swizzled
    static constexpr uint32_t TILE = ROWS * D * 2, Q = 0, K = Q + 2 * groups(D) * TILE, V = K + STAGES * TILE,
                              BLOCK = V + STAGES * TILE, ITEM = BLOCK + STAGES * 16, BARRIERS = ITEM + 2 * 16,
                              BYTES = BARRIERS + (2 * 2 + 4 * STAGES) * 8;
};

struct Attention {
    const TileMap *q, *k, *v, *o;
    const char* values;  // v
    int64_t v_row_stride, v_head_stride;  // bytes
    float* lse;                           // (H, Q), to the base 2
    const int32_t* limits;                // (4, Q): the keys of each query; first own, last own + 1, prefix start, end
    const int32_t* items;                 // (n, 7): tile of queries, listed lo and hi, full: prefix start, n, own start, n
    const int4* blocks;                   // listed: start * 2 + (as a prefix), end, flags
    int n_queries, n_items, heads, group;
    float scale;  // log2(e) / sqrt(D)
};
// flags: for each warpgroup two bits, what its queries see of the keys; and whether a row beyond `end` is no document's
enum : int { NONE = 0, SOME = 1, ALL = 2, DIRTY = 64 };

template <int D> struct Barriers {
    uint32_t at;
    __device__ uint32_t q_full(uint32_t i) const { return at + i * 8; }
    __device__ uint32_t q_empty(uint32_t i) const { return at + 16 + i * 8; }
    __device__ uint32_t k_full(uint32_t i) const { return at + 32 + i * 8; }
    __device__ uint32_t k_empty(uint32_t i) const { return at + 32 + (STAGES + i) * 8; }
    __device__ uint32_t v_full(uint32_t i) const { return at + 32 + (2 * STAGES + i) * 8; }
    __device__ uint32_t v_empty(uint32_t i) const { return at + 32 + (3 * STAGES + i) * 8; }
};

// The work of a block: item * heads + head, in rounds. Every other round goes the other way, as items are sorted by their
// length: whoever had the longest of one has the shortest of the next.
struct Rounds {
    int work = int(blockIdx.x), round = 0;
    __device__ void next() {
        const int n = int(gridDim.x), place = ++round % 2 ? n - 1 - int(blockIdx.x) : int(blockIdx.x);
        work = round * n + place;
    }
};

struct Turn {  // a place in a ring, and the parity of its round
    uint32_t at = 0, parity = 0;
    __device__ void next(uint32_t n) {
        if (++at == n) at = 0, parity ^= 1;
    }
};

// ---- the warp that copies ----

// Values of rows from `start` to `end`, then zeros, in the layout of a bulk copy with a swizzle of 128 bytes.
template <int D> __device__ void copy_values(const Attention& a, uint32_t to, int start, int end, int kv_head, int lane) {
    const auto from = reinterpret_cast<uint64_t>(a.values + start * a.v_row_stride + kv_head * a.v_head_stride);
#pragma unroll 2
    for (int i = lane; i < KEYS * (D / 8); i += 32) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        uint32_t words[4] = {0, 0, 0, 0};
        if (row < end - start) load_words<4>(from + uint64_t(row) * uint64_t(a.v_row_stride) + uint64_t(chunk) * 16, words);
        store_shared(to + uint32_t(chunk / 8 * (KEYS * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16), words);
    }
    fence_proxy();
    __syncwarp();
}

template <int D> __device__ void produce(const Attention& a, uint32_t shared, const Barriers<D>& bars) {
    using P = Places<D>;
    constexpr int GROUPS = groups(D);
    const int lane = int(threadIdx.x) % 32;
    Turn ring, queries;
    for (Rounds rounds; rounds.work < a.n_items * a.heads; rounds.next()) {
        const int work = rounds.work, head = work % a.heads, kv_head = head / a.group;
        const int32_t* item = a.items + work / a.heads * 7;
        const int row0 = item[0] * (GROUPS * ROWS), lo = item[1], listed = item[2] - lo;
        const int prefix0 = item[3], n_prefix = item[4], own0 = item[5], n = listed + n_prefix + item[6];
        int4 next = listed ? a.blocks[lo] : int4{};
        wait(bars.q_empty(queries.at), queries.parity ^ 1);
        if (lane == 0) {
            const uint32_t to = shared + P::Q + queries.at * GROUPS * P::TILE, full = bars.q_full(queries.at);
            store_shared(shared + P::ITEM + queries.at * 16, uint32_t(row0), uint32_t(head), uint32_t(n));
            expect(full, GROUPS * P::TILE);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) load_tile(to + uint32_t(g) * P::TILE, a.q, row0 + g * ROWS, head, full);
        }
        queries.next(2);
        for (int i = 0; i < n; i++) {
            int4 block = next;
            if (i + 1 < listed) next = a.blocks[lo + i + 1];
            if (i >= listed) {
                const int at = i - listed, start = at < n_prefix ? prefix0 + at * KEYS : own0 + (at - n_prefix) * KEYS;
                block = int4{2 * start, start + KEYS, ALL | ALL << 2 | ALL << 4, 0};
            }
            const int start = block.x >> 1;
            wait(bars.k_empty(ring.at), ring.parity ^ 1);
            if (lane == 0) {
                store_shared(shared + P::BLOCK + ring.at * 16, uint32_t(block.x), uint32_t(block.y), uint32_t(block.z));
                expect(bars.k_full(ring.at), P::TILE);
                load_tile(shared + P::K + ring.at * P::TILE, a.k, start, kv_head, bars.k_full(ring.at));
            }
            wait(bars.v_empty(ring.at), ring.parity ^ 1);
            const uint32_t to = shared + P::V + ring.at * P::TILE;
            if (block.z & DIRTY) copy_values<D>(a, to, start, block.y, kv_head, lane);
            if (lane == 0) {
                if (block.z & DIRTY) arrive(bars.v_full(ring.at));
                else {
                    expect(bars.v_full(ring.at), P::TILE);
                    load_tile(to, a.v, start, kv_head, bars.v_full(ring.at));
                }
            }
            ring.next(STAGES);
        }
    }
}

// ---- the warpgroups that multiply: 64 queries, of which a thread has rows `row` and `row + 8` of its warp's 16 ----

template <class T, int D> struct Rows {
    float o[D / 2], s[32], most[2], sum[2];
    uint32_t q[D / 4], p[16];
    int2 own[2], prefix[2];  // limits

    // Where 16 bytes of a row of the warp's lie: those of lane's matrix in products of terms 16 i to 16 i + 15.
    static __device__ uint32_t place(int i, int lane) {
        const uint32_t row = uint32_t(lane) % 16, chunk = 2 * uint32_t(i) + uint32_t(lane) / 16;
        return chunk / 8 * (ROWS * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    }

    // mine: the warp's 16 rows of queries in shared memory.
    __device__ void begin(const Attention& a, int row, uint32_t mine, int lane) {
#pragma unroll
        for (int i = 0; i < D / 16; i++) load_matrices(mine + place(i, lane), q + 4 * i);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = row + 8 * half;
            const bool is_there = at < a.n_queries;
            own[half] = prefix[half] = int2{0, 0};
            if (is_there) {
                const int32_t* limits = a.limits + at;
                own[half] = int2{limits[0], limits[a.n_queries]};
                prefix[half] = int2{limits[2 * int64_t(a.n_queries)], limits[3 * int64_t(a.n_queries)]};
            }
            most[half] = LEAST, sum[half] = 0;
        }
#pragma unroll
        for (float& x : o) x = 0;
    }

    // Makes the scores of keys that a row does not see -infinity. code, end: of a listed block.
    __device__ void mask(int code, int end, int t) {
        const int start = code >> 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int2 limits = code & 1 ? prefix[half] : own[half];
            const int lo = max(limits.x - start, 0), n = min(min(limits.y, end) - start, KEYS) - lo;
            const uint64_t bits = n > 0 ? (~0ull >> (64 - n) << lo) >> (2 * t) : 0;
            const uint32_t words[2] = {uint32_t(bits), uint32_t(bits >> 32)};
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (!(words[j / 4] >> (8 * (j % 4) + e) & 1)) s[4 * j + 2 * half + e] = MINUS_INF;
        }
    }

    // Makes exponentials of the scores, and returns by which factors o and the sums before them shrink. A row's maximum
    // is replaced where it grows by a factor of 256 (2^8) or more: until then exponentials are as exact, if over 1, and
    // o stays as it is.
    __device__ float2 exponentiate(float scale) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = most[half];
#pragma unroll
            for (int i = 0; i < 16; i++) now = fmaxf(now, s[i / 2 * 4 + 2 * half + i % 2]);
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
            now = (now - most[half]) * scale > 8 ? now : most[half];
            factor[half] = exp2_fast((most[half] - now) * scale);
            most[half] = now, now *= -scale, sum[half] *= factor[half];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float& x = s[i / 2 * 4 + 2 * half + i % 2];
                x = exp2_fast(fmaf(x, scale, now));
                sum[half] += x;
            }
        }
        return float2{factor[0], factor[1]};
    }

    __device__ void shrink(float2 factor) {
        if (!__any_sync(~0u, factor.x != 1 || factor.y != 1)) return;
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] *= i % 4 < 2 ? factor.x : factor.y;
    }

    __device__ void narrow() {
#pragma unroll
        for (int i = 0; i < 16; i++) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    }

    // Divides by the sums, writes lse, and o in 16 bits where the warp's queries were.
    __device__ void end(const Attention& a, int row, int head, uint32_t mine, int lane) {
        float inverse[2];
        bool sees[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            sees[half] = total != 0;  // a NaN too
            inverse[half] = inverse_fast(total);
            const float lse = sees[half] ? fmaf(most[half], a.scale, log2_fast(total)) : -MINUS_INF;
            const int at = row + 8 * half;
            if (lane % 4 == 0 && at < a.n_queries) a.lse[int64_t(head) * a.n_queries + at] = lse;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float by = inverse[j % 2];
                const uint32_t two = pack<T>(o[8 * i + 2 * j] * by, o[8 * i + 2 * j + 1] * by);
                words[j] = sees[j % 2] ? two : 0;
            }
            store_matrices(mine + place(i, lane), words);
        }
    }
};

template <class T, int D> __device__ void consume(const Attention& a, uint32_t shared, const Barriers<D>& bars) {
    using P = Places<D>;
    const int lane = int(threadIdx.x) % 32, warp = all_lanes(int(threadIdx.x) / 32) % 4;
    const int group = all_lanes(int(threadIdx.x) / 128) - 1;
    Turn ring, queries;
    Rows<T, D> rows;
    uint32_t to_release = 0;  // of the queries' ring: the barrier of the item before, whose results are under way
    auto release = [&](uint32_t barrier) {
        if (lane == 0) arrive(barrier);
    };
    auto release_queries = [&] {
        if (to_release && lane == 0) wait_stores_read(), arrive(to_release);
        to_release = 0;
    };
    for (Rounds rounds; rounds.work < a.n_items * a.heads; rounds.next()) {
        wait(bars.q_full(queries.at), queries.parity);
        const uint4 item = load_shared(shared + P::ITEM + queries.at * 16);
        const int row0 = int(item.x) + group * ROWS, row = row0 + warp * 16 + lane / 4, head = int(item.y);
        const int n = all_lanes(int(item.z));
        const uint32_t q = shared + P::Q + (queries.at * groups(D) + uint32_t(group)) * P::TILE;
        const uint32_t mine = q + uint32_t(warp) * (16 * 128);
        rows.begin(a, row, mine, lane);
        bool pending = false;  // exponentials whose values are not added
        Turn behind;           // their place
        auto add_values = [&] {
            wait(bars.v_full(behind.at), behind.parity);
            multiply_values<T, D>(rows.o, rows.p, shared + P::V + behind.at * P::TILE);
            wait_products<0>(rows.o);
            release(bars.v_empty(behind.at));
            pending = false;
        };
        for (int i = 0; i < n; i++) {
            wait(bars.k_full(ring.at), ring.parity);
            const uint4 block = load_shared(shared + P::BLOCK + ring.at * 16);
            const int sees = all_lanes(int(block.z)) >> (2 * group) & 3;
            if (sees == NONE) {
                if (pending) add_values();
                wait(bars.v_full(ring.at), ring.parity);
                __syncwarp();
                release(bars.k_empty(ring.at)), release(bars.v_empty(ring.at));
            } else {
                const uint32_t k = shared + P::K + ring.at * P::TILE;
                // Products under way and branches do not go together: the compiler would end one before it begins the
                // next. Hence a path for each case.
                auto go_on = [&](auto is_masked) {
                    wait(bars.v_full(behind.at), behind.parity);
                    multiply_keys<T, D>(rows.s, rows.q, k);
                    multiply_values<T, D>(rows.o, rows.p, shared + P::V + behind.at * P::TILE);
                    wait_products<1>(rows.s);
                    release(bars.k_empty(ring.at));
                    if constexpr (decltype(is_masked)::value) rows.mask(int(block.x), int(block.y), lane % 4);
                    const float2 factor = rows.exponentiate(a.scale);
                    wait_products<0>(rows.o);
                    release(bars.v_empty(behind.at));
                    rows.shrink(factor);
                };
                if (pending && sees == ALL) go_on(std::false_type());
                else if (pending) go_on(std::true_type());
                else {
                    multiply_keys<T, D>(rows.s, rows.q, k);
                    wait_products<0>(rows.s);
                    release(bars.k_empty(ring.at));
                    release_queries();
                    rows.mask(int(block.x), int(block.y), lane % 4);
                    rows.shrink(rows.exponentiate(a.scale));
                }
                rows.narrow();
                pending = true, behind = ring;
            }
            ring.next(STAGES);
        }
        if (pending) add_values();
        release_queries();
        rows.end(a, row, head, mine, lane);
        fence_proxy();
        __syncwarp();
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < D / 64; i++) store_tile(a.o, row0 + warp * 16, head, i, mine + uint32_t(i) * (ROWS * 128));
            commit_stores();
        }
        to_release = bars.q_empty(queries.at);
        queries.next(2);
    }
    if (lane == 0) wait_stores();
}

#define HOPPER_PARAMETERS                                                                                               \
    const void *values, int64_t v_row_stride, int64_t v_head_stride, float *lse, const int32_t *limits,                 \
        const int32_t *items, const void *listed, int64_t n_queries, int64_t n_items, int64_t heads, int64_t group,     \
        float scale

template <class T, int D> __global__ void __launch_bounds__(threads(D), 1)
hopper_attention(const __grid_constant__ TileMap q, const __grid_constant__ TileMap k, const __grid_constant__ TileMap v,
                 const __grid_constant__ TileMap o, HOPPER_PARAMETERS) {
    extern __shared__ __align__(1024) char dynamic[];
    const auto shared = uint32_t(__cvta_generic_to_shared(dynamic));
    const Barriers<D> bars{shared + Places<D>::BARRIERS};
    if (threadIdx.x == 0) {
        constexpr uint32_t CONSUMER_WARPS = 4 * groups(D);
        for (uint32_t i = 0; i < 2; i++) make_barrier(bars.q_full(i), 1), make_barrier(bars.q_empty(i), CONSUMER_WARPS);
        for (uint32_t i = 0; i < STAGES; i++) {
            make_barrier(bars.k_full(i), 1), make_barrier(bars.k_empty(i), CONSUMER_WARPS);
            make_barrier(bars.v_full(i), 1), make_barrier(bars.v_empty(i), CONSUMER_WARPS);
        }
        fence_barriers();
    }
    __syncthreads();
    const Attention a{&q, &k, &v, &o, static_cast<const char*>(values), v_row_stride, v_head_stride, lse, limits, items,
                      static_cast<const int4*>(listed), int(n_queries), int(n_items), int(heads), int(group), scale};
    if (threadIdx.x < 128) {
        lower_registers<D == 64 ? 32 : 40>();
        if (threadIdx.x < 32) produce<D>(a, shared, bars);
    } else {
        raise_registers<D == 64 ? 160 : 232>();
        consume<T, D>(a, shared, bars);
    }
}

struct MapRequest {  // a tensor as kernels/native/cuda.py tells it, the axis of neighbours first
    uint64_t address, sizes[4], strides[3];  // strides in bytes
    uint32_t box[4];
};

// Makes the opaque map of a tensor. The driver does it; its function is found at run time, without a link to libcuda.
int encode(TileMap& map, const MapRequest& q, bool is_half) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static_assert(sizeof(TileMap) == sizeof(CUtensorMap) && alignof(TileMap) >= alignof(CUtensorMap));
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
    if (error || answer != cudaDriverEntryPointSuccess) return CUDA_ERROR + int(error ? error : cudaErrorNotSupported);
    const cuuint64_t sizes[4] = {q.sizes[0], q.sizes[1], q.sizes[2], q.sizes[3]};
    const cuuint64_t strides[3] = {q.strides[0], q.strides[1], q.strides[2]};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const auto type = is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult result = reinterpret_cast<Encode>(found)(
        reinterpret_cast<CUtensorMap*>(&map), type, 4, reinterpret_cast<void*>(q.address), sizes, strides, q.box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? OK : CUDA_ERROR + int(cudaErrorInvalidValue);
}

using HopperKernel = void (*)(const TileMap, const TileMap, const TileMap, const TileMap, HOPPER_PARAMETERS);

template <class T> HopperKernel choose_hopper(int dim) {
    return dim == 64 ? hopper_attention<T, 64> : dim == 128 ? hopper_attention<T, 128> : nullptr;
}

}  // namespace cria

// dtype: 0 bf16, 1 fp16. dim: 64 or 128. blocks: of the grid, each of which takes items in turn.
EXPORT int cria_hopper_attention(const cria::MapRequest* q, const cria::MapRequest* k, const cria::MapRequest* v,
                                 const cria::MapRequest* o, HOPPER_PARAMETERS, int dtype, int dim, int blocks,
                                 void* stream) {
    using namespace cria;
    const HopperKernel kernel = dtype == 0   ? choose_hopper<__nv_bfloat16>(dim)
                                : dtype == 1 ? choose_hopper<__half>(dim)
                                             : nullptr;
    if (!kernel) return BAD_MODE;
    if (n_queries < 1 || n_items < 1 || heads < 1 || group < 1 || heads % group || blocks < 1) return BAD_SIZE;
    if (n_queries > INT32_MAX || n_items * heads > INT32_MAX - blocks) return BAD_SIZE;
    const int bytes = int(dim == 64 ? Places<64>::BYTES : Places<128>::BYTES);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return CUDA_ERROR + int(error);
    TileMap maps[4];
    const MapRequest* requests[4] = {q, k, v, o};
    for (int i = 0; i < 4; i++)
        if (const int code = encode(maps[i], *requests[i], dtype == 1)) return code;
    kernel<<<unsigned(blocks), unsigned(threads(dim)), size_t(bytes), static_cast<cudaStream_t>(stream)>>>(
        maps[0], maps[1], maps[2], maps[3], values, v_row_stride, v_head_stride, lse, limits, items, listed, n_queries,
        n_items, heads, group, scale);
    return check_launch();
}

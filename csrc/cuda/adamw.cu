// AdamW over all tensors of a model in one launch: kernels/ops/adamw.py on each, bit for bit, p too.
//
// A warp works on tiles of 256 elements, eight a lane. Where a stream is fp32, a lane has two groups of four neighbours,
// so that fp32 moves by 128 bits, bf16 by 64 and bytes by 32: whole sectors all. Elsewhere it has eight neighbours, and
// bf16 moves by 128 bits. A tile is also a block of 8-bit states. Warps share nothing but the tables of 8-bit states, so
// there is no barrier after those are filled.
//
// A tensor is a row of the table, the rows one after the other in device memory. A block takes chunks of CHUNK elements
// in turn. Tiles that end beyond a tensor, and tensors that do not begin at 16 bytes, move element by element, in whole
// sectors where nothing is rounded at random.
#include "eight_bit.cuh"
#include "launch.cuh"
#include "numbers.cuh"
#include "table.cuh"

namespace cria {

enum Master { FP32_PARAM, FP32, SPLIT, STOCHASTIC };
enum States { STATES_FP32, STATES_BF16, STATES_8BIT };

constexpr int THREADS = 512, TILE = 256, CHUNK = 32768;

// A row of the table, of int64: kernels/ops/adamw_cuda.py writes it.
struct Tensor {
    uint64_t param, grad, m, v, rest, m_absmax, v_absmax;  // addresses; rest: the low bits or the master. maxima may be 0
    int64_t n, first_chunk;
    int64_t group;        // of Philox: that of the first eight elements
    uint32_t seed, shift; // shift: elements of the first eight that precede the tensor
    float decay;          // weight decay
    uint32_t flags;       // ALIGNED: every stream begins at a multiple of 16 bytes, and shift is 0. FP32_GRAD: else bf16
};
static_assert(sizeof(Tensor) == 12 * 8, "a row of the table");

constexpr uint32_t ALIGNED = 1, FP32_GRAD = 2;

struct Numbers {  // of a step
    float rest1, beta2, rest2, eps, factor;
    uint32_t step;
};

// Where a lane's elements lie in a tile, and how they move: to words of 32 bits, in order.
template <bool QUADS, bool WHOLE, bool RANDOM> struct Lane {
    int lane, begin, end;
    __device__ int place(int j) const {
        if (!WHOLE && !RANDOM) return j * 32 + lane;  // one by one, lanes next to each other use whole sectors
        return QUADS ? (j / 4) * 128 + lane * 4 + j % 4 : lane * 8 + j;
    }

    // base: of the tile. SIZE: bytes of an element. WHOLE: all elements exist, and base is aligned; else those in
    // [begin, end) exist, and others become 0.
    template <int SIZE> __device__ void read(uint64_t base, uint32_t* words) const {
        constexpr int RUN = QUADS || SIZE == 4 ? 4 : 8, WORDS = RUN * SIZE / 4;
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < 8 / RUN; i++)
                load_words<WORDS>(base + uint64_t(place(i * RUN) * SIZE), words + i * WORDS);
        } else {
#pragma unroll
            for (int i = 0; i < 2 * SIZE; i++) words[i] = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int at = place(j);
                if (at < begin || at >= end) continue;
                const uint64_t from = base + uint64_t(int64_t(at) * SIZE);
                if constexpr (SIZE == 4) words[j] = *reinterpret_cast<const uint32_t*>(from);
                else if constexpr (SIZE == 2)
                    words[j / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(from)) << 16 * (j % 2);
                else words[j / 4] |= uint32_t(*reinterpret_cast<const uint8_t*>(from)) << 8 * (j % 4);
            }
        }
    }
    template <int SIZE> __device__ void write(uint64_t base, const uint32_t* words) const {
        constexpr int RUN = QUADS || SIZE == 4 ? 4 : 8, WORDS = RUN * SIZE / 4;
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < 8 / RUN; i++)
                store_words<WORDS>(base + uint64_t(place(i * RUN) * SIZE), words + i * WORDS);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int at = place(j);
                if (at < begin || at >= end) continue;
                const uint64_t to = base + uint64_t(int64_t(at) * SIZE);
                if constexpr (SIZE == 4) *reinterpret_cast<uint32_t*>(to) = words[j];
                else if constexpr (SIZE == 2) *reinterpret_cast<uint16_t*>(to) = uint16_t(words[j / 2] >> 16 * (j % 2));
                else *reinterpret_cast<uint8_t*>(to) = uint8_t(words[j / 4] >> 8 * (j % 4));
            }
        }
    }

    // 16 random bits for each of the lane's elements, in four words.
    __device__ Random draw(uint32_t seed, uint32_t step, int64_t group, uint32_t stream) const {
        if (!QUADS) return cria::draw(seed, step, group + lane, stream);
        // Two lanes share the groups lane / 2 and 16 + lane / 2. Each draws one, and they exchange halves.
        bool odd = lane & 1;
        Random mine = cria::draw(seed, step, group + lane / 2 + (odd ? 16 : 0), stream);
        uint32_t a = __shfl_xor_sync(~0u, odd ? mine.word[0] : mine.word[2], 1);
        uint32_t b = __shfl_xor_sync(~0u, odd ? mine.word[1] : mine.word[3], 1);
        if (odd) return {{a, b, mine.word[2], mine.word[3]}};
        return {{mine.word[0], mine.word[1], a, b}};
    }
};

__device__ inline void widen(const uint32_t* words, float (&x)[8]) {
#pragma unroll
    for (int j = 0; j < 4; j++) x[2 * j] = lower(words[j]), x[2 * j + 1] = upper(words[j]);
}

__device__ inline void as_floats(const uint32_t* words, float (&x)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = __uint_as_float(words[j]);
}

// Two numbers in bf16, rounded at random.
__device__ inline void round_at_random(const float (&x)[8], const Random& random, uint32_t* words) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        words[j] = join_upper(uint32_t(quiet_bits(x[2 * j])) + (random.word[j] & 0xffff),
                              uint32_t(quiet_bits(x[2 * j + 1])) + (random.word[j] >> 16));
}

template <int MASTER, int STATES, bool WHOLE>
__device__ void update_tile(const Tensor& t, const Numbers& s, float scale, float decay, float rate, const Tables& tables,
                            int tile, int lane_number, int64_t first, int end) {
    constexpr bool QUADS = MASTER == FP32_PARAM || MASTER == FP32 || STATES == STATES_FP32;
    constexpr int STATE_SIZE = STATES == STATES_FP32 ? 4 : STATES == STATES_BF16 ? 2 : 1;
    constexpr bool RANDOM = MASTER == STOCHASTIC || STATES == STATES_BF16;
    const Lane<QUADS, WHOLE, RANDOM> lane{lane_number, first < 0 ? int(-first) : 0, end};
    auto at = [&](uint64_t base, int size) { return base + uint64_t(first * size); };
    uint32_t words[8], other[8];
    float g[8], m[8], v[8], p[8];

    uint32_t raw_m[8], raw_v[8];
    if (t.flags & FP32_GRAD) {
        lane.template read<4>(at(t.grad, 4), words);
        as_floats(words, g);
    } else {
        lane.template read<2>(at(t.grad, 2), words);
        widen(words, g);
    }
    lane.template read<STATE_SIZE>(at(t.m, STATE_SIZE), raw_m);
    lane.template read<STATE_SIZE>(at(t.v, STATE_SIZE), raw_v);
    if constexpr (MASTER == FP32) lane.template read<4>(at(t.rest, 4), words);
    else if constexpr (MASTER == FP32_PARAM) lane.template read<4>(at(t.param, 4), words);
    else lane.template read<2>(at(t.param, 2), words);
    if constexpr (MASTER == SPLIT) lane.template read<2>(at(t.rest, 2), other);

    float m_most = 0, v_most = 0;
    if constexpr (STATES == STATES_8BIT) {
        m_most = reinterpret_cast<const float*>(t.m_absmax)[tile];
        v_most = reinterpret_cast<const float*>(t.v_absmax)[tile];
    }
    if constexpr (STATES == STATES_FP32) as_floats(raw_m, m), as_floats(raw_v, v);
    else if constexpr (STATES == STATES_BF16) widen(raw_m, m), widen(raw_v, v);
    else {
        decode<true>({raw_m[0], raw_m[1]}, m_most, tables, m);
        decode<false>({raw_v[0], raw_v[1]}, v_most, tables, v);
    }
    if constexpr (MASTER == FP32 || MASTER == FP32_PARAM) as_floats(words, p);
    else widen(words, p);
    if constexpr (MASTER == SPLIT) {
#pragma unroll
        for (int j = 0; j < 4; j++) {  // a low half below 0 where rounding half up took one too many
            p[2 * j] = __int_as_float(__float_as_int(p[2 * j]) + (int32_t(other[j] << 16) >> 16));
            p[2 * j + 1] = __int_as_float(__float_as_int(p[2 * j + 1]) + (int32_t(other[j]) >> 16));
        }
    }

#pragma unroll
    for (int j = 0; j < 8; j++) {
        float x = mul(g[j], scale);
        m[j] = add(m[j], mul(sub(x, m[j]), s.rest1));
        v[j] = add(mul(v[j], s.beta2), mul(mul(x, x), s.rest2));
    }
    float steps[8];
    divide(m, v, s.eps, steps);
#pragma unroll
    for (int j = 0; j < 8; j++) p[j] = sub(mul(p[j], decay), mul(steps[j], rate));

    const int64_t group = t.group + int64_t(tile) * (TILE / 8);
    if constexpr (STATES == STATES_FP32) {
        lane.template write<4>(at(t.m, 4), reinterpret_cast<const uint32_t*>(m));
        lane.template write<4>(at(t.v, 4), reinterpret_cast<const uint32_t*>(v));
    } else if constexpr (STATES == STATES_BF16) {
        round_at_random(m, lane.draw(t.seed, s.step, group, 1), words);
        lane.template write<2>(at(t.m, 2), words);
        round_at_random(v, lane.draw(t.seed, s.step, group, 2), words);
        lane.template write<2>(at(t.v, 2), words);
    } else {
        if constexpr (!WHOLE) {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (lane.place(j) >= end) m[j] = v[j] = 0;
        }
        uint32_t codes[2];
        m_most = encode<true>(m, tables, codes);
        lane.template write<1>(at(t.m, 1), codes);
        v_most = encode<false>(v, tables, codes);
        lane.template write<1>(at(t.v, 1), codes);
        if (lane_number == 0) {
            reinterpret_cast<float*>(t.m_absmax)[tile] = m_most;
            reinterpret_cast<float*>(t.v_absmax)[tile] = v_most;
        }
    }

    if constexpr (MASTER == FP32_PARAM) {
        lane.template write<4>(at(t.param, 4), reinterpret_cast<const uint32_t*>(p));
    } else if constexpr (MASTER == FP32) {
        lane.template write<4>(at(t.rest, 4), reinterpret_cast<const uint32_t*>(p));
#pragma unroll
        for (int j = 0; j < 4; j++) words[j] = nearest(p[2 * j], p[2 * j + 1]);
    } else if constexpr (MASTER == SPLIT) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t a = uint32_t(quiet_bits(p[2 * j])), b = uint32_t(quiet_bits(p[2 * j + 1]));
            other[j] = join(a, b), words[j] = join_upper(a + 0x8000, b + 0x8000);
        }
        lane.template write<2>(at(t.rest, 2), other);
    } else round_at_random(p, lane.draw(t.seed, s.step, group, 0), words);
    if constexpr (MASTER != FP32_PARAM) lane.template write<2>(at(t.param, 2), words);
}

template <int MASTER, int STATES>
__device__ inline void choose_tile(const Tensor& t, const Numbers& s, float scale, float decay, float rate,
                                   const Tables& tables, int tile, int lane) {
    const int64_t first = int64_t(tile) * TILE - t.shift;
    const int end = int(min(t.n - first, int64_t(TILE)));
    if ((t.flags & ALIGNED) && end == TILE)
        update_tile<MASTER, STATES, true>(t, s, scale, decay, rate, tables, tile, lane, first, end);
    else update_tile<MASTER, STATES, false>(t, s, scale, decay, rate, tables, tile, lane, first, end);
}

// The factor of gradients that torch's clip_grad_norm_ computes: min(1, clip / (norm + 1e-6)), NaN for a norm of NaN.
__device__ inline float clip_factor(float clip, float norm) {
    const float factor = mul(__frcp_rn(add(norm, 1e-6f)), clip);
    return factor > 1 ? 1.f : factor;
}

// lr and scale: numbers, or where their pointers are given the numbers there. With norm_at, the norm of all gradients,
// scale is the factor that clips them. apply: 0 there changes nothing.
template <int MASTER, int STATES>
__global__ void __launch_bounds__(THREADS, 1)
adamw(const Tensor* table, int64_t n_tensors, int64_t n_chunks, const float* maps, const uint2* cells, float lr,
      const float* lr_at, float scale, const float* scale_at, float clip, const float* norm_at, const uint8_t* apply,
      float rest1, float beta2, float rest2, float eps, float factor, int64_t step) {
    extern __shared__ __align__(16) char shared[];
    if (apply && !*apply) return;
    if (STATES == STATES_8BIT) Tables::fill(shared, maps, cells);
    const Numbers numbers{rest1, beta2, rest2, eps, factor, uint32_t(step)};
    const Tables tables(shared, int(threadIdx.x) % 32);
    const int lane = int(threadIdx.x) % 32;
    for (int64_t chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        const Tensor t = find_tensor(table, n_tensors, chunk);
        // Read for each chunk anew, and not kept in registers over all of them.
        const float lr_now = lr_at ? *lr_at : lr;
        const float scale_now = norm_at ? clip_factor(clip, *norm_at) : scale_at ? *scale_at : scale;
        const float decay = sub(1.f, mul(lr_now, t.decay)), rate = mul(lr_now, numbers.factor);
        // 32 bits number the tiles of 5 x 10^11 elements.
        const int first = int(chunk - t.first_chunk) * (CHUNK / TILE), after = int((t.n + t.shift + TILE - 1) / TILE);
        const int last = min(first + CHUNK / TILE, after);
        for (int tile = first + int(threadIdx.x) / 32; tile < last; tile += THREADS / 32)
            if (STATES == STATES_8BIT && !t.m_absmax)  // too small for 8 bits
                choose_tile<MASTER, STATES_FP32>(t, numbers, scale_now, decay, rate, tables, tile, lane);
            else choose_tile<MASTER, STATES>(t, numbers, scale_now, decay, rate, tables, tile, lane);
    }
}

using Kernel = void (*)(const Tensor*, int64_t, int64_t, const float*, const uint2*, float, const float*, float,
                        const float*, float, const float*, const uint8_t*, float, float, float, float, float, int64_t);

template <int MASTER> Kernel choose_states(int states) {
    return states == STATES_FP32   ? adamw<MASTER, STATES_FP32>
           : states == STATES_BF16 ? adamw<MASTER, STATES_BF16>
                                   : adamw<MASTER, STATES_8BIT>;
}
static Kernel choose(int master, int states) {
    return master == FP32_PARAM ? choose_states<FP32_PARAM>(states)
           : master == FP32     ? choose_states<FP32>(states)
           : master == SPLIT    ? choose_states<SPLIT>(states)
                                : choose_states<STOCHASTIC>(states);
}

}  // namespace cria

// master, states: the enumerations' numbers. The other arguments are the kernel's.
EXPORT int cria_adamw(const void* table, int64_t n_tensors, int64_t n_chunks, const float* maps, const void* cells,
                      float lr, const float* lr_at, float scale, const float* scale_at, float clip,
                      const float* norm_at, const uint8_t* apply, float rest1, float beta2, float rest2, float eps, float factor, int64_t step, int master,
                      int states, void* stream) {
    using namespace cria;
    if (n_tensors < 1 || n_chunks < 1) return BAD_SIZE;
    if (master < FP32_PARAM || master > STOCHASTIC || states < STATES_FP32 || states > STATES_8BIT) return BAD_MODE;
    const Kernel kernel = choose(master, states);
    const size_t shared_bytes = states == STATES_8BIT ? TABLES_BYTES : 0;
    unsigned blocks = 0;
    if (int code = fill_device(kernel, THREADS, shared_bytes, n_chunks, blocks)) return code;
    kernel<<<blocks, THREADS, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Tensor*>(table), n_tensors, n_chunks, maps, static_cast<const uint2*>(cells), lr, lr_at, scale,
        scale_at, clip, norm_at, apply, rest1, beta2, rest2, eps, factor, step);
    return check_launch();
}

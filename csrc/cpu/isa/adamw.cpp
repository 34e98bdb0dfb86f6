// AdamW's update of blocks of 256 elements, compiled for one instruction set. kernels/ops/adamw.py is the specification:
// every sum and product is rounded as adamw_ref rounds it.
#include "../adamw.h"
#include "vectors.h"

namespace {

constexpr float TINY = 1.17549435e-38f;  // 2^-126: the least maximum with a finite inverse

// Philox4x32-10: for each counter (group, stream) 8 numbers of 16 bits, from the group `first` on.
void draw_bits(uint64_t first, int groups, uint32_t stream, uint32_t step, uint32_t seed, uint16_t* out) {
    constexpr int AT_ONCE = LANES / 2;
    const vq word = 0xFFFFFFFF - vq{};
    for (int done = 0; done < groups; done += AT_ONCE) {
        vq c0 = first + done - vq{};
        for (int i = 0; i < AT_ONCE; i++) c0[i] += i;
        vq c1 = c0 >> 32, c2 = stream - vq{}, c3 = vq{};
        for (uint32_t i = 0; i < 10; i++) {
            const vq a = multiply_low(c0, 0xD2511F53 - vq{}), b = multiply_low(c2, 0xCD9E8D57 - vq{});
            c0 = (b >> 32) ^ c1 ^ static_cast<uint64_t>(seed + i * 0x9E3779B9u);  // only lower halves count
            c1 = b;
            c2 = (a >> 32) ^ c3 ^ static_cast<uint64_t>(step + i * 0xBB67AE85u);
            c3 = a;
        }
        const vq x = (c0 & word) | (c1 << 32), y = (c2 & word) | (c3 << 32);
        for (int i = 0; i < AT_ONCE; i++) {
            std::memcpy(out + 8 * (done + i), reinterpret_cast<const char*>(&x) + 8 * i, 8);
            std::memcpy(out + 8 * (done + i) + 4, reinterpret_cast<const char*>(&y) + 8 * i, 8);
        }
    }
}

struct Random {  // 16 bits for each element of a block, which may begin within a group of eight
    uint16_t bits[BLOCK + 8 * LANES];
    int shift;

    void draw(const AdamW& a, int64_t begin, uint32_t stream) {
        const uint64_t first = static_cast<uint64_t>(a.offset + begin);
        shift = static_cast<int>(first % 8);
        draw_bits(first / 8, BLOCK / 8 + (shift != 0), stream, a.step, a.seed, bits);
    }
    vu at(int i) const { return __builtin_convertvector(load<vh>(bits + shift + i), vu); }
};

// Rounding takes whether a vector is known to hold finite numbers only, which saves most of its instructions.

vu quiet_bits(vf x, bool is_finite) {  // one NaN for all
    return is_finite ? (vu)x : (vu)(x == x ? x : fill(__builtin_nanf("")));
}

vi not_finite(vf x) { return ((vi)x & 0x7F800000) == 0x7F800000; }

vh upper_halves(vu bits) { return __builtin_convertvector(bits >> 16, vh); }

vh round_at_random(vf x, vu random, bool is_finite) {
    const vu bits = quiet_bits(x, is_finite);
    return upper_halves(bits + (is_finite ? random : random & (vu)~not_finite(x)));
}

vh round_to_even(vf x, bool is_finite) {
    const vu bits = quiet_bits(x, is_finite);
    return upper_halves(bits + 0x7FFFu + ((bits >> 16) & 1u));  // of NaN and Inf the upper half stays
}

// The largest magnitude's bits, as integers: NaN is above Inf, and Inf above all numbers.
float largest(vu bits) {
    uint32_t most = 0;
    for (int i = 0; i < LANES; i++) most = bits[i] > most ? bits[i] : most;
    float x;
    std::memcpy(&x, &most, 4);
    return x;
}

vu maximum(vu a, vu b) {  // of numbers under 2^31
    return (vu)((vi)a > (vi)b ? (vi)a : (vi)b);
}

// Codes of a block of numbers; the maximum was found before.
template <bool SIGNED>
void encode(const float* x, float absmax, const DynamicMap& map, uint8_t* codes) {
    if (!(absmax >= TINY && absmax < __builtin_inff())) {
        std::memset(codes, SIGNED ? 127 : 0, BLOCK);
        return;
    }
    uint32_t wide[BLOCK];
    const vf inverse = fill(1 / absmax);
    vf starts[DECADES], slopes[DECADES], intercepts[DECADES];
    for (int piece = 0; piece < DECADES; piece++) {
        starts[piece] = fill(map.starts[piece]);
        slopes[piece] = fill(map.slopes[piece]);
        intercepts[piece] = fill(map.intercepts[piece]);
    }
    for (int i = 0; i < BLOCK; i += LANES) {
        const vf value = load<vf>(x + i);
        const vf ratio = (vf)((vu)value & 0x7FFFFFFFu) * inverse;
        vf slope = slopes[0], intercept = intercepts[0];
        for (int piece = 1; piece < DECADES; piece++) {
            const vi begun = ratio >= starts[piece];
            slope = begun ? slopes[piece] : slope;
            intercept = begun ? intercepts[piece] : intercept;
        }
        const vf exact = ratio * slope + intercept, most = intercept * 2.25f - 0.5f;
        const vi rank = __builtin_convertvector((exact < most ? exact : most), vi);
        vi code;
        if (SIGNED) {
            const vi is_negative = value < vf{};
            code = 127 + ((rank ^ is_negative) - is_negative);
            code &= code >= 0;  // there is no -1
        } else {
            code = rank - 1;
        }
        store(wide + i, code);
    }
    for (int i = 0; i < BLOCK; i++) codes[i] = static_cast<uint8_t>(wide[i]);  // GCC packs these, not one vector
}

void decode(const uint8_t* codes, float absmax, const DynamicMap& map, float* out) {
    for (int i = 0; i < BLOCK; i++) out[i] = map.entries[codes[i]] * absmax;
}

struct Streams {  // where the parts of one block lie
    void* param;
    const void* grad;
    void *m, *v;
    uint16_t* low;
    float* master;
};

template <int GRAD>
vf load_grad(const Streams& s, int i) {
    if (GRAD == GRAD_FP32) return load<vf>(static_cast<const float*>(s.grad) + i);
    return widen_bf16(load<vh>(static_cast<const uint16_t*>(s.grad) + i));
}

template <int MASTER>
vf load_master(const Streams& s, int i) {
    if (MASTER == PARAM_FP32) return load<vf>(static_cast<const float*>(s.param) + i);
    if (MASTER == MASTER_FP32) return load<vf>(s.master + i);
    const vf wide = widen_bf16(load<vh>(static_cast<const uint16_t*>(s.param) + i));
    if (MASTER == MASTER_STOCHASTIC) return wide;
    typedef int16_t vs __attribute__((vector_size(VECTOR_BYTES / 2)));
    return (vf)((vu)wide + (vu)__builtin_convertvector(load<vs>(s.low + i), vi));
}

template <int MASTER>
void store_master(const Streams& s, int i, vf p, bool is_finite, const Random& random) {
    uint16_t* const param = static_cast<uint16_t*>(s.param) + i;
    if (MASTER == PARAM_FP32) {
        store(static_cast<float*>(s.param) + i, p);
    } else if (MASTER == MASTER_FP32) {
        store(s.master + i, p);
        store(param, round_to_even(p, is_finite));
    } else if (MASTER == MASTER_SPLIT) {
        const vu bits = quiet_bits(p, is_finite);
        store(s.low + i, __builtin_convertvector(bits, vh));
        store(param, upper_halves(bits + 0x8000u));
    } else {
        store(param, round_at_random(p, random.at(i), is_finite));
    }
}

template <int GRAD, int STATES, int MASTER>
void update_block(const AdamW& a, const Streams& s, int64_t begin, int n) {
    Random for_m, for_v, for_p;
    if (STATES == STATES_BF16) {
        for_m.draw(a, begin, 1);
        for_v.draw(a, begin, 2);
    }
    if (MASTER == MASTER_STOCHASTIC) for_p.draw(a, begin, 0);
    float wide_m[BLOCK], wide_v[BLOCK];  // of 8-bit states
    const int64_t block = begin / BLOCK;
    if (STATES == STATES_8BIT) {
        decode(static_cast<uint8_t*>(s.m), a.m_absmax[block], a.maps[0], wide_m);
        decode(static_cast<uint8_t*>(s.v), a.v_absmax[block], a.maps[1], wide_v);
    }
    float *const m32 = STATES == STATES_8BIT ? wide_m : static_cast<float*>(s.m);
    float *const v32 = STATES == STATES_8BIT ? wide_v : static_cast<float*>(s.v);
    uint16_t *const m16 = static_cast<uint16_t*>(s.m), *const v16 = static_cast<uint16_t*>(s.v);
    const vf scale = fill(a.scale), rest1 = fill(a.rest1), beta2 = fill(a.beta2), rest2 = fill(a.rest2);
    const vf eps = fill(a.eps), decay = fill(a.decay), rate = fill(a.rate);
    vu m_most{}, v_most{};
    for (int i = 0; i < BLOCK; i += LANES) {
        const vf g = load_grad<GRAD>(s, i) * scale;
        vf m = STATES == STATES_BF16 ? widen_bf16(load<vh>(m16 + i)) : load<vf>(m32 + i);
        vf v = STATES == STATES_BF16 ? widen_bf16(load<vh>(v16 + i)) : load<vf>(v32 + i);
        m = m + (g - m) * rest1;
        v = v * beta2 + (g * g) * rest2;
        vf p = load_master<MASTER>(s, i) * decay;
        p = p - m / (square_root(v) + eps) * rate;
        const bool is_finite = !any(not_finite(m + v + p));  // a finite sum has finite terms
        store_master<MASTER>(s, i, p, is_finite, for_p);
        if (STATES == STATES_BF16) {
            store(m16 + i, round_at_random(m, for_m.at(i), is_finite));
            store(v16 + i, round_at_random(v, for_v.at(i), is_finite));
        } else {
            store(m32 + i, m);
            store(v32 + i, v);
        }
        if (STATES == STATES_8BIT && n == BLOCK) {
            m_most = maximum(m_most, (vu)m & 0x7FFFFFFFu);
            v_most = maximum(v_most, (vu)v & 0x7FFFFFFFu);
        }
    }
    if (STATES != STATES_8BIT) return;
    if (n < BLOCK) {  // what lies past the tensor's end may have become NaN
        std::memset(wide_m + n, 0, (BLOCK - n) * 4);
        std::memset(wide_v + n, 0, (BLOCK - n) * 4);
        for (int i = 0; i < BLOCK; i += LANES) {
            m_most = maximum(m_most, load<vu>(wide_m + i) & 0x7FFFFFFFu);
            v_most = maximum(v_most, load<vu>(wide_v + i) & 0x7FFFFFFFu);
        }
    }
    encode<true>(wide_m, a.m_absmax[block] = largest(m_most), a.maps[0], static_cast<uint8_t*>(s.m));
    encode<false>(wide_v, a.v_absmax[block] = largest(v_most), a.maps[1], static_cast<uint8_t*>(s.v));
}

template <class T>
T* move(T* stream, int64_t bytes) {  // by integers: a stream that is not there may be moved too
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(stream) + static_cast<uintptr_t>(bytes));
}

template <int GRAD, int STATES, int MASTER>
void update(const AdamW& a, int64_t first, int64_t last) {
    constexpr int grad_bytes = GRAD == GRAD_FP32 ? 4 : 2, param_bytes = MASTER == PARAM_FP32 ? 4 : 2;
    constexpr int state_bytes = STATES == STATES_FP32 ? 4 : STATES == STATES_BF16 ? 2 : 1;
    for (int64_t block = first; block < last; block++) {
        const int64_t begin = block * BLOCK, n = a.n - begin < BLOCK ? a.n - begin : BLOCK;
        const Streams s = {
            move(a.param, begin * param_bytes), move(a.grad, begin * grad_bytes), move(a.m, begin * state_bytes),
            move(a.v, begin * state_bytes), move(a.low, begin * 2), move(a.master, begin * 4),
        };
        if (n == BLOCK) {
            update_block<GRAD, STATES, MASTER>(a, s, begin, BLOCK);
            continue;
        }
        // The tensor's end: a whole block of zeros, into which it is copied and out of which it is copied back.
        alignas(64) char param[BLOCK * 4] = {}, grad[BLOCK * 4] = {}, m[BLOCK * 4] = {}, v[BLOCK * 4] = {};
        uint16_t low[BLOCK] = {};
        float master[BLOCK] = {};
        if (STATES == STATES_8BIT) std::memset(m, 127, BLOCK);
        const Streams local = {param, grad, m, v, low, master};
        std::memcpy(param, s.param, n * param_bytes);
        std::memcpy(grad, s.grad, n * grad_bytes);
        std::memcpy(m, s.m, n * state_bytes);
        std::memcpy(v, s.v, n * state_bytes);
        if (MASTER == MASTER_SPLIT) std::memcpy(low, s.low, n * 2);
        if (MASTER == MASTER_FP32) std::memcpy(master, s.master, n * 4);
        update_block<GRAD, STATES, MASTER>(a, local, begin, static_cast<int>(n));
        std::memcpy(s.param, param, n * param_bytes);
        std::memcpy(s.m, m, n * state_bytes);
        std::memcpy(s.v, v, n * state_bytes);
        if (MASTER == MASTER_SPLIT) std::memcpy(s.low, low, n * 2);
        if (MASTER == MASTER_FP32) std::memcpy(s.master, master, n * 4);
    }
}

template <int GRAD, int STATES>
void choose_master(const AdamW& a, int64_t first, int64_t last) {
    switch (a.master_type) {
        case PARAM_FP32: return update<GRAD, STATES, PARAM_FP32>(a, first, last);
        case MASTER_FP32: return update<GRAD, STATES, MASTER_FP32>(a, first, last);
        case MASTER_SPLIT: return update<GRAD, STATES, MASTER_SPLIT>(a, first, last);
        default: return update<GRAD, STATES, MASTER_STOCHASTIC>(a, first, last);
    }
}

template <int GRAD>
void choose_states(const AdamW& a, int64_t first, int64_t last) {
    switch (a.states) {
        case STATES_FP32: return choose_master<GRAD, STATES_FP32>(a, first, last);
        case STATES_BF16: return choose_master<GRAD, STATES_BF16>(a, first, last);
        default: return choose_master<GRAD, STATES_8BIT>(a, first, last);
    }
}

}  // namespace

namespace ISA {
void adamw_blocks(const AdamW& a, int64_t first, int64_t last) {
    a.grad_type == GRAD_FP32 ? choose_states<GRAD_FP32>(a, first, last) : choose_states<GRAD_BF16>(a, first, last);
}
}  // namespace ISA

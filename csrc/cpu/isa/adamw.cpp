// AdamW's update of blocks of 256 elements, compiled for one instruction set. kernels/ops/adamw.py is the specification:
// every sum and product is rounded as adamw_ref rounds it.
#include "../adamw.h"
#include "eight_bit.h"
#include "random_bits.h"
#include "vectors.h"

namespace {

// ---- two vectors at a time ------------------------------------------------------------------------------------------

// A block is updated by 2 x LANES numbers at a time, Two vectors. Where states have 32 bits, a holds the first half of
// them and b the second. Otherwise they are PAIRED: what has 16 bits is read and written as 32-bit words, a holds the
// even places, which are the words' lower halves, and b the odd ones. A shift or a mask then takes a half, which would
// have to be spread over lanes first.
template <bool PAIRED>
Two<vu> load_halves(const uint16_t* from) {  // in the upper halves of the lanes
    if (!PAIRED) return {(vu)widen_bf16(load<vh>(from)), (vu)widen_bf16(load<vh>(from + LANES))};
    const vu words = load<vu>(from);
    return {words << 16, words & 0xFFFF0000u};
}

template <bool PAIRED>
void store_halves(uint16_t* to, Two<vu> x, bool past_caches = false) {  // the upper halves of the lanes
    vu words;
    if (PAIRED) words = (x.a >> 16) | (x.b & 0xFFFF0000u);
    else words = join(__builtin_convertvector(x.a >> 16, vh), __builtin_convertvector(x.b >> 16, vh));
    if (past_caches) store_past_caches(to, words);
    else store(to, words);
}

template <bool PAIRED>
Two<vf> load_floats(const float* from) {
    const Two<vf> x = {load<vf>(from), load<vf>(from + LANES)};
    return PAIRED ? Two<vf>{pick(x.a, x.b, EVEN), pick(x.a, x.b, ODD)} : x;
}

template <bool PAIRED>
void store_floats(float* to, Two<vf> x) {
    store(to, PAIRED ? pick(x.a, x.b, FIRST_IN_TURN) : x.a);
    store(to + LANES, PAIRED ? pick(x.a, x.b, LAST_IN_TURN) : x.b);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// Rounding takes whether a vector is known to hold finite numbers only, which saves most of its instructions. What has
// 16 bits is left in the upper halves.

vu quiet_bits(vf x, bool is_finite) {  // one NaN for all
    return is_finite ? (vu)x : (vu)(x == x ? x : fill(__builtin_nanf("")));
}

vu round_at_random(vf x, vu random, bool is_finite) {
    return quiet_bits(x, is_finite) + (is_finite ? random : random & (vu)~not_finite(x));
}

vu round_to_even(vf x, bool is_finite) {
    const vu bits = quiet_bits(x, is_finite);
    return bits + 0x7FFFu + ((bits >> 16) & 1u);  // of NaN and Inf the upper half stays
}

// ---- one block ------------------------------------------------------------------------------------------------------

struct Streams {  // where the parts of one block lie
    void* param;
    const void* grad;
    void *m, *v;
    uint16_t* low;
    float* master;
    bool past_caches;  // param, which MASTER_FP32 only writes: no cache line of it is fetched to be overwritten
};

template <int GRAD, bool PAIRED>
Two<vf> load_grad(const Streams& s, int i) {
    if (GRAD == GRAD_FP32) return load_floats<PAIRED>(static_cast<const float*>(s.grad) + i);
    const Two<vu> bits = load_halves<PAIRED>(static_cast<const uint16_t*>(s.grad) + i);
    return {(vf)bits.a, (vf)bits.b};
}

template <int MASTER, bool PAIRED>
Two<vf> load_master(const Streams& s, int i) {
    if (MASTER == PARAM_FP32) return load_floats<PAIRED>(static_cast<const float*>(s.param) + i);
    if (MASTER == MASTER_FP32) return load_floats<PAIRED>(s.master + i);
    const Two<vu> high = load_halves<PAIRED>(static_cast<const uint16_t*>(s.param) + i);
    if (MASTER == MASTER_STOCHASTIC) return {(vf)high.a, (vf)high.b};
    const Two<vu> low = load_halves<PAIRED>(s.low + i);  // signed
    return {(vf)(high.a + (vu)((vi)low.a >> 16)), (vf)(high.b + (vu)((vi)low.b >> 16))};
}

template <int MASTER, bool PAIRED>
void store_master(const Streams& s, int i, Two<vf> p, bool is_finite, const Random& random) {
    uint16_t* const param = static_cast<uint16_t*>(s.param) + i;
    if (MASTER == PARAM_FP32) {
        store_floats<PAIRED>(static_cast<float*>(s.param) + i, p);
    } else if (MASTER == MASTER_FP32) {
        store_floats<PAIRED>(s.master + i, p);
        store_halves<PAIRED>(param, {round_to_even(p.a, is_finite), round_to_even(p.b, is_finite)}, s.past_caches);
    } else if (MASTER == MASTER_SPLIT) {
        const Two<vu> bits = {quiet_bits(p.a, is_finite), quiet_bits(p.b, is_finite)};
        store_halves<PAIRED>(s.low + i, {bits.a << 16, bits.b << 16});
        store_halves<PAIRED>(param, {bits.a + 0x8000u, bits.b + 0x8000u});
    } else {
        const Two<vu> drawn = load_halves<PAIRED>(random.from(i));
        store_halves<PAIRED>(
            param, {round_at_random(p.a, drawn.a >> 16, is_finite), round_at_random(p.b, drawn.b >> 16, is_finite)});
    }
}

struct States {  // m or v of one block
    void* data;
    float* absmax;          // of 8-bit states
    const DynamicMap* map;  // likewise
    alignas(64) float wide[BLOCK];  // the new numbers of 8-bit states, as encode takes them
};

template <int STATES>
Two<vf> load_state(const States& state, int i) {
    if (STATES == STATES_8BIT) return decode(static_cast<uint8_t*>(state.data) + i, *state.absmax, *state.map);
    if (STATES == STATES_FP32) return load_floats<false>(static_cast<float*>(state.data) + i);
    const Two<vu> bits = load_halves<true>(static_cast<uint16_t*>(state.data) + i);
    return {(vf)bits.a, (vf)bits.b};
}

template <int STATES>
void store_state(States& state, int i, Two<vf> x, bool is_finite, const Random& random) {
    if (STATES == STATES_BF16) {
        const Two<vu> drawn = load_halves<true>(random.from(i));
        store_halves<true>(
            static_cast<uint16_t*>(state.data) + i,
            {round_at_random(x.a, drawn.a >> 16, is_finite), round_at_random(x.b, drawn.b >> 16, is_finite)});
    } else {
        store_floats<false>((STATES == STATES_8BIT ? state.wide : static_cast<float*>(state.data)) + i, x);
    }
}

struct Settings {  // what an update multiplies by, in every lane
    vf scale, rest1, beta2, rest2, eps, decay, rate;

    explicit Settings(const AdamW& a)
        : scale(fill(a.scale)), rest1(fill(a.rest1)), beta2(fill(a.beta2)), rest2(fill(a.rest2)), eps(fill(a.eps)),
          decay(fill(a.decay)), rate(fill(a.rate)) {}

    void update(vf g, vf* m, vf* v, vf* p) const {
        g *= scale;
        *m = *m + (g - *m) * rest1;
        *v = *v * beta2 + (g * g) * rest2;
        *p *= decay;
        *p = *p - *m / (square_root(*v) + eps) * rate;
    }
};

struct Maximum {  // the largest magnitude, compared as integers: NaN is above Inf, and Inf above all numbers
    vi bits{};

    void add(vf x) {
        const vi other = (vi)x & 0x7FFFFFFF;
        bits = bits > other ? bits : other;
    }
    float get() const {
        int32_t most = 0;
        for (int i = 0; i < LANES; i++) most = bits[i] > most ? bits[i] : most;
        float x;
        std::memcpy(&x, &most, 4);
        return x;
    }
};

struct Maps {  // of 8-bit states, ready for use
    Pieces of_m, of_v;
};

// The place of a block's element in a block of floats, see eight_bit.h.
int place_of(int element) {
    const int within = element % (2 * LANES);
    return element - within + within / 2 + within % 2 * LANES;
}

template <int GRAD, int STATES, int MASTER>
void update_block(const AdamW& a, const Settings& settings, const Maps* maps, const Streams& s, int64_t begin, int n) {
    constexpr bool PAIRED = STATES != STATES_FP32;
    Random for_m, for_v, for_p;
    if (STATES == STATES_BF16) {
        for_m.draw(a, begin, 1);
        for_v.draw(a, begin, 2);
    }
    if (MASTER == MASTER_STOCHASTIC) for_p.draw(a, begin, 0);
    const int64_t block = begin / BLOCK;
    States m_of, v_of;
    m_of.data = s.m, v_of.data = s.v;
    if (STATES == STATES_8BIT) {
        m_of.absmax = a.m_absmax + block, v_of.absmax = a.v_absmax + block;
        m_of.map = &a.maps[0], v_of.map = &a.maps[1];
    }
    Maximum m_most, v_most;
    for (int i = 0; i < BLOCK; i += 2 * LANES) {
        const Two<vf> g = load_grad<GRAD, PAIRED>(s, i);
        Two<vf> m = load_state<STATES>(m_of, i), v = load_state<STATES>(v_of, i), p = load_master<MASTER, PAIRED>(s, i);
        settings.update(g.a, &m.a, &v.a, &p.a);
        settings.update(g.b, &m.b, &v.b, &p.b);
        // A finite sum has finite terms.
        const bool all_finite = is_finite((m.a + v.a + p.a) + (m.b + v.b + p.b));
        store_master<MASTER, PAIRED>(s, i, p, all_finite, for_p);
        store_state<STATES>(m_of, i, m, all_finite, for_m);
        store_state<STATES>(v_of, i, v, all_finite, for_v);
        if (STATES == STATES_8BIT && n == BLOCK) {
            m_most.add(m.a), m_most.add(m.b);
            v_most.add(v.a), v_most.add(v.b);
        }
    }
    if (STATES != STATES_8BIT) return;
    if (n < BLOCK) {  // what lies past the tensor's end may have become NaN
        for (int element = n; element < BLOCK; element++) m_of.wide[place_of(element)] = v_of.wide[place_of(element)] = 0;
        for (int i = 0; i < BLOCK; i += LANES) {
            m_most.add(load<vf>(m_of.wide + i));
            v_most.add(load<vf>(v_of.wide + i));
        }
    }
    encode<true>(m_of.wide, *m_of.absmax = m_most.get(), maps->of_m, static_cast<uint8_t*>(s.m));
    encode<false>(v_of.wide, *v_of.absmax = v_most.get(), maps->of_v, static_cast<uint8_t*>(s.v));
}

// ---- many blocks ----------------------------------------------------------------------------------------------------

template <class T>
T* move(T* stream, int64_t bytes) {  // by integers: a stream that is not there may be moved too
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(stream) + static_cast<uintptr_t>(bytes));
}

template <int GRAD, int STATES, int MASTER>
void update(const AdamW& a, const Maps* maps, int64_t first, int64_t last) {
    constexpr int grad_bytes = GRAD == GRAD_FP32 ? 4 : 2, param_bytes = MASTER == PARAM_FP32 ? 4 : 2;
    constexpr int state_bytes = STATES == STATES_FP32 ? 4 : STATES == STATES_BF16 ? 2 : 1;
    const Settings settings(a);
    for (int64_t block = first; block < last; block++) {
        const int64_t begin = block * BLOCK, n = a.n - begin < BLOCK ? a.n - begin : BLOCK;
        const Streams s = {
            move(a.param, begin * param_bytes), move(a.grad, begin * grad_bytes), move(a.m, begin * state_bytes),
            move(a.v, begin * state_bytes), move(a.low, begin * 2), move(a.master, begin * 4),
            is_aligned(a.param, VECTOR_BYTES),
        };
        if (n == BLOCK) {
            update_block<GRAD, STATES, MASTER>(a, settings, maps, s, begin, BLOCK);
            continue;
        }
        // The tensor's end: a whole block of zeros, into which it is copied and out of which it is copied back.
        alignas(64) char param[BLOCK * 4] = {}, grad[BLOCK * 4] = {}, m[BLOCK * 4] = {}, v[BLOCK * 4] = {};
        uint16_t low[BLOCK] = {};
        float master[BLOCK] = {};
        if (STATES == STATES_8BIT) std::memset(m, 127, BLOCK);
        const Streams local = {param, grad, m, v, low, master, false};
        std::memcpy(param, s.param, n * param_bytes);
        std::memcpy(grad, s.grad, n * grad_bytes);
        std::memcpy(m, s.m, n * state_bytes);
        std::memcpy(v, s.v, n * state_bytes);
        if (MASTER == MASTER_SPLIT) std::memcpy(low, s.low, n * 2);
        if (MASTER == MASTER_FP32) std::memcpy(master, s.master, n * 4);
        update_block<GRAD, STATES, MASTER>(a, settings, maps, local, begin, static_cast<int>(n));
        std::memcpy(s.param, param, n * param_bytes);
        std::memcpy(s.m, m, n * state_bytes);
        std::memcpy(s.v, v, n * state_bytes);
        if (MASTER == MASTER_SPLIT) std::memcpy(s.low, low, n * 2);
        if (MASTER == MASTER_FP32) std::memcpy(s.master, master, n * 4);
    }
}

template <int GRAD, int STATES>
void choose_master(const AdamW& a, const Maps* maps, int64_t first, int64_t last) {
    switch (a.master_type) {
        case PARAM_FP32: return update<GRAD, STATES, PARAM_FP32>(a, maps, first, last);
        case MASTER_FP32: return update<GRAD, STATES, MASTER_FP32>(a, maps, first, last);
        case MASTER_SPLIT: return update<GRAD, STATES, MASTER_SPLIT>(a, maps, first, last);
        default: return update<GRAD, STATES, MASTER_STOCHASTIC>(a, maps, first, last);
    }
}

template <int GRAD>
void choose_states(const AdamW& a, int64_t first, int64_t last) {
    switch (a.states) {
        case STATES_FP32: return choose_master<GRAD, STATES_FP32>(a, nullptr, first, last);
        case STATES_BF16: return choose_master<GRAD, STATES_BF16>(a, nullptr, first, last);
        default: break;
    }
    const Maps maps = {Pieces(a.maps[0]), Pieces(a.maps[1])};
    choose_master<GRAD, STATES_8BIT>(a, &maps, first, last);
}

}  // namespace

namespace ISA {
void adamw_blocks(const AdamW& a, int64_t first, int64_t last) {
    a.grad_type == GRAD_FP32 ? choose_states<GRAD_FP32>(a, first, last) : choose_states<GRAD_BF16>(a, first, last);
    finish_stores_past_caches();
}
}  // namespace ISA

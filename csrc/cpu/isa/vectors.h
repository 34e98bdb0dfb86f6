// Vectors of one instruction set: ISA's widest registers, in the compilers' own types. Included by files of csrc/cpu/isa
// alone, which are compiled once for each instruction set: everything is static, so that no linker merges two of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace {

constexpr int LANES = VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t vq __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(VECTOR_BYTES / 2)));  // as many elements as vf has
typedef uint8_t vb __attribute__((vector_size(VECTOR_BYTES / 4)));

template <class V>
struct Two {
    V a, b;
};

template <class V, class T>
inline V load(const T* from) {  // at any address
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class V, class T>
inline void store(T* to, V x) {
    std::memcpy(to, &x, sizeof x);
}

inline vu join(vh a, vh b) {  // the numbers of a, then those of b
#if defined(__AVX512F__)
    return (vu)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
#elif defined(__AVX2__)
    return (vu)_mm256_set_m128i((__m128i)b, (__m128i)a);
#else
    vu x;
    std::memcpy(&x, &a, sizeof a);
    std::memcpy((char*)&x + sizeof a, &b, sizeof b);
    return x;
#endif
}

// Write what nobody reads soon straight to memory. `to` is a multiple of VECTOR_BYTES. Another thread may read it after
// finish_stores_past_caches().
inline void store_past_caches(void* to, vu x) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)x);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)to, (__m256i)x);
#else
    store(to, x);
#endif
}

inline void finish_stores_past_caches() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

inline vf fill(float x) { return x - vf{}; }
inline vu fill_bits(uint32_t x) { return x - vu{}; }

inline vf square_root(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);  // GCC 12 warns of _mm512_sqrt_ps in its own header
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (vf)vsqrtq_f32((float32x4_t)x);
#else
    vf y;
    for (int i = 0; i < LANES; i++) y[i] = __builtin_sqrtf(x[i]);
    return y;
#endif
}

// The 64-bit products of the lower halves of each lane.
inline vq multiply_low(vq a, vq b) {
#if defined(__AVX512F__)
    return (vq)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// Each lane's upper half in its lower one; the upper one is left with anything.
inline vq lower_from_upper(vq x) {
#if defined(__AVX512F__)  // a shift waits for the port that multiplies
    return (vq)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)x, _MM_PERM_DDBB);
#else
    return x >> 32;
#endif
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// Which of 2 x LANES numbers, those of x and then those of y, go where.
struct Places {
    int32_t at[LANES];
};

template <class Rule>
constexpr Places make_places(Rule rule) {
    Places places{};
    for (int i = 0; i < LANES; i++) places.at[i] = rule(i);
    return places;
}

constexpr Places EVEN = make_places([](int i) { return 2 * i; });
constexpr Places ODD = make_places([](int i) { return 2 * i + 1; });
constexpr Places FIRST_IN_TURN = make_places([](int i) { return i / 2 + i % 2 * LANES; });  // x[0], y[0], x[1], ...
constexpr Places LAST_IN_TURN = make_places([](int i) { return (i + LANES) / 2 + i % 2 * LANES; });

inline vf pick(vf x, vf y, const Places& places) {
#if defined(__AVX512F__)
    return (vf)_mm512_permutex2var_ps((__m512)x, load<__m512i>(places.at), (__m512)y);
#else
    vf z;
    for (int i = 0; i < LANES; i++) z[i] = places.at[i] < LANES ? x[places.at[i]] : y[places.at[i] - LANES];
    return z;
#endif
}

inline bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < LANES; i++) all |= mask[i];
    return all != 0;
#endif
}

inline vi not_finite(vf x) { return ((vi)x & 0x7F800000) == 0x7F800000; }

inline bool is_finite(vf x) {  // whether all are
#if defined(__AVX512F__)
    return !_mm512_fpclass_ps_mask((__m512)x, 0x99);  // 0x99: NaN of both kinds, Inf of both signs
#else
    return !any(not_finite(x));
#endif
}

inline vf widen_bf16(vh x) {
#if defined(__AVX512F__)  // GCC 12 widens halves of it and joins them
    return (vf)_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x), 16);
#else
    return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}

}  // namespace

// Rounding to bf16, reading and writing of either type, sums over lanes, and e^x.
#pragma once

#include "vectors.h"

namespace {

typedef uint16_t bf16;

struct Halves {
    uint16_t at[2 * LANES];
};
constexpr Halves make_upper_halves() {
    Halves upper{};
    for (int i = 0; i < LANES; i++) upper.at[i] = 2 * i + 1;
    return upper;
}
constexpr Halves UPPER = make_upper_halves();  // of a vector's 16-bit halves

inline vf read(const float* from) { return load<vf>(from); }
inline vf read(const bf16* from) { return widen_bf16(load<vh>(from)); }

// Rounded to nearest even; a NaN stays one.
inline vh narrow_bf16(vf x) {
    const vu bits = (vu)x, half = (bits >> 16 & 1) + 0x7FFF, quiet = bits | 0x400000;
#if defined(__AVX512F__)  // the sum where x is a number; then the upper halves
    const __mmask16 is_number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
    const __m512i rounded = _mm512_mask_add_epi32((__m512i)quiet, is_number, (__m512i)bits, (__m512i)half);
    return (vh)_mm512_castsi512_si256(_mm512_maskz_permutexvar_epi16(~0u, load<__m512i>(UPPER.at), rounded));
#else
    const vu rounded = (vu)select(x == x, (vf)(bits + half), (vf)quiet);
    return __builtin_convertvector(rounded >> 16, vh);
#endif
}

inline void write(float* to, vf x) { store(to, x); }
inline void write(bf16* to, vf x) { store(to, narrow_bf16(x)); }

template <class T>
inline vf rounded(vf x);  // to what a tensor of T holds
template <>
inline vf rounded<float>(vf x) { return x; }
template <>
inline vf rounded<bf16>(vf x) { return widen_bf16(narrow_bf16(x)); }

// The first n elements, n less than LANES; the others are `rest`, and no memory behind them is touched.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
inline vf keep(vf x, int64_t n, float rest) {
    return (vf)_mm512_mask_blend_ps(first_lanes(n), (__m512)fill(rest), (__m512)x);
}
inline vf read_part(const float* from, int64_t n, float rest = 0) {
    return (vf)_mm512_mask_loadu_ps((__m512)fill(rest), first_lanes(n), from);
}
inline vf read_part(const bf16* from, int64_t n, float rest = 0) {
    return keep(widen_bf16((vh)_mm256_maskz_loadu_epi16(first_lanes(n), from)), n, rest);
}
inline void write_part(float* to, vf x, int64_t n) { _mm512_mask_storeu_ps(to, first_lanes(n), (__m512)x); }
inline void write_part(bf16* to, vf x, int64_t n) {
    _mm256_mask_storeu_epi16(to, first_lanes(n), (__m256i)narrow_bf16(x));
}
#else
inline vf keep(vf x, int64_t n, float rest) {
    for (int64_t i = n; i < LANES; i++) x[i] = rest;
    return x;
}
template <class T>
inline vf read_part(const T* from, int64_t n, float rest = 0) {
    T part[LANES] = {};
    std::memcpy(part, from, n * sizeof(T));
    return keep(read(part), n, rest);
}
template <class T>
inline void write_part(T* to, vf x, int64_t n) {
    T part[LANES];
    write(part, x);
    std::memcpy(to, part, n * sizeof(T));
}
#endif

// Calls f(at, read, write) for each vector of n elements; read and write take a pointer and go only as far as n.
template <class F>
inline void for_vectors(int64_t n, F f) {
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES)
        f(at, [](const auto* from) { return read(from); }, [](auto* to, vf x) { write(to, x); });
    if (at < n)
        f(at, [&](const auto* from) { return read_part(from, n - at); },
          [&](auto* to, vf x) { write_part(to, x, n - at); });
}

#if defined(__AVX512F__)  // by halves: in a chain, each of 16 lanes would wait for the one before
inline float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest(vf x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum(vf x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
inline float largest(vf x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
#endif

inline vf maximum(vf a, vf b) { return select(a > b, a, b); }

// p 2^n of whole numbers n: under AVX-512 of any, else from -127 to 129.
inline vf scale_by_power(vf p, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
    const vi whole = __builtin_convertvector(n, vi), half = whole >> 1, rest = whole - half;
    return p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
#endif
}

// e^x to 1.5 units in the last place: e^x = 2^n e^r, n = round(x / ln 2), and the series of e^r to r^7, where |r| < 0.35
// leaves 5e-9. Below -87.3, where fp32 has no normal numbers, 0; above 88.7 infinity; NaN for NaN.
inline vf exponential(vf x) {
    const bool takes_any = VECTOR_BYTES == 64;  // scale_by_power(), NaN too
    const vf bounded = takes_any ? x : select(x < -88.0f, fill(-88.0f), select(x > 89.0f, fill(89.0f), x));
    const vf shift = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (bounded * 1.44269504f + shift) - shift;
    const vf r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    const float series[] = {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
    vf p = fill(1.98412698e-4f);
    for (float c : series) p = p * r + c;
    p = select(x < -87.3f, vf{}, scale_by_power(p, n));
    p = select(x > 88.8f, fill(__builtin_inff()), p);
    return takes_any ? p : select(x != x, x, p);
}

}  // namespace

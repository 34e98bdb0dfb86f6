// Rounding to bf16, reading and writing of either type, sums over lanes, and e^x.
#pragma once

#include "vectors.h"

namespace {

typedef uint16_t bf16;

inline vf read(const float* from) { return load<vf>(from); }
inline vf read(const bf16* from) { return widen_bf16(load<vh>(from)); }

// Rounded to nearest even; a NaN stays one.
inline vh narrow_bf16(vf x) {
    const vu bits = (vu)x, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const vu nan = bits >> 16 | 0x40;
    return __builtin_convertvector((vu)select(x != x, (vf)nan, (vf)rounded), vh);
}

inline void write(float* to, vf x) { store(to, x); }
inline void write(bf16* to, vf x) { store(to, narrow_bf16(x)); }

template <class T>
inline vf rounded(vf x);  // to what a tensor of T holds
template <>
inline vf rounded<float>(vf x) { return x; }
template <>
inline vf rounded<bf16>(vf x) { return widen_bf16(narrow_bf16(x)); }

// The first n elements, n less than LANES; the others are `rest`.
template <class T>
inline vf read_part(const T* from, int64_t n, float rest = 0) {
    T part[LANES] = {};
    std::memcpy(part, from, n * sizeof(T));
    vf x = read(part);
    for (int64_t i = n; i < LANES; i++) x[i] = rest;
    return x;
}

template <class T>
inline void write_part(T* to, vf x, int64_t n) {
    T part[LANES];
    write(part, x);
    std::memcpy(to, part, n * sizeof(T));
}

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

inline vf maximum(vf a, vf b) { return select(a > b, a, b); }

// e^x to 1.5 units in the last place: e^x = 2^n e^r, n = round(x / ln 2), and the series of e^r to r^7, where |r| < 0.35
// leaves 5e-9. Below -87.3, where fp32 has no normal numbers, 0; above 88.7 infinity; NaN for NaN.
inline vf exponential(vf x) {
    const vf bounded = select(x < -88.0f, fill(-88.0f), select(x > 89.0f, fill(89.0f), x));
    const vf shift = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (bounded * 1.44269504f + shift) - shift;
    const vf r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    const float series[] = {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
    vf p = fill(1.98412698e-4f);
    for (float c : series) p = p * r + c;
    const vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
    p = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    p = select(x < -87.3f, vf{}, p);
    return select(x != x, x, select(x > 88.8f, fill(__builtin_inff()), p));
}

}  // namespace

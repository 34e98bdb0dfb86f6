// Number formats: their bits, and how they are rounded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;

constexpr u32 FULL = 0xffffffffu;  // all lanes of a warp

template <class To, class From> inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "bits: two types of one size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

struct bf16 { u16 b; };
struct f16 { u16 b; };
struct e4m3 { u8 b; };  // no infinity; its largest number is 448
struct e5m2 { u8 b; };  // the upper byte of an f16; its largest number is 57344

// ---- to fp32, exactly ----

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits<float>(u32(x.b) << 16); }
inline float widen(f16 x) {
    u32 sign = u32(x.b & 0x8000) << 16, exponent = x.b >> 10 & 31, mantissa = x.b & 1023;
    if (exponent == 31) return bits<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    float f = float(mantissa) * 0x1p-24f;
    return sign ? -f : f;
}
inline float widen(e5m2 x) { return widen(f16{u16(x.b << 8)}); }
inline float widen(e4m3 x) {
    u32 sign = u32(x.b & 0x80) << 24, exponent = x.b >> 3 & 15, mantissa = x.b & 7;
    if ((x.b & 0x7f) == 0x7f) return bits<float>(sign | 0x7fc00000u);
    if (exponent) return bits<float>(sign | (exponent + 120) << 23 | mantissa << 20);
    float f = float(mantissa) * 0x1p-9f;
    return sign ? -f : f;
}

// ---- from fp32, to the nearest, ties to even; NaN becomes the NaN of a GPU ----

inline float narrow(float x, float) { return x; }
inline bf16 narrow(float x, bf16) {
    u32 b = bits<u32>(x), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return {u16((b & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
}
inline f16 narrow(float x, f16) {
    u32 b = bits<u32>(x), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
    if (a > 0x7f800000) return {0x7fff};
    if (a >= 0x477ff000) return {u16(sign | 0x7c00)};
    if (a < 0x38800000) return {u16(sign | u32(std::nearbyintf(bits<float>(a) * 0x1p24f)))};
    return {u16(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13))};
}

// To eight bits with `M` of mantissa. What is larger than `most` becomes it (.satfinite), infinity too.
template <int M, int BIAS> inline u8 narrow_saturated(float x, u32 most) {
    u32 b = bits<u32>(x), sign = b >> 24 & 0x80, a = b & 0x7fffffff, code;
    if (a > 0x7f800000) return 0x7f;
    if (a < u32(128 - BIAS) << 23) code = u32(std::nearbyintf(std::ldexp(bits<float>(a), BIAS - 1 + M)));
    else code = ((a + (1u << (22 - M)) - 1 + (a >> (23 - M) & 1)) >> (23 - M)) - (u32(127 - BIAS) << M);
    return u8(sign | (code > most ? most : code));
}
inline e4m3 narrow(float x, e4m3) { return {narrow_saturated<3, 7>(x, 0x7e)}; }
inline e5m2 narrow(float x, e5m2) { return {narrow_saturated<2, 15>(x, 0x7b)}; }

// The fp32 that a later rounding to 16 bits treats as it would x itself: cut, with the last bit set if that lost something.
inline float round_to_odd(double x) {
    float f = float(x);
    if (double(f) != x && std::isfinite(f)) {
        if (std::fabs(double(f)) > std::fabs(x)) f = std::nextafterf(f, 0.0f);
        f = bits<float>(bits<u32>(f) | 1);
    }
    return f;
}

// a b + c, rounded once. The product is exact in fp64; so is the error of the sum, which makes the sum odd.
template <class H> inline H fma_once(H a, H b, H c) {
    double product = double(widen(a)) * double(widen(b)), z = widen(c), sum = product + z;
    double part = sum - product, error = (product - (sum - part)) + (z - part);
    if (error != 0 && std::isfinite(sum)) {
        if ((error < 0) == (sum > 0)) sum = std::nextafter(sum, 0.0);
        sum = bits<double>(bits<u64>(sum) | 1);
    }
    return narrow(round_to_odd(sum), H{});
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }  // .ftz
inline float cut_to_tf32(float x) { return bits<float>(bits<u32>(x) & 0xffffe000u); }        // as a tensor core reads it
inline float round_to_tf32(float x) {  // to the nearest, ties away from zero
    return std::isfinite(x) ? bits<float>((bits<u32>(x) + 0x1000) & 0xffffe000u) : x;
}

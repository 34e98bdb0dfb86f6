// Numbers of AdamW: conversions, rounding and random bits. No multiplication is fused with an addition: the functions
// with _rn keep them apart whatever the compiler is told, because the reference rounds each.
#pragma once

#include <cstdint>

namespace cria {

__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }

// ---- global memory, 1, 2 or 4 words at once: the compiler would cut some accesses in pieces ----

template <int WORDS> __device__ inline void load_words(uint64_t from, uint32_t* to) {
    if constexpr (WORDS == 4)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
    else if constexpr (WORDS == 2)
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    else asm volatile("ld.global.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

template <int WORDS> __device__ inline void store_words(uint64_t to, const uint32_t* from) {
    if constexpr (WORDS == 4)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
    else if constexpr (WORDS == 2)
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(to), "r"(from[0]), "r"(from[1]) : "memory");
    else asm volatile("st.global.u32 [%0], %1;" :: "l"(to), "r"(from[0]) : "memory");
}

// ---- bf16, two in 32 bits ----

__device__ inline float lower(uint32_t two) { return __uint_as_float(two << 16); }
__device__ inline float upper(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }
__device__ inline uint32_t join(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x5410); }   // lower halves
__device__ inline uint32_t join_upper(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }  // upper halves

// The bits of x with one quiet NaN for all NaNs: the upper half of others may be Inf's, or wrap to -0. x is the result
// of an addition, whose only NaN on a GPU is 0x7fffffff, the greatest integer of all.
__device__ inline int32_t quiet_bits(float x) { return min(__float_as_int(x), 0x7fc00000); }

// Two numbers in bf16, rounded to nearest even.
__device__ inline uint32_t nearest(float low, float high) {
    uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

// ---- m / (sqrt(v) + eps), each of the three rounded to nearest ----
//
// ptxas makes of each square root and division a short sequence behind a test of its own and a call for what the test
// refuses. Here one test serves eight numbers: within these ranges the sequences are right, and nothing overflows or
// becomes subnormal on the way.
constexpr uint32_t LEAST_V = 0x0d000000, MOST_V = 0x71ffffff;  // 2^-101, 2^101
constexpr uint32_t LEAST_M = 0x21000000, MOST_M = 0x5dffffff;  // 2^-61, 2^61

__device__ inline float short_sqrt(float x) {
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    float root = mul(x, inverse), half = mul(inverse, 0.5f);
    return __fmaf_rn(__fmaf_rn(-root, root, x), half, root);
}
__device__ inline float short_div(float a, float b) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    inverse = __fmaf_rn(__fmaf_rn(-b, inverse, 1.f), inverse, inverse);
    float quotient = mul(a, inverse);
    quotient = __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
    return __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
}

__device__ inline void divide(const float (&m)[8], const float (&v)[8], float eps, float (&steps)[8]) {
    uint32_t most_v = 0, most_m = 0;  // above the least, modulo 2^32
#pragma unroll
    for (int j = 0; j < 8; j++) {
        most_v = max(most_v, __float_as_uint(v[j]) - LEAST_V);
        most_m = max(most_m, 2 * __float_as_uint(m[j]) - 2 * LEAST_M);
    }
    if (most_v <= MOST_V - LEAST_V && most_m <= 2 * (MOST_M - LEAST_M) && eps < 0x1p50f) {
#pragma unroll
        for (int j = 0; j < 8; j++) steps[j] = short_div(m[j], add(short_sqrt(v[j]), eps));
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) steps[j] = __fdiv_rn(m[j], add(__fsqrt_rn(v[j]), eps));
    }
}

// ---- Philox4x32-10: 16 random bits for each of eight elements ----

struct Random { uint32_t word[4]; };

__device__ inline void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
    uint64_t product;
    asm volatile("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    asm("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "l"(product));
}
__device__ inline uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t x;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}

// key: (seed, step). group: element index / 8. stream: 0 for p, 1 for m, 2 for v.
__device__ inline Random draw(uint32_t seed, uint32_t step, int64_t group, uint32_t stream) {
    uint32_t c0 = uint32_t(group), c1 = uint32_t(uint64_t(group) >> 32), c2 = stream, c3 = 0;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        uint32_t k0 = seed + uint32_t(i) * 0x9e3779b9u, k1 = step + uint32_t(i) * 0xbb67ae85u;
        uint32_t a_low, a_high, b_low, b_high;
        multiply(c0, 0xd2511f53u, a_low, a_high), multiply(c2, 0xcd9e8d57u, b_low, b_high);
        c0 = xor3(b_high, c1, k0), c1 = b_low, c2 = xor3(a_high, c3, k1), c3 = a_low;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace cria

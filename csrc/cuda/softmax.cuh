// What the kernels of attention share: fast functions, and two numbers in 16 bits.
#pragma once

#include <cstdint>
#include <type_traits>
#include <cuda_fp16.h>

#include "numbers.cuh"

namespace cria {

constexpr float MINUS_INF = -__builtin_huge_valf();

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <class T> __device__ inline uint32_t pack(float low, float high) {
    uint32_t two;
    if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    else two = nearest(low, high);
    return two;
}

}  // namespace cria

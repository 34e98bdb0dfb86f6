// Blocks of 256 numbers in 8 bits, as kernels/ops/eight_bit.py specifies them: a warp holds a block, a lane eight numbers.
#pragma once

#include <cstdint>

#include "numbers.cuh"

namespace cria {

constexpr int N_CELLS = 512;
constexpr int TABLES_BYTES = 2 * N_CELLS * 8 + 2 * 256 * 32 * 4;  // of shared memory

// In shared memory. A map has a copy of each entry for each lane, in the lane's own bank: no lookup waits for another.
struct Tables {
    uint32_t cells, maps;  // addresses: slope and intercept, signed, then unsigned; the lane's copy of 256 entries each

    __device__ Tables(const char* shared, int lane) {
        uint32_t at = uint32_t(__cvta_generic_to_shared(shared));
        asm volatile("" : "+r"(at));  // lookups stay behind the barrier of fill
        cells = at, maps = at + 2 * N_CELLS * 8 + uint32_t(lane) * 4;
    }
    template <bool SIGNED> __device__ float entry(uint32_t code_times_128) const {
        float x;
        asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(x) : "r"(maps + code_times_128), "n"(SIGNED ? 0 : 256 * 32 * 4));
        return x;
    }
    template <bool SIGNED> __device__ float2 line(uint32_t cell_times_8) const {
        float2 x;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];"
            : "=f"(x.x), "=f"(x.y) : "r"(cells + cell_times_8), "n"(SIGNED ? 0 : N_CELLS * 8));
        return x;
    }
    // maps (512,) fp32 and cells (1024,) int64 are what kernels.ops.eight_bit.tables makes.
    __device__ static void fill(char* shared, const float* maps, const uint2* cells) {
        for (int i = int(threadIdx.x); i < 2 * N_CELLS; i += int(blockDim.x))
            reinterpret_cast<uint2*>(shared)[i] = cells[i];
        float* copies = reinterpret_cast<float*>(shared + 2 * N_CELLS * 8);
        for (int i = int(threadIdx.x); i < 2 * 256 * 32; i += int(blockDim.x)) copies[i] = maps[i / 32];
        __syncthreads();
    }
};

// The numbers of eight codes, in two words.
template <bool SIGNED>
__device__ inline void decode(const uint32_t (&codes)[2], float absmax, const Tables& tables, float (&x)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint32_t word = codes[j / 4], at = j % 4 ? word >> (8 * (j % 4) - 7) : word << 7;
        x[j] = mul(tables.entry<SIGNED>(at & 255 << 7), absmax);
    }
}

// The codes of eight numbers of each lane, and the maximum of the warp's block. Numbers past a tensor's end must be 0.
// Unsigned, x holds no number below 0 and no -0.
template <bool SIGNED>
__device__ inline float encode(const float (&x)[8], const Tables& tables, uint32_t (&codes)[2]) {
    uint32_t most = 0;  // compared as integers, NaN is above Inf, and Inf above all numbers
#pragma unroll
    for (int j = 0; j < 8; j++) most = max(most, __float_as_uint(x[j]) & (SIGNED ? 0x7fffffffu : ~0u));
    float absmax = __uint_as_float(__reduce_max_sync(~0u, most));
    float inverse = absmax >= 0x1p-126f && absmax < __int_as_float(0x7f800000) ? __frcp_rn(absmax) : 0.f;
    uint32_t code[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float ratio = mul(fabsf(x[j]), inverse);
        float2 line = tables.line<SIGNED>(__float_as_uint(mul(ratio, 1.255f * 0x1p-104f)) >> 16 & (N_CELLS - 1) << 3);
        float place = add(mul(ratio, line.x), line.y);
        if (SIGNED) {  // a NaN becomes 0
            uint32_t sign = __float_as_uint(x[j]) & 0x80000000u;
            code[j] = uint32_t(max(__float2int_rz(__uint_as_float(__float_as_uint(place) | sign)) + 127, 0));
        } else code[j] = uint32_t(__float2int_rz(ratio >= 0x1p-126f ? place : 0.f));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t a = __byte_perm(code[4 * i], code[4 * i + 1], 0x0040), b = __byte_perm(code[4 * i + 2], code[4 * i + 3], 0x0040);
        codes[i] = __byte_perm(a, b, 0x5410);
    }
    return absmax;
}

}  // namespace cria

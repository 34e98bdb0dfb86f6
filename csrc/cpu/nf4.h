// Weights in 4 bits: the arguments, as kernels/native/arguments.py lays them out for ctypes. kernels/ops/nf4.py has the
// formula.
#pragma once

#include "api.h"

constexpr int64_t NF4_BLOCK = 64;    // weights that share a maximum, two a byte of codes
constexpr int64_t NF4_BLOCK2 = 256;  // maxima that share a maximum

struct NF4Quantise {
    int64_t n, is_bf16, threads;
    const void* weight;  // (n), fp32 or bf16
    uint8_t* codes;      // ((n + 1) / 2)
    float* absmax;       // one a block; NaN or Inf where the block holds one
};

struct NF4Dequantise {
    int64_t n, is_bf16, threads;
    void* out;  // (n), fp32 or bf16
    const uint8_t *codes, *absmax_codes;
    const float *absmax2, *offset, *map;  // offset: one number, map: 256
};

DECLARE(void, nf4_quantise, const NF4Quantise&, int64_t first, int64_t last)  // blocks; n may cut the last one
DECLARE(void, nf4_dequantise, const NF4Dequantise&, int64_t first, int64_t last)

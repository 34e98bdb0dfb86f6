// The gradient of a weight: the arguments, as kernels/native/arguments.py lays them out for ctypes.
#pragma once

#include "api.h"

struct WeightGradient {
    int64_t tokens, rows, columns;   // T, N and K
    int64_t dy_row, x_row, out_row;  // numbers from one row to the next
    int64_t out_is_fp32, is_added, threads;
    const uint16_t *dy, *x;  // bf16
    void* out;
};

EXPORT int cria_has_amx();  // 1 where the processor and the system run AMX's products of bf16
EXPORT int cria_weight_gradient(const WeightGradient*);

// One AdamW update of one tensor: the arguments, as kernels/native/arguments.py lays them out for ctypes.
#pragma once

#include "api.h"

constexpr int64_t BLOCK = 256;  // elements: of 8-bit states, and of one piece of work
constexpr int DECADES = 9;      // pieces of the 8-bit map's inverse, see kernels/ops/eight_bit.py

enum GradType : int { GRAD_FP32 = 0, GRAD_BF16 = 1 };
enum States : int { STATES_FP32 = 0, STATES_BF16 = 1, STATES_8BIT = 2 };
enum Master : int { PARAM_FP32 = 0, MASTER_FP32 = 1, MASTER_SPLIT = 2, MASTER_STOCHASTIC = 3 };

struct DynamicMap {  // of one sign: entries by code; where each linear piece of the inverse begins, and the piece
    float entries[256];
    float starts[DECADES], slopes[DECADES], intercepts[DECADES];
};

struct AdamW {
    void* param;  // fp32 with PARAM_FP32, else bf16
    const void* grad;
    void *m, *v;                  // fp32, bf16, or bytes
    float *m_absmax, *v_absmax;   // of 8-bit states: one a block
    uint16_t* low;                // of MASTER_SPLIT
    float* master;                // of MASTER_FP32
    const DynamicMap* maps;       // of 8-bit states: signed, unsigned
    int64_t n, offset;            // elements, and the place of the first one in the whole tensor
    float scale, rest1, beta2, rest2, eps, decay, rate;  // rest: 1 - beta. decay: 1 - lr wd. rate: lr s
    uint32_t step, seed;
    int32_t grad_type, states, master_type, threads;
};

// Updates the blocks from first on, before last; the tensor's end may cut the last one.
DECLARE(void, adamw_blocks, const AdamW& a, int64_t first, int64_t last)

// A tensor map: what a bulk copy of a tile needs to know of a tensor in global memory.
#pragma once

#include "numbers.h"

// NVIDIA's 128 bytes are opaque, so these are ours: kernels/compiled/tensor_map.py writes the same, and so does
// tensormap.replace. Axis 0 is the one whose elements lie side by side.
struct TensorMap {
    u64 address;
    u8 last_axis;    // rank - 1
    u8 type;         // as in tensormap.replace.elemtype
    u8 interleave;   // none is 0, the only one that is known
    u8 swizzle;      // 0: none; 1, 2, 3: of 32, 64, 128 bytes
    u8 fill;         // of elements outside of the tensor: 0 zeros, 1 NaN
    u8 padding[3];
    u32 box[5];      // elements
    u32 size[5];     // elements
    u32 step[5];     // between elements that are copied; 1 is the only one that is known
    u32 padding2;
    u64 stride[4];   // bytes, of axes 1 to 4
    u64 padding3[2];
};
static_assert(sizeof(TensorMap) == 128, "a tensor map has 128 bytes");

int element_bytes(int type);  // 0 if it is not known

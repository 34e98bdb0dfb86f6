// How the lanes of a warp hold parts of matrices in registers.
#pragma once

#include "machine.h"

// The registers of a left operand as (16, K) in fp32: K is 4 a register of 16 bits, 2 of tf32. Register q has rows 0 to 7
// or 8 to 15, in turn, and then the next half of K.
template <class H> static void read_left(Warp& w, const int* registers, int n, float* a) {
    for (int q = 0; q < n; q++) {
        const u32* x = w.reg<u32>(registers[q]);
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4 + q % 2 * 8, t = lane % 4;
            if constexpr (sizeof(H) == 4) a[row * (n * 2) + t + q / 2 * 4] = cut_to_tf32(bits<float>(x[lane]));
            else {
                float* to = a + row * (n * 4) + 2 * t + q / 2 * 8;
                to[0] = widen(H{u16(x[lane])}), to[1] = widen(H{u16(x[lane] >> 16)});
            }
        }
    }
}

// Where lane `lane` of register i holds an element of (16, n).
inline int accumulator(int i, int lane, int n) {
    return (lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

// Sums of products of few rows with a matrix of fp32, bf16 or q8_0 numbers, and what surrounds them.
//
// Each sum has one order, which depends on the instruction set alone: not on the number of rows, threads or neighbours.
// Memory is the bound, and what counts is how it is asked: four rows of weights far apart are read at once, which a
// processor's prefetchers follow as four streams. Four neighbouring rows gave half the rate.
#pragma once

#include "../few_rows.h"
#include "exponential.h"

namespace {

struct Q8 {  // 32 numbers, value times scale
    uint16_t scale;  // fp16
    int8_t value[32];
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// A step of two vectors of weights. bf16 comes in pairs: a lane of 32 bits holds an even number in its lower half and an
// odd one in its upper half, so one shift and one mask widen them; arrange() puts x in that order.
constexpr int64_t STEP = 2 * LANES;

template <class W>
inline void load_step(const W* w, vf& first, vf& second);
template <>
inline void load_step(const float* w, vf& first, vf& second) {
    first = load<vf>(w), second = load<vf>(w + LANES);
}
template <>
inline void load_step(const bf16* w, vf& first, vf& second) {
    const vu pairs = load<vu>(w);
    first = (vf)(pairs << 16), second = (vf)(pairs & 0xFFFF0000u);
}

inline int64_t place(const float*, int64_t i) { return i; }  // of number i of a step
inline int64_t place(const Q8*, int64_t i) { return i; }
inline int64_t place(const bf16*, int64_t i) { return i / 2 + i % 2 * LANES; }

template <class W>
inline void arrange(const float* x, int64_t n, float* out) {  // n numbers in the order in which load_step() gives W's
    const int64_t whole = n / STEP * STEP;
    for (int64_t i = 0; i < whole; i += STEP)
        for (int64_t j = 0; j < STEP; j++) out[i + place(static_cast<const W*>(nullptr), j)] = x[i + j];
    for (int64_t i = whole; i < n; i++) out[i] = x[i];
}

// y[b * y_row + at[r]] = the sum of x[b] w[r], of R rows of weights and B rows of x, which are arranged.
template <int R, int B, class W>
inline void multiply_tile(const W* const* w, const float* x, int64_t in, float* y, int64_t y_row, const int64_t* at) {
    vf sums[R][B] = {};
    const int64_t whole = in / STEP * STEP;
    for (int64_t i = 0; i < whole; i += STEP)
        for (int r = 0; r < R; r++) {
            vf first, second;
            load_step(w[r] + i, first, second);
            for (int b = 0; b < B; b++) {
                sums[r][b] += first * load<vf>(x + b * in + i);
                sums[r][b] += second * load<vf>(x + b * in + i + LANES);
            }
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            float total = sum(sums[r][b]);
            for (int64_t i = whole; i < in; i++) total += x[b * in + i] * widen(w[r][i]);
            y[b * y_row + at[r]] = total;
        }
}

inline float widen_half(uint16_t x) {  // of a finite number
    const uint32_t bits = (x & 0x7FFFu) << 13 | (x & 0x8000u) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y * 0x1p112f;
}

// The same of q8_0, in which `in` is a number of blocks times 32.
template <int R, int B>
inline void multiply_tile(const Q8* const* w, const float* x, int64_t in, float* y, int64_t y_row, const int64_t* at) {
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    vf sums[R][B] = {};
    for (int64_t i = 0; i < in / 32; i++)
        for (int r = 0; r < R; r++) {
            vf of_block[B] = {};
            for (int j = 0; j < 32; j += LANES) {
                const Bytes bytes = load<Bytes>(w[r][i].value + j);
                const vf values = __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
                for (int b = 0; b < B; b++) of_block[b] += values * load<vf>(x + b * in + i * 32 + j);
            }
            const float scale = widen_half(w[r][i].scale);
            for (int b = 0; b < B; b++) sums[r][b] += of_block[b] * scale;
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) y[b * y_row + at[r]] = sum(sums[r][b]);
}

template <class W, int R>
inline void multiply_rows(
    const W* const* w, const float* x, int64_t rows, int64_t in, float* y, int64_t y_row, const int64_t* at) {
    for (; rows >= 4; rows -= 4, x += 4 * in, y += 4 * y_row) {
        for (int r = 0; r < R; r += 2)  // eight sums: sixteen would leave no register for what is loaded
            multiply_tile<R == 1 ? 1 : 2, 4>(w + r, x, in, y, y_row, at + r);
    }
    if (rows == 3) multiply_tile<R, 3>(w, x, in, y, y_row, at);
    if (rows == 2) multiply_tile<R, 2>(w, x, in, y, y_row, at);
    if (rows == 1) multiply_tile<R, 1>(w, x, in, y, y_row, at);
}

// y[b * y_row + n] for each row n of w in [first, last). w_row: numbers from one row of w to the next.
template <class W>
void multiply(
    const W* w, int64_t w_row, const float* x, int64_t rows, int64_t in, int64_t first, int64_t last, float* y,
    int64_t y_row) {
    const int64_t stream = (last - first) / 4;
    for (int64_t i = first; i < first + stream; i++) {
        const int64_t at[4] = {i, i + stream, i + 2 * stream, i + 3 * stream};
        const W* const from[4] = {w + at[0] * w_row, w + at[1] * w_row, w + at[2] * w_row, w + at[3] * w_row};
        multiply_rows<W, 4>(from, x, rows, in, y, y_row, at);
    }
    for (int64_t i = first + 4 * stream; i < last; i++) {
        const W* const from[1] = {w + i * w_row};
        multiply_rows<W, 1>(from, x, rows, in, y, y_row, &i);
    }
}

// Rows of weights that a thread takes at a time: few enough that one which is held up keeps the others waiting little,
// enough that its four streams are long.
inline int64_t chunk_of(int64_t out, int64_t threads) {
    const int64_t chunk = (out + 4 * threads - 1) / (4 * threads);
    return chunk < 32 ? 32 : chunk > 1024 ? 1024 : chunk;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

// RMSNorm, SwiGLU, RoPE and the cross entropy of logits: one pass over rows each, forward and backward.
#include "../training.h"

#include <cmath>

#include "exponential.h"

namespace {

// f(first, last) for equal shares of n rows, one a thread.
template <class F>
void in_threads(const Rows& rows, F f) {
#pragma omp parallel for num_threads(rows.threads) schedule(static)
    for (int64_t i = 0; i < rows.threads; i++) f(rows.n * i / rows.threads, rows.n * (i + 1) / rows.threads);
}

template <class T>
void norm_forward_rows(const NormForward& a, int64_t first, int64_t last) {
    const int64_t dim = a.rows.dim;
    for (int64_t row = first; row < last; row++) {
        const T *x = (const T*)a.x + row * dim, *residual = (const T*)a.residual + row * dim;
        T *y = (T*)a.y + row * dim, *s = (T*)a.sum + row * dim;
        vf squares{};
        for_vectors(dim, [&](int64_t at, auto read, auto write) {
            vf value = read(x + at);
            if (a.residual) {
                value = rounded<T>(value + read(residual + at));
                write(s + at, value);
            }
            squares += value * value;
        });
        const T* normed = a.residual ? s : x;
        const float rstd = 1 / std::sqrt(sum(squares) / dim + (float)a.eps);
        a.rstd[row] = rstd;
        for_vectors(dim, [&](int64_t at, auto read, auto write) {
            write(y + at, rounded<T>(read(normed + at) * rstd) * read((const T*)a.weight + at));
        });
    }
}

template <class T>
void norm_backward_part(const NormBackward& a, int64_t part) {
    const int64_t dim = a.rows.dim, first = a.rows.n * part / a.parts, last = a.rows.n * (part + 1) / a.parts;
    const T* weight = (const T*)a.weight;
    float* dw = a.partial + part * dim;
    for (int64_t i = 0; i < dim; i++) dw[i] = 0;
    for (int64_t row = first; row < last; row++) {
        const T *dy = (const T*)a.dy + row * dim, *x = (const T*)a.x + row * dim, *ds = (const T*)a.ds + row * dim;
        T *dx = (T*)a.dx + row * dim, *y = (T*)a.y + row * dim;
        const float rstd = a.rstd[row];
        vf products{};
        for_vectors(dim, [&](int64_t at, auto read, auto write) {
            const vf x_hat = read(x + at) * rstd, g = read(dy + at);
            products += g * read(weight + at) * x_hat;
            write(dw + at, read((const float*)dw + at) + g * x_hat);
        });
        const float mean = sum(products) / dim;
        for_vectors(dim, [&](int64_t at, auto read, auto write) {
            const vf x_hat = read(x + at) * rstd, w = read(weight + at);
            vf value = rstd * (read(dy + at) * w - x_hat * mean);
            if (a.ds) value += read(ds + at);
            write(dx + at, value);
            if (a.y) write(y + at, rounded<T>(x_hat) * w);
        });
    }
}

template <class T>
void swiglu_forward_rows(const SwiGLU& a, int64_t first, int64_t last) {
    const int64_t dim = a.rows.dim;
    for (int64_t row = first; row < last; row++) {
        const T* gate = (const T*)a.gate_up + row * 2 * dim;
        T* h = (T*)a.h + row * dim;
        for_vectors(dim, [&](int64_t at, auto read, auto write) {
            const vf g = read(gate + at);
            write(h + at, rounded<T>(g / (1.0f + exponential(-g))) * read(gate + dim + at));
        });
    }
}

template <class T>
void swiglu_backward_rows(const SwiGLU& a, int64_t first, int64_t last) {
    const int64_t dim = a.rows.dim;
    for (int64_t row = first; row < last; row++) {
        const T *gate = (const T*)a.gate_up + row * 2 * dim, *dh = (const T*)a.dh + row * dim;
        T *dgate = (T*)a.dgate_up + row * 2 * dim, *h = (T*)a.h + row * dim;
        for_vectors(dim, [&](int64_t at, auto read, auto write) {
            const vf g = read(gate + at), up = read(gate + dim + at), d = read(dh + at);
            const vf sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid;
            write(dgate + at, d * up * (sigmoid + silu * (1.0f - sigmoid)));
            write(dgate + dim + at, d * silu);
            if (a.h) write(h + at, rounded<T>(silu) * up);
        });
    }
}

template <class T>
void rope_rows(const Rope& a, int64_t first, int64_t last) {
    const int64_t half = a.rows.dim;
    const float sign = a.inverse ? -1 : 1;
    for (int64_t row = first; row < last; row++)
        for (int64_t head = 0; head < a.heads; head++) {
            const T* x = (const T*)a.x + row * a.x_row + head * a.x_head;
            T* out = (T*)a.out + row * a.out_row + head * a.out_head;
            for_vectors(half, [&](int64_t at, auto read, auto write) {
                const vf c = read(a.cos + row * half + at), s = sign * read(a.sin + row * half + at);
                const vf u = read(x + at), w = read(x + half + at);
                write(out + at, u * c - w * s);
                write(out + half + at, w * c + u * s);
            });
        }
}

// The formula of kernels/ops/linear_cross_entropy.py. At the target p - 1 is taken as -(sum of the others) / total,
// which keeps its digits where p rounds to 1.
template <class T>
void cross_entropy_row(const CrossEntropy& a, int64_t row) {
    const int64_t vocab = a.rows.dim, target = a.targets[row];
    T* logits = (T*)a.logits + row * a.stride;
    if (target == a.ignore_index) {
        a.losses[row] = 0;
        if (a.gradient)
            for_vectors(vocab, [&](int64_t at, auto, auto write) { write(logits + at, vf{}); });
        return;
    }
    const bool inside = target >= 0 && target < vocab;
    const float weight = (inside ? 1.0f : __builtin_nanf("")) * (a.weights ? a.weights[row] : 1.0f);
    vf peaks = fill(-__builtin_inff());
    int64_t whole = vocab / LANES * LANES;
    for (int64_t at = 0; at < whole; at += LANES) peaks = maximum(peaks, read(logits + at));
    if (whole < vocab) peaks = maximum(peaks, read_part(logits + whole, vocab - whole, -__builtin_inff()));
    const float top = largest(peaks), x_target = inside ? read_part(logits + target, 1)[0] : 0;
    double others = 0, above = 0;
    vf totals{}, differences{};
    for (int64_t at = 0; at < vocab; at += LANES) {
        const int64_t n = vocab - at;
        const vf x = n >= LANES ? read(logits + at) : read_part(logits + at, n, -__builtin_inff());
        vf e = exponential(x - top);
        if (a.smoothing != 0)
            for (int64_t i = 0; i < LANES && i < n; i++) differences[i] += x[i] - x_target;
        if (at <= target && target < at + LANES) e[target - at] = 0;
        totals += e;
        if (at % (64 * LANES) == 0) {  // sums of 64 numbers a lane are added up in fp64
            others += sum(totals), above += sum(differences);
            totals = differences = vf{};
        }
    }
    others += sum(totals), above += sum(differences);
    const double total = others + std::exp((double)x_target - top), lse = top + std::log(total);
    double loss = ((double)top - x_target) + std::log(total) + a.z_loss * lse * lse;
    if (a.smoothing != 0) loss -= a.smoothing * (above / vocab);
    a.losses[row] = weight * loss;
    if (!a.gradient) return;
    const double factor = 1 + 2 * a.z_loss * lse, share = a.smoothing / vocab;
    const float slope = weight * factor / total, less = weight * share;
    const float at_target = weight * (2 * a.z_loss * lse + a.smoothing - share - factor * (others / total));
    for_vectors(vocab, [&](int64_t at, auto read, auto write) {
        vf g = exponential(read(logits + at) - top) * slope - less;
        if (at <= target && target < at + LANES) g[target - at] = at_target;
        write(logits + at, g);
    });
}

}  // namespace

namespace ISA {

void norm_forward(const NormForward& a) {
    in_threads(a.rows, [&](int64_t first, int64_t last) {
        a.rows.is_bf16 ? norm_forward_rows<bf16>(a, first, last) : norm_forward_rows<float>(a, first, last);
    });
}

void norm_backward(const NormBackward& a) {
#pragma omp parallel for num_threads(a.rows.threads) schedule(dynamic)
    for (int64_t part = 0; part < a.parts; part++)
        a.rows.is_bf16 ? norm_backward_part<bf16>(a, part) : norm_backward_part<float>(a, part);
    for_vectors(a.rows.dim, [&](int64_t at, auto read, auto write) {
        vf total{};
        for (int64_t part = 0; part < a.parts; part++) total += read((const float*)a.partial + part * a.rows.dim + at);
        if (a.rows.is_bf16) write((bf16*)a.dw + at, total);
        else write((float*)a.dw + at, total);
    });
}

void swiglu_forward(const SwiGLU& a) {
    in_threads(a.rows, [&](int64_t first, int64_t last) {
        a.rows.is_bf16 ? swiglu_forward_rows<bf16>(a, first, last) : swiglu_forward_rows<float>(a, first, last);
    });
}

void swiglu_backward(const SwiGLU& a) {
    in_threads(a.rows, [&](int64_t first, int64_t last) {
        a.rows.is_bf16 ? swiglu_backward_rows<bf16>(a, first, last) : swiglu_backward_rows<float>(a, first, last);
    });
}

void rope(const Rope& a) {
    in_threads(a.rows, [&](int64_t first, int64_t last) {
        a.rows.is_bf16 ? rope_rows<bf16>(a, first, last) : rope_rows<float>(a, first, last);
    });
}

void cross_entropy(const CrossEntropy& a) {
#pragma omp parallel for num_threads(a.rows.threads) schedule(dynamic, 4)
    for (int64_t row = 0; row < a.rows.n; row++)
        a.rows.is_bf16 ? cross_entropy_row<bf16>(a, row) : cross_entropy_row<float>(a, row);
}

}  // namespace ISA

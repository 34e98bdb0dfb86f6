// A training step's ops but the large matrix products: the arguments, as kernels/native/arguments.py lays them out for
// ctypes. Every tensor is fp32 or bf16 (is_bf16), rows are contiguous, sums are fp32.
#pragma once

#include "api.h"

struct Rows {  // element-wise ops on rows: rms_norm, swiglu, rope, cross entropy
    int64_t n, dim;  // rows, elements of a row (of a half for swiglu and rope)
    int64_t is_bf16, threads;
};

struct NormForward {
    Rows rows;
    const void *x, *residual, *weight;  // residual may be null
    void *y, *sum;                      // sum: x + residual, if there is a residual
    float* rstd;
    double eps;
};

struct NormBackward {
    Rows rows;
    const void *dy, *x, *weight, *ds;  // ds may be null; it is added to dx
    const float* rstd;
    void *dx, *dw, *y;  // y may be null
    float* partial;     // (parts, dim): dw of each part of the rows
    int64_t parts;
};

struct SwiGLU {
    Rows rows;
    const void *gate_up, *dh;
    void *dgate_up, *h;  // dgate_up may be gate_up, h may be dh or, in backward, null
};

struct Rope {
    Rows rows;  // dim: half a head
    const void* x;
    void* out;  // may be x
    const float *cos, *sin;
    int64_t heads, x_row, x_head, out_row, out_head;  // strides in elements
    int64_t inverse;
};

struct CrossEntropy {
    Rows rows;     // dim: the vocabulary
    void* logits;  // overwritten by their gradient if `gradient`
    int64_t stride;
    const int64_t* targets;
    const float* weights;  // may be null
    float* losses;
    int64_t ignore_index, gradient;
    double z_loss, smoothing;
};

struct Attention {
    int64_t queries, keys, heads, kv_heads, head_dim, is_bf16, threads;
    const void *q, *k, *v, *o, *d_o;
    void *out, *dq, *dk, *dv;
    float* lse;             // (heads, queries), to the base 2
    const int32_t* limits;  // (4, queries): first own key, last own key + 1, prefix start, prefix end
    int64_t q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, d_o_row, d_o_head;
    int64_t dq_row, dq_head, dk_row, dk_head, dv_row, dv_head;
};

DECLARE(void, norm_forward, const NormForward&)
DECLARE(void, norm_backward, const NormBackward&)
DECLARE(void, swiglu_forward, const SwiGLU&)
DECLARE(void, swiglu_backward, const SwiGLU&)
DECLARE(void, rope, const Rope&)
DECLARE(void, cross_entropy, const CrossEntropy&)
DECLARE(int, attention_forward, const Attention&)
DECLARE(int, attention_backward, const Attention&)

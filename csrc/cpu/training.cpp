// What of csrc/cpu/training.h is exported: sizes and alignment checked, then the instruction set in use.
#include "training.h"

static int check(const Rows& rows) {
    if (rows.n < 0 || rows.dim < 0 || rows.threads < 1) return BAD_SIZE;
    return rows.is_bf16 == 0 || rows.is_bf16 == 1 ? OK : BAD_MODE;
}

template <class... Pointers>
static bool all_aligned(const Rows& rows, Pointers... pointers) {
    return (... && is_aligned(pointers, rows.is_bf16 ? 2 : 4));
}

EXPORT int cria_norm_forward(const NormForward* a) {
    if (int code = check(a->rows)) return code;
    if (!all_aligned(a->rows, a->x, a->residual, a->weight, a->y, a->sum) || !is_aligned(a->rstd, 4)) return BAD_ALIGNMENT;
    CHOOSE(norm_forward)(*a);
    return OK;
}

EXPORT int cria_norm_backward(const NormBackward* a) {
    if (int code = check(a->rows)) return code;
    if (a->parts < 1) return BAD_SIZE;
    if (!all_aligned(a->rows, a->dy, a->x, a->weight, a->ds, a->dx, a->dw, a->y)) return BAD_ALIGNMENT;
    CHOOSE(norm_backward)(*a);
    return OK;
}

EXPORT int cria_swiglu_forward(const SwiGLU* a) {
    if (int code = check(a->rows)) return code;
    if (!all_aligned(a->rows, a->gate_up, a->h)) return BAD_ALIGNMENT;
    CHOOSE(swiglu_forward)(*a);
    return OK;
}

EXPORT int cria_swiglu_backward(const SwiGLU* a) {
    if (int code = check(a->rows)) return code;
    if (!all_aligned(a->rows, a->gate_up, a->dh, a->dgate_up, a->h)) return BAD_ALIGNMENT;
    CHOOSE(swiglu_backward)(*a);
    return OK;
}

EXPORT int cria_rope(const Rope* a) {
    if (int code = check(a->rows)) return code;
    if (!all_aligned(a->rows, a->x, a->out) || !is_aligned(a->cos, 4) || !is_aligned(a->sin, 4)) return BAD_ALIGNMENT;
    CHOOSE(rope)(*a);
    return OK;
}

EXPORT int cria_cross_entropy(const CrossEntropy* a) {
    if (int code = check(a->rows)) return code;
    if (a->rows.dim < 1 || a->stride < a->rows.dim) return BAD_SIZE;
    if (!all_aligned(a->rows, a->logits) || !is_aligned(a->targets, 8)) return BAD_ALIGNMENT;
    CHOOSE(cross_entropy)(*a);
    return OK;
}

static int check(const Attention& a) {
    if (a.queries < 0 || a.keys < 0 || a.head_dim < 1 || a.kv_heads < 1 || a.threads < 1) return BAD_SIZE;
    if (a.heads % a.kv_heads || a.keys > INT32_MAX) return BAD_SIZE;
    const void* const tensors[] = {a.q, a.k, a.v, a.o, a.d_o, a.out, a.dq, a.dk, a.dv};
    for (const void* tensor : tensors)
        if (!is_aligned(tensor, a.is_bf16 ? 2 : 4)) return BAD_ALIGNMENT;
    for (int64_t i = 0; i < a.queries; i++) {
        const int32_t *first = a.limits + i, *last = first + a.queries, *prefix = last + a.queries, *end = prefix + a.queries;
        if (*first < 0 || *first > *last || *last > a.keys || *prefix < 0 || *prefix > *end || *end > a.keys) return BAD_SIZE;
    }
    return OK;
}

EXPORT int cria_attention_forward(const Attention* a) {
    if (int code = check(*a)) return code;
    return CHOOSE(attention_forward)(*a);
}

EXPORT int cria_attention_backward(const Attention* a) {
    if (int code = check(*a)) return code;
    return CHOOSE(attention_backward)(*a);
}

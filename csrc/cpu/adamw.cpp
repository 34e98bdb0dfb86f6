// AdamW of one tensor, in place, in one pass. kernels/ops/adamw.py has the formula and the reference, which gives the
// same bits. An element's result depends on no other element but those of its block, so threads change nothing.
#include "adamw.h"

static bool is_known(const AdamW& a) {
    return a.grad_type >= GRAD_FP32 && a.grad_type <= GRAD_BF16 && a.states >= STATES_FP32 && a.states <= STATES_8BIT &&
           a.master_type >= PARAM_FP32 && a.master_type <= MASTER_STOCHASTIC;
}

static bool is_aligned(const AdamW& a) {
    const uintptr_t state = a.states == STATES_FP32 ? 4 : a.states == STATES_BF16 ? 2 : 1;
    return is_aligned(a.param, a.master_type == PARAM_FP32 ? 4 : 2) && is_aligned(a.grad, a.grad_type == GRAD_FP32 ? 4 : 2) &&
           is_aligned(a.m, state) && is_aligned(a.v, state) && is_aligned(a.m_absmax, 4) && is_aligned(a.v_absmax, 4) &&
           is_aligned(a.low, 2) && is_aligned(a.master, 4) && is_aligned(a.maps, 4);
}

static bool is_complete(const AdamW& a) {
    const bool states = a.states != STATES_8BIT || (a.m_absmax && a.v_absmax && a.maps);
    return a.param && a.grad && a.m && a.v && states && (a.master_type != MASTER_SPLIT || a.low) &&
           (a.master_type != MASTER_FP32 || a.master);
}

EXPORT int cria_adamw(const AdamW* a) {
    if (!is_known(*a)) return BAD_MODE;
    if (a->n < 0 || a->offset < 0 || a->threads < 1) return BAD_SIZE;
    if (!is_aligned(*a)) return BAD_ALIGNMENT;
    if (a->n == 0) return OK;
    if (!is_complete(*a)) return BAD_MODE;
    const int64_t blocks = (a->n + BLOCK - 1) / BLOCK;
    constexpr int64_t SMALL = 64;  // blocks: 16,384 elements, about 10 us, which is what waking a thread costs
    const int64_t parts = blocks < SMALL * a->threads ? (blocks + SMALL - 1) / SMALL : a->threads;
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
    for (int64_t part = 0; part < parts; part++)
        CHOOSE(adamw_blocks)(*a, blocks * part / parts, blocks * (part + 1) / parts);
    return OK;
}

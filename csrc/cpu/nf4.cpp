// The checks of what csrc/cpu/isa/nf4.cpp is given. A block depends on no other, so threads change nothing.
#include "nf4.h"

template <class A, class F>
static int run(const A& a, const void* numbers, F run_blocks) {
    if (a.is_bf16 != 0 && a.is_bf16 != 1) return BAD_MODE;
    if (a.n < 0 || a.threads < 1) return BAD_SIZE;
    if (!is_aligned(numbers, a.is_bf16 ? 2 : 4)) return BAD_ALIGNMENT;
    const int64_t blocks = (a.n + NF4_BLOCK - 1) / NF4_BLOCK;
    constexpr int64_t SMALL = 512;  // blocks: 32,768 weights, about 10 us, which is what waking a thread costs
    const int64_t parts = blocks < SMALL * a.threads ? (blocks + SMALL - 1) / SMALL : a.threads;
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) run_blocks(blocks * part / parts, blocks * (part + 1) / parts);
    return OK;
}

EXPORT int cria_nf4_quantise(const NF4Quantise* a) {
    if (!is_aligned(a->absmax, 4)) return BAD_ALIGNMENT;
    return run(*a, a->weight, [&](int64_t first, int64_t last) { CHOOSE(nf4_quantise)(*a, first, last); });
}

EXPORT int cria_nf4_dequantise(const NF4Dequantise* a) {
    if (!is_aligned(a->absmax2, 4) || !is_aligned(a->offset, 4) || !is_aligned(a->map, 4)) return BAD_ALIGNMENT;
    return run(*a, a->out, [&](int64_t first, int64_t last) { CHOOSE(nf4_dequantise)(*a, first, last); });
}

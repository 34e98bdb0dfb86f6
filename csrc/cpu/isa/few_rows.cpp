// y = x w^T of few rows of x: the threads share the rows of w.
#include "products.h"

namespace {

template <class W>
void run(const FewRows& p, int64_t row) {
    for (int64_t b = 0; b < p.rows; b++) arrange<W>(p.x + b * p.in, p.in, p.workspace + b * p.in);
    const int64_t chunk = chunk_of(p.out, p.threads);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (int64_t i = 0; i < p.out; i += chunk) {
        const W* w = static_cast<const W*>(p.w);
        multiply(w, row, p.workspace, p.rows, p.in, i, least(i + chunk, p.out), p.y, p.out);
    }
}

}  // namespace

namespace ISA {

void few_rows(const FewRows& p) {
    if (p.type == WEIGHTS_FP32) run<float>(p, p.in);
    if (p.type == WEIGHTS_BF16) run<bf16>(p, p.in);
    if (p.type == WEIGHTS_Q8) run<Q8>(p, p.in / 32);
}

}  // namespace ISA

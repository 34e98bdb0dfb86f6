#include "product.h"

#include <cmath>

#define ALWAYS_INLINE inline __attribute__((always_inline))

static ALWAYS_INLINE void add_rows(float* c, const float* a, const float* b, int n, int k) {
    for (int i = 0; i < 16; i++, c += n)
        for (int l = 0; l < k; l++) {
            float x = a[i * k + l];
            for (int j = 0; j < n; j++) c[j] = std::fma(x, b[l * n + j], c[j]);
        }
}

static ALWAYS_INLINE void add_any(float* c, const float* a, const float* b, int n, int k) {
    if (n != 8) return add_rows(c, a, b, n, k);
    for (int i = 0; i < 16; i++, c += 8) {
        float row[8];
        for (int j = 0; j < 8; j++) row[j] = c[j];
        for (int l = 0; l < k; l++)
            for (int j = 0; j < 8; j++) row[j] = std::fma(a[i * k + l], b[l * 8 + j], row[j]);
        for (int j = 0; j < 8; j++) c[j] = row[j];
    }
}

// Without FMA instructions std::fma is a call, and a kernel of products takes 2.8 times as long. The bits are equal.
#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void add_with_fma(float* c, const float* a, const float* b, int n, int k) {
    add_any(c, a, b, n, k);
}
static const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif

void add_product(float* c, const float* a, const float* b, int n, int k) {
#ifdef __x86_64__
    if (has_fma) return add_with_fma(c, a, b, n, k);
#endif
    add_any(c, a, b, n, k);
}

#pragma once

// c (16, n) += a (16, k) b (k, n), each sum in the order of k.
void add_product(float* c, const float* a, const float* b, int n, int k);

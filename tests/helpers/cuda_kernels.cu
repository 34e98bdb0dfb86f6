// Kernels of CUDA C++ for tests of the PTX machine: tests/kernels/compiled/test_ptx_cuda.py
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

// Branches in a loop, shuffles, shared memory and an atomic.
extern "C" __global__ void reduce(const float* x, float* out, int n, int* negative) {
    __shared__ float parts[32];
    const float* row = x + (size_t)blockIdx.x * n;
    float sum = 0;
    int found = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = row[i];
        if (v < 0) { sum += v * 2; found++; }
        else if (i % 3 == 0) sum += v;
        else for (int j = 0; j < i % 5; j++) sum += v;
    }
    for (int d = 16; d; d /= 2) sum += __shfl_down_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
        for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (threadIdx.x == 0) out[blockIdx.x] = sum;
    }
    atomicAdd(negative, found);
}

extern "C" __global__ void half_a_block(float* out) {
    if (threadIdx.x < 64) __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void half_a_warp(float* out) {
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void mathematics(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i], a = fabsf(v) + 0.5f;
    float r[16] = {expf(v),       logf(a), sinf(v * 100), cosf(v),    tanhf(v),       sqrtf(a), rsqrtf(a), 1 / a,
                   powf(a, 1.5f), erff(v), floorf(v),     rintf(v * 7), fmodf(v, 0.3f), exp2f(v), log1pf(a), v / a};
    for (int k = 0; k < 16; k++) y[i * 16 + k] = r[k];
}

extern "C" __global__ void formats(const float* x, __nv_bfloat16* b, __half* h, __nv_fp8_e4m3* e, double* d,
                                   long long* l, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    __nv_bfloat162 p = __floats2bfloat162_rn(v, v + 1);
    p = __hmul2(p, p);
    b[2 * i] = p.x, b[2 * i + 1] = p.y;
    h[i] = __hmul(__float2half_rn(v), __float2half_rn(3.f));
    e[i] = __nv_fp8_e4m3(v);
    d[i] = sqrt(fabs((double)v)) / 3.0 + exp((double)v);
    long long q = (long long)(v * 1000);
    l[i] = q / (i % 7 + 1) + q % 13 + __popcll(q) + __clzll(q);
}

extern "C" __global__ void votes(const int* x, int* y) {
    int t = threadIdx.x, v = x[t];
    y[4 * t] = __syncthreads_count(v > 0);
    y[4 * t + 1] = __syncthreads_or(v > 9) * 2 + __syncthreads_and(v > -99);
    y[4 * t + 2] = __ballot_sync(~0u, v & 1);
    y[4 * t + 3] = __popc(__match_any_sync(~0u, v & 3)) * 1000 + __reduce_add_sync(~0u, v);
}

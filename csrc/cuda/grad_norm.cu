// The global L2 norm of gradients in one launch: kernels/ops/grad_norm.py.
//
// A block adds the squares of every MAX_BLOCKS-th chunk: within a thread in fp32 over a chunk, chunks and threads in
// fp64. The block that is done last adds the blocks' sums in their order. Which elements a sum has depends on no device,
// so that equal gradients give equal bits everywhere. NaN and Inf propagate.
#include "launch.cuh"
#include "numbers.cuh"
#include "table.cuh"

namespace cria {

constexpr int NORM_THREADS = 256, NORM_CHUNK = 16384, MAX_BLOCKS = 4096;

struct Gradient {  // a row of the table: kernels/ops/grad_norm_cuda.py writes it
    uint64_t at;
    int64_t n, first_chunk;
    uint32_t fp32, aligned;  // whether it is fp32, else bf16; whether it begins at a multiple of 16 bytes
};
static_assert(sizeof(Gradient) == 4 * 8, "a row of the table");

template <bool FP32> __device__ float add_squares(uint64_t at, int n, bool aligned) {
    constexpr int RUN = FP32 ? 4 : 8;  // elements of 16 bytes
    float sums[2] = {0, 0};
    auto add_vector = [&](int i) {
        uint32_t words[4];
        load_words<4>(at + uint64_t(i) * 16, words);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (FP32) sums[j % 2] = fmaf(__uint_as_float(words[j]), __uint_as_float(words[j]), sums[j % 2]);
            else {
                sums[0] = fmaf(lower(words[j]), lower(words[j]), sums[0]);
                sums[1] = fmaf(upper(words[j]), upper(words[j]), sums[1]);
            }
    };
    int done = 0;
    if (aligned && n == NORM_CHUNK) {
#pragma unroll 8
        for (int i = 0; i < NORM_CHUNK / RUN / NORM_THREADS; i++) add_vector(i * NORM_THREADS + int(threadIdx.x));
        done = n;
    } else if (aligned) {
        for (int i = int(threadIdx.x); i < n / RUN; i += NORM_THREADS) add_vector(i);
        done = n / RUN * RUN;
    }
    for (int i = done + int(threadIdx.x); i < n; i += NORM_THREADS) {
        float x = FP32 ? reinterpret_cast<const float*>(at)[i] : lower(reinterpret_cast<const uint16_t*>(at)[i]);
        sums[0] = fmaf(x, x, sums[0]);
    }
    return sums[0] + sums[1];
}

// The sum over the block, in thread 0.
__device__ inline double add_threads(double x, double* shared) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < NORM_THREADS / 32; i++) x += shared[i];
    __syncthreads();
    return x;
}

// sums: (blocks,) fp64. ticket: 0, and 0 again after the launch.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
cria_grad_norm_kernel(const Gradient* table, int64_t n_tensors, int64_t n_chunks, double* sums, uint32_t* ticket,
                      float* norm) {
    __shared__ double shared[NORM_THREADS / 32];
    __shared__ uint32_t place;
    double sum = 0;
    for (int64_t chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        const Gradient& g = find_tensor(table, n_tensors, chunk);
        const int64_t first = (chunk - g.first_chunk) * NORM_CHUNK;
        const int n = int(min(g.n - first, int64_t(NORM_CHUNK)));
        sum += g.fp32 ? add_squares<true>(g.at + uint64_t(first) * 4, n, g.aligned)
                      : add_squares<false>(g.at + uint64_t(first) * 2, n, g.aligned);
    }
    sum = add_threads(sum, shared);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        __threadfence();
        place = atomicInc(ticket, gridDim.x - 1);
    }
    __syncthreads();
    if (place != gridDim.x - 1) return;
    __threadfence();
    double total = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += NORM_THREADS) total += __ldcg(sums + i);
    total = add_threads(total, shared);
    if (threadIdx.x == 0) *norm = float(sqrt(total));
}

}  // namespace cria

EXPORT int cria_grad_norm(const void* table, int64_t n_tensors, int64_t n_chunks, double* sums, uint32_t* ticket,
                          float* norm, void* stream) {
    using namespace cria;
    if (n_tensors < 1 || n_chunks < 1) return BAD_SIZE;
    const auto blocks = unsigned(std::min<int64_t>(n_chunks, MAX_BLOCKS));
    cria_grad_norm_kernel<<<blocks, NORM_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Gradient*>(table), n_tensors, n_chunks, sums, ticket, norm);
    return check_launch();
}

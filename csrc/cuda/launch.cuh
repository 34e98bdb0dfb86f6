// What the host launchers share.
#pragma once

#include <algorithm>

#include "api.cuh"

namespace cria {

// Sets `blocks` to as many as the current device holds at once, at most n. Returns OK or CUDA_ERROR + the error.
template <class Kernel> int fill_device(Kernel kernel, int threads, size_t shared_bytes, int64_t n, unsigned& blocks) {
    int device = 0, sms = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes);
    blocks = unsigned(std::min<int64_t>(n, int64_t(sms) * std::max(resident, 1)));
    return error ? CUDA_ERROR + int(error) : OK;
}

}  // namespace cria

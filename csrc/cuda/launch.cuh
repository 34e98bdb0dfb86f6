// What host launchers share. They return 0, or the error of the CUDA runtime as a number.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#define CRIA_EXPORT extern "C" __attribute__((visibility("default")))

namespace cria {

// Sets `blocks` to as many as the current device holds at once, at most n.
template <class Kernel>
cudaError_t fill_device(Kernel kernel, int threads, size_t shared_bytes, int64_t n, int& blocks) {
    int device = 0, sms = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes);
    blocks = int(std::min<int64_t>(n, int64_t(sms) * std::max(resident, 1)));
    return error;
}

}  // namespace cria

// What every file of the CUDA library shares: exports and error codes. kernels/native/cuda.py declares the exported
// functions for ctypes.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

constexpr int ABI_VERSION = 2;

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Code : int {  // what a function returns; kernels/native/library.py turns it into an exception
    OK = 0,
    BAD_SIZE = 1,       // a negative size, or one that the function does not take
    BAD_ALIGNMENT = 2,  // an address that is not aligned as its vectors want
    BAD_MODE = 3,       // a mode or type that the function does not know
    CUDA_ERROR = 1000,  // plus the cudaError_t of the launch
};

inline int check_launch() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? OK : CUDA_ERROR + static_cast<int>(error);
}

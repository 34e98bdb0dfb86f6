// The library's version, the chips it is built for, and the words for an error of CUDA's.
#include "api.cuh"

EXPORT int cria_abi_version() { return ABI_VERSION; }
EXPORT const char* cria_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

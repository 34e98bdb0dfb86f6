// What the shared library exports; kernels/compiled/machine_library.py declares the same for ctypes.
#pragma once

#include "numbers.h"

constexpr int ABI_VERSION = 2;

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Request {  // one launch
    u32 grid[3], block[3];
    u64 dynamic_shared, limit;  // bytes; instructions of a warp, 0 for any number
    u32 late, reverse, check, n_args, n_ranges, padding;
    const void* const* args;    // as for cuLaunchKernel: where each parameter's bytes are
    const u64* ranges;          // of global memory that the kernel may touch: start and end of each
    const char* const* names;   // of each range
};

// Every char* that is returned is freed by ptx_free.
EXPORT int ptx_abi_version();
EXPORT void* ptx_load(const char* text, char** error);  // a module; or null, and what is wrong in error
EXPORT void ptx_unload(void* module);
EXPORT char* ptx_kernels(void* module);  // of each kernel a line: its name and the bytes of each parameter
EXPORT char* ptx_run(void* module, const char* kernel, const Request* request);  // JSON: see report.cpp
EXPORT void ptx_free(char* text);

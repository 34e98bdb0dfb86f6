// What every file of the CPU library shares: exports, error codes, alignment, threads. kernels/native/cpu.py declares
// the exported functions for ctypes.
#pragma once

#include <cstdint>

constexpr int ABI_VERSION = 4;

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Code : int {  // what a function returns; kernels/native/library.py turns it into an exception
    OK = 0,
    BAD_SIZE = 1,   // a negative size, or one that the function does not take
    BAD_ALIGNMENT = 2,  // an address that is no multiple of its element's size
    BAD_MODE = 3,   // a mode or type that the function does not know
    NO_MEMORY = 4,  // for its workspace
};

EXPORT int cria_abi_version();
EXPORT const char* cria_instruction_set();  // "plain", "avx2" or "avx512": the one in use

// One function of csrc/cpu/isa, compiled for each instruction set in a namespace of that name, chosen when it is called.
enum InstructionSet : int { PLAIN = 0, AVX2 = 1, AVX512 = 2 };
InstructionSet instruction_set();

#if defined(__x86_64__)
#define DECLARE(result, name, ...)                      \
    namespace plain { result name(__VA_ARGS__); }       \
    namespace avx2 { result name(__VA_ARGS__); }        \
    namespace avx512 { result name(__VA_ARGS__); }
#define CHOOSE(name) \
    (instruction_set() == AVX512 ? avx512::name : instruction_set() == AVX2 ? avx2::name : plain::name)
#else
#define DECLARE(result, name, ...) \
    namespace plain { result name(__VA_ARGS__); }
#define CHOOSE(name) (plain::name)
#endif

inline bool is_aligned(const void* address, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

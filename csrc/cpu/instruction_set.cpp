// Chooses the instruction set once: the best that the processor and the system run, or a lesser one that
// CRIA_INSTRUCTION_SET names.
#include <cstdlib>
#include <cstring>

#include "api.h"

static const char* const NAMES[] = {"plain", "avx2", "avx512"};

static InstructionSet find_best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PLAIN;
}

InstructionSet instruction_set() {
    static const InstructionSet chosen = [] {
        const InstructionSet best = find_best();
        const char* named = std::getenv("CRIA_INSTRUCTION_SET");
        for (int i = 0; named && i < best; i++)
            if (!std::strcmp(named, NAMES[i])) return static_cast<InstructionSet>(i);
        return best;
    }();
    return chosen;
}

EXPORT int cria_abi_version() { return ABI_VERSION; }
EXPORT const char* cria_instruction_set() { return NAMES[instruction_set()]; }

// Instructions of sm_90a: mbarriers, bulk copies of tiles, products of a warpgroup.
#pragma once

#include <cstdint>
#include <type_traits>
#include <cuda_fp16.h>

namespace cria {

// A number that all lanes have, so that the compiler knows it: what depends on it is computed once for a warp.
__device__ inline int all_lanes(int x) { return __shfl_sync(~0u, x, 0); }

// ---- shared memory ----

__device__ inline void store_shared(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ inline void store_shared(uint32_t to, uint32_t x, uint32_t y, uint32_t z) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, 0};" :: "r"(to), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ inline uint4 load_shared(uint32_t from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}
// Four matrices of 8 x 8 in 16 bits; lane i has the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t from, uint32_t* x) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ inline void store_matrices(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// ---- barriers ----

__device__ inline void make_barrier(uint32_t at, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "r"(arrivals) : "memory");
}
__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void expect(uint32_t barrier, uint32_t bytes) {  // and arrives
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
// Makes what this thread wrote in shared memory visible to bulk copies and products.
__device__ inline void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int N> __device__ inline void lower_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ inline void raise_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }

// ---- bulk copies of tiles: axes are 64 columns, rows, heads, panels of 64 columns ----

struct alignas(128) TileMap { uint64_t words[16]; };  // a CUtensorMap

__device__ inline void load_tile(uint32_t to, const TileMap* map, int row, int head, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(head), "r"(0) : "memory");
}
__device__ inline void store_tile(const TileMap* map, int row, int head, int panel, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 :: "l"(map), "r"(from), "r"(0), "r"(row), "r"(head), "r"(panel) : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- products ----
//
// Each function is one statement from fence to commit, so that the compiler puts nothing between.

// A tile of 64 rows of 128 bytes, swizzled. leading: bytes between panels of 64 columns, where columns are summed over.
__device__ inline uint64_t describe(uint32_t at, uint32_t leading) {
    return uint64_t(at >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define OUT_4(x, i) "=f"(x[i]), "=f"(x[i + 1]), "=f"(x[i + 2]), "=f"(x[i + 3])
#define OUT_32(x) OUT_4(x, 0), OUT_4(x, 4), OUT_4(x, 8), OUT_4(x, 12), OUT_4(x, 16), OUT_4(x, 20), OUT_4(x, 24), OUT_4(x, 28)
#define BOTH_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define BOTH_32(x, i)                                                                                                   \
    BOTH_4(x, i), BOTH_4(x, i + 4), BOTH_4(x, i + 8), BOTH_4(x, i + 12), BOTH_4(x, i + 16), BOTH_4(x, i + 20),          \
        BOTH_4(x, i + 24), BOTH_4(x, i + 28)
#define IN_4(x, i) "r"(x[i]), "r"(x[i + 1]), "r"(x[i + 2]), "r"(x[i + 3])
#define IN_16(x, i) IN_4(x, i), IN_4(x, i + 4), IN_4(x, i + 8), IN_4(x, i + 12)
#define REGISTERS_32                                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                                                    \
    REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "    \
                 "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// AT: bytes / 16 from the first of a tile's terms to these 16.
#define KEYS_STEP(TYPE, Q, K, AT, ADD)                                                                                  \
    "add.s64 b, " K ", " AT ";\n"                                                                                       \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" REGISTERS_32 "}, {" Q "}, b, " ADD ", 1, 1, 0;\n"
#define KEYS_64(TYPE, K)                                                                                                \
    KEYS_STEP(TYPE, "%32, %33, %34, %35", K, "0", "0") KEYS_STEP(TYPE, "%36, %37, %38, %39", K, "2", "1")               \
        KEYS_STEP(TYPE, "%40, %41, %42, %43", K, "4", "1") KEYS_STEP(TYPE, "%44, %45, %46, %47", K, "6", "1")
#define KEYS_128(TYPE, K)                                                                                               \
    KEYS_64(TYPE, K)                                                                                                    \
    KEYS_STEP(TYPE, "%48, %49, %50, %51", K, "512", "1") KEYS_STEP(TYPE, "%52, %53, %54, %55", K, "514", "1")           \
        KEYS_STEP(TYPE, "%56, %57, %58, %59", K, "516", "1") KEYS_STEP(TYPE, "%60, %61, %62, %63", K, "518", "1")
#define MULTIPLY_KEYS(STEPS, ...)                                                                                       \
    asm volatile("{\n.reg .b64 b;\nwgmma.fence.sync.aligned;\n" STEPS "wgmma.commit_group.sync.aligned;\n}"             \
                 : OUT_32(s) : __VA_ARGS__, "l"(k) : "memory")

// s = Q K^T of 64 queries and 64 keys, begun. q: in registers, as load_matrices loads them.
template <class T, int D>
__device__ inline void multiply_keys(float (&s)[32], const uint32_t (&q)[D / 4], uint32_t k_at) {
    const uint64_t k = describe(k_at, 16);
    constexpr bool HALF = std::is_same_v<T, __half>;
    if constexpr (D == 64) {
        if constexpr (HALF) MULTIPLY_KEYS(KEYS_64("f16", "%48"), IN_16(q, 0));
        else MULTIPLY_KEYS(KEYS_64("bf16", "%48"), IN_16(q, 0));
    } else {
        if constexpr (HALF) MULTIPLY_KEYS(KEYS_128("f16", "%64"), IN_16(q, 0), IN_16(q, 16));
        else MULTIPLY_KEYS(KEYS_128("bf16", "%64"), IN_16(q, 0), IN_16(q, 16));
    }
}

#define VALUES_STEP(SHAPE, REGISTERS, TYPE, P, V, AT)                                                                   \
    "add.s64 b, " V ", " AT ";\n"                                                                                        \
    "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, {" P "}, b, 1, 1, 1, 1;\n"
#define VALUES_64(TYPE)                                                                                                 \
    asm volatile("{\n.reg .b64 b;\nwgmma.fence.sync.aligned;\n"                                                         \
                 VALUES_STEP("m64n64k16", REGISTERS_32, TYPE, "%32, %33, %34, %35", "%48", "0")                           \
                 VALUES_STEP("m64n64k16", REGISTERS_32, TYPE, "%36, %37, %38, %39", "%48", "128")                        \
                 VALUES_STEP("m64n64k16", REGISTERS_32, TYPE, "%40, %41, %42, %43", "%48", "256")                        \
                 VALUES_STEP("m64n64k16", REGISTERS_32, TYPE, "%44, %45, %46, %47", "%48", "384")                        \
                 "wgmma.commit_group.sync.aligned;\n}"                                                                  \
                 : BOTH_32(o, 0) : IN_16(p, 0), "l"(v) : "memory")
#define VALUES_128(TYPE)                                                                                                \
    asm volatile("{\n.reg .b64 b;\nwgmma.fence.sync.aligned;\n"                                                         \
                 VALUES_STEP("m64n128k16", REGISTERS_64, TYPE, "%64, %65, %66, %67", "%80", "0")                          \
                 VALUES_STEP("m64n128k16", REGISTERS_64, TYPE, "%68, %69, %70, %71", "%80", "128")                       \
                 VALUES_STEP("m64n128k16", REGISTERS_64, TYPE, "%72, %73, %74, %75", "%80", "256")                       \
                 VALUES_STEP("m64n128k16", REGISTERS_64, TYPE, "%76, %77, %78, %79", "%80", "384")                       \
                 "wgmma.commit_group.sync.aligned;\n}"                                                                  \
                 : BOTH_32(o, 0), BOTH_32(o, 32) : IN_16(p, 0), "l"(v) : "memory")

// o += P V of 64 queries and 64 keys, begun. p: in registers, as the scores lie.
template <class T, int D> __device__ inline void multiply_values(float (&o)[D / 2], const uint32_t (&p)[16], uint32_t v_at) {
    const uint64_t v = describe(v_at, 8192);
    if constexpr (std::is_same_v<T, __half>) {
        if constexpr (D == 64) VALUES_64("f16");
        else VALUES_128("f16");
    } else {
        if constexpr (D == 64) VALUES_64("bf16");
        else VALUES_128("bf16");
    }
}

// Waits until N groups of products at most are under way; x: the results that are there then.
template <int N> __device__ inline void wait_products(float (&x)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : BOTH_32(x, 0) : "n"(N) : "memory");
}
template <int N> __device__ inline void wait_products(float (&x)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : BOTH_32(x, 0), BOTH_32(x, 32) : "n"(N) : "memory");
}

}  // namespace cria

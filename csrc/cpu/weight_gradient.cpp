// out (N, K) = dy^T x, or out + dy^T x, of bf16 dy (T, N) and x (T, K), summed in fp32: the gradient of a weight. By AMX,
// whose instruction adds the product of 16 x 32 and 32 x 16 numbers to 16 x 16 sums.
//
// The sums of a block of up to ROWS x COLUMNS stay in the second-level cache, while dy and x are taken TOKENS tokens at a
// time into tiles: of both, 32 tokens of 16 columns, where two tokens of a column lie side by side, as AMX wants the right
// operand; the left one is that, transposed. What is beyond the edges is zero. Each sum has one order, whatever the threads.
#include "weight_gradient.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

// The compilers that know the instructions. Whether the processor does is asked when the library runs.
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

#if HAS_AMX

#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
constexpr int64_t TOKENS = 256, ROWS = 512, COLUMNS = 768;
constexpr int64_t TILE = 512;  // numbers of bf16

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
static int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

static bool has_amx() {
    unsigned a, b, c, d;
    if (instruction_set() != AVX512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool is_there = (d >> 22 & 1) && (d >> 24 & 1);  // amx-bf16, amx-tile
    return is_there && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM: the tiles' state, of 8 KB
}

// Two rows of 32 numbers become two of 16 pairs.
AMX static void pair_up(__m512i a, __m512i b, __m512i& low, __m512i& high) {
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    low = _mm512_permutex2var_epi16(a, first, b);
    high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
}

AMX static void transpose(__m512i* r) {  // 16 rows of 16 pairs
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int half = 0; half < 16; half += 8)
        for (int i = 0; i < 4; i++) {
            t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + 4 + i], 0x88);
            t[half + 4 + i] = _mm512_shuffle_i32x4(r[half + i], r[half + 4 + i], 0xDD);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
    }
}

// Write `tokens` rows of `columns` numbers as tiles: those of 16 columns one after another, in the order of tokens.
AMX static void pack(const uint16_t* from, int64_t row, int64_t tokens, int64_t columns, bool is_left, uint16_t* tiles) {
    const int64_t steps = round_up(tokens, 32) / 32;
    for (int64_t s = 0; s < steps; s++)
        for (int64_t c = 0; c < columns; c += 32) {
            const __mmask32 mask = columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1;
            __m512i low[16], high[16];
            for (int r = 0; r < 16; r++) {
                const int64_t t = 32 * s + 2 * r;
                const uint16_t* p = from + t * row + c;
                const __m512i zero = _mm512_setzero_si512();
                const __m512i a = t < tokens ? _mm512_maskz_loadu_epi16(mask, p) : zero;
                const __m512i b = t + 1 < tokens ? _mm512_maskz_loadu_epi16(mask, p + row) : zero;
                pair_up(a, b, low[r], high[r]);
            }
            if (is_left) transpose(low), transpose(high);
            uint16_t* out = tiles + (c / 16 * steps + s) * TILE;
            for (int r = 0; r < 16; r++) {
                _mm512_store_si512(out + 32 * r, low[r]);
                _mm512_store_si512(out + steps * TILE + 32 * r, high[r]);
            }
        }
}

// Add the products of `steps` tiles each of two rows and two columns of tiles to 32 x 32 sums, or begin the sums.
AMX static void multiply(const uint16_t* left, const uint16_t* right, int64_t steps, bool begins, float* sums, int64_t width) {
    float* const lower = sums + 16 * width;
    const int64_t bytes = 4 * width;
    if (begins) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, sums, bytes); _tile_loadd(1, sums + 16, bytes);
        _tile_loadd(2, lower, bytes); _tile_loadd(3, lower + 16, bytes);
    }
    for (const uint16_t* end = left + steps * TILE; left < end; left += TILE, right += TILE) {
        _tile_loadd(4, left, 64); _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + steps * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + steps * TILE, 64);
        _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, bytes); _tile_stored(1, sums + 16, bytes);
    _tile_stored(2, lower, bytes); _tile_stored(3, lower + 16, bytes);
}

AMX static __m256i round_to_bf16(__m512 x) {  // to nearest, ties to even; of a NaN, whose low half is 0 here, a NaN
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

AMX static void write(const WeightGradient& p, const float* sums, int64_t width, int64_t row, int64_t column, int64_t n,
                      int64_t k) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j += 16) {
            const __mmask16 mask = k - j >= 16 ? 0xFFFF : (1u << (k - j)) - 1;
            const int64_t at = (row + i) * p.out_row + column + j;
            float* wide = static_cast<float*>(p.out) + at;
            uint16_t* narrow = static_cast<uint16_t*>(p.out) + at;
            __m512 x = _mm512_loadu_ps(sums + i * width + j);
            if (p.is_added && p.out_is_fp32) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, wide));
            if (p.is_added && !p.out_is_fp32) {
                const __m512i old = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, narrow));
                x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(old, 16)));
            }
            if (p.out_is_fp32) _mm512_mask_storeu_ps(wide, mask, x);
            else _mm256_mask_storeu_epi16(narrow, mask, round_to_bf16(x));
        }
}

struct Blocks {  // of out: as many for each thread, none larger than the cache takes
    int64_t rows, columns, down, across;

    explicit Blocks(const WeightGradient& p) {
        columns = round_up(divide_up(p.columns, divide_up(p.columns, COLUMNS)), 32);
        across = divide_up(p.columns, columns);
        const int64_t wanted = divide_up(round_up(divide_up(p.rows, ROWS) * across, p.threads), across);
        rows = round_up(divide_up(p.rows, wanted), 32);
        down = divide_up(p.rows, rows);
    }

    int64_t bytes() const { return 2 * TOKENS * (rows + columns) + 4 * rows * columns; }  // of a thread's workspace
};

AMX static void work(const WeightGradient& p, const Blocks& blocks, std::atomic<int64_t>& next, char* workspace) {
    uint16_t *left = reinterpret_cast<uint16_t*>(workspace), *right = left + TOKENS * blocks.rows;
    float* sums = reinterpret_cast<float*>(right + TOKENS * blocks.columns);
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    _tile_loadconfig(&shape);
    for (int64_t i = next++; i < blocks.down * blocks.across; i = next++) {
        const int64_t row = i / blocks.across * blocks.rows, column = i % blocks.across * blocks.columns;
        const int64_t n = std::min(blocks.rows, p.rows - row), k = std::min(blocks.columns, p.columns - column);
        const int64_t width = round_up(k, 32);
        if (!p.tokens) std::memset(sums, 0, 4 * round_up(n, 32) * width);
        for (int64_t t = 0; t < p.tokens; t += TOKENS) {
            const int64_t tokens = std::min(TOKENS, p.tokens - t), steps = round_up(tokens, 32) / 32;
            pack(p.dy + t * p.dy_row + row, p.dy_row, tokens, n, true, left);
            pack(p.x + t * p.x_row + column, p.x_row, tokens, k, false, right);
            for (int64_t a = 0; a < n; a += 32)
                for (int64_t b = 0; b < k; b += 32)
                    multiply(left + a / 16 * steps * TILE, right + b / 16 * steps * TILE, steps, !t, sums + a * width + b, width);
        }
        write(p, sums, width, row, column, n, k);
    }
    _tile_release();
}

EXPORT int cria_has_amx() {
    static const bool found = has_amx();
    return found;
}

EXPORT int cria_weight_gradient(const WeightGradient* p) {
    if (!cria_has_amx()) return BAD_MODE;
    if (p->tokens < 0 || p->rows < 0 || p->columns < 0 || p->threads < 1) return BAD_SIZE;
    if (p->dy_row < p->rows || p->x_row < p->columns || p->out_row < p->columns) return BAD_SIZE;
    if (!is_aligned(p->dy, 2) || !is_aligned(p->x, 2) || !is_aligned(p->out, p->out_is_fp32 ? 4 : 2)) return BAD_ALIGNMENT;
    if (!p->rows || !p->columns) return OK;
    const Blocks blocks(*p);
    char* workspace = static_cast<char*>(std::aligned_alloc(64, p->threads * blocks.bytes()));
    if (!workspace) return NO_MEMORY;
    std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(p->threads)
    for (int64_t i = 0; i < p->threads; i++) work(*p, blocks, next, workspace + i * blocks.bytes());
    std::free(workspace);
    return OK;
}

#else

EXPORT int cria_has_amx() { return 0; }
EXPORT int cria_weight_gradient(const WeightGradient*) { return BAD_MODE; }

#endif

// Blocks of 64 weights to 4-bit codes and back, compiled for one instruction set. kernels/ops/nf4.py is the
// specification: every sum and product is rounded as its reference rounds it.
#include "../nf4.h"
#include "exponential.h"

namespace {

constexpr float TABLE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};
constexpr float LEAST = 1e-38f;  // a lower maximum is taken as this one before it is inverted

// The largest magnitude of a block, compared as integers: NaN is above Inf, and Inf above all numbers.
float largest_magnitude(const float* x) {
    vi most{};
    for (int i = 0; i < NF4_BLOCK; i += LANES) {
        const vi bits = (vi)load<vf>(x + i) & 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = most[i] > bits ? most[i] : bits;
    float absmax;
    std::memcpy(&absmax, &bits, 4);
    return absmax;
}

// How many middles between neighbouring entries of the table lie below each number.
vi count_middles(vf x) {
    float middles[16];
    for (int k = 0; k < 15; k++) middles[k] = (TABLE[k] + TABLE[k + 1]) / 2;
#if defined(__AVX512F__)  // a search of four steps, each among middles that lie in a register
    middles[15] = 0;
    const __m512 table = _mm512_loadu_ps(middles);
    const __m512i one = _mm512_set1_epi32(1);
    __m512i code = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
        const __m512i place = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
        const __m512 middle = _mm512_maskz_permutexvar_ps(0xFFFF, place, table);
        const __mmask16 above = _mm512_cmp_ps_mask((__m512)x, middle, _CMP_GT_OQ);
        code = _mm512_mask_add_epi32(code, above, place, one);
    }
    return (vi)code;
#else
    vi code{};
    for (int k = 0; k < 15; k++) code -= x > middles[k];
    return code;
#endif
}

void encode(const float* ratio, uint8_t* packed) {
    uint8_t codes[NF4_BLOCK];
    for (int i = 0; i < NF4_BLOCK; i += LANES) {
        store(codes + i, __builtin_convertvector((vu)count_middles(load<vf>(ratio + i)), vb));
    }
    for (int i = 0; i < NF4_BLOCK / 2; i++) packed[i] = codes[2 * i] << 4 | codes[2 * i + 1];
}

template <class T>
void quantise(const NF4Quantise& a, int64_t first, int64_t last) {
    const int64_t whole = a.n / NF4_BLOCK;
    float x[NF4_BLOCK];
    for (int64_t block = first; block < last; block++) {
        const T* weight = (const T*)a.weight + block * NF4_BLOCK;
        uint8_t* codes = a.codes + block * (NF4_BLOCK / 2);
        const int64_t n = block < whole ? NF4_BLOCK : a.n % NF4_BLOCK;
        T part[NF4_BLOCK] = {};
        if (n < NF4_BLOCK) std::memcpy(part, weight, n * sizeof(T));
        for (int i = 0; i < NF4_BLOCK; i += LANES) store(x + i, read((n < NF4_BLOCK ? part : weight) + i));
        const float found = largest_magnitude(x), absmax = found < LEAST ? LEAST : found;
        if (n == NF4_BLOCK) {
            const float inverse = 1 / absmax;
            for (int i = 0; i < NF4_BLOCK; i++) x[i] *= inverse;
            encode(x, codes);
            a.absmax[block] = found;
        } else {
            uint8_t packed[NF4_BLOCK / 2];
            for (int i = 0; i < NF4_BLOCK; i++) x[i] /= absmax;
            encode(x, packed);
            std::memcpy(codes, packed, (n + 1) / 2);
            a.absmax[block] = absmax;
        }
    }
}

// out[i] = numbers[codes[i]] for 64 codes. A block's 16 products are rounded before the numbers are looked up.
void look_up(const uint8_t* codes, const float* numbers, float* out) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_loadu_ps(numbers);
    for (int i = 0; i < 32; i += 8) {  // the lower 4 bits of each half of 64 are a place
        const __m512i byte = _mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64((const __m128i*)(codes + i)));
        const __m512i place = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        _mm512_storeu_ps(out + 2 * i, _mm512_maskz_permutexvar_ps(0xFFFF, place, table));
    }
#else
    for (int i = 0; i < 32; i++) out[2 * i] = numbers[codes[i] >> 4], out[2 * i + 1] = numbers[codes[i] & 15];
#endif
}

void look_up(const uint8_t* codes, const float* numbers, bf16* out) {
    bf16 table[32];
    for (int i = 0; i < 16; i += LANES) write(table + i, load<vf>(numbers + i));
#if defined(__AVX512F__)
    std::memcpy(table + 16, table, sizeof table / 2);  // the lower 5 bits of each half of 32 are a place
    const __m512i both = _mm512_loadu_si512(table);
    for (int i = 0; i < 32; i += 16) {
        const __m512i byte = _mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)(codes + i)));
        const __m512i place = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512(out + 2 * i, _mm512_maskz_permutexvar_epi16(0xFFFFFFFF, place, both));
    }
#elif defined(__AVX2__)
    const __m128i low_bytes = _mm_set1_epi16(0xFF), nibble = _mm_set1_epi8(15);
    const __m128i a = _mm_loadu_si128((const __m128i*)table), b = _mm_loadu_si128((const __m128i*)(table + 8));
    const __m128i low = _mm_packus_epi16(_mm_and_si128(a, low_bytes), _mm_and_si128(b, low_bytes));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    for (int i = 0; i < 32; i += 16) {
        const __m128i byte = _mm_loadu_si128((const __m128i*)(codes + i));
        const __m128i even = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble), odd = _mm_and_si128(byte, nibble);
        const __m128i places[] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int k = 0; k < 2; k++) {
            const __m128i l = _mm_shuffle_epi8(low, places[k]), h = _mm_shuffle_epi8(high, places[k]);
            _mm_storeu_si128((__m128i*)(out + 2 * i + 16 * k), _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128((__m128i*)(out + 2 * i + 16 * k + 8), _mm_unpackhi_epi8(l, h));
        }
    }
#else
    for (int i = 0; i < 32; i++) out[2 * i] = table[codes[i] >> 4], out[2 * i + 1] = table[codes[i] & 15];
#endif
}

template <class T>
void dequantise(const NF4Dequantise& a, int64_t first, int64_t last) {
    const int64_t whole = a.n / NF4_BLOCK;
    float numbers[16];
    for (int64_t block = first; block < last; block++) {
        const float absmax = a.map[a.absmax_codes[block]] * a.absmax2[block / NF4_BLOCK2] + *a.offset;
        for (int i = 0; i < 16; i++) numbers[i] = TABLE[i] * absmax;
        const uint8_t* codes = a.codes + block * (NF4_BLOCK / 2);
        T* out = (T*)a.out + block * NF4_BLOCK;
        if (block < whole) {
            look_up(codes, numbers, out);
            continue;
        }
        const int64_t n = a.n % NF4_BLOCK;
        uint8_t some_codes[NF4_BLOCK / 2] = {};
        T some[NF4_BLOCK];
        std::memcpy(some_codes, codes, (n + 1) / 2);
        look_up(some_codes, numbers, some);
        std::memcpy(out, some, n * sizeof(T));
    }
}

}  // namespace

namespace ISA {

void nf4_quantise(const NF4Quantise& a, int64_t first, int64_t last) {
    a.is_bf16 ? quantise<bf16>(a, first, last) : quantise<float>(a, first, last);
}

void nf4_dequantise(const NF4Dequantise& a, int64_t first, int64_t last) {
    a.is_bf16 ? dequantise<bf16>(a, first, last) : dequantise<float>(a, first, last);
}

}  // namespace ISA

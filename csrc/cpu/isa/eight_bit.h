// Blocks of 256 numbers in 8 bits, as kernels/ops/eight_bit.py defines them.
#pragma once

#include "../adamw.h"
#include "vectors.h"

namespace {

constexpr float TINY = 1.17549435e-38f;  // 2^-126: the least maximum with a finite inverse

struct Line {  // of each ratio: its rank is the lesser of ratio slope + intercept and `most`, where the piece ends
    vf slope, intercept, most;
};

vf most_of(vf intercept) { return intercept * 2.25f - 0.5f; }

#if defined(__AVX512F__)
// The linear piece of a ratio in [0, 2): what its exponent tells, or the next one. Pieces begin a decade apart, so that
// each power of two holds the beginning of one at most. Below 2^-24 no piece begins but the second.
class Pieces {
    __m512 slopes, intercepts, mosts, bounds[2];
    __m512i first[2];

   public:
    explicit Pieces(const DynamicMap& map) {
        float bound[32] = {}, lines[2][16] = {};
        int32_t before[32] = {};
        for (int exponent = LEAST; exponent < 128; exponent++) {
            const float low = exponent > LEAST ? __builtin_ldexpf(1, exponent - 127) : 0;
            int piece = 0;
            while (piece + 1 < DECADES && map.starts[piece + 1] <= low) piece++;
            before[exponent % 32] = piece;
            bound[exponent % 32] = piece + 1 < DECADES ? map.starts[piece + 1] : __builtin_inff();
        }
        std::memcpy(lines[0], map.slopes, sizeof map.slopes);
        std::memcpy(lines[1], map.intercepts, sizeof map.intercepts);
        std::memcpy(bounds, bound, sizeof bounds);
        std::memcpy(first, before, sizeof first);
        std::memcpy(&slopes, lines[0], sizeof slopes);
        std::memcpy(&intercepts, lines[1], sizeof intercepts);
        mosts = (__m512)most_of((vf)intercepts);
    }

    Line choose(vf ratio) const {
        const vi exponent = (vi)ratio >> 23;
        const __m512i place = (__m512i)(exponent > LEAST ? exponent : LEAST - vi{});
        const __m512 bound = _mm512_permutex2var_ps(bounds[0], place, bounds[1]);
        const vi begun = (vi)(ratio >= (vf)bound);
        const __m512i piece = (__m512i)((vi)_mm512_permutex2var_epi32(first[0], place, first[1]) - begun);
        const auto look_up = [&](__m512 table) { return (vf)_mm512_maskz_permutexvar_ps(0xFFFF, piece, table); };
        return {look_up(slopes), look_up(intercepts), look_up(mosts)};
    }

   private:
    static constexpr int LEAST = 102;  // the exponent that stands for all numbers below 2^-24
};
#else
class Pieces {
    vf starts[DECADES], slopes[DECADES], intercepts[DECADES];

   public:
    explicit Pieces(const DynamicMap& map) {
        for (int piece = 0; piece < DECADES; piece++) {
            starts[piece] = fill(map.starts[piece]);
            slopes[piece] = fill(map.slopes[piece]);
            intercepts[piece] = fill(map.intercepts[piece]);
        }
    }

    Line choose(vf ratio) const {
        vf slope = slopes[0], intercept = intercepts[0];
        for (int piece = 1; piece < DECADES; piece++) {
            const vi begun = ratio >= starts[piece];
            slope = begun ? slopes[piece] : slope;
            intercept = begun ? intercepts[piece] : intercept;
        }
        return {slope, intercept, most_of(intercept)};
    }
};
#endif

// The codes of a vector of numbers, or, if they are unsigned and so at least 0, one more than their codes; inverse is 1
// over the block's maximum.
template <bool SIGNED>
vi find_codes(vf value, vf inverse, const Pieces& pieces) {
    const vf ratio = (SIGNED ? (vf)((vu)value & 0x7FFFFFFFu) : value) * inverse;
    const Line line = pieces.choose(ratio);
    const vf exact = ratio * line.slope + line.intercept;
    const vi rank = __builtin_convertvector((exact < line.most ? exact : line.most), vi);
    if (!SIGNED) return rank;
    const vi below = 127 - rank;
    return value < vf{} ? (below > 0 ? below : vi{}) : 127 + rank;  // there is no -1
}

// Codes of a block of numbers, of which each 2 x LANES are their even places, then their odd ones. The maximum was found
// before.
template <bool SIGNED>
void encode(const float* x, float absmax, const Pieces& of_map, uint8_t* codes) {
    if (!(absmax >= TINY && absmax < __builtin_inff())) {
        std::memset(codes, SIGNED ? 127 : 0, BLOCK);
        return;
    }
    const vf inverse = fill(1 / absmax);
    const Pieces pieces = of_map;  // which no store to codes changes, as the compiler sees
    for (int i = 0; i < BLOCK; i += 2 * LANES) {
        const vi even = find_codes<SIGNED>(load<vf>(x + i), inverse, pieces);
        const vi odd = find_codes<SIGNED>(load<vf>(x + i + LANES), inverse, pieces);
        store(codes + i, __builtin_convertvector(even + (odd << 8) - (SIGNED ? 0 : 0x0101), vh));
    }
}

// The numbers of 2 x LANES codes, the even places and the odd ones.
Two<vf> decode(const uint8_t* codes, float absmax, const DynamicMap& map) {
#if defined(__AVX512F__)
    const vu words = __builtin_convertvector(load<vh>(codes), vu);
    const auto look_up = [&map](vu places) {
        return (vf)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, (__m512i)places, map.entries, sizeof(float));
    };
    return {look_up(words & 0xFFu) * absmax, look_up(words >> 8) * absmax};
#else
    float even[LANES], odd[LANES];
    for (int i = 0; i < LANES; i++) {
        even[i] = map.entries[codes[2 * i]];
        odd[i] = map.entries[codes[2 * i + 1]];
    }
    return {load<vf>(even) * absmax, load<vf>(odd) * absmax};
#endif
}

}  // namespace

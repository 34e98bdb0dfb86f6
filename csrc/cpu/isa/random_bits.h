// 16 random bits for each element of a block of 256, as kernels/ops/adamw.py defines them.
#pragma once

#include "../adamw.h"
#include "vectors.h"

namespace {

// Philox4x32-10: for each counter (group, stream) 8 numbers of 16 bits, from the group `first` on.
void draw_bits(uint64_t first, int groups, uint32_t stream, uint32_t step, uint32_t seed, uint16_t* out) {
    constexpr int AT_ONCE = LANES / 2;
    const vq word = 0xFFFFFFFF - vq{};
    vq places{};
    for (int i = 0; i < AT_ONCE; i++) places[i] = first + i;
    for (int done = 0; done < groups; done += AT_ONCE) {
        vq c0 = places + done, c1 = c0 >> 32, c2 = stream - vq{}, c3 = vq{};
        for (uint32_t i = 0; i < 10; i++) {
            const vq a = multiply_low(c0, 0xD2511F53 - vq{}), b = multiply_low(c2, 0xCD9E8D57 - vq{});
            c0 = lower_from_upper(b) ^ c1 ^ static_cast<uint64_t>(seed + i * 0x9E3779B9u);  // only lower halves count
            c1 = b;
            c2 = lower_from_upper(a) ^ c3 ^ static_cast<uint64_t>(step + i * 0xBB67AE85u);
            c3 = a;
        }
        const vq x = (c0 & word) | (c1 << 32), y = (c2 & word) | (c3 << 32);
        for (int i = 0; i < AT_ONCE; i++) {
            std::memcpy(out + 8 * (done + i), reinterpret_cast<const char*>(&x) + 8 * i, 8);
            std::memcpy(out + 8 * (done + i) + 4, reinterpret_cast<const char*>(&y) + 8 * i, 8);
        }
    }
}

struct Random {  // 16 bits for each element of a block, which may begin within a group of eight
    uint16_t bits[BLOCK + 8 * LANES];
    int shift;

    void draw(const AdamW& a, int64_t begin, uint32_t stream) {
        const uint64_t first = static_cast<uint64_t>(a.offset + begin);
        shift = static_cast<int>(first % 8);
        draw_bits(first / 8, BLOCK / 8 + (shift != 0), stream, a.step, a.seed, bits);
    }
    const uint16_t* from(int i) const { return bits + shift + i; }
};

}  // namespace

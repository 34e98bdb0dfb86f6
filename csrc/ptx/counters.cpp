// What accesses cost: sectors of global memory, cycles of shared memory's banks.
#include <algorithm>

#include "machine.h"

void count_global(Launch& l, const Instruction& in, const u64* a, u32 mask, unsigned size, bool write) {
    u64 sorted[32];
    int n = 0;
    bool rising = true;
    for (int lane : Lanes(mask)) {
        rising = rising && (!n || a[lane] > sorted[n - 1]);
        sorted[n++] = a[lane];
    }
    if (!rising) {
        std::sort(sorted, sorted + n);
        n = int(std::unique(sorted, sorted + n) - sorted);
    }
    u64 sectors = 0, next = 0;  // next: the first sector that is not counted yet
    for (int i = 0; i < n; i++) {
        u64 first = std::max(sorted[i] >> 5, next), last = (sorted[i] + size - 1) >> 5;
        if (last >= first) sectors += last - first + 1, next = last + 1;
    }
    (write ? l.stores : l.loads)++;
    (write ? l.store_sectors : l.load_sectors) += sectors;
    (write ? l.store_bytes : l.load_bytes) += u64(n) * size;
    in.sectors += sectors, in.used_bytes += u64(n) * size;
}

// The most words that one of the 32 banks has to give to some lanes, each of which asks for `words` words in a row.
static unsigned longest_queue(const u64* a, u32 mask, unsigned words) {
    u8 n[32] = {};
    u32 seen[32][32];
    unsigned most = 1;
    for (int lane : Lanes(mask))
        for (u32 word = u32(a[lane]) / 4, end = word + words; word < end; word++) {
            u32 bank = word % 32;
            unsigned i = 0;
            while (i < n[bank] && seen[bank][i] != word) i++;
            if (i < n[bank] || i == 32) continue;
            seen[bank][n[bank]++] = word;
            most = std::max<unsigned>(most, n[bank]);
        }
    return most;
}

// The banks serve 32, 16 or 8 lanes at a time for 4, 8 or 16 bytes each.
void count_shared(Launch& l, const Instruction& in, const u64* a, u32 mask, unsigned size) {
    unsigned lanes = size <= 4 ? 32 : size == 8 ? 16 : 8, words = size <= 4 ? 1 : size / 4;
    l.shared_accesses++;
    for (unsigned first = 0; first < 32; first += lanes) {
        u32 part = mask >> first & (lanes == 32 ? FULL : (1u << lanes) - 1);
        if (!part) continue;
        u32 taken = 0, twice = 0;  // groups of banks, as wide as an access
        for (int lane : Lanes(part)) {
            u32 group = 1u << (u32(a[first + unsigned(lane)]) / (4 * words) & (32 / words - 1));
            twice |= taken & group, taken |= group;
        }
        unsigned cycles = twice ? longest_queue(a + first, part, words) : 1;
        l.shared_ideal_cycles++, in.ideal_cycles++;
        l.shared_cycles += cycles, in.cycles += cycles;
    }
}

void count_access(Warp& w, const Instruction& in, const u64* a, u32 mask, unsigned size, bool write) {
    u32 shared = in.space == Space::shared ? mask : 0, global = in.space == Space::global ? mask : 0;
    if (in.space == Space::generic)
        for (int lane : Lanes(mask)) {
            u64 tag = a[lane] & TAG;
            if (tag == SHARED_TAG) shared |= 1u << lane;
            else if (tag != LOCAL_TAG && tag != PARAM_TAG) global |= 1u << lane;
        }
    if (global) count_global(*w.launch, in, a, global, size, write);
    if (shared) count_shared(*w.launch, in, a, shared, size);
}

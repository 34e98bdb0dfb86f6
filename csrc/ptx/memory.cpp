// Memory: the checks of every access.
#include <algorithm>

#include "machine.h"

string hex(u64 x) {
    char s[32];
    snprintf(s, sizeof s, "0x%llx", static_cast<unsigned long long>(x));
    return s;
}

static string bytes_at(unsigned size, u64 a) { return "of " + std::to_string(size) + " bytes at " + hex(a); }

static string name_neighbours(const vector<Range>& ranges, u64 a) {
    auto it = std::upper_bound(ranges.begin(), ranges.end(), a, [](u64 x, const Range& y) { return x < y.low; });
    string near = "no tensor is below";
    if (it != ranges.begin()) {
        auto j = std::max_element(ranges.begin(), it, [](const Range& x, const Range& y) { return x.high < y.high; });
        near = std::to_string(s64(a - j->high)) + " bytes after the end of " + j->name;
    }
    if (it != ranges.end()) near += ", " + std::to_string(it->low - a) + " before " + it->name;
    return near;
}

u8* Warp::global(const Instruction& in, u64 a, unsigned size, int lane, Access access, unsigned alignment) {
    const vector<Range>& ranges = launch->ranges;
    if (a & ((alignment ? alignment : size) - 1)) {
        find("misaligned", in, lane, "global access: " + bytes_at(size, a));
        return nullptr;
    }
    auto holds = [&](const Range& r) { return a >= r.low && a + size <= r.high; };
    if (in.range < ranges.size() && holds(ranges[in.range])) return reinterpret_cast<u8*>(a);
    auto it = std::upper_bound(ranges.begin(), ranges.end(), a, [](u64 x, const Range& y) { return x < y.low; });
    while (it != ranges.begin())  // ranges may overlap: views of one tensor
        if (holds(*--it)) {
            in.range = u32(it - ranges.begin());
            return reinterpret_cast<u8*>(a);
        }
    find("global", in, lane, string(access == Access::load ? "load" : "store") + ": of " + std::to_string(size) +
         " bytes, " + name_neighbours(ranges, a));
    return nullptr;
}

bool Warp::fits_shared(const Instruction& in, u64 a, unsigned size, unsigned alignment, int lane, bool write) {
    if (a + size > block->shared.size() || a + size < a) {
        find("shared", in, lane, string(write ? "store" : "load") + ": " + bytes_at(size, a) + " of " +
             hex(block->shared.size()));
        return false;
    }
    if ((a & (alignment - 1)) == 0) return true;
    find("misaligned", in, lane, "shared access: " + bytes_at(size, a));
    return false;
}

u8* Warp::shared(const Instruction& in, u64 a, unsigned size, int lane, Access access, const u8* made) {
    bool write = access != Access::load;
    if (!fits_shared(in, a, size, size, lane, write)) return nullptr;
    u8* p = block->shared.data() + a;
    if (!launch->check) return p;
    touch(in, u32(a), size, lane, access, made && !std::memcmp(made, p, size));
    return p;
}

u8* Warp::reach(const Instruction& in, u64 a, unsigned size, int lane, Access access, const u8* made) {
    Space space = in.space;
    if (space == Space::generic) {
        u64 tag = a & TAG;
        space = tag == SHARED_TAG  ? Space::shared
                : tag == LOCAL_TAG ? Space::local
                : tag == PARAM_TAG ? Space::param
                                   : Space::global;
        if (space != Space::global) a &= ~TAG;
    }
    if (space == Space::global) return global(in, a, size, lane, access);
    if (space == Space::shared) return shared(in, a, size, lane, access, made);
    u64 limit = space == Space::param ? launch->params.size() : u64(launch->kernel->local_bytes);
    if (a + size > limit || a + size < a) {
        find("global", in, lane, "outside of parameters or local memory: " + hex(a));
        return nullptr;
    }
    return space == Space::param ? launch->params.data() + a : local.data() + u64(lane) * limit + a;
}

void find_addresses(Warp& w, const Address& address, u64* out) {
    for (int i = 0; i < 32; i++) out[i] = u64(address.offset);
    if (address.base < 0) return;
    if (address.width == 8) {
        const u64* r = w.reg<u64>(address.base);
        for (int i = 0; i < 32; i++) out[i] += r[i];
    } else {
        const u32* r = w.reg<u32>(address.base);
        for (int i = 0; i < 32; i++) out[i] = u32(out[i] + r[i]);
    }
}

// A machine that executes PTX on the CPU: functional, not timed, and as strict as a sanitizer.
//
// A grid runs block after block over host memory: pointers are host addresses. The warps of a block take turns, each
// until its next barrier. A register is an array of 32 lanes; an instruction is a loop over them under a mask. Lanes
// that diverge at a branch meet again at its immediate post-dominator.
//
// cp.async and wgmma take effect when they are issued, or (late) when they are waited for: results that differ between
// the two miss a wait. Matrix products are sums of fp32 in the order of k; the units of a chip truncate a little
// differently. Approximate functions (ex2, rsqrt, ...) are rounded correctly.
//
// What is checked, each finding with the line of the PTX and of the source, block, warp and lane:
//   global         an access outside the ranges that are given with a launch
//   shared         an access outside the block's allocation
//   misaligned     an address that is no multiple of the access's size
//   race           shared memory: an access that no barrier orders after another warp's, or that falls between a
//                  cp.async or a wgmma and the wait for it
//   proxy          wgmma reads what was written without a fence.proxy.async since
//   uninitialised  shared memory that is read before the block wrote it; it holds NaN
//   barrier        bar.sync that only a part of the block, or of a warp, reaches
//   converged      .sync or .aligned executed without lanes that it names
//   limit          more instructions in a warp than allowed
//
// An instruction that is not known fails when the kernel is loaded, with its name.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using std::string; using std::vector;

constexpr u32 FULL = 0xffffffffu;
constexpr u64 SHARED_TAG = 0x5aull << 56, LOCAL_TAG = 0x5bull << 56, TAG = 0xffull << 56;  // of generic addresses

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

template <class To, class From> inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y; std::memcpy(&y, &x, sizeof y); return y;
}

// ---- number formats -------------------------------------------------------------------------------------------------

struct bf16 { u16 b; };
struct f16 { u16 b; };

inline float wide(bf16 x) { return bits<float>(u32(x.b) << 16); }
inline float wide(f16 x) {
    u32 sign = u32(x.b & 0x8000) << 16, e = x.b >> 10 & 31, m = x.b & 1023;
    if (e == 31) return bits<float>(sign | 0x7f800000 | m << 13);
    if (e) return bits<float>(sign | (e + 112) << 23 | m << 13);
    float f = float(m) * 5.9604644775390625e-8f;
    return sign ? -f : f;
}
inline float wide(float x) { return x; }

// x to the nearest, ties to even. x may be a double that was rounded to odd.
inline bf16 narrow(float x, bf16) {
    u32 b = bits<u32>(x);
    u32 r = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return {u16((b & 0x7fffffff) > 0x7f800000 ? 0x7fff : r)};
}
inline f16 narrow(float x, f16) {
    u32 b = bits<u32>(x), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
    if (a > 0x7f800000) return {0x7fff};
    if (a >= 0x477ff000) return {u16(sign | 0x7c00)};
    if (a < 0x38800000) return {u16(sign | u32(std::nearbyintf(bits<float>(a) * 16777216.0f)))};
    return {u16(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13))};
}
inline float narrow(float x, float) { return x; }

inline float to_odd(double x, bool inexact) {  // the fp32 that leaves a later rounding to 16 bits correct
    float f = float(x);
    if ((double(f) != x || inexact) && std::isfinite(f)) {
        if (std::fabs(double(f)) > std::fabs(x)) f = std::nextafterf(f, 0.0f);
        f = bits<float>(bits<u32>(f) | 1);
    }
    return f;
}
template <class H> inline H fma16(H a, H b, H c) {
    double p = double(wide(a)) * double(wide(b)), z = wide(c), s = p + z;
    double bb = s - p, e = (p - (s - bb)) + (z - bb);
    if (e != 0 && std::isfinite(s)) {  // s itself to odd
        if ((e < 0) == (s > 0)) s = std::nextafter(s, 0.0);
        s = bits<double>(bits<u64>(s) | 1);
    }
    return narrow(to_odd(s, false), H{});
}

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float to_tf32(float x) { return bits<float>(bits<u32>(x) & 0xffffe000u); }

// ---- a kernel -------------------------------------------------------------------------------------------------------

struct Warp;
struct Ins;
using Run = void (*)(Warp&, const Ins&, u32 mask);

enum Flow : u8 { NEXT, BRANCH, EXIT, BARRIER, ARRIVE, TRAP };
enum Class : u8 { INT, FLOAT, SPECIAL, MOVE, GLOBAL, SHARED, ASYNC, MATRIX, SHUFFLE, SYNC, CONTROL, CLASSES };
const char* const CLASS_NAMES[] = {"int", "float", "special", "move", "global", "shared",
                                   "async", "matrix", "shuffle", "sync", "control"};

struct Ins {
    Run run = nullptr;
    Flow flow = NEXT;
    Class cls = INT;
    bool negated = false, converged = false, sign = false, trans = false, write = false;
    int pred = -1;                       // register of the guard
    int o[16] = {};                      // registers: of results, then of sources
    int n = 1, size = 4, width[4] = {};  // elements of a vector, bytes of each, bytes of each register
    int base[2] = {-1, -1}, base_width[2] = {8, 8};
    s64 offset[2] = {0, 0};
    u8 space = 'g', kind = 0;
    int target = -1, join = -1;
    int line = 0, loc = -1;
    string name, label;
    vector<int> list;  // more registers
    mutable u32 hit = 0;               // the range of memory that it reached last
    mutable u64 sectors = 0, used = 0, cycles = 0, ideal = 0;
};

struct Register { int at; int width; };  // width in bytes, 0 of a predicate
struct Param { int at, size; };
struct Symbol { u8 space; u64 at; };

struct Kernel {
    string name;
    vector<Ins> code;
    vector<Param> params;
    int param_bytes = 0, arena = 0, local_bytes = 0;
    u64 static_shared = 0;
    vector<u8> constants;  // the registers at the start: immediates
    vector<std::tuple<int, int, int, int>> lines;  // file and line of the source, and of what it is inlined in
    vector<string> locs;
    std::map<string, int> special;  // "%tid.x" -> register
    int grain = 16;                 // bytes of shared memory that are looked after together
};

struct Module {
    std::map<string, std::unique_ptr<Kernel>> kernels;
    vector<std::unique_ptr<vector<u8>>> globals;
    std::map<string, Symbol> symbols;
    u64 static_shared = 0;
};

// ---- a launch and its state -----------------------------------------------------------------------------------------

struct Range { u64 lo, hi; const char* name; };

struct Finding {
    string kind, text, name, where;
    int line = 0, warp = 0, lane = 0;
    u32 block[3] = {};
    u64 count = 0;
};

struct Launch {
    const Kernel* kernel;
    u32 grid[3], block[3];
    u64 shared_bytes;
    bool late, reverse, check;
    u64 limit;
    vector<Range> ranges;
    vector<u8> params;
    std::map<std::tuple<string, int, string>, Finding> findings;
    u64 instructions = 0, lanes = 0, by_class[CLASSES] = {}, macs = 0, barriers = 0, blocks = 0;
    u64 loads = 0, load_sectors = 0, load_bytes = 0, stores = 0, store_sectors = 0, store_bytes = 0;
    u64 shared_accesses = 0, shared_ideal = 0, shared_cycles = 0, failed_blocks = 0;
};

struct Cell {  // what happened last to some bytes of shared memory
    u32 write_time = 0, read_time = 0, readers = 0, reading = 0;  // reading: warps whose wgmma may still read
    u32 fence = 0;                                                // the writer's count of proxy fences
    u8 writer = 0, pending = 0;                                   // pending: 1 + warp of a cp.async not waited for
};

struct Copy { u32 to; u64 from; u8 size, given, lane; const Ins* in; };
struct Product { const Ins* in; u64 a, b; bool add; };
struct Entry { int pc, join; u32 mask; };

struct Block {
    Launch& launch;
    u32 at[3] = {};
    vector<u8> shared;
    vector<Cell> cells;
    u32 start_time = 1, now = 1;
    vector<Warp> warps;
    u32 known[32][32] = {};  // known[w][u]: what u did before this time is ordered before what w does now
    u32 time[32] = {}, fences[32] = {}, fence_time[32] = {};
    struct Barrier { u32 arrived = 0; int threads = 0; const Ins* in = nullptr; } barriers[16];
    explicit Block(Launch& launch) : launch(launch) {}
    void start(u32 x, u32 y, u32 z);
    bool run();
    bool release();
};

struct Warp {
    Block* block = nullptr;
    Launch* launch = nullptr;
    int id = 0, pc = 0, join = -1, waiting = -1;
    u32 active = 0, alive = 0, named = 0;
    vector<Entry> stack;
    vector<u8> registers_, local;
    u8* registers = nullptr;
    vector<Copy> copies;
    vector<vector<Copy>> copy_groups;
    vector<Product> products;
    vector<vector<Product>> product_groups;
    u64 executed = 0;

    template <class T> T* reg(int at) { return reinterpret_cast<T*>(registers + at); }
    u32& pred(int at) { return *reinterpret_cast<u32*>(registers + at); }
    u64 lane_value(int at, int width, int lane) {
        return width == 8 ? reg<u64>(at)[lane] : width == 4 ? reg<u32>(at)[lane] : reg<u16>(at)[lane];
    }
    void set_lane(int at, int width, int lane, u64 x) {
        if (width == 8) reg<u64>(at)[lane] = x;
        else if (width == 4) reg<u32>(at)[lane] = u32(x);
        else reg<u16>(at)[lane] = u16(x);
    }

    void find(const char* kind, const Ins& in, int lane, const string& text);
    u8* global(const Ins& in, u64 address, unsigned size, int lane, bool write);
    u8* shared_at(const Ins& in, u64 address, unsigned size, int lane, bool write, bool atomic = false,
                  const u8* made = nullptr);
    u8* at(const Ins& in, u64 address, unsigned size, int lane, bool write, bool atomic = false,
           const u8* made = nullptr);
    void saw(Cell& c, const Ins& in, u32 address, int lane, bool write, bool same);
    void doubt(const Cell& c, const Ins& in, u32 address, int lane, bool write, bool same);
    void issue(const Copy& copy);
    void land(const Copy& copy);
    void finish_copies(size_t left);
    void finish_products(size_t left);
    bool run();
    void pop();
};

static string hex(u64 x) { char s[32]; snprintf(s, sizeof s, "0x%llx", (unsigned long long)x); return s; }

void Warp::find(const char* kind, const Ins& in, int lane, const string& text) {
    const Kernel& k = *launch->kernel;
    string group = text.substr(0, text.find(':'));
    Finding& f = launch->findings[{kind, in.line, group}];
    if (f.count++) return;
    f.kind = kind, f.text = text, f.name = in.name, f.line = in.line, f.warp = id, f.lane = lane;
    f.where = in.loc < 0 ? "" : k.locs[in.loc];
    std::copy(block->at, block->at + 3, f.block);
}

// ---- memory and its checks ------------------------------------------------------------------------------------------

u8* Warp::global(const Ins& in, u64 a, unsigned size, int lane, bool write) {
    const vector<Range>& r = launch->ranges;
    if (a % size) {
        find("misaligned", in, lane, "global access: of " + std::to_string(size) + " bytes at " + hex(a));
        return nullptr;
    }
    if (in.hit < r.size() && a >= r[in.hit].lo && a + size <= r[in.hit].hi) return reinterpret_cast<u8*>(a);
    auto it = std::upper_bound(r.begin(), r.end(), a, [](u64 x, const Range& y) { return x < y.lo; });
    for (auto j = it; j != r.begin();) {  // ranges may overlap: views of one tensor
        --j;
        if (a + size <= j->hi) { in.hit = u32(j - r.begin()); return reinterpret_cast<u8*>(a); }
        if (it - j > 64) break;
    }
    string near = "no tensor is below";
    if (it != r.begin()) {
        auto j = std::max_element(r.begin(), it, [](const Range& x, const Range& y) { return x.hi < y.hi; });
        near = std::to_string(s64(a - j->hi)) + " bytes after the end of " + j->name;
    }
    if (it != r.end()) near += ", " + std::to_string(it->lo - a) + " before " + it->name;
    find("global", in, lane, string(write ? "store" : "load") + ": of " + std::to_string(size) + " bytes, " + near);
    return nullptr;
}

// Called for each cell of an access: whether the barriers of this warp order it after what others did. same: the bytes
// that are written are there already. Warps that hold copies of a value may all store it.
inline void Warp::saw(Cell& c, const Ins& in, u32 address, int lane, bool write, bool same) {
    Block& b = *block;
    u32 now = b.time[id], me = 1u << id;
    bool written = c.write_time >= b.start_time, mine = c.writer == id || c.write_time < b.known[id][c.writer];
    u32 others = write && c.read_time >= b.start_time ? (c.readers & ~me) | c.reading : 0;
    if (__builtin_expect(c.pending || !(written || write) || (written && !mine) || others, 0))
        doubt(c, in, address, lane, write, same);
    if (write) c.write_time = now, c.writer = u8(id), c.readers = 0, c.pending = 0, c.fence = b.fences[id];
    else if (c.read_time != now) c.read_time = now, c.readers = me;
    else c.readers |= me;
}

void Warp::doubt(const Cell& c, const Ins& in, u32 address, int lane, bool write, bool same) {
    Block& b = *block;
    bool written = c.write_time >= b.start_time;
    auto say = [&](const string& what) { find("race", in, lane, what + ": shared address " + hex(address)); };
    auto warp = [](int w) { return "warp " + std::to_string(w); };
    if (c.pending)
        say(string(write ? "overwrites" : "reads") + " what a cp.async of " + warp(c.pending - 1) + " still writes");
    else if (written && !same && c.writer != id && c.write_time >= b.known[id][c.writer])
        say(string(write ? "overwrites" : "reads") + " what " + warp(c.writer) + " wrote, without a barrier");
    if (!write && !written) find("uninitialised", in, lane, "read: shared address " + hex(address));
    if (!write || same) return;
    if (c.reading) say("overwrites what a wgmma still reads");
    u32 others = c.read_time >= b.start_time ? c.readers & ~(1u << id) : 0;
    for (; others; others &= others - 1) {
        int r = __builtin_ctz(others);
        if (c.read_time < b.known[id][r]) continue;
        say("overwrites what " + warp(r) + " read, without a barrier");
        break;
    }
}

// made: the bytes that will be written, where they are known.
u8* Warp::shared_at(const Ins& in, u64 a, unsigned size, int lane, bool write, bool atomic, const u8* made) {
    if (a + size > block->shared.size() || a + size < a) {
        find("shared", in, lane, string(write ? "store" : "load") + ": of " + std::to_string(size) + " bytes at " +
             hex(a) + " of " + hex(block->shared.size()));
        return nullptr;
    }
    if (a % size) {
        find("misaligned", in, lane, "shared access: of " + std::to_string(size) + " bytes at " + hex(a));
        return nullptr;
    }
    if (launch->check && !atomic) {
        unsigned g = launch->kernel->grain;
        bool same = made && !std::memcmp(made, block->shared.data() + a, size);
        for (u64 i = a / g; i <= (a + size - 1) / g; i++) saw(block->cells[i], in, u32(a), lane, write, same);
    } else if (launch->check) {
        unsigned g = launch->kernel->grain;
        for (u64 i = a / g; i <= (a + size - 1) / g; i++)
            if (block->cells[i].write_time < block->start_time) block->cells[i].write_time = block->start_time;
    }
    return block->shared.data() + a;
}

u8* Warp::at(const Ins& in, u64 a, unsigned size, int lane, bool write, bool atomic, const u8* made) {
    u8 space = in.space;
    if (space == 'a') {  // generic
        space = (a & TAG) == SHARED_TAG ? 's' : (a & TAG) == LOCAL_TAG ? 'l' : 'g';
        if (space != 'g') a &= ~TAG;
    }
    if (space == 'g') return global(in, a, size, lane, write);
    if (space == 's') return shared_at(in, a, size, lane, write, atomic, made);
    u64 limit = space == 'p' ? launch->params.size() : u64(launch->kernel->local_bytes);
    if (a + size > limit) { find("global", in, lane, "outside parameters or local memory: " + hex(a)); return nullptr; }
    return space == 'p' ? launch->params.data() + a : local.data() + u64(lane) * limit + a;
}

static void count_global(Launch& l, const Ins& in, const u64* a, u32 m, unsigned size, bool write) {
    u64 sorted[32];
    int n = 0;
    bool rising = true;
    for (u32 r = m; r; r &= r - 1) {
        u64 x = a[__builtin_ctz(r)];
        rising = rising && (!n || x > sorted[n - 1]);
        sorted[n++] = x;
    }
    if (!rising) { std::sort(sorted, sorted + n); n = int(std::unique(sorted, sorted + n) - sorted); }
    u64 sectors = 0, next = 0;
    for (int i = 0; i < n; i++) {
        u64 first = std::max(sorted[i] >> 5, next), last = (sorted[i] + size - 1) >> 5;
        if (last >= first) sectors += last - first + 1, next = last + 1;
    }
    (write ? l.stores : l.loads)++;
    (write ? l.store_sectors : l.load_sectors) += sectors;
    (write ? l.store_bytes : l.load_bytes) += u64(n) * size;
    in.sectors += sectors, in.used += u64(n) * size;
}

// Cycles of the 32 banks: 32, 16 or 8 lanes at a time for 4, 8 or 16 bytes each.
static void count_shared(Launch& l, const Ins& in, const u32* a, u32 m, unsigned size) {
    unsigned lanes = size <= 4 ? 32 : size == 8 ? 16 : 8, words = size <= 4 ? 1 : size / 4;
    l.shared_accesses++;
    for (unsigned first = 0; first < 32; first += lanes) {
        u32 part = m >> first & (lanes == 32 ? FULL : (1u << lanes) - 1);
        if (!part) continue;
        l.shared_ideal++, in.ideal++;
        u32 taken = 0, twice = 0;  // groups of banks, as wide as an access
        for (u32 r = part; r; r &= r - 1) {
            u32 g = 1u << (a[first + __builtin_ctz(r)] / (4 * words) & (32 / words - 1));
            twice |= taken & g, taken |= g;
        }
        if (!twice) { l.shared_cycles++, in.cycles++; continue; }
        u8 n[32] = {};
        u32 seen[32][32];
        unsigned most = 1;
        for (u32 r = part; r; r &= r - 1) {
            u32 word = a[first + __builtin_ctz(r)] / 4;
            for (unsigned j = 0; j < words; j++, word++) {
                u32 bank = word % 32;
                unsigned i = 0;
                while (i < n[bank] && seen[bank][i] != word) i++;
                if (i == n[bank]) {
                    if (i < 32) seen[bank][n[bank]++] = word;
                    most = std::max<unsigned>(most, n[bank]);
                }
            }
        }
        l.shared_cycles += most, in.cycles += most;
    }
}

static void addresses(Warp& w, const Ins& in, int which, u64* out) {
    int base = in.base[which];
    for (int i = 0; i < 32; i++) out[i] = u64(in.offset[which]);
    if (base < 0) return;
    if (in.base_width[which] == 8) { const u64* r = w.reg<u64>(base); for (int i = 0; i < 32; i++) out[i] += r[i]; }
    else { const u32* r = w.reg<u32>(base); for (int i = 0; i < 32; i++) out[i] = u32(out[i] + r[i]); }
}

static void count(Warp& w, const Ins& in, const u64* a, u32 m, unsigned size, bool write) {
    u32 shared = in.space == 's' ? m : 0, global = in.space == 'g' ? m : 0, narrow[32];
    for (u32 r = in.space == 'a' ? m : 0; r; r &= r - 1) {
        u64 tag = a[__builtin_ctz(r)] & TAG;
        (tag == SHARED_TAG ? shared : global) |= tag == LOCAL_TAG ? 0 : r & -r;
    }
    if (global) count_global(*w.launch, in, a, global, size, write);
    if (!shared) return;
    for (int i = 0; i < 32; i++) narrow[i] = u32(a[i]);
    count_shared(*w.launch, in, narrow, shared, size);
}

static void load(Warp& w, const Ins& in, u32 m) {
    u64 a[32], value;
    addresses(w, in, 0, a);
    unsigned all = unsigned(in.n * in.size);
    if (in.space != 'p') count(w, in, a, m, all, false);
    for (u32 r = m; r; r &= r - 1) {
        int lane = __builtin_ctz(r);
        const u8* from = w.at(in, a[lane], all, lane, false);
        for (int j = 0; j < in.n; j++) {
            if (in.o[j] < 0) continue;
            value = 0;
            if (from) std::memcpy(&value, from + j * in.size, size_t(in.size));
            if (in.sign && in.size < 8) value = u64(s64(value << (64 - 8 * in.size)) >> (64 - 8 * in.size));
            w.set_lane(in.o[j], in.width[j], lane, value);
        }
    }
}

static void store(Warp& w, const Ins& in, u32 m) {
    u64 a[32];
    addresses(w, in, 0, a);
    unsigned all = unsigned(in.n * in.size);
    count(w, in, a, m, all, true);
    for (u32 r = m; r; r &= r - 1) {
        int lane = __builtin_ctz(r);
        u8 made[32];
        for (int j = 0; j < in.n; j++) {
            u64 value = w.lane_value(in.o[j], in.width[j], lane);
            std::memcpy(made + j * in.size, &value, 8);
        }
        if (u8* to = w.at(in, a[lane], all, lane, true, false, made)) std::memcpy(to, made, all);
    }
}

template <class T> T atomically(u8 op, T old, T x, T y) {
    switch (op) {
        case '+': return T(old + x);
        case '<': return std::min(old, x);
        case '>': return std::max(old, x);
        case '=': return x;
        default: return old == x ? y : old;  // compare and swap
    }
}
template <class T> static void atomic(Warp& w, const Ins& in, u32 m) {
    u64 a[32];
    addresses(w, in, 0, a);
    count(w, in, a, m, sizeof(T), true);
    for (u32 r = m; r; r &= r - 1) {
        int lane = __builtin_ctz(r);
        u8* p = w.at(in, a[lane], sizeof(T), lane, true, true);
        if (!p) continue;
        T old, x = w.reg<T>(in.o[1])[lane], y = in.n > 1 ? w.reg<T>(in.o[2])[lane] : T();
        std::memcpy(&old, p, sizeof old);
        T made = atomically(in.kind, old, x, y);
        std::memcpy(p, &made, sizeof made);
        if (in.o[0] >= 0) w.reg<T>(in.o[0])[lane] = old;
    }
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

void Warp::land(const Copy& c) {
    u8* to = block->shared.data() + c.to;
    if (c.given) std::memcpy(to, reinterpret_cast<const u8*>(c.from), c.given);
    std::memset(to + c.given, 0, size_t(c.size - c.given));
}

void Warp::issue(const Copy& c) {
    if (c.given && !global(*c.in, c.from, c.given, c.lane, false)) return;
    if (!shared_at(*c.in, c.to, c.size, c.lane, true)) return;
    if (launch->check)
        for (unsigned g = launch->kernel->grain, i = c.to / g; i <= (c.to + c.size - 1) / g; i++)
            block->cells[i].pending = u8(id + 1);
    if (!launch->late) land(c);
    copies.push_back(c);
}

void Warp::finish_copies(size_t left) {
    while (copy_groups.size() > left) {
        for (const Copy& c : copy_groups.front()) {
            if (launch->late) land(c);
            if (!launch->check) continue;
            for (unsigned g = launch->kernel->grain, i = c.to / g; i <= (c.to + c.size - 1) / g; i++) {
                Cell& cell = block->cells[i];
                if (cell.pending != id + 1) continue;
                cell.pending = 0, cell.write_time = block->time[id], cell.fence = block->fences[id];
            }
        }
        copy_groups.erase(copy_groups.begin());
    }
}

static void copy_async(Warp& w, const Ins& in, u32 m) {
    u64 to[32], from[32];
    u32 narrow[32], reads = 0;
    addresses(w, in, 0, to);
    addresses(w, in, 1, from);
    for (u32 r = m; r; r &= r - 1) {
        int lane = __builtin_ctz(r);
        u32 given = in.o[0] < 0 ? u32(in.size) : std::min(w.reg<u32>(in.o[0])[lane], u32(in.size));
        reads |= given ? 1u << lane : 0;
        w.issue({u32(to[lane]), from[lane], u8(in.size), u8(given), u8(lane), &in});
    }
    for (int i = 0; i < 32; i++) narrow[i] = u32(to[i]);
    if (reads) count_global(*w.launch, in, from, reads, unsigned(in.size), false);
    count_shared(*w.launch, in, narrow, m, unsigned(in.size));
}
static void commit_copies(Warp& w, const Ins&, u32) { w.copy_groups.push_back(std::move(w.copies)); w.copies.clear(); }
static void wait_copies(Warp& w, const Ins& in, u32 m) {
    if (in.offset[0] < 0) commit_copies(w, in, m);  // wait_all
    w.finish_copies(in.offset[0] < 0 ? 0 : size_t(in.offset[0]));
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// c (16, N) += a (16, K) b (K, N)
template <int N> static inline void product(float* c, const float* a, const float* b, int k) {
    for (int i = 0; i < 16; i++) {
        float row[N];
        for (int j = 0; j < N; j++) row[j] = c[i * N + j];
        for (int l = 0; l < k; l++) {
            float x = a[i * k + l];
            for (int j = 0; j < N; j++) row[j] = std::fma(x, b[l * N + j], row[j]);
        }
        for (int j = 0; j < N; j++) c[i * N + j] = row[j];
    }
}

// The four registers of a left operand as (16, K): K is 16 of 16 bits, 8 of tf32. Halves of 8 rows, then of K.
template <class H> static void left_operand(Warp& w, const int* r, float* a, int registers) {
    for (int q = 0; q < registers; q++) {
        const u32* x = w.reg<u32>(r[q]);
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4 + q % 2 * 8, t = lane % 4;
            if constexpr (sizeof(H) == 4)
                a[row * (registers * 2) + t + q / 2 * 4] = to_tf32(bits<float>(x[lane]));
            else {
                float* to = a + row * (registers * 4) + 2 * t + q / 2 * 8;
                to[0] = wide(H{u16(x[lane])}), to[1] = wide(H{u16(x[lane] >> 16)});
            }
        }
    }
}

template <class H, int A> static void mma(Warp& w, const Ins& in, u32) {  // d, a, b, c
    constexpr int K = sizeof(H) == 4 ? A * 2 : A * 4;
    float a[16 * K], b[K * 8], c[16 * 8];
    const int *ra = in.o + 4, *rb = ra + A, *rc = rb + A / 2;
    left_operand<H>(w, ra, a, A);
    for (int q = 0; q < A / 2; q++) {
        const u32* x = w.reg<u32>(rb[q]);
        for (int lane = 0; lane < 32; lane++) {
            int n = lane / 4, t = lane % 4;
            if constexpr (sizeof(H) == 4) b[(t + q * 4) * 8 + n] = to_tf32(bits<float>(x[lane]));
            else
                b[(2 * t + q * 8) * 8 + n] = wide(H{u16(x[lane])}),
                                        b[(2 * t + q * 8 + 1) * 8 + n] = wide(H{u16(x[lane] >> 16)});
        }
    }
    for (int q = 0; q < 4; q++) {
        const float* x = w.reg<float>(rc[q]);
        for (int lane = 0; lane < 32; lane++) c[(lane / 4 + q / 2 * 8) * 8 + lane % 4 * 2 + q % 2] = x[lane];
    }
    product<8>(c, a, b, K);
    for (int q = 0; q < 4; q++) {
        float* x = w.reg<float>(in.o[q]);
        for (int lane = 0; lane < 32; lane++) x[lane] = c[(lane / 4 + q / 2 * 8) * 8 + lane % 4 * 2 + q % 2];
    }
    w.launch->macs += 16 * 8 * K;
}

static void matrix_rows(Warp& w, const Ins& in, u32 m) {  // ldmatrix and stmatrix
    u64 a[32];
    u32 narrow[32];
    addresses(w, in, 0, a);
    for (int i = 0; i < 32; i++) narrow[i] = u32(a[i]);
    count_shared(*w.launch, in, narrow, in.n == 4 ? FULL : (1u << 8 * in.n) - 1, 16);
    (void)m;
    for (int j = 0; j < in.n; j++) {
        u16 tile[8][8] = {};
        u32* r = w.reg<u32>(in.o[j]);
        if (in.write)
            for (int lane = 0; lane < 32; lane++)
                for (int h = 0; h < 2; h++) {
                    int row = lane / 4, col = lane % 4 * 2 + h;
                    (in.trans ? tile[col][row] : tile[row][col]) = u16(r[lane] >> 16 * h);
                }
        for (int row = 0; row < 8; row++) {
            const u8* made = in.write ? reinterpret_cast<const u8*>(tile[row]) : nullptr;
            u8* p = w.shared_at(in, narrow[8 * j + row], 16, 8 * j + row, in.write, false, made);
            if (in.write) { if (p) std::memcpy(p, tile[row], 16); }
            else if (p) std::memcpy(tile[row], p, 16);
            else std::memset(tile[row], 0xff, 16);
        }
        if (in.write) continue;
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, col = lane % 4 * 2;
            r[lane] = in.trans ? tile[col][row] | u32(tile[col + 1][row]) << 16
                               : tile[row][col] | u32(tile[row][col + 1]) << 16;
        }
    }
}

// A matrix in shared memory as a wgmma descriptor tells: in chunks of 16 bytes, which a swizzle moves about.
struct Described {
    u32 start, leading, stride, row;  // in chunks, but for start
    u32 mask;
    explicit Described(u64 d) {
        start = u32(d & 0x3fff) << 4, leading = u32(d >> 16 & 0x3fff), stride = u32(d >> 32 & 0x3fff);
        static const u32 ROWS[] = {1, 8, 4, 2};
        row = ROWS[d >> 62], mask = row - 1;
    }
    u32 place(u32 chunk) const { u32 a = start + chunk * 16; return a ^ (a >> 7 & mask) << 4; }
    // Chunk c of the two along k in a row, k contiguous; or chunk c along the rows of column k, rows contiguous.
    u32 along_k(u32 r, u32 c) const { return place(r % 8 * row + r / 8 * stride + (mask ? c : c * leading)); }
    u32 along_rows(u32 c, u32 k) const {
        return mask ? place(c % row + c / row * leading + k % 8 * row + k / 8 * stride)
                    : place(c * stride + k % 8 + k / 8 * leading);
    }
};

static const u8* described_chunk(Warp& w, const Ins& in, u32 a) {
    Block& b = *w.block;
    u8* p = w.shared_at(in, a, 16, 0, false);
    if (!p || !w.launch->check) return p;
    for (unsigned g = w.launch->kernel->grain, i = a / g; i <= (a + 15) / g; i++) {
        Cell& c = b.cells[i];
        c.reading |= 1u << w.id;
        bool by_writer = b.fences[c.writer] > c.fence, by_reader = b.fence_time[w.id] > c.write_time;
        if (c.write_time >= b.start_time && !by_writer && !by_reader)
            w.find("proxy", in, 0,
                   "reads: what warp " + std::to_string(c.writer) + " wrote, without fence.proxy.async");
    }
    return p;
}

// (rows from first on, K) or its transpose (K, rows), in fp32.
template <class H>
static void described(Warp& w, const Ins& in, u64 d, int first, int rows, bool trans, bool by_k, float* out) {
    constexpr int E = 16 / sizeof(H), K = 2 * E;
    Described m(d);
    H chunk[E];
    auto take = [&](u32 a) {
        const u8* p = described_chunk(w, in, a);
        if (p) std::memcpy(chunk, p, 16); else std::memset(chunk, 0xff, 16);
    };
    auto put = [&](int r, int k, H x) {
        float f = wide(x);
        if (sizeof(H) == 4) f = to_tf32(f);
        out[by_k ? k * rows + r : r * K + k] = f;
    };
    if (!trans)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 2; c++) {
                take(m.along_k(u32(first + r), u32(c)));
                for (int e = 0; e < E; e++) put(r, c * E + e, chunk[e]);
            }
    else
        for (int c = 0; c < rows / E; c++)
            for (int k = 0; k < K; k++) {
                take(m.along_rows(u32(first / E + c), u32(k)));
                for (int e = 0; e < E; e++) put(c * E + e, k, chunk[e]);
            }
}

// n: columns. list: d, then four of a if it is in registers. o: 0, 1 the descriptors, 2 the predicate. kind: bit 0 a is
// in registers, 1 and 2 a and b transposed, 3 and 4 a and b negated.
template <class H> static void wgmma_now(Warp& w, const Product& p) {
    constexpr int K = 32 / sizeof(H);
    const Ins& in = *p.in;
    int n = in.n, row0 = w.id % 4 * 16;
    static thread_local float a[16 * 16], b[16 * 256], c[16 * 256];
    if (in.kind & 1) left_operand<H>(w, in.list.data() + n / 2, a, 4);
    else described<H>(w, in, p.a, row0, 16, in.kind & 2, false, a);
    described<H>(w, in, p.b, 0, n, in.kind & 4, true, b);
    if (in.kind & 8) for (float& x : a) x = -x;
    if (in.kind & 16) for (float& x : b) x = -x;
    for (int i = 0; i < n / 2; i++) {
        const float* x = w.reg<float>(in.list[size_t(i)]);
        for (int lane = 0; lane < 32; lane++)
            c[(lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2] = p.add ? x[lane] : 0.0f;
    }
    for (int i = 0; i < 16; i++)
        for (int l = 0; l < K; l++) {
            float x = a[i * K + l];
            for (int j = 0; j < n; j++) c[i * n + j] = std::fma(x, b[l * n + j], c[i * n + j]);
        }
    for (int i = 0; i < n / 2; i++) {
        float* x = w.reg<float>(in.list[size_t(i)]);
        for (int lane = 0; lane < 32; lane++)
            x[lane] = c[(lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2];
    }
    w.launch->macs += u64(16 * n * K);
}
static void wgmma_run(Warp& w, const Product& p) {
    switch (p.in->space) {
        case 'b': return wgmma_now<bf16>(w, p);
        case 'h': return wgmma_now<f16>(w, p);
        default: return wgmma_now<float>(w, p);
    }
}
static void wgmma(Warp& w, const Ins& in, u32) {
    Product p{&in, in.kind & 1 ? 0 : w.reg<u64>(in.o[0])[0], w.reg<u64>(in.o[1])[0],
              in.o[2] < 0 ? in.offset[0] != 0 : (w.pred(in.o[2]) & 1) != 0};
    if (!w.launch->late) wgmma_run(w, p);
    w.products.push_back(p);
}
static void wgmma_commit(Warp& w, const Ins&, u32) {
    w.product_groups.push_back(std::move(w.products));
    w.products.clear();
}
void Warp::finish_products(size_t left) {
    bool some = product_groups.size() > left;
    while (product_groups.size() > left) {
        if (launch->late) for (const Product& p : product_groups.front()) wgmma_run(*this, p);
        product_groups.erase(product_groups.begin());
    }
    if (some && launch->check && product_groups.empty())
        for (Cell& c : block->cells) c.reading &= ~(1u << id);
}
static void wgmma_wait(Warp& w, const Ins& in, u32) { w.finish_products(size_t(in.offset[0])); }
static void proxy_fence(Warp& w, const Ins&, u32) {
    w.block->fences[w.id]++;
    w.block->fence_time[w.id] = w.block->time[w.id];
}
static void nothing(Warp&, const Ins&, u32) {}

// ---- lane by lane ---------------------------------------------------------------------------------------------------

template <class F, class D, class... S, size_t... I>
static inline void each_(Warp& w, const Ins& in, u32 m, std::index_sequence<I...>) {
    D* d = w.reg<D>(in.o[0]);
    std::tuple<const S*...> s(w.reg<S>(in.o[1 + I])...);
    if (m == FULL) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) d[i] = F::f(std::get<I>(s)[i]...);
    } else {
        for (int i = 0; i < 32; i++) if (m >> i & 1) d[i] = F::f(std::get<I>(s)[i]...);
    }
}
template <class F, class D, class... S> static void each(Warp& w, const Ins& in, u32 m) {
    each_<F, D, S...>(w, in, m, std::index_sequence_for<S...>{});
}

template <class F> struct Ftz { template <class... A> static float f(A... a) { return flush(F::f(flush(a)...)); } };
template <class F> struct Packed {  // two of 16 bits in 32
    template <class... A> static u32 f(A... a) { return F::f(u16(a)...) | u32(F::f(u16(a >> 16)...)) << 16; }
};
template <class H, class F> struct Sixteen {  // an operation of fp32 that is exact before it is rounded, on 16 bits
    template <class... A> static u16 f(A... a) { return narrow(F::f(wide(H{a})...), H{}).b; }
};
template <class H> struct Fma16 { static u16 f(u16 a, u16 b, u16 c) { return fma16(H{a}, H{b}, H{c}).b; } };

#define FN(NAME, ...) template <class T> struct NAME { static inline T f __VA_ARGS__ };
FN(Add, (T a, T b) { return T(a + b); })
FN(Sub, (T a, T b) { return T(a - b); })
FN(Mul, (T a, T b) { return T(a * b); })
FN(And, (T a, T b) { return T(a & b); })
FN(Or, (T a, T b) { return T(a | b); })
FN(Xor, (T a, T b) { return T(a ^ b); })
FN(Not, (T a) { return T(~a); })
FN(Neg, (T a) { return T(T(0) - a); })
FN(FNeg, (T a) { return -a; })
FN(Abs, (T a) { return a < 0 ? T(-a) : a; })
FN(FAbs, (T a) { return std::fabs(a); })
FN(Min, (T a, T b) { return b < a ? b : a; })
FN(Max, (T a, T b) { return a < b ? b : a; })
FN(FMin, (T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; })
FN(FMax, (T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; })
FN(NMin, (T a, T b) { return a != a || b != b ? T(NAN) : FMin<T>::f(a, b); })
FN(NMax, (T a, T b) { return a != a || b != b ? T(NAN) : FMax<T>::f(a, b); })
FN(Mov, (T a) { return a; })
FN(Fma, (T a, T b, T c) { return std::fma(a, b, c); })
FN(Mad, (T a, T b, T c) { return T(a * b + c); })
FN(IDiv, (T a, T b) { return b ? T(a / b) : T(~T(0)); })
FN(Rem, (T a, T b) { return b ? T(a % b) : a; })
FN(FDiv, (T a, T b) { return a / b; })
FN(Sqrt, (T a) { return std::sqrt(a); })
FN(Rsqrt, (T a) { return T(1 / std::sqrt(double(a))); })
FN(Rcp, (T a) { return T(1) / a; })
FN(Ex2, (T a) { return std::exp2(a); })
FN(Lg2, (T a) { return std::log2(a); })
FN(Sin, (T a) { return std::sin(a); })
FN(Cos, (T a) { return std::cos(a); })
FN(Tanh, (T a) { return std::tanh(a); })
FN(Round, (T a) { return std::nearbyint(a); })
FN(Floor, (T a) { return std::floor(a); })
FN(Ceil, (T a) { return std::ceil(a); })
FN(Trunc, (T a) { return std::trunc(a); })
FN(Sat, (T a) { return a > 0 ? (a < 1 ? a : T(1)) : T(0); })
template <class T> struct Shl { static T f(T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : T(a << n); } };
template <class T> struct Shr {
    static T f(T a, u32 n) {
        constexpr u32 B = sizeof(T) * 8;
        return n < B ? T(a >> n) : std::is_signed<T>::value ? T(a >> (B - 1)) : T(0);
    }
};
template <class W, class T> struct MulWide { static W f(T a, T b) { return W(a) * W(b); } };
template <class W, class T> struct MadWide { static W f(T a, T b, W c) { return W(W(a) * W(b) + c); } };
template <class W, class T> struct MulHi { static T f(T a, T b) { return T((W(a) * W(b)) >> (sizeof(T) * 8)); } };
template <class W, class T> struct MadHi {
    static T f(T a, T b, T c) { return T(((W(a) * W(b)) >> (sizeof(T) * 8)) + W(c)); }
};
template <class D, class S> struct Cast { static D f(S a) { return D(a); } };
template <class D, class S, template <class> class R> struct ToInt {
    static D f(S a) {
        if (a != a) return sizeof(D) == 8 ? D(u64(1) << 63) : D(0);
        S x = R<S>::f(a);
        if (x <= S(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
        if (x >= S(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
        return D(x);
    }
};
template <class H> struct Widen { static float f(u16 a) { return wide(H{a}); } };
template <class H> struct Narrow { static u16 f(float a) { return narrow(a, H{}).b; } };
template <class H> struct Narrow2 {
    static u32 f(float hi, float lo) { return narrow(lo, H{}).b | u32(narrow(hi, H{}).b) << 16; }
};
struct Tf32 {
    static u32 f(float a) {
        u32 b = bits<u32>(a);
        return std::isfinite(a) ? (b + 0x1000) & 0xffffe000u : b;
    }
};
template <class T, class S> struct Bfe {
    static T f(T a, u32 pos, u32 len) {
        constexpr u32 B = sizeof(T) * 8;
        pos &= 255, len &= 255;
        if (!len) return 0;
        u32 last = std::min(pos + len - 1, B - 1);
        S sign = std::is_signed<T>::value ? S(S(a) >> last & 1) : S(0), x = pos < B ? S(S(a) >> pos) : S(0);
        u32 kept = pos < B ? std::min(len, B - pos) : 0;
        S mask = kept >= B ? S(~S(0)) : S((S(1) << kept) - 1);
        return T((x & mask) | (sign ? S(~mask) : S(0)));
    }
};
struct Bfi { static u32 f(u32 a, u32 b, u32 pos, u32 len) {
    pos &= 255, len &= 255;
    u32 mask = len >= 32 ? FULL : (1u << len) - 1;
    return pos > 31 ? b : (b & ~(mask << pos)) | (a & mask) << pos;
} };
struct Prmt { static u32 f(u32 a, u32 b, u32 s) {
    u64 both = u64(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        u32 x = u32(both >> 8 * (s >> 4 * i & 7)) & 255;
        r |= (s >> 4 * i & 8 ? (x & 128 ? 255u : 0u) : x) << 8 * i;
    }
    return r;
} };
struct Lop3 { static u32 f(u32 a, u32 b, u32 c, u32 t) {
    u32 r = 0;
    for (u32 i = 0; i < 8; i++) if (t >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
} };
struct ShfL { static u32 f(u32 a, u32 b, u32 n) { n &= 31; return u32((u64(b) << 32 | a) << n >> 32); } };
struct ShfR { static u32 f(u32 a, u32 b, u32 n) { n &= 31; return u32((u64(b) << 32 | a) >> n); } };
struct Popc { static u32 f(u32 a) { return u32(__builtin_popcount(a)); } };
struct Clz { static u32 f(u32 a) { return a ? u32(__builtin_clz(a)) : 32; } };
struct Brev {
    static u32 f(u32 a) {
        u32 r = 0;
        for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
        return r;
    }
};
struct CopySign { static float f(float a, float b) { return std::copysign(b, a); } };
struct Pack32 { static u32 f(u16 a, u16 b) { return a | u32(b) << 16; } };
struct Pack64 { static u64 f(u32 a, u32 b) { return a | u64(b) << 32; } };
struct High16 { static u16 f(u32 a) { return u16(a >> 16); } };
struct High32 { static u32 f(u64 a) { return u32(a >> 32); } };

template <class T> static void select_(Warp& w, const Ins& in, u32 m) {
    T *d = w.reg<T>(in.o[0]), *a = w.reg<T>(in.o[1]), *b = w.reg<T>(in.o[2]);
    u32 p = w.pred(in.o[3]);
    if (m == FULL) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) d[i] = p >> i & 1 ? a[i] : b[i];
    } else
        for (int i = 0; i < 32; i++) if (m >> i & 1) d[i] = p >> i & 1 ? a[i] : b[i];
}

#define CMP(NAME, ...) template <class T> struct NAME { static inline bool f(T a, T b) { return __VA_ARGS__; } };
CMP(Eq, a == b) CMP(Ne, a < b || a > b) CMP(Lt, a < b) CMP(Le, a <= b) CMP(Gt, a > b) CMP(Ge, a >= b)
CMP(Equ, !(a < b || a > b)) CMP(Neu, !(a == b)) CMP(Ltu, !(a >= b)) CMP(Leu, !(a > b)) CMP(Gtu, !(a <= b))
CMP(Geu, !(a < b))
CMP(Num, a == a && b == b) CMP(Nan, a != a || b != b)

// o: result, its complement or -1, a, b, another predicate or -1. kind: how that one joins.
template <class F, class T> static void compare(Warp& w, const Ins& in, u32 m) {
    const T *a = w.reg<T>(in.o[2]), *b = w.reg<T>(in.o[3]);
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= u32(F::f(a[i], b[i])) << i;
    u32 q = ~r;
    if (in.o[4] >= 0) {
        u32 c = w.pred(in.o[4]);
        if (in.sign) c = ~c;
        r = in.kind == '&' ? r & c : in.kind == '|' ? r | c : r ^ c;
        q = in.kind == '&' ? q & c : in.kind == '|' ? q | c : q ^ c;
    }
    if (in.o[0] >= 0) { u32& d = w.pred(in.o[0]); d = (d & ~m) | (r & m); }
    if (in.o[1] >= 0) { u32& d = w.pred(in.o[1]); d = (d & ~m) | (q & m); }
}

static void predicate(Warp& w, const Ins& in, u32 m) {  // kind: = ~ & | ^
    u32 a = w.pred(in.o[1]), b = w.pred(in.o[2]), &d = w.pred(in.o[0]);
    u32 r = in.kind == '=' ? a : in.kind == '~' ? ~a : in.kind == '&' ? a & b : in.kind == '|' ? a | b : a ^ b;
    d = (d & ~m) | (r & m);
}

// ---- between lanes --------------------------------------------------------------------------------------------------

static void members(Warp& w, const Ins& in, u32 m, u32 named) {
    if (named & w.alive & ~m)
        w.find("converged", in, __builtin_ctz(named & w.alive & ~m), "executed without a lane that it names: lanes " +
               hex(m) + " of " + hex(named));
}
static void shuffle(Warp& w, const Ins& in, u32 m) {  // o: d, p or -1, a, b, c, members
    u32 *d = w.reg<u32>(in.o[0]), *b = w.reg<u32>(in.o[3]), *c = w.reg<u32>(in.o[4]), *named = w.reg<u32>(in.o[5]),
        a[32];
    std::memcpy(a, w.reg<u32>(in.o[2]), sizeof a);
    members(w, in, m, named[__builtin_ctz(m)]);
    u32 inside = 0;
    for (u32 r = m; r; r &= r - 1) {
        u32 lane = u32(__builtin_ctz(r)), seg = c[lane] >> 8 & 31, clamp = c[lane] & 31, n = b[lane] & 31;
        u32 limit = (lane & seg) | (clamp & ~seg), low = lane & seg, j;
        bool ok;
        if (in.kind == 'b') j = lane ^ n, ok = j <= limit;
        else if (in.kind == 'd') j = lane + n, ok = j <= limit;
        else if (in.kind == 'u') j = lane - n, ok = s32(j) >= s32(limit);
        else j = low | (n & ~seg), ok = j <= limit;
        if (!ok) j = lane;
        inside |= u32(ok) << lane;
        if (!(m >> (j & 31) & 1))
            w.find("converged", in, int(lane), "reads from a lane that is not active: " + std::to_string(j));
        d[lane] = a[j & 31];
    }
    if (in.o[1] >= 0) { u32& p = w.pred(in.o[1]); p = (p & ~m) | inside; }
}
template <class T> static void reduce(Warp& w, const Ins& in, u32 m) {  // o: d, a, members
    const T* a = w.reg<T>(in.o[1]);
    members(w, in, m, w.reg<u32>(in.o[2])[__builtin_ctz(m)]);
    T x = a[__builtin_ctz(m)];
    for (u32 r = m & (m - 1); r; r &= r - 1) {
        T y = a[__builtin_ctz(r)];
        x = in.kind == '+' ? T(x + y) : in.kind == '<' ? std::min(x, y) : in.kind == '>' ? std::max(x, y)
            : in.kind == '&' ? T(x & y) : in.kind == '|' ? T(x | y) : T(x ^ y);
    }
    for (int i = 0; i < 32; i++) if (m >> i & 1) w.reg<T>(in.o[0])[i] = x;
}
static void vote(Warp& w, const Ins& in, u32 m) {  // o: d, p, members
    u32 p = w.pred(in.o[1]) & m;
    if (in.sign) p = ~p & m;
    members(w, in, m, w.reg<u32>(in.o[2])[__builtin_ctz(m)]);
    if (in.kind == 'b') { for (int i = 0; i < 32; i++) if (m >> i & 1) w.reg<u32>(in.o[0])[i] = p; return; }
    bool r = in.kind == 'a' ? p == m : in.kind == 'u' ? p == m || !p : p != 0;
    u32& d = w.pred(in.o[0]);
    d = (d & ~m) | (r ? m : 0);
}
static void active_mask(Warp& w, const Ins& in, u32 m) {
    for (int i = 0; i < 32; i++)
        if (m >> i & 1) w.reg<u32>(in.o[0])[i] = m;
}
static void warp_barrier(Warp& w, const Ins& in, u32 m) { members(w, in, m, w.reg<u32>(in.o[0])[__builtin_ctz(m)]); }

// ---- reading PTX ----------------------------------------------------------------------------------------------------

static vector<string> split(const string& s, char at) {
    vector<string> parts(1);
    int depth = 0;
    for (char c : s) {
        if (c == '{' || c == '[' || c == '(') depth++;
        if (c == '}' || c == ']' || c == ')') depth--;
        if (c == at && !depth) parts.emplace_back(); else parts.back() += c;
    }
    return parts;
}
static string trim(const string& s) {
    size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
    return a == string::npos ? "" : s.substr(a, b - a + 1);
}
static bool is_word(char c) { return isalnum(u8(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

static int bytes_of(const string& t) {
    if (t == "pred") return 0;
    if (t == "bf16" || t == "f16") return 2;
    if (t == "bf16x2" || t == "f16x2" || t == "tf32") return 4;
    size_t digits = t.find_first_of("0123456789");
    int n = digits == string::npos ? 0 : atoi(t.c_str() + digits);
    if (n != 8 && n != 16 && n != 32 && n != 64) throw Error("unknown type ." + t);
    return n / 8;
}

// The parts of an opcode, taken one by one; what nobody takes is not known.
struct Opcode {
    string whole;
    vector<string> parts;
    explicit Opcode(const string& s) : whole(s) {
        size_t i = 0;
        while (i <= s.size()) {
            size_t j = s.find('.', i);
            if (j == string::npos) j = s.size();
            parts.push_back(s.substr(i, j - i));
            i = j + 1;
        }
        parts.erase(std::remove(parts.begin(), parts.end(), ""), parts.end());
    }
    bool take(const string& s) {
        auto it = std::find(parts.begin(), parts.end(), s);
        if (it == parts.end()) return false;
        parts.erase(it);
        return true;
    }
    string any(std::initializer_list<const char*> of) { for (auto s : of) if (take(s)) return s; return ""; }
    void drop(std::initializer_list<const char*> of) { for (auto s : of) while (take(s)) {} }
    void drop_prefix(const char* p) {
        parts.erase(std::remove_if(parts.begin(), parts.end(), [&](const string& s) { return !s.rfind(p, 0); }),
                    parts.end());
    }
    string last() {
        if (parts.empty()) throw unknown();
        string s = parts.back();
        parts.pop_back();
        return s;
    }
    Error unknown() const { return Error("unknown instruction: " + whole); }
    void end() const { if (!parts.empty()) throw unknown(); }
};

template <template <class> class F, size_t... I> static Run same_(const string& t, std::index_sequence<I...>) {
#define CASE(NAME, T) if (t == NAME) return each<F<T>, T, std::enable_if_t<(I >= 0), T>...>;
    CASE("u16", u16) CASE("s16", s16) CASE("b16", u16) CASE("u32", u32) CASE("s32", s32) CASE("b32", u32)
    CASE("u64", u64) CASE("s64", s64) CASE("b64", u64)
    return nullptr;
}
template <template <class> class F, int N> static Run of_ints(const string& t) {
    return same_<F>(t, std::make_index_sequence<N>{});
}
template <template <class> class F, int N> static Run of_bits(string t) {  // where the sign does not matter
    if (t[0] == 's') t[0] = 'u';
    return of_ints<F, N>(t);
}
template <template <class> class F, size_t... I>
static Run floats_(const string& t, bool ftz, std::index_sequence<I...>) {
    if (t == "f32" && ftz) return each<Ftz<F<float>>, float, std::enable_if_t<(I >= 0), float>...>;
    if (t == "f32") return each<F<float>, float, std::enable_if_t<(I >= 0), float>...>;
    if (t == "f64") return each<F<double>, double, std::enable_if_t<(I >= 0), double>...>;
    if (t == "bf16") return each<Sixteen<bf16, F<float>>, u16, std::enable_if_t<(I >= 0), u16>...>;
    if (t == "f16") return each<Sixteen<f16, F<float>>, u16, std::enable_if_t<(I >= 0), u16>...>;
    if (t == "bf16x2") return each<Packed<Sixteen<bf16, F<float>>>, u32, std::enable_if_t<(I >= 0), u32>...>;
    if (t == "f16x2") return each<Packed<Sixteen<f16, F<float>>>, u32, std::enable_if_t<(I >= 0), u32>...>;
    return nullptr;
}
template <template <class> class F, int N> static Run of_floats(const string& t, bool ftz) {
    return floats_<F>(t, ftz, std::make_index_sequence<N>{});
}

template <template <class> class C> static Run compares(const string& t) {
#define COMPARE(NAME, T) if (t == NAME) return compare<C<T>, T>;
    COMPARE("u16", u16) COMPARE("s16", s16) COMPARE("b16", u16) COMPARE("u32", u32) COMPARE("s32", s32)
    COMPARE("b32", u32) COMPARE("u64", u64) COMPARE("s64", s64) COMPARE("b64", u64) COMPARE("f32", float)
    COMPARE("f64", double)
    return nullptr;
}

struct Reader {
    Module& module;
    const string& text;
    size_t at = 0;
    int line = 1;
    std::map<int, string> files;
    // of the kernel that is being read
    Kernel* kernel = nullptr;
    vector<std::map<string, Register>> scopes;
    std::map<std::pair<int, u64>, int> immediates;
    std::map<string, int> labels;
    std::map<string, Symbol> symbols;
    vector<string> label_scope;
    int loc = -1, temporaries = 0;
    int guard = -1, start_line = 0;
    bool guard_not = false;
    string name;

    Reader(Module& m, const string& t) : module(m), text(t) {}

    // -- characters
    void skip() {
        while (at < text.size()) {
            if (text[at] == '\n') line++, at++;
            else if (isspace(u8(text[at]))) at++;
            else if (text.compare(at, 2, "//") == 0) while (at < text.size() && text[at] != '\n') at++;
            else if (text.compare(at, 2, "/*") == 0) {
                size_t e = text.find("*/", at);
                for (; at < e + 2 && at < text.size(); at++) line += text[at] == '\n';
            } else break;
        }
    }
    string word() { size_t a = at; while (at < text.size() && is_word(text[at])) at++; return text.substr(a, at - a); }
    string to_end_of_line() {
        size_t a = at;
        while (at < text.size() && text[at] != '\n') at++;
        return text.substr(a, at - a);
    }
    string until(char stop) {  // without comments
        string s;
        while (at < text.size() && text[at] != stop) {
            if (text.compare(at, 2, "//") == 0) { while (at < text.size() && text[at] != '\n') at++; continue; }
            line += text[at] == '\n';
            s += text[at++];
        }
        at++;
        return s;
    }
    void skip_braces() {
        int depth = 0;
        do {
            char c = text[at++];
            line += c == '\n';
            depth += c == '{' ? 1 : c == '}' ? -1 : 0;
        } while (depth && at < text.size());
    }

    // -- registers
    int allot(int width) {
        int r = kernel->arena;
        kernel->arena += width == 8 ? 256 : width == 4 ? 128 : 64;
        return r;
    }
    void declare(const string& type, const string& names) {
        int width = bytes_of(type);
        if (width == 1) width = 2;
        for (string n : split(names, ',')) {
            n = trim(n);
            size_t lt = n.find('<');
            if (lt == string::npos) scopes.back()[n] = {allot(width), width};
            else
                for (int i = 0, e = atoi(n.c_str() + lt + 1); i < e; i++)
                    scopes.back()[n.substr(0, lt) + std::to_string(i)] = {allot(width), width};
        }
    }
    const Register* lookup(const string& n) {
        for (size_t i = scopes.size(); i--;) {
            auto it = scopes[i].find(n);
            if (it != scopes[i].end()) return &it->second;
        }
        static const std::set<string> SPECIAL = {
            "%tid.x",       "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",     "%ntid.z", "%ctaid.x",
            "%ctaid.y",     "%ctaid.z",     "%nctaid.x",    "%nctaid.y",    "%nctaid.z",   "%laneid", "%warpid",
            "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%lanemask_eq"};
        if (SPECIAL.count(n)) {
            scopes[0][n] = {kernel->special[n] = allot(4), 4};
            return &scopes[0][n];
        }
        return nullptr;
    }
    int immediate(int width, u64 value) {
        if (width < 8) value &= (u64(1) << 8 * width) - 1;
        auto it = immediates.find({width, value});
        if (it != immediates.end()) return it->second;
        return immediates[{width, value}] = allot(width);
    }
    bool number(const string& s, bool is_double, bool is_float, u64& out) {
        size_t i = s[0] == '-' ? 1 : 0;
        if (i >= s.size() || !isdigit(u8(s[i]))) return false;
        if (s[i] == '0' && s.size() > i + 1 && (s[i + 1] == 'f' || s[i + 1] == 'F'))
            out = strtoull(s.c_str() + i + 2, nullptr, 16);
        else if (s[i] == '0' && s.size() > i + 1 && (s[i + 1] == 'd' || s[i + 1] == 'D'))
            out = strtoull(s.c_str() + i + 2, nullptr, 16);
        else if (s.find('.') != string::npos || is_float || is_double) {
            double x = strtod(s.c_str(), nullptr);
            if (s.find("0x") != string::npos) { out = strtoull(s.c_str(), nullptr, 0); return true; }
            out = is_double ? bits<u64>(x) : bits<u32>(float(x));
        } else out = s[0] == '-' ? u64(-s64(strtoull(s.c_str() + 1, nullptr, 0))) : strtoull(s.c_str(), nullptr, 0);
        return true;
    }
    Error bad(const string& what) { return Error("line " + std::to_string(start_line) + ": " + name + ": " + what); }

    // A source of so many bytes: a register, or one that holds the immediate.
    int source(const string& s, int width, const string& type = "") {
        if (const Register* r = lookup(s)) {
            if (r->width == width) return r->at;
            throw bad("operand " + s + " has another width");
        }
        u64 x;
        if (number(s, type == "f64", type == "f32", x)) return immediate(width, x);
        const Symbol* sym = symbol(s);
        if (sym) return immediate(width, sym->at);
        throw bad("operand " + s);
    }
    int result(const string& s, int width) {
        const Register* r = lookup(s);
        if (!r) throw bad("result " + s);
        if (r->width != width) throw bad("result " + s + " has another width");
        return r->at;
    }
    int predicate_of(const string& s) {
        const Register* r = lookup(s);
        if (!r || r->width) throw bad("operand " + s + " is no predicate");
        return r->at;
    }
    const Symbol* symbol(const string& s) {
        auto it = symbols.find(s);
        if (it != symbols.end()) return &it->second;
        it = module.symbols.find(s);
        return it == module.symbols.end() ? nullptr : &it->second;
    }
    void address(Ins& in, int which, const string& operand) {
        string s = trim(operand);
        if (s.empty() || s[0] != '[') throw bad("address " + s);
        s = trim(s.substr(1, s.size() - 2));
        size_t plus = s.find('+');
        string base = trim(s.substr(0, plus));
        in.offset[which] = plus == string::npos ? 0 : strtoll(trim(s.substr(plus + 1)).c_str(), nullptr, 0);
        if (const Register* r = lookup(base)) in.base[which] = r->at, in.base_width[which] = r->width;
        else if (const Symbol* sym = symbol(base)) {
            in.offset[which] += s64(sym->at);
            if (in.space == 'a' && (sym->space == 's' || sym->space == 'x')) in.offset[which] += s64(SHARED_TAG);
        } else {
            u64 x;
            if (!number(base, false, false, x)) throw bad("address " + s);
            in.offset[which] += s64(x);
        }
    }
    static vector<string> braces(const string& operand) {
        string s = trim(operand);
        if (s.empty() || s[0] != '{') return {s};
        vector<string> v = split(s.substr(1, s.size() - 2), ',');
        for (string& x : v) x = trim(x);
        return v;
    }
    int temporary(int width) {
        string n = "?" + std::to_string(width) + "." + std::to_string(temporaries++ % 4);
        if (!scopes[0].count(n)) scopes[0][n] = {allot(width), width};
        return scopes[0][n].at;
    }

    // -- instructions
    Ins& emit(Run run, Class cls) {
        if (!run) throw Error("unknown instruction: " + name);
        Ins in;
        in.run = run, in.cls = cls, in.pred = guard, in.negated = guard_not, in.line = start_line, in.loc = loc,
        in.name = name;
        kernel->code.push_back(in);
        return kernel->code.back();
    }
    void simple(Run run, Class cls, const vector<string>& a, int result_width, std::initializer_list<int> widths,
                const string& type = "") {
        if (a.size() != widths.size() + 1)
            throw Error("unknown instruction: " + name + " with " + std::to_string(a.size()) + " operands");
        int o[8], i = 0;
        o[i] = result(a[0], result_width);
        for (int w : widths) { i++; o[i] = source(a[size_t(i)], w, type); }
        Ins& in = emit(run, cls);
        std::copy(o, o + i + 1, in.o);
    }

    u8 space_of(Opcode& op) {
        op.drop({"volatile", "relaxed", "acquire", "release", "acq_rel", "weak", "gpu", "cta", "sys", "nc"});
        op.drop_prefix("L1::"); op.drop_prefix("L2::");
        string s = op.any({"global", "shared", "shared::cta", "param", "local", "const"});
        return s == "global" || s == "const" ? 'g' : s.empty() ? 'a' : u8(s[0]);
    }

    void memory(Opcode op, vector<string> a, bool is_load) {
        bool hint = op.take("L2::cache_hint");
        u8 space = space_of(op);
        op.drop({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
        int n = op.take("v2") ? 2 : op.take("v4") ? 4 : 1;
        string type = op.last();
        op.end();
        if (hint) a.pop_back();
        if (a.size() != 2) throw op.unknown();
        vector<string> regs = braces(a[is_load ? 0 : 1]);
        if (int(regs.size()) != n) throw op.unknown();
        int size = bytes_of(type), o[4], width[4];
        for (int i = 0; i < n; i++) {
            if (regs[size_t(i)] == "_") { o[i] = -1, width[i] = 4; continue; }
            const Register* r = lookup(regs[size_t(i)]);
            if (!r && is_load) throw bad("result " + regs[size_t(i)]);
            width[i] = r ? r->width : std::max(size, 2);
            o[i] = r ? r->at : source(regs[size_t(i)], width[i], type);
        }
        Ins& in = emit(is_load ? load : store, space == 's' ? SHARED : space == 'p' ? MOVE : GLOBAL);
        in.space = space, in.n = n, in.size = size, in.sign = type[0] == 's', in.write = !is_load;
        std::copy(o, o + n, in.o);
        std::copy(width, width + n, in.width);
        address(in, 0, a[is_load ? 1 : 0]);
        if (space == 's' || space == 'a') kernel->grain = std::min(kernel->grain, n * size);
    }

    void atomics(Opcode op, vector<string> a, bool returns) {
        u8 space = space_of(op);
        string what = op.any({"add", "min", "max", "exch", "cas"}), type = op.last();
        op.end();
        if (!returns) a.insert(a.begin(), "");
        Run run = type == "u32" || type == "b32"   ? atomic<u32>
                  : type == "s32"                  ? atomic<s32>
                  : type == "f32"                  ? atomic<float>
                  : type == "u64" || type == "b64" ? atomic<u64>
                  : type == "s64"                  ? atomic<s64>
                  : type == "f64"                  ? atomic<double>
                                                   : nullptr;
        if (what.empty() || !run) throw op.unknown();
        int w = bytes_of(type), d = returns ? result(a[0], w) : -1, x = source(a.at(2), w, type),
            y = what == "cas" ? source(a.at(3), w, type) : 0;
        Ins& in = emit(run, space == 's' ? SHARED : GLOBAL);
        in.space = space, in.o[0] = d, in.o[1] = x, in.o[2] = y, in.n = what == "cas" ? 2 : 1, in.write = true;
        in.kind = what == "add" ? '+' : what == "min" ? '<' : what == "max" ? '>' : what == "exch" ? '=' : '?';
        address(in, 0, a[1]);
        kernel->grain = std::min(kernel->grain, w);
    }

    void convert(Opcode op, vector<string> a) {
        string st = op.last(), dt = op.last();
        bool ftz = op.take("ftz"), sat = op.take("sat");
        string r = op.any({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
        op.end();
        if (a.size() == 3) {  // two to one register
            Run run = r != "rn" || st != "f32" ? nullptr : dt == "bf16x2" ? each<Narrow2<bf16>, u32, float, float>
                : dt == "f16x2" ? each<Narrow2<f16>, u32, float, float> : nullptr;
            return simple(run, MOVE, a, 4, {4, 4}, st);
        }
        Run run = nullptr;
        bool from_float = st.find('f') != string::npos, to_float = dt.find('f') != string::npos;
        if (!from_float && !to_float && !sat && r.empty()) run = int_cast(dt, st);
        else if (!from_float && to_float && (r == "rn")) run = to_floats(dt, st);
        else if (from_float && !to_float)
            run = r == "rzi"   ? to_ints<Trunc>(dt, st)
                  : r == "rni" ? to_ints<Round>(dt, st)
                  : r == "rmi" ? to_ints<Floor>(dt, st)
                  : r == "rpi" ? to_ints<Ceil>(dt, st)
                               : nullptr;
        else if (dt == "f32" && st == "bf16") run = each<Widen<bf16>, float, u16>;
        else if (dt == "f32" && st == "f16") run = each<Widen<f16>, float, u16>;
        else if (dt == "bf16" && st == "f32" && r == "rn") run = each<Narrow<bf16>, u16, float>;
        else if (dt == "f16" && st == "f32" && r == "rn") run = each<Narrow<f16>, u16, float>;
        else if (dt == "tf32" && st == "f32" && r == "rna") run = each<Tf32, u32, float>;
        else if (dt == "f64" && st == "f32") run = each<Cast<double, float>, double, float>;
        else if (dt == "f32" && st == "f64" && r == "rn") run = each<Cast<float, double>, float, double>;
        else if (dt == st && sat) run = of_floats<Sat, 1>(dt, ftz);
        else if (dt == st)
            run = r == "rni"   ? of_floats<Round, 1>(dt, ftz)
                  : r == "rzi" ? of_floats<Trunc, 1>(dt, ftz)
                  : r == "rmi" ? of_floats<Floor, 1>(dt, ftz)
                  : r == "rpi" ? of_floats<Ceil, 1>(dt, ftz)
                               : of_floats<Mov, 1>(dt, ftz);
        if (!run) throw op.unknown();
        // Registers may be wider than the types.
        int sw = std::max(bytes_of(st), 2), dw = std::max(bytes_of(dt), 2), from, to = -1;
        const Register *s = lookup(a[1]), *d = lookup(a[0]);
        if (!d) throw bad("result " + a[0]);
        string u = "u" + std::to_string(8 * sw);
        if (s && s->width > sw) {
            Ins& in = emit(int_cast(u, "u" + std::to_string(8 * s->width)), MOVE);
            in.o[1] = s->at, from = in.o[0] = temporary(sw);
        } else from = source(a[1], sw, st);
        bool widened = d->width > dw;
        to = widened ? temporary(dw) : d->width == dw ? d->at : throw bad("result is too narrow");
        Ins& in = emit(run, MOVE);
        in.o[0] = to, in.o[1] = from;
        if (widened) {
            string kind = dt[0] == 's' ? "s" : "u";
            Ins& up = emit(int_cast(kind + std::to_string(8 * d->width), kind + std::to_string(8 * dw)), MOVE);
            up.o[0] = d->at, up.o[1] = to;
        }
    }
    template <class D> static Run int_from(const string& st) {
#define FROM(NAME, T, R) if (st == NAME) return each<Cast<D, T>, std::conditional_t<sizeof(D) == 1, u16, D>, R>;
        FROM("u8", u8, u16) FROM("s8", s8, u16) FROM("b8", u8, u16) FROM("u16", u16, u16) FROM("s16", s16, s16)
        FROM("b16", u16, u16)
        FROM("u32", u32, u32) FROM("s32", s32, s32) FROM("b32", u32, u32) FROM("u64", u64, u64) FROM("s64", s64, s64)
        FROM("b64", u64, u64)
        return nullptr;
    }
    static Run int_cast(const string& dt, const string& st) {
        if (dt == "u8" || dt == "b8") return int_from<u8>(st);
        if (dt == "s8") return int_from<s8>(st);
        if (dt == "u16" || dt == "b16") return int_from<u16>(st);
        if (dt == "s16") return int_from<s16>(st);
        if (dt == "u32" || dt == "b32") return int_from<u32>(st);
        if (dt == "s32") return int_from<s32>(st);
        if (dt == "u64" || dt == "b64") return int_from<u64>(st);
        return dt == "s64" ? int_from<s64>(st) : nullptr;
    }
    static Run to_floats(const string& dt, const string& st) {
#define TO(NAME, T, R) if (st == NAME && dt == "f32") return each<Cast<float, T>, float, R>; \
        if (st == NAME && dt == "f64") return each<Cast<double, T>, double, R>;
        TO("u8", u8, u16) TO("s8", s8, u16) TO("u16", u16, u16) TO("s16", s16, s16) TO("u32", u32, u32)
        TO("s32", s32, s32)
        TO("u64", u64, u64) TO("s64", s64, s64)
        return nullptr;
    }
    template <template <class> class R> static Run to_ints(const string& dt, const string& st) {
#define INTO(NAME, T) if (dt == NAME && st == "f32") return each<ToInt<T, float, R>, T, float>; \
        if (dt == NAME && st == "f64") return each<ToInt<T, double, R>, T, double>;
        INTO("u16", u16) INTO("s16", s16) INTO("u32", u32) INTO("s32", s32) INTO("u64", u64) INTO("s64", s64)
        return nullptr;
    }

    void move(Opcode op, vector<string> a) {
        string t = op.last();
        op.end();
        if (t == "pred") {
            u64 x;
            bool is_number = number(a[1], false, false, x);
            int s = is_number ? immediate(4, x ? FULL : 0) : predicate_of(a[1]), d = predicate_of(a[0]);
            Ins& in = emit(predicate, MOVE);
            in.kind = '=', in.o[0] = d, in.o[1] = s;
            return;
        }
        int w = bytes_of(t);
        vector<string> d = braces(a[0]), s = braces(a[1]);
        if (d.size() == 1 && s.size() == 1) {
            Run run = w == 2 ? each<Mov<u16>, u16, u16> : w == 4 ? each<Mov<u32>, u32, u32> : each<Mov<u64>, u64, u64>;
            const Register* r = lookup(d[0]);
            if (r && r->width == 2 && w < 2) w = 2;
            return simple(run, MOVE, {d[0], s[0]}, w, {w}, t);
        }
        if (s.size() == 2)
            return simple(w == 4 ? Run(each<Pack32, u32, u16, u16>) : Run(each<Pack64, u64, u32, u32>), MOVE,
                          {d[0], s[0], s[1]}, w, {w / 2, w / 2});
        if (d.size() != 2) throw op.unknown();
        // The low half last would overwrite a source that is also the first result; they differ in width, so never.
        if (d[0] != "_")
            simple(w == 4 ? Run(each<Cast<u16, u32>, u16, u32>) : Run(each<Cast<u32, u64>, u32, u64>), MOVE,
                   {d[0], s[0]}, w / 2, {w});
        if (d[1] != "_")
            simple(w == 4 ? Run(each<High16, u16, u32>) : Run(each<High32, u32, u64>), MOVE, {d[1], s[0]}, w / 2, {w});
    }

    void set_predicate(Opcode op, vector<string> a) {
        string t = op.last();
        op.take("ftz");
        string c = op.any({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu",
                           "gtu", "geu", "num", "nan"});
        string join = op.any({"and", "or", "xor"});
        op.end();
        if (c == "lo") c = "lt";
        else if (c == "ls") c = "le";
        else if (c == "hi") c = "gt";
        else if (c == "hs") c = "ge";
        Run run = c == "eq"    ? compares<Eq>(t)
                  : c == "ne"  ? compares<Ne>(t)
                  : c == "lt"  ? compares<Lt>(t)
                  : c == "le"  ? compares<Le>(t)
                  : c == "gt"  ? compares<Gt>(t)
                  : c == "ge"  ? compares<Ge>(t)
                  : c == "equ" ? compares<Equ>(t)
                  : c == "neu" ? compares<Neu>(t)
                  : c == "ltu" ? compares<Ltu>(t)
                  : c == "leu" ? compares<Leu>(t)
                  : c == "gtu" ? compares<Gtu>(t)
                  : c == "geu" ? compares<Geu>(t)
                  : c == "num" ? compares<Num>(t)
                  : c == "nan" ? compares<Nan>(t)
                               : nullptr;
        if (!run) throw op.unknown();
        vector<string> d = split(a[0], '|');
        int w = bytes_of(t), o[5] = {predicate_of(trim(d[0])), d.size() > 1 ? predicate_of(trim(d[1])) : -1,
                                     source(a[1], w, t), source(a[2], w, t), -1};
        bool negated = false;
        if (!join.empty()) { negated = a[3][0] == '!'; o[4] = predicate_of(a[3].substr(negated)); }
        Ins& in = emit(run, t[0] == 'f' ? FLOAT : INT);
        std::copy(o, o + 5, in.o);
        in.sign = negated, in.kind = join == "and" ? '&' : join == "or" ? '|' : '^';
    }

    void logic(Opcode op, vector<string> a, const string& what) {
        string t = op.last();
        op.end();
        if (t != "pred") {
            int w = bytes_of(t);
            if (what == "not") return simple(of_bits<Not, 1>(t), INT, a, w, {w});
            return simple(what == "and"  ? of_bits<And, 2>(t)
                          : what == "or" ? of_bits<Or, 2>(t)
                                         : of_bits<Xor, 2>(t),
                          INT, a, w, {w, w});
        }
        auto side = [&](const string& s) {
            u64 x;
            return number(s, false, false, x) ? immediate(4, x ? FULL : 0) : predicate_of(s);
        };
        int d = predicate_of(a[0]), x = side(a[1]), y = what == "not" ? x : side(a[2]);
        Ins& in = emit(predicate, INT);
        in.kind = what == "not" ? '~' : what == "and" ? '&' : what == "or" ? '|' : '^';
        in.o[0] = d, in.o[1] = x, in.o[2] = y;
    }

    void arithmetic(Opcode op, vector<string> a, const string& what) {
        string t = op.last();
        int w = bytes_of(t);
        bool is_float = t.find('f') != string::npos, ftz = op.take("ftz");
        if (is_float) {
            string r = op.any({"rn", "approx", "full"});
            bool nan = op.take("NaN");
            op.end();
            Run run = nullptr;
            Class cls = FLOAT;
            if (what == "add") run = of_floats<Add, 2>(t, ftz);
            else if (what == "sub") run = of_floats<Sub, 2>(t, ftz);
            else if (what == "mul") run = of_floats<Mul, 2>(t, ftz);
            else if (what == "min") run = nan ? of_floats<NMin, 2>(t, ftz) : of_floats<FMin, 2>(t, ftz);
            else if (what == "max") run = nan ? of_floats<NMax, 2>(t, ftz) : of_floats<FMax, 2>(t, ftz);
            else if (what == "neg") run = of_floats<FNeg, 1>(t, ftz);
            else if (what == "abs") run = of_floats<FAbs, 1>(t, ftz);
            else if (what == "fma")
                run = t == "bf16"     ? each<Fma16<bf16>, u16, u16, u16, u16>
                      : t == "f16"    ? each<Fma16<f16>, u16, u16, u16, u16>
                      : t == "bf16x2" ? each<Packed<Fma16<bf16>>, u32, u32, u32, u32>
                      : t == "f16x2"  ? each<Packed<Fma16<f16>>, u32, u32, u32, u32>
                                      : of_floats<Fma, 3>(t, ftz);
            else {
                cls = SPECIAL;
                run = what == "div"     ? of_floats<FDiv, 2>(t, ftz)
                      : what == "sqrt"  ? of_floats<Sqrt, 1>(t, ftz)
                      : what == "rsqrt" ? of_floats<Rsqrt, 1>(t, ftz)
                      : what == "rcp"   ? of_floats<Rcp, 1>(t, ftz)
                      : what == "ex2"   ? of_floats<Ex2, 1>(t, ftz)
                      : what == "lg2"   ? of_floats<Lg2, 1>(t, ftz)
                      : what == "sin"   ? of_floats<Sin, 1>(t, ftz)
                      : what == "cos"   ? of_floats<Cos, 1>(t, ftz)
                      : what == "tanh"  ? of_floats<Tanh, 1>(t, ftz)
                                        : nullptr;
            }
            if (!run) throw op.unknown();
            if (a.size() == 2) return simple(run, cls, a, w, {w}, t);
            if (a.size() == 3) return simple(run, cls, a, w, {w, w}, t);
            return simple(run, cls, a, w, {w, w, w}, t);
        }
        string part = op.any({"lo", "hi", "wide"});
        op.end();
        if (part == "wide") {
            bool mad = what == "mad";
            Run run = t == "u16"   ? (mad ? Run(each<MadWide<u32, u16>, u32, u16, u16, u32>)
                                          : Run(each<MulWide<u32, u16>, u32, u16, u16>))
                      : t == "s16" ? (mad ? Run(each<MadWide<s32, s16>, s32, s16, s16, s32>)
                                          : Run(each<MulWide<s32, s16>, s32, s16, s16>))
                      : t == "u32" ? (mad ? Run(each<MadWide<u64, u32>, u64, u32, u32, u64>)
                                          : Run(each<MulWide<u64, u32>, u64, u32, u32>))
                      : t == "s32" ? (mad ? Run(each<MadWide<u64, s32>, u64, s32, s32, u64>)
                                          : Run(each<MulWide<s64, s32>, s64, s32, s32>))
                                   : nullptr;
            return mad ? simple(run, INT, a, 2 * w, {w, w, 2 * w}) : simple(run, INT, a, 2 * w, {w, w});
        }
        if (part == "hi") {
            using U = unsigned __int128; using S = __int128;
            if (what == "mad")
                return simple(t == "u32"   ? Run(each<MadHi<u64, u32>, u32, u32, u32, u32>)
                              : t == "s32" ? Run(each<MadHi<s64, s32>, s32, s32, s32, s32>)
                                           : nullptr,
                              INT, a, w, {w, w, w});
            return simple(t == "u32"   ? Run(each<MulHi<u64, u32>, u32, u32, u32>)
                          : t == "s32" ? Run(each<MulHi<s64, s32>, s32, s32, s32>)
                          : t == "u64" ? Run(each<MulHi<U, u64>, u64, u64, u64>)
                          : t == "s64" ? Run(each<MulHi<S, s64>, s64, s64, s64>)
                                       : nullptr,
                          INT, a, w, {w, w});
        }
        if (what == "neg") return simple(of_bits<Neg, 1>(t), INT, a, w, {w});
        if (what == "abs") return simple(of_ints<Abs, 1>(t), INT, a, w, {w});
        if (what == "mad") return simple(of_bits<Mad, 3>(t), INT, a, w, {w, w, w});
        simple(what == "add"   ? of_bits<Add, 2>(t)
               : what == "sub" ? of_bits<Sub, 2>(t)
               : what == "mul" ? of_bits<Mul, 2>(t)
               : what == "min" ? of_ints<Min, 2>(t)
               : what == "max" ? of_ints<Max, 2>(t)
               : what == "div" ? of_ints<IDiv, 2>(t)
               : what == "rem" ? of_ints<Rem, 2>(t)
                               : nullptr,
               INT, a, w, {w, w});
    }

    void matrix(Opcode op, vector<string> a) {
        string shape = op.any({"m16n8k16", "m16n8k8"});
        op.drop({"sync", "aligned", "row", "col"});
        if (op.parts.size() != 4 || op.parts[0] != "f32" || op.parts[3] != "f32" || op.parts[1] != op.parts[2] ||
            shape.empty() || a.size() != 4)
            throw op.unknown();
        string t = op.parts[1];
        Run run = shape == "m16n8k16" ? (t == "bf16"  ? Run(mma<bf16, 4>)
                                         : t == "f16" ? Run(mma<f16, 4>)
                                                      : nullptr)
                  : t == "bf16"       ? Run(mma<bf16, 2>)
                  : t == "f16"        ? Run(mma<f16, 2>)
                  : t == "tf32"       ? Run(mma<float, 4>)
                                      : nullptr;
        if (!run) throw op.unknown();
        vector<int> o;
        for (const string& list : a) for (const string& r : braces(list)) o.push_back(source(r, 4));
        Ins& in = emit(run, MATRIX);
        in.converged = true;
        std::copy(o.begin(), o.end(), in.o);
    }

    void rows_of_matrices(Opcode op, vector<string> a, bool write) {
        op.drop({"sync", "aligned", "m8n8", "b16", "shared", "shared::cta"});
        bool trans = op.take("trans");
        int n = op.take("x1") ? 1 : op.take("x2") ? 2 : op.take("x4") ? 4 : 0;
        op.end();
        vector<string> regs = braces(a[write ? 1 : 0]);
        if (!n || int(regs.size()) != n) throw op.unknown();
        int o[4];
        for (int i = 0; i < n; i++) o[i] = result(regs[size_t(i)], 4);
        Ins& in = emit(matrix_rows, SHARED);
        in.n = n, in.trans = trans, in.write = write, in.converged = true, in.space = 's';
        std::copy(o, o + n, in.o);
        address(in, 0, a[write ? 0 : 1]);
    }

    void warpgroup(Opcode op, vector<string> a) {
        op.drop({"sync", "aligned"});
        if (op.take("fence")) { op.end(); emit(nothing, SYNC).converged = true; return; }
        if (op.take("commit_group")) { op.end(); emit(wgmma_commit, SYNC).converged = true; return; }
        if (op.take("wait_group")) {
            op.end();
            Ins& in = emit(wgmma_wait, SYNC);
            in.converged = true;
            in.offset[0] = atoi(a[0].c_str());
            return;
        }
        if (!op.take("mma_async") || op.parts.size() != 4 || op.parts[1] != "f32" || op.parts[2] != op.parts[3])
            throw op.unknown();
        string t = op.parts[2], shape = op.parts[0];
        int n = atoi(shape.c_str() + shape.find('n') + 1), w = t == "tf32" ? 4 : 2;
        if (shape != "m64n" + std::to_string(n) + "k" + std::to_string(32 / w) ||
            (t != "bf16" && t != "f16" && t != "tf32"))
            throw op.unknown();
        vector<int> list;
        for (const string& r : braces(a[0])) list.push_back(result(r, 4));
        if (int(list.size()) != n / 2) throw op.unknown();
        vector<string> left = braces(a[1]);
        bool in_registers = left.size() == 4;
        int da = 0, db = source(a[2], 8), p = -1;
        if (in_registers) for (const string& r : left) list.push_back(source(r, 4)); else da = source(a[1], 8);
        u64 always = 0;
        if (!number(a[3], false, false, always)) p = predicate_of(a[3]);
        auto imm = [&](size_t i) { return i < a.size() ? atoi(a[i].c_str()) : 0; };
        bool trans_a = !in_registers && imm(6), trans_b = in_registers ? imm(6) : imm(7);
        Ins& in = emit(wgmma, MATRIX);
        in.converged = true, in.list = list, in.n = n, in.space = t == "bf16" ? 'b' : t == "f16" ? 'h' : 't';
        in.o[0] = da, in.o[1] = db, in.o[2] = p, in.offset[0] = s64(always);
        in.kind = u8(in_registers | trans_a << 1 | trans_b << 2 | (imm(4) < 0) << 3 | (imm(5) < 0) << 4);
    }

    void instruction(const string& statement) {
        string s = trim(statement);
        guard = -1, guard_not = false;
        if (s[0] == '@') {
            size_t e = s.find_first_of(" \t");
            guard_not = s[1] == '!';
            name = s;
            guard = predicate_of(s.substr(1 + guard_not, e - 1 - guard_not));
            s = trim(s.substr(e));
        }
        size_t e = s.find_first_of(" \t");
        name = s.substr(0, e);
        vector<string> a;
        if (e != string::npos) for (const string& x : split(s.substr(e), ',')) a.push_back(trim(x));
        Opcode op(name);
        string what = op.parts[0];
        op.parts.erase(op.parts.begin());

        if (what == "ld" || what == "ldu") return memory(op, a, true);
        if (what == "st") return memory(op, a, false);
        if (what == "atom") return atomics(op, a, true);
        if (what == "red") return atomics(op, a, false);
        if (what == "mov") return move(op, a);
        if (what == "cvt") return convert(op, a);
        if (what == "setp") return set_predicate(op, a);
        if (what == "and" || what == "or" || what == "xor" || what == "not") return logic(op, a, what);
        if (what == "mma") return matrix(op, a);
        if (what == "ldmatrix") return rows_of_matrices(op, a, false);
        if (what == "stmatrix") return rows_of_matrices(op, a, true);
        if (what == "wgmma") return warpgroup(op, a);
        static const std::set<string> ARITHMETIC = {"add", "sub", "mul", "mad", "fma",  "min",   "max",
                                                    "div", "rem", "neg", "abs", "sqrt", "rsqrt", "rcp",
                                                    "ex2", "lg2", "sin", "cos", "tanh"};
        if (ARITHMETIC.count(what)) return arithmetic(op, a, what);
        if (what == "bra") {
            op.drop({"uni"}); op.end();
            Ins& in = emit(nothing, CONTROL);
            in.flow = BRANCH, in.label = label_name(a[0]);
            return;
        }
        if (what == "ret" || what == "exit") { op.end(); emit(nothing, CONTROL).flow = EXIT; return; }
        if (what == "trap") { op.end(); emit(nothing, CONTROL).flow = TRAP; return; }
        if (what == "bar" || what == "barrier") {
            op.drop({"cta", "aligned"});
            if (op.take("warp")) {
                op.take("sync");
                op.end();
                int m = source(a[0], 4);
                emit(warp_barrier, SYNC).o[0] = m;
                return;
            }
            bool arrive = op.take("arrive");
            if (!arrive && !op.take("sync")) throw op.unknown();
            op.end();
            u64 id = 0, n = 0;
            if (!number(a[0], false, false, id) || (a.size() > 1 && !number(a[1], false, false, n))) throw op.unknown();
            Ins& in = emit(nothing, SYNC);
            in.flow = arrive ? ARRIVE : BARRIER, in.n = int(id), in.size = int(n);
            return;
        }
        if (what == "cp" && op.take("async")) {
            if (op.take("commit_group")) { op.end(); emit(commit_copies, ASYNC); return; }
            if (op.take("wait_group")) { op.end(); emit(wait_copies, ASYNC).offset[0] = atoi(a[0].c_str()); return; }
            if (op.take("wait_all")) { op.end(); emit(wait_copies, ASYNC).offset[0] = -1; return; }
            bool hint = op.take("L2::cache_hint");
            op.drop_prefix("L2::");
            op.drop({"ca", "cg", "shared", "shared::cta", "global"}); op.end();
            if (hint) a.pop_back();
            if (a.size() < 3) throw op.unknown();
            int given = a.size() > 3 ? source(a[3], 4) : -1;
            Ins& in = emit(copy_async, ASYNC);
            in.space = 's', in.size = int(strtol(a[2].c_str(), nullptr, 0)), in.o[0] = given;
            address(in, 0, a[0]);
            address(in, 1, a[1]);
            kernel->grain = std::min(kernel->grain, in.size);
            return;
        }
        if (what == "fence" || what == "membar") {
            if (op.take("proxy")) {
                op.drop({"async", "async::generic", "shared::cta", "async.shared::cta"}); op.end();
                emit(proxy_fence, SYNC); return;
            }
            op.drop({"sc", "acq_rel", "acquire", "release", "cta", "gpu", "sys", "gl", "cluster"}); op.end();
            emit(nothing, SYNC); return;
        }
        if (what == "shfl") {
            op.take("sync"); op.take("b32");
            string kind = op.any({"bfly", "down", "up", "idx"});
            op.end();
            if (kind.empty() || a.size() != 5) throw op.unknown();
            vector<string> d = split(a[0], '|');
            int o[6] = {result(trim(d[0]), 4), d.size() > 1 ? predicate_of(trim(d[1])) : -1,
                        source(a[1], 4),       source(a[2], 4),
                        source(a[3], 4),       source(a[4], 4)};
            Ins& in = emit(shuffle, SHUFFLE);
            std::copy(o, o + 6, in.o);
            in.kind = u8(kind[0]);
            return;
        }
        if (what == "redux") {
            op.take("sync");
            string kind = op.any({"add", "min", "max", "and", "or", "xor"}), t = op.last();
            op.end();
            Run run = t == "s32" ? reduce<s32> : t == "u32" || t == "b32" ? reduce<u32> : nullptr;
            if (kind.empty() || !run) throw op.unknown();
            int o[3] = {result(a[0], 4), source(a[1], 4), source(a[2], 4)};
            Ins& in = emit(run, SHUFFLE);
            std::copy(o, o + 3, in.o);
            in.kind = kind == "add"   ? '+'
                      : kind == "min" ? '<'
                      : kind == "max" ? '>'
                      : kind == "and" ? '&'
                      : kind == "or"  ? '|'
                                      : '^';
            return;
        }
        if (what == "vote") {
            op.take("sync");
            string kind = op.any({"ballot", "any", "all", "uni"}), t = op.last();
            op.end();
            bool negated = a[1][0] == '!';
            int o[3] = {kind == "ballot" ? result(a[0], 4) : predicate_of(a[0]), predicate_of(a[1].substr(negated)),
                        source(a[2], 4)};
            Ins& in = emit(vote, SHUFFLE);
            std::copy(o, o + 3, in.o);
            in.sign = negated, in.kind = kind == "ballot" ? 'b' : kind == "all" ? 'a' : kind == "uni" ? 'u' : 'y';
            return;
        }
        if (what == "activemask") { int d = result(a[0], 4); emit(active_mask, SHUFFLE).o[0] = d; return; }
        if (what == "selp") {
            string t = op.last();
            op.end();
            int w = bytes_of(t), o[4] = {result(a[0], w), source(a[1], w, t), source(a[2], w, t), predicate_of(a[3])};
            Ins& in = emit(w == 2 ? select_<u16> : w == 4 ? select_<u32> : select_<u64>, MOVE);
            std::copy(o, o + 4, in.o);
            return;
        }
        if (what == "shl" || what == "shr") {
            string t = op.last();
            op.end();
            int w = bytes_of(t);
            bool left = what == "shl";
            Run run = left         ? (w == 2   ? Run(each<Shl<u16>, u16, u16, u32>)
                                      : w == 4 ? Run(each<Shl<u32>, u32, u32, u32>)
                                               : Run(each<Shl<u64>, u64, u64, u32>))
                      : t == "s16" ? Run(each<Shr<s16>, s16, s16, u32>)
                      : t == "s32" ? Run(each<Shr<s32>, s32, s32, u32>)
                      : t == "s64" ? Run(each<Shr<s64>, s64, s64, u32>)
                      : w == 2     ? Run(each<Shr<u16>, u16, u16, u32>)
                      : w == 4     ? Run(each<Shr<u32>, u32, u32, u32>)
                                   : Run(each<Shr<u64>, u64, u64, u32>);
            return simple(run, INT, a, w, {w, 4});
        }
        if (what == "bfe") {
            string t = op.last();
            op.end();
            int w = bytes_of(t);
            return simple(t == "u32"   ? Run(each<Bfe<u32, u32>, u32, u32, u32, u32>)
                          : t == "s32" ? Run(each<Bfe<s32, u32>, s32, s32, u32, u32>)
                          : t == "u64" ? Run(each<Bfe<u64, u64>, u64, u64, u32, u32>)
                                       : Run(each<Bfe<s64, u64>, s64, s64, u32, u32>),
                          INT, a, w, {w, 4, 4});
        }
        if (what == "cvta") {
            bool to = op.take("to");
            string space = op.any({"global", "shared", "local", "const"});
            op.drop({"u64"}); op.end();
            u64 tag = space == "shared" ? SHARED_TAG : space == "local" ? LOCAL_TAG : 0;
            simple(each<Add<u64>, u64, u64, u64>, MOVE, {a[0], a[1], std::to_string(to ? u64(0) - tag : tag)}, 8,
                   {8, 8});
            return;
        }
        if (what == "createpolicy") {
            int d = result(a[0], 8);
            Ins& in = emit(each<Mov<u64>, u64, u64>, MOVE);
            in.o[0] = d, in.o[1] = immediate(8, 0);
            return;
        }
        if (what == "prefetch" || what == "prefetchu" || what == "applypriority" || what == "discard") {
            emit(nothing, GLOBAL);
            return;
        }
        if (what == "griddepcontrol") { emit(nothing, SYNC); return; }
        if (name == "prmt.b32") return simple(each<Prmt, u32, u32, u32, u32>, INT, a, 4, {4, 4, 4});
        if (name == "lop3.b32") return simple(each<Lop3, u32, u32, u32, u32, u32>, INT, a, 4, {4, 4, 4, 4});
        if (name == "bfi.b32") return simple(each<Bfi, u32, u32, u32, u32, u32>, INT, a, 4, {4, 4, 4, 4});
        if (name == "shf.l.wrap.b32") return simple(each<ShfL, u32, u32, u32, u32>, INT, a, 4, {4, 4, 4});
        if (name == "shf.r.wrap.b32") return simple(each<ShfR, u32, u32, u32, u32>, INT, a, 4, {4, 4, 4});
        if (name == "popc.b32") return simple(each<Popc, u32, u32>, INT, a, 4, {4});
        if (name == "clz.b32") return simple(each<Clz, u32, u32>, INT, a, 4, {4});
        if (name == "brev.b32") return simple(each<Brev, u32, u32>, INT, a, 4, {4});
        if (name == "copysign.f32") return simple(each<CopySign, float, float, float>, FLOAT, a, 4, {4, 4}, "f32");
        throw op.unknown();
    }

    // -- statements
    string label_name(const string& s) {  // labels of an inner scope are its own
        for (size_t i = label_scope.size(); i-- > 1;) if (labels.count(label_scope[i] + s)) return label_scope[i] + s;
        return s;
    }
    void variable(const string& statement) {  // .shared .align 16 .b8 name[1024] = {...}
        vector<string> words;
        string s = statement.substr(0, statement.find('='));
        size_t eq = statement.find('=');
        bool is_extern = false;
        u8 space = 'g';
        u64 align = 1, size = 1;
        int width = 1;
        string n, w;
        for (size_t i = 0; i < s.size();) {
            if (isspace(u8(s[i]))) { i++; continue; }
            size_t j = i;
            while (j < s.size() && !isspace(u8(s[j]))) j++;
            words.push_back(s.substr(i, j - i));
            i = j;
        }
        for (size_t i = 0; i < words.size(); i++) {
            w = words[i];
            if (w == ".extern") is_extern = true;
            else if (w == ".shared") space = 's';
            else if (w == ".local") space = 'l';
            else if (w == ".align") align = u64(atoi(words[++i].c_str()));
            else if (w[0] != '.') n += w;
            else if (w != ".global" && w != ".const" && w != ".visible" && w != ".weak") width = bytes_of(w.substr(1));
        }
        align = std::max(align, u64(width));
        size_t open = n.find('[');
        string id = n.substr(0, open);
        for (size_t p = open; p != string::npos; p = n.find('[', p + 1)) size *= u64(atoll(n.c_str() + p + 1));
        size *= u64(width);
        auto place = [&](u64& counter) {
            counter = (counter + align - 1) / align * align;
            u64 p = counter;
            counter += size;
            return p;
        };
        auto& table = kernel ? symbols : module.symbols;
        if (is_extern && space == 's') table[id] = {'x', 0};  // after all others
        else if (space == 's') table[id] = {'s', place(kernel ? kernel->static_shared : module.static_shared)};
        else if (space == 'l') {
            u64 c = u64(kernel->local_bytes);
            table[id] = {'l', place(c)};
            kernel->local_bytes = int((c + 15) / 16 * 16);
        } else {
            module.globals.push_back(std::make_unique<vector<u8>>(size + 16, 0));
            vector<u8>& bytes = *module.globals.back();
            if (eq != string::npos) {
                vector<string> values = braces(trim(statement.substr(eq + 1)));
                for (size_t i = 0; i < values.size() && (i + 1) * size_t(width) <= size; i++) {
                    u64 x = 0;
                    number(values[i], width == 8 && values[i].find('.') != string::npos, false, x);
                    std::memcpy(bytes.data() + i * size_t(width), &x, size_t(width));
                }
            }
            table[id] = {'g', reinterpret_cast<u64>(bytes.data())};
        }
    }
    void entry() {
        skip();
        string n = word();
        auto made = std::make_unique<Kernel>();
        kernel = made.get();
        kernel->name = n;
        kernel->static_shared = module.static_shared;
        scopes.assign(1, {}), immediates.clear(), labels.clear(), symbols.clear(), label_scope.assign(1, ""), loc = -1;
        skip();
        if (text[at] == '(') {
            at++;
            for (const string& p : split(until(')'), ',')) {
                string s = trim(p);
                if (s.empty()) continue;
                size_t last = s.find_last_of(" \t");
                string id = s.substr(last + 1);
                int width = 1, count_ = 1, align = 0;
                std::vector<string> words;
                for (size_t i = 0; i < last;) {
                    size_t j = s.find_first_of(" \t", i);
                    words.push_back(s.substr(i, j - i));
                    i = s.find_first_not_of(" \t", j);
                }
                bool typed = false;
                for (size_t i = 0; i < words.size(); i++) {
                    if (words[i] == ".align") align = atoi(words[++i].c_str());
                    else if (words[i] != ".param" && words[i] != ".ptr" && words[i] != ".global" &&
                             words[i] != ".shared" && words[i] != ".const" && words[i] != ".local" &&
                             words[i][0] == '.' && !typed)
                        width = bytes_of(words[i].substr(1)), typed = true;
                }
                size_t open = id.find('[');
                if (open != string::npos) count_ = atoi(id.c_str() + open + 1), id = id.substr(0, open);
                else align = width;
                align = std::max(align, width);
                int place = (kernel->param_bytes + align - 1) / align * align;
                kernel->params.push_back({place, width * count_});
                kernel->param_bytes = place + width * count_;
                symbols[id] = {'p', u64(place)};
            }
        }
        while (skip(), text[at] != '{') { if (text[at] == ';') { at++; kernel = nullptr; return; } to_end_of_line(); }
        body();
        finish();
        module.kernels[n] = std::move(made);
        kernel = nullptr;
    }
    void body() {
        size_t open = at;
        int open_line = line;
        // Labels first, as branches go forward and scopes of labels are by braces.
        for (int pass = 0; pass < 2; pass++) {
            at = open, line = open_line;
            int depth = 0, scope = 0;
            label_scope.assign(1, "");
            do {
                skip();
                start_line = line;
                if (text[at] == '{') {
                    at++, depth++;
                    if (depth > 1) {
                        label_scope.push_back(std::to_string(++scope) + ":");
                        if (pass) scopes.push_back({});
                    }
                    continue;
                }
                if (text[at] == '}') {
                    at++, depth--;
                    if (depth) { label_scope.pop_back(); if (pass) scopes.pop_back(); }
                    continue;
                }
                if (text[at] == '.') {
                    size_t a = at;
                    string d = word();
                    if (d == ".loc") { string s = to_end_of_line(); if (pass) locate(s); }
                    else if (d == ".file") to_end_of_line();
                    else if (d == ".pragma") until(';');
                    else if (d == ".reg") {
                        string s = trim(until(';'));
                        size_t e = s.find_first_of(" \t");
                        if (pass) declare(s.substr(1, e - 1), s.substr(e));
                    } else { at = a; string s = until(';'); if (pass) variable(s); }
                    continue;
                }
                size_t a = at;
                string w = word();
                size_t b = at;
                while (b < text.size() && (text[b] == ' ' || text[b] == '\t')) b++;
                if (!w.empty() && text[b] == ':' && text[b + 1] != ':') {
                    at = b + 1;
                    labels[label_scope.back() + w] = pass ? int(kernel->code.size()) : 0;
                    continue;
                }
                at = a;
                string s = until(';');
                if (pass && !trim(s).empty()) instruction(s);
            } while (depth && at < text.size());
        }
    }
    void locate(const string& s) {  // file line column, function_name ..., inlined_at file line column
        int f = 0, l = 0, g = 0, m = 0;
        sscanf(s.c_str(), "%d %d", &f, &l);
        size_t i = s.find("inlined_at");
        if (i != string::npos) sscanf(s.c_str() + i + 10, "%d %d", &g, &m);
        kernel->lines.push_back({f, l, g, m});
        loc = int(kernel->lines.size()) - 1;
    }
    void name_lines() {  // the files come last
        auto base = [&](int n) {
            string x = files.count(n) ? files[n] : "?";
            return x.substr(x.find_last_of('/') + 1);
        };
        for (auto& [n, k] : module.kernels)
            for (auto [f, l, g, m] : k->lines)
                k->locs.push_back(base(f) + ":" + std::to_string(l) +
                                  (g ? " in " + base(g) + ":" + std::to_string(m) : ""));
    }
    // Immediates, places of extern shared memory, targets, and where lanes meet again.
    void finish() {
        guard = -1, start_line = line, name = "exit";
        emit(nothing, CONTROL).flow = EXIT;
        kernel->constants.assign(size_t(kernel->arena), 0xff);
        for (auto& [key, place] : immediates)
            for (int i = 0; i < 32; i++)
                std::memcpy(kernel->constants.data() + place + i * key.first, &key.second, size_t(key.first));
        for (auto* table : {&symbols, &module.symbols})
            for (auto& [n, s] : *table)
                if (s.space == 'x' && kernel->static_shared) throw Error("extern shared memory beside static: " + n);
        for (Ins& in : kernel->code)
            if (in.flow == BRANCH) {
                if (!labels.count(in.label)) throw Error("no label " + in.label);
                in.target = labels[in.label];
            }
        joins();
    }
    void joins() {
        vector<Ins>& code = kernel->code;
        std::set<int> starts = {0};
        for (int i = 0; i < int(code.size()); i++)
            if (code[size_t(i)].flow == BRANCH || code[size_t(i)].flow == EXIT) {
                starts.insert(i + 1);
                if (code[size_t(i)].flow == BRANCH) starts.insert(code[size_t(i)].target);
            }
        vector<int> first(starts.begin(), starts.end());
        if (first.back() == int(code.size())) first.pop_back();
        int n = int(first.size());
        auto block_of = [&](int pc) {
            return int(std::upper_bound(first.begin(), first.end(), pc) - first.begin()) - 1;
        };
        vector<vector<int>> next(size_t(n) + 1);
        for (int b = 0; b < n; b++) {
            int last = (b + 1 < n ? first[size_t(b) + 1] : int(code.size())) - 1;
            const Ins& in = code[size_t(last)];
            if (in.flow == BRANCH) next[size_t(b)].push_back(block_of(in.target));
            if (in.flow == EXIT) next[size_t(b)].push_back(n);
            if ((in.flow != BRANCH && in.flow != EXIT) || in.pred >= 0)
                next[size_t(b)].push_back(last + 1 < int(code.size()) ? block_of(last + 1) : n);
        }
        vector<vector<bool>> after(size_t(n) + 1, vector<bool>(size_t(n) + 1, true));
        after[size_t(n)].assign(size_t(n) + 1, false);
        after[size_t(n)][size_t(n)] = true;
        for (bool changed = true; changed;) {
            changed = false;
            for (int b = n; b--;) {
                vector<bool> both(size_t(n) + 1, true);
                for (int s : next[size_t(b)])
                    for (int i = 0; i <= n; i++) both[size_t(i)] = both[size_t(i)] && after[size_t(s)][size_t(i)];
                both[size_t(b)] = true;
                if (both != after[size_t(b)]) after[size_t(b)] = both, changed = true;
            }
        }
        for (int b = 0; b < n; b++) {
            int last = (b + 1 < n ? first[size_t(b) + 1] : int(code.size())) - 1;
            if (code[size_t(last)].flow != BRANCH) continue;
            // The nearest of those that all paths pass: the one that has all the others after it.
            int best = -1;
            size_t most = 0;
            for (int i = 0; i < n; i++)
                if (i != b && after[size_t(b)][size_t(i)]) {
                    size_t k = size_t(std::count(after[size_t(i)].begin(), after[size_t(i)].end(), true));
                    if (k > most) most = k, best = i;
                }
            code[size_t(last)].join = best < 0 ? -1 : first[size_t(best)];
        }
    }

    void read() {
        for (skip(); at < text.size(); skip()) {
            start_line = line;
            if (text[at] != '.') {
                name = word();
                throw Error("line " + std::to_string(line) + ": unexpected " + name + text[at]);
            }
            size_t a = at;
            string d = word();
            if (d == ".file") {
                string s = to_end_of_line();
                size_t q = s.find('"');
                files[atoi(s.c_str())] = s.substr(q + 1, s.find('"', q + 1) - q - 1);
            } else if (d == ".version" || d == ".target" || d == ".address_size" || d == ".loc") to_end_of_line();
            else if (d == ".section") { while (text[at] != '{') { line += text[at] == '\n'; at++; } skip_braces(); }
            else if (d == ".visible" || d == ".weak" || d == ".extern") {
                skip();
                size_t b = at;
                string e = word();
                if (e == ".entry") entry();
                else if (e == ".func") function();
                else { at = b; variable(d + " " + until(';')); }
            } else if (d == ".entry") entry();
            else if (d == ".func") function();
            else { at = a; variable(until(';')); }
        }
        name_lines();
    }
    void function() {  // a device function: calls are not known, so its body is of no use
        while (text[at] != '{' && text[at] != ';') { line += text[at] == '\n'; at++; }
        if (text[at] == ';') at++; else skip_braces();
    }
};

// ---- turns ----------------------------------------------------------------------------------------------------------

void Warp::pop() {
    while (true) {
        if (stack.empty()) { active = 0; return; }
        Entry e = stack.back();
        stack.pop_back();
        pc = e.pc, join = e.join, active = e.mask & alive;
        if (active && pc != join) return;
    }
}

// Until a barrier or the end. False where the block cannot go on.
bool Warp::run() {
    const vector<Ins>& code = launch->kernel->code;
    u64 n = 0, lanes = 0, *by_class = launch->by_class;
    bool going = true;
    while (active && waiting < 0 && going) {
        const Ins& in = code[size_t(pc)];
        u32 m = active;
        if (in.pred >= 0) m &= in.negated ? ~pred(in.pred) : pred(in.pred);
        n++, by_class[in.cls]++, lanes += u32(__builtin_popcount(m));
        if (__builtin_expect(in.flow == NEXT, 1)) {
            if (m) {
                if (__builtin_expect(in.converged && m != FULL, 0))
                    find("converged", in, 0, "executed by a part of the warp: lanes " + hex(m));
                in.run(*this, in, m);
            }
            pc++;
        } else if (in.flow == BRANCH) {
            u32 stay = active & ~m;
            if (!m) pc++;
            else if (!stay) pc = in.target;
            else {
                int after = pc + 1, meet = in.join;
                if (meet >= 0 && meet != join) stack.push_back({meet, join, active});
                else if (meet < 0) meet = -1;
                if (after != meet) stack.push_back({after, meet, stay});
                if (in.target != meet) pc = in.target, join = meet, active = m;
                else pop();
            }
        } else if (in.flow == EXIT) {
            alive &= ~m, active &= ~m;
            pc++;
            if (!active) pop();
        } else if (in.flow == TRAP) {
            if (m) { find("trap", in, __builtin_ctz(m), "trap"); going = false; }
            pc++;
        } else {
            pc++;
            if (m && m != alive)
                find("barrier", in, __builtin_ctz(alive & ~m),
                     "reached by a part of the warp: lanes " + hex(m) + " of " + hex(alive));
            if (m) {
                Block::Barrier& b = block->barriers[in.n & 15];
                b.arrived |= 1u << id, b.threads = in.size, b.in = &in;
                if (in.flow == BARRIER) waiting = in.n & 15;
            }
        }
        while (active && pc == join) pop();
        if (n + executed > launch->limit) { find("limit", in, 0, "more instructions than allowed"); going = false; }
    }
    if (!active && going) {
        if (!copies.empty()) commit_copies(*this, code[0], FULL);
        finish_copies(0);
        if (!products.empty()) wgmma_commit(*this, code[0], FULL);
        finish_products(0);
    }
    executed += n;
    launch->instructions += n, launch->lanes += lanes;
    return going;
}

// Lets go whoever waits at a complete barrier.
bool Block::release() {
    bool some = false;
    u32 there = 0;
    for (Warp& w : warps) if (w.active) there |= 1u << w.id;
    for (int i = 0; i < 16; i++) {
        Barrier& b = barriers[i];
        if (!b.arrived) continue;
        bool complete = b.threads ? 32 * __builtin_popcount(b.arrived) >= b.threads : (there & ~b.arrived) == 0;
        if (!complete) continue;
        int wanted = b.threads ? b.threads / 32 : int(warps.size());
        if (__builtin_popcount(b.arrived) < wanted) {
            Warp& w = warps[size_t(__builtin_ctz(b.arrived))];
            w.find("barrier", *b.in, 0,
                   "reached by a part of the block: warps " + hex(b.arrived) + ", others have exited");
        }
        u32 joint[32];
        for (size_t u = 0; u < warps.size(); u++) {
            joint[u] = 0;
            for (u32 r = b.arrived; r; r &= r - 1) joint[u] = std::max(joint[u], known[__builtin_ctz(r)][u]);
            if (b.arrived >> u & 1) joint[u] = std::max(joint[u], time[u] + 1);
        }
        for (u32 r = b.arrived; r; r &= r - 1) {
            int w = __builtin_ctz(r);
            std::copy(joint, joint + warps.size(), known[w]);
            time[w]++, now = std::max(now, time[w]);
            if (warps[size_t(w)].waiting == i) warps[size_t(w)].waiting = -1;
        }
        b = Barrier();
        launch.barriers++;
        some = true;
    }
    return some;
}

void Block::start(u32 x, u32 y, u32 z) {
    const Kernel& k = *launch.kernel;
    at[0] = x, at[1] = y, at[2] = z;
    std::fill(shared.begin(), shared.end(), 0xff);
    start_time = ++now;
    u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
    for (Warp& w : warps) {
        u32 in_warp = std::min(32u, threads - u32(w.id) * 32);
        w.pc = 0, w.join = -1, w.waiting = -1, w.executed = 0;
        w.alive = w.active = in_warp == 32 ? FULL : (1u << in_warp) - 1;
        w.stack.clear(), w.copies.clear(), w.copy_groups.clear(), w.products.clear(), w.product_groups.clear();
        time[w.id] = start_time, fence_time[w.id] = 0;
        for (size_t u = 0; u < warps.size(); u++) known[w.id][u] = start_time;
        for (auto& [name, r] : k.special)
            for (u32 lane = 0; lane < 32; lane++) {
                u32 t = u32(w.id) * 32 + lane, axis = u32(name.back() - 'x'), v = 0;
                u32 tid[3] = {t % launch.block[0], t / launch.block[0] % launch.block[1],
                              t / launch.block[0] / launch.block[1]};
                if (!name.rfind("%tid", 0)) v = tid[axis];
                else if (!name.rfind("%ntid", 0)) v = launch.block[axis];
                else if (!name.rfind("%ctaid", 0)) v = at[axis];
                else if (!name.rfind("%nctaid", 0)) v = launch.grid[axis];
                else if (name == "%laneid") v = lane;
                else if (name == "%warpid") v = u32(w.id);
                else if (name == "%lanemask_lt") v = (1u << lane) - 1;
                else if (name == "%lanemask_le") v = u32((u64(2) << lane) - 1);
                else if (name == "%lanemask_gt") v = ~u32((u64(2) << lane) - 1);
                else if (name == "%lanemask_ge") v = ~((1u << lane) - 1);
                else v = 1u << lane;
                w.reg<u32>(r)[lane] = v;
            }
    }
    for (Barrier& b : barriers) b = Barrier();
    for (Cell& c : cells) c.pending = 0, c.reading = 0;
}

bool Block::run() {
    while (true) {
        bool left = false;
        for (size_t i = 0; i < warps.size(); i++) {
            Warp& w = warps[launch.reverse ? warps.size() - 1 - i : i];
            if (w.active && w.waiting < 0 && !w.run()) return false;
            left = left || w.active;
        }
        if (!left) break;
        if (!release()) {
            bool can = false;
            for (Warp& w : warps) can = can || (w.active && w.waiting < 0);
            if (can) continue;
            for (Warp& w : warps)
                if (w.active) {
                    w.find("barrier", *barriers[w.waiting].in, 0,
                           "waits for ever: warps " + hex(barriers[w.waiting].arrived) + " are there");
                    return false;
                }
        }
    }
    return true;
}

// ---- for ctypes -----------------------------------------------------------------------------------------------------

static string quoted(const string& s) {
    string r = "\"";
    for (char c : s) { if (c == '"' || c == '\\') r += '\\'; r += c < ' ' ? ' ' : c; }
    return r + "\"";
}

#pragma GCC visibility push(default)
extern "C" {

constexpr int ABI_VERSION = 1;  // of what follows; kernels/compiled/machine_library.py expects the same

int ptx_abi_version() { return ABI_VERSION; }

struct Request {
    u32 grid[3], block[3];
    u64 dynamic_shared, limit;
    u32 late, reverse, check, n_args, n_ranges, padding;
    const void* const* args;      // as for cuLaunchKernel: where each parameter's bytes are
    const u64* ranges;            // lo, hi of each
    const char* const* names;     // of each range
};

static char* copied(const string& s) {
    char* p = static_cast<char*>(malloc(s.size() + 1));
    std::memcpy(p, s.c_str(), s.size() + 1);
    return p;
}
void ptx_free(char* p) { free(p); }

// The module, or null and what is wrong.
void* ptx_load(const char* text, char** error) {
    auto m = std::make_unique<Module>();
    string s(text);
    try {
        Reader(*m, s).read();
    } catch (const std::exception& e) { *error = copied(e.what()); return nullptr; }
    return m.release();
}
void ptx_unload(void* m) { delete static_cast<Module*>(m); }

// name, then the bytes of each parameter; of one kernel a line.
char* ptx_kernels(void* module) {
    string s;
    for (auto& [n, k] : static_cast<Module*>(module)->kernels) {
        s += n;
        for (auto& p : k->params) s += " " + std::to_string(p.size);
        s += "\n";
    }
    return copied(s);
}

// Runs a grid. Findings and counters as JSON, or {"error": ...}.
char* ptx_run(void* module, const char* name, const Request* q) {
    Module& m = *static_cast<Module*>(module);
    auto it = m.kernels.find(name);
    if (it == m.kernels.end()) return copied("{\"error\": \"no such kernel\"}");
    Kernel& k = *it->second;
    if (q->n_args != k.params.size())
        return copied("{\"error\": \"the kernel takes " + std::to_string(k.params.size()) + " parameters\"}");
    Launch l;
    l.kernel = &k;
    std::copy(q->grid, q->grid + 3, l.grid);
    std::copy(q->block, q->block + 3, l.block);
    l.late = q->late, l.reverse = q->reverse, l.check = q->check, l.limit = q->limit ? q->limit : ~u64(0);
    l.shared_bytes = k.static_shared + q->dynamic_shared;
    l.params.assign(size_t(k.param_bytes) + 8, 0);
    for (u32 i = 0; i < q->n_args; i++)
        std::memcpy(l.params.data() + k.params[i].at, q->args[i], size_t(k.params[i].size));
    for (u32 i = 0; i < q->n_ranges; i++)
        if (q->ranges[2 * i] < q->ranges[2 * i + 1])
            l.ranges.push_back({q->ranges[2 * i], q->ranges[2 * i + 1], q->names[i]});
    for (auto& g : m.globals) {
        u64 a = reinterpret_cast<u64>(g->data());
        l.ranges.push_back({a, a + g->size(), "a variable of the module"});
    }
    std::sort(l.ranges.begin(), l.ranges.end(), [](const Range& a, const Range& b) { return a.lo < b.lo; });
    for (Ins& in : k.code) in.hit = 0, in.sectors = in.used = in.cycles = in.ideal = 0;

    Block b(l);
    u32 threads = l.block[0] * l.block[1] * l.block[2];
    if (!threads || threads > 1024) return copied("{\"error\": \"a block has 1 to 1024 threads\"}");
    b.shared.resize(l.shared_bytes);
    b.cells.resize(l.check ? l.shared_bytes / u64(k.grain) + 1 : 0);
    b.warps.resize((threads + 31) / 32);
    for (size_t i = 0; i < b.warps.size(); i++) {
        Warp& w = b.warps[i];
        w.block = &b, w.launch = &l, w.id = int(i);
        w.registers_.resize(k.constants.size() + 64);
        w.registers = reinterpret_cast<u8*>((reinterpret_cast<u64>(w.registers_.data()) + 63) / 64 * 64);
        std::copy(k.constants.begin(), k.constants.end(), w.registers);
        w.local.assign(size_t(k.local_bytes) * 32, 0xff);
    }
    for (u32 z = 0; z < l.grid[2]; z++)
        for (u32 y = 0; y < l.grid[1]; y++)
            for (u32 x = 0; x < l.grid[0]; x++) {
                b.start(x, y, z);
                l.blocks++;
                if (!b.run() && ++l.failed_blocks >= 4) goto done;
            }
done:
    string s = "{\"findings\": [";
    bool first = true;
    for (auto& [key, f] : l.findings) {
        s += string(first ? "" : ", ") + "{\"kind\": " + quoted(f.kind) + ", \"text\": " + quoted(f.text) +
             ", \"instruction\": " + quoted(f.name) + ", \"line\": " + std::to_string(f.line) +
             ", \"where\": " + quoted(f.where) + ", \"block\": [" + std::to_string(f.block[0]) + ", " +
             std::to_string(f.block[1]) + ", " + std::to_string(f.block[2]) + "], \"warp\": " + std::to_string(f.warp) +
             ", \"lane\": " + std::to_string(f.lane) + ", \"count\": " + std::to_string(f.count) + "}";
        first = false;
    }
    s += "], \"slow\": [";  // instructions that ask for sectors which they do not use, or for the same bank
    first = true;
    for (const Ins& in : k.code) {
        if (in.used * 10 >= in.sectors * 32 * 9 && in.cycles <= in.ideal) continue;
        s += string(first ? "" : ", ") + "{\"line\": " + std::to_string(in.line) +
             ", \"instruction\": " + quoted(in.name) +
             ", \"where\": " + quoted(in.loc < 0 ? "" : k.locs[size_t(in.loc)]) +
             ", \"sectors\": " + std::to_string(in.sectors) + ", \"bytes\": " + std::to_string(in.used) +
             ", \"cycles\": " + std::to_string(in.cycles) + ", \"ideal_cycles\": " + std::to_string(in.ideal) + "}";
        first = false;
    }
    s += "], \"counters\": {";
    auto number = [&](const char* n, u64 x) { s += string("\"") + n + "\": " + std::to_string(x) + ", "; };
    number("blocks", l.blocks); number("instructions", l.instructions); number("lanes", l.lanes);
    for (int i = 0; i < CLASSES; i++) number((string("instructions.") + CLASS_NAMES[i]).c_str(), l.by_class[i]);
    number("multiply_adds", l.macs);
    number("loads", l.loads); number("load_sectors", l.load_sectors); number("load_bytes", l.load_bytes);
    number("stores", l.stores); number("store_sectors", l.store_sectors); number("store_bytes", l.store_bytes);
    number("shared_accesses", l.shared_accesses);
    number("shared_ideal_cycles", l.shared_ideal);
    number("shared_cycles", l.shared_cycles);
    s += "\"barriers\": " + std::to_string(l.barriers) + "}}";
    return copied(s);
}
}
#pragma GCC visibility pop

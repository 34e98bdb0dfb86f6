// Loads, stores and atomic instructions.
#include "combine.h"
#include "instructions.h"
#include "machine.h"

// n elements of `size` bytes, each in a register of o with its width; o is -1 for one that is thrown away.
static void load(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    unsigned size = unsigned(in.size), all = unsigned(in.n) * size;
    count_access(w, in, a, mask, all, false);
    for (int lane : Lanes(mask)) {
        const u8* from = w.reach(in, a[lane], all, lane, Access::load);
        for (int j = 0; j < in.n; j++) {
            if (in.o[j] < 0) continue;
            u64 value = 0;
            if (from) std::memcpy(&value, from + unsigned(j) * size, size);
            if (in.sign && size < 8) value = u64(s64(value << (64 - 8 * size)) >> (64 - 8 * size));
            w.set(in.o[j], in.width[j], lane, value);
        }
    }
}

static void store(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    unsigned size = unsigned(in.size), all = unsigned(in.n) * size;
    count_access(w, in, a, mask, all, true);
    for (int lane : Lanes(mask)) {
        u8 made[40];
        for (int j = 0; j < in.n; j++) {
            u64 value = w.get(in.o[j], in.width[j], lane);
            std::memcpy(made + unsigned(j) * size, &value, 8);
        }
        if (u8* to = w.reach(in, a[lane], all, lane, Access::store, made)) std::memcpy(to, made, all);
    }
}

// Takes an opcode's memory order, scope and cache hints, which change nothing here, and returns the state space.
static Space take_space(Opcode& op) {
    op.drop({"volatile", "relaxed", "acquire", "release", "acq_rel", "weak", "gpu", "cta", "cluster", "sys", "nc", "mmio"});
    op.drop_prefix("L1::");
    op.drop_prefix("L2::");
    string s = op.take_any({"global", "shared", "shared::cta", "shared::cluster", "param", "local", "const"});
    if (s == "global" || s == "const") return Space::global;
    if (s.empty()) return Space::generic;
    return s == "param" ? Space::param : s == "local" ? Space::local : Space::shared;
}

static void look_after(Builder& b, Space space, int bytes) {  // races are told apart by so many bytes
    if (space == Space::shared || space == Space::generic) b.kernel.grain = std::min(b.kernel.grain, bytes);
}

static void read_access(Builder& b, Opcode op, Operands a) {
    bool is_load = op.take_first()[0] == 'l';
    bool hint = op.take("L2::cache_hint");
    Space space = take_space(op);
    op.drop({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
    int n = op.take("v2") ? 2 : op.take("v4") ? 4 : 1;
    string type = op.take_last();
    op.end();
    if (hint) a.pop_back();
    if (a.size() != 2) throw op.unknown();
    vector<string> registers = braces(a[is_load ? 0 : 1]);
    if (int(registers.size()) != n) throw op.unknown();
    int size = bytes_of(type), o[4], width[4];
    for (int i = 0; i < n; i++) {
        const string& name = registers[size_t(i)];
        const Register* r = b.lookup(name);
        width[i] = r ? r->width : std::max(size, 2);
        if (name == "_") o[i] = -1;
        else o[i] = is_load ? b.result(name, width[i]) : b.source(name, width[i], type);
    }
    Address address = b.address(a[is_load ? 1 : 0], space);
    Class cls = space == Space::shared ? Class::shared : space == Space::param ? Class::move : Class::global;
    Instruction& in = b.emit(is_load ? load : store, cls);
    in.space = space, in.n = n, in.size = size, in.sign = type[0] == 's', in.write = !is_load, in.address[0] = address;
    std::copy(o, o + n, in.o);
    std::copy(width, width + n, in.width);
    look_after(b, space, n * size);
}

// ---- atomic instructions ----

// o: what was there or -1, then x; of a compare-and-swap y after it. n elements next to each other: old ones first.
template <class T> static void atomic(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    unsigned all = unsigned(in.n) * sizeof(T);
    count_access(w, in, a, mask, all, true);
    for (int lane : Lanes(mask)) {
        u8* p = w.reach(in, a[lane], all, lane, Access::atomic);
        for (int j = 0; p && j < in.n; j++) {
            T old, x = w.reg<T>(in.o[in.n + j])[lane];
            T y = in.combine == Combine::compare_swap ? w.reg<T>(in.o[2])[lane] : x;
            std::memcpy(&old, p + unsigned(j) * sizeof(T), sizeof(T));
            T made = combine(in.combine, old, x, y);
            std::memcpy(p + unsigned(j) * sizeof(T), &made, sizeof(T));
            if (in.o[j] >= 0) w.reg<T>(in.o[j])[lane] = old;
        }
    }
}

static Run atomic_of(const string& type, Combine op) {
    bool bitwise = op == Combine::bit_and || op == Combine::bit_or || op == Combine::bit_xor;
    bool any_bits = bitwise || op == Combine::exchange || op == Combine::compare_swap;
    if (type == "b16") return op == Combine::compare_swap || op == Combine::exchange ? atomic<u16> : nullptr;
    if (type == "b32") return any_bits ? atomic<u32> : nullptr;
    if (type == "b64") return any_bits ? atomic<u64> : nullptr;
    if (type == "u32") return bitwise ? nullptr : atomic<u32>;
    if (any_bits) return nullptr;
    if (type == "u64") return atomic<u64>;
    if (type == "s32") return atomic<s32>;
    if (type == "s64") return atomic<s64>;
    if (op != Combine::add) return nullptr;
    if (type == "f32") return atomic<float>;
    if (type == "f64") return atomic<double>;
    if (type == "f16") return atomic<f16>;
    if (type == "bf16") return atomic<bf16>;
    if (type == "f16x2") return atomic<Two<f16>>;
    return type == "bf16x2" ? atomic<Two<bf16>> : nullptr;
}

static void read_atomic(Builder& b, Opcode op, Operands a) {
    static const std::map<string, Combine> KINDS = {
        {"add", Combine::add},       {"min", Combine::min},       {"max", Combine::max},
        {"and", Combine::bit_and},   {"or", Combine::bit_or},     {"xor", Combine::bit_xor},
        {"exch", Combine::exchange}, {"cas", Combine::compare_swap}, {"inc", Combine::increment},
        {"dec", Combine::decrement}};
    bool returns = op.take_first() == "atom", hint = op.take("L2::cache_hint");
    Space space = take_space(op);
    string what = op.take_any({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
    op.drop({"noftz"});
    int n = op.take("v2") ? 2 : op.take("v4") ? 4 : 1;
    string type = op.take_last();
    op.end();
    if (hint) a.pop_back();
    if (!returns) a.insert(a.begin(), "_");
    if (what.empty() || a.size() != (what == "cas" ? 4 : 3)) throw op.unknown();
    vector<string> old = returns ? braces(a[0]) : vector<string>(size_t(n), "_"), x = braces(a[2]);
    Combine combine = KINDS.at(what);
    if (int(old.size()) != n || int(x.size()) != n) throw op.unknown();
    int w = bytes_of(type), o[8];
    for (int i = 0; i < n; i++) {
        o[i] = old[size_t(i)] == "_" ? -1 : b.result(old[size_t(i)], w);
        o[n + i] = b.source(x[size_t(i)], w, type);
    }
    if (what == "cas") o[2] = b.source(a[3], w, type);
    Address address = b.address(a[1], space);
    Instruction& in = b.emit(atomic_of(type, combine), space == Space::shared ? Class::shared : Class::global);
    std::copy(o, o + 8, in.o);
    in.space = space, in.n = n, in.combine = combine, in.write = true, in.address[0] = address;
    look_after(b, space, w);
}

void add_access(ReadTable& t) {
    for (auto what : {"ld", "ldu", "st"}) t[what] = read_access;
    for (auto what : {"atom", "red"}) t[what] = read_atomic;
}

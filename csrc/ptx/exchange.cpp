// Between the lanes of a warp.
#include "instructions.h"
#include "machine.h"

// The lanes that an instruction names by a mask must all run it.
static void check_members(Warp& w, const Instruction& in, u32 mask, int members) {
    u32 named = w.reg<u32>(members)[__builtin_ctz(mask)], missing = named & w.alive & ~mask;
    if (missing)
        w.find("converged", in, __builtin_ctz(missing), "executed without a lane that it names: lanes " + hex(mask) +
               " of " + hex(named));
}

static void shuffle(Warp& w, const Instruction& in, u32 mask) {  // o: d, p or -1, a, b, c, members
    u32 *d = w.reg<u32>(in.o[0]), *b = w.reg<u32>(in.o[3]), *c = w.reg<u32>(in.o[4]), a[32], inside = 0;
    std::memcpy(a, w.reg<u32>(in.o[2]), sizeof a);
    check_members(w, in, mask, in.o[5]);
    for (int i : Lanes(mask)) {
        u32 lane = u32(i), segment = c[i] >> 8 & 31, clamp = c[i] & 31, n = b[i] & 31, from;
        u32 limit = (lane & segment) | (clamp & ~segment);
        if (in.kind == 'b') from = lane ^ n;
        else if (in.kind == 'd') from = lane + n;
        else if (in.kind == 'u') from = lane - n;
        else from = (lane & segment) | (n & ~segment);
        bool ok = in.kind == 'u' ? s32(from) >= s32(limit) : from <= limit;
        if (!ok) from = lane;
        inside |= u32(ok) << lane;
        if (!(mask >> (from & 31) & 1))
            w.find("converged", in, i, "reads from a lane that is not active: " + std::to_string(from));
        d[i] = a[from & 31];
    }
    if (in.o[1] >= 0) { u32& p = w.pred(in.o[1]); p = (p & ~mask) | inside; }
}

static void read_shuffle(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.drop({"sync", "b32"});
    string kind = op.take_any({"bfly", "down", "up", "idx"});
    op.end();
    if (kind.empty() || a.size() != 5) throw op.unknown();
    vector<string> d = split(a[0], '|');
    int o[6] = {b.result(trim(d[0]), 4), d.size() > 1 ? b.predicate(trim(d[1])) : -1};
    for (size_t i = 1; i < 5; i++) o[i + 1] = b.source(a[i], 4);
    Instruction& in = b.emit(shuffle, Class::shuffle);
    std::copy(o, o + 6, in.o);
    in.kind = kind[0];
}

template <class T> static T combined(Combine op, T x, T y) {
    switch (op) {
        case Combine::add: return T(x + y);
        case Combine::min: return std::min(x, y);
        case Combine::max: return std::max(x, y);
        case Combine::bit_and: return T(x & y);
        case Combine::bit_or: return T(x | y);
        default: return T(x ^ y);
    }
}

template <class T> static void reduce(Warp& w, const Instruction& in, u32 mask) {  // o: d, a, members
    const T* a = w.reg<T>(in.o[1]);
    check_members(w, in, mask, in.o[2]);
    T x = a[__builtin_ctz(mask)];
    for (int i : Lanes(mask & (mask - 1))) x = combined(in.combine, x, a[i]);
    for (int i : Lanes(mask)) w.reg<T>(in.o[0])[i] = x;
}

static void read_reduce(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.take("sync");
    static const std::map<string, Combine> KINDS = {
        {"add", Combine::add},     {"min", Combine::min},   {"max", Combine::max},
        {"and", Combine::bit_and}, {"or", Combine::bit_or}, {"xor", Combine::bit_xor}};
    string kind = op.take_any({"add", "min", "max", "and", "or", "xor"}), type = op.take_last();
    op.end();
    if (kind.empty()) throw op.unknown();
    Run run = type == "s32" ? reduce<s32> : type == "u32" || type == "b32" ? reduce<u32> : nullptr;
    b.emit_simple(run, Class::shuffle, a, 4, {4, 4}).combine = KINDS.at(kind);
}

static void vote(Warp& w, const Instruction& in, u32 mask) {  // o: d, predicate, members; kind: ballot all uni or any
    u32 p = (in.negated ? ~w.pred(in.o[1]) : w.pred(in.o[1])) & mask;
    check_members(w, in, mask, in.o[2]);
    if (in.kind == 'b') {
        for (int i : Lanes(mask)) w.reg<u32>(in.o[0])[i] = p;
        return;
    }
    bool yes = in.kind == 'l' ? p == mask : in.kind == 'u' ? p == mask || !p : p != 0;
    u32& d = w.pred(in.o[0]);
    d = (d & ~mask) | (yes ? mask : 0);
}

static void read_vote(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.drop({"sync", "pred", "b32"});
    string kind = op.take_any({"ballot", "any", "all", "uni"});
    op.end();
    if (kind.empty() || a.size() != 3) throw op.unknown();
    bool negated = a[1][0] == '!';
    int o[3] = {kind == "ballot" ? b.result(a[0], 4) : b.predicate(a[0]), b.predicate(a[1].substr(negated)),
                b.source(a[2], 4)};
    Instruction& in = b.emit(vote, Class::shuffle);
    std::copy(o, o + 3, in.o);
    in.negated = negated, in.kind = kind == "ballot" ? 'b' : kind == "all" ? 'l' : kind == "uni" ? 'u' : 'y';
}

// o: the lanes with this lane's value, that value, members. size: its bytes. kind: any, or all with a predicate in o[3].
static void match(Warp& w, const Instruction& in, u32 mask) {
    check_members(w, in, mask, in.o[2]);
    u32 result[32], same = mask;
    for (int i : Lanes(mask)) {
        result[i] = 0;
        for (int j : Lanes(mask)) result[i] |= u32(w.get(in.o[1], in.size, i) == w.get(in.o[1], in.size, j)) << j;
        same &= result[i];
    }
    for (int i : Lanes(mask)) w.reg<u32>(in.o[0])[i] = in.kind == 'n' ? result[i] : same == mask ? mask : 0;
    if (in.o[3] < 0) return;
    u32& p = w.pred(in.o[3]);
    p = (p & ~mask) | (same == mask ? mask : 0);
}

static void read_match(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.take("sync");
    bool any = op.take("any");
    if (!any && !op.take("all")) throw op.unknown();
    int width = bytes_of(op.take_last());
    op.end();
    vector<string> d = split(a.at(0), '|');
    int o[4] = {b.result(trim(d[0]), 4), b.source(a.at(1), width), b.source(a.at(2), 4),
                d.size() > 1 ? b.predicate(trim(d[1])) : -1};
    Instruction& in = b.emit(match, Class::shuffle);
    std::copy(o, o + 4, in.o);
    in.size = width, in.kind = any ? 'n' : 'l';
}

static void active_mask(Warp& w, const Instruction& in, u32 mask) {
    for (int i : Lanes(mask)) w.reg<u32>(in.o[0])[i] = mask;
}
static void read_active_mask(Builder& b, Opcode, Operands a) {
    int d = b.result(a.at(0), 4);
    b.emit(active_mask, Class::shuffle).o[0] = d;
}

static void elect(Warp& w, const Instruction& in, u32 mask) {  // o: the leader's lane or -1, is it this one, members
    check_members(w, in, mask, in.o[2]);
    int leader = __builtin_ctz(mask);
    if (in.o[0] >= 0) for (int i : Lanes(mask)) w.reg<u32>(in.o[0])[i] = u32(leader);
    u32& p = w.pred(in.o[1]);
    p = (p & ~mask) | 1u << leader;
}
static void read_elect(Builder& b, Opcode op, Operands a) {
    if (op.whole != "elect.sync" || a.size() != 2) throw op.unknown();
    vector<string> d = split(a[0], '|');
    if (d.size() != 2) throw op.unknown();
    int o[3] = {trim(d[0]) == "_" ? -1 : b.result(trim(d[0]), 4), b.predicate(trim(d[1])), b.source(a[1], 4)};
    Instruction& in = b.emit(elect, Class::shuffle);
    std::copy(o, o + 3, in.o);
}

void add_exchange(ReadTable& t) {
    t["shfl"] = read_shuffle;
    t["redux"] = read_reduce;
    t["vote"] = read_vote;
    t["match"] = read_match;
    t["activemask"] = read_active_mask;
    t["elect"] = read_elect;
}

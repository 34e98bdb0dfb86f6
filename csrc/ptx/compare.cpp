// Comparisons, and choices by predicates.
#include "instructions.h"
#include "lanes.h"

#define CMP(NAME, ...) template <class T> struct NAME { static inline bool f(T a, T b) { return __VA_ARGS__; } };
CMP(Eq, a == b) CMP(Ne, a < b || a > b) CMP(Lt, a < b) CMP(Le, a <= b) CMP(Gt, a > b) CMP(Ge, a >= b)
CMP(Equ, !(a < b || a > b)) CMP(Neu, !(a == b)) CMP(Ltu, !(a >= b)) CMP(Leu, !(a > b)) CMP(Gtu, !(a <= b))
CMP(Geu, !(a < b)) CMP(Num, a == a && b == b) CMP(Nan, a != a || b != b)
#undef CMP

// o: the result or -1, its complement or -1, a, b, a predicate that joins by kind (& | ^) or -1. negated: of that.
template <class F, class T> static void compare(Warp& w, const Instruction& in, u32 mask) {
    const T *a = w.reg<T>(in.o[2]), *b = w.reg<T>(in.o[3]);
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= u32(F::f(a[i], b[i])) << i;
    u32 q = ~r;
    if (in.o[4] >= 0) {
        u32 c = in.negated ? ~w.pred(in.o[4]) : w.pred(in.o[4]);
        r = in.kind == '&' ? r & c : in.kind == '|' ? r | c : r ^ c;
        q = in.kind == '&' ? q & c : in.kind == '|' ? q | c : q ^ c;
    }
    if (in.o[0] >= 0) { u32& d = w.pred(in.o[0]); d = (d & ~mask) | (r & mask); }
    if (in.o[1] >= 0) { u32& d = w.pred(in.o[1]); d = (d & ~mask) | (q & mask); }
}

template <template <class> class C> static Run compares(const string& type) {
#define CASE(NAME, T) if (type == NAME) return compare<C<T>, T>;
    CASE("u16", u16) CASE("s16", s16) CASE("b16", u16) CASE("u32", u32) CASE("s32", s32) CASE("b32", u32)
    CASE("u64", u64) CASE("s64", s64) CASE("b64", u64) CASE("f32", float) CASE("f64", double)
#undef CASE
    return nullptr;
}

static Run comparison(const string& c, const string& type) {
    if (c == "eq") return compares<Eq>(type);
    if (c == "ne") return compares<Ne>(type);
    if (c == "lt" || c == "lo") return compares<Lt>(type);
    if (c == "le" || c == "ls") return compares<Le>(type);
    if (c == "gt" || c == "hi") return compares<Gt>(type);
    if (c == "ge" || c == "hs") return compares<Ge>(type);
    if (c == "equ") return compares<Equ>(type);
    if (c == "neu") return compares<Neu>(type);
    if (c == "ltu") return compares<Ltu>(type);
    if (c == "leu") return compares<Leu>(type);
    if (c == "gtu") return compares<Gtu>(type);
    if (c == "geu") return compares<Geu>(type);
    if (c == "num") return compares<Num>(type);
    return c == "nan" ? compares<Nan>(type) : nullptr;
}

static void read_setp(Builder& b, Opcode op, Operands a) {
    op.take_first();
    string type = op.take_last();
    op.take("ftz");
    string c = op.take_any({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
                            "geu", "num", "nan"});
    string join = op.take_any({"and", "or", "xor"});
    op.end();
    vector<string> d = split(a.at(0), '|');
    int w = bytes_of(type);
    auto optional = [&](const string& s) { return s == "_" ? -1 : b.predicate(s); };
    int o[5] = {optional(trim(d[0])), d.size() > 1 ? optional(trim(d[1])) : -1, b.source(a.at(1), w, type),
                b.source(a.at(2), w, type), -1};
    bool negated = !join.empty() && a.at(3)[0] == '!';
    if (!join.empty()) o[4] = b.predicate(a.at(3).substr(negated));
    Instruction& in = b.emit(comparison(c, type), type[0] == 'f' ? Class::floating : Class::integer);
    std::copy(o, o + 5, in.o);
    in.negated = negated, in.kind = join == "and" ? '&' : join == "or" ? '|' : '^';
}

template <class T> static void select(Warp& w, const Instruction& in, u32 mask) {  // o: result, a, b, predicate
    T *d = w.reg<T>(in.o[0]), *a = w.reg<T>(in.o[1]), *b = w.reg<T>(in.o[2]);
    u32 p = w.pred(in.o[3]);
    if (mask == FULL) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) d[i] = p >> i & 1 ? a[i] : b[i];
    } else
        for (int i : Lanes(mask)) d[i] = p >> i & 1 ? a[i] : b[i];
}

static void read_selp(Builder& b, Opcode op, Operands a) {
    op.take_first();
    string type = op.take_last();
    op.end();
    int w = bytes_of(type), o[4] = {b.result(a.at(0), w), b.source(a.at(1), w, type), b.source(a.at(2), w, type),
                                    b.predicate(a.at(3))};
    Instruction& in = b.emit(w == 2 ? select<u16> : w == 4 ? select<u32> : select<u64>, Class::move);
    std::copy(o, o + 4, in.o);
}

void add_compare(ReadTable& t) {
    t["setp"] = read_setp;
    t["selp"] = read_selp;
}

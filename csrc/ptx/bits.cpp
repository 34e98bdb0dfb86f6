// Bits of integers, and logic of predicates.
#include "instructions.h"
#include "lanes.h"

#define FN(NAME, ...) template <class T> struct NAME { static inline T f __VA_ARGS__ };
FN(And, (T a, T b) { return T(a & b); })
FN(Or, (T a, T b) { return T(a | b); })
FN(Xor, (T a, T b) { return T(a ^ b); })
FN(Not, (T a) { return T(~a); })
#undef FN
template <class T> struct Shl { static T f(T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : T(a << n); } };
template <class T> struct Shr {
    static T f(T a, u32 n) {
        constexpr u32 B = sizeof(T) * 8;
        return n < B ? T(a >> n) : std::is_signed<T>::value ? T(a >> (B - 1)) : T(0);
    }
};
template <class T> struct Bfe {  // a field of `len` bits from `pos` on, its sign extended
    static T f(T a, u32 pos, u32 len) {
        using U = std::make_unsigned_t<T>;
        constexpr u32 B = sizeof(T) * 8;
        pos &= 255, len &= 255;
        if (!len) return 0;
        U last = std::min(pos + len - 1, B - 1), sign = std::is_signed<T>::value ? U(U(a) >> last & 1) : U(0);
        u32 kept = pos < B ? std::min(len, B - pos) : 0;
        U field = pos < B ? U(U(a) >> pos) : U(0), mask = kept >= B ? U(~U(0)) : U((U(1) << kept) - 1);
        return T((field & mask) | (sign ? U(~mask) : U(0)));
    }
};
template <class T> struct Bfi {
    static T f(T a, T b, u32 pos, u32 len) {
        constexpr u32 B = sizeof(T) * 8;
        pos &= 255, len &= 255;
        T mask = len >= B ? T(~T(0)) : T((T(1) << len) - 1);
        return pos >= B ? b : T((b & ~(mask << pos)) | (a & mask) << pos);
    }
};
struct Prmt {
    static u32 f(u32 a, u32 b, u32 selector) {
        u64 both = u64(b) << 32 | a;
        u32 r = 0;
        for (int i = 0; i < 4; i++) {
            u32 s = selector >> 4 * i, x = u32(both >> 8 * (s & 7)) & 255;
            r |= (s & 8 ? (x & 128 ? 255u : 0u) : x) << 8 * i;
        }
        return r;
    }
};
struct Lop3 {
    static u32 f(u32 a, u32 b, u32 c, u32 table) {
        u32 r = 0;
        for (u32 i = 0; i < 8; i++)
            if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return r;
    }
};
struct ShfL { static u32 f(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (n & 31) >> 32); } };
struct ShfR { static u32 f(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); } };
struct Popc { static u32 f(u32 a) { return u32(__builtin_popcount(a)); } };
struct Popc64 { static u32 f(u64 a) { return u32(__builtin_popcountll(a)); } };
struct Clz { static u32 f(u32 a) { return a ? u32(__builtin_clz(a)) : 32; } };
struct Clz64 { static u32 f(u64 a) { return a ? u32(__builtin_clzll(a)) : 64; } };
struct Brev {
    static u32 f(u32 a) {
        u32 r = 0;
        for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
        return r;
    }
};

static void combine_predicates(Warp& w, const Instruction& in, u32 mask) {  // kind: ~ & | ^
    u32 a = w.pred(in.o[1]), b = w.pred(in.o[2]), &d = w.pred(in.o[0]);
    u32 r = in.kind == '~' ? ~a : in.kind == '&' ? a & b : in.kind == '|' ? a | b : a ^ b;
    d = (d & ~mask) | (r & mask);
}

static void read_logic(Builder& b, Opcode op, Operands a) {
    string what = op.take_first(), type = op.take_last();
    op.end();
    if (type != "pred") {
        int w = bytes_of(type);
        if (what == "not") b.emit_simple(of_bits<Not, 1>(type), Class::integer, a, w, {w});
        else
            b.emit_simple(what == "and"  ? of_bits<And, 2>(type)
                          : what == "or" ? of_bits<Or, 2>(type)
                                         : of_bits<Xor, 2>(type),
                          Class::integer, a, w, {w, w});
        return;
    }
    auto side = [&](const string& s) {
        u64 x;
        return parse_number(s, false, false, x) ? b.immediate(4, x ? FULL : 0) : b.predicate(s);
    };
    int d = b.predicate(a.at(0)), x = side(a.at(1)), y = what == "not" ? x : side(a.at(2));
    Instruction& in = b.emit(combine_predicates, Class::integer);
    in.kind = what == "not" ? '~' : what == "and" ? '&' : what == "or" ? '|' : '^';
    in.o[0] = d, in.o[1] = x, in.o[2] = y;
}

static void read_shift(Builder& b, Opcode op, Operands a) {
    bool left = op.take_first() == "shl";
    string type = op.take_last();
    op.end();
    int w = bytes_of(type);
    bool is_signed = type[0] == 's';
    Run run = left        ? (w == 2   ? Run(each<Shl<u16>, u16, u16, u32>)
                             : w == 4 ? Run(each<Shl<u32>, u32, u32, u32>)
                                      : Run(each<Shl<u64>, u64, u64, u32>))
              : is_signed ? (w == 2   ? Run(each<Shr<s16>, s16, s16, u32>)
                             : w == 4 ? Run(each<Shr<s32>, s32, s32, u32>)
                                      : Run(each<Shr<s64>, s64, s64, u32>))
              : w == 2    ? Run(each<Shr<u16>, u16, u16, u32>)
              : w == 4    ? Run(each<Shr<u32>, u32, u32, u32>)
                          : Run(each<Shr<u64>, u64, u64, u32>);
    b.emit_simple(run, Class::integer, a, w, {w, 4});
}

static void read_field(Builder& b, Opcode op, Operands a) {
    string type = op.parts.back();
    int w = bytes_of(type);
    Run run = type == "u32"   ? Run(each<Bfe<u32>, u32, u32, u32, u32>)
              : type == "s32" ? Run(each<Bfe<s32>, s32, s32, u32, u32>)
              : type == "u64" ? Run(each<Bfe<u64>, u64, u64, u32, u32>)
              : type == "s64" ? Run(each<Bfe<s64>, s64, s64, u32, u32>)
                              : nullptr;
    b.emit_simple(run, Class::integer, a, w, {w, 4, 4});
}

static void read_fixed(Builder& b, Opcode op, Operands a) {  // of one type each
    auto emit = [&](Run run, std::initializer_list<int> widths) {
        b.emit_simple(run, Class::integer, a, 4, widths);
    };
    const string& s = op.whole;
    if (s == "prmt.b32") emit(each<Prmt, u32, u32, u32, u32>, {4, 4, 4});
    else if (s == "lop3.b32") emit(each<Lop3, u32, u32, u32, u32, u32>, {4, 4, 4, 4});
    else if (s == "bfi.b32") emit(each<Bfi<u32>, u32, u32, u32, u32, u32>, {4, 4, 4, 4});
    else if (s == "bfi.b64")
        b.emit_simple(each<Bfi<u64>, u64, u64, u64, u32, u32>, Class::integer, a, 8, {8, 8, 4, 4});
    else if (s == "shf.l.wrap.b32") emit(each<ShfL, u32, u32, u32, u32>, {4, 4, 4});
    else if (s == "shf.r.wrap.b32") emit(each<ShfR, u32, u32, u32, u32>, {4, 4, 4});
    else if (s == "popc.b32") emit(each<Popc, u32, u32>, {4});
    else if (s == "popc.b64") emit(each<Popc64, u32, u64>, {8});
    else if (s == "clz.b32") emit(each<Clz, u32, u32>, {4});
    else if (s == "clz.b64") emit(each<Clz64, u32, u64>, {8});
    else if (s == "brev.b32") emit(each<Brev, u32, u32>, {4});
    else throw op.unknown();
}

void add_bits(ReadTable& t) {
    for (auto what : {"and", "or", "xor", "not"}) t[what] = read_logic;
    for (auto what : {"shl", "shr"}) t[what] = read_shift;
    for (auto what : {"prmt", "lop3", "bfi", "shf", "popc", "clz", "brev"}) t[what] = read_fixed;
    t["bfe"] = read_field;
}

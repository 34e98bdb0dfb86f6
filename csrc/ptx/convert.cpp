// Conversions between types, and moves between registers.
#include <limits>

#include "instructions.h"
#include "lanes.h"

#define FN(NAME, ...) template <class T> struct NAME { static inline T f __VA_ARGS__ };
FN(Round, (T a) { return std::nearbyint(a); })
FN(Floor, (T a) { return std::floor(a); })
FN(Ceil, (T a) { return std::ceil(a); })
FN(Trunc, (T a) { return std::trunc(a); })
FN(Saturate, (T a) { return a > 0 ? (a < 1 ? a : T(1)) : T(0); })
#undef FN
template <class D, class S, template <class> class R> struct ToInt {
    static D f(S a) {
        if (a != a) return sizeof(D) == 8 || sizeof(S) == 8 ? D(u64(1) << (8 * sizeof(D) - 1)) : D(0);
        S x = R<S>::f(a);
        if (x <= S(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
        if (x >= S(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
        return D(x);
    }
};
template <class H> struct Widen { static float f(u16 a) { return widen(H{a}); } };
template <class H> struct Narrow { static u16 f(float a) { return narrow(a, H{}).b; } };
template <class H> struct Narrow2 {
    static u32 f(float high, float low) { return narrow(low, H{}).b | u32(narrow(high, H{}).b) << 16; }
};
template <class E> struct Narrow8 {
    static u16 f(float high, float low) { return u16(narrow(low, E{}).b | narrow(high, E{}).b << 8); }
};
template <class E> struct Narrow8From16 {
    static u16 f(u32 a) { return Narrow8<E>::f(widen(f16{u16(a >> 16)}), widen(f16{u16(a)})); }
};
template <class E> struct Widen8 {
    static u32 f(u16 a) { return Narrow2<f16>::f(widen(E{u8(a >> 8)}), widen(E{u8(a)})); }
};
template <class F> struct Relu {  // on what is converted: a NaN stays
    static float positive(float a) { return a < 0 || (a == 0 && std::signbit(a)) ? 0.0f : a; }
    template <class... A> static auto f(A... a) { return F::f(positive(a)...); }
};
struct Tf32 { static u32 f(float a) { return bits<u32>(round_to_tf32(a)); } };
struct Pack32 { static u32 f(u16 a, u16 b) { return a | u32(b) << 16; } };
struct Pack64 { static u64 f(u32 a, u32 b) { return a | u64(b) << 32; } };
struct High16 { static u16 f(u32 a) { return u16(a >> 16); } };
struct High32 { static u32 f(u64 a) { return u32(a >> 32); } };
struct Plus { static u64 f(u64 a, u64 b) { return a + b; } };

// ---- cvt between single types; 8 bits are in registers of 16 ----

template <class D> static Run int_from(const string& from) {
#define CASE(NAME, T, R) if (from == NAME) return each<Cast<D, T>, std::conditional_t<sizeof(D) == 1, u16, D>, R>;
    CASE("u8", u8, u16) CASE("s8", s8, u16) CASE("b8", u8, u16) CASE("u16", u16, u16) CASE("s16", s16, s16)
    CASE("b16", u16, u16) CASE("u32", u32, u32) CASE("s32", s32, s32) CASE("b32", u32, u32) CASE("u64", u64, u64)
    CASE("s64", s64, s64) CASE("b64", u64, u64)
#undef CASE
    return nullptr;
}
static Run int_to_int(const string& to, const string& from) {
    if (to == "u8" || to == "b8") return int_from<u8>(from);
    if (to == "s8") return int_from<s8>(from);
    if (to == "u16" || to == "b16") return int_from<u16>(from);
    if (to == "s16") return int_from<s16>(from);
    if (to == "u32" || to == "b32") return int_from<u32>(from);
    if (to == "s32") return int_from<s32>(from);
    if (to == "u64" || to == "b64") return int_from<u64>(from);
    return to == "s64" ? int_from<s64>(from) : nullptr;
}
static Run int_to_float(const string& to, const string& from) {
#define CASE(NAME, T, R)                                                                \
    if (from == NAME && to == "f32") return each<Cast<float, T>, float, R>;             \
    if (from == NAME && to == "f64") return each<Cast<double, T>, double, R>;
    CASE("u8", u8, u16) CASE("s8", s8, u16) CASE("u16", u16, u16) CASE("s16", s16, s16) CASE("u32", u32, u32)
    CASE("s32", s32, s32) CASE("u64", u64, u64) CASE("s64", s64, s64)
#undef CASE
    return nullptr;
}
template <template <class> class R> static Run float_to_int_(const string& to, const string& from) {
#define CASE(NAME, T)                                                                   \
    if (to == NAME && from == "f32") return each<ToInt<T, float, R>, T, float>;         \
    if (to == NAME && from == "f64") return each<ToInt<T, double, R>, T, double>;
    CASE("u16", u16) CASE("s16", s16) CASE("u32", u32) CASE("s32", s32) CASE("u64", u64) CASE("s64", s64)
#undef CASE
    return nullptr;
}
static Run float_to_int(const string& to, const string& from, const string& rounding) {
    if (rounding == "rzi") return float_to_int_<Trunc>(to, from);
    if (rounding == "rni") return float_to_int_<Round>(to, from);
    if (rounding == "rmi") return float_to_int_<Floor>(to, from);
    return rounding == "rpi" ? float_to_int_<Ceil>(to, from) : nullptr;
}
static Run float_to_float(const string& to, const string& from, const string& rounding) {
    if (to == "f32" && from == "bf16") return each<Widen<bf16>, float, u16>;
    if (to == "f32" && from == "f16") return each<Widen<f16>, float, u16>;
    if (to == "f64" && from == "f32") return each<Cast<double, float>, double, float>;
    if (to == "tf32" && from == "f32") return rounding == "rna" ? each<Tf32, u32, float> : nullptr;
    if (rounding != "rn") return nullptr;
    if (to == "bf16" && from == "f32") return each<Narrow<bf16>, u16, float>;
    if (to == "f16" && from == "f32") return each<Narrow<f16>, u16, float>;
    return to == "f32" && from == "f64" ? each<Cast<float, double>, float, double> : nullptr;
}
static Run round_float(const string& type, const string& rounding, bool ftz, bool sat) {
    if (sat) return of_floats<Saturate, 1>(type, ftz);
    if (rounding == "rni") return of_floats<Round, 1>(type, ftz);
    if (rounding == "rzi") return of_floats<Trunc, 1>(type, ftz);
    if (rounding == "rmi") return of_floats<Floor, 1>(type, ftz);
    if (rounding == "rpi") return of_floats<Ceil, 1>(type, ftz);
    return of_floats<Copied, 1>(type, ftz);
}

// ---- cvt of pairs ----

template <class H> static Run pair_of(bool relu) {
    return relu ? Run(each<Relu<Narrow2<H>>, u32, float, float>) : Run(each<Narrow2<H>, u32, float, float>);
}
template <class E> static Run bytes_of_floats(bool relu) {
    return relu ? Run(each<Relu<Narrow8<E>>, u16, float, float>) : Run(each<Narrow8<E>, u16, float, float>);
}

static bool read_pair(Builder& b, const Opcode& op, const Operands& a, const string& to, const string& from) {
    Opcode rest = op;
    bool relu = rest.take("relu"), satfinite = rest.take("satfinite"), rn = rest.take("rn");
    bool bytes = to == "e4m3x2" || to == "e5m2x2", e4 = to == "e4m3x2" || from == "e4m3x2";
    Run run = nullptr;
    if (!rn || !rest.parts.empty() || bytes != satfinite) return false;
    if (a.size() == 3 && from == "f32") {
        if (to == "bf16x2") run = pair_of<bf16>(relu);
        else if (to == "f16x2") run = pair_of<f16>(relu);
        else if (bytes) run = e4 ? bytes_of_floats<e4m3>(relu) : bytes_of_floats<e5m2>(relu);
        if (run) b.emit_simple(run, Class::move, a, bytes ? 2 : 4, {4, 4}, from);
    } else if (a.size() == 2 && !relu && bytes && from == "f16x2") {
        run = e4 ? each<Narrow8From16<e4m3>, u16, u32> : each<Narrow8From16<e5m2>, u16, u32>;
        b.emit_simple(run, Class::move, a, 2, {4});
    } else if (a.size() == 2 && !relu && to == "f16x2" && (from == "e4m3x2" || from == "e5m2x2")) {
        run = e4 ? each<Widen8<e4m3>, u32, u16> : each<Widen8<e5m2>, u32, u16>;
        b.emit_simple(run, Class::move, a, 4, {2});
    }
    return run != nullptr;
}

static void read_cvt(Builder& b, Opcode op, Operands a) {
    op.take_first();
    string from = op.take_last(), to = op.take_last();
    if (to.find("x2") != string::npos) {
        if (!read_pair(b, op, a, to, from)) throw op.unknown();
        return;
    }
    bool ftz = op.take("ftz"), sat = op.take("sat");
    string rounding = op.take_any({"rn", "rna", "rni", "rzi", "rmi", "rpi"});
    op.end();
    bool from_float = from.find('f') != string::npos, to_float = to.find('f') != string::npos;
    Run run = nullptr;
    if (!from_float && !to_float) run = sat || !rounding.empty() ? nullptr : int_to_int(to, from);
    else if (!from_float) run = rounding == "rn" ? int_to_float(to, from) : nullptr;
    else if (!to_float) run = float_to_int(to, from, rounding);
    else run = to == from ? round_float(to, rounding, ftz, sat) : float_to_float(to, from, rounding);
    if (!run || a.size() != 2) throw op.unknown();

    // Registers may be wider than the types: narrow the source first, and extend the result.
    int from_width = std::max(bytes_of(from), 2), to_width = std::max(bytes_of(to), 2), source, result;
    const Register *s = b.lookup(a[1]), *d = b.lookup(a[0]);
    if (!d || d->width < to_width) throw b.fail("result " + a[0]);
    if (s && s->width > from_width) {
        Instruction& in = b.emit(int_to_int("u" + std::to_string(8 * from_width), "u" + std::to_string(8 * s->width)),
                                 Class::move);
        in.o[1] = s->at, in.sources.push_back(s->at), source = in.o[0] = b.temporary(from_width);
    } else source = b.source(a[1], from_width, from);
    bool widened = d->width > to_width;
    result = widened ? b.temporary(to_width) : b.result(a[0], to_width);
    Instruction& in = b.emit(run, Class::move);
    in.o[0] = result, in.o[1] = source;
    if (!widened) return;
    string kind = to[0] == 's' ? "s" : "u";
    Instruction& up = b.emit(int_to_int(kind + std::to_string(8 * d->width), kind + std::to_string(8 * to_width)),
                             Class::move);
    up.o[0] = d->at, up.o[1] = result, up.results.push_back(d->at);
}

// ---- mov, cvta ----

static void move_predicate(Warp& w, const Instruction& in, u32 mask) {
    u32& d = w.pred(in.o[0]);
    d = (d & ~mask) | (w.pred(in.o[1]) & mask);
}

static void read_mov(Builder& b, Opcode op, Operands a) {
    op.take_first();
    string type = op.take_last();
    op.end();
    if (a.size() != 2) throw op.unknown();
    if (type == "pred") {
        u64 x;
        int from = parse_number(a[1], false, false, x) ? b.immediate(4, x ? FULL : 0) : b.predicate(a[1]);
        int to = b.predicate(a[0]);
        Instruction& in = b.emit(move_predicate, Class::move);
        in.o[0] = to, in.o[1] = from;
        return;
    }
    int w = bytes_of(type);
    if (w == 1) w = 2;
    vector<string> to = braces(a[0]), from = braces(a[1]);
    if (to.size() == 1 && from.size() == 1) {
        Run run = w == 2 ? each<Copied<u16>, u16, u16> : w == 4 ? each<Copied<u32>, u32, u32>
                                                                : each<Copied<u64>, u64, u64>;
        b.emit_simple(run, Class::move, {to[0], from[0]}, w, {w}, type);
    } else if (from.size() == 2) {
        Run run = w == 4 ? Run(each<Pack32, u32, u16, u16>) : Run(each<Pack64, u64, u32, u32>);
        b.emit_simple(run, Class::move, {to[0], from[0], from[1]}, w, {w / 2, w / 2});
    } else if (to.size() == 2) {  // the halves are narrower than the source, so the first cannot overwrite it
        Run low = w == 4 ? Run(each<Cast<u16, u32>, u16, u32>) : Run(each<Cast<u32, u64>, u32, u64>);
        Run high = w == 4 ? Run(each<High16, u16, u32>) : Run(each<High32, u32, u64>);
        if (to[0] != "_") b.emit_simple(low, Class::move, {to[0], from[0]}, w / 2, {w});
        if (to[1] != "_") b.emit_simple(high, Class::move, {to[1], from[0]}, w / 2, {w});
    } else throw op.unknown();
}

static void read_cvta(Builder& b, Opcode op, Operands a) {
    op.take_first();
    bool to = op.take("to");
    string space = op.take_any({"global", "shared", "shared::cta", "local", "const", "param"});
    op.drop({"u64"});
    op.end();
    u64 tag = !space.rfind("shared", 0) ? SHARED_TAG : space == "local" ? LOCAL_TAG : space == "param" ? PARAM_TAG : 0;
    string added = std::to_string(to ? u64(0) - tag : tag);
    b.emit_simple(each<Plus, u64, u64, u64>, Class::move, {a.at(0), a.at(1), added}, 8, {8, 8});
}

static void read_policy(Builder& b, Opcode, Operands a) {  // of caches
    int d = b.result(a.at(0), 8), zero = b.immediate(8, 0);
    Instruction& in = b.emit(each<Copied<u64>, u64, u64>, Class::move);
    in.o[0] = d, in.o[1] = zero;
}

void add_convert(ReadTable& t) {
    t["cvt"] = read_cvt;
    t["mov"] = read_mov;
    t["cvta"] = read_cvta;
    t["createpolicy"] = read_policy;
}

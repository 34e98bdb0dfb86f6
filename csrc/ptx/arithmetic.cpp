// Arithmetic of integers and floating point.
#include "instructions.h"
#include "lanes.h"

#define FN(NAME, ...) template <class T> struct NAME { static inline T f __VA_ARGS__ };
FN(Add, (T a, T b) { return T(a + b); })
FN(Sub, (T a, T b) { return T(a - b); })
FN(Mul, (T a, T b) { return T(a * b); })
FN(Mad, (T a, T b, T c) { return T(a * b + c); })
FN(Neg, (T a) { return T(T(0) - a); })
FN(Abs, (T a) { return a < 0 ? T(-a) : a; })
FN(Min, (T a, T b) { return b < a ? b : a; })
FN(Max, (T a, T b) { return a < b ? b : a; })
// The least number over -1 is itself: the host's division would end the process.
FN(Div, (T a, T b) {
    return !b ? T(~T(0)) : b == T(-1) && std::is_signed_v<T> ? T(std::make_unsigned_t<T>(0) - a) : T(a / b);
})
FN(Rem, (T a, T b) { return !b ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); })
FN(FNeg, (T a) { return -a; })
FN(FAbs, (T a) { return std::fabs(a); })
FN(FDiv, (T a, T b) { return a / b; })
FN(Fma, (T a, T b, T c) { return std::fma(a, b, c); })
// Of -0 and 0, min takes -0 and max takes 0; a NaN loses, or (.NaN) wins.
FN(FMin, (T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; })
FN(FMax, (T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; })
FN(FMinNan, (T a, T b) { return a != a || b != b ? T(NAN) : FMin<T>::f(a, b); })
FN(FMaxNan, (T a, T b) { return a != a || b != b ? T(NAN) : FMax<T>::f(a, b); })
FN(Sqrt, (T a) { return std::sqrt(a); })
FN(Rsqrt, (T a) { return T(1 / std::sqrt(double(a))); })
FN(Rcp, (T a) { return T(1) / a; })
FN(Ex2, (T a) { return std::exp2(a); })
FN(Lg2, (T a) { return std::log2(a); })
FN(Sin, (T a) { return std::sin(a); })
FN(Cos, (T a) { return std::cos(a); })
FN(Tanh, (T a) { return std::tanh(a); })
#undef FN
template <class W, class T> struct MulWide { static W f(T a, T b) { return W(a) * W(b); } };
template <class W, class T> struct MadWide { static W f(T a, T b, W c) { return W(W(a) * W(b) + c); } };
template <class W, class T> struct MulHi { static T f(T a, T b) { return T((W(a) * W(b)) >> (sizeof(T) * 8)); } };
template <class W, class T> struct MadHi {
    static T f(T a, T b, T c) { return T(((W(a) * W(b)) >> (sizeof(T) * 8)) + W(c)); }
};
template <class H> struct Fma16 { static u16 f(u16 a, u16 b, u16 c) { return fma_once(H{a}, H{b}, H{c}).b; } };
struct CopySign { static float f(float a, float b) { return std::copysign(b, a); } };

// .rz, .rm, .rp of fp32: a sum, and what fp64 lost of it, rounded toward zero, down or up.
template <char MODE> static float round_toward(double sum, double lost) {
    float f = float(sum);
    double over = double(f) - sum;  // by how much f is above the exact result
    if (over == 0) over = -lost;
    bool wrong = MODE == 'z' ? (std::signbit(f) ? over < 0 : over > 0) : MODE == 'm' ? over > 0 : over < 0;
    return wrong ? std::nextafterf(f, MODE == 'z' ? 0.0f : MODE == 'm' ? -INFINITY : INFINITY) : f;
}
template <char MODE> struct FmaToward {
    static float f(float a, float b, float c) {
        double product = double(a) * double(b), z = c, sum = product + z, part = sum - product;
        return round_toward<MODE>(sum, std::isfinite(sum) ? (product - (sum - part)) + (z - part) : 0.0);
    }
};
template <char MODE> struct AddToward { static float f(float a, float b) { return FmaToward<MODE>::f(a, 1, b); } };
template <char MODE> struct SubToward { static float f(float a, float b) { return FmaToward<MODE>::f(a, 1, -b); } };
template <char MODE> struct MulToward {
    static float f(float a, float b) { return round_toward<MODE>(double(a) * double(b), 0); }
};
template <char MODE> static Run toward(const string& what) {
    if (what == "add") return each<AddToward<MODE>, float, float, float>;
    if (what == "sub") return each<SubToward<MODE>, float, float, float>;
    if (what == "mul") return each<MulToward<MODE>, float, float, float>;
    return what == "fma" ? Run(each<FmaToward<MODE>, float, float, float, float>) : nullptr;
}

static Run fused(const string& type, bool ftz) {
    if (type == "bf16") return each<Fma16<bf16>, u16, u16, u16, u16>;
    if (type == "f16") return each<Fma16<f16>, u16, u16, u16, u16>;
    if (type == "bf16x2") return each<Packed<Fma16<bf16>>, u32, u32, u32, u32>;
    if (type == "f16x2") return each<Packed<Fma16<f16>>, u32, u32, u32, u32>;
    return of_floats<Fma, 3>(type, ftz);
}

static Run plain_float(const string& what, const string& type, bool ftz, bool nan) {
    if (what == "add") return of_floats<Add, 2>(type, ftz);
    if (what == "sub") return of_floats<Sub, 2>(type, ftz);
    if (what == "mul") return of_floats<Mul, 2>(type, ftz);
    if (what == "min") return nan ? of_floats<FMinNan, 2>(type, ftz) : of_floats<FMin, 2>(type, ftz);
    if (what == "max") return nan ? of_floats<FMaxNan, 2>(type, ftz) : of_floats<FMax, 2>(type, ftz);
    if (what == "neg") return of_floats<FNeg, 1>(type, ftz);
    if (what == "abs") return of_floats<FAbs, 1>(type, ftz);
    return what == "fma" ? fused(type, ftz) : nullptr;
}

static Run special_float(const string& what, const string& type, bool ftz) {
    if (what == "div") return of_floats<FDiv, 2>(type, ftz);
    if (what == "sqrt") return of_floats<Sqrt, 1>(type, ftz);
    if (what == "rsqrt") return of_floats<Rsqrt, 1>(type, ftz);
    if (what == "rcp") return of_floats<Rcp, 1>(type, ftz);
    if (what == "ex2") return of_floats<Ex2, 1>(type, ftz);
    if (what == "lg2") return of_floats<Lg2, 1>(type, ftz);
    if (what == "sin") return of_floats<Sin, 1>(type, ftz);
    if (what == "cos") return of_floats<Cos, 1>(type, ftz);
    return what == "tanh" ? of_floats<Tanh, 1>(type, ftz) : nullptr;
}

static Run plain_int(const string& what, const string& type) {
    if (what == "add") return of_bits<Add, 2>(type);
    if (what == "sub") return of_bits<Sub, 2>(type);
    if (what == "mul") return of_bits<Mul, 2>(type);
    if (what == "mad") return of_bits<Mad, 3>(type);
    if (what == "neg") return of_bits<Neg, 1>(type);
    if (what == "abs") return of_ints<Abs, 1>(type);
    if (what == "min") return of_ints<Min, 2>(type);
    if (what == "max") return of_ints<Max, 2>(type);
    if (what == "div") return of_ints<Div, 2>(type);
    return what == "rem" ? of_ints<Rem, 2>(type) : nullptr;
}

static Run high_half(bool mad, const string& type) {
    using U = unsigned __int128; using S = __int128;
    if (mad && type == "u32") return each<MadHi<u64, u32>, u32, u32, u32, u32>;
    if (mad && type == "s32") return each<MadHi<s64, s32>, s32, s32, s32, s32>;
    if (mad) return nullptr;
    if (type == "u32") return each<MulHi<u64, u32>, u32, u32, u32>;
    if (type == "s32") return each<MulHi<s64, s32>, s32, s32, s32>;
    if (type == "u64") return each<MulHi<U, u64>, u64, u64, u64>;
    return type == "s64" ? Run(each<MulHi<S, s64>, s64, s64, s64>) : nullptr;
}

template <class W, class T> static Run wide(bool mad) {
    return mad ? Run(each<MadWide<W, T>, W, T, T, W>) : Run(each<MulWide<W, T>, W, T, T>);
}
static Run twice_as_wide(bool mad, const string& type) {
    if (type == "u16") return wide<u32, u16>(mad);
    if (type == "s16") return wide<s32, s16>(mad);
    if (type == "u32") return wide<u64, u32>(mad);
    return type == "s32" ? wide<s64, s32>(mad) : nullptr;
}

static void read_arithmetic(Builder& b, Opcode op, Operands a) {
    string what = op.take_first(), type = op.take_last();
    int w = bytes_of(type);
    auto emit = [&](Run run, Class cls) {
        if (a.size() == 2) b.emit_simple(run, cls, a, w, {w}, type);
        else if (a.size() == 3) b.emit_simple(run, cls, a, w, {w, w}, type);
        else b.emit_simple(run, cls, a, w, {w, w, w}, type);
    };
    if (type.find('f') != string::npos) {
        bool ftz = op.take("ftz"), nan = op.take("NaN");
        string rounding = op.take_any({"rn", "approx", "full", "rz", "rm", "rp"});
        op.end();
        if (rounding == "rz" || rounding == "rm" || rounding == "rp") {
            if (type != "f32" || ftz) throw op.unknown();
            Run run = rounding == "rz" ? toward<'z'>(what) : rounding == "rm" ? toward<'m'>(what) : toward<'p'>(what);
            return emit(run, Class::floating);
        }
        Run run = plain_float(what, type, ftz, nan);
        if (run) return emit(run, Class::floating);
        return emit(special_float(what, type, ftz), Class::special);
    }
    string part = op.take_any({"lo", "hi", "wide"});
    op.end();
    bool mad = what == "mad";
    if (part == "hi") return emit(high_half(mad, type), Class::integer);
    if (part != "wide") return emit(plain_int(what, type), Class::integer);
    Run run = twice_as_wide(mad, type);
    if (mad) b.emit_simple(run, Class::integer, a, 2 * w, {w, w, 2 * w});
    else b.emit_simple(run, Class::integer, a, 2 * w, {w, w});
}

static void read_copysign(Builder& b, Opcode op, Operands a) {
    if (op.whole != "copysign.f32") throw op.unknown();
    b.emit_simple(each<CopySign, float, float, float>, Class::floating, a, 4, {4, 4}, "f32");
}

void add_arithmetic(ReadTable& t) {
    for (auto what : {"add", "sub", "mul", "mad", "fma", "min", "max", "div", "rem", "neg", "abs", "sqrt", "rsqrt", "rcp",
                      "ex2", "lg2", "sin", "cos", "tanh"})
        t[what] = read_arithmetic;
    t["copysign"] = read_copysign;
}

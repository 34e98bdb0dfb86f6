// Instructions that work lane by lane: a function of one lane's operands becomes a loop over the lanes.
#pragma once

#include <tuple>

#include "machine.h"

// o: the result, then the sources.
template <class F, class D, class... S, size_t... I>
static inline void each_(Warp& w, const Instruction& in, u32 mask, std::index_sequence<I...>) {
    D* d = w.reg<D>(in.o[0]);
    std::tuple<const S*...> s(w.reg<S>(in.o[1 + I])...);
    if (mask == FULL) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) d[i] = F::f(std::get<I>(s)[i]...);
    } else {
        for (int i = 0; i < 32; i++) if (mask >> i & 1) d[i] = F::f(std::get<I>(s)[i]...);
    }
}
template <class F, class D, class... S> static void each(Warp& w, const Instruction& in, u32 mask) {
    each_<F, D, S...>(w, in, mask, std::index_sequence_for<S...>{});
}

template <class D, class S> struct Cast { static D f(S a) { return D(a); } };
template <class T> struct Copied { static T f(T a) { return a; } };

// F<T> of N operands for the type that is named; null if it is no integer.
template <template <class> class F, size_t... I> static Run ints_(const string& type, std::index_sequence<I...>) {
#define CASE(NAME, T) if (type == NAME) return each<F<T>, T, std::enable_if_t<(I >= 0), T>...>;
    CASE("u16", u16) CASE("s16", s16) CASE("b16", u16) CASE("u32", u32) CASE("s32", s32) CASE("b32", u32)
    CASE("u64", u64) CASE("s64", s64) CASE("b64", u64)
#undef CASE
    return nullptr;
}
template <template <class> class F, int N> static Run of_ints(const string& type) {
    return ints_<F>(type, std::make_index_sequence<N>{});
}
template <template <class> class F, int N> static Run of_bits(string type) {  // where the sign does not matter
    if (type[0] == 's') type[0] = 'u';
    return of_ints<F, N>(type);
}

template <class F> struct Flushed { template <class... A> static float f(A... a) { return flush(F::f(flush(a)...)); } };
template <class F> struct Packed {  // two of 16 bits in 32
    template <class... A> static u32 f(A... a) { return F::f(u16(a)...) | u32(F::f(u16(a >> 16)...)) << 16; }
};
template <class H, class F> struct Sixteen {  // an operation of fp32 that is exact before it is rounded, on 16 bits
    template <class... A> static u16 f(A... a) { return narrow(F::f(widen(H{a})...), H{}).b; }
};

// F<T> of N operands for the type that is named; null if it is no floating point.
template <template <class> class F, size_t... I>
static Run floats_(const string& type, bool ftz, std::index_sequence<I...>) {
    if (type == "f32" && ftz) return each<Flushed<F<float>>, float, std::enable_if_t<(I >= 0), float>...>;
    if (type == "f32") return each<F<float>, float, std::enable_if_t<(I >= 0), float>...>;
    if (type == "f64") return each<F<double>, double, std::enable_if_t<(I >= 0), double>...>;
    if (type == "bf16") return each<Sixteen<bf16, F<float>>, u16, std::enable_if_t<(I >= 0), u16>...>;
    if (type == "f16") return each<Sixteen<f16, F<float>>, u16, std::enable_if_t<(I >= 0), u16>...>;
    if (type == "bf16x2") return each<Packed<Sixteen<bf16, F<float>>>, u32, std::enable_if_t<(I >= 0), u32>...>;
    if (type == "f16x2") return each<Packed<Sixteen<f16, F<float>>>, u32, std::enable_if_t<(I >= 0), u32>...>;
    return nullptr;
}
template <template <class> class F, int N> static Run of_floats(const string& type, bool ftz) {
    return floats_<F>(type, ftz, std::make_index_sequence<N>{});
}

// What an atomic instruction or a reducing copy makes of two values.
#pragma once

#include <algorithm>

#include "kernel.h"

template <class H> struct Two { H low, high; };  // of 16 bits, in 32

template <class T> inline T add(T a, T b) { return T(a + b); }
inline bf16 add(bf16 a, bf16 b) { return narrow(widen(a) + widen(b), bf16{}); }
inline f16 add(f16 a, f16 b) { return narrow(widen(a) + widen(b), f16{}); }
template <class H> inline Two<H> add(Two<H> a, Two<H> b) { return {add(a.low, b.low), add(a.high, b.high)}; }

template <class T> inline T combine(Combine op, T old, T x, T y) {
    if (op == Combine::add) return add(old, x);
    if (op == Combine::exchange) return x;
    if constexpr (std::is_arithmetic<T>::value) {
        if (op == Combine::min) return std::min(old, x);
        if (op == Combine::max) return std::max(old, x);
    }
    if constexpr (std::is_integral<T>::value) {
        if (op == Combine::compare_swap) return old == x ? y : old;
        if (op == Combine::bit_and) return T(old & x);
        if (op == Combine::bit_or) return T(old | x);
        if (op == Combine::bit_xor) return T(old ^ x);
        if (op == Combine::increment) return old >= x ? T(0) : T(old + 1);
        if (op == Combine::decrement) return old == 0 || old > x ? x : T(old - 1);
    }
    return old;
}

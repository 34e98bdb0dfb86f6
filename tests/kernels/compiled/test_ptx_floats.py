"""Floating point and conversions of the PTX machine, lane by lane, against numpy, torch and exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.helpers.ptx_tables import FLOATS, check, pattern, value, width

# ---- floating point -------------------------------------------------------------------------------------------------


def is_nan(bits, kind):
    x = value(bits, kind)
    return bool(x != x)


def both_nan(kind):
    return lambda a, b: is_nan(a, kind) and is_nan(b, kind)


def flushed(function):
    """Return a function of fp32 whose operands and result are 0, with their sign, below 2^-126."""

    def flush(x):
        return np.float32(math.copysign(0.0, x)) if abs(x) < 2.0**-126 else x

    return lambda *operands: flush(np.float32(function(*map(flush, operands))))


def least(a, b):
    if a != a or b != b:
        return b if a != a else a
    return (a if math.copysign(1, a) < 0 else b) if a == b else min(a, b)


def most(a, b):
    if a != a or b != b:
        return b if a != a else a
    return (a if math.copysign(1, a) > 0 else b) if a == b else max(a, b)


def or_nan(function):
    return lambda a, b: math.nan if a != a or b != b else function(a, b)


def fused(a, b, c):
    """Return a b + c of fp32 or fp64, rounded once."""
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)):
        return a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if not exact:
        return a * b + c
    return rounded(exact, type(a))


def rounded(exact, kind):
    """Return a fraction as the nearest number of fp32 or fp64, ties to even."""
    digits, lowest = (24, -149) if kind is np.float32 else (53, -1074)
    step = max(exact.numerator.bit_length() - exact.denominator.bit_length() - digits, lowest)
    if abs(round(exact / Fraction(2) ** step)) >= 2**digits:
        step += 1
    units = round(exact / Fraction(2) ** step)
    return kind(math.copysign(math.inf, units) if abs(units).bit_length() + step > 1024 else math.ldexp(units, step))


def arithmetic(T):
    """Return name -> (function, number of operands) of the exactly rounded instructions of a type."""

    def negative(x):
        return -x

    found = {
        "add{rn}": (lambda a, b: a + b, 2), "sub{rn}": (lambda a, b: a - b, 2), "mul{rn}": (lambda a, b: a * b, 2),
        "min": (least, 2), "max": (most, 2), "min.NaN": (or_nan(least), 2), "max.NaN": (or_nan(most), 2),
        "neg": (negative, 1), "abs": (abs, 1),
    }  # fmt: skip
    if T in ("f32", "f64"):
        found |= {"fma.rn": (fused, 3), "div.rn": (lambda a, b: a / b, 2), "sqrt.rn": (np.sqrt, 1),
                  "rcp.rn": (lambda a: type(a)(1) / a, 1)}  # fmt: skip
    return found


@pytest.mark.parametrize("T", ["f32", "f64", "bf16", "f16"])
def test_arithmetic_of_floating_point(T):
    for name, (function, n) in arithmetic(T).items():
        operands = ", ".join("ABC"[:n])
        check(f"{name.replace('{rn}', '.rn')}.{T} D, {operands};", [T] * n, T, function, both_nan(T))
        if "{rn}" in name:
            check(f"{name.replace('{rn}', '')}.{T} D, {operands};", [T] * n, T, function, both_nan(T))
        if T == "f32":
            ftz = name.replace("{rn}", ".rn").replace("min.NaN", "min.ftz.NaN").replace("max.NaN", "max.ftz.NaN")
            ftz = ftz if "NaN" in ftz else f"{ftz}.ftz"
            check(f"{ftz}.f32 D, {operands};", [T] * n, T, flushed(function), both_nan(T))


@pytest.mark.parametrize("T", ["bf16", "f16"])
def test_arithmetic_of_pairs(T):
    """Each half as if it were alone."""

    def halves(function):
        def of(*pairs):
            made = [function(*(value(x >> shift & 0xFFFF, T) for x in pairs)) for shift in (0, 16)]
            return pattern(made[0], T) | pattern(made[1], T) << 16

        return of

    def agree(a, b):
        return all(x == y or (is_nan(x, T) and is_nan(y, T)) for x, y in ((a & 0xFFFF, b & 0xFFFF), (a >> 16, b >> 16)))

    for name, (function, n) in arithmetic(T).items():
        text = f"{name.replace('{rn}', '.rn')}.{T}x2 D, {', '.join('ABC'[:n])};"
        check(text, [f"{T}x2"] * n, "b32", halves(function), agree)

    def fma(a, b, c):
        exact = a.double() * b.double() + c.double()  # of fp64: exact for these, but for the last bits of a sum
        return exact.to(a.dtype)

    for text, kinds, out, function, same in (
        (f"fma.rn.{T} D, A, B, C;", [T] * 3, T, fma, both_nan(T)),
        (f"fma.rn.{T}x2 D, A, B, C;", [f"{T}x2"] * 3, "b32", halves(fma), agree),
    ):
        check(text, kinds, out, function, same)


APPROXIMATE = {
    "div.full": (lambda a, b: a / b, 2), "div.approx": (lambda a, b: a / b, 2), "rcp.approx": (lambda a: 1 / a, 1),
    "sqrt.approx": (np.sqrt, 1), "rsqrt.approx": (lambda a: 1 / np.sqrt(a), 1), "ex2.approx": (np.exp2, 1),
    "lg2.approx": (np.log2, 1), "sin.approx": (np.sin, 1), "cos.approx": (np.cos, 1), "tanh.approx": (np.tanh, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_functions_are_right_to_the_last_bit_but_one(name):
    """With .ftz, what is below 2^-126 is 0 before and after."""
    function, n = APPROXIMATE[name]

    def close(got, want):
        a, b = value(got, "f32"), value(want, "f32")
        return both_nan("f32")(got, want) or (abs(a) < math.inf and abs(a - b) <= 2.0**-22 * abs(b) + 2.0**-148)

    def exact(*operands):
        return np.float32(function(*map(np.float64, operands)))

    operands = ", ".join("AB"[:n])
    check(f"{name}.f32 D, {operands};", ["f32"] * n, "f32", exact, close)
    if name != "tanh.approx":
        check(f"{name}.ftz.f32 D, {operands};", ["f32"] * n, "f32", flushed(exact), close)
    if name in ("ex2.approx", "tanh.approx"):
        for T in ("bf16", "f16"):

            def near(a, T=T):
                return torch.tensor(float(exact(np.float32(a.float().item())))).to(FLOATS[T])

            def closely(got, want, T=T):
                return both_nan(T)(got, want) or abs(got - want) <= 1

            check(f"{name}.{T} D, A;", [T], T, near, closely)


def test_a_sign_is_copied_from_the_first_operand():
    check("copysign.f32 D, A, B;", ["f32"] * 2, "f32", lambda a, b: math.copysign(b, a), both_nan("f32"))


# ---- conversions ----------------------------------------------------------------------------------------------------

WHOLE = [f"{sign}{n}" for n in (16, 32, 64) for sign in "su"]


@pytest.mark.parametrize("to", [*WHOLE, "s8", "u8"])
def test_integers_become_others(to):
    """Cut, or extended by their sign; eight bits lie in registers of 16, extended likewise."""
    bits, out = width(to), to if width(to) > 8 else f"{to[0]}16"

    def cut(x):
        x %= 1 << bits
        return x - (1 << bits) if to[0] == "s" and x >> (bits - 1) else x

    for source in WHOLE:
        check(f"cvt.{to}.{source} D, A;", [source], out, cut)
    for source, sign in (("s8", True), ("u8", False)):
        check(f"cvt.{to}.{source} D, A;", ["b16"], out,
              lambda a, sign=sign: cut((a & 255) - 256 * (sign and a >> 7 & 1)))  # fmt: skip
    for of in ("u16", "s16") if bits == 32 else ():  # a register that is wider than the type
        check(f"cvt.{to}.{of} D, A;", ["b32"], to, lambda a, of=of: cut(value(a & 0xFFFF, of)))
    if bits == 8:
        check(f"cvt.{to}.u32 D, A;", ["b32"], "b32", cut)


@pytest.mark.parametrize("to", ["f32", "f64"])
def test_integers_become_the_nearest_number(to):
    for source in WHOLE:
        check(f"cvt.rn.{to}.{source} D, A;", [source], to,
              lambda a: rounded(Fraction(a), FLOATS[to]) if a else 0.0)  # fmt: skip
    for source, sign in (("s8", True), ("u8", False)):
        check(f"cvt.rn.{to}.{source} D, A;", ["b16"], to, lambda a, sign=sign: (a & 255) - 256 * (sign and a >> 7 & 1))


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("T", ["f32", "f64"])
def test_floating_point_becomes_whole_or_lies_between_0_and_1(T):
    for rounding, function in ROUNDINGS.items():
        check(f"cvt.{rounding}.{T}.{T} D, A;", [T], T, function, both_nan(T))
        if T == "f32":
            check(f"cvt.{rounding}.ftz.f32.f32 D, A;", [T], T, flushed(function), both_nan(T))
    between = lambda a: min(max(a, 0.0), 1.0) if a == a else 0.0  # noqa: E731
    check(f"cvt.sat.{T}.{T} D, A;", [T], T, lambda a: abs(between(a)))
    check(f"cvt.{T}.{T} D, A;", [T], T, lambda a: a, both_nan(T))


def test_widths_of_floating_point():
    check("cvt.f64.f32 D, A;", ["f32"], "f64", np.float64, both_nan("f64"))
    check("cvt.rn.f32.f64 D, A;", ["f64"], "f32", np.float32, both_nan("f32"))
    for T in ("bf16", "f16"):
        check(f"cvt.f32.{T} D, A;", [T], "f32", float, both_nan("f32"))
        for relu in (False, True):

            def narrow(a, b, T=T, relu=relu):
                halves = [torch.tensor(float(0.0 if relu and x <= 0 else x)).to(FLOATS[T]) for x in (b, a)]
                return sum((pattern(float(x), T) if x == x else 0x7FFF) << 16 * i for i, x in enumerate(halves))

            check(f"cvt.rn{'.relu' * relu}.{T}x2.f32 D, A, B;", ["f32"] * 2, "b32", narrow,
                  lambda a, b: a & 0x7FFF7FFF == b & 0x7FFF7FFF and (a ^ b) & 0x80008000 == 0)  # fmt: skip

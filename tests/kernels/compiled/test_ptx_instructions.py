"""Every instruction that the PTX machine computes lane by lane, against Python's integers, numpy and torch.

Each runs on numbers that are special and on random ones, in a warp of which a part is active, and under a guard: a lane
that does not run it keeps what it had.
"""

import math
import re
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.helpers.hand_ptx import make_kernel

N = 104  # lanes: three warps and a quarter of one
REGISTER = {16: ("b16", "%h"), 32: ("b32", "%r"), 64: ("b64", "%d")}
FLOATS = {"f32": np.float32, "f64": np.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def width(kind):
    """Return the bits of a type by its name."""
    if kind.endswith("x2"):
        return 32
    return int("".join(c for c in kind.replace("bf16", "b16") if c.isdigit()))


def special(kind):
    """Return patterns of bits that instructions of a type may treat apart."""
    bits = width(kind)
    if kind in ("f32", "f64"):
        least, most = (2.0**-126, 3.4028234663852886e38) if kind == "f32" else (2.0**-1022, 1.7976931348623157e308)
        values = [0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, -2.5, 3, 100.25, math.inf, -math.inf, math.nan, least, -least / 4,
                  least / 1024, most, -most, math.pi, 1 + 2.0**-23, 8388609.0]  # fmt: skip
        return list(map(int, np.array(values, FLOATS[kind]).view(f"u{bits // 8}")))
    if kind in ("bf16", "f16"):
        values = [
            0.0,
            -0.0,
            1,
            -1,
            0.5,
            1.5,
            -2.5,
            3,
            200,
            math.inf,
            -math.inf,
            math.nan,
            2.0**-15,
            -(2.0**-20),
            6e4,
            1.0078,
        ]
        return [x & 0xFFFF for x in torch.tensor(values).to(FLOATS[kind]).view(torch.int16).tolist()]
    top = 1 << (bits - 1)
    return [0, 1, 2, 3, 5, 31, 32, 33, top, top - 1, top + 1, 2 * top - 1, 2 * top - 2, 0x80 % (2 * top), 255, 7]


def inputs_of(name, kinds):
    """Return N patterns for each operand: all pairs of the special ones that fit, then random ones."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    columns = []
    for i, kind in enumerate(kinds):
        bits = width(kind)
        pool = special(kind.removesuffix("x2")) if not kind.endswith("x2") else [
            a | b << 16 for a in special(kind[:-2]) for b in special(kind[:-2])
        ]  # fmt: skip
        chosen = rng.integers(0, len(pool), N)
        column = [pool[j] for j in (chosen if i or len(kinds) > 1 else [*range(min(len(pool), N)), *chosen][:N])]
        for j in range(0, N, 2):
            if kind in ("f32", "f64", "bf16", "f16"):
                number = rng.standard_normal() * 2.0 ** rng.integers(-6, 7)
                column[j] = pattern(number, kind)
            elif j % 4 == 0:
                column[j] = (
                    int(rng.integers(0, 1 << bits, dtype=np.uint64)) if bits < 64 else int(rng.bytes(8).hex(), 16)
                )
            else:
                column[j] = int(rng.integers(0, 70)) % (1 << bits)
        columns.append(column)
    return columns


def pattern(number, kind):
    """Return the bits of a number."""
    if kind in ("bf16", "f16"):
        return torch.tensor([float(number)]).to(FLOATS[kind]).view(torch.int16).item() & 0xFFFF
    return int(np.array([number], FLOATS[kind]).view(f"u{width(kind) // 8}")[0])


def value(bits, kind):
    """Return the number that bits are: a Python integer, a numpy or a torch scalar."""
    n = width(kind)
    if kind in ("bf16", "f16"):
        return torch.tensor([bits - (1 << 16) * (bits >> 15)], dtype=torch.int16).view(FLOATS[kind])[0]
    if kind in FLOATS:
        return np.array([bits], f"u{n // 8}").view(FLOATS[kind])[0]
    return bits - (1 << n) if kind[0] == "s" and bits >> (n - 1) else bits


def tensor_of(column, bits):
    kind = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    return torch.from_numpy(np.array(column, kind).view(kind.__name__.removeprefix("u")))


def run(text, kinds, out):
    """Run "... D, A, B, C;", and again under a guard in odd lanes. Return inputs and both results, as bits."""
    columns, bits = inputs_of(text, kinds), width(out)
    body, names = "", {}
    for i, kind in enumerate(kinds):
        load, reg = REGISTER[width(kind)]
        body += f"mad.wide.u32 %d8, %t, {width(kind) // 8}, %a{i}; ld.global.{load} {reg}{i}, [%d8];\n"
        names["ABC"[i]] = f"{reg}{i}"
    store, reg = REGISTER[bits]
    body += "and.b32 %r9, %t, 1; setp.eq.u32 %p1, %r9, 1;\n"
    *before, last = [line.strip() for line in text.strip(";").split(";")]
    for lane, guard in (("7", ""), ("6", "@%p1 ")):
        lines = "".join(f"{line};\n" for line in [*before, guard + last])
        body += f"mov.{store} {reg}{lane}, 77;\n"
        body += re.sub(r"\b[ABCD]\b", lambda m, lane=lane: names.get(m[0], f"{reg}{lane}"), lines)
    for j, lane in enumerate("76"):
        body += f"mad.wide.u32 %d8, %t, {bits // 8}, %a{len(kinds) + j}; st.global.{store} [%d8], {reg}{lane};\n"
    inputs = [tensor_of(column, width(kind)) for column, kind in zip(columns, kinds, strict=True)]
    found = [tensor_of([0] * N, bits) for _ in range(2)]
    module = make_kernel(body, params=len(kinds) + 2, target="sm_90a")
    assert not module.launch("k", 1, [*inputs, *found], block=(N,)).findings
    return columns, [[x % (1 << bits) for x in t.tolist()] for t in found]


def check(text, kinds, out, function, same=None):
    """Compare an instruction with a function of the operands' numbers. same: of two patterns, whether they agree."""
    columns, (always, guarded) = run(text, kinds, out)
    bits = width(out)
    for lane, operands in enumerate(zip(*columns, strict=True)):
        numbers = [value(x, kind) for x, kind in zip(operands, kinds, strict=True)]
        with np.errstate(all="ignore"):
            want = function(*numbers)
        if want is None:  # not defined
            continue
        want = int(want) % (1 << bits) if out not in FLOATS else pattern(want, out)
        got = always[lane]
        assert got == want or (same and same(got, want)), (text, lane, numbers, hex(got), hex(want))
        assert guarded[lane] == (got if lane % 2 else 77), (text, lane, "under a guard")


# ---- integers -------------------------------------------------------------------------------------------------------


def divide(a, b):
    """Return a / b toward zero; all ones for b = 0. What overflows is not defined."""
    if not b:
        return -1
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def rest(a, b):
    return a if not b else a - b * divide(a, b)


SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
INTEGERS = {}
for T in (*SIGNED, *UNSIGNED):
    B = width(T)
    INTEGERS |= {
        f"add.{T} D, A, B;": ([T, T], T, lambda a, b: a + b),
        f"sub.{T} D, A, B;": ([T, T], T, lambda a, b: a - b),
        f"mul.lo.{T} D, A, B;": ([T, T], T, lambda a, b: a * b),
        f"mad.lo.{T} D, A, B, C;": ([T, T, T], T, lambda a, b, c: a * b + c),
        f"min.{T} D, A, B;": ([T, T], T, min),
        f"max.{T} D, A, B;": ([T, T], T, max),
        f"shr.{T} D, A, B;": ([T, "u32"], T, lambda a, n: a >> min(n, 64)),
    }
    if T[0] == "u":
        INTEGERS |= {f"div.{T} D, A, B;": ([T, T], T, divide), f"rem.{T} D, A, B;": ([T, T], T, rest)}
    else:
        INTEGERS |= {f"neg.{T} D, A;": ([T], T, lambda a: -a), f"abs.{T} D, A;": ([T], T, abs)}
    if B > 16:
        INTEGERS |= {f"mul.hi.{T} D, A, B;": ([T, T], T, lambda a, b, B=B: a * b >> B)}
    if B < 64:
        INTEGERS |= {
            f"mul.wide.{T} D, A, B;": ([T, T], f"{T[0]}{2 * B}", lambda a, b: a * b),
            f"mad.wide.{T} D, A, B, C;": ([T, T, f"{T[0]}{2 * B}"], f"{T[0]}{2 * B}", lambda a, b, c: a * b + c),
        }
    if B == 32:
        INTEGERS |= {f"mad.hi.{T} D, A, B, C;": ([T, T, T], T, lambda a, b, c: (a * b >> 32) + c)}
for T in ("b16", "b32", "b64"):
    INTEGERS |= {
        f"and.{T} D, A, B;": ([T, T], T, lambda a, b: a & b), f"or.{T} D, A, B;": ([T, T], T, lambda a, b: a | b),
        f"xor.{T} D, A, B;": ([T, T], T, lambda a, b: a ^ b), f"not.{T} D, A;": ([T], T, lambda a: ~a),
        f"shl.{T} D, A, B;": ([T, "u32"], T, lambda a, n: a << min(n, 64)), f"mov.{T} D, A;": ([T], T, lambda a: a),
    }  # fmt: skip


@pytest.mark.parametrize("text", INTEGERS)
def test_arithmetic_of_integers(text):
    check(text, *INTEGERS[text])


@pytest.mark.parametrize("T", SIGNED)
def test_division_of_signed_integers(T):
    """By anything but -1, whose quotient may overflow, and by -1 where it does not."""
    least, size = -(1 << (width(T) - 1)) + 1, REGISTER[width(T)][1]
    for what, function in (("div", divide), ("rem", rest)):
        text = f"max.{T} {size}8, A, {least}; {what}.{T} D, {size}8, B;".replace("%d8", "%d9")
        check(text, [T, T], T, lambda a, b, function=function: function(max(a, least), b))


def field(a, at, n, bits, signed):
    """Return the n bits of a from `at` on, as the ISA has bfe; a is not negative."""
    at, n = at & 255, n & 255
    if not n:
        return 0
    sign = a >> min(at + n - 1, bits - 1) & 1 if signed else 0
    return sum((a >> (at + i) & 1 if at + i < bits and i < n else sign) << i for i in range(bits))


def put(a, b, at, n, bits):
    """Return b with its n bits from `at` on replaced by a's lowest, as the ISA has bfi."""
    at, n = at & 255, n & 255
    for i in range(n):
        if at + i < bits:
            b = b & ~(1 << (at + i)) | (a >> i & 1) << (at + i)
    return b


@pytest.mark.parametrize("T", ["u32", "s32", "u64", "s64"])
def test_fields_of_bits(T):
    B = width(T)
    check(f"bfe.{T} D, A, B, C;", [f"b{B}", "u32", "u32"], T, lambda a, at, n: field(a, at, n, B, T[0] == "s"))
    for at, n in ((0, B), (3, 7), (B - 1, 1), (B - 2, 9), (250, 3), (4, 0), (256 + 1, 256 + 2)):
        check(f"bfe.{T} D, A, {at}, {n};", [f"b{B}"], T, lambda a, at=at, n=n: field(a, at, n, B, T[0] == "s"))
        if T[0] == "u":
            check(f"bfi.b{B} D, A, B, {at}, {n};", [f"b{B}"] * 2, T, lambda a, b, at=at, n=n: put(a, b, at, n, B))


def permuted(a, b, selector):
    both, found = b << 32 | a, 0
    for i in range(4):
        byte = both >> 8 * (selector >> 4 * i & 7) & 255
        found |= (255 * (byte >> 7) if selector >> 4 * i & 8 else byte) << 8 * i
    return found


def logic(a, b, c, table):
    return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


BITS = {
    "prmt.b32 D, A, B, C;": (["b32"] * 3, "b32", permuted),
    "prmt.b32 D, A, B, 0xf2e4;": (["b32"] * 2, "b32", lambda a, b: permuted(a, b, 0xF2E4)),
    "shf.l.wrap.b32 D, A, B, C;": (["b32"] * 3, "b32", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    "shf.r.wrap.b32 D, A, B, C;": (["b32"] * 3, "b32", lambda a, b, n: (b << 32 | a) >> (n & 31)),
    "brev.b32 D, A;": (["b32"], "b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    "mov.b32 D, {A, B};": (["b16"] * 2, "b32", lambda a, b: b << 16 | a),
    "mov.b64 D, {A, B};": (["b32"] * 2, "b64", lambda a, b: b << 32 | a),
    "mov.b32 {D, _}, A;": (["b32"], "b16", lambda a: a),
    "mov.b32 {_, D}, A;": (["b32"], "b16", lambda a: a >> 16),
    "mov.b64 {D, _}, A;": (["b64"], "b32", lambda a: a),
    "mov.b64 {_, D}, A;": (["b64"], "b32", lambda a: a >> 32),
    **{f"popc.b{n} D, A;": ([f"b{n}"], "u32", lambda a: a.bit_count()) for n in (32, 64)},
    **{f"clz.b{n} D, A;": ([f"b{n}"], "u32", lambda a, n=n: n - a.bit_length()) for n in (32, 64)},
    **{f"lop3.b32 D, A, B, C, {table};": (["b32"] * 3, "b32", lambda a, b, c, table=table: logic(a, b, c, table))
       for table in (0x00, 0xEA, 0x96, 0x1B, 0xFF, 0x40, 0xCA)},
}  # fmt: skip


@pytest.mark.parametrize("text", BITS)
def test_bits(text):
    check(text, *BITS[text])


# ---- comparisons and choices ----------------------------------------------------------------------------------------

ORDERED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a < b or a > b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
UNORDERED = {f"{name}u": lambda a, b, f=f: f(a, b) or a != a or b != b for name, f in ORDERED.items()}
UNORDERED |= {"num": lambda a, b: a == a and b == b, "nan": lambda a, b: a != a or b != b}
SAME = (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))
COMPARED = [(name, T, f) for T in (*SIGNED, *UNSIGNED, "f32", "f64") for name, f in ORDERED.items()]
COMPARED += [(name, T, f) for T in ("f32", "f64") for name, f in UNORDERED.items()]
COMPARED += [
    (name, T, ORDERED[of]) for T in UNSIGNED for name, of in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))
]
COMPARED += [(name, T, ORDERED[name]) for T in ("b16", "b32", "b64") for name in ("eq", "ne")]


@pytest.mark.parametrize("T", sorted({T for _, T, _ in COMPARED}))
def test_comparisons(T):
    """And the complement, and both joined with another predicate."""
    for name, kind, function in COMPARED:
        if kind != T:
            continue
        one = f"setp.{name}.{T} %p2|%p3, A, B; selp.b32 %r5, 1, 0, %p2; selp.b32 %r8, 2, 0, %p3; or.b32 D, %r5, %r8;"
        check(one, [T, T], "b32", lambda a, b, f=function: 1 if f(a, b) else 2)
    for join, both in (("and", lambda x, c: x and c), ("or", lambda x, c: x or c), ("xor", lambda x, c: x != c)):
        for mark in ("", "!"):
            joined = f"setp.ne.b32 %p4, C, 5; setp.eq.{join}.{T} %p2|%p3, A, B, {mark}%p4; selp.b32 %r5, 1, 0, %p2; "
            joined += "selp.b32 %r8, 2, 0, %p3; or.b32 D, %r5, %r8;"

            def want(a, b, c, both=both, mark=mark):
                c = (c != 5) != (mark == "!")
                return both(bool(a == b), c) + 2 * both(bool(a != b), c)

            check(joined, [T, T, "b32"], "b32", want)


@pytest.mark.parametrize("B", [16, 32, 64])
def test_a_choice_by_a_predicate(B):
    text = f"setp.gt.s32 %p2, C, 4; selp.b{B} D, A, B, %p2;"
    check(text, [f"b{B}", f"b{B}", "s32"], f"b{B}", lambda a, b, c: a if c > 4 else b)


PREDICATES = {
    "and.pred %p4, %p2, %p3;": lambda p, q: p and q, "or.pred %p4, %p2, %p3;": lambda p, q: p or q,
    "xor.pred %p4, %p2, %p3;": lambda p, q: p != q, "not.pred %p4, %p2;": lambda p, q: not p,
    "mov.pred %p4, %p3;": lambda p, q: q, "mov.pred %p4, -1;": lambda p, q: True,
    "mov.pred %p4, 0;": lambda p, q: False,
    "and.pred %p4, %p2, 1;": lambda p, q: p, "or.pred %p4, 0, %p3;": lambda p, q: q,
    "setp.ne.and.s32 %p4, A, A, %p2;": lambda p, q: False, "setp.eq.and.s32 %p4, A, A, %p2;": lambda p, q: p,
    "setp.eq.or.s32 _|%p4, A, A, %p3;": lambda p, q: q,
}  # fmt: skip


@pytest.mark.parametrize("text", PREDICATES)
def test_logic_of_predicates(text):
    """In the lanes that run it: the others keep theirs."""
    start = "setp.lt.s32 %p2, A, 7; setp.gt.s32 %p3, B, 2; setp.eq.s32 %p4, A, A; and.b32 %r5, A, 1; "
    start += "setp.eq.s32 %p5, %r5, 1;"
    found = PREDICATES[text]
    check(f"{start} @%p5 {text} selp.b32 D, 1, 0, %p4;", ["s32", "s32"], "b32",
          lambda a, b: found(a < 7, b > 2) if a % 2 else True)  # fmt: skip
    check(f"{start} @!%p5 {text} selp.b32 D, 1, 0, %p4;", ["s32", "s32"], "b32",
          lambda a, b: True if a % 2 else found(a < 7, b > 2))  # fmt: skip


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


# ---- what is written in the text ------------------------------------------------------------------------------------

IMMEDIATES = {
    "mov.b32 D, 0x1F;": 31, "mov.b32 D, -1;": -1, "mov.b32 D, -0x10;": -16, "mov.b32 D, 0f3F800000;": 0x3F800000,
    "mov.f32 D, 1.5;": 0x3FC00000, "mov.f32 D, 2;": 0x40000000, "mov.u32 D, 010;": 8, "mov.b32 D, 4294967295;": -1,
    "add.s32 D, A, -3;": None,
}  # fmt: skip


@pytest.mark.parametrize("text", IMMEDIATES)
def test_numbers_in_the_text(text):
    want = IMMEDIATES[text]
    check(text, ["b32"], "b32", lambda a: a - 3 if want is None else want)


def test_numbers_of_64_bits_in_the_text():
    for text, want in (("mov.f64 D, 0d3FF8000000000000;", 0x3FF8 << 48), ("mov.f64 D, 1.5;", 0x3FF8 << 48),
                       ("mov.b64 D, -2;", -2), ("mov.b64 D, 0xFFFFFFFFFFFFFFFF;", -1)):  # fmt: skip
        check(text, ["b32"], "b64", lambda a, want=want: want)

"""Instructions of the PTX machine that work lane by lane on integers, bits and predicates, against Python's integers.

Each runs on numbers that are special and on random ones, in a warp of which a part is active, and under a guard: a lane
that does not run it keeps what it had.
"""

import pytest

from tests.helpers.ptx_tables import check, width

# ---- integers -------------------------------------------------------------------------------------------------------


def divide(a, b):
    """Return a / b toward zero; all ones for b = 0. The least number over -1 overflows, to itself."""
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
        f"div.{T} D, A, B;": ([T, T], T, divide),
        f"rem.{T} D, A, B;": ([T, T], T, rest),
    }
    if T[0] == "s":
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

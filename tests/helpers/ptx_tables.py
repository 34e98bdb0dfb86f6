"""An instruction of PTX on many numbers, lane by lane and under a guard, against a function of one lane."""

import math
import re
import zlib

import numpy as np
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

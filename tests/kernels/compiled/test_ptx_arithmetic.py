"""The PTX machine's arithmetic, lane by lane, against torch, Python's integers and exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.helpers.hand_ptx import make_floats, run_elementwise

INT32_MAX = 2**31 - 1


@pytest.mark.parametrize(("to", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_rounding_to_16_bits_and_back(to, name):
    x = make_floats()
    assert run_elementwise(f"cvt.rn.{name}.f32 D, A;", x, out=torch.empty(len(x), dtype=to)).equal(x.to(to))
    pairs = run_elementwise(f"cvt.rn.{name}x2.f32 D, A, B;", x, x.flip(0), out=torch.empty(len(x), dtype=torch.int32))
    assert pairs.view(to).view(-1, 2).equal(torch.stack((x.flip(0), x), 1).to(to))
    assert run_elementwise(f"cvt.f32.{name} D, A;", x.to(to), out=torch.empty(len(x))).equal(x.to(to).float())
    nan = run_elementwise(f"cvt.rn.{name}.f32 D, A;", torch.tensor([torch.nan]), out=torch.empty(1, dtype=to))
    assert nan.view(torch.int16) == 0x7FFF


def test_rounding_to_tf32_is_to_the_nearest_and_away_from_zero():
    x = make_floats()
    got = run_elementwise("cvt.rna.tf32.f32 D, A;", x, out=torch.empty(len(x)))
    mantissa, exponent = np.frexp(x[:-2].double().numpy())
    away = np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11
    assert np.array_equal(got[:-2].double().numpy(), np.ldexp(away, exponent))


@pytest.mark.parametrize(
    ("rounding", "want"),
    [
        ("rzi", [1, -1, 2, INT32_MAX, -INT32_MAX - 1, 0, 0, 0]),
        ("rni", [2, -2, 2, INT32_MAX, -INT32_MAX - 1, 0, 1, -1]),
    ],
)
def test_conversion_to_integers_saturates(rounding, want):
    x = torch.tensor([1.5, -1.5, 2.5, 3e9, -3e9, torch.nan, 0.99, -0.99])
    assert run_elementwise(f"cvt.{rounding}.s32.f32 D, A;", x, out=torch.empty(8, dtype=torch.int32)).tolist() == want


ROUNDINGS = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("source", "name"), [(torch.float32, "f32"), (torch.float64, "f64")])
@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_what_no_integer_is_becomes_as_the_isa_has_it(to, source, name, rounding):
    """Too large and too small ones the nearest. NaN: 0 from fp32 to 16 and 32 bits, else the highest bit alone."""
    bits = int(to[1:])
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if to[0] == "s" else (0, 2**bits - 1)
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 4e4, 2.5, 3.5, -0.5, -2.5, 7, -7, 0], dtype=source)
    nan = 2 ** (bits - 1) if bits == 64 or source == torch.float64 else 0
    want = [nan, most, least, most, least]
    want += [min(max(ROUNDINGS[rounding](value), least), most) for value in x[5:].tolist()]
    out = torch.empty(len(x), dtype={16: torch.int16, 32: torch.int32, 64: torch.int64}[bits])
    got = run_elementwise(f"cvt.{rounding}.{to}.{name} D, A;", x, out=out)
    assert [value % 2**bits for value in got.tolist()] == [value % 2**bits for value in want]


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_fma_of_16_bits_rounds_once(dtype, name):
    a, b, c = (make_floats(2000, seed).to(dtype)[:1500] for seed in (1, 2, 3))
    c[:500] = (a[:500].double() * b[:500].double() * 2.0**-12).to(dtype)  # decides what the product leaves undecided
    got = run_elementwise(f"fma.rn.{name} D, A, B, C;", a, b, c, out=torch.empty(1500, dtype=dtype))
    below, above = (torch.nextafter(got, torch.full_like(got, sign * torch.inf)) for sign in (-1, 1))
    checked = 0
    for x, y, z, r, *others in zip(*(t.double().tolist() for t in (a, b, c, got, below, above)), strict=True):
        if np.isfinite([x, y, z, r]).all():
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            for other in filter(np.isfinite, others):
                assert abs(exact - Fraction(r)) <= abs(exact - Fraction(other)), (x, y, z, r)
                checked += 1
    assert checked > 1000


def random_integers():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(-(2**31), 2**31, (512,), generator=g, dtype=torch.int64) for _ in range(3)]


def run_int32(instruction, *inputs):
    ints = [t.to(torch.int32) for t in inputs]
    return run_elementwise(instruction, *ints, out=torch.empty(512, dtype=torch.int32)).tolist()


def as_int32(x):
    return (x + 2**31) % 2**32 - 2**31


def test_products_of_integers():
    a, b, c = random_integers()
    high = [as_int32((x % 2**32) * (y % 2**32) >> 32) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert run_int32("mul.hi.u32 D, A, B;", a, b) == high
    assert run_int32("mad.lo.s32 D, A, B, C;", a, b, c) == (a * b + c).to(torch.int32).tolist()


def test_shifts_by_more_than_the_width():
    a, by = random_integers()[0], torch.arange(512) % 40
    pairs = list(zip(a.tolist(), by.tolist(), strict=True))
    assert run_int32("shl.b32 D, A, B;", a, by) == [0 if s > 31 else as_int32(x << s) for x, s in pairs]
    assert run_int32("shr.s32 D, A, B;", a, by) == [x >> min(s, 31) for x, s in pairs]
    assert run_int32("shr.u32 D, A, B;", a, by) == [0 if s > 31 else as_int32(x % 2**32 >> s) for x, s in pairs]


def test_fields_of_bits_and_permuted_bytes():
    a, b, _ = random_integers()
    field = [(x >> 4) & 31 for x in a.tolist()]
    assert run_int32("bfe.u32 D, A, 4, 5;", a) == field
    assert run_int32("bfe.s32 D, A, 4, 5;", a) == [x - 32 * (x > 15) for x in field]
    both = np.stack([t.to(torch.int32).numpy().view(np.uint8).reshape(-1, 4) for t in (a, b)], 1).reshape(-1, 8)
    got = np.array(run_int32("prmt.b32 D, A, B, 0x7610;", a, b), np.int32).view(np.uint8).reshape(-1, 4)
    assert np.array_equal(got, both[:, [0, 1, 6, 7]])


# ---- fp8 ------------------------------------------------------------------------------------------------------------

FP8 = [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)]


@pytest.mark.parametrize(("name", "dtype", "most"), FP8)
def test_rounding_to_fp8_is_torchs_and_saturates(name, dtype, most):
    x = torch.cat((make_floats(), torch.linspace(-1.2 * most, 1.2 * most, 4096), torch.linspace(-0.1, 0.1, 4096)))
    y = x.flip(0)
    want = torch.stack(
        [t.clamp(-most, most).to(dtype).view(torch.uint8) for t in (y, x)], 1
    )  # the second is the low byte
    pairs = run_elementwise(f"cvt.rn.satfinite.{name}x2.f32 D, A, B;", x, y, out=torch.empty(len(x), dtype=torch.int16))
    assert pairs.view(torch.uint8).view(-1, 2).equal(want)
    positive = run_elementwise(f"cvt.rn.satfinite.relu.{name}x2.f32 D, A, B;", x, y, out=torch.empty_like(pairs))
    relu = torch.stack([t.clamp(0, most).to(dtype).view(torch.uint8) for t in (y + 0.0, x + 0.0)], 1)
    assert (positive.view(torch.uint8).view(-1, 2) & 0x7F).equal(relu & 0x7F)
    nan = run_elementwise(
        f"cvt.rn.satfinite.{name}x2.f32 D, A, B;", *torch.full((2, 1), torch.nan), out=torch.empty(1, dtype=torch.int16)
    )
    assert nan.item() == 0x7F7F


@pytest.mark.parametrize(("name", "dtype", "most"), FP8)
def test_fp8_from_and_to_fp16(name, dtype, most):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    pairs = torch.stack((codes, codes.flip(0)), 1).contiguous().view(torch.int16).view(-1)
    wide = run_elementwise(f"cvt.rn.f16x2.{name}x2 D, A;", pairs, out=torch.empty(256, dtype=torch.int32))
    want = torch.stack((codes, codes.flip(0)), 1).view(dtype).half()
    assert torch.equal(wide.view(torch.float16).view(-1, 2).nan_to_num(7), want.nan_to_num(7))
    halves = make_floats().half()
    got = run_elementwise(
        f"cvt.rn.satfinite.{name}x2.f16x2 D, A;", halves.view(torch.int32), out=torch.empty(2048, dtype=torch.int16)
    )
    assert got.view(torch.uint8).equal(halves.float().clamp(-most, most).to(dtype).view(torch.uint8))


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
@pytest.mark.parametrize(
    "text", [*(f"{op}.{{}}.f32 D, A, B;" for op in ("add", "sub", "mul")), "fma.{}.f32 D, A, B, C;"]
)
def test_directed_rounding(text, rounding):
    a, b, c = (make_floats(800, seed)[:500] for seed in (1, 2, 3))
    got = run_elementwise(text.format(rounding), *([a, b, c] if "fma" in text else [a, b]), out=torch.empty(500))
    x, y, z, near = (list(map(Fraction, t.double().tolist())) for t in (a, b, c, got))
    exact = {"add": lambda i: x[i] + y[i], "sub": lambda i: x[i] - y[i], "mul": lambda i: x[i] * y[i]}
    exact["fma"] = lambda i: x[i] * y[i] + z[i]
    step_up, step_down = (torch.nextafter(got, torch.full_like(got, s * torch.inf)).double().tolist() for s in (1, -1))
    for i in range(500):
        true = exact[text[:3]](i)
        down = rounding == "rm" or (rounding == "rz" and true > 0)
        between = (near[i], Fraction(step_up[i])) if down else (Fraction(step_down[i]), near[i])
        assert near[i] == true or between[0] < true < between[1], i

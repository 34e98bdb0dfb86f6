"""RoPE in Triton against the formula in fp64: in place and not, outputs and gradients, any strides."""

from functools import partial

import pytest
import torch

import kernels
from engine.model.config import RopeScaling
from kernels.ops import rope as op
from tests.helpers.kernels import DEVICE, check_sectors, needs_compiler, needs_counters, needs_gpu, needs_kernels, sized
from tests.helpers.run import worst

pytestmark = needs_kernels

TILES = {"rope": {"rotate": {"TOKENS": 4, "HEADS": 2}}}
DTYPES = [torch.float32, torch.float16]
SIZES = [(0, 2, 1, 8), (1, 1, 1, 2), (3, 2, 2, 6), (7, 9, 3, 64), (5, 4, 4, 80), (2, 1, 5, 128)]  # T, H, K, Dh


def tables(t, dh, device, scaling=None):
    """cos and sin of documents that restart, some far out."""
    positions = torch.cat((torch.arange(t // 2), torch.randint(257, 9000, (t - t // 2,))))
    return tuple(x.to(device) for x in kernels.rope_cos_sin(positions, kernels.rope_frequencies(dh, 10000.0, scaling)))


def random(device, *shapes, dtype=torch.float32):
    return [torch.randn(*shape, device=device).to(dtype) for shape in shapes]


def with_gradients(f, q, k, upstream):
    """Outputs of f, and the gradients of q and k."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = f(q, k)
    return *(t.detach() for t in out), *torch.autograd.grad(out, (q, k), [t.to(q.dtype) for t in upstream])


def close(ours, theirs, truth):
    """Our errors at most twice those of the reference in the same dtype, both against it in fp64; half a unit of the
    dtype is nobody's error."""
    floor = max(1e-6, torch.finfo(ours[0].dtype).eps / 2)
    for i, (a, b, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.shape == true.shape and a.dtype == b.dtype and a.isfinite().all(), i
        assert worst(a.double() - true) <= 2 * worst(b.double() - true) + floor * worst(true), i


def compare(q, k, cos, sin, upstream):
    f = partial(kernels.rope, cos=cos, sin=sin)
    ours = with_gradients(partial(f, impl="triton"), q, k, upstream)
    theirs = with_gradients(partial(f, impl="ref"), q, k, upstream)
    close(ours, theirs, with_gradients(partial(f, impl="ref"), q.double(), k.double(), upstream))
    return ours


@pytest.fixture
def poison(monkeypatch):
    """New memory holds NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rope(size, dtype, device, poison):
    t, h, kv, dh = size
    q, k, dq, dk = random(device, *[(t, h, dh), (t, kv, dh)] * 2, dtype=dtype)
    compare(q, k, *tables(t, dh, device), (dq, dk))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_in_place_between_rows_that_stay(size, dtype, inverse, device):
    t, h, kv, dh = size
    (row,) = random(device, (t, h + 2 * kv + 3, dh + 5), dtype=dtype)
    cos, sin = tables(t, dh, device)
    parts = (slice(1, 1 + h), slice(2 + h, 2 + h + kv))  # heads 0, 1 + h and the last are nobody's
    truth, ours = row.double(), row.clone()
    theirs = row.clone()
    for x in (truth, theirs):
        for part in parts:
            x[:, part, :dh] = op.rope_ref(x[:, part, :dh], x[:, part, :dh], cos, -sin if inverse else sin)[0]
    op.rotate(*(ours[:, part, :dh] for part in parts), cos, sin, inverse)
    close([ours], [theirs], [truth])
    untouched = torch.ones_like(row, dtype=torch.bool)
    for part in parts:
        untouched[:, part, :dh] = False
    assert ours[untouched].equal(row[untouched])


def test_rotating_back_gives_what_was(device):
    q, k = random(device, (9, 4, 32), (9, 2, 32))
    cos, sin = tables(9, 32, device)
    a, b = q.clone(), k.clone()
    op.rotate(a, b, cos, sin, False)
    assert worst(a - q) > 1 and worst(b - k) > 1
    op.rotate(a, b, cos, sin, True)
    assert worst(a - q) < 1e-6 * worst(q) and worst(b - k) < 1e-6 * worst(k)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192)], ids=["plain", "llama3"])
def test_angles_come_from_positions_not_from_rows(scaling, device):
    """One token's pairs as complex numbers, at each position of packed documents; fp16, and past 256."""
    dh, positions = 16, torch.tensor([0, 1, 2, 0, 1, 4000, 4001, 8190])
    frequencies = kernels.rope_frequencies(dh, 10000.0, scaling)
    cos, sin = (t.to(device) for t in kernels.rope_cos_sin(positions, frequencies))
    q = random("cpu", (1, 2, dh), dtype=torch.float16)[0].expand(8, 2, dh)
    ours, same = kernels.rope(q.to(device), q.to(device), cos, sin, impl="triton")
    angle = positions[:, None, None].double() * frequencies.double()
    z = torch.complex(*q.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    truth = torch.cat((z.real, z.imag), -1)
    assert worst(ours.cpu().double() - truth) <= 2 * worst(truth.half().double() - truth) + 1e-3  # 8190 * 2^-24 radians
    assert same.equal(ours)
    assert ours[0].equal(ours[3]) and ours[1].equal(ours[4]) and worst(ours[5] - ours[6]) > 0.1


def test_any_strides_one_tensor_twice_and_an_upstream_gradient_of_stride_0(device):
    cos, sin = tables(6, 10, device)
    x, dy = random(device, (10, 6, 4), (1, 1, 1))
    turned = x.permute(1, 2, 0)  # the last axis is not contiguous
    assert turned.stride(-1) != 1
    compare(turned, turned, cos, sin, (dy.expand(6, 4, 10), dy.expand(6, 4, 10)))
    k, dk = random(device, (6, 3, 14), (6, 5, 12))
    compare(turned, k[..., :10], cos, sin, (dy.expand(6, 4, 10), dk[:, :3, 2:]))  # neither's strides are the other's
    ours = kernels.rope(turned, turned[:, :3], cos.T.contiguous().T, sin, impl="triton")  # one memory, rotated once
    assert ours[0][:, :3].equal(ours[1])


def test_only_one_of_both_is_used(device):
    cos, sin = tables(5, 8, device)
    q, k, dq = random(device, (5, 2, 8), (5, 1, 8), (5, 2, 8))
    q, k = q.requires_grad_(), k.requires_grad_()
    grads = {impl: torch.autograd.grad(kernels.rope(q, k, cos, sin, impl)[0], q, dq)[0] for impl in ("triton", "ref")}
    assert worst(grads["triton"] - grads["ref"]) < 1e-6


def test_nothing_that_is_read_is_written_and_two_runs_are_bit_equal(device):
    q, k, dq, dk = random(device, *[(17, 4, 16), (17, 2, 16)] * 2)
    cos, sin = tables(17, 16, device)
    before = [t.clone() for t in (q, k, dq, dk, cos, sin)]
    first = compare(q, k, cos, sin, (dq, dk))
    with torch.no_grad():
        again = kernels.rope(q, k, cos, sin, impl="triton")
    assert all(a.equal(b) for a, b in zip(before, (q, k, dq, dk, cos, sin), strict=True))
    assert all(a.equal(b) for a, b in zip(first, (*again, *compare(q, k, cos, sin, (dq, dk))[2:]), strict=True))
    assert not {t.data_ptr() for t in (q, k, dq, dk)} & {t.data_ptr() for t in (*first, *again)}


@pytest.mark.parametrize(("low", "high", "original"), [(1.0, 4.0, 8192), (2.0, 3.0, 512)])
def test_llama3_scaling_ends_at_both_ends(low, high, original):
    """Pairs of at least `high` turns in the original length are kept, of at most `low` divided; between, a line."""
    plain = kernels.rope_frequencies(128, 500000.0)
    ours = kernels.rope_frequencies(128, 500000.0, RopeScaling(8.0, low, high, original))
    kept = [False] * 3
    for f, found in zip(plain.double(), ours.double(), strict=True):
        turns = original * f / (2 * torch.pi)
        share = (turns - low) / (high - low)
        wanted = f if turns >= high else f / 8 if turns <= low else share * f + (1 - share) * f / 8
        kept[int(turns >= high) + int(turns > low)] = True
        assert abs(found / wanted - 1) < 1e-5, turns
    assert all(kept), "a pair of each kind"


@pytest.mark.parametrize("inverse", [False, True])
def test_operators_without_kernels_are_the_formula(inverse):
    (q, k), (cos, sin) = random("cpu", (5, 2, 8), (5, 1, 8), dtype=torch.float64), tables(5, 8, "cpu")
    z = [torch.complex(*x.chunk(2, -1)) * torch.complex(cos, -sin if inverse else sin)[:, None] for x in (q, k)]
    truth = [torch.cat((x.real, x.imag), -1) for x in z]
    assert all(worst(a - b) < 1e-12 for a, b in zip(op._rotated_cpu(q, k, cos, sin, inverse), truth, strict=True))
    assert op._rotate_cpu(q, k, cos, sin, inverse) is None
    assert all(worst(a - b) < 1e-12 for a, b in zip((q, k), truth, strict=True))


@pytest.mark.parametrize(("t", "h", "kv", "dh"), [(0, 2, 1, 8), (3, 0, 0, 8), (3, 2, 1, 0)])
def test_without_numbers_nothing_is_launched(t, h, kv, dh, monkeypatch):
    """A grid of no programs is an error of CUDA."""
    monkeypatch.setattr(op, "_rotate_kernel", None)
    q, k, angles = torch.zeros(t, h, dh), torch.zeros(t, kv, dh), torch.zeros(t, dh // 2)
    op.rotate.launch(q, k, angles, angles, False)
    rotated = op.rotated.launch(q, k, angles, angles, True)
    assert [x.shape for x in rotated] == [q.shape, k.shape]


def test_operators_tell_torch_the_truth(device):
    (qkv,) = random(device, (5, 4, 8))
    q, k, _ = qkv.split((2, 1, 1), 1)
    cos, sin = tables(5, 8, device)
    torch.library.opcheck(op.rotated, (q, k, cos, sin, True))
    torch.library.opcheck(op.rotate, (q.clone(), k.clone(), cos, sin, False))
    torch.library.opcheck(op.rotate, (q, k, cos, sin, True), test_utils=("test_schema", "test_faketensor"))


def test_compiled(device):
    q, k, dq, dk = random(device, *[(5, 4, 16), (5, 2, 16)] * 2)
    f = partial(kernels.rope, cos=tables(5, 16, device)[0], sin=tables(5, 16, device)[1], impl="triton")
    eager, compiled = (
        with_gradients(g, q, k, (dq, dk)) for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))
    )
    assert all(a.equal(b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((3, 2, 7), (3, 2, 7), "Dh even"),
        ((3, 2, 8), (3, 1, 6), "wanted cos and sin"),
        ((3, 2, 8), (2, 1, 8), "wanted cos and sin"),
    ],
)
def test_what_does_not_fit_is_said(q, k, message):
    cos = torch.zeros(q[0], q[2] // 2)
    with pytest.raises(ValueError, match=message):
        kernels.rope(torch.zeros(q), torch.zeros(k), cos, cos, impl="triton")
    cos, wrong = torch.zeros(3, 4), (torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(3, 8))
    for angles in (*((cos, t) for t in wrong), *((t, cos) for t in wrong)):
        with pytest.raises(ValueError, match=r"wanted cos and sin \(3, 4\)"):
            kernels.rope(*torch.zeros(2, 3, 2, 8), *angles, impl="triton")
    with pytest.raises(ValueError, match="float16"):
        kernels.rope(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8).half(), torch.zeros(3, 4), torch.zeros(3, 4))


@needs_compiler
@pytest.mark.parametrize(("h", "kv", "dh"), [(32, 32, 128), (32, 8, 128), (9, 3, 64), (32, 32, 80), (8, 1, 256)])
def test_bf16_at_real_sizes(h, kv, dh):
    rows = sized(4099, 9)
    q, k, dq, dk = random(DEVICE, *[(rows, h, dh), (rows, kv, dh)] * 2, dtype=torch.bfloat16)
    compare(q, k, *tables(rows, dh, DEVICE), (dq, dk))


@needs_counters
@pytest.mark.parametrize(("h", "kv", "dh"), [(32, 32, 128), (9, 3, 64), (8, 1, 256)])
def test_tables_are_loaded_in_whole_sectors(h, kv, dh):
    q, k, _ = torch.randn(64, h + 2 * kv, dh).bfloat16().split((h, kv, kv), 1)
    check_sectors(lambda: op.rotate(q, k, *tables(64, dh, "cpu"), False), "_rotate_kernel")


@needs_gpu
def test_more_than_2_to_the_31_elements():
    t, dh = 2**31 // (96 * 128) + 9, 128
    qkv = torch.empty(t, 96, dh, dtype=torch.bfloat16, device="cuda").normal_()
    q, k, _ = qkv.split((32, 32, 32), 1)
    cos, sin = tables(t, dh, "cuda")
    tail = op.rotated(q[-5:].clone(), k[-5:].clone(), cos[-5:], sin[-5:], False)
    op.rotate(q, k, cos, sin, False)
    assert q[-5:].equal(tail[0]) and k[-5:].equal(tail[1])

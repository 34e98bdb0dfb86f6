"""The gradient of a weight by AMX against fp64: at most one rounding, at any size, stride and number of threads."""

import ctypes

import pytest
import torch

import kernels
from kernels.native import weight_gradient as native
from kernels.native.arguments import WeightGradient
from kernels.native.cpu import load_cpu
from kernels.ops import common, low_rank
from tests.helpers.native import run_sanitized

pytestmark = pytest.mark.skipif(not native.has_amx(), reason="needs a processor with AMX")
SIZES = [  # tokens, rows and columns: of one block and of several, of whole tiles and of parts
    (0, 3, 5), (1, 1, 1), (2, 16, 16), (31, 33, 17), (32, 32, 32), (33, 31, 65), (256, 96, 64), (257, 40, 100),
    (513, 1000, 48), (70, 70, 1600), (300, 1030, 780),
]  # fmt: skip


def make(tokens, rows, columns, dtype=torch.bfloat16, spare=0):
    """Return dy, x and out, of whose rows numbers lie apart that none may read or change."""
    generator = torch.Generator().manual_seed(tokens + rows)
    shapes = (tokens, rows), (tokens, columns), (rows, columns)
    dy, x, out = (torch.randn(n, m + spare, generator=generator) for n, m in shapes)
    return tuple(
        t.to(d).index_fill_(1, torch.arange(t.shape[1] - spare, t.shape[1]), torch.nan)
        for t, d in ((dy, torch.bfloat16), (x, torch.bfloat16), (out, dtype))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sums_are_rounded_once(size, dtype):
    (tokens, rows, columns), spare = size, 3
    dy, x, out = make(*size, dtype, spare)
    for is_added in (False, True):
        found = out.clone()
        native.write_weight_gradient(found[:, :columns], dy[:, :rows], x[:, :columns], is_added)
        old = out[:, :columns].double() if is_added else 0
        want = old + dy[:, :rows].double().T @ x[:, :columns].double()
        scale = dy[:, :rows].double().abs().T @ x[:, :columns].double().abs() + 1
        # A sum of n products in fp32 is off by at most n / 2 units of each; then half a unit of the result.
        bound = scale * (tokens + 2) * 2**-24 + want.abs() * torch.finfo(dtype).eps / 2
        assert ((found[:, :columns].double() - want).abs() <= bound).all()
        assert found[:, columns:].isnan().all()


def test_a_sum_half_way_between_two_numbers_becomes_the_even_one():
    x = torch.tensor([[2.0**-8, 2.0**-8, 2.0**-8 * 1.0078125, 2.0**-9, -(2.0**-9)]]).bfloat16()
    out = torch.tensor([[1, 1.0078125, 1, 1, 1]]).bfloat16()
    native.write_weight_gradient(out, torch.ones(1, 1).bfloat16(), x, is_added=True)
    assert out.tolist() == [[1, 1.015625, 1.0078125, 1, 1]]


def test_bits_do_not_depend_on_the_threads(monkeypatch):
    dy, x, out = make(300, 1030, 780)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(out.clone())
        native.write_weight_gradient(found[-1], dy, x, is_added=True)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_numbers_that_are_none_stay_in_their_rows_and_columns():
    dy, x, out = make(40, 40, 40)
    dy[9], x[9] = 0.1, 0.1
    dy[5, 3], x[7, 9], dy[9, 20], x[9, 30] = torch.nan, torch.inf, 3e38, 3e38  # their product is past fp32's largest
    native.write_weight_gradient(out, dy, x, is_added=False)
    odd = ~out.isfinite()
    assert out[3].isnan().all() and odd[:, 9].all() and out[20, 30] == torch.inf
    odd[3], odd[:, 9], odd[20, 30] = False, False, False
    assert not odd.any()


@pytest.mark.parametrize(
    "spread", [lambda v: v[:32].expand(50, 32), lambda v: v.unfold(0, 32, 1)[:50]], ids=["one row", "sliding"]
)
def test_rows_that_lie_over_each_other_are_multiplied_as_they_read(spread, monkeypatch):
    """The gradient of a sum over tokens is one row, expanded."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    over, dense = spread(torch.randn(96).bfloat16()), torch.randn(50, 32).bfloat16()
    for dy, x in ((over, dense), (dense, over)):
        assert torch.equal(common.weight_gradient(dy, x, None), dy.contiguous().T @ x.contiguous())
        with pytest.raises(ValueError, match=r"wanted .* of contiguous rows behind each other"):
            native.write_weight_gradient(torch.zeros(32, 32), dy, x, is_added=False)
    weight = torch.randn(32, 32).bfloat16().requires_grad_()
    kernels.linear(dense, weight, "native").backward(over)
    want = over.double().T @ dense.double()
    assert (weight.grad.double() - want).norm() <= 0.01 * want.norm()


def test_what_does_not_fit_is_refused():
    dy, x, out = make(4, 3, 2)
    strided = torch.zeros(2, 3).bfloat16().T  # of out's shape
    for wrong in ((out.T, dy, x), (out[:2], dy, x), (strided, dy, x), (out, dy, x[:3]), (out.half(), dy, x)):
        with pytest.raises(ValueError, match=r"weight_gradient: dy \(4, 3\), x .* wanted \(T, N\), \(T, K\), \(N, K\)"):
            native.write_weight_gradient(*wrong, is_added=False)
    assert not native.takes(dy.float(), x.float()) and not native.takes(dy.T.contiguous().T, x) and native.takes(dy, x)


def test_the_ops_take_it_where_no_interpreter_runs(monkeypatch):
    """Gradients of a weight alone, of parts of its rows and of the head, written and then added."""
    calls, real = [], native.write_weight_gradient
    monkeypatch.setattr(common, "INTERPRETED", True)
    assert not common.is_by_amx(*make(2, 2, 2)[:2])
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(common, "write_weight_gradient", lambda *a, **k: calls.append(k["is_added"]) or real(*a, **k))
    x, norm, rows = make(50, 24, 16)[1], torch.ones(16, dtype=torch.bfloat16), torch.tensor([3, 9, 48])
    targets = torch.arange(50) % 24

    def norm_linear_rows(weight, impl):
        y_rows, y, _ = kernels.norm_linear_rows(x, norm, weight, rows, 8, impl=impl, accumulate=True)
        return y_rows.float().pow(2).sum() + y.float().pow(2).sum()

    ops = {
        "linear": lambda weight, impl: kernels.linear(x, weight, impl, accumulate=True).float().pow(2).sum(),
        "rows": norm_linear_rows,
        "head": lambda weight, impl: kernels.linear_cross_entropy(x, weight, targets, impl=impl, accumulate=True),
    }
    for name, op in ops.items():
        mine, torchs = (torch.nn.Parameter(make(24, 24, 16)[1].T.reshape(24, 16) / 4) for _ in range(2))
        for times in (1, 2):
            op(mine, "native").backward()
            op(torchs, "ref").backward()
            assert (mine.grad - torchs.grad).norm() < 0.02 * torchs.grad.norm(), (name, times)
        assert calls == {"rows": [False, False, True, True]}.get(name, [False, True]), name
        calls.clear()


def test_sanitizers_find_nothing(tmp_path_factory):
    """Both sanitizers over a fuzz of sizes, strides and addresses; a token past the end is found."""
    folder = tmp_path_factory.getbasetemp()
    assert run_sanitized(folder, "weight_gradient") == "60 calls\n"
    with pytest.raises(AssertionError, match="SEGV on unknown address"):
        run_sanitized(folder, "weight_gradient", "overrun")


def test_gradients_of_low_rank_updates_take_it(monkeypatch):
    """Those of A, and of each B times its scale, rounded once; AMX makes a B turned."""
    calls, real = [], native.write_weight_gradient
    counted = lambda out, *a, **k: calls.append(tuple(out.shape)) or real(out, *a, **k)  # noqa: E731
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(common, "write_weight_gradient", counted)
    monkeypatch.setattr(low_rank, "write_weight_gradient", counted)
    draw = torch.Generator().manual_seed(0)
    bf16 = lambda *shape: torch.randn(shape, generator=draw).bfloat16()  # noqa: E731
    scales, sizes, ranks = (1.7, 0.3), (40, 24), (8, 16)
    updates = low_rank.LowRank(
        bf16(24, 48), tuple(bf16(n, r) for n, r in zip(sizes, ranks, strict=True)), (0, 40), scales
    )
    dy, u, du, h = bf16(70, 64), bf16(70, 24), bf16(70, 24), bf16(70, 48)
    of_b = low_rank.gradients_of_b(dy, u, updates)
    of_a = low_rank.gradient_of_a(du, h, updates)
    assert calls == [(8, 40), (16, 24), (24, 48)]
    wanted = [
        scales[0] * dy[:, :40].double().T @ u[:, :8].double(),
        scales[1] * dy[:, 40:].double().T @ u[:, 8:].double(),
    ]
    for got, want in zip([*of_b, of_a], [*wanted, du.double().T @ h.double()], strict=True):
        assert got.dtype == torch.bfloat16 and got.is_contiguous()
        assert torch.equal(got, want.bfloat16()) or (got - want).abs().max() <= 2**-8 * want.abs().max(), got.shape


@pytest.mark.parametrize("wrong", [None, "dy_row", "x_row", "out_row"])
def test_rows_that_would_lie_over_each_other_are_refused_by_the_library(wrong):
    """Before anything is read: addresses are wrong here, of which the rest is refused (2)."""
    rows = {"dy_row": 4, "x_row": 6, "out_row": 6}
    rows |= {wrong: rows[wrong] - 1} if wrong else {}
    arguments = WeightGradient(2, 4, 6, *rows.values(), 0, 0, 1, 1, 1, 1)
    assert load_cpu().cria_weight_gradient(ctypes.byref(arguments)) == (1 if wrong else 2)

"""Low-rank updates inside linear, norm_linear, norm_linear_rows and swiglu_linear, against W + scale B A in fp64.

The interpreter runs the kernels; what is new is torch's, so nothing here is compiled.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

import kernels
from kernels import LowRank
from tests.helpers.kernels import needs_kernels
from tests.helpers.run import worst

pytestmark = needs_kernels

T, D, N = 7, 24, 20
ROWS = torch.tensor([1, 4, 6])
WIDTHS, FIRST_ROWS, RANKS, SCALES = (8, 5), (0, 8), (3, 2), (0.5, 2.0)  # of parts; rows 13 to 19 have no update


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def factors():
    """Return A (R, D) and each B (n_i, r_i)."""
    return [draw(sum(RANKS), D), *(draw(n, r) for n, r in zip(WIDTHS, RANKS, strict=True))]


def low_rank(a, *b, **options):
    return LowRank(a, b, FIRST_ROWS, SCALES, **options)


def whole_weight(weight, a, *b):
    """Return W with scale_i B_i A_i added to its rows."""
    updated, rank = [weight[sum(WIDTHS) :]], 0
    for part, first, scale in reversed(list(zip(b, FIRST_ROWS, SCALES, strict=True))):
        rank = sum(RANKS[: FIRST_ROWS.index(first)])
        rows = weight[first : first + len(part)]
        updated.insert(0, rows + scale * part @ a[rank : rank + part.shape[1]])
    return torch.cat(updated)


def run_linear(weight, x, _, impl, **options):
    return [kernels.linear(x, weight, impl, **options)]


def run_norm_linear(weight, x, norm_weight, impl, **options):
    return kernels.norm_linear(x, norm_weight, weight, impl=impl, residual=x * 2, **options)


def run_norm_linear_rows(weight, x, norm_weight, impl, **options):
    return kernels.norm_linear_rows(x, norm_weight, weight, ROWS, 8, impl=impl, **options)


def run_swiglu_linear(weight, x, _, impl, consume=False, keep=False, **options):
    gate_up = torch.cat((x, x.flip(0)), 1)
    return [kernels.swiglu_linear(gate_up, weight, impl, consume, keep, **options)]


RUNS = [
    run_linear,
    run_norm_linear,
    partial(run_norm_linear, keep=True),
    run_norm_linear_rows,
    partial(run_norm_linear_rows, keep=True),
    run_swiglu_linear,
    partial(run_swiglu_linear, consume=True),
    partial(run_swiglu_linear, keep=True),
]


def gradients_of(outputs, inputs):
    """Return the gradients of inputs by a loss that weighs each element of every output otherwise; None for frozen."""
    loss = sum((y.double() * torch.arange(1, y.numel() + 1).view_as(y).cos()).sum() for y in outputs)
    return torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], allow_unused=True)


def check(run, dtype, bound, x_grad, **dropout):
    """Compare a run by the kernels (fp64: by the reference) with W + scale B A; under dropout with the reference."""
    weight, x, norm_weight, parts = draw(N, D) / 5, draw(T, D), draw(D), factors()
    inputs = [t.to(dtype).requires_grad_() for t in parts]
    rows = x.to(dtype).requires_grad_(x_grad)
    impl = "ref" if dtype == torch.float64 else "triton"
    ours = run(weight.to(dtype), rows, norm_weight.to(dtype), impl, low_rank=low_rank(*inputs, **dropout))
    true_inputs = [t.requires_grad_() for t in parts]
    true_rows = x.detach().clone().requires_grad_(x_grad)
    if dropout:
        true = run(weight, true_rows, norm_weight, "ref", low_rank=low_rank(*true_inputs, **dropout))
    else:
        true = run(whole_weight(weight, *true_inputs), true_rows, norm_weight, "ref")
    for a, b in zip(ours, true, strict=True):
        assert worst(a.double() - b) <= bound * max(1, worst(b))
    of_ours, of_true = gradients_of(ours, [rows, *inputs]), gradients_of(true, [true_rows, *true_inputs])
    assert len(of_ours) == len(parts) + x_grad
    for a, b in zip(of_ours, of_true, strict=True):
        assert a.dtype == dtype and worst(a.double() - b) <= bound * max(1, worst(b))


def name_of(run):
    return str(getattr(run, "func", run).__name__)


@pytest.mark.parametrize("x_grad", [True, False], ids=["", "frozen below"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_an_updated_weight_is_the_weight_and_its_products(run, dtype, bound, x_grad):
    check(run, dtype, bound, x_grad)


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_backward_drops_what_forward_dropped(run):
    check(run, torch.float32, 3e-5, True, dropout=0.4, seed=5)


def test_dropout_keeps_the_mean_and_follows_its_seed():
    ones = torch.ones(300, 100)
    dropped = [low_rank(*factors(), dropout=0.4, seed=seed).drop(ones) for seed in (5, 5, 6)]
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2])
    assert set(dropped[0].unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert abs(dropped[0].mean() - 1) < 0.02
    assert low_rank(*factors(), dropout=0.4).drop(ones) is ones  # without a seed, as where nothing is trained


def test_what_does_not_fit_is_named():
    a, *b = [t.float() for t in factors()]
    with pytest.raises(ValueError, match="ranks differ"):
        low_rank(a[1:], *b)
    fits = low_rank(a, *b)
    for wrong in ({"first_rows": fits.first_rows[1:]}, {"scales": (*fits.scales, 1.0)}):
        with pytest.raises(ValueError, match="ranks differ"):
            replace(fits, **wrong)
    with pytest.raises(ValueError, match=rf"linear: low_rank has A \(5, 24\) .*wanted A \(R, {D + 1}\)"):
        kernels.linear(torch.zeros(2, D + 1), torch.zeros(N, D + 1), low_rank=fits)
    with pytest.raises(ValueError, match=r"linear: low_rank has A \(5, 24\) and a part of rows 8 to 13"):
        kernels.linear(torch.zeros(2, D), torch.zeros(12, D), low_rank=low_rank(a, *b))
    with pytest.raises(ValueError, match="none across 7"):
        kernels.norm_linear_rows(torch.zeros(2, D), torch.ones(D), torch.zeros(N, D), ROWS[:1], 7,
                                 low_rank=low_rank(a, *b))  # fmt: skip

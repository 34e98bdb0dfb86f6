"""RMSNorm, alone and before a linear map, in Triton against the formula in fp64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.ops import rms_norm as op
from kernels.ops.common import chip, launch_table
from tests.helpers.kernels import DEVICE, needs_compiler, needs_gpu, needs_kernels, sized
from tests.helpers.run import worst

pytestmark = needs_kernels

TILES = {"rms_norm": {"forward": {"ROWS": 2}, "backward": {"ROWS": 2}, "dw": {"COLS": 16, "ROWS": 2}}}
EPS = 1e-5
DTYPES = [torch.float32, torch.float16]


def norm(x, weight, residual=None, impl="triton"):
    return kernels.rms_norm(x, weight, EPS, impl, residual)


def linear(x, norm_weight, weight, residual=None, impl="triton"):
    return kernels.norm_linear(x, norm_weight, weight, EPS, impl, residual)


def with_gradients(f, inputs, upstream):
    """Outputs of f, and the gradient of each input."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return *(t.detach() for t in out), *torch.autograd.grad(out, inputs, [t.to(out[0].dtype) for t in upstream])


def compare(f, inputs, upstream):
    """Our errors at most twice those of the reference in the same dtype, both against it in fp64; half a unit of the
    dtype is nobody's error."""
    ours = with_gradients(f, inputs, upstream)
    theirs = with_gradients(partial(f, impl="ref"), inputs, upstream)
    truth = with_gradients(partial(f, impl="ref"), [t.double() for t in inputs], upstream)
    floor = max(1e-6, torch.finfo(inputs[0].dtype).eps / 2)
    for i, (a, b, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.shape == true.shape and a.dtype == inputs[0].dtype and a.isfinite().all(), i
        assert worst(a.double() - true) <= 2 * worst(b.double() - true) + floor * worst(true), i
    return ours


def random(device, *shapes, dtype=torch.float32):
    return [torch.randn(*shape, device=device).to(dtype) for shape in shapes]


@pytest.fixture
def poison(monkeypatch):
    """New memory holds NaN."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))


# ---- alone, and of a sum --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 7), (2, 3, 33), (9, 64), (5, 576), (3, 4096)], ids=str)
def test_norm(shape, dtype, device, poison):
    x, residual, dy, ds = random(device, *[shape] * 4, dtype=dtype)
    (weight,) = random(device, shape[-1:], dtype=dtype)
    compare(norm, (x, weight), (dy,))
    compare(norm, (x, weight, residual), (dy, ds))


def test_rounds_where_the_reference_rounds(device):
    x, residual, weight = random(device, (16, 512), (16, 512), (512,), dtype=torch.float16)
    y, s = norm(x, weight, residual)
    assert s.equal(x + residual) and y.equal(norm(s, weight))  # statistics of the sum as it is stored
    assert (y == norm(s, weight, impl="ref")).float().mean() > 0.99  # x_hat is rounded before the weight
    _, _, rstd = op.forward(s, None, weight, EPS)
    assert op.backward(x, s, weight, rstd, None, True)[2].equal(y)  # backward's output is forward's


@pytest.mark.parametrize("scale", [0.0, 1e-6, 300.0, 3e4])
def test_rows_whose_squares_leave_fp16(scale, device):
    x, weight, dy = random(device, (3, 512), (512,), (3, 512), dtype=torch.float16)
    compare(norm, (x.clamp(-2, 2) * scale, weight, x * 0), (dy * 1e-2, dy * 0))


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_both_outputs_is_used(used, device):
    x, weight, residual, dy = random(device, (5, 24), (24,), (5, 24), (5, 24))
    compare(lambda *inputs, impl="triton": norm(*inputs, impl=impl)[used] + 0 * inputs[1], (x, weight, residual), (dy,))


def test_any_strides_and_an_upstream_gradient_of_stride_0(device):
    x, weight, residual, dy = random(device, (33, 6), (33,), (6, 66), (1, 1))
    compare(norm, (x.T, weight, residual[:, ::2]), (dy.expand(6, 33), dy.expand(6, 33)))


def test_gradients_do_not_depend_on_which_are_asked_for(device):
    inputs = random(device, (5, 24), (24,), (5, 24))
    upstream = random(device, (5, 24), (5, 24))
    *_, dx, dw, _ = with_gradients(norm, inputs, upstream)
    for i, whole in ((0, dx), (1, dw), (2, dx)):
        alone = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        assert torch.autograd.grad(norm(*alone), alone[i], upstream)[0].equal(whole)


@pytest.mark.parametrize("with_residual", [False, True])
def test_nothing_that_is_read_is_written_and_two_runs_are_bit_equal(with_residual, device):
    inputs = random(device, (37, 40), (40,), *[(37, 40)] * with_residual)
    upstream = random(device, *[(37, 40)] * (1 + with_residual))
    before = [t.clone() for t in (*inputs, *upstream)]
    first = with_gradients(norm, inputs, upstream)
    assert all(a.equal(b) for a, b in zip(before, (*inputs, *upstream), strict=True))
    held = {t.data_ptr() for t in (*inputs, *upstream)}
    assert not held & {t.data_ptr() for t in first}
    assert all(a.equal(b) for a, b in zip(first, with_gradients(norm, inputs, upstream), strict=True))


@pytest.mark.parametrize("with_residual", [False, True])
def test_operators_without_kernels_are_autograds(with_residual):
    x, weight, residual, dy, ds = random("cpu", (5, 9), (9,), (5, 9), (5, 9), (5, 9), dtype=torch.float64)
    inputs = (x, weight, residual) if with_residual else (x, weight)
    upstream = (dy, ds) if with_residual else (dy,)
    y, s, rstd = op._forward_cpu(x, residual if with_residual else None, weight, EPS)
    truth = with_gradients(partial(norm, impl="ref"), inputs, upstream)
    dx, dw, again = op._backward_cpu(dy, s if with_residual else x, weight, rstd, ds if with_residual else None, True)
    assert worst(y - truth[0]) < 1e-12 and worst(again - y) < 1e-12
    assert worst(dx - truth[-len(inputs)]) < 1e-12 and worst(dw - truth[1 - len(inputs)]) < 1e-12
    assert op._backward_cpu(dy, x, weight, rstd, None, False)[2].numel() == 0


@pytest.mark.parametrize("extra", [False, True])
def test_operators_tell_torch_the_truth(extra, device):
    x, residual, dy, ds = random(device, *[(5, 24)] * 4, dtype=torch.float16)
    weight, rstd = torch.randn(24, device=device).half(), torch.rand(5, device=device)
    torch.library.opcheck(op.forward, (x, residual if extra else None, weight, EPS))
    torch.library.opcheck(op.backward, (dy, x, weight, rstd, ds if extra else None, extra))


# ---- norm_linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d", "n"), [(0, 8, 4), (1, 2, 1), (5, 24, 40), (7, 576, 30)])
def test_norm_linear(t, d, n, dtype, device, poison):
    x, residual, weight, norm_weight, dy, ds = random(device, (t, d), (t, d), (n, d), (d,), (t, n), (t, d), dtype=dtype)
    _, same, *_ = compare(linear, (x, norm_weight, weight / d**0.5), (dy, ds))
    _, added, *_ = compare(linear, (x, norm_weight, weight / d**0.5, residual), (dy, ds))
    assert same.equal(x) and added.equal(x + residual)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_norm_linear_of_which_one_output_is_used(used, with_residual, device):
    inputs = random(device, (5, 24), (24,), (40, 24), *[(5, 24)] * with_residual)
    upstream = random(device, [(5, 40), (5, 24)][used])
    compare(
        lambda *inputs, impl="triton": linear(*inputs, impl=impl)[used] + 0 * (inputs[1].sum() + inputs[2].sum()),
        inputs, upstream,
    )  # fmt: skip


def test_x_is_used_before_the_norm_and_after_it_in_any_strides(device):
    x, norm_weight, weight, dy = random(device, (24, 5), (24,), (24, 24), (1, 1))

    def twice(x, norm_weight, weight, impl="triton"):
        y, same = linear(x.T, norm_weight, weight, impl=impl)
        y, same = linear(same * 2 + y, norm_weight, weight, x.T, impl)
        return y + same + x.T

    compare(twice, (x, norm_weight, weight.T), (dy.expand(5, 24),))
    kept = partial(checkpoint, twice, use_reentrant=False)
    ours, again = (with_gradients(f, (x, norm_weight, weight), (dy.expand(5, 24),)) for f in (twice, kept))
    assert all(a.equal(b) for a, b in zip(ours, again, strict=True))


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("asked", "products"),
    [("x", 1), ("residual", 1), ("norm", 1), ("weight", 1), ("x weight", 2), ("x norm", 1), ("x residual", 1)],
)
def test_norm_linear_multiplies_for_what_is_asked_alone(asked, products, device):
    names = "x", "norm", "weight", "residual"
    inputs = dict(zip(names, random(device, (5, 24), (24,), (40, 24), (5, 24)), strict=True))
    upstream = random(device, (5, 40), (5, 24))
    whole = dict(zip(inputs, with_gradients(linear, inputs.values(), upstream)[2:], strict=True))
    leaves = {name: t.clone().requires_grad_(name in asked.split()) for name, t in inputs.items()}
    y, same = linear(*leaves.values())
    held = [t for t in (y, same) if t.requires_grad]
    with _Products() as counted:
        grads = torch.autograd.grad(held, [leaves[name] for name in asked.split()], upstream[: len(held)])
    assert counted.count == products
    assert all(grad.equal(whole[name]) for name, grad in zip(asked.split(), grads, strict=True))


@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_linear_saves_its_input_and_a_number_a_row(with_residual, device):
    shapes = (64, 24), (24,), (40, 24), *[(64, 24)] * with_residual
    x, norm_weight, weight, *residual = (t.requires_grad_() for t in random(device, *shapes))
    saved = {}

    def note(t):
        saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        _, s = linear(x, norm_weight, weight, *residual)
    assert sum(saved.values()) == x.numel() + norm_weight.numel() + weight.numel() + len(x)
    assert s.data_ptr() in saved and (s.data_ptr() == x.data_ptr()) != with_residual  # x is handed back, not copied


def test_norm_linear_writes_nothing_that_it_reads(device):
    inputs, upstream = random(device, (5, 24), (24,), (40, 24), (5, 24)), random(device, (5, 40), (5, 24))
    before = [t.clone() for t in (*inputs, *upstream)]
    made = with_gradients(linear, inputs, upstream)
    assert all(a.equal(b) for a, b in zip(before, (*inputs, *upstream), strict=True))
    assert not {t.data_ptr() for t in (*inputs, *upstream)} & {t.data_ptr() for t in made}


def linear_rows(rows, n):
    return kernels.norm_linear_rows(torch.zeros(2, 8), torch.zeros(8), torch.zeros(4, 8), rows, n)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm(torch.zeros(2, 8193), torch.zeros(8193)), "rms_norm: D=8193 is over 8192; pass impl='ref'"),
        (lambda: linear(torch.zeros(2, 8193), torch.zeros(8193), torch.zeros(1, 8193)), "norm_linear: D=8193 is over"),
        (lambda: norm(torch.zeros(2, 8), torch.zeros(8), torch.zeros(3, 8)), r"residual is \(3, 8\)"),
        (lambda: norm(torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 8).half()), "residual is .* torch.float16"),
        (lambda: linear(torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(4, 8)), r"x is \(2, 3, 8\).*wanted \(T, D\)"),
        (lambda: linear(torch.zeros(2, 8), torch.zeros(8).half(), torch.zeros(4, 8)), "weight is torch.float16"),
        *(
            (lambda call=call, w=w, more=more: call(torch.zeros(2, 8), torch.zeros(w), *more), rf"weight is \({w},\)")
            for call, more in ((norm, ()), (linear, (torch.zeros(4, 8),)))
            for w in (1, 7)
        ),
        *(
            (lambda shape=shape: linear(torch.zeros(2, 8), torch.zeros(8), torch.zeros(shape)), r"wanted .*, \(N, D\)")
            for shape in ((8,), (4, 7), (4, 8, 8))
        ),
        *(
            (lambda rows=rows, n=n: linear_rows(torch.tensor(rows), n), rf"norm_linear_rows: rows .*, n {n}; wanted")
            for rows, n in (([0], 5), ([0], -1), ([[0]], 2))
        ),
        (
            lambda: linear(torch.zeros(2, 8), torch.zeros(8), torch.zeros(4, 8), torch.zeros(2, 1)),
            r"residual is \(2, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert norm(torch.ones(1, 8193), torch.ones(8193), impl="ref").isfinite().all()


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("d", [576, 2048, 4096, 5120, 8192])
def test_bf16_at_real_sizes(d):
    rows, out = sized(4099, 9), sized(256, 16)
    x, residual, dy, ds = random(DEVICE, *[(rows, d)] * 4, dtype=torch.bfloat16)
    norm_weight, weight, dout = random(DEVICE, (d,), (out, d), (rows, out), dtype=torch.bfloat16)
    compare(norm, (x, norm_weight), (dy,))
    compare(norm, (x, norm_weight, residual), (dy, ds))
    compare(linear, (x, norm_weight, weight / d**0.5), (dout, ds))
    compare(linear, (x, norm_weight, weight / d**0.5, residual), (dout, ds))


def count_other_bits_in_backward(d, dtype):
    """How many outputs have other bits where backward computes them again."""
    x, dy, weight = random(DEVICE, (37, d), (37, d), (d,), dtype=dtype)
    y, _, rstd = op.forward(x, None, weight, EPS)
    return (y != op.backward(dy, x, weight, rstd, None, True)[2]).sum()


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 3, 24, 576, 4096])
def test_backward_computes_the_output_that_forward_had(d, dtype):
    assert count_other_bits_in_backward(d, dtype) == 0


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("num_warps", [1, 4, 16])
def test_backward_computes_the_output_that_forward_had_with_any_tile(rows, num_warps, monkeypatch):
    sizes = launch_table("rms_norm")["forward"][chip(torch.device(DEVICE))]
    for size, config in sizes.items():
        monkeypatch.setitem(sizes, size, config | {"ROWS": rows, "num_warps": num_warps})
    assert count_other_bits_in_backward(24, torch.float32) == 0


@needs_gpu
def test_more_than_2_to_the_31_elements():
    rows, d = 2**31 // 4096 + 5, 4096
    x = torch.empty(rows, d, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.randn(d, device="cuda").bfloat16()
    y, _, rstd = op.forward(x, None, weight, EPS)
    dx, _, again = op.backward(y, x, weight, rstd, None, True)
    tail_y, _, tail_rstd = op.forward(x[-9:].clone(), None, weight, EPS)
    tail_dx, _, _ = op.backward(tail_y, x[-9:].clone(), weight, tail_rstd, None, False)
    assert y[-9:].equal(tail_y) and again[-9:].equal(tail_y) and dx[-9:].equal(tail_dx)

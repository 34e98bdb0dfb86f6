"""SwiGLU, alone and before a linear map, in Triton against the formula in fp64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.ops import swiglu as op
from tests.helpers.kernels import DEVICE, needs_compiler, needs_gpu, needs_kernels, sized
from tests.helpers.run import worst

pytestmark = needs_kernels

TILES = {"swiglu": {"forward": {"COLS": 16}, "backward": {"COLS": 16}}}
DTYPES = [torch.float32, torch.float16]
SIZES = [(0, 4, 3), (1, 1, 1), (3, 17, 5), (5, 40, 24), (2, 300, 33)]  # T, F, D


def glu(gate_up, impl="triton"):
    return kernels.swiglu(gate_up, impl)


def linear(gate_up, weight, impl="triton", consume=False, keep=False):
    """consume takes a copy: its caller has no other use for gate_up."""
    return kernels.swiglu_linear(gate_up * 1 if consume else gate_up, weight, impl, consume, keep)


def with_gradients(f, inputs, upstream):
    """The output of f, and the gradient of each input."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


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


def inputs_of(t, f, d, device, dtype=torch.float32):
    """gate_up, weight, residual and an upstream gradient."""
    gate_up, weight, dy = random(device, (t, 2 * f), (d, f), (t, d), dtype=dtype)
    return [gate_up, weight / f**0.5], dy


@pytest.fixture
def poison(monkeypatch):
    """New memory holds NaN."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "f"), [(0, 4), (1, 1), (3, 17), (5, 40), (2, 300)])
def test_swiglu(t, f, dtype, device, poison):
    gate_up, dh = random(device, (t, 2 * f), (t, f), dtype=dtype)
    compare(glu, [gate_up * 3], dh)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "f", "d"), SIZES)
def test_swiglu_linear(t, f, d, dtype, consume, device, poison):
    inputs, dy = inputs_of(t, f, d, device, dtype)
    ours = compare(partial(linear, consume=consume), inputs, dy)
    kept = with_gradients(partial(linear, consume=consume, keep=True), inputs, dy)
    assert all(a.equal(b) for a, b in zip(ours, kept, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_from_zero_and_at_it(device):
    gate = torch.tensor([0.0, -0.0, 1e-7, 20.0, -20.0, 88.0, -88.0, 200.0, -200.0, 1e5, -1e5], device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    compare(glu, [gate_up], torch.ones(1, len(gate), device=device))


def test_any_strides_and_an_upstream_gradient_of_stride_0(device):
    gate_up, weight, dy = random(device, (34, 5), (17, 9), (1, 1))
    compare(glu, [gate_up.T], dy.expand(5, 17))
    for consume in (False, True):
        compare(partial(linear, consume=consume), [gate_up.T, weight.T], dy.expand(5, 9))


@pytest.mark.parametrize("consume", [False, True])
def test_nothing_that_is_read_is_written_and_two_runs_are_bit_equal(consume, device):
    inputs, dy = inputs_of(17, 20, 12, device)
    before = [t.clone() for t in (*inputs, dy)]
    first = with_gradients(partial(linear, consume=consume), inputs, dy)
    assert all(a.equal(b) for a, b in zip(before, (*inputs, dy), strict=True))
    _, dgate_up, dweight = first
    assert not {t.data_ptr() for t in (*inputs, dy)} & {t.data_ptr() for t in (dgate_up, dweight)}
    again = with_gradients(partial(linear, consume=consume), inputs, dy)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    gate_up, dh = inputs[0].requires_grad_(), random(device, (17, 20))[0]
    held = dh.clone()
    torch.autograd.grad(glu(gate_up), gate_up, dh)
    assert dh.equal(held) and gate_up.equal(before[0])


# ---- consume --------------------------------------------------------------------------------------------------------


def test_consume_writes_the_gradient_over_gate_up(device):
    (gate_up, weight), dy = inputs_of(5, 20, 12, device)
    _, dgate_up, _ = with_gradients(linear, (gate_up, weight), dy)
    gate_up = gate_up.requires_grad_()
    ours = kernels.swiglu_linear(gate_up, weight, "triton", consume=True)
    (grad,) = torch.autograd.grad(ours, gate_up, dy)
    assert grad.data_ptr() == gate_up.data_ptr() and not grad.requires_grad
    assert grad.equal(dgate_up)


def test_what_is_kept_is_not_written_again(device):
    gate_up, dh = random(device, (5, 40), (5, 20))
    over, kept = gate_up.clone(), dh.clone()
    op.backward_over(kept, over, False)
    assert kept.equal(dh) and over.equal(op.backward(dh, gate_up, False)[0])


def test_alone_its_backward_makes_no_output_again(device, monkeypatch):
    asked, real = [], op.backward
    monkeypatch.setattr(op, "backward", lambda dh, gate_up, want_h: asked.append(want_h) or real(dh, gate_up, want_h))
    gate_up, dh = random(device, (5, 40), (5, 20))
    with_gradients(glu, [gate_up], dh)
    assert asked == [False] and real(dh, gate_up, False)[1].numel() == 0


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_without_numbers_nothing_is_launched(shape, monkeypatch):
    monkeypatch.setattr(op, "_forward_kernel", None)
    monkeypatch.setattr(op, "_backward_kernel", None)
    gate_up, dh = torch.zeros(shape), torch.zeros(shape[0], shape[1] // 2)
    assert op.forward.launch(gate_up).shape == dh.shape
    dgate_up, h = op.backward.launch(dh, gate_up, True)
    assert dgate_up.shape == shape and h.shape == dh.shape


def test_without_consume_a_second_backward_gives_the_same(device):
    (gate_up, weight), dy = inputs_of(5, 20, 12, device)
    gate_up = gate_up.requires_grad_()
    y = kernels.swiglu_linear(gate_up, weight, "triton")
    first, again = (torch.autograd.grad(y, gate_up, dy, retain_graph=True)[0] for _ in range(2))
    assert first.equal(again)


def test_autograd_refuses_what_would_read_a_consumed_gate_up(device):
    (gate_up, weight), dy = inputs_of(5, 20, 12, device)
    gate_up = gate_up.requires_grad_()
    consumed = gate_up * 1
    other = consumed.square()  # saves it too
    y = kernels.swiglu_linear(consumed, weight, "triton", consume=True)
    torch.autograd.grad(y, gate_up, dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other.sum(), gate_up)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, gate_up, dy)


# ---- what is asked for, what is saved -------------------------------------------------------------------------------


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize(("asked", "products"), [("gate_up", 1), ("weight", 1), ("gate_up weight", 2)])
def test_multiplies_for_what_is_asked_alone(asked, products, consume, device):
    tensors, dy = inputs_of(5, 20, 12, device)
    inputs = dict(zip(("gate_up", "weight"), tensors, strict=True))
    whole = dict(zip(inputs, with_gradients(linear, tensors, dy)[1:], strict=True))
    leaves = {name: t.clone().requires_grad_(name in asked.split()) for name, t in inputs.items()}
    y = linear(*leaves.values(), consume=consume)
    with _Products() as counted:
        grads = torch.autograd.grad(y, [leaves[name] for name in asked.split()], dy)
    assert counted.count == products
    assert all(grad.equal(whole[name]) for name, grad in zip(asked.split(), grads, strict=True))


def test_saves_gate_up_and_weight_alone(device):
    inputs, _ = inputs_of(50, 20, 12, device)
    saved = {}

    def note(t):
        saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kernels.swiglu_linear(*(t.requires_grad_() for t in inputs), "triton")
    assert sum(saved.values()) == inputs[0].numel() + inputs[1].numel()


@pytest.mark.parametrize("consume", [False, True])
def test_a_feed_forward_recomputed_and_compiled(consume, device):
    """A layer's second half and the next norm, which adds what goes round the first norm and the products."""
    x, residual, norm_weight, w13, w2, dy = random(device, (5, 24), (5, 24), (24,), (40, 24), (24, 20), (5, 24))

    def feed_forward(x, residual, norm_weight, w13, w2, impl="triton"):
        gate_up, residual = kernels.norm_linear(x, norm_weight, w13, 1e-5, impl, residual)
        down = kernels.swiglu_linear(gate_up, w2, impl, consume)
        return kernels.rms_norm(down, norm_weight, 1e-5, impl, residual)[0]

    inputs = (x, residual, norm_weight, w13 / 5, w2 / 5)
    ours = compare(feed_forward, inputs, dy)
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    for other in (partial(checkpoint, feed_forward, use_reentrant=False), compiled):
        assert all(a.equal(b) for a, b in zip(ours, with_gradients(other, inputs, dy), strict=True))


# ---- the operators --------------------------------------------------------------------------------------------------


def test_operators_without_kernels_are_autograds():
    (gate_up, _), _ = inputs_of(5, 9, 4, "cpu", torch.float64)
    (dh,) = random("cpu", (5, 9), dtype=torch.float64)
    gate, up = gate_up.chunk(2, -1)
    sigmoid = 1 / (1 + (-gate).exp())
    truth = torch.cat((dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid), -1)
    h = gate * sigmoid * up
    assert worst(op.swiglu_ref(gate_up) - h) < 1e-12
    for want_h in (False, True):
        dgate_up, again = op._backward_cpu(dh, gate_up, want_h)
        assert worst(dgate_up - truth) < 1e-12 and again.numel() == want_h * h.numel()
    assert worst(again - h) < 1e-12
    for want_h in (False, True):
        over, made = gate_up.clone(), dh.clone()
        op._backward_over_cpu(made, over, want_h)
        assert worst(over - truth) < 1e-12 and worst(made - (h if want_h else dh)) < 1e-12


def test_operators_tell_torch_the_truth(device):
    gate_up, dh = random(device, (5, 34), (5, 17), dtype=torch.float16)
    torch.library.opcheck(op.forward, (gate_up,))
    for want_h in (False, True):
        torch.library.opcheck(op.backward, (dh, gate_up, want_h))
        torch.library.opcheck(op.backward_over, (dh.clone(), gate_up.clone(), want_h))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: glu(t(2, 3, 4)), r"gate_up is \(2, 3, 4\)"),
        (lambda t: glu(t(2, 4, 4)), r"gate_up is \(2, 4, 4\)"),
        (lambda t: linear(t(2, 10, 3), t(4, 5)), r"wanted \(T, 2F\), \(D, F\)"),
        (lambda t: glu(t(2, 3)), "wanted an even number"),
        (lambda t: linear(t(2, 8), t(5, 3)), r"wanted \(T, 2F\), \(D, F\)"),
        (lambda t: linear(t(2, 8), t(4)), r"wanted \(T, 2F\), \(D, F\)"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("f", [1536, 5632, 11008, 14336])
def test_bf16_at_real_sizes(f):
    rows, out = sized(1027, 5), sized(512, 32)
    inputs, dy = inputs_of(rows, f, out, DEVICE, torch.bfloat16)
    for consume in (False, True):
        compare(partial(linear, consume=consume), inputs, dy)
    compare(glu, inputs[:1], torch.randn(rows, f, device=DEVICE).bfloat16())


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("f", [333, 1536])
def test_backward_computes_the_output_that_forward_had(f, dtype):
    gate_up, dh = random(DEVICE, (37, 2 * f), (37, f), dtype=dtype)
    assert op.backward(dh, gate_up, True)[1].equal(op.forward(gate_up))


@needs_gpu
def test_more_than_2_to_the_31_elements():
    rows, f = 2**31 // (2 * 11008) + 5, 11008
    gate_up = torch.empty(rows, 2 * f, dtype=torch.bfloat16, device="cuda").normal_()
    h = op.forward(gate_up)
    tail, tail_h = op.backward(h[-9:].clone(), gate_up[-9:].clone(), True)
    assert h[-9:].equal(tail_h)
    op.backward_over(h, gate_up, True)
    assert gate_up[-9:].equal(tail) and h[-9:].equal(tail_h)

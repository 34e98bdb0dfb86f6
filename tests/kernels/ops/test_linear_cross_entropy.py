"""The kernels of linear_cross_entropy, at most twice as far from fp64 as torch's own path in the same dtype."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_cross_entropy
from kernels.native.cpu import find_cpu
from kernels.ops import linear_cross_entropy as module
from tests.helpers.kernels import CHIP, CUDA, DEVICE, needs_compiler, needs_gpu, sized
from tests.helpers.run import worst

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * bool(CUDA or CHIP)
TILES = {"linear_cross_entropy": {"rows": {"VECTORS": 16}, "scale": {"BLOCK": 256}}}
TILE = 128  # columns of a 16-bit tile in the interpreter, 64 in fp32
V = 203  # odd, over one tile

# The interpreter reckons with what is in the padding, as a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def chunks(monkeypatch):
    """chunks(n): from here on chunks hold n rows."""
    return lambda n: monkeypatch.setattr(module, "chunk_rows", lambda *sizes: n)


def inputs(device, dtype=torch.float32, n_rows=9, dim=16, vocab=V, weighted=True):
    """x, weight, targets with the first and the last id and two ignored rows, weights with a zero."""
    x = torch.randn(n_rows, dim, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, device=device).to(dtype).requires_grad_()
    targets, weights = torch.randint(vocab, (n_rows,)), torch.rand(n_rows) + 0.5
    for row, target in ((0, 0), (1, vocab - 1), (3, -100), (7, -100)):
        targets[row : row + 1] = target
    weights[5:6] = 0
    return x, weight, targets.to(device), weights.to(device) if weighted else None


def formula(x, weight, targets, weights=None, ignore_index=-100, z_loss=0.0, label_smoothing=0.0):
    """As the docstring has it, in fp64."""
    logits = x.double() @ weight.double().T
    keep = targets != ignore_index
    logits, targets = logits[keep], targets[keep]
    lse = logits.exp().sum(-1).log()
    minus_log_p = lse[:, None] - logits
    nll = minus_log_p[torch.arange(len(targets), device=x.device), targets]
    loss = (1 - label_smoothing) * nll + label_smoothing * minus_log_p.mean(-1) + z_loss * lse**2
    return (loss if weights is None else loss * weights[keep]).sum()


def grads(loss, *tensors, upstream=0.5):
    return loss.detach(), *torch.autograd.grad(loss, tensors, torch.full_like(loss, upstream))


def rms(difference):
    return difference.square().mean().sqrt().item()


def assert_as_good_as_torch(x, weight, *args, upstream=0.5, error=worst, **settings):
    """Loss, dx and dW are at most twice as far from fp64 as torch's. An upstream gradient that is a power of two scales
    both without rounding; after another the worst of a few numbers is luck, and error=rms compares them all."""
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = grads(formula(*exact, *args, **settings), *exact, upstream=upstream)
    ours, theirs = (
        grads(linear_cross_entropy(x, weight, *args, impl=impl, **settings), x, weight, upstream=upstream)
        for impl in ("triton", "ref")
    )
    for name, ours_, theirs_, truth_ in zip(("loss", "dx", "dw"), ours, theirs, truth, strict=True):
        assert ours_.dtype == theirs_.dtype and ours_.shape == theirs_.shape
        assert error(ours_ - truth_) <= 2 * error(theirs_ - truth_) + 1e-6 * worst(truth_), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, TILE - 1, TILE, TILE + 1, 192])
def test_vocabularies_around_a_tile(device, dtype, vocab):
    assert_as_good_as_torch(*inputs(device, dtype, vocab=vocab))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 4, 9])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks(device, dtype, n_rows, weighted, chunks):
    chunks(4)
    assert_as_good_as_torch(*inputs(device, dtype, n_rows, weighted=weighted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 9])
@pytest.mark.parametrize("upstream", [0.37, -3.0])
def test_upstream_gradients(device, dtype, rows, upstream, chunks):
    chunks(rows)
    assert_as_good_as_torch(*inputs(device, dtype), upstream=upstream, error=rms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [192, V])
@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 1.0, "z_loss": 0.3}, {"ignore_index": 0}],
    ids=str,
)
def test_smoothing_z_loss_and_the_ignored_id(device, dtype, vocab, settings, chunks):
    chunks(4)
    x, weight, targets, weights = inputs(device, dtype, vocab=vocab)
    if "ignore_index" in settings:
        targets = targets.clamp(min=0)
    assert_as_good_as_torch(x, weight, targets, weights, **settings)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_rows", [0, 1, 9])
def test_without_a_row_of_loss_all_is_zero(device, n_rows, weighted, chunks):
    chunks(4)
    x, weight, targets, weights = inputs(device, n_rows=n_rows, weighted=weighted)
    loss = linear_cross_entropy(
        x, weight, torch.full_like(targets, -100), weights, "triton", z_loss=0.1, label_smoothing=0.1
    )
    loss, dx, dw = grads(loss, x, weight)
    assert loss.shape == () and loss == 0 and dx.shape == x.shape and dx.eq(0).all() and dw.eq(0).all()


def test_ignored_rows_get_no_gradient_and_change_nothing(device):
    x, weight, targets, weights = inputs(device)
    keep = targets != -100
    _, dx, dw = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    assert dx[~keep].eq(0).all() and dx[keep][weights[keep] != 0].ne(0).any(-1).all()
    changed = torch.where(keep[:, None], x, 50.0).detach().requires_grad_()
    _, dx_changed, dw_changed = grads(
        linear_cross_entropy(changed, weight, targets, weights, "triton"), changed, weight
    )
    assert dx_changed.equal(dx) and dw_changed.equal(dw)


@pytest.mark.parametrize("gap", [5.0, 10.0, 20.0])
def test_a_confident_target_keeps_the_digits_of_its_gradient(device, gap):
    """p - 1 is -5e-9 at a gap of 20: in fp32 p is 1. With the identity for a weight dx is the logits' gradient."""
    x = torch.randn(3, V, device=device)
    targets = torch.tensor([0, 100, V - 1], device=device)
    x[range(3), targets] = x.amax(1) + gap
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    eye = torch.eye(V, device=device)
    _, dx = grads(linear_cross_entropy(x, eye, targets, impl="triton"), x)
    _, truth = grads(formula(exact, eye, targets), exact)
    others = truth.masked_fill(F.one_hot(targets, V).bool(), 0).sum(1)  # what the target's must be, without cancelling
    assert worst(dx[range(3), targets] / -others - 1) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_is_subtracted_before_rounding_to_16_bits(device, dtype):
    x = torch.zeros(2, 64, device=device)
    x[:, 5] = 12.0  # p is 0.9996, which is 1 in bf16
    x, targets = x.to(dtype).requires_grad_(), torch.full((2,), 5, device=device)
    eye = torch.eye(64, device=device, dtype=dtype)
    _, dx = grads(linear_cross_entropy(x, eye, targets, impl="triton"), x, upstream=1.0)
    truth = -63 / (63 + math.exp(12))
    assert worst(dx[:, 5].double() / truth - 1) <= torch.finfo(dtype).eps


def test_very_large_logits(device):
    eye = torch.eye(4, device=device)
    x = torch.tensor([[1e30, -1e30, 0, 1], [1e30, 1e30, 0, 1], [1e4, 1e4 - 1, 0, 0]], device=device).requires_grad_()
    loss, dx = grads(
        linear_cross_entropy(x[:2], eye, torch.tensor([0, 1], device=device), impl="triton"), x, upstream=1
    )
    assert abs(loss.item() - math.log(2)) < 1e-6
    assert worst(dx - torch.tensor([[0, 0, 0, 0], [0.5, -0.5, 0, 0], [0, 0, 0, 0]], device=device)) < 1e-6
    _, dx = grads(linear_cross_entropy(x[2:], eye, torch.tensor([2], device=device), impl="triton"), x, upstream=1)
    p = 1 / (1 + math.exp(-1))  # whatever both logits are; times log2(e) 1e4 has steps of 1e-3 left
    assert worst(dx[2] - torch.tensor([p, 1 - p, -1, 0], device=device)) < 1e-6
    loss = linear_cross_entropy(x[:1], eye, torch.tensor([2], device=device), impl="triton", label_smoothing=0.5)
    assert abs(loss.item() / 1e30 - 1) < 1e-6  # 1e30 / 2 + (0 + 2 + 1 + 1) 1e30 / 8
    x = torch.full((2, 1), 245.0, device=device, dtype=torch.float16)
    weight = torch.tensor([[245.0], [244.0], [-245.0]], device=device, dtype=torch.float16)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 2], device=device), impl="triton")
    assert loss.isfinite() and abs(loss.item() / (2 * 245 * 245) - 1) < 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_minus_infinity(device, smoothing):
    """A whole tile of them, and one more: probability 0, no NaN."""
    weight = torch.randn(V, 1, device=device)
    weight[:TILE], weight[150] = -math.inf, -math.inf
    weight.requires_grad_()
    x, targets = torch.ones(2, 1, device=device), torch.tensor([130, V - 1], device=device)
    loss, dw = grads(linear_cross_entropy(x, weight, targets, impl="triton", label_smoothing=smoothing), weight)
    truth, dw_truth = grads(F.cross_entropy(x @ weight.T, targets, reduction="sum", label_smoothing=smoothing), weight)
    if smoothing:
        assert loss == truth == math.inf
    else:
        assert abs(loss - truth) < 1e-5 and dw[:TILE].eq(0).all()
    assert worst(dw - dw_truth) < 1e-6


@pytest.mark.parametrize("target", [-1, V, V + 20, V + 100, 1 << 32, (1 << 32) + 3, -(1 << 62)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_target_that_is_no_id_shows(device, target, weighted, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # no help from what is in the padding
    x, weight, targets, weights = inputs(device, n_rows=3, weighted=weighted)
    targets[2] = target
    loss, dx, dw = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    assert loss.isnan() and dx[2].isnan().all() and dx[:2].isfinite().all() and dw.isnan().all()


def test_nan_logits_show(device):
    x, weight, targets, _ = inputs(device)
    with torch.no_grad():
        weight[77] = math.nan
    loss, dx, _ = grads(linear_cross_entropy(x, weight, targets, impl="triton"), x, weight)
    assert loss.isnan() and dx[0].isnan().all()


# ---- what upstream and memory see -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_gives_the_same_and_scales_with_upstream(device, dtype, rows, chunks):
    chunks(rows)
    x, weight, targets, weights = inputs(device, dtype)
    loss = linear_cross_entropy(x, weight, targets, weights, "triton")
    upstream = torch.tensor(0.37, device=device)
    first = torch.autograd.grad(loss, (x, weight), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # ours to give away: what is saved is not touched
    second = torch.autograd.grad(loss, (x, weight), upstream, retain_graph=True)
    doubled = torch.autograd.grad(2 * loss, (x, weight), upstream, retain_graph=True)
    nothing = torch.autograd.grad(loss, (x, weight), torch.zeros_like(upstream))
    for a, b, c, d in zip(kept, second, doubled, nothing, strict=True):
        assert a.equal(b) and worst(c - 2 * a) <= 2e-6 and d.eq(0).all()  # 2e-6: fp16 subnormals
    assert upstream == torch.tensor(0.37)


def test_inputs_are_not_written(device):
    args = inputs(device)
    before = [t.detach().clone() for t in args]
    linear_cross_entropy(*args, "triton", z_loss=0.1, label_smoothing=0.1).backward()
    assert all(t.equal(b) for t, b in zip(args, before, strict=True))


def test_repeats_are_bit_equal(device, chunks):
    chunks(4)
    x, weight, *args = inputs(device, DTYPES[-1])
    runs = [grads(linear_cross_entropy(x, weight, *args, impl="triton"), x, weight) for _ in range(3)]
    assert all(a.equal(b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_tied_weight_sums_both_gradients(device):
    _, weight, targets, weights = inputs(device)
    ids = torch.randint(V, targets.shape, device=device)

    def loss(impl):
        return linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, targets, weights, impl)

    (ours_loss, ours), (loss_ref, ref) = grads(loss("triton"), weight), grads(loss("ref"), weight)
    assert abs(ours_loss - loss_ref) <= 1e-5 * loss_ref and worst(ours - ref) <= 1e-6 * worst(ref) * 4


def test_any_strides(device):
    x, weight, targets, weights = (t.detach() for t in inputs(device))
    views = (x.T.contiguous().T, weight.repeat_interleave(2, 1)[:, ::2], targets.repeat_interleave(3)[::3])
    a, b = (t.requires_grad_() for t in views[:2])
    assert not any(t.is_contiguous() for t in views)
    every_second = weights.repeat_interleave(2)[::2]
    strided = grads(linear_cross_entropy(a, b, views[2], every_second, "triton"), a, b)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    plain = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    for ours, wanted in zip(strided, plain, strict=True):
        assert worst(ours - wanted) <= 1e-6 * worst(wanted)


def test_dw_is_summed_in_fp32_over_chunks(device, chunks):
    chunks(1)
    args = inputs(device, torch.float16, n_rows=64, dim=16, vocab=9)
    assert module.forward(*(t.detach() for t in args), -100, 0.0, 0.0, False, True, None, 0)[2].dtype == torch.float32
    assert_as_good_as_torch(*args, error=rms)
    x, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (64, 9))
    for rows, dtype in ((1, torch.float32), (64, torch.bfloat16)):
        chunks(rows)
        assert module._gradients_fake(x, weight, True, True)[1].dtype == dtype  # one chunk of bf16 needs no fp32


@pytest.mark.parametrize("rows", [4, 12])
def test_fp16_dw_may_pass_65504_before_the_upstream_gradient(device, rows, chunks):
    chunks(rows)
    x = torch.full((12, 4), 20000.0, device=device, dtype=torch.float16)
    weight = torch.zeros(3, 4, device=device, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.zeros(12, dtype=torch.int64, device=device), impl="triton")
    _, dw = grads(loss, weight, upstream=2**-4)
    assert dw[0].eq(-10000).all() and worst(dw[1:] - 5000) <= 4  # 1/3 in fp16, and an fp16 unit at 5000


class Watch(TorchDispatchMode):
    """What runs: how many matrix products, and the most bytes that an operation returned."""

    def __init__(self):
        super().__init__()
        self.products, self.largest, self.logits = 0, 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(out, torch.Tensor):
            self.logits = out if out.shape == (4, V) else self.logits
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("want_dx", [False, True])
@pytest.mark.parametrize("want_dw", [False, True])
def test_what_runs_is_what_is_wanted_and_logits_stay_a_chunk(device, want_dx, want_dw, chunks):
    chunks(4)
    args = [t.detach() for t in inputs(device, n_rows=24, dim=8)]
    with Watch() as seen:
        _, dx, dw = module.forward.launch(*args, -100, 0.0, 0.0, want_dx, want_dw, None, 0)
    if not (want_dx or want_dw):  # no gradient is written over the logits
        assert seen.logits.equal(args[0][-4:] @ args[1].T)
    assert seen.products == 6 * (1 + want_dx + want_dw)
    assert seen.largest <= 4 * max(4 * 256, V * 8) < 4 * 24 * V  # the buffer or the weight
    assert dx.shape == (args[0].shape if want_dx else (0,)) and dw.shape == (args[1].shape if want_dw else (0,))


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("x", "weight"), ("no_grad",)], ids=str)
def test_only_what_needs_a_gradient_is_asked_for(device, frozen, monkeypatch):
    x, weight, targets, weights = inputs(device)
    wanted = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    asked, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args: asked.append(args[-4:-2]) or forward(*args))
    free = ["no_grad" not in frozen and name not in frozen for name in ("x", "weight")]
    x.requires_grad_("x" not in frozen), weight.requires_grad_("weight" not in frozen)
    with torch.set_grad_enabled("no_grad" not in frozen):
        loss = linear_cross_entropy(x, weight, targets, weights, "triton")
    assert asked == [tuple(free)] and loss.requires_grad == any(free) and loss.equal(wanted[0])
    if any(free):
        leaves = [(t, g) for t, g, is_free in zip((x, weight), wanted[1:], free, strict=True) if is_free]
        for (_, want), got in zip(leaves, grads(loss, *(t for t, _ in leaves))[1:], strict=True):
            assert got.equal(want)


@pytest.mark.parametrize("want_dw", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocab", [65, 32000, 32003, 49152, 128256, 1 << 21])
@pytest.mark.parametrize("n_rows", [0, 1, 129, 5000, 8192, 10_000_000])
def test_chunk_rows(n_rows, vocab, itemsize, want_dw):
    rows = module.chunk_rows(n_rows, vocab, itemsize, want_dw)
    n_bytes = (512 if want_dw else 128) << 20
    n_chunks = -(-n_rows // rows) if rows else 0
    assert rows % module.ROWS == 0 and rows * n_chunks >= n_rows
    padded = -(-vocab // 64) * 64
    assert rows * padded * itemsize <= max(n_bytes, 128 * padded * itemsize)
    assert n_chunks * (rows - module.ROWS) < max(n_rows, 1)  # evenly: no chunk could do with a tile less
    if n_chunks > 1:
        assert (n_chunks - 1) * (n_bytes // (padded * itemsize)) // 128 * 128 < n_rows + 128 * n_chunks
    if (n_rows, vocab, itemsize) in ((8192, 32000, 2), (8192, 128256, 2)):
        assert (
            rows
            == {(32000, True): 8192, (32000, False): 2048, (128256, True): 2048, (128256, False): 512}[vocab, want_dw]
        )


# ---- torch.library and the interface --------------------------------------------------------------------------------


def test_operators(device, chunks):
    chunks(4)
    x, weight, targets, weights = (t.detach() for t in inputs(device))
    torch.library.opcheck(module.forward, (x, weight, targets, weights, -100, 0.1, 0.1, True, True, None, 0))
    torch.library.opcheck(
        module.forward, (x, weight, targets, weights, -100, 0.1, 0.1, True, True, torch.randn_like(weight), 1)
    )
    torch.library.opcheck(
        module.forward, (x.half(), weight.half(), targets, None, -100, 0.0, 0.0, False, True, None, 0)
    )
    torch.library.opcheck(module.scaled, (x, torch.tensor(0.37, device=device), torch.float16))


def test_the_operators_without_triton_agree(device, chunks):
    chunks(4)
    x, weight, targets, weights = (t.detach() for t in inputs(device, torch.float16))
    for wants in ((True, True), (False, True), (True, False), (False, False)):
        args = x, weight, targets, weights, -100, 0.1, 0.1, *wants, None, 0
        for a, b in zip(module._forward_cpu(*args), module.forward(*args), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and worst(a - b) <= 2e-3 * (1 + worst(a))
    for beta in (0, 1):
        there = torch.randn_like(weight) if beta else torch.full_like(weight, torch.nan)
        into = [there.clone(), there.clone()]
        for run, grad in zip((module._forward_cpu, module.forward), into, strict=True):
            assert not run(x, weight, targets, weights, -100, 0.1, 0.1, True, True, grad, beta)[2].numel()
        assert worst(into[0] - into[1]) <= 4e-3 * (1 + worst(into[0])) and not into[0].equal(there)


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("rows", [4, 9])
def test_dw_is_added_to_the_gradient_that_is_there(device, rows, impl, chunks):
    """By forward, in place, to that of an earlier loss or into a new one; dx is as ever. Over one chunk and more."""
    if impl == "native" and (device == "cuda" or find_cpu() is None):
        pytest.skip("the CPU library is compiled by g++, on a machine without a GPU")
    chunks(rows)
    x, weight, *args = inputs(device)
    _, dx, dw = grads(linear_cross_entropy(x, weight, *args, impl), x, weight, upstream=1.0)
    for n_losses in (1, 2, 3):
        place, x.grad = weight.grad, None
        linear_cross_entropy(x, weight, *args, impl, accumulate=True).backward()
        assert place is None or weight.grad is place
        assert worst(weight.grad - n_losses * dw) <= 1e-6 * n_losses * worst(dw) and x.grad.equal(dx), n_losses
    with torch.no_grad():
        linear_cross_entropy(x, weight, *args, impl, accumulate=True)
    assert worst(weight.grad - 3 * dw) <= 3e-6 * worst(dw), "a loss that is not differentiated adds nothing"


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_a_batch_without_rows_keeps_the_gradient_that_is_there(device, impl):
    if impl == "native" and (device == "cuda" or find_cpu() is None):
        pytest.skip("the CPU library is compiled by g++, on a machine without a GPU")
    x, weight, targets, *_ = inputs(device)
    for there in (None, torch.ones_like(weight)):
        weight.grad = None if there is None else there.clone()
        linear_cross_entropy(x[:0], weight, targets[:0], None, impl, accumulate=True).backward()
        assert weight.grad.equal(torch.zeros_like(weight) if there is None else there)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float16)], ids=str)
def test_scaled_rounds_once(device, n, dtypes):
    x, scale = torch.randn(n, device=device).to(dtypes[0]), torch.tensor(0.37, device=device)
    y = module.scaled(x, scale, dtypes[1])
    assert y.equal((x.float() * scale).to(dtypes[1])) and y.dtype == dtypes[1]


def test_compile_traces_it_whole(device):
    x, weight, targets, weights = inputs(device)

    def loss(x, weight):
        return linear_cross_entropy(x * 2, weight, targets, weights, "triton", z_loss=0.1) / 7

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(grads(compiled(x, weight), x, weight), grads(loss(x, weight), x, weight), strict=True):
        assert ours.equal(plain)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.3}, {"ignore_index": 7}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_reference_is_the_formula(settings, weighted):
    x, weight, targets, weights = inputs("cpu", torch.float64, weighted=weighted)
    targets = targets.clamp(min=0) if "ignore_index" in settings else targets
    ours = grads(linear_cross_entropy(x, weight, targets, weights, **settings), x, weight)
    for a, b in zip(ours, grads(formula(x, weight, targets, weights, **settings), x, weight), strict=True):
        assert a.dtype == torch.float64 and worst(a - b) < 1e-10
    nothing = grads(linear_cross_entropy(x, weight, torch.full_like(targets, -100), z_loss=0.1), x, weight)
    assert all(t.eq(0).all() for t in nothing)


def test_what_does_not_fit_is_said():
    x, weight, targets, weights = inputs("cpu")
    for args, settings, message in (
        ((x, weight, targets.int()), {}, "targets are torch.int32, wanted torch.int64"),
        ((x.half(), weight, targets), {}, "weight is torch.float32, x is torch.float16"),
        ((x, weight, targets[1:]), {}, r"targets \(8,\)"),
        ((x, weight[:, 1:], targets), {}, r"weight \(203, 15\)"),
        ((x[..., None], weight, targets), {}, r"x \(9, 16, 1\)"),
        ((x, weight[..., None], targets), {}, r"weight \(203, 16, 1\)"),
        ((x, weight, targets, weights[1:]), {}, r"weights \(8,\)"),
        ((x, weight, targets, torch.cat((weights, weights[:1]))), {}, r"weights \(10,\), targets \(9,\)"),
        ((x, weight, targets, weights[:, None]), {}, r"weights \(9, 1\)"),
        ((x, weight, targets, weights.requires_grad_()), {}, "weights get no gradient"),
        ((x, weight, targets), {"label_smoothing": 1.1}, "label_smoothing is 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*args, **settings)
    with pytest.raises(IndexError):
        linear_cross_entropy(x, weight, targets + V, impl="ref")


@pytest.mark.parametrize(("want_dw", "chunks"), [(True, [384, 216]), (False, [128] * 4 + [88])])
def test_a_frozen_head_and_evaluation_take_smaller_chunks(want_dw, chunks, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 512 * 512)  # of rows of 65 numbers, padded to 128
    monkeypatch.setattr(module, "FEWER_LOGITS_BYTES", 128 * 512)
    seen = []

    def take_losses(logits, targets, weights, losses, *others):
        seen.append(len(logits))
        losses.zero_(), logits.zero_()

    x, weight, targets, _ = inputs("cpu", n_rows=600, vocab=65)
    module._forward_in_chunks(
        take_losses, x.detach(), weight.detach(), targets, None, -100, 0.0, 0.0, True, want_dw, None, 0
    )
    assert seen == chunks


# ---- at the sizes of real models ------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("vocab", [32000, 32003, 128256])
def test_full_size_in_bf16(vocab):
    n_rows, dim = sized(8192, 6), sized(4096, 32)
    x, weight, targets, weights = inputs(DEVICE, torch.bfloat16, n_rows, dim, vocab)
    with torch.no_grad():
        weight *= dim**-0.5
    exact = [t.detach().float().requires_grad_() for t in (x, weight)]
    truth = grads(linear_cross_entropy(*exact, targets, weights, "ref"), *exact)
    theirs = grads(linear_cross_entropy(x, weight, targets, weights, "ref"), x, weight)
    before = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    ours = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
    assert peak < module.LOGITS_BYTES + 6 * vocab * dim + 8 * n_rows * dim + (64 << 20)
    for name, a, b, t in zip(("loss", "dx", "dw"), ours, theirs, truth, strict=True):
        assert worst(a - t) <= 2 * worst(b - t) + 1e-6 * worst(t), name


@needs_gpu
def test_more_than_2_to_the_31_logits_in_a_chunk(monkeypatch):
    x, weight, targets, weights = inputs("cuda", torch.bfloat16, 70_000, 64, 32003)
    in_chunks = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    monkeypatch.setattr(module, "LOGITS_BYTES", 8 << 30)
    assert module.chunk_rows(70_000, 32003, 2, True) >= 70_000
    at_once = grads(linear_cross_entropy(x, weight, targets, weights, "triton"), x, weight)
    for a, b in zip(in_chunks, at_once, strict=True):
        assert rms(a.float() - b.float()) <= 2 * torch.finfo(torch.bfloat16).eps * rms(b.float())

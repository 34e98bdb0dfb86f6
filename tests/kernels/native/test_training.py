"""The C++ ops of a training step against fp64: at most twice the error of torch's own, in every instruction set.

Sizes are odd, tiny and empty, rows strided; documents are empty, of one token, behind a shared prefix, and apart.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.native import training as native
from kernels.native.cpu import find_cpu
from kernels.native.library import NativeError
from kernels.ops import common
from kernels.ops.attention_plan import QueryDocuments

NATIVE = find_cpu()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="csrc/cpu is not built here")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
DOCUMENTS = torch.tensor([[0, 40, 0, 0], [40, 41, 0, 40], [41, 41, 0, 0], [45, 150, 0, 40], [151, 290, 5, 30]])
ROWS = torch.tensor([3, 39, 40, 44, 50, 149, 150, 200, 250, 289, 295])  # some lie in no document


@pytest.fixture(autouse=True)
def outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)


def make(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def run(op, inputs, impl, dtype):
    """Return an op's outputs and the gradients of its inputs, all computed in dtype from the same numbers."""
    leaves = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    outs = op(*leaves, impl)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator).to(inputs[0].dtype).to(out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, [t for t in leaves if t.requires_grad], upstream, allow_unused=True)
    return [t.double() for t in (*outs, *grads) if t is not None]


def check_error(op, inputs, dtype, units=4):
    """Assert that each result is at most twice as far from fp64's as torch's own, or `units` units of rounding.

    Of few numbers, which may all cancel, twice as many.
    """
    truth = run(op, inputs, "ref", torch.float64)
    torchs, ours = run(op, inputs, "ref", dtype), run(op, inputs, "native", dtype)
    assert len(truth) == len(torchs) == len(ours)
    for want, theirs, mine in zip(truth, torchs, ours, strict=True):
        norm = want.norm()
        least = norm * torch.finfo(dtype).eps * units * (1 if want.numel() >= 64 else 2)
        assert (mine - want).norm() <= max(2 * (theirs - want).norm(), least), (op, want.shape)


@DTYPES
@pytest.mark.parametrize(("n", "dim"), [(0, 8), (1, 1), (3, 7), (5, 33), (17, 576), (40, 130)])
def test_rms_norm(n, dim, dtype):
    x, residual, weight = make(n, dim, dtype=dtype), make(n, dim, dtype=dtype), make(dim, dtype=dtype)
    check_error(lambda x, w, impl: kernels.rms_norm(x, w, 1e-5, impl), (x, weight), dtype)
    check_error(lambda x, w, r, impl: kernels.rms_norm(x, w, 1e-5, impl, r), (x, weight, residual), dtype)


@DTYPES
@pytest.mark.parametrize(("n", "dim"), [(0, 8), (1, 1), (3, 7), (17, 96), (4, 1536)])
def test_swiglu(n, dim, dtype):
    check_error(kernels.swiglu, (make(n, 2 * dim, dtype=dtype, scale=4),), dtype)


@DTYPES
def test_swiglu_of_large_numbers_is_finite(dtype):
    gate = torch.cat((torch.tensor([0.0, 3e38, -3e38]), torch.logspace(1.9, 38, 500), -torch.logspace(1.9, 38, 500)))
    gate_up = torch.stack((gate, torch.full_like(gate, 0.5))).flatten()[None].to(dtype)
    out = kernels.swiglu(gate_up, "native")
    assert out.isfinite().all() and torch.allclose(out, kernels.swiglu(gate_up, "ref"), rtol=1e-2)


def test_a_query_that_sees_no_key_has_an_infinite_sum():
    """So that its weights, whatever its scores, are 0 in backward."""
    q, k = torch.randn(3, 2, 8), torch.randn(5, 1, 8)
    limits = torch.tensor([[0, 0, 2], [5, 0, 5], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    o, lse = native.attention_forward(q, k, k, limits)
    assert (lse[:, 1] == torch.inf).all() and lse[:, [0, 2]].isfinite().all() and not o[1].any() and o[0].any()


def test_bf16_is_rounded_where_torch_rounds():
    """The residual sum, what is normed and silu are rounded on their way, so results are torch's bit by bit, but where
    a sum or an exponential of another order is at the middle between two numbers."""
    x, residual, w, gate_up = (
        make(*shape, dtype=torch.bfloat16) for shape in ((64, 576), (64, 576), (576,), (64, 1152))
    )
    added = x + residual
    y, s, rstd = native.norm_forward(x, residual, w, 1e-5)
    squares = added.double().square().mean(1)
    assert torch.equal(s, added) and torch.allclose(rstd.double(), (squares + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    normed = (added.float() * rstd[:, None]).bfloat16()
    assert torch.equal(y, normed * w)
    h = native.swiglu_forward(gate_up)
    gate, up = gate_up.chunk(2, 1)
    assert (h == torch.nn.functional.silu(gate) * up).double().mean() > 0.999
    dy, dh = torch.randn_like(y), torch.randn_like(h)
    _, _, again = native.norm_backward(dy, added, w, rstd, None, True)
    assert torch.equal(again, y), "what backward makes again is what forward made"
    made = torch.empty_like(h)
    native.swiglu_backward(dh, gate_up, torch.empty_like(gate_up), made)
    assert torch.equal(made, h)


@DTYPES
@pytest.mark.parametrize(("n", "heads", "kv_heads", "dim"), [(0, 2, 1, 8), (1, 1, 1, 2), (7, 3, 1, 6), (11, 9, 3, 64)])
def test_rope(n, heads, kv_heads, dim, dtype):
    qkv, angles = make(n, heads + kv_heads, dim, dtype=dtype), torch.rand(n, dim // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    check_error(lambda t, impl: kernels.rope(t[:, :heads], t[:, heads:], cos, sin, impl), (qkv,), dtype)


@DTYPES
@pytest.mark.parametrize(("n", "dim", "vocab"), [(0, 4, 9), (1, 8, 1), (13, 24, 1003), (9, 16, 64)])
@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.01, "label_smoothing": 0.1}], ids=["plain", "z-loss"])
def test_linear_cross_entropy(n, dim, vocab, settings, dtype):
    x, weight = make(n, dim, dtype=dtype), make(vocab, dim, dtype=dtype)
    targets, weights = torch.randint(0, vocab, (n,)), torch.rand(n)
    targets[3:5] = -100

    def op(x, weight, impl):
        return kernels.linear_cross_entropy(x, weight, targets, weights, impl, **settings)

    check_error(op, (x, weight), dtype)


def test_a_confident_target_keeps_its_gradient():
    x, weight, target = torch.full((1, 4), 10.0), torch.zeros(50, 4), torch.tensor([7])
    weight[7] = 0.75  # p of the target is 1 - 5e-12, which rounds to 1 in fp32

    def op(x, weight, impl):
        return kernels.linear_cross_entropy(x, weight, target, None, impl)

    found, want = run(op, (x, weight), "native", torch.float32), run(op, (x, weight), "ref", torch.float64)
    assert want[2].abs().max() > 0 and torch.allclose(found[2], want[2], rtol=1e-3, atol=0)  # fp64 itself is 5e-4 off


def test_a_target_that_is_no_id_is_refused():
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        kernels.linear_cross_entropy(torch.ones(1, 4), torch.ones(9, 4), torch.tensor([9]), impl="native")


def test_memory_behind_the_logits_reaches_no_gradient(monkeypatch):
    """A processor with AMX multiplies the padding of rows of 203 logits; findings/onednn-amx-padding.sh."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: new_empty(*args, **more).fill_(torch.nan))
    x, weight = make(32, 48, dtype=torch.bfloat16).requires_grad_(), make(203, 48, dtype=torch.bfloat16)
    kernels.linear_cross_entropy(x, weight, torch.arange(32), impl="native").backward()
    assert x.grad.isfinite().all()


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 24), (6, 1, 80), (2, 1, 128), (1, 1, 1)])
@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "some"])
def test_attention(heads, kv_heads, dim, rows, dtype):
    n = 300 if rows is None else len(rows)
    q, k, v = (
        make(n, heads, dim, dtype=dtype),
        make(300, kv_heads, dim, dtype=dtype),
        make(300, kv_heads, dim, dtype=dtype),
    )
    documents = DOCUMENTS if rows is None else QueryDocuments(DOCUMENTS, rows)
    # exp multiplies the rounding of a score by the score's size
    check_error(lambda q, k, v, impl: kernels.attention(q, k, v, documents, impl), (q, k, v), dtype, units=8)


@DTYPES
def test_rope_attention_of_one_tensor(dtype):
    qkv, angles = make(300, 8, 64, dtype=dtype), torch.rand(300, 32) * 6
    cos, sin = angles.cos(), angles.sin()

    def op(qkv, impl):
        return kernels.rope_attention(qkv * 1, cos, sin, DOCUMENTS, 4, impl)

    check_error(op, (qkv,), dtype)


NORMS = {
    "rms_norm": lambda x, w, i: kernels.rms_norm(x, w, 1e-5, i),
    "norm_linear": lambda x, w, i: kernels.norm_linear(x, w, torch.eye(16), 1e-5, i)[0],
    "norm_linear_rows": lambda x, w, i: kernels.norm_linear_rows(x, w, torch.eye(16), torch.arange(3), 8, 1e-5, i),
}


@pytest.mark.parametrize("op", NORMS)
def test_the_weight_of_a_norm_may_lie_apart(op):
    x, weight = torch.randn(5, 16), torch.randn(16, 3)[:, 1]
    apart, together = (run(NORMS[op], (x, w), "native", torch.float32) for w in (weight, weight.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


ROTATING = {  # what takes angles of 40 tokens
    "rope": lambda qkv, *angles: kernels.rope(qkv[:, :4], qkv[:, 4:6], *angles, "native")[0],
    "rope_attention": lambda qkv, *angles: kernels.rope_attention(
        qkv, *angles, torch.tensor([[0, 40, 0, 0]]), 4, "native"
    ),
    "rope_attention_rows": lambda qkv, *angles: kernels.rope_attention_rows(
        qkv[5:, :4].contiguous(), qkv[:, 4:].contiguous(), *angles, torch.arange(5, 40),
        QueryDocuments(torch.tensor([[0, 40, 0, 0]]), torch.arange(5, 40)), "native",
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", ROTATING)
def test_angles_count_wherever_they_lie_and_in_fp32_alone(op):
    """The ops read their bits as fp32, row after row."""
    qkv, angles = torch.randn(40, 8, 16), torch.rand(40, 8) * 6
    cos, sin = angles.cos(), angles.sin()
    apart = torch.stack((cos, sin), -1).unbind(-1)
    assert not apart[0].is_contiguous()
    assert torch.equal(ROTATING[op](qkv.clone(), *apart), ROTATING[op](qkv.clone(), cos, sin))
    for dtype in (torch.bfloat16, torch.float64):
        for wrong in ((cos.to(dtype), sin), (cos, sin.to(dtype))):
            with pytest.raises(ValueError, match=rf"^{op}: cos is .*{dtype}.*wanted torch.float32"):
                ROTATING[op](qkv.clone(), *wrong)


def test_rows_of_no_document_are_never_read():
    q, k, v = (torch.randn(300, 2, 64) for _ in range(3))
    outside = [*range(41, 45), 150, *range(290, 300)]
    for t in (q, k, v):
        t[outside] = float("nan")
    out, _, dk, dv = run(
        lambda q, k, v, i: kernels.attention(q, k, v, DOCUMENTS, i), (q, k, v), "native", torch.float32
    )
    for t in (out, dk, dv):
        assert t.isfinite().all() and not t[outside].any()


@pytest.mark.parametrize("documents", [[[0, 5, 0, 0]], [[0, 5, 0, 0], [9, 40, 0, 0]], [[0, 5, 0, 0], [9, 40, 2, 5]]])
def test_padding_behind_the_first_document_is_none_of_it(documents):
    """Both begin at key 0: its rows see keys from 0 to their own, those of the padding from 0 to 0."""
    q, k, v = (torch.randn(43, 2, 16) for _ in range(3))
    table = torch.tensor(documents)
    check_error(lambda q, k, v, impl: kernels.attention(q, k, v, table, impl), (q, k, v), torch.float32)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("value", [-1, 6])
def test_limits_outside_of_the_keys_are_refused(row, value):
    """Forward and backward alike, which would read beyond k and v: first key, last + 1, the prefix's first, its end."""
    q, k, v = (torch.randn(5, 1, 8) for _ in range(3))
    limits = torch.tensor([[2] * 5, [5] * 5, [0] * 5, [2] * 5], dtype=torch.int32)
    out, lse = native.attention_forward(q, k, v, limits)
    limits[row, 3] = value
    for call in (
        lambda: native.attention_forward(q, k, v, limits),
        lambda: native.attention_backward(q, k, v, out, lse, out, [torch.empty_like(q) for _ in range(3)], limits),
    ):
        with pytest.raises(NativeError, match="was given a size it does not take"):
            call()


STRUCTURES = {
    "norm_forward": native.NormForward, "norm_backward": native.NormBackward, "swiglu_forward": native.SwiGLU,
    "swiglu_backward": native.SwiGLU, "rope": native.Rope, "cross_entropy": native.CrossEntropy,
}  # fmt: skip
WRONG_ROWS = [
    *((name, rows, {}, "a size") for name in STRUCTURES for rows in ((-1, 4, 0, 1), (1, -4, 0, 1), (1, 4, 0, 0))),
    *((name, (1, 4, 2, 1), {}, "a mode") for name in STRUCTURES),
    ("cross_entropy", (1, 0, 0, 1), {}, "a size"), ("cross_entropy", (1, 4, 0, 1), {"stride": 3}, "a size"),
    ("norm_backward", (1, 4, 0, 1), {"parts": 0}, "a size"),
    ("cross_entropy", (1, 4, 0, 1), {"targets": 68}, "a pointer"),
    *(
        (name, (1, 4, 0, 1), {field: 66}, "a pointer")
        for name, fields in {
            "norm_forward": ("x", "residual", "weight", "y", "sum", "rstd"), "swiglu_forward": ("gate_up", "h"),
            "norm_backward": ("dy", "x", "weight", "ds", "dx", "dw", "y"), "rope": ("x", "out", "cos", "sin"),
            "swiglu_backward": ("gate_up", "dh", "dgate_up", "h"), "cross_entropy": ("logits",),
        }.items()
        for field in fields
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "changes", "what"), WRONG_ROWS, ids=str)
def test_rows_and_addresses_that_do_not_fit_are_refused(name, rows, changes, what):
    structure = STRUCTURES[name]
    given = {field: 64 for field, kind in structure._fields_ if kind is ctypes.c_void_p} | {"rows": native.Rows(*rows)}
    given |= {"stride": 4} if name == "cross_entropy" else {"parts": 1} if name == "norm_backward" else {}
    with pytest.raises(NativeError, match=f"{name}: the compiled function was given {what}"):
        native._call(name, structure(**given | changes))


def test_documents_of_more_keys_than_a_tile_and_no_queries():
    q, k, v = (torch.randn(1500, 2, 32) for _ in range(3))
    check_error(
        lambda q, k, v, i: kernels.attention(q, k, v, torch.tensor([[0, 1500, 0, 0]]), i), (q, k, v), torch.float32
    )
    empty = kernels.attention(q[:0], k[:0], v[:0], torch.zeros(0, 4, dtype=torch.long), "native")
    assert empty.shape == (0, 2, 32)


def test_a_shared_prefix_over_the_limit_of_the_buffers_gets_all_gradients():
    """Gradients of its 32 heads fill more than 64 MiB, of which there is then one buffer; those of a head alone, 8."""
    n, heads, dim = 4097, 32, 64
    assert n * heads * 2 * dim * 4 > 64 << 20
    documents = torch.tensor([[n, n + 1, 0, n], [n + 1, n + 2, 0, n]])
    q, k, v = torch.randn(2, heads, dim), *(torch.randn(n + 2, 1, dim).expand(-1, heads, -1) for _ in range(2))
    plan = kernels.attention_plan(documents, n + 2, dim, "cpu", "native", torch.tensor([n, n + 1]))

    def gradients(q, k, v):
        out, lse = native.attention_forward(q, k, v, plan.limits)
        made = [torch.empty(t.shape) for t in (q, k, v)]
        native.attention_backward(q, k, v, out, lse, q, made, plan.limits)
        return made

    for whole, alone in zip(gradients(q, k, v), gradients(q[:, 5:6], k[:, 5:6], v[:, 5:6]), strict=True):
        assert alone.any() and torch.equal(whole[:, 5:6], alone)


def test_results_do_not_depend_on_the_threads():
    q, k, v, x, w = (
        torch.randn(300, 4, 64),
        torch.randn(300, 2, 64),
        torch.randn(300, 2, 64),
        torch.randn(99, 576),
        torch.ones(576),
    )
    cores, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                run(lambda q, k, v, i: kernels.attention(q, k, v, DOCUMENTS, i), (q, k, v), "native", torch.float32)
                + run(lambda x, w, i: kernels.rms_norm(x, w, 1e-5, i), (x, w), "native", torch.float32)
            )
    finally:
        torch.set_num_threads(cores)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_choosing(monkeypatch):
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert kernels.rms_norm(x.double(), weight.double()).dtype == torch.float64  # auto: the reference
    with pytest.raises(ValueError, match=r"impl='native' runs on the CPU in fp32 and bf16, x is torch\.float64"):
        kernels.rms_norm(x.double(), weight.double(), impl="native")
    with pytest.raises(ValueError, match="this plan is for impl='native'"):
        q = torch.randn(5, 1, 16)
        plan = kernels.attention_plan(torch.tensor([[0, 5, 0, 0]]), 5, 16, "cpu", "native")
        monkeypatch.setattr("kernels.ops.attention.choose_impl", lambda *a, **k: "triton")
        kernels.attention(q, q, q, plan)


def lesser_instruction_sets():
    names = ["plain", "avx2", "avx512"]
    return names[: names.index(NATIVE.cria_instruction_set().decode())] if NATIVE else []


@pytest.mark.parametrize("name", lesser_instruction_sets())
@pytest.mark.skipif("CRIA_INSTRUCTION_SET" in os.environ, reason="runs in the test that runs this file")
def test_every_instruction_set_passes_these_tests(name):
    files = __file__, str(Path(__file__).with_name("test_nf4.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        capture_output=True, text=True, check=False, env=os.environ | {"CRIA_INSTRUCTION_SET": name},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("heads", [(3, 2), (2, 3), (1, 2)])
def test_heads_that_key_heads_do_not_divide_are_refused(heads):
    q, k = (torch.randn(4, n, 8) for n in heads)
    limits = torch.tensor([[0] * 4, [1, 2, 3, 4], [0] * 4, [0] * 4], dtype=torch.int32)
    with pytest.raises(NativeError, match="a size it does not take"):
        native.attention_forward(q, k, k, limits)

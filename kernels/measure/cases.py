"""The cases of kernels.bench: for each op its shapes, random inputs, reference, our call, and its work.

Work is what the op cannot avoid: FLOPs of its matrix products, and bytes when every input is read once and every
output written once. Bytes of backward count the saved tensors as inputs. An element has the bytes of the dtype that is
measured (2 for bf16); fp32 statistics of a row are left out. Per op:

    attention            forward 4 s^2/2 H Dh a causal document, backward 2.5 times that; a document of n rows behind a
                         shared prefix of p: 4 (n p + n^2/2) H Dh. q, o: T H Dh; k, v: T K Dh.
    rope_attention       as attention: rotating q and k in place is not counted
    rms_norm             2 T D forward, 3 T D backward; with a residual 4 T D each way
    rope                 q and k read and written
    swiglu               3 T F forward, 5 T F backward
    norm_linear          GEMM 2 T D N forward, 4 T D N backward
    swiglu_linear        GEMM 2 T F D forward, 4 T F D backward
    linear_cross_entropy 2 L D V forward, 4 L D V backward; never a (L, V) tensor
    adamw                bytes a parameter of each mode, see ADAMW
    grad_norm            every gradient read once
    nf4                  codes and maxima read, the matrix written
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from kernels.measure.documents import Document, draw_alpaca_rows, pack_equal, pack_whole, pack_with_shared_prefixes
from kernels.measure.quantised import dequantise, make_quantised
from kernels.ops import adamw, attention, grad_norm, linear_cross_entropy, nf4, norm_linear, rms_norm, rope, swiglu

STATES = ("fp32", "bf16", "8bit")
BLOCK_BYTES = 2 * 2 * 4 / 256  # an fp32 maximum of each 256 elements, of m and v, read and written
ADAMW = {  # how the parameter is kept -> bytes a parameter read and written, for each of STATES
    None: (28, 20, 16 + BLOCK_BYTES),  # fp32, and fp32 gradients
    "fp32": (28, 20, 16 + BLOCK_BYTES),  # bf16 written, its master read and written
    "split": (26, 18, 14 + BLOCK_BYTES),
    "stochastic": (22, 14, 10 + BLOCK_BYTES),
}
TOKENS = 8192  # rows of a case: a packed micro-batch

Inputs = SimpleNamespace  # tensors by name, and what is made of them once


class Work(NamedTuple):
    """The work that one pass of an op cannot avoid."""

    flops: float
    elements: float  # read and written
    bytes: float = 0  # beyond the elements


@dataclass(frozen=True)
class BenchCase:
    """One op at one shape."""

    op: str
    shape: str
    inputs: Callable[[str, torch.dtype], Inputs]  # (device, dtype) -> inputs
    reference: Callable[[Inputs], Any]  # returns a tensor or a tuple of tensors
    ours: Callable[[Inputs, str], Any]  # (inputs, impl); returns what the reference returns
    grads: tuple[str, ...]  # names of the inputs whose gradients backward makes; empty for an op without backward
    work: dict[str, Work]  # by pass: "fwd", "bwd"
    main: bool = False  # the one shape of its op that torch.compile is tried at
    passes: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd")
    results: Callable[[Inputs, Any], Any] = lambda inputs, out: out  # what is checked; it is not timed
    truth: Callable[[Inputs], Any] | None = None  # the right outputs, if the reference cannot take wider inputs
    sizes: dict[str, Any] = field(default_factory=dict)  # sizes that peers must know
    memo: dict[str, Any] = field(default_factory=dict)  # what a peer makes once for all sets of inputs


# ---- formulas -------------------------------------------------------------------------------------------------------


def attention_flops(documents: Sequence[Document], n_heads: int, head_dim: int) -> float:
    """Return the FLOPs of forward: two products of 2 Dh for each pair of a query and a key it sees."""
    pairs = sum((e - s) * (pe - ps) + (e - s) ** 2 / 2 for s, e, ps, pe in documents)
    return 4 * pairs * n_heads * head_dim


def attention_work(
    documents: Sequence[Document], n_rows: int, n_heads: int, n_kv_heads: int, head_dim: int
) -> dict[str, Work]:
    """Return the work of attention. Backward reads q, k, v, o, do and writes dq, dk, dv."""
    flops = attention_flops(documents, n_heads, head_dim)
    q, kv = n_rows * n_heads * head_dim, 2 * n_rows * n_kv_heads * head_dim
    return {
        "fwd": Work(flops, 2 * q + kv),
        "bwd": Work(2.5 * flops, 4 * q + 2 * kv),
    }


def linear_work(rows: int, n_in: int, n_out: int, forward_extra: int = 0, backward_extra: int = 0) -> dict[str, Work]:
    """Return the work of y = x W^T: x, W, y once; backward reads x, W, dy and writes dx, dW. Extras are elements."""
    x, w, y = rows * n_in, n_in * n_out, rows * n_out
    return {
        "fwd": Work(2 * rows * n_in * n_out, x + w + y + forward_extra),
        "bwd": Work(4 * rows * n_in * n_out, 2 * x + 2 * w + y + backward_extra),
    }


# ---- cases: one function for each op --------------------------------------------------------------------------------


def attention_case(
    label: str,
    documents: Sequence[Document],
    n_rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    main: bool = False,
    **sizes: bool,
) -> BenchCase:
    """Return a case of attention. sizes: packed for documents of different lengths, prefix if they share one."""

    def inputs(device, dtype):
        q, k, v = (torch.randn(n_rows, h, dim, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads))
        return SimpleNamespace(q=q, k=k, v=v, documents=torch.tensor(documents, dtype=torch.int32), cache={})

    def ours(i, impl):
        if "plan" not in i.cache:  # made once a micro-batch, not once a layer
            i.cache["plan"] = attention.attention_plan(i.documents, n_rows, dim, i.q.device, impl)
        return attention.attention(i.q, i.k, i.v, i.cache["plan"], impl)

    return BenchCase(
        "attention", label, inputs, lambda i: attention.attention_ref(i.q, i.k, i.v, i.documents), ours,
        ("q", "k", "v"), attention_work(documents, n_rows, heads, kv_heads, dim), main,
        sizes=dict(sizes, documents=documents, n_rows=n_rows, heads=heads, kv_heads=kv_heads, dim=dim),
    )  # fmt: skip


def rope_attention_case(
    label: str, documents: Sequence[Document], n_rows: int, heads: int, kv_heads: int, dim: int
) -> BenchCase:
    """Return a case of RoPE and attention as one op. Its work counts only attention."""

    def inputs(device, dtype):
        qkv = torch.randn(n_rows, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
        frequencies = rope.rope_frequencies(dim, 10000.0).to(device)
        cos, sin = rope.rope_cos_sin(torch.arange(n_rows, device=device) % 128, frequencies)
        return SimpleNamespace(
            qkv=qkv, cos=cos, sin=sin, documents=torch.tensor(documents, dtype=torch.int32), cache={}
        )

    def reference(i):
        q, k, v = i.qkv.split((heads, kv_heads, kv_heads), dim=1)
        return attention.attention_ref(*rope.rope_ref(q, k, i.cos, i.sin), v, i.documents)

    def ours(i, impl):
        if "plan" not in i.cache:
            i.cache["plan"] = attention.attention_plan(i.documents, n_rows, dim, i.qkv.device, impl)
        return attention.rope_attention(i.qkv, i.cos, i.sin, i.cache["plan"], heads, impl)

    work = attention_work(documents, n_rows, heads, kv_heads, dim)
    return BenchCase("rope_attention", label, inputs, reference, ours, ("qkv",), work)


def rms_norm_case(tokens: int, dim: int, residual: bool = False, main: bool = False) -> BenchCase:
    """Return a case of RMSNorm, of a sum if residual."""
    eps = 1e-5

    def inputs(device, dtype):
        x, r = (torch.randn(tokens, dim, device=device, dtype=dtype) for _ in range(2))
        return SimpleNamespace(
            x=x, residual=r if residual else None, weight=torch.randn(dim, device=device, dtype=dtype)
        )

    def reference(i):
        if not residual:
            return rms_norm.rms_norm_ref(i.x, i.weight, eps)
        s = i.x + i.residual
        return rms_norm.rms_norm_ref(s, i.weight, eps), s

    def ours(i, impl):
        return rms_norm.rms_norm(i.x, i.weight, eps, impl, residual=i.residual)

    n = tokens * dim
    elements = (4 * n + dim, 4 * n + 2 * dim) if residual else (2 * n + dim, 3 * n + 2 * dim)
    return BenchCase(
        "rms_norm", f"T={tokens} D={dim}{' + residual' * residual}", inputs, reference, ours,
        ("x", "residual", "weight") if residual else ("x", "weight"),
        {"fwd": Work(0, elements[0]), "bwd": Work(0, elements[1])}, main, sizes=dict(eps=eps, residual=residual),
    )  # fmt: skip


def norm_linear_case(tokens: int, dim: int, n_out: int, main: bool = False, residual: bool = False) -> BenchCase:
    """Return a case of RMSNorm, of a sum if residual, followed by a projection."""
    eps = 1e-5

    def inputs(device, dtype):
        x, r = (torch.randn(tokens, dim, device=device, dtype=dtype) for _ in range(2))
        norm = torch.rand(dim, device=device, dtype=dtype) + 0.5
        weight = torch.randn(n_out, dim, device=device, dtype=dtype) * dim**-0.5
        return SimpleNamespace(x=x, residual=r if residual else None, norm=norm, weight=weight)

    def both(y, s):
        return (y, s) if residual else y  # without a residual s is x

    work = linear_work(tokens, dim, n_out, 2 * tokens * dim * residual, tokens * dim * residual)
    return BenchCase(
        "norm_linear", f"T={tokens} D={dim} N={n_out}{' + residual' * residual}", inputs,
        lambda i: both(*norm_linear.norm_linear_ref(i.x, i.norm, i.weight, eps, i.residual)),
        lambda i, impl: both(*norm_linear.norm_linear(i.x, i.norm, i.weight, eps, impl, i.residual)),
        ("x", "residual", "norm", "weight") if residual else ("x", "norm", "weight"), work, main,
        sizes=dict(bare=("x", "weight")),
    )  # fmt: skip


def rope_case(tokens: int, heads: int, kv_heads: int, dim: int, main: bool = False) -> BenchCase:
    """Return a case of rotary embedding at positions 0 to 127."""

    def inputs(device, dtype):
        q, k = (torch.randn(tokens, h, dim, device=device, dtype=dtype) for h in (heads, kv_heads))
        positions = torch.arange(tokens, device=device) % 128
        frequencies = rope.rope_frequencies(dim, 10000.0).to(device)
        cos, sin = rope.rope_cos_sin(positions, frequencies)
        return SimpleNamespace(q=q, k=k, cos=cos, sin=sin)

    n = 2 * tokens * (heads + kv_heads) * dim
    work = Work(0, n, tokens * dim * 4)  # cos and sin, (T, Dh/2) fp32 each
    return BenchCase(
        "rope", f"T={tokens} H={heads} K={kv_heads} Dh={dim}", inputs,
        lambda i: rope.rope_ref(i.q, i.k, i.cos, i.sin),
        lambda i, impl: rope.rope(i.q, i.k, i.cos, i.sin, impl),
        ("q", "k"), {"fwd": work, "bwd": work}, main,
    )  # fmt: skip


def swiglu_case(tokens: int, hidden: int, main: bool = False) -> BenchCase:
    """Return a case of SwiGLU."""
    return BenchCase(
        "swiglu", f"T={tokens} F={hidden}",
        lambda device, dtype: SimpleNamespace(gate_up=torch.randn(tokens, 2 * hidden, device=device, dtype=dtype)),
        lambda i: swiglu.swiglu_ref(i.gate_up), lambda i, impl: swiglu.swiglu(i.gate_up, impl), ("gate_up",),
        {"fwd": Work(0, 3 * tokens * hidden), "bwd": Work(0, 5 * tokens * hidden)}, main,
    )  # fmt: skip


def swiglu_linear_case(tokens: int, hidden: int, dim: int, main: bool = False) -> BenchCase:
    """Return a case of SwiGLU followed by a projection."""

    def inputs(device, dtype):
        gate_up = torch.randn(tokens, 2 * hidden, device=device, dtype=dtype)
        weight = torch.randn(dim, hidden, device=device, dtype=dtype) * hidden**-0.5
        product = torch.randn(tokens, hidden, device=device, dtype=dtype)  # what the bare GEMM multiplies
        return SimpleNamespace(gate_up=gate_up, weight=weight, product=product)

    n = tokens * hidden  # beside the product of F: gate_up of 2F in and out
    return BenchCase(
        "swiglu_linear", f"T={tokens} F={hidden} D={dim}", inputs,
        lambda i: swiglu.swiglu_linear_ref(i.gate_up, i.weight),
        lambda i, impl: swiglu.swiglu_linear(i.gate_up, i.weight, impl), ("gate_up", "weight"),
        linear_work(tokens, hidden, dim, n, 2 * n), main,
        sizes=dict(bare=("product", "weight")),
    )  # fmt: skip


def linear_cross_entropy_case(rows: int, dim: int, vocab: int, label: str = "", main: bool = False) -> BenchCase:
    """Return a case of the head and its loss."""

    def inputs(device, dtype):
        x = torch.randn(rows, dim, device=device, dtype=dtype)
        weight = torch.randn(vocab, dim, device=device, dtype=dtype) * dim**-0.5
        return SimpleNamespace(x=x, weight=weight, targets=torch.randint(vocab, (rows,), device=device))

    x, w = rows * dim, vocab * dim
    return BenchCase(
        "linear_cross_entropy", f"{label}L={rows} D={dim} V={vocab}", inputs,
        lambda i: linear_cross_entropy.linear_cross_entropy_ref(i.x, i.weight, i.targets),
        lambda i, impl: linear_cross_entropy.linear_cross_entropy(i.x, i.weight, i.targets, impl=impl), ("x", "weight"),
        {"fwd": Work(2 * rows * dim * vocab, x + w), "bwd": Work(4 * rows * dim * vocab, 2 * x + 2 * w)}, main,
        passes=("fwd+bwd",),  # gradients may be made in either: only the sum can be compared
        sizes=dict(bare=("x", "weight")),
    )  # fmt: skip


def grad_norm_case(shapes: Sequence[tuple[int, ...]], label: str, main: bool = False) -> BenchCase:
    """Return a case of the norm of gradients of these shapes."""

    def exact(i):
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in i.grads]
        return torch.stack(squares).sum().sqrt()

    n = sum(math.prod(shape) for shape in shapes)
    return BenchCase(
        "grad_norm", label,
        lambda device, dtype: SimpleNamespace(grads=[torch.randn(*s, device=device, dtype=dtype) for s in shapes]),
        lambda i: grad_norm.grad_norm_ref(i.grads), lambda i, impl: grad_norm.grad_norm(i.grads, impl), (),
        {"fwd": Work(0, n)}, main, passes=("fwd",), truth=exact,
    )  # fmt: skip


def adamw_case(shape: tuple[int, ...], master: str | None, states: str, main: bool = False) -> BenchCase:
    """Return a case of AdamW, checked against the reference. Peers compute other updates and are timed unchecked."""
    settings: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)

    def inputs(device, dtype):
        dtype = torch.float32 if master is None else torch.bfloat16
        param, grad = (torch.randn(*shape, device=device, dtype=dtype) for _ in range(2))
        state = adamw.adamw_state(param, master or "fp32", states)
        adamw.adamw(param, grad, state, step=1, impl="ref", **settings)  # so that no state is zero
        return SimpleNamespace(param=param, grad=torch.randn_like(grad), state=state.tensors())

    def update(i, impl):
        state = adamw.AdamWState(**i.state)
        adamw.adamw(i.param, i.grad, state, step=2, impl=impl, **settings)
        return i.param

    def results(i, _):
        kept = (t for name, t in i.state.items() if name not in ("master", "low"))  # those are in master_of
        return adamw.master_of(i.param, adamw.AdamWState(**i.state)), *kept

    reference = partial(update, impl="ref")
    moved = ADAMW[master][STATES.index(states)] * math.prod(shape)
    label = f"{master or 'fp32 parameter'}, {states}"
    return BenchCase(
        "adamw", label, inputs, reference, update, (), {"fwd": Work(0, 0, moved)}, main, passes=("fwd",),
        results=results, truth=reference,
        sizes=dict(settings=settings, bytes_a_parameter=ADAMW[master][STATES.index(states)]),
    )  # fmt: skip


def nf4_case(*shape: int, main: bool = False) -> BenchCase:
    """Return a case of dequantising, checked against the reference."""
    n, reference = math.prod(shape), partial(dequantise, impl="ref")
    n_codes, n_blocks, n_blocks2 = nf4.nf4_shapes(n)
    work = {"fwd": Work(0, n, n_codes + n_blocks + 4 * n_blocks2)}
    label, inputs = " x ".join(map(str, shape)), partial(make_quantised, shape)
    return BenchCase("nf4", label, inputs, reference, dequantise, (), work, main, passes=("fwd",), truth=reference)


# ---- tables ---------------------------------------------------------------------------------------------------------


def full_cases() -> Iterator[BenchCase]:
    """Yield the cases at the sizes of real models, for a GPU."""
    mix = draw_alpaca_rows(TOKENS)
    yield attention_case("Alpaca mix H=32 Dh=128", *pack_whole(mix), 32, 32, 128, True, packed=True)
    yield attention_case(
        "Alpaca mix, shared prefix H=32 Dh=128", *pack_with_shared_prefixes(mix), 32, 32, 128, packed=True, prefix=True
    )
    for s in (4096, 512, 2048, 8192):
        yield attention_case(f"dense s={s} H=32 Dh=128", *pack_equal(s, 16384), 32, 32, 128)
    yield attention_case("dense s=4096 H=32 Dh=64", *pack_equal(4096, 16384), 32, 32, 64)
    yield attention_case("dense s=4096 H=32 K=8 Dh=128", *pack_equal(4096, 16384), 32, 8, 128)
    yield attention_case("Alpaca mix H=32 K=8 Dh=128", *pack_whole(mix), 32, 8, 128, packed=True)
    yield rope_attention_case("Alpaca mix, shared prefix H=32 Dh=128", *pack_with_shared_prefixes(mix), 32, 32, 128)
    for dim in (4096, 2048, 8192):
        yield rms_norm_case(TOKENS, dim, main=dim == 4096)
    yield rms_norm_case(TOKENS, 4096, residual=True)
    yield norm_linear_case(TOKENS, 4096, 3 * 4096, True)
    yield norm_linear_case(TOKENS, 4096, 2 * 11008)
    yield rope_case(TOKENS, 32, 32, 128, True)
    yield rope_case(TOKENS, 32, 8, 128)
    yield swiglu_case(TOKENS, 11008, True)
    yield swiglu_case(TOKENS, 14336)
    yield swiglu_linear_case(TOKENS, 11008, 4096, True)
    yield linear_cross_entropy_case(TOKENS, 4096, 32000, "7b ", True)
    yield linear_cross_entropy_case(TOKENS // 2, 4096, 32000, "7b ")
    yield linear_cross_entropy_case(TOKENS // 2, 4096, 128256, "llama3-8b ")
    layer = [(4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (4096,), (4096,)]
    yield grad_norm_case(layer * 4, f"{4 * len(layer)} tensors, 4 layers of 7b", True)
    yield nf4_case(11008, 4096, main=True)
    yield nf4_case(4096, 4096)
    yield adamw_case((22016, 4096), "split", "8bit", True)
    for master in ("split", "stochastic", "fp32", None):
        for states in STATES:
            if (master, states) != ("split", "8bit"):
                yield adamw_case((22016, 4096), master, states)


def toy_cases() -> Iterator[BenchCase]:
    """Yield a few small cases of every op, for a CPU or Triton's interpreter."""
    mix = draw_alpaca_rows(112, seed=6)  # two rows
    yield attention_case("Alpaca mix H=1 Dh=16", *pack_whole(mix), 1, 1, 16, True, packed=True)
    yield attention_case(
        "Alpaca mix, shared prefix H=1 Dh=16", *pack_with_shared_prefixes(mix), 1, 1, 16, packed=True, prefix=True
    )
    yield attention_case("dense s=32 H=2 K=1 Dh=16", *pack_equal(32, 64), 2, 1, 16)
    yield rope_attention_case("dense s=32 H=2 K=1 Dh=16", *pack_equal(32, 32), 2, 1, 16)
    yield rms_norm_case(16, 64, main=True)
    yield rms_norm_case(16, 64, residual=True)
    yield norm_linear_case(16, 64, 96, True)
    yield rope_case(16, 2, 1, 16, True)
    yield swiglu_case(16, 48, True)
    yield swiglu_linear_case(16, 48, 32, True)
    yield linear_cross_entropy_case(16, 32, 96, main=True)
    yield grad_norm_case([(33, 7), (5,)], "2 tensors", True)
    yield nf4_case(5, 192, main=True)
    yield adamw_case((4, 1088), "split", "8bit", True)
    yield adamw_case((3, 100), "stochastic", "bf16")

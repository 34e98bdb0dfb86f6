"""What kernels.bench measures: for each op its shapes, random inputs, reference, our call, and the work in it.

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
"""

import importlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

from kernels.measure.alpaca import alpaca_lengths

STATES = ("fp32", "bf16", "8bit")
BLOCK_BYTES = 2 * 2 * 4 / 256  # an fp32 maximum of each 256 elements, of m and v, read and written
ADAMW = {  # how the parameter is kept -> bytes a parameter read and written, for each of STATES
    None: (28, 20, 16 + BLOCK_BYTES),  # fp32, and fp32 gradients
    "fp32": (28, 20, 16 + BLOCK_BYTES),  # bf16 written, its master read and written
    "split": (26, 18, 14 + BLOCK_BYTES),
    "stochastic": (22, 14, 10 + BLOCK_BYTES),
}
MAX_LENGTH = 512  # the recipe's cut
TOKENS = 8192  # rows of a case: a packed micro-batch


class Work(NamedTuple):
    flops: float
    elements: float  # read and written
    bytes: float = 0  # beyond the elements


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    inputs: Callable  # (device, dtype) -> SimpleNamespace of tensors, and of what is made once for them
    reference: Callable  # (inputs) -> tensor or tuple of tensors
    ours: Callable  # (inputs, impl) -> the same
    grads: tuple[str, ...]  # names of the inputs whose gradients backward makes; none: there is no backward
    work: dict  # "fwd", "bwd" -> Work
    main: bool = False  # the one shape of its op that torch.compile is tried at
    passes: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd")
    truth: Callable | None = None  # (inputs as they are) -> what is right, where the reference cannot take wider inputs
    sizes: dict = field(default_factory=dict)  # what peers must know
    memo: dict = field(default_factory=dict)  # what a peer makes once for all sets of inputs


def op(name):
    """The module kernels.ops.<name>: as an attribute of the package the name is the function's."""
    return importlib.import_module(f"kernels.ops.{name}")


# ---- documents ------------------------------------------------------------------------------------------------------


def alpaca_rows(tokens, seed=0):
    """(prompt, response, shared prefix) lengths of rows of the real mix that hold `tokens` tokens; the last is cut."""
    alpaca = alpaca_lengths()
    rng, rows, total = random.Random(seed), [], 0
    while total < tokens:
        i = rng.randrange(len(alpaca))
        prompt = min(int(alpaca.prompt[i]), MAX_LENGTH, tokens - total)
        response = min(int(alpaca.response[i]), MAX_LENGTH - prompt, tokens - total - prompt)
        rows.append((prompt, response, min(alpaca.shared_prefix[alpaca.has_input[i]], prompt)))
        total += prompt + response
    return rows


def unshared(rows):
    """[(start, end, 0, 0)] of whole rows back to back, and T."""
    documents, start = [], 0
    for prompt, response, _ in rows:
        documents.append((start, start + prompt + response, 0, 0))
        start = documents[-1][1]
    return documents, start


def shared(rows):
    """Each prefix once, then what each row has beyond it; rows of no document fill T up to a multiple of 64."""
    bounds, documents, start = {}, [], 0
    for prefix in sorted({prefix for *_, prefix in rows}):
        bounds[prefix] = (start, start + prefix)
        documents.append((start, start + prefix, 0, 0))
        start += prefix
    for prompt, response, prefix in rows:
        if prompt + response > prefix:
            documents.append((start, start + prompt + response - prefix, *bounds[prefix]))
            start = documents[-1][1]
    return documents, math.ceil(start / 64) * 64


def equal(length, tokens):
    documents = [(s, s + length, 0, 0) for s in range(0, tokens - length + 1, length)]
    return documents, documents[-1][1]


# ---- formulas -------------------------------------------------------------------------------------------------------


def attention_flops(documents, n_heads, head_dim):
    """Of the forward: two products of 2 Dh FLOPs for each pair of a query and a key it sees (half of the square)."""
    pairs = sum((e - s) * (pe - ps) + (e - s) ** 2 / 2 for s, e, ps, pe in documents)
    return 4 * pairs * n_heads * head_dim


def attention_work(documents, n_rows, n_heads, n_kv_heads, head_dim):
    flops = attention_flops(documents, n_heads, head_dim)
    q, kv = n_rows * n_heads * head_dim, 2 * n_rows * n_kv_heads * head_dim
    return {  # backward reads q, k, v, o, do and writes dq, dk, dv
        "fwd": Work(flops, 2 * q + kv),
        "bwd": Work(2.5 * flops, 4 * q + 2 * kv),
    }


def linear_work(rows, n_in, n_out, forward_extra=0, backward_extra=0):
    """y = x W^T: x, W, y once; backward reads x, W, dy and writes dx, dW."""
    x, w, y = rows * n_in, n_in * n_out, rows * n_out
    return {
        "fwd": Work(2 * rows * n_in * n_out, x + w + y + forward_extra),
        "bwd": Work(4 * rows * n_in * n_out, 2 * x + 2 * w + y + backward_extra),
    }


# ---- cases, an op a function ----------------------------------------------------------------------------------------


def attention(label, documents, n_rows, heads, kv_heads, dim, main=False, **sizes):
    module = op("attention")

    def inputs(device, dtype):
        q, k, v = (torch.randn(n_rows, h, dim, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads))
        return SimpleNamespace(q=q, k=k, v=v, documents=torch.tensor(documents, dtype=torch.int32), cache={})

    def ours(i, impl):
        if "plan" not in i.cache:  # made once a micro-batch, not once a layer
            i.cache["plan"] = module.attention_plan(i.documents, n_rows, dim, i.q.device, impl)
        return module.attention(i.q, i.k, i.v, i.cache["plan"], impl)

    return Case(
        "attention", label, inputs, lambda i: module.attention_ref(i.q, i.k, i.v, i.documents), ours, ("q", "k", "v"),
        attention_work(documents, n_rows, heads, kv_heads, dim), main,
        sizes=dict(sizes, documents=documents, n_rows=n_rows, heads=heads, kv_heads=kv_heads, dim=dim),
    )  # fmt: skip


def rope_attention(label, documents, n_rows, heads, kv_heads, dim):
    """The two as one op over the joined projection, which it consumes. Work as of attention alone."""
    module = op("attention")

    def inputs(device, dtype):
        qkv = torch.randn(n_rows, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
        frequencies = op("rope").rope_frequencies(dim, 10000.0).to(device)
        cos, sin = op("rope").rope_cos_sin(torch.arange(n_rows, device=device) % 128, frequencies)
        return SimpleNamespace(
            qkv=qkv, cos=cos, sin=sin, documents=torch.tensor(documents, dtype=torch.int32), cache={}
        )

    def reference(i):
        q, k, v = i.qkv.split((heads, kv_heads, kv_heads), dim=1)
        return module.attention_ref(*op("rope").rope_ref(q, k, i.cos, i.sin), v, i.documents)

    def ours(i, impl):
        if "plan" not in i.cache:
            i.cache["plan"] = module.attention_plan(i.documents, n_rows, dim, i.qkv.device, impl)
        return module.rope_attention(i.qkv, i.cos, i.sin, i.cache["plan"], heads, impl)

    work = attention_work(documents, n_rows, heads, kv_heads, dim)
    return Case("rope_attention", label, inputs, reference, ours, ("qkv",), work)


def rms_norm(tokens, dim, residual=False, main=False):
    module, eps = op("rms_norm"), 1e-5

    def inputs(device, dtype):
        x, r = (torch.randn(tokens, dim, device=device, dtype=dtype) for _ in range(2))
        return SimpleNamespace(
            x=x, residual=r if residual else None, weight=torch.randn(dim, device=device, dtype=dtype)
        )

    def reference(i):
        if not residual:
            return module.rms_norm_ref(i.x, i.weight, eps)
        s = i.x + i.residual
        return module.rms_norm_ref(s, i.weight, eps), s

    def ours(i, impl):
        return module.rms_norm(i.x, i.weight, eps, impl, residual=i.residual)

    n = tokens * dim
    elements = (4 * n + dim, 4 * n + 2 * dim) if residual else (2 * n + dim, 3 * n + 2 * dim)
    return Case(
        "rms_norm", f"T={tokens} D={dim}{' + residual' * residual}", inputs, reference, ours,
        ("x", "residual", "weight") if residual else ("x", "weight"),
        {"fwd": Work(0, elements[0]), "bwd": Work(0, elements[1])}, main, sizes=dict(eps=eps, residual=residual),
    )  # fmt: skip


def norm_linear(tokens, dim, n_out, main=False):
    module, eps = op("norm_linear"), 1e-5

    def inputs(device, dtype):
        x, norm = (
            torch.randn(tokens, dim, device=device, dtype=dtype),
            torch.rand(dim, device=device, dtype=dtype) + 0.5,
        )
        return SimpleNamespace(x=x, norm=norm, weight=torch.randn(n_out, dim, device=device, dtype=dtype) * dim**-0.5)

    def ours(i, impl):
        out = module.norm_linear(i.x, i.norm, i.weight, eps, impl)
        return out[0] if isinstance(out, tuple) else out  # the other is x, for the residual

    return Case(
        "norm_linear", f"T={tokens} D={dim} N={n_out}", inputs,
        lambda i: torch.nn.functional.linear(op("rms_norm").rms_norm_ref(i.x, i.norm, eps), i.weight), ours,
        ("x", "norm", "weight"), linear_work(tokens, dim, n_out), main, sizes=dict(bare=("x", "weight")),
    )  # fmt: skip


def rope(tokens, heads, kv_heads, dim, main=False):
    module = op("rope")

    def inputs(device, dtype):
        q, k = (torch.randn(tokens, h, dim, device=device, dtype=dtype) for h in (heads, kv_heads))
        positions = torch.arange(tokens, device=device) % 128
        frequencies = module.rope_frequencies(dim, 10000.0).to(device)
        cos, sin = module.rope_cos_sin(positions, frequencies)
        return SimpleNamespace(q=q, k=k, cos=cos, sin=sin)

    n = 2 * tokens * (heads + kv_heads) * dim
    work = Work(0, n, tokens * dim * 4)  # cos and sin, (T, Dh/2) fp32 each
    return Case(
        "rope", f"T={tokens} H={heads} K={kv_heads} Dh={dim}", inputs,
        lambda i: module.rope_ref(i.q, i.k, i.cos, i.sin),
        lambda i, impl: module.rope(i.q, i.k, i.cos, i.sin, impl),
        ("q", "k"), {"fwd": work, "bwd": work}, main,
    )  # fmt: skip


def swiglu(tokens, hidden, main=False):
    module = op("swiglu")
    return Case(
        "swiglu", f"T={tokens} F={hidden}",
        lambda device, dtype: SimpleNamespace(gate_up=torch.randn(tokens, 2 * hidden, device=device, dtype=dtype)),
        lambda i: module.swiglu_ref(i.gate_up), lambda i, impl: module.swiglu(i.gate_up, impl), ("gate_up",),
        {"fwd": Work(0, 3 * tokens * hidden), "bwd": Work(0, 5 * tokens * hidden)}, main,
    )  # fmt: skip


def swiglu_linear(tokens, hidden, dim, main=False):
    module = op("swiglu")

    def inputs(device, dtype):
        gate_up = torch.randn(tokens, 2 * hidden, device=device, dtype=dtype)
        weight = torch.randn(dim, hidden, device=device, dtype=dtype) * hidden**-0.5
        residual = torch.randn(tokens, dim, device=device, dtype=dtype)
        product = torch.randn(tokens, hidden, device=device, dtype=dtype)  # what the bare GEMM multiplies
        return SimpleNamespace(gate_up=gate_up, weight=weight, residual=residual, product=product)

    n, out = tokens * hidden, tokens * dim  # beside the product of F: gate_up of 2F in and out, the residual in
    return Case(
        "swiglu_linear", f"T={tokens} F={hidden} D={dim}", inputs,
        lambda i: module.swiglu_linear_ref(i.gate_up, i.weight, i.residual),
        lambda i, impl: module.swiglu_linear(i.gate_up, i.weight, i.residual, impl),
        ("gate_up", "weight", "residual"), linear_work(tokens, hidden, dim, n + out, 2 * n), main,
        sizes=dict(bare=("product", "weight")),
    )  # fmt: skip


def linear_cross_entropy(rows, dim, vocab, label="", main=False):
    module = op("linear_cross_entropy")

    def inputs(device, dtype):
        x = torch.randn(rows, dim, device=device, dtype=dtype)
        weight = torch.randn(vocab, dim, device=device, dtype=dtype) * dim**-0.5
        return SimpleNamespace(x=x, weight=weight, targets=torch.randint(vocab, (rows,), device=device))

    x, w = rows * dim, vocab * dim
    return Case(
        "linear_cross_entropy", f"{label}L={rows} D={dim} V={vocab}", inputs,
        lambda i: module.linear_cross_entropy_ref(i.x, i.weight, i.targets),
        lambda i, impl: module.linear_cross_entropy(i.x, i.weight, i.targets, impl=impl), ("x", "weight"),
        {"fwd": Work(2 * rows * dim * vocab, x + w), "bwd": Work(4 * rows * dim * vocab, 2 * x + 2 * w)}, main,
        passes=("fwd+bwd",),  # gradients may be made in either: only the sum can be compared
        sizes=dict(bare=("x", "weight")),
    )  # fmt: skip


def grad_norm(shapes, label, main=False):
    module = op("grad_norm")

    def exact(i):
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in i.grads]
        return torch.stack(squares).sum().sqrt()

    n = sum(math.prod(shape) for shape in shapes)
    return Case(
        "grad_norm", label,
        lambda device, dtype: SimpleNamespace(grads=[torch.randn(*s, device=device, dtype=dtype) for s in shapes]),
        lambda i: module.grad_norm_ref(i.grads), lambda i, impl: module.grad_norm(i.grads, impl), (),
        {"fwd": Work(0, n)}, main, passes=("fwd",), truth=exact,
    )  # fmt: skip


def adamw(shape, master, states, main=False):
    """Held against the reference, whose bits the kernel must give. Peers' updates are others: timed unchecked."""
    module = op("adamw")
    settings = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)

    def inputs(device, dtype):
        dtype = torch.float32 if master is None else torch.bfloat16
        param, grad = (torch.randn(*shape, device=device, dtype=dtype) for _ in range(2))
        state = module.adamw_state(param, master or "fp32", states)
        module.adamw(param, grad, state, step=1, impl="ref", **settings)  # so that no state is zero
        return SimpleNamespace(param=param, grad=torch.randn_like(grad), state=state.tensors())

    def update(i, impl):
        state = module.AdamWState(**i.state)
        module.adamw(i.param, i.grad, state, step=2, impl=impl, **settings)
        kept = (t for name, t in i.state.items() if name not in ("master", "low"))  # those are in master_of
        return module.master_of(i.param, state), *kept

    reference = partial(update, impl="ref")
    moved = ADAMW[master][STATES.index(states)] * math.prod(shape)
    label = f"{master or 'fp32 parameter'}, {states}"
    return Case(
        "adamw", label, inputs, reference, update, (), {"fwd": Work(0, 0, moved)}, main, passes=("fwd",),
        truth=reference, sizes=dict(settings=settings, bytes_a_parameter=ADAMW[master][STATES.index(states)]),
    )  # fmt: skip


# ---- tables ---------------------------------------------------------------------------------------------------------


def full():
    """At the sizes of real models, for a GPU."""
    mix = alpaca_rows(TOKENS)
    yield attention("Alpaca mix H=32 Dh=128", *unshared(mix), 32, 32, 128, True, packed=True)
    yield attention("Alpaca mix, shared prefix H=32 Dh=128", *shared(mix), 32, 32, 128, packed=True, prefix=True)
    for s in (4096, 512, 2048, 8192):
        yield attention(f"dense s={s} H=32 Dh=128", *equal(s, 16384), 32, 32, 128)
    yield attention("dense s=4096 H=32 Dh=64", *equal(4096, 16384), 32, 32, 64)
    yield attention("dense s=4096 H=32 K=8 Dh=128", *equal(4096, 16384), 32, 8, 128)
    yield attention("Alpaca mix H=32 K=8 Dh=128", *unshared(mix), 32, 8, 128, packed=True)
    yield rope_attention("Alpaca mix, shared prefix H=32 Dh=128", *shared(mix), 32, 32, 128)
    for dim in (4096, 2048, 8192):
        yield rms_norm(TOKENS, dim, main=dim == 4096)
    yield rms_norm(TOKENS, 4096, residual=True)
    yield norm_linear(TOKENS, 4096, 3 * 4096, True)
    yield norm_linear(TOKENS, 4096, 2 * 11008)
    yield rope(TOKENS, 32, 32, 128, True)
    yield rope(TOKENS, 32, 8, 128)
    yield swiglu(TOKENS, 11008, True)
    yield swiglu(TOKENS, 14336)
    yield swiglu_linear(TOKENS, 11008, 4096, True)
    yield linear_cross_entropy(TOKENS, 4096, 32000, "7b ", True)
    yield linear_cross_entropy(TOKENS // 2, 4096, 32000, "7b ")
    yield linear_cross_entropy(TOKENS // 2, 4096, 128256, "llama3-8b ")
    layer = [(4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (4096,), (4096,)]
    yield grad_norm(layer * 4, f"{4 * len(layer)} tensors, 4 layers of 7b", True)
    yield adamw((22016, 4096), "split", "8bit", True)
    for master in ("split", "stochastic", "fp32", None):
        for states in STATES:
            if (master, states) != ("split", "8bit"):
                yield adamw((22016, 4096), master, states)


def toy():
    """The same ops where a CPU, or Triton's interpreter, has to do."""
    mix = alpaca_rows(112, seed=6)  # two rows
    yield attention("Alpaca mix H=1 Dh=16", *unshared(mix), 1, 1, 16, True, packed=True)
    yield attention("Alpaca mix, shared prefix H=1 Dh=16", *shared(mix), 1, 1, 16, packed=True, prefix=True)
    yield attention("dense s=32 H=2 K=1 Dh=16", *equal(32, 64), 2, 1, 16)
    yield rope_attention("dense s=32 H=2 K=1 Dh=16", *equal(32, 32), 2, 1, 16)
    yield rms_norm(16, 64, main=True)
    yield rms_norm(16, 64, residual=True)
    yield norm_linear(16, 64, 96, True)
    yield rope(16, 2, 1, 16, True)
    yield swiglu(16, 48, True)
    yield swiglu_linear(16, 48, 32, True)
    yield linear_cross_entropy(16, 32, 96, main=True)
    yield grad_norm([(33, 7), (5,)], "2 tensors", True)
    yield adamw((4, 1088), "split", "8bit", True)
    yield adamw((3, 100), "stochastic", "bf16")

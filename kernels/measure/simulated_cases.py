"""The cases of kernels.simulate: every op, forward and backward, at shapes that the PTX machine runs in seconds.

The widths are those of real models, so that the launches are the ones that ship: every entry of the launch tables is
used by a case. The rows are few, and hold what goes wrong: rows and widths that no tile divides, empty and padded rows
that hold NaN, documents behind prefixes, targets at both ends of the vocabulary, gradients of zero.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from kernels.measure.cases import (
    BenchCase,
    Inputs,
    adamw_case,
    grad_norm_case,
    nf4_case,
    norm_linear_case,
    rms_norm_case,
    rope_attention_case,
    rope_case,
    swiglu_case,
    swiglu_linear_case,
)
from kernels.measure.cases import attention_case as bench_attention_case
from kernels.measure.cuda_cases import as_cuda, decode_cases, has_nvcc
from kernels.measure.documents import Document, draw_alpaca_rows, pack_with_shared_prefixes
from kernels.ops import adamw, adamw_many, attention, linear_cross_entropy, norm_linear, rope, swiglu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CHIPS = ("sm_80", "sm_90")  # that the machine executes


class SimulatedCase(NamedTuple):
    """One op at one shape, and the dtype of its inputs."""

    case: BenchCase
    dtype: torch.dtype = BF16
    chips: tuple[str, ...] = CHIPS  # that its kernels are compiled for


# ---- attention ------------------------------------------------------------------------------------------------------


def _documents(kind: str) -> tuple[list[Document], int]:
    """Return documents (start, end, prefix start, prefix end), and the number of rows."""
    if kind == "packed":  # short documents, most behind one prefix; rows of no document between and after them
        starts = [0, *range(40, 250, 35)]
        ends = [*starts[1:], 280]
        return [(a, b - (a == 110) * 7, 0, 40 if a else 0) for a, b in zip(starts, ends, strict=True)], 300
    if kind == "long":  # whole blocks of keys, of the document itself and of a prefix
        return [(0, 130, 0, 0), (130, 333, 0, 130)], 340
    if kind == "parts":  # so many documents read one prefix that dk and dv are summed from several parts
        return [(0, 40, 0, 0), *((a, a + 30, 0, 40) for a in range(40, 1240, 30))], 1240
    return [(0, 10, 0, 0), (12, 40, 2, 5), (40, 47, 12, 40), (47, 60, 20, 33), (60, 61, 30, 47), (61, 90, 0, 10)], 90


def _visible(documents: Sequence[Document], n_rows: int) -> torch.Tensor:
    """Return which keys (columns) each row sees, (T, T) bool."""
    seen = torch.zeros(n_rows, n_rows, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in documents:
        seen[start:end, prefix_start:prefix_end] = True
        seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return seen


def _attend_densely(seen: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return attention from one matrix of scores. Rows that see nothing give 0; rows that nobody sees are not read."""
    q = torch.where(seen.any(1)[:, None, None], q, 0)
    k, v = (torch.where(seen.any(0)[:, None, None], t, 0) for t in (k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(~seen.any(1)[:, None], 0)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    return torch.where(seen.any(1)[:, None, None], out, 0)


def attention_case(kind: str, heads: int, kv_heads: int, dim: int) -> BenchCase:
    """Return a case of attention on views of one tensor. The rows of no document, and their gradients, are NaN."""
    documents, n_rows = _documents(kind)
    seen = _visible(documents, n_rows)
    padding = ~(seen.any(0) | seen.any(1))

    def inputs(device, dtype):
        qkv = torch.randn(n_rows, heads + 2 * kv_heads, dim, device=device).to(dtype)
        return SimpleNamespace(qkv=qkv.masked_fill(padding[:, None, None], math.nan))

    def split(qkv: torch.Tensor) -> Any:  # q, k, v
        return qkv.split((heads, kv_heads, kv_heads), 1)

    def ours(i, impl):
        q, k, v = split(i.qkv)
        out = attention.attention(q, k, v, torch.tensor(documents, dtype=torch.int32), impl)
        out.register_hook(lambda gradient: gradient.masked_fill(padding[:, None, None], math.nan))
        return out

    label = f"{kind} T={n_rows} H={heads} K={kv_heads} Dh={dim}"
    return BenchCase("attention", label, inputs, lambda i: _attend_densely(seen, *split(i.qkv)), ours, ("qkv",), {})


def packed_rope_attention_case() -> BenchCase:
    """Return a case of RoPE and attention that leaves its input as it is."""
    documents, n_rows = _documents("packed")
    case = rope_attention_case(f"packed T={n_rows} H=2 K=1 Dh=64", documents, n_rows, 2, 1, 64)
    ours = case.ours
    return replace(case, ours=lambda i, impl: ours(SimpleNamespace(**vars(i) | {"qkv": i.qkv * 1}), impl))


def rope_attention_rows_case(heads: int, kv_heads: int, dim: int) -> BenchCase:
    """Return a case of RoPE and attention with queries of every third row."""
    documents, n_rows = _documents("packed")
    table, rows = torch.tensor(documents, dtype=torch.int32), torch.arange(1, n_rows, 3)
    seen = _visible(documents, n_rows)[rows]

    def inputs(device, dtype):
        frequencies = rope.rope_frequencies(dim, 10000.0)
        cos, sin = rope.rope_cos_sin(torch.randint(9000, (n_rows,)), frequencies)
        q, kv = torch.randn(len(rows), heads, dim).to(dtype), torch.randn(n_rows, 2 * kv_heads, dim).to(dtype)
        return SimpleNamespace(q=q, kv=kv, cos=cos, sin=sin)

    def reference(i):
        k, v = i.kv.chunk(2, dim=1)
        q = rope.rope_ref(i.q, i.q[:, :0], i.cos[rows], i.sin[rows])[0]
        return _attend_densely(seen, q, rope.rope_ref(k, k[:, :0], i.cos, i.sin)[0], v)

    def ours(i, impl):
        plan: Any = attention.attention_plan(table, n_rows, dim, i.q.device, impl, rows)
        return attention.rope_attention_rows(i.q * 1, i.kv * 1, i.cos, i.sin, rows, plan, impl)  # it consumes them

    label = f"packed T={n_rows} U={len(rows)} H={heads} K={kv_heads} Dh={dim}"
    return BenchCase("rope_attention_rows", label, inputs, reference, ours, ("q", "kv"), {})


def alpaca_forward_case(dim: int) -> BenchCase:
    """Return a case of attention's forward for packed rows of Alpaca behind shared prefixes."""
    documents, n_rows = pack_with_shared_prefixes(draw_alpaca_rows(4096))
    return replace(bench_attention_case(f"Alpaca T={n_rows} H=1 K=1 Dh={dim}", documents, n_rows, 1, 1, dim), grads=())


def attention_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of attention, with and without RoPE."""
    for kind, heads, kv_heads, dim in (
        ("packed", 4, 2, 64), ("packed", 2, 1, 128), ("packed", 1, 1, 256), ("long", 2, 1, 64), ("long", 1, 1, 128),
        ("parts", 2, 1, 64), ("parts", 1, 1, 128), ("mixed", 3, 1, 80),
    ):  # fmt: skip
        yield SimulatedCase(attention_case(kind, heads, kv_heads, dim))
    yield SimulatedCase(attention_case("mixed", 2, 1, 64), FP16)
    yield SimulatedCase(attention_case("mixed", 2, 1, 64), FP32)
    yield SimulatedCase(packed_rope_attention_case())
    yield SimulatedCase(rope_attention_rows_case(2, 1, 128))
    for dim in (64, 128):
        yield SimulatedCase(alpaca_forward_case(dim), chips=("sm_90",))


def hopper_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of attention whose forward csrc/cuda computes on sm_90."""
    cases = [attention_case(*case) for case in (("packed", 4, 2, 64), ("packed", 2, 1, 128), ("long", 1, 1, 128))]
    cases += [packed_rope_attention_case(), rope_attention_rows_case(2, 1, 128), *map(alpaca_forward_case, (64, 128))]
    yield from (SimulatedCase(as_cuda(case), BF16, ("sm_90",)) for case in cases)
    yield SimulatedCase(as_cuda(attention_case("mixed", 2, 1, 64)), FP16, ("sm_90",))


# ---- what is done to each row ---------------------------------------------------------------------------------------


def norm_linear_rows_case(tokens: int, dim: int, n_out: int) -> BenchCase:
    """Return a case of RMSNorm and a projection whose first half of outputs is for every third row only."""
    case, rows = norm_linear_case(tokens, dim, n_out), torch.arange(1, tokens, 3)

    def run(i, impl):
        return norm_linear.norm_linear_rows(i.x, i.norm, i.weight, rows, n_out // 2, 1e-5, impl)

    return replace(case, op="norm_linear_rows", reference=lambda i: run(i, "ref"), ours=run)


def swiglu_consumed_case(tokens: int, hidden: int, dim: int, keep: bool = False) -> BenchCase:
    """Return a case of SwiGLU and a projection that writes its gradient over its input. keep: backward has h."""
    case = swiglu_linear_case(tokens, hidden, dim)

    def ours(i, impl):
        return swiglu.swiglu_linear(i.gate_up * 1, i.weight, impl, consume=True, keep=keep)

    return replace(case, shape=f"{case.shape} consumed{', kept' * keep}", ours=ours)


def row_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of the norms, RoPE and SwiGLU."""
    for tokens, dim, dtype in (
        (300, 576, BF16), (17, 2048, BF16), (9, 4096, BF16), (7, 5120, BF16), (5, 2050, BF16), (7, 5120, FP16),
        (5, 576, FP32), (70, 24, FP32),
    ):  # fmt: skip
        yield SimulatedCase(rms_norm_case(tokens, dim), dtype)
        yield SimulatedCase(rms_norm_case(tokens, dim, residual=True), dtype)
    for tokens, dim, n_out in ((37, 576, 130), (11, 2048, 66)):
        yield SimulatedCase(norm_linear_case(tokens, dim, n_out))
        yield SimulatedCase(norm_linear_case(tokens, dim, n_out, residual=True))
        yield SimulatedCase(norm_linear_rows_case(tokens, dim, n_out))
    for tokens, heads, kv_heads, dim, dtype in (
        (70, 9, 3, 64, BF16), (37, 4, 4, 128, BF16), (20, 2, 1, 80, BF16), (9, 2, 2, 256, FP16), (9, 2, 1, 512, BF16),
        (33, 2, 1, 64, FP32),
    ):  # fmt: skip
        yield SimulatedCase(rope_case(tokens, heads, kv_heads, dim), dtype)
    for tokens, hidden, dim, dtype in (
        (37, 1536, 64, BF16), (5, 11008, 32, BF16), (9, 1000, 48, BF16), (3, 333, 24, FP16), (4, 1536, 16, FP32),
    ):  # fmt: skip
        yield SimulatedCase(swiglu_case(tokens, hidden), dtype)
        yield SimulatedCase(swiglu_linear_case(tokens, hidden, dim), dtype)
        yield SimulatedCase(swiglu_consumed_case(tokens, hidden, dim), dtype)
    yield SimulatedCase(swiglu_consumed_case(9, 1000, 48, keep=True))


# ---- the head and its loss ------------------------------------------------------------------------------------------


def linear_cross_entropy_case(rows: int, dim: int, vocab: int, **settings: Any) -> BenchCase:
    """Return a case of the head and its loss: rows ignored or weighted with 0, targets at both ends."""

    def inputs(device, dtype):
        targets, weights = torch.randint(vocab, (rows,)), torch.rand(rows) + 0.5
        targets[0], targets[1], targets[3], weights[4] = 0, vocab - 1, -100, 0
        x, weight = torch.randn(rows, dim).to(dtype), (torch.randn(vocab, dim) / 2).to(dtype)
        return SimpleNamespace(x=x, weight=weight, targets=targets, weights=weights)

    def ours(i, impl):
        return linear_cross_entropy.linear_cross_entropy(i.x, i.weight, i.targets, i.weights, impl, **settings)

    def reference(i):
        logits, keep = i.x @ i.weight.T, i.targets != -100
        logits, targets = logits[keep].to(torch.promote_types(logits.dtype, FP32)), i.targets[keep]
        smoothing, lse = settings.get("label_smoothing", 0.0), logits.logsumexp(-1)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return ((loss + settings.get("z_loss", 0.0) * lse**2) * i.weights[keep]).sum()

    label = " ".join([f"L={rows} D={dim} V={vocab}", *(f"{name}={value}" for name, value in settings.items())])
    return BenchCase("linear_cross_entropy", label, inputs, reference, ours, ("x", "weight"), {})


def loss_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of the head and its loss."""
    yield SimulatedCase(linear_cross_entropy_case(9, 64, 32001))
    yield SimulatedCase(linear_cross_entropy_case(9, 32, 32000, label_smoothing=0.1, z_loss=0.01))
    yield SimulatedCase(linear_cross_entropy_case(5, 16, 128256))
    yield SimulatedCase(linear_cross_entropy_case(21, 48, 203))
    yield SimulatedCase(linear_cross_entropy_case(5, 32, 50257), FP16)
    yield SimulatedCase(linear_cross_entropy_case(5, 16, 1003, label_smoothing=0.1), FP32)


# ---- the optimizer --------------------------------------------------------------------------------------------------


def adamw_steps_case(n: int, master: str | None, states: str, tensors: int = 1) -> BenchCase:
    """Return a case of three steps of AdamW on gradients of many sizes, some of them 0.

    n elements in one tensor are updated by adamw, in several by adamw_many. The truth for p is the formula in fp64, or
    the reference where p or the states are rounded on purpose. m, v and their codes must be those of the reference.
    """
    exact = states == "fp32" and master != "stochastic"
    settings: dict[str, Any] = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8)
    decay = 0.1

    def inputs(device, dtype):
        dtype = FP32 if master is None else BF16
        grads = [torch.randn(n) * 10 ** (4 * torch.rand(n) - 4) for _ in range(3)]
        for grad in grads:
            grad[n // 2 : n // 2 + 700] = 0
        return SimpleNamespace(param=torch.randn(n).to(dtype), grads=[g.to(dtype) for g in grads])

    def update(i, impl):
        params = [part.clone() for part in i.param.split(n // tensors)]
        made = [adamw.adamw_state(param, master or "fp32", states) for param in params]
        for step, grad in enumerate(i.grads, 1):
            numbers: dict[str, Any] = dict(step=step, impl=impl, apply=torch.tensor(True), **settings)
            if tensors == 1:
                adamw.adamw(params[0], grad, made[0], seed=5, weight_decay=decay, **numbers)
            else:
                each: dict[str, Any] = {"seeds": [5] * tensors, "weight_decays": [decay] * tensors}
                adamw_many.adamw_many(params, grad.split(n // tensors), made, **each, **numbers)
        kept = ([getattr(state, name) for state in made] for name in made[0].tensors() if name not in ("low", "master"))
        return torch.cat(list(map(adamw.master_of, params, made))).clone(), *map(torch.cat, kept)

    def truth(i):
        p, *kept = update(i, "ref")
        return _update_exactly(i, settings | {"weight_decay": decay}) if exact else p.double(), *kept

    shape = f"n={n} {'parameter' if master is None else 'master'} {master or 'fp32'}, states {states}"
    shape += f", {tensors} tensors" if tensors > 1 else ""
    case = adamw_case((n,), master, states)
    return replace(
        case, shape=shape, inputs=inputs, reference=lambda i: update(i, "ref"), ours=update, truth=truth,
        results=lambda inputs, out: out,
    )  # fmt: skip


def _update_exactly(i: Inputs, settings: dict[str, float]) -> torch.Tensor:
    """Return p after the steps of AdamW in fp64."""
    p, m, v = i.param.double(), torch.zeros(()), torch.zeros(())
    lr, b1, b2 = settings["lr"], settings["beta1"], settings["beta2"]
    for step, grad in enumerate(i.grads, 1):
        g = grad.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p * (1 - lr * settings["weight_decay"])
        p = p - lr * m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + settings["eps"])
    return p


def optimizer_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of AdamW in every mode, and of the gradient norm."""
    for master in (None, *adamw.MASTERS):
        for states in adamw.STATES:
            for n in (adamw.LEAST_8BIT + 517, 3 * adamw.LEAST_8BIT + 512):
                yield SimulatedCase(adamw_steps_case(n, master, states), FP32 if master is None else BF16)
    for states in adamw.STATES:
        yield SimulatedCase(adamw_steps_case(4 * adamw.LEAST_8BIT + 512, "split", states, tensors=2), BF16)
    for dtype in (BF16, FP32):
        for n in (40001, 65536 + 48):
            case = grad_norm_case([(3, n), (n % 2 + 512,), (7, 4096)], f"3 tensors, {3 * n}")
            yield SimulatedCase(case, dtype)


def nf4_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of dequantising: whole tiles, whole words of codes, and numbers that neither divides."""
    for dtype in (BF16, FP16, FP32):
        yield SimulatedCase(nf4_case(12, 4096), dtype)
        yield SimulatedCase(nf4_case(35, 576), dtype)
        yield SimulatedCase(nf4_case(263, 67), dtype)


def csrc_cases() -> Iterator[SimulatedCase]:
    """Yield the cases of csrc/cuda; none without nvcc."""
    if not has_nvcc():
        return
    for master in (None, *adamw.MASTERS):
        for states in adamw.STATES:
            case = adamw_steps_case(2 * (adamw.LEAST_8BIT + 517), master, states, tensors=2)
            yield SimulatedCase(as_cuda(case), FP32 if master is None else BF16)
    yield SimulatedCase(as_cuda(grad_norm_case([(3, 40001), (513,), (7, 4096)], "3 tensors, 120003")), BF16)
    for case, dtype in decode_cases():
        yield SimulatedCase(case, dtype)
    yield from hopper_cases()


def simulated_cases() -> list[SimulatedCase]:
    """Return every case, in the order of the ops."""
    return [*attention_cases(), *row_cases(), *loss_cases(), *optimizer_cases(), *nf4_cases(), *csrc_cases()]

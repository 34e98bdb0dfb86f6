"""The peers of kernels.bench: other implementations of each op, as far as they are installed.

A contender is prepared once for each set of inputs: layouts, masks and plans are made before the timing. One that
cannot take part raises Absent or ImportError, and the benchmark records the reason.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels.measure.cases import BenchCase, Inputs
from kernels.measure.quantised import as_bitsandbytes
from kernels.ops import rope
from kernels.ops.common import INTERPRETED


class Absent(Exception):
    """The reason why a peer takes no part."""


def _as_is(value):
    return value


@dataclass
class Ready:
    """One contender on one set of inputs."""

    run: Callable[[], Any]  # timed; returns a tensor or a tuple of tensors
    leaves: tuple[torch.Tensor, ...] = ()  # tensors that backward makes gradients of
    upstream: tuple[torch.Tensor, ...] = ()  # gradients of what run returns, in its layout
    back: Callable[[], Sequence[torch.Tensor]] | None = None  # backward, if autograd does not run it
    results: Callable[[Any], Any] = _as_is  # takes what run returns; returns the outputs, and is not timed
    canonical: Callable[[torch.Tensor], torch.Tensor] = _as_is  # brings an output or gradient into the case's layout


MakeOptimizer = Callable[[list[torch.Tensor], dict[str, Any]], Any]  # (parameters, settings)
Prepare = Callable[[BenchCase, Inputs, tuple[torch.Tensor, ...]], Ready]  # (case, inputs, upstream gradients)


def plain(fn: Callable[[BenchCase, Inputs], Any]) -> Prepare:
    """Return a contender that runs fn on the case's own tensors."""

    def prepare(case, inputs, upstream):
        leaves = tuple(getattr(inputs, name) for name in case.grads)
        return Ready(lambda: fn(case, inputs), leaves, upstream, results=partial(case.results, inputs))

    return prepare


def import_peer(package: str, module: str | None = None) -> Any:
    """Return the package, or a module of it. Raise Absent if it is not installed or there is no CUDA."""
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    if not torch.cuda.is_available():
        raise Absent(f"{package} is installed; it runs on CUDA alone")
    return importlib.import_module(module or package)


def require_cuda(what: str) -> None:
    """Raise Absent if there is no CUDA."""
    if not torch.cuda.is_available():
        raise Absent(f"{what} runs on CUDA alone")


# ---- any op ---------------------------------------------------------------------------------------------------------


def compiled(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare the reference under torch.compile, at one shape an op."""
    require_cuda("torch.compile here")
    if not case.main:
        raise Absent("torch.compile is tried at one shape an op: compiling takes longer than measuring")
    fn = case.memo.setdefault("compiled", torch.compile(case.reference, dynamic=False))
    return plain(lambda case, i: fn(i))(case, inputs, upstream)


def bare_gemm(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare y = x W^T and its two backward products, which bound the op's time. The output is not the op's."""
    x, w = (getattr(inputs, name).detach().requires_grad_() for name in case.sizes["bare"])
    dy = torch.randn(len(x), len(w), device=x.device, dtype=x.dtype)
    return Ready(lambda: F.linear(x, w), (x, w), (dy,))


# ---- attention ------------------------------------------------------------------------------------------------------


def _with_layout(inputs, upstream, to, canonical, fn):
    """Return a contender whose q, k, v and output have a layout of their own: `to` makes it, canonical undoes it."""
    q, k, v = (to(t).detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    return Ready(lambda: fn(q, k, v), (q, k, v), (to(upstream[0]).detach(),), canonical=canonical)


def _require_no_prefix(case):
    if case.sizes.get("prefix"):
        raise Absent("cannot share a prefix between documents")


def _lengths(case):
    return [end - start for start, end, *_ in case.sizes["documents"]]


def sdpa(backend: str) -> Prepare:
    """Return SDPA on a batch of documents, each padded to the longest."""

    def prepare(case, inputs, upstream):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        _require_no_prefix(case)
        if backend == "CUDNN_ATTENTION":
            require_cuda("cuDNN")
        lengths = _lengths(case)
        width, device = max(lengths), inputs.q.device
        rows = torch.arange(width, device=device)
        keep = rows[None] < torch.tensor(lengths, device=device)[:, None]  # (N, width)
        is_grouped = case.sizes["heads"] != case.sizes["kv_heads"]

        def to(t):
            padded = t.new_zeros(len(lengths), width, *t.shape[1:])
            padded[keep] = t.detach()
            return padded.transpose(1, 2)

        def fn(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)

        return _with_layout(inputs, upstream, to, lambda t: t.transpose(1, 2)[keep], fn)

    return prepare


def _cumulative_lengths(case, device):
    ends = [end for _, end, *_ in case.sizes["documents"]]
    return torch.tensor([0, *ends], dtype=torch.int32, device=device)


def sdpa_nested(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare SDPA on nested tensors."""
    _require_no_prefix(case)
    if not case.sizes.get("packed"):
        raise Absent("documents of equal length need no nested tensor")
    if case.sizes["heads"] != case.sizes["kv_heads"]:
        raise Absent("nested SDPA takes no grouped queries")
    require_cuda("causal SDPA of nested tensors")
    offsets = _cumulative_lengths(case, inputs.q.device).long()
    longest = max(_lengths(case))

    def to(t):
        return torch.nested.nested_tensor_from_jagged(t.detach(), offsets, max_seqlen=longest).transpose(1, 2)

    def fn(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _with_layout(inputs, upstream, to, lambda t: t.transpose(1, 2).values(), fn)


def varlen(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare torch's varlen_attn."""
    _require_no_prefix(case)
    require_cuda("varlen_attn")
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )  # torch 2.11 to 2.13
    if case.sizes["heads"] != case.sizes["kv_heads"]:
        if "enable_gqa" not in known:
            raise Absent(f"varlen_attn of torch {torch.__version__} takes no grouped queries")
        options["enable_gqa"] = True
    ends, longest = _cumulative_lengths(case, inputs.q.device), max(_lengths(case))
    return plain(lambda case, i: varlen_attn(i.q, i.k, i.v, ends, ends, longest, longest, **options))(
        case, inputs, upstream
    )


def flex(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare FlexAttention with a block mask of the documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not case.sizes.get("packed"):
        raise Absent("FlexAttention is measured on packed documents")
    require_cuda("the backward of FlexAttention")
    n, device = case.sizes["n_rows"], inputs.q.device
    document, start, end = (torch.full((n,), value, dtype=torch.int32, device=device) for value in (-1, 0, 0))
    for d, (first, last, prefix_start, prefix_end) in enumerate(case.sizes["documents"]):
        document[first:last], start[first:last], end[first:last] = d, prefix_start, prefix_end

    def sees(b, h, i, j):
        own = (i >= j) & (document[i] == document[j]) & (document[i] >= 0)
        return own | ((j >= start[i]) & (j < end[i]))

    mask = create_block_mask(sees, None, None, n, n, device=device)
    attend = torch.compile(flex_attention, dynamic=False) if inputs.q.is_cuda else flex_attention
    attend = case.memo.setdefault("flex", attend)
    grouped = {"enable_gqa": True} if case.sizes["heads"] != case.sizes["kv_heads"] else {}

    def to(t):
        return t.transpose(0, 1)[None]

    def fn(q, k, v):
        return attend(q, k, v, block_mask=mask, **grouped)

    return _with_layout(inputs, upstream, to, lambda t: t[0].transpose(0, 1), fn)


# ---- liger-kernel, cut-cross-entropy, torch's own -------------------------------------------------------------------


def liger_rms_norm(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare liger-kernel's RMSNorm."""
    ops = import_peer("liger_kernel", "liger_kernel.ops")

    def fn(case, i):
        if i.residual is not None:
            return ops.LigerFusedAddRMSNormFunction.apply(
                i.x, i.residual, i.weight, case.sizes["eps"], 0.0, "llama", False
            )
        return ops.LigerRMSNormFunction.apply(i.x, i.weight, case.sizes["eps"], 0.0, "llama", False)

    return plain(fn)(case, inputs, upstream)


def torch_rms_norm(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare torch's F.rms_norm."""
    if case.sizes["residual"]:
        raise Absent("F.rms_norm adds no residual")
    return plain(lambda case, i: F.rms_norm(i.x, i.x.shape[-1:], i.weight, case.sizes["eps"]))(case, inputs, upstream)


def liger_rope(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare liger-kernel's rotary embedding on copies, because it writes over q, k and their gradients."""
    ops = import_peer("liger_kernel", "liger_kernel.ops")
    cos, sin = (torch.cat((t, t), -1)[None] for t in (inputs.cos, inputs.sin))  # (1, T, Dh), as transformers has them
    q, k = (t.detach().clone().transpose(0, 1)[None].requires_grad_() for t in (inputs.q, inputs.k))
    dq, dk = (t.clone().transpose(0, 1)[None] for t in upstream)
    return Ready(
        lambda: ops.LigerRopeFunction.apply(q, k, cos, sin), (q, k), (dq, dk),
        canonical=lambda t: t[0].transpose(0, 1),
    )  # fmt: skip


def rope_in_place(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare our rotation as the engine calls it: in place, without new tensors."""
    if not (torch.cuda.is_available() or INTERPRETED):
        raise Absent("kernels run on CUDA, or in Triton's interpreter")
    q, k = (t.detach().clone() for t in (inputs.q, inputs.k))
    dq, dk = (t.clone() for t in upstream)

    def rotate(a, b, inverse):
        rope.rotate(a, b, inputs.cos, inputs.sin, inverse)
        return a, b

    return Ready(lambda: rotate(q, k, False), back=lambda: rotate(dq, dk, True))


def liger_swiglu(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare liger-kernel's SwiGLU on separate gate and up."""
    ops = import_peer("liger_kernel", "liger_kernel.ops")
    return plain(lambda case, i: ops.LigerSiLUMulFunction.apply(*i.gate_up.chunk(2, -1)))(case, inputs, upstream)


def liger_swiglu_merged(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare liger-kernel's SwiGLU on the joined projection."""
    ops = import_peer("liger_kernel", "liger_kernel.ops.swiglu")
    if not hasattr(ops, "LigerFusedGateUpSiLUMulFunction"):
        raise Absent("this liger-kernel takes gate and up apart only")
    return plain(lambda case, i: ops.LigerFusedGateUpSiLUMulFunction.apply(i.gate_up))(case, inputs, upstream)


def liger_cross_entropy(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare liger-kernel's fused head and loss."""
    ops = import_peer("liger_kernel", "liger_kernel.ops")

    def fn(case, i):
        return ops.LigerFusedLinearCrossEntropyFunction.apply(
            i.x, i.weight, i.targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]

    return plain(fn)(case, inputs, upstream)


def cut_cross_entropy(exact: bool) -> Prepare:
    """Return Apple's cut-cross-entropy, which by default leaves small gradients out; exact keeps them all."""

    def prepare(case, inputs, upstream):
        package = import_peer("cut_cross_entropy")
        options = {"filter_eps": None} if exact else {}
        return plain(
            lambda case, i: package.linear_cross_entropy(i.x, i.weight, i.targets, reduction="sum", **options)
        )(case, inputs, upstream)

    return prepare


def foreach_norm(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare torch's norm of a list of gradients."""
    return plain(lambda case, i: torch.nn.utils.get_total_norm(i.grads))(case, inputs, upstream)


def optimizer(make: MakeOptimizer, dtype: torch.dtype) -> Prepare:
    """Return a step of another AdamW on a parameter of our shape. Its rates count the bytes that ours moves."""

    def prepare(case, inputs, upstream):
        if not case.main:
            raise Absent("other optimizers are timed once, beside the main mode")
        param = inputs.param.detach().to(dtype, copy=True).requires_grad_()
        param.grad = inputs.grad.to(dtype, copy=True)
        s = case.sizes["settings"]
        common = dict(lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["eps"], weight_decay=s["weight_decay"])
        stepper = make([param], common)

        def run():
            stepper.step()
            return param.detach()

        return Ready(run)

    return prepare


def torch_fused(params: list[torch.Tensor], common: dict[str, Any]) -> Any:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(params, fused=True, **common)


def flash_adamw(bits: int) -> MakeOptimizer:
    """Return flashoptim's AdamW: 8-bit states, and a bf16 parameter with a correction that makes it `bits` wide."""

    def make(params, common):
        return import_peer("flashoptim").FlashAdamW(params, master_weight_bits=bits, **common)

    return make


def bitsandbytes_adamw(params: list[torch.Tensor], common: dict[str, Any]) -> Any:
    """Return bitsandbytes' 8-bit AdamW."""
    return import_peer("bitsandbytes").optim.AdamW8bit(params, **common)


def torchao_adamw(params: list[torch.Tensor], common: dict[str, Any]) -> Any:
    """Return torchao's 8-bit AdamW with stochastic rounding."""
    return import_peer("torchao", "torchao.optim").AdamW8bit(params, bf16_stochastic_round=True, **common)


def bitsandbytes_nf4(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare bitsandbytes' dequantising of our codes."""
    functional = import_peer("bitsandbytes", "bitsandbytes.functional")
    codes, state = as_bitsandbytes(functional, inputs)
    return Ready(lambda: functional.dequantize_4bit(codes, state))


# ---- tables ---------------------------------------------------------------------------------------------------------

COMPILED = {"torch.compile": compiled}
BARE = {"bare GEMM": bare_gemm}
OPTIMIZERS = {
    "torch fused, fp32": optimizer(torch_fused, torch.float32),
    "torch fused, all bf16": optimizer(torch_fused, torch.bfloat16),
    "flashoptim 32": optimizer(flash_adamw(32), torch.bfloat16),
    "flashoptim 24": optimizer(flash_adamw(24), torch.bfloat16),
    "bitsandbytes 8-bit": optimizer(bitsandbytes_adamw, torch.bfloat16),
    "torchao 8-bit": optimizer(torchao_adamw, torch.bfloat16),
}
UNCHECKED = {"bare GEMM", *OPTIMIZERS}  # their results are not the op's

PEERS: dict[str, dict[str, Prepare]] = {
    "attention": {
        "SDPA flash": sdpa("FLASH_ATTENTION"),
        "SDPA cuDNN": sdpa("CUDNN_ATTENTION"),
        "SDPA nested": sdpa_nested,
        "varlen_attn": varlen,
        "FlexAttention": flex,
    },
    "rms_norm": {"F.rms_norm": torch_rms_norm, **COMPILED, "liger-kernel": liger_rms_norm},
    "norm_linear": {**BARE, **COMPILED},
    "rope": {"ours, in place": rope_in_place, **COMPILED, "liger-kernel": liger_rope},
    "swiglu": {**COMPILED, "liger-kernel": liger_swiglu, "liger-kernel merged": liger_swiglu_merged},
    "swiglu_linear": {**BARE, **COMPILED},
    "linear_cross_entropy": {
        **BARE,
        **COMPILED,
        "liger-kernel": liger_cross_entropy,
        "cut-cross-entropy": cut_cross_entropy(exact=False),
        "cut-cross-entropy, exact": cut_cross_entropy(exact=True),
    },
    "grad_norm": {"torch foreach": foreach_norm, **COMPILED},
    "nf4": {**COMPILED, "bitsandbytes": bitsandbytes_nf4},
    "adamw": OPTIMIZERS,
}

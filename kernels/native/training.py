"""The ops of a training step on CPU tensors, in C++: what csrc/cpu/training.h declares, as functions of tensors.

Tensors are fp32 or bf16, all of one dtype unless said otherwise; sums are fp32. A function raises NativeError if the
library refuses its arguments. The ops of kernels/ops give formulas and shapes.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from kernels.native.arguments import Attention, CrossEntropy, NormBackward, NormForward, Rope, Rows, SwiGLU
from kernels.native.cpu import load_cpu
from kernels.native.library import check

DTYPES = (torch.float32, torch.bfloat16)
PARTS = 32  # of rms_norm's rows: dw of each is summed on its own, whatever the number of threads


@cache
def _function(name: str) -> Any:
    return getattr(load_cpu(), f"cria_{name}")


def _call(name: str, arguments: ctypes.Structure) -> None:
    check(_function(name)(ctypes.byref(arguments)), name)


def _rows(x: torch.Tensor, n: int, dim: int) -> ctypes.Structure:
    return Rows(n, dim, x.dtype == torch.bfloat16, torch.get_num_threads())


def _address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def norm_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rms_norm's y, x + residual (empty without one) and rstd (N,) fp32 of contiguous x (N, D)."""
    y, s = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(len(x), dtype=torch.float32)
    addresses = map(_address, (x, residual, weight, y, s, rstd))
    _call("norm_forward", NormForward(_rows(x, *x.shape), *addresses, eps))
    return y, s, rstd


def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, ds: torch.Tensor | None, want_y: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx, to which ds is added, dw (D,), and y if it is wanted. All but rstd are contiguous (N, D)."""
    dx, dw, y = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(x) if want_y else x.new_empty(0)
    partial = x.new_empty(PARTS, x.shape[1], dtype=torch.float32)
    addresses = map(_address, (dy, x, weight, ds, rstd, dx, dw, y if want_y else None, partial))
    _call("norm_backward", NormBackward(_rows(x, *x.shape), *addresses, PARTS))
    return dx, dw, y


def swiglu_forward(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up (T, F) of contiguous gate_up (T, 2F)."""
    h = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _call("swiglu_forward", SwiGLU(_rows(h, *h.shape), _address(gate_up), None, None, _address(h)))
    return h


def swiglu_backward(dh: torch.Tensor, gate_up: torch.Tensor, dgate_up: torch.Tensor, h: torch.Tensor | None) -> None:
    """Write d(gate_up), which may lie over gate_up, and h, which may lie over dh, unless h is None."""
    addresses = map(_address, (gate_up, dh, dgate_up, h))
    _call("swiglu_backward", SwiGLU(_rows(dh, *dh.shape), *addresses))


def rope(x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    """Write x (T, H, Dh) rotated by cos and sin (T, Dh/2) fp32 contiguous to out, which may be x."""
    (n, heads, dim), strides = x.shape, (*x.stride()[:2], *out.stride()[:2])
    addresses = map(_address, (x, out, cos, sin))
    _call("rope", Rope(_rows(x, n, dim // 2), *addresses, heads, *strides, inverse))


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, losses: torch.Tensor, ignore_index: int,
    gradient: bool, z_loss: float, smoothing: float,
) -> None:  # fmt: skip
    """Write the weighted loss of each row of logits (L, V), and over the logits their gradient if it is wanted.

    targets: (L,) int64. weights, losses: (L,) fp32. The rows of logits are contiguous.
    """
    _call("cross_entropy", CrossEntropy(
        _rows(logits, *logits.shape), _address(logits), logits.stride(0), *map(_address, (targets, weights, losses)),
        ignore_index, gradient, z_loss, smoothing,
    ))  # fmt: skip


def _attention(limits: torch.Tensor, lse: torch.Tensor, out: torch.Tensor | None, **tensors: torch.Tensor) -> Any:
    (n, heads, dim), (keys, kv_heads, _) = tensors["q"].shape, tensors["k"].shape
    sizes = n, keys, heads, kv_heads, dim, tensors["q"].dtype == torch.bfloat16, torch.get_num_threads()
    addresses = {name: _address(t) for name, t in tensors.items() if t is not None}
    strides = {f"{name}_{axis}": tensors[name].stride(i) for name in tensors for i, axis in enumerate(("row", "head"))}
    return Attention(*sizes, limits=_address(limits), lse=_address(lse), out=_address(out), **addresses, **strides)


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o (Q, H, Dh) and lse (H, Q) fp32 to the base 2. q: (Q, H, Dh). k, v: (T, K, Dh). limits: (4, Q) int32."""
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    _call("attention_forward", _attention(limits, lse, o, q=q, k=k, v=v, o=o))
    return o, lse


def attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, do: torch.Tensor,
    gradients: Sequence[torch.Tensor], limits: torch.Tensor,
) -> None:  # fmt: skip
    """Write gradients: dq (Q, H, Dh), dk and dv (T, K, Dh), which may be views with contiguous last axes."""
    dq, dk, dv = gradients
    _call("attention_backward", _attention(limits, lse, None, q=q, k=k, v=v, o=o, d_o=do, dq=dq, dk=dk, dv=dv))

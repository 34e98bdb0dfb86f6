"""SwiGLU, and SwiGLU followed by the projection whose output the next norm adds to the residual stream.

    swiglu(gate_up) = silu(gate) * up                  gate_up = [gate, up] side by side; in fp32
    swiglu_linear   = swiglu(gate_up) @ weight.T, with the updates of kernels.ops.low_rank

The element-wise passes are bound by memory. Forward reads gate_up and writes the product h, 6 bytes an element of h in
bf16. Backward reads gate_up and dh and writes d(gate_up), and h again for weight's gradient, 12 bytes, or 10 with keep.
Saved for backward: gate_up and weight, and h only with keep. The GEMMs are cuBLAS.
Source: arXiv:2002.05202.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.native import training as native
from kernels.ops import low_rank as updates
from kernels.ops.common import (
    Weight,
    accumulator,
    choose_impl,
    dense,
    held_weight,
    hold_weight,
    launch_config,
    operator,
    weight_gradient,
    widen,
)
from kernels.ops.low_rank import LowRank

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def swiglu_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up  # silu computes in fp32 and rounds


def swiglu_linear_ref(gate_up: torch.Tensor, weight: Weight, low_rank: LowRank | None = None) -> torch.Tensor:
    """swiglu(gate_up) @ weight.T, with updates of weight, in plain torch."""
    return updates.linear_ref(swiglu_ref(gate_up), dense(weight, gate_up.dtype), low_rank)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _at(DIM: tl.constexpr, COLS: tl.constexpr):
    # A program has COLS columns of one row: where they are in a row of DIM, in a row of 2 DIM, and which exist.
    blocks: tl.constexpr = (DIM + COLS - 1) // COLS
    row = (tl.program_id(0) // blocks).to(tl.int64)  # int64: row * 2 DIM passes 2^31 at 97,542 rows of 11008
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    return row * DIM + cols, row * 2 * DIM + cols, cols < DIM


@triton.jit
def _forward_kernel(gate_up_ptr, h_ptr, DIM: tl.constexpr, COLS: tl.constexpr):
    at_h, at_gate, mask = _at(DIM, COLS)
    gate = tl.load(gate_up_ptr + at_gate, mask=mask).to(tl.float32)
    up = tl.load(gate_up_ptr + DIM + at_gate, mask=mask).to(tl.float32)
    tl.store(h_ptr + at_h, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _backward_kernel(gate_up_ptr, dh_ptr, dgate_up_ptr, h_ptr, DIM: tl.constexpr, COLS: tl.constexpr):
    # Each thread reads its elements before it writes them, so dgate_up may be gate_up, and h may be dh.
    at_h, at_gate, mask = _at(DIM, COLS)
    dh = tl.load(dh_ptr + at_h, mask=mask).to(tl.float32)
    gate = tl.load(gate_up_ptr + at_gate, mask=mask).to(tl.float32)
    up = tl.load(gate_up_ptr + DIM + at_gate, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dgate_up_ptr + at_gate, dh * up * (sigmoid + silu * (1 - sigmoid)), mask=mask)
    tl.store(dgate_up_ptr + DIM + at_gate, dh * silu, mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + at_h, silu * up, mask=mask)


# ---- launch: shapes, allocation, grid; torch.ops.cria.* -------------------------------------------------------------


def _launch(name, kernel, gate_up, *others):
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    config = launch_config("swiglu", name, gate_up.device, dim)
    if rows * dim:
        grid = rows * triton.cdiv(dim, config["COLS"])
        kernel[(grid,)](gate_up, *others, DIM=dim, enable_fp_fusion=True, **config)


def _forward_fake(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@operator("swiglu_forward", cpu=swiglu_ref, fake=_forward_fake, native=native.swiglu_forward)
def forward(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up: (T, 2F) contiguous. Returns h (T, F)."""
    h = _forward_fake(gate_up)
    _launch("forward", _forward_kernel, gate_up, h)
    return h


def _backward_cpu(dh, gate_up, want_h):
    (gate, up), dh_ = gate_up.chunk(2, dim=-1), widen(dh)
    sigmoid = widen(gate).sigmoid()
    silu = widen(gate) * sigmoid
    dgate_up = torch.cat((dh_ * widen(up) * (sigmoid + silu * (1 - sigmoid)), dh_ * silu), dim=-1).type_as(gate_up)
    return dgate_up, swiglu_ref(gate_up) if want_h else dh.new_empty(0)


def _backward_fake(dh, gate_up, want_h):
    return torch.empty_like(gate_up), torch.empty_like(dh) if want_h else dh.new_empty(0)


def _backward_native(dh, gate_up, want_h):
    dgate_up, h = _backward_fake(dh, gate_up, want_h)
    native.swiglu_backward(dh, gate_up, dgate_up, h if want_h else None)
    return dgate_up, h


@operator("swiglu_backward", cpu=_backward_cpu, fake=_backward_fake, native=_backward_native)
def backward(dh: torch.Tensor, gate_up: torch.Tensor, want_h: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient. dh: (T, F), gate_up: (T, 2F), contiguous. Returns d(gate_up) (T, 2F), and h if wanted."""
    dgate_up, h = _backward_fake(dh, gate_up, want_h)
    _launch("backward", _backward_kernel, gate_up, dh, dgate_up, h if want_h else None)
    return dgate_up, h


def _backward_over_cpu(dh, gate_up, want_h):
    dgate_up, h = _backward_cpu(dh, gate_up, want_h)
    gate_up.copy_(dgate_up)
    if want_h:
        dh.copy_(h)


def _backward_over_native(dh, gate_up, want_h):
    native.swiglu_backward(dh, gate_up, gate_up, dh if want_h else None)


@operator(
    "swiglu_backward_over", mutates=("dh", "gate_up"), cpu=_backward_over_cpu, fake=lambda *arguments: None,
    native=_backward_over_native,
)  # fmt: skip
def backward_over(dh: torch.Tensor, gate_up: torch.Tensor, want_h: bool) -> None:
    """Write d(gate_up) over gate_up (T, 2F), and h over dh (T, F) if wanted: backward without memory of its own."""
    _launch("backward", _backward_kernel, gate_up, dh, gate_up, dh if want_h else None)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return forward(gate_up)

    @staticmethod
    def backward(ctx, dh):
        return backward(dh.contiguous(), *ctx.saved_tensors, False)[0]


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, consume, keep, accumulate, low_rank, *factors):
        ctx.consume, ctx.into, ctx.low_rank = consume, accumulator("swiglu_linear", weight, accumulate), low_rank
        gate_up = gate_up.contiguous()
        h = forward(gate_up)
        y, u = F.linear(h, dense(weight, gate_up.dtype)), None
        if low_rank is not None:
            u = updates.take_factors(h, low_rank)
            updates.add_updates(y, u, low_rank)
        ctx.save_for_backward(gate_up, hold_weight(ctx, weight), h if keep else None, u, *factors)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate_up, weight, h, u, *factors = ctx.saved_tensors
        want_gate_up, want_weight, *_ = ctx.needs_input_grad
        want_h = (want_weight or bool(factors)) and h is None
        low_rank = ctx.low_rank.with_factors(factors) if factors else None
        dgate_up, dweight, dfactors = None, None, []
        if low_rank is not None:
            du = updates.gradient_of_u(dy, low_rank)
        if want_gate_up:
            dh = dy @ held_weight(ctx, weight, dy.dtype)
            if low_rank is not None:
                updates.add_gradient_of_h(dh, du, low_rank)
        if want_gate_up and ctx.consume:
            backward_over(dh, gate_up, want_h)
            dgate_up, h = gate_up.detach(), dh if h is None else h
        elif want_gate_up:
            dgate_up, made = backward(dh, gate_up, want_h)
            h = made if h is None else h
        elif want_h:
            h = forward(gate_up)
        if want_weight:
            dweight = weight_gradient(dy, h, ctx.into)
        if low_rank is not None:
            dfactors = [updates.gradient_of_a(du, h, low_rank), *updates.gradients_of_b(dy, u, low_rank)]
        return dgate_up, dweight, *[None] * 4, *dfactors


# ---- public ---------------------------------------------------------------------------------------------------------


def swiglu(gate_up: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """silu(gate) * up, computed in fp32. gate_up: (T, 2F). Returns (T, F). Raises ValueError for another shape."""
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(
            f"swiglu: gate_up is {tuple(gate_up.shape)}, wanted an even number of columns: gate and up side by side"
        )
    return (
        swiglu_ref(gate_up)
        if choose_impl("swiglu", impl, gate_up, has_native=True) == "ref"
        else _SwiGLU.apply(gate_up)
    )


def swiglu_linear(
    gate_up: torch.Tensor,
    weight: Weight,
    impl: str = "auto",
    consume: bool = False,
    keep: bool = False,
    accumulate: bool = False,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """swiglu(gate_up) @ weight.T. gate_up: (T, 2F). weight: (D, F), a matrix or packed. Returns (T, D).

    consume: backward writes gate_up's gradient over gate_up, which saves 4F bytes a token in bf16, for a caller that
    uses gate_up nowhere else. Autograd then refuses a second backward, and the backward of any other op that saved
    gate_up. keep: keep h, 2F bytes a token in bf16, which backward would otherwise compute again. accumulate: see
    kernels.ops.common.weight_gradient. The reference leaves all three to autograd. low_rank: updates of weight, see
    kernels.ops.low_rank.
    Raises ValueError if the shapes do not fit.
    """
    updates.check_low_rank("swiglu_linear", low_rank, weight.shape)
    if gate_up.ndim != 2 or len(weight.shape) != 2 or gate_up.shape[1] != 2 * weight.shape[1]:
        raise ValueError(
            f"swiglu_linear: gate_up {tuple(gate_up.shape)}, weight {tuple(weight.shape)}; wanted (T, 2F), (D, F)"
        )
    if choose_impl("swiglu_linear", impl, gate_up, has_native=True) == "ref":
        return swiglu_linear_ref(gate_up, weight, low_rank)
    factors = updates.list_factors(low_rank)
    return _SwiGLULinear.apply(gate_up, weight, consume, keep, accumulate, low_rank, *factors)

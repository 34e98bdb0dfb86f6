"""A linear map: the way out of attention, whose output the next norm adds to the residual stream.

    y = x @ weight.T, with the updates of kernels.ops.low_rank

Saved for backward: x and weight. Bound by its GEMMs, which are cuBLAS. Weight's gradients of several micro-batches are
summed in the epilogue of the last GEMM.
"""

import torch
import torch.nn.functional as F

from kernels.ops import low_rank as updates
from kernels.ops.common import Weight, accumulator, choose_impl, dense, held_weight, hold_weight, weight_gradient
from kernels.ops.low_rank import LowRank

# ---- autograd -------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, accumulate, low_rank, *factors):
        ctx.into, ctx.low_rank = accumulator("linear", weight, accumulate), low_rank
        y, u = F.linear(x, dense(weight, x.dtype)), None
        if low_rank is not None:
            u = updates.take_factors(x, low_rank)
            updates.add_updates(y, u, low_rank)
        ctx.save_for_backward(x, hold_weight(ctx, weight), u, *factors)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, u, *factors = ctx.saved_tensors
        want_x, want_weight, *_ = ctx.needs_input_grad
        dx = dy @ held_weight(ctx, weight, dy.dtype) if want_x else None
        dweight = weight_gradient(dy, x, ctx.into) if want_weight else None
        dfactors = []
        if factors:
            low_rank = ctx.low_rank.with_factors(factors)
            du = updates.gradient_of_u(dy, low_rank)
            dx = updates.add_gradient_of_h(dx, du, low_rank)
            dfactors = [updates.gradient_of_a(du, x, low_rank), *updates.gradients_of_b(dy, u, low_rank)]
        return dx, dweight, None, None, *dfactors


# ---- public ---------------------------------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    weight: Weight,
    impl: str = "auto",
    accumulate: bool = False,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """x @ weight.T. x: (T, N). weight: (D, N), a matrix or packed. Returns (T, D).

    accumulate: backward adds weight's gradient to weight.grad, see kernels.ops.common.weight_gradient; the reference,
    torch's own, leaves that to autograd. low_rank: updates of weight, see kernels.ops.low_rank. Raises ValueError if
    the shapes do not fit.
    """
    if x.ndim != 2 or len(weight.shape) != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}; wanted (T, N), (D, N)")
    updates.check_low_rank("linear", low_rank, weight.shape)
    if choose_impl("linear", impl, x, has_native=True) == "ref":
        return updates.linear_ref(x, dense(weight, x.dtype), low_rank)
    return _Linear.apply(x, weight, accumulate, low_rank, *updates.list_factors(low_rank))

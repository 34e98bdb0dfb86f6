"""A linear map: the way out of attention, whose output the next norm adds to the residual stream.

    y = x @ weight.T

Saved for backward: x and weight. Bound by its GEMMs, which are cuBLAS. Weight's gradients of several micro-batches are
summed in the epilogue of the last GEMM.
"""

import torch
import torch.nn.functional as F

from kernels.ops.common import accumulator, choose_impl, weight_gradient

# ---- autograd -------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, accumulate):
        ctx.into = accumulator("linear", weight, accumulate)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        dx = dy @ weight if want_x else None
        return dx, weight_gradient(dy, x, ctx.into) if want_weight else None, None


# ---- public ---------------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, impl: str = "auto", accumulate: bool = False) -> torch.Tensor:
    """x @ weight.T. x: (T, N). weight: (D, N). Returns (T, D).

    accumulate: backward adds weight's gradient to weight.grad, see kernels.ops.common.weight_gradient; the reference,
    torch's own, leaves that to autograd. Raises ValueError if the shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}; wanted (T, N), (D, N)")
    if choose_impl("linear", impl, x, has_native=True) == "ref":
        return F.linear(x, weight)
    return _Linear.apply(x, weight, accumulate)

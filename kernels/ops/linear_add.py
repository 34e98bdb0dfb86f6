"""A linear map added to the residual stream: the way out of attention.

    y = x @ weight.T + residual

Saved for backward: x and weight. Bound by its GEMMs, which are cuBLAS. The residual is added in the epilogue of the
forward GEMM, and weight's gradients of several micro-batches are summed in the epilogue of the last GEMM.
"""

import torch
import torch.nn.functional as F

from kernels.ops.common import accumulator, choose_impl, weight_gradient

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def linear_add_ref(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x @ weight.T + residual in plain torch."""
    return residual + F.linear(x, weight)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, accumulate):
        ctx.into = accumulator("linear_add", weight, accumulate)
        ctx.save_for_backward(x, weight)
        return torch.addmm(residual, x, weight.T)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        want_x, want_weight, want_residual, _ = ctx.needs_input_grad
        dx = dy @ weight if want_x else None
        dweight = weight_gradient(dy, x, ctx.into) if want_weight else None
        return dx, dweight, dy if want_residual else None, None


# ---- public ---------------------------------------------------------------------------------------------------------


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, impl: str = "auto", accumulate: bool = False
) -> torch.Tensor:
    """x @ weight.T + residual. x: (T, N). weight: (D, N). residual: (T, D). Returns (T, D).

    accumulate: backward adds weight's gradient to weight.grad, see kernels.ops.common.weight_gradient; the reference
    leaves that to autograd. Raises ValueError if the shapes do not fit.
    """
    fits = x.ndim == weight.ndim == residual.ndim == 2
    if not fits or residual.shape != (len(x), len(weight)) or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_add: x {tuple(x.shape)}, weight {tuple(weight.shape)}, residual {tuple(residual.shape)}; "
            f"wanted (T, N), (D, N), (T, D)"
        )
    if choose_impl("linear_add", impl, x) == "ref":
        return linear_add_ref(x, weight, residual)
    return _LinearAdd.apply(x, weight, residual, accumulate)

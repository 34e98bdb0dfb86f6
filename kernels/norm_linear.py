"""RMSNorm, then a linear map: the way into attention and into the feed-forward.

    y = rms_norm(x, norm_weight) @ weight.T          x is handed back beside it

Saved for backward: x, rstd (4 bytes a row) and the weights. The norm's output is never stored: the pass that takes the
gradient through the norm writes it again for weight's gradient, and adds the gradient that reaches x over the residual
stream, for whoever goes on from the x that is handed back. Bound by its GEMMs, which are cuBLAS; the norm moves 4 bytes
an element forward and 10 backward in bf16, where adding the residual stream's gradient apart would move 6 more.
"""

import torch
import torch.nn.functional as F

from kernels.rms_norm import backward as norm_backward
from kernels.rms_norm import check, rms_norm_ref
from kernels.rms_norm import forward as norm_forward

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def norm_linear_ref(x, norm_weight, weight, eps):
    return F.linear(rms_norm_ref(x, norm_weight, eps), weight), x


# ---- autograd -------------------------------------------------------------------------------------------------------


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, weight, eps):
        ctx.set_materialize_grads(False)  # a gradient of nothing is None, not a tensor of zeros to read
        ctx.eps = eps
        rows = x.contiguous()
        h, _, rstd = norm_forward(rows, None, norm_weight, eps)
        ctx.save_for_backward(rows, norm_weight, weight, rstd)
        return F.linear(h, weight), x

    @staticmethod
    def backward(ctx, dy, ds):
        x, norm_weight, weight, rstd = ctx.saved_tensors
        want_x, want_norm_weight, want_weight, _ = ctx.needs_input_grad
        if dy is None:
            return ds, None, None, None
        dx = dnorm_weight = dweight = None
        if want_x or want_norm_weight:
            ds = ds if ds is None else ds.contiguous()
            dx, dnorm_weight, h = norm_backward(dy @ weight, x, norm_weight, rstd, ds, want_weight)
        elif want_weight:
            h = norm_forward(x, None, norm_weight, ctx.eps)[0]
        if want_weight:
            dweight = dy.T @ h
        return dx, dnorm_weight, dweight, None


# ---- public ---------------------------------------------------------------------------------------------------------


def norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (T, D). norm_weight: (D,). weight: (N, D). Returns y (T, N) in x's dtype, and x.

    Go on from the x that is returned, as the residual: then its gradient is summed in the norm's own backward pass.
    Raises ValueError when the shapes or dtypes do not fit.
    """
    if x.ndim != 2 or norm_weight.shape != x.shape[-1:] or weight.ndim != 2 or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"norm_linear: x is {tuple(x.shape)}, norm_weight is {tuple(norm_weight.shape)}, "
            f"weight is {tuple(weight.shape)}; wanted (T, D), (D,), (N, D)"
        )
    if check("norm_linear", impl, x, norm_weight) == "ref":
        return norm_linear_ref(x, norm_weight, weight, eps)
    return _NormLinear.apply(x, norm_weight, weight, eps)

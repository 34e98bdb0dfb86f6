"""RMSNorm, then a linear map: the way into attention and into the feed-forward.

    norm_linear        s = x + residual (or x), y = rms_norm(s, norm_weight) @ weight.T; both are returned
    norm_linear_rows   without a residual: the first n columns of y at chosen rows only, the other columns at all rows,
                       and x at the chosen rows: the way into the last layer, where only rows with a loss need queries

Saved for backward: s, rstd (4 bytes a row) and the weights; the norm's output only with
keep. Without it, the pass that takes the gradient through the norm writes the output again for weight's gradient. That
pass also adds the gradient of the residual stream, if the caller goes on from the s that is returned. Bound by its
GEMMs, which are cuBLAS. The norm moves 8 bytes an element forward (4 without a residual) and 10 backward in bf16 (8
with keep); adding the residual and its gradient in passes of their own would move 4 and 6 more.
"""

import torch
import torch.nn.functional as F

from kernels.ops.common import accumulator, weight_gradient
from kernels.ops.rms_norm import backward as norm_backward
from kernels.ops.rms_norm import check_residual, choose_norm_impl, rms_norm_ref
from kernels.ops.rms_norm import forward as norm_forward

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def norm_linear_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute norm_linear in plain torch."""
    s = x if residual is None else x + residual
    return F.linear(rms_norm_ref(s, norm_weight, eps), weight), s


def norm_linear_rows_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    n: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute norm_linear_rows in plain torch."""
    h = rms_norm_ref(x, norm_weight, eps)
    first, others = weight.split((n, len(weight) - n))
    return F.linear(h[rows], first), F.linear(h, others), x[rows]


# ---- autograd -------------------------------------------------------------------------------------------------------


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, weight, eps, keep, accumulate):
        ctx.set_materialize_grads(False)  # a missing gradient stays None, instead of zeros to read
        ctx.eps, ctx.into = eps, accumulator("norm_linear", weight, accumulate)
        rows, residual = x.contiguous(), residual if residual is None else residual.contiguous()
        h, s, rstd = norm_forward(rows, residual, norm_weight, eps)
        ctx.save_for_backward(rows if residual is None else s, norm_weight, weight, rstd, h if keep else None)
        return F.linear(h, weight), x if residual is None else s

    @staticmethod
    def backward(ctx, dy, ds):
        s, norm_weight, weight, rstd, h = ctx.saved_tensors
        want_x, want_residual, want_norm_weight, want_weight, *_ = ctx.needs_input_grad
        dx, dnorm_weight, dweight = ds, None, None
        if dy is not None and (want_x or want_residual or want_norm_weight):
            ds = ds if ds is None else ds.contiguous()
            dx, dnorm_weight, made = norm_backward(dy @ weight, s, norm_weight, rstd, ds, want_weight and h is None)
            h = made if h is None else h
        elif dy is not None and want_weight and h is None:
            h = norm_forward(s, None, norm_weight, ctx.eps)[0]
        if dy is not None and want_weight:
            dweight = weight_gradient(dy, h, ctx.into)
        return dx, dx if want_residual else None, dnorm_weight, dweight, None, None, None


class _NormLinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, weight, rows, n, eps, keep, accumulate):
        ctx.n, ctx.into = n, accumulator("norm_linear_rows", weight, accumulate)
        x = x.contiguous()
        h, _, rstd = norm_forward(x, None, norm_weight, eps)
        ctx.save_for_backward(x, norm_weight, weight, rows, rstd, h if keep else None)
        return F.linear(h[rows], weight[:n]), F.linear(h, weight[n:]), x[rows]

    @staticmethod
    def backward(ctx, dy_rows, dy, ds_rows):
        x, norm_weight, weight, rows, rstd, h = ctx.saved_tensors
        dh = (dy @ weight[ctx.n :]).index_add_(0, rows, dy_rows @ weight[: ctx.n])  # rows are distinct: one order
        ds = torch.zeros_like(x).index_copy_(0, rows, ds_rows)
        want_weight = ctx.needs_input_grad[2]
        dx, dnorm_weight, made = norm_backward(dh, x, norm_weight, rstd, ds, want_weight and h is None)
        h = made if h is None else h
        dweight = None
        if want_weight:
            parts = (slice(None, ctx.n), dy_rows, h[rows]), (slice(ctx.n, None), dy, h)
            dweight = _weight_gradient_in_parts(weight, parts, ctx.into)
        return dx, dnorm_weight, dweight, *[None] * 5


def _weight_gradient_in_parts(weight, parts, into):
    """Return weight's gradient, or add it to into.grad. parts: (rows of weight, their dy, their x), which cover it."""
    old = None if into is None else into.grad
    grad, beta = (torch.empty_like(weight), 0) if old is None else (old, 1)  # beta 0: grad's values are not read
    for rows, dy, x in parts:
        torch.addmm(grad[rows], dy.T, x, beta=beta, out=grad[rows])
    if into is None:
        return grad
    into.grad = grad
    return None


# ---- public ---------------------------------------------------------------------------------------------------------


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
    residual: torch.Tensor | None = None,
    keep: bool = False,
    accumulate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm(s, norm_weight) @ weight.T of s = x + residual. Returns y (T, N), and s, which is x without a residual.

    x, residual: (T, D). norm_weight: (D,). weight: (N, D). Use the returned s as the next residual: its gradient is
    then added in the norm's own backward pass. keep: keep the norm's output, which backward would otherwise compute
    again. accumulate: see kernels.ops.common.weight_gradient. The reference leaves both to autograd. Raises ValueError
    if the shapes or dtypes do not fit.
    """
    if _check("norm_linear", impl, x, norm_weight, weight, residual) == "ref":
        return norm_linear_ref(x, norm_weight, weight, eps, residual)
    return _NormLinear.apply(x, residual, norm_weight, weight, eps, keep, accumulate)


def norm_linear_rows(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    n: int,
    eps: float = 1e-5,
    impl: str = "auto",
    keep: bool = False,
    accumulate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute norm_linear with the first n outputs, and x, at the rows `rows` only.

    rows: (U,) int64, distinct. Returns y[rows, :n] (U, n), y[:, n:] (T, N - n) and x[rows] (U, D). The other arguments
    are norm_linear's. Raises ValueError if the shapes or dtypes do not fit.
    """
    if rows.ndim != 1 or not 0 <= n <= len(weight):
        raise ValueError(f"norm_linear_rows: rows {tuple(rows.shape)}, n {n}; wanted (U,) and up to {len(weight)}")
    if _check("norm_linear_rows", impl, x, norm_weight, weight) == "ref":
        return norm_linear_rows_ref(x, norm_weight, weight, rows, n, eps)
    return _NormLinearRows.apply(x, norm_weight, weight, rows, n, eps, keep, accumulate)


def _check(op, impl, x, norm_weight, weight, residual=None):
    if x.ndim != 2 or norm_weight.shape != x.shape[-1:] or weight.ndim != 2 or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, norm_weight is {tuple(norm_weight.shape)}, "
            f"weight is {tuple(weight.shape)}; wanted (T, D), (D,), (N, D)"
        )
    check_residual(op, x, residual)
    return choose_norm_impl(op, impl, x, norm_weight)

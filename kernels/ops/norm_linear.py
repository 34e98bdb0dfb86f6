"""RMSNorm, then a linear map: the way into attention and into the feed-forward.

    norm_linear        s = x + residual (or x), y = rms_norm(s, norm_weight) @ weight.T; both are returned
    norm_linear_rows   without a residual: the first n columns of y at chosen rows only, the other columns at all rows,
                       and x at the chosen rows: the way into the last layer, where only rows with a loss need queries

Either adds low-rank updates of a frozen weight to y, see kernels.ops.low_rank.

Saved for backward: s, rstd (4 bytes a row) and the weights; the norm's output only with
keep. Without it, the pass that takes the gradient through the norm writes the output again for weight's gradient. That
pass also adds the gradient of the residual stream, if the caller goes on from the s that is returned. Bound by its
GEMMs, which are cuBLAS. The norm moves 8 bytes an element forward (4 without a residual) and 10 backward in bf16 (8
with keep); adding the residual and its gradient in passes of their own would move 4 and 6 more.
"""

import torch
import torch.nn.functional as F

from kernels.ops import low_rank as updates
from kernels.ops.common import (
    Weight,
    accumulator,
    dense,
    held_weight,
    hold_weight,
    set_weight_gradient,
    weight_gradient,
)
from kernels.ops.low_rank import LowRank
from kernels.ops.rms_norm import backward as norm_backward
from kernels.ops.rms_norm import check_residual, choose_norm_impl, rms_norm_ref
from kernels.ops.rms_norm import forward as norm_forward

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def norm_linear_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: Weight,
    eps: float,
    residual: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute norm_linear in plain torch."""
    s = x if residual is None else x + residual
    h = rms_norm_ref(s, norm_weight, eps)
    return updates.linear_ref(h, dense(weight, x.dtype), low_rank), s


def norm_linear_rows_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: Weight,
    rows: torch.Tensor,
    n: int,
    eps: float,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute norm_linear_rows in plain torch."""
    h, matrix = rms_norm_ref(x, norm_weight, eps), dense(weight, x.dtype)
    y_rows, y = F.linear(h[rows], matrix[:n]), F.linear(h, matrix[n:])
    if low_rank is not None:
        updated = updates.low_rank_ref(h, low_rank, len(matrix))
        y_rows, y = y_rows + updated[rows, :n], y + updated[:, n:]
    return y_rows, y, x[rows]


# ---- autograd -------------------------------------------------------------------------------------------------------


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, weight, eps, keep, accumulate, low_rank, *factors):
        ctx.set_materialize_grads(False)  # a missing gradient stays None, instead of zeros to read
        ctx.eps, ctx.into, ctx.low_rank = eps, accumulator("norm_linear", weight, accumulate), low_rank
        rows, residual = x.contiguous(), residual if residual is None else residual.contiguous()
        h, s, rstd = norm_forward(rows, residual, norm_weight, eps)
        y, u = F.linear(h, dense(weight, x.dtype)), None
        if low_rank is not None:
            u = updates.take_factors(h, low_rank)
            updates.add_updates(y, u, low_rank)
        kept = rows if residual is None else s, norm_weight, hold_weight(ctx, weight), rstd, h if keep else None
        ctx.save_for_backward(*kept, u, *factors)
        return y, x if residual is None else s

    @staticmethod
    def backward(ctx, dy, ds):
        s, norm_weight, weight, rstd, h, u, *factors = ctx.saved_tensors
        want_x, want_residual, want_norm_weight, want_weight, *_ = ctx.needs_input_grad
        want_h = (want_weight or bool(factors)) and h is None
        low_rank = ctx.low_rank.with_factors(factors) if factors else None
        dx, dnorm_weight, dweight = ds, None, None
        dfactors: list[torch.Tensor | None] = [None] * len(factors)
        if dy is not None and low_rank is not None:
            du = updates.gradient_of_u(dy, low_rank)
        if dy is not None and (want_x or want_residual or want_norm_weight):
            ds = ds if ds is None else ds.contiguous()
            dh = dy @ held_weight(ctx, weight, dy.dtype)
            if low_rank is not None:
                updates.add_gradient_of_h(dh, du, low_rank)
            dx, dnorm_weight, made = norm_backward(dh, s, norm_weight, rstd, ds, want_h)
            h = made if h is None else h
        elif dy is not None and want_h:
            h = norm_forward(s, None, norm_weight, ctx.eps)[0]
        if dy is not None and want_weight:
            dweight = weight_gradient(dy, h, ctx.into)
        if dy is not None and low_rank is not None:
            dfactors = [updates.gradient_of_a(du, h, low_rank), *updates.gradients_of_b(dy, u, low_rank)]
        return dx, dx if want_residual else None, dnorm_weight, dweight, *[None] * 4, *dfactors


class _NormLinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, weight, rows, n, eps, keep, accumulate, low_rank, *factors):
        ctx.n, ctx.into, ctx.low_rank = n, accumulator("norm_linear_rows", weight, accumulate), low_rank
        ctx.eps, x = eps, x.contiguous()
        h, _, rstd = norm_forward(x, None, norm_weight, eps)
        matrix, u = dense(weight, x.dtype), None
        y_rows, y = F.linear(h[rows], matrix[:n]), F.linear(h, matrix[n:])
        if low_rank is not None:
            u = updates.take_factors(h, low_rank)
            updates.add_updates(y_rows, u[rows], low_rank)
            updates.add_updates(y, u, low_rank, n)
        ctx.save_for_backward(x, norm_weight, hold_weight(ctx, weight), rows, rstd, h if keep else None, u, *factors)
        return y_rows, y, x[rows]

    @staticmethod
    def backward(ctx, dy_rows, dy, ds_rows):
        x, norm_weight, weight, rows, rstd, h, u, *factors = ctx.saved_tensors
        want_x, want_norm_weight, want_weight, *_ = ctx.needs_input_grad
        want_h = (want_weight or bool(factors)) and h is None
        low_rank = ctx.low_rank.with_factors(factors) if factors else None
        dx, dnorm_weight, dweight, dfactors = None, None, None, []
        if low_rank is not None:
            du = updates.gradient_of_u(dy, low_rank, ctx.n)
            du.index_add_(0, rows, updates.gradient_of_u(dy_rows, low_rank))  # rows are distinct: one order
        if want_x or want_norm_weight:
            matrix = held_weight(ctx, weight, dy.dtype)
            dh = (dy @ matrix[ctx.n :]).index_add_(0, rows, dy_rows @ matrix[: ctx.n])
            del matrix  # a packed weight's is freed before the norm's backward
            if low_rank is not None:
                updates.add_gradient_of_h(dh, du, low_rank)
            ds = torch.zeros_like(x).index_copy_(0, rows, ds_rows)
            dx, dnorm_weight, made = norm_backward(dh, x, norm_weight, rstd, ds, want_h)
            h = made if h is None else h
        elif want_h:
            h = norm_forward(x, None, norm_weight, ctx.eps)[0]
        if want_weight:
            parts = (slice(None, ctx.n), dy_rows, h[rows]), (slice(ctx.n, None), dy, h)
            dweight = _weight_gradient_in_parts(weight, parts, ctx.into)
        if low_rank is not None:
            of_b = updates.gradients_of_b(dy_rows, u[rows], low_rank), updates.gradients_of_b(dy, u, low_rank, ctx.n)
            dfactors = [updates.gradient_of_a(du, h, low_rank), *of_b[0], *of_b[1]]
        return dx, dnorm_weight, dweight, *[None] * 6, *dfactors


def _weight_gradient_in_parts(weight, parts, into):
    """Return weight's gradient, or add it to into.grad. parts: (rows of weight, their dy, their x), which cover it."""
    old = None if into is None else into.grad
    grad, beta = (torch.empty_like(weight), 0) if old is None else (old, 1)  # beta 0: grad's values are not read
    for rows, dy, x in parts:
        set_weight_gradient(grad[rows], dy, x, beta)
    if into is None:
        return grad
    into.grad = grad
    return None


# ---- public ---------------------------------------------------------------------------------------------------------


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: Weight,
    eps: float = 1e-5,
    impl: str = "auto",
    residual: torch.Tensor | None = None,
    keep: bool = False,
    accumulate: bool = False,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm(s, norm_weight) @ weight.T of s = x + residual. Returns y (T, N), and s, which is x without a residual.

    x, residual: (T, D). norm_weight: (D,). weight: (N, D), a matrix or packed. Use the returned s as the next residual:
    its gradient is then added in the norm's own backward pass. keep: keep the norm's output, which backward would
    otherwise compute again. accumulate: see kernels.ops.common.weight_gradient. The reference leaves both to autograd.
    low_rank: updates of weight, see kernels.ops.low_rank. Raises ValueError if the shapes or dtypes do not fit.
    """
    updates.check_low_rank("norm_linear", low_rank, weight.shape)
    if _check("norm_linear", impl, x, norm_weight, weight, residual) == "ref":
        return norm_linear_ref(x, norm_weight, weight, eps, residual, low_rank)
    factors, norm_weight = updates.list_factors(low_rank), norm_weight.contiguous()
    return _NormLinear.apply(x, residual, norm_weight, weight, eps, keep, accumulate, low_rank, *factors)


def norm_linear_rows(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: Weight,
    rows: torch.Tensor,
    n: int,
    eps: float = 1e-5,
    impl: str = "auto",
    keep: bool = False,
    accumulate: bool = False,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute norm_linear with the first n outputs, and x, at the rows `rows` only.

    rows: (U,) int64, distinct. Returns y[rows, :n] (U, n), y[:, n:] (T, N - n) and x[rows] (U, D). The other arguments
    are norm_linear's; no part of low_rank lies on both sides of row n. Raises ValueError if the shapes or dtypes do not
    fit.
    """
    if rows.ndim != 1 or not 0 <= n <= weight.shape[0]:
        raise ValueError(f"norm_linear_rows: rows {tuple(rows.shape)}, n {n}; wanted (U,) and up to {weight.shape[0]}")
    updates.check_low_rank("norm_linear_rows", low_rank, weight.shape, n)
    if _check("norm_linear_rows", impl, x, norm_weight, weight) == "ref":
        return norm_linear_rows_ref(x, norm_weight, weight, rows, n, eps, low_rank)
    factors, norm_weight = updates.list_factors(low_rank), norm_weight.contiguous()
    return _NormLinearRows.apply(x, norm_weight, weight, rows, n, eps, keep, accumulate, low_rank, *factors)


def _check(op, impl, x, norm_weight, weight, residual=None):
    if x.ndim != 2 or norm_weight.shape != x.shape[-1:] or len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, norm_weight is {tuple(norm_weight.shape)}, "
            f"weight is {tuple(weight.shape)}; wanted (T, D), (D,), (N, D)"
        )
    check_residual(op, x, residual)
    return choose_norm_impl(op, impl, x, norm_weight)

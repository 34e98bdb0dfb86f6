"""RMSNorm, of x or of x + residual; the addition runs in the norm's own pass.

    y = x * rsqrt(mean(x^2) + eps) * weight            statistics in fp32
    with a residual:  s = x + residual,  y = rms_norm(s);  both are returned

Bound by memory. Forward reads x (and residual) and writes y (and s): 4 (8) bytes an element in bf16. Backward reads x
and dy and writes dx: 6 bytes. It takes 2 more to add the gradient that reaches s on another path, and 2 more to write
the output again for a caller that did not save it. Saved for backward: x (or s), weight and rstd (fp32, 4 bytes a row).

Backward runs few programs, because each sums dw over many rows in registers. Each program therefore copies its next
rows to shared memory while it works on one. A second launch adds the programs' sums, 4.3 MB at D = 4096 on an H100.
Source: arXiv:1910.07467; cast order as meta-llama/llama llama/model.py RMSNorm.
"""

import torch
import triton
import triton.language as tl

from kernels.native import training as native
from kernels.ops.common import choose_impl, launch_config, n_sms, next_power_of_2, operator, widen

MAX_DIM = 8192  # of the kernels: at 16384 a row, its gradient and its part of dw exceed an SM's registers


# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in plain torch."""
    s = widen(x)
    return (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight


# ---- kernels --------------------------------------------------------------------------------------------------------


# Counts of rows differ from micro-batch to micro-batch: specialised on 1 and on multiples of 16, they would compile the
# kernels again in the midst of training. No access is narrower for it, because rows are whole.
@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    x_ptr, res_ptr, w_ptr, y_ptr, sum_ptr, rstd_ptr, n_rows, eps,
    DIM: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # row * D passes 2^31 at 524,288 rows of 4096
    cols = tl.arange(0, COLS)[None, :]
    mask = (row < n_rows)[:, None] & (cols < DIM)
    at = row[:, None] * DIM + cols
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    w = tl.load(w_ptr + cols, mask=cols < DIM, other=0.0)
    x32 = x.to(tl.float32)
    if res_ptr is not None:
        x32 += tl.load(res_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, x32, mask=mask)
        x32 = x32.to(x.dtype).to(tl.float32)  # statistics of what is stored, as the reference's
    rstd = tl.rsqrt(tl.sum(x32 * x32, axis=1) / DIM + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    # Round to x.dtype before the weight, as the reference does. The product stays in fp32 because the CPU interpreter
    # multiplies bf16 as integers; rounding happens when it is stored.
    x_hat = (x32 * rstd[:, None]).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + at, x_hat * w.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, ds_ptr, dx_ptr, y_ptr, dw_ptr, n_rows, rows_per_program,
    DIM: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)[None, :]
    w = tl.load(w_ptr + cols, mask=cols < DIM, other=0.0)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (cols < DIM)
        at = row[:, None] * DIM + cols
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        x_hat = x.to(tl.float32) * rstd
        g = dy * w.to(tl.float32)
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=1) / DIM)[:, None])
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dw += dy * x_hat
        tl.store(dx_ptr + at, dx, mask=mask)
        if y_ptr is not None:  # the output again, for a caller that did not save it
            tl.store(y_ptr + at, x_hat.to(x.dtype).to(tl.float32) * w.to(tl.float32), mask=mask)
    tl.store(dw_ptr + program * DIM + cols, tl.sum(dw, axis=0)[None, :], mask=cols < DIM)


@triton.jit(do_not_specialize=["n_parts"])
def _dw_kernel(part_ptr, dw_ptr, n_parts, DIM: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, n_parts, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < n_parts)[:, None] & (cols < DIM)[None, :]
        dw += tl.load(part_ptr + row[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(dw, axis=0), mask=cols < DIM)


# ---- launch: shapes, allocation, grid; torch.ops.cria.* -------------------------------------------------------------


def _forward_cpu(x, residual, weight, eps):
    s = x if residual is None else x + residual
    rstd = torch.rsqrt(widen(s).pow(2).mean(-1) + eps)
    return rms_norm_ref(s, weight, eps), s.new_empty(0) if residual is None else s, rstd


def _forward_fake(x, residual, weight, eps):
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), rstd


@operator("rms_norm_forward", cpu=_forward_cpu, fake=_forward_fake, native=native.norm_forward)
def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise contiguous x (N, D), or x + residual. Returns y, the sum (empty without residual), rstd (N,) fp32."""
    n_rows, dim = x.shape
    y, s, rstd = _forward_fake(x, residual, weight, eps)
    cols = next_power_of_2(dim)
    config = launch_config("rms_norm", "forward", x.device, cols)
    if n_rows:
        # Without fusion, lanes agree on a row's sum of squares, and y is what backward makes of the stored rstd: in
        # fma(x, x, neighbour's square) each lane leaves its own square unrounded, so its y would have its own rstd.
        _forward_kernel[(triton.cdiv(n_rows, config["ROWS"]),)](
            x, residual, weight, y, s, rstd, n_rows, eps, DIM=dim, COLS=cols, enable_fp_fusion=False, **config
        )
    return y, s, rstd


def _backward_cpu(dy, x, weight, rstd, ds, want_y):
    x_hat, g = widen(x) * rstd[:, None], widen(dy) * widen(weight)
    dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) + (0 if ds is None else widen(ds))
    y = x_hat.type_as(x) * weight if want_y else x.new_empty(0)
    return dx.type_as(x), (widen(dy) * x_hat).sum(0).type_as(weight), y


def _backward_fake(dy, x, weight, rstd, ds, want_y):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(x) if want_y else x.new_empty(0)


@operator("rms_norm_backward", cpu=_backward_cpu, fake=_backward_fake, native=native.norm_backward)
def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, ds: torch.Tensor | None, want_y: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients. dy, x, ds: (N, D) contiguous; ds is added to dx. Returns dx, dw (D,), and y if wanted."""
    n_rows, dim = x.shape
    dx, dw, y = _backward_fake(dy, x, weight, rstd, ds, want_y)
    cols = next_power_of_2(dim)
    config, last = (launch_config("rms_norm", kernel, x.device, cols) for kernel in ("backward", "dw"))
    # One partial dw a program, summed by a second launch: bitwise repeatable, unlike atomics.
    rows_per_program = max(1, triton.cdiv(n_rows, config.pop("programs_per_sm") * n_sms(x.device)))
    grid = triton.cdiv(n_rows, rows_per_program)
    partial = x.new_empty(grid, dim, dtype=torch.float32)
    if n_rows:
        _backward_kernel[(grid,)](
            dy, x, weight, rstd, ds, dx, y if want_y else None, partial, n_rows, rows_per_program,
            DIM=dim, COLS=cols, enable_fp_fusion=True, **config,
        )  # fmt: skip
    _dw_kernel[(triton.cdiv(dim, last["COLS"]),)](partial, dw, grid, DIM=dim, enable_fp_fusion=True, **last)
    return dx, dw, y


# ---- autograd -------------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        ctx.set_materialize_grads(False)  # a missing gradient stays None, instead of zeros to read
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        residual = residual if residual is None else residual.reshape_as(rows).contiguous()
        y, s, rstd = forward(rows, residual, weight, eps)
        ctx.save_for_backward(rows if residual is None else s, weight, rstd)
        return y.view_as(x), None if residual is None else s.view_as(x)

    @staticmethod
    def backward(ctx, dy, ds):
        s, weight, rstd = ctx.saved_tensors
        dx, dw = ds, None
        if dy is not None:
            ds = ds if ds is None else ds.reshape_as(s).contiguous()
            dx, dw, _ = backward(dy.reshape_as(s).contiguous(), s, weight, rstd, ds, False)
            dx = dx.view_as(dy)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None


# ---- public ---------------------------------------------------------------------------------------------------------


def choose_norm_impl(op: str, impl: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    """Return the implementation to run. Raises ValueError if weight does not fit x, or x the implementation."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}, x ends in {x.shape[-1]}")
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype}, x is {x.dtype}")
    impl = choose_impl(op, impl, x, has_native=True)
    if impl == "triton" and x.shape[-1] > MAX_DIM:
        raise ValueError(f"{op}: D={x.shape[-1]} is over {MAX_DIM}; pass impl='ref'")
    return impl


def check_residual(op: str, x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raise ValueError if a residual does not fit x."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last axis of x, or of x + residual, by its root mean square and scale it by weight.

    x, residual: (..., D). weight: (D,), in x's dtype and on its device. Returns y in x's shape and dtype; with a
    residual, y and the sum. impl: see kernels.ops.common.choose_impl.
    Raises ValueError if the shapes or dtypes do not fit.
    """
    impl = choose_norm_impl("rms_norm", impl, x, weight)
    check_residual("rms_norm", x, residual)
    if impl == "ref":
        s = x if residual is None else x + residual
        y = rms_norm_ref(s, weight, eps)
    else:
        y, s = _RMSNorm.apply(x, residual, weight.contiguous(), eps)
    return y if residual is None else (y, s)

"""The head and its loss, without a tensor of all logits.

    loss = sum_t weight_t * [(1 - s) * nll_t  +  s * mean_v(-log p_tv)  +  z * lse_t^2]          in fp32

over the rows t whose target is not ignore_index, with logits = x W^T, lse_t = logsumexp_v(logits_tv), log p = logits -
lse, nll_t = -log p_t,target. s: label smoothing, as torch's F.cross_entropy. z: z-loss, as PaLM (arXiv:2204.02311,
section 5). The caller divides the sum, because only the caller knows how many tokens the global batch holds.

    d loss / d logits_tv = weight_t * [(1 + 2 z lse_t) * p_tv - s / V - (1 - s) * (v is the target)]

Rows are processed in chunks. One GEMM writes a chunk's logits, one kernel reads them and writes their gradient in their
place, two GEMMs compute dx and dW from it, and the next chunk reuses the buffer. So forward computes the gradients, and
backward only multiplies them by the upstream gradient. Saved for backward: dx, and dW in fp32 (in bf16 after a single
chunk of bf16).

Bound by the GEMMs: 6 L D V floating point operations, 2 L D V without gradients. The kernel moves 4 V bytes a row of
bf16 logits from and to HBM, 2 V without gradients: it reads a row twice, and L1 and L2 serve the second read. A chunk
moves 8 bytes an element of dW, so chunks are as large as LOGITS_BYTES allows; a row of logits brings 2 D operations an
element of dW. Without dW, as beside an adapter and in evaluation, a chunk only reads W, and FEWER_LOGITS_BYTES are
enough for GEMMs at their full rate. Backward moves 6 bytes an element of dW, 4 after a single chunk, and 4 of dx.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.native import training as native
from kernels.ops.common import (
    accumulator,
    add_product,
    choose_impl,
    chunk_size,
    launch_config,
    operator,
    set_weight_gradient,
    widen,
)

LOGITS_BYTES = 512 << 20  # of the one buffer: 8,320 rows of V=32000 in bf16, 2,048 of V=128256
FEWER_LOGITS_BYTES = 128 << 20  # where no dW is computed
ROWS = 128  # chunks are multiples of a GEMM's tile
REF_ROWS = 32  # of a chunk in the reference: 6 MB of fp32 logits at V=49152
PAD = 64  # elements: rows of the buffer start on 128 bytes, whatever V is

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; unlike -inf it can be subtracted from -inf


# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def linear_cross_entropy_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the summed loss of linear_cross_entropy, computed in plain torch with all logits at once."""
    loss = _Losses.apply(F.linear(x, weight), targets, ignore_index, z_loss, label_smoothing)
    return (loss if weights is None else loss * weights).sum()


def _losses_ref(logits, targets, ignore_index, z_loss, smoothing):
    """Return each row's loss and lse. Chunks fit a cache: fp32 copies of all logits cost a CPU as much as a GEMM."""
    losses, lse = widen(logits.new_empty(len(logits))), widen(logits.new_empty(len(logits)))
    n_rows = chunk_size(REF_ROWS, logits.device)
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        x, target = widen(logits[rows]), targets[rows]
        losses[rows] = F.cross_entropy(
            x, target, reduction="none", ignore_index=ignore_index, label_smoothing=smoothing
        )
        lse[rows] = x.logsumexp(-1)
        if z_loss:
            losses[rows] += z_loss * lse[rows].square().masked_fill(target == ignore_index, 0)
    return losses, lse


def _dlogits_ref(dlosses, logits, targets, lse, ignore_index, z_loss, smoothing):
    """Return d loss / d logits of the formula above, in the dtype of logits. dlosses: (L,), weight_t of each row."""
    dlogits, ignored = torch.empty_like(logits), targets == ignore_index
    dlosses, targets = dlosses.masked_fill(ignored, 0), targets.masked_fill(ignored, 0)
    n_rows = chunk_size(REF_ROWS, logits.device)
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        p = widen(logits[rows]).sub(lse[rows, None]).exp_()
        if z_loss:
            p *= 1 + 2 * z_loss * lse[rows, None]
        if smoothing:
            p -= smoothing / logits.shape[1]
        p[torch.arange(len(p), device=p.device), targets[rows]] -= 1 - smoothing
        dlogits[rows] = p.mul_(dlosses[rows, None])
    return dlogits


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, *settings):
        losses, lse = _losses_ref(logits, targets, *settings)
        ctx.save_for_backward(logits, targets, lse)
        ctx.settings = settings
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        return _dlogits_ref(dlosses, *ctx.saved_tensors, *ctx.settings), None, None, None, None


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _rows_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, vocab, stride, ignore_index, z_loss, smoothing,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, PADDED: tl.constexpr, VECTORS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # One row a program. A tile is (VECTORS, VECTOR), where a thread holds the VECTOR neighbours that one 128-bit access
    # moves: statistics stay in the thread until the row is read, and no barrier stops the loads. Masks follow the
    # padded stride, not vocab, so that accesses are wide for every V; what is in the padding is read and not used.
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31
    logits_ptr += row * stride
    cols = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    n_tiles = tl.cdiv(vocab, VECTORS * VECTOR)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for i in range(n_tiles):
                at = i * VECTORS * VECTOR + cols
                tl.store(logits_ptr + at, tl.zeros([VECTORS, VECTOR], tl.float32), mask=at < stride)
        return
    inside = (target >= 0) & (target < vocab)
    weight = tl.where(inside, 1.0, float("nan"))  # a target that is no id shows in the loss and every gradient
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + row)
    x_target = tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32)
    target = target.to(tl.int32)  # compared with every column

    peak = tl.full([VECTORS], LOWEST, tl.float32)
    rest = tl.zeros([VECTORS], tl.float32)  # sum of exp(x - peak) without the target
    above = tl.zeros([VECTORS], tl.float32)  # sum of x - x_target
    for i in range(n_tiles):
        at = i * VECTORS * VECTOR + cols
        x = tl.load(logits_ptr + at, mask=at < stride, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        if PADDED:
            x = tl.where(at < vocab, x, float("-inf"))
        if SMOOTH:
            above += tl.sum(tl.where(at < vocab, x - x_target, 0.0), axis=1)
        new_peak = tl.maximum(peak, tl.max(x, axis=1))
        # Subtract first: x * log2(e) - peak * log2(e) as one FMA is not 0 at the peak, far from it for large logits.
        e = tl.exp2((x - new_peak[:, None]) * LOG2_E)
        rest = rest * tl.exp2((peak - new_peak) * LOG2_E) + tl.sum(tl.where(at == target, 0.0, e), axis=1)
        peak = new_peak
    top = tl.max(peak, axis=0)
    rest = tl.sum(rest * tl.exp2((peak - top) * LOG2_E), axis=0)
    total = rest + tl.exp2((x_target - top) * LOG2_E)
    lse = top + tl.log(total)
    loss = (top - x_target) + tl.log(total) + z_loss * lse * lse
    if SMOOTH:
        loss -= smoothing * (tl.sum(above, axis=0) / vocab)
    tl.store(loss_ptr + row, weight * loss)

    if GRADIENT:
        # At the target p - 1 is -rest / total, which keeps its digits where p rounds to 1.
        factor = 1.0 + 2.0 * z_loss * lse
        slope = weight * factor / total
        share = smoothing / vocab
        at_target = weight * (2.0 * z_loss * lse + smoothing - share - factor * (rest / total))
        for i in range(n_tiles):
            at = (n_tiles - 1 - i) * VECTORS * VECTOR + cols  # backwards: what was read last is in the cache first
            x = tl.load(logits_ptr + at, mask=at < stride, other=0.0, eviction_policy="evict_first").to(tl.float32)
            g = tl.exp2((x - top) * LOG2_E) * slope - weight * share
            tl.store(logits_ptr + at, tl.where(at == target, at_target, g), mask=at < stride)


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask).to(tl.float32)
    tl.store(y_ptr + at, x * tl.load(scale_ptr), mask=mask)


# ---- launch: shapes, allocation, grid; torch.ops.cria.* -------------------------------------------------------------


def most_rows(vocab: int, itemsize: int, want_dw: bool) -> int:
    """Return the most rows of a chunk, whose logits take so many bytes each. want_dw: whether dW is computed."""
    n_bytes = LOGITS_BYTES if want_dw else FEWER_LOGITS_BYTES
    return max(1, n_bytes // (_round_up(vocab, PAD) * itemsize) // ROWS) * ROWS


def chunk_rows(n_rows: int, vocab: int, itemsize: int, want_dw: bool) -> int:
    """Return the rows of a chunk: as few chunks as most_rows allows, all of about one size."""
    n_chunks = max(1, -(-n_rows // most_rows(vocab, itemsize, want_dw)))
    return max(ROWS, _round_up(-(-n_rows // n_chunks), ROWS))


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _gradients_fake(x, weight, want_dx, want_dw, into=None):
    want_dw = want_dw and into is None
    # The GEMM of a single chunk rounds dW, but not to fp16, which dW may exceed before the upstream gradient scales it.
    once = len(x) <= chunk_rows(len(x), len(weight), x.element_size(), True) and weight.dtype != torch.float16
    dx = x.new_empty(x.shape if want_dx else 0)
    return dx, weight.new_empty(weight.shape if want_dw else 0, dtype=weight.dtype if once else torch.float32)


def _forward_fake(x, weight, targets, weights, ignore_index, z_loss, label_smoothing, want_dx, want_dw, into, beta):
    return x.new_empty((), dtype=torch.float32), *_gradients_fake(x, weight, want_dx, want_dw, into)


def _forward_cpu(x, weight, targets, weights, ignore_index, z_loss, label_smoothing, want_dx, want_dw, into, beta):
    logits, settings = F.linear(x, weight), (ignore_index, z_loss, label_smoothing)
    losses, lse = _losses_ref(logits, targets, *settings)
    row_weights = torch.ones_like(losses) if weights is None else weights.type_as(losses)
    dx, dw = _gradients_fake(x, weight, want_dx, want_dw, into)
    if want_dx or want_dw:
        dlogits = _dlogits_ref(row_weights, logits, targets, lse, *settings)
    if want_dx:
        torch.mm(dlogits, weight, out=dx)
    if want_dw:
        add_product(dw if into is None else into, dlogits.T, x, beta=beta if into is not None else 0)
    return (losses * row_weights).sum().float(), dx, dw


def _forward_native(x, weight, targets, weights, ignore_index, *others):
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))
    if wrong.any():  # as F.cross_entropy
        raise IndexError(f"Target {targets[wrong][0].item()} is out of bounds.")
    return _forward_in_chunks(native.cross_entropy, x, weight, targets, weights, ignore_index, *others)


@operator(
    "linear_cross_entropy_forward", mutates=("into",), cpu=_forward_cpu, fake=_forward_fake, native=_forward_native
)
def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    want_dx: bool,
    want_dw: bool,
    into: torch.Tensor | None,
    beta: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the loss, and the gradients that are wanted. x: (L, D). weight: (V, D). All tensors are contiguous.

    targets, weights: (L,) int64 and fp32. Returns the loss, dx (L, D) and dw (V, D); an unwanted gradient has shape
    (0,). dw is in fp32, except after a single chunk of bf16. If into (V, D) is given: into = beta * into + dw.
    """
    return _forward_in_chunks(
        _launch_rows, x, weight, targets, weights, ignore_index, z_loss, label_smoothing, want_dx, want_dw, into, beta
    )


def _launch_rows(logits, targets, weights, losses, ignore_index, gradient, z_loss, smoothing):
    """Write each row's loss, and over the logits their gradient."""
    config = launch_config("linear_cross_entropy", "rows", logits.device, logits.shape[1])
    _rows_kernel[(len(logits),)](
        logits, targets, weights, losses, logits.shape[1], logits.stride(0), ignore_index, z_loss, smoothing,
        SMOOTH=smoothing != 0, GRADIENT=gradient, PADDED=logits.stride(0) != logits.shape[1],
        VECTOR=16 // logits.element_size(), enable_fp_fusion=True, **config,
    )  # fmt: skip


def _forward_in_chunks(
    take_losses, x, weight, targets, weights, ignore_index, z_loss, label_smoothing, want_dx, want_dw, into, beta
):
    """Compute forward() with take_losses, _launch_rows() or a function like it, between the GEMMs of each chunk."""
    (n_rows, _), vocab, stride = x.shape, len(weight), _round_up(len(weight), PAD)
    dx, dw = _gradients_fake(x, weight, want_dx, want_dw, into)
    total = dw if into is None else into
    if want_dw and not n_rows and not beta:
        total.zero_()
    losses = x.new_empty(n_rows, dtype=torch.float32)
    rows = chunk_rows(n_rows, vocab, x.element_size(), want_dw)
    buffer = x.new_empty(min(rows, n_rows), stride)
    for start in range(0, n_rows, rows):
        chunk = slice(start, start + rows)
        x_chunk = x[chunk]
        logits = buffer[: len(x_chunk), :vocab]
        torch.mm(x_chunk, weight.T, out=logits)
        take_losses(
            logits, targets[chunk], None if weights is None else weights[chunk], losses[chunk], ignore_index,
            want_dx or want_dw, z_loss, label_smoothing,
        )  # fmt: skip
        if want_dx:  # the kernel has written the gradient over the logits
            if logits.device.type == "cpu":
                buffer[:, vocab:] = 0  # with AMX, oneDNN 3.12 multiplies the padding by 0, and NaN * 0 is NaN
            torch.mm(logits, weight, out=dx[chunk])
        if want_dw:
            set_weight_gradient(total, logits, x_chunk, beta=1 if start else beta if into is not None else 0)
    return losses.sum(), dx, dw


def _scaled_fake(x, scale, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@operator("scaled", cpu=lambda x, scale, dtype: (widen(x) * scale).to(dtype), fake=_scaled_fake)
def scaled(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * scale, rounded once, in a new tensor. x: contiguous. scale: a scalar in fp32, read on the device."""
    y = _scaled_fake(x, scale, dtype)
    config = launch_config("linear_cross_entropy", "scale", x.device)
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), config["BLOCK"]),)](
            x, scale, y, x.numel(), enable_fp_fusion=True, **config
        )
    return y


# ---- autograd -------------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, *arguments):
        *settings, want_dx, want_dw, accumulate = arguments
        into, beta = None, 0
        if accumulate and want_dw:
            accumulator("linear_cross_entropy", weight, True)  # raises unless weight is a leaf
            beta = 0 if weight.grad is None else 1
            weight.grad = into = torch.empty_like(weight) if weight.grad is None else weight.grad
        loss, dx, dw = forward(x, weight, *settings, want_dx, want_dw, into, beta)
        ctx.save_for_backward(dx, dw)
        ctx.dtypes, ctx.wanted = (x.dtype, weight.dtype), (want_dx, want_dw and into is None)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        # New tensors, because a second backward needs the saved ones too.
        made = zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
        return *(scaled(g, dloss, dtype) if wanted else None for g, wanted, dtype in made), *(None,) * 8


# ---- public ---------------------------------------------------------------------------------------------------------


def _check(x, weight, targets, weights, label_smoothing):
    op = "linear_cross_entropy"
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}; "
            f"wanted (L, D), (V, D), (L,)"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype}, x is {x.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets are {targets.dtype}, wanted torch.int64; pass targets.long()")
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"{op}: weights {tuple(weights.shape)}, targets {tuple(targets.shape)}")
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{op}: weights get no gradient; pass weights.detach()")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, wanted 0 to 1")


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    impl: str = "auto",
    accumulate: bool = False,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """sum_t weight_t [(1 - s) nll_t + s mean(-log p_t) + z lse_t^2], the cross entropy of the logits x @ weight.T.

    x: (L, D). weight: (V, D), in x's dtype and on its device. targets: (L,) int64 in [0, V), or ignore_index for a row
    without loss and gradient. weights: (L,) fp32, or None for ones; they get no gradient. z_loss: z. label_smoothing:
    s, 0 to 1. impl: see kernels.ops.common.choose_impl. Returns a scalar in fp32 (fp64 for fp64 inputs), which is 0 if
    no row has a loss.
    accumulate: forward adds dW to weight.grad in its dtype, and keeps none for backward. The loss must then be
    differentiated once, with an upstream gradient of 1; put any other factor into weights. The reference leaves the
    addition to autograd.
    A target that is no id makes loss and gradients NaN in the kernels, which never wait for the device to check it; on
    a CPU it raises what F.cross_entropy raises. An upstream gradient that is not a power of two rounds dx a second
    time (and dW after a single chunk): put a 1 / N that is known beforehand into weights.
    Raises ValueError if the shapes or dtypes do not fit.
    """
    _check(x, weight, targets, weights, label_smoothing)
    if choose_impl("linear_cross_entropy", impl, x, has_native=True) == "ref":
        return linear_cross_entropy_ref(x, weight, targets, weights, ignore_index, z_loss, label_smoothing)
    weights = weights if weights is None else weights.float().contiguous()
    settings = targets.contiguous(), weights, ignore_index, float(z_loss), float(label_smoothing)
    wanted = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    return _LinearCrossEntropy.apply(x, weight, *settings, *wanted, accumulate)

"""Rotary position embedding of queries and keys.

    (a, b) -> (a cos - b sin, b cos + a sin)      a = x[..., :Dh/2], b = x[..., Dh/2:], angle = position * frequency

The two halves of a head are rotated against each other, as Hugging Face lays heads out. Meta pairs neighbours, and its
weights are permuted when they are read. Angles, sines and products are fp32: bf16 cannot represent every position above
256.

Bound by memory: one launch reads q and k once and writes them once, 4 (H + K) Dh bytes a token in bf16, in place or
not. The tables come from HBM once a token (4 Dh bytes) and from L2 once for every 16 heads. Backward is the
rotation by the opposite angle. Saved for backward: the tables.
Source: arXiv:2104.09864; llama3 scaling as meta-llama/llama-models llama3/model.py apply_scaling.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.native import training as native
from kernels.ops.common import choose_impl, launch_config, next_power_of_2, operator, widen


def rope_frequencies(head_dim: int, theta: float, scaling: Any = None) -> torch.Tensor:
    """theta^(-2i/Dh), the radians a position of each of the Dh/2 pairs, slowed by llama3 scaling. (Dh/2,) fp32.

    scaling: an object with factor, low_freq_factor, high_freq_factor and original_max_seq_len (tokens), or None.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs  # tokens a turn
    turns = scaling.original_max_seq_len / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)  # 0 for slow pairs, which are divided by the factor; 1 for fast pairs, which are kept
    return (1 - blend) * freqs / scaling.factor + blend * freqs


def rope_cos_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of position * frequency, each (T, Dh/2) fp32. positions: (T,) integers."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def _rotate_ref(x, cos, sin):
    a, b = widen(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, Dh/2): every head uses a token's angles
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def rope_ref(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q (T, H, Dh) and k (T, K, Dh) in plain torch, into new tensors."""
    return _rotate_ref(q, cos, sin), _rotate_ref(k, cos, sin)


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_angles(ptr, first, n_tokens, ROWS: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr):
    """Return ROWS rows of an fp32 table (n_tokens, HALF) from `first` on, as a tile (ROWS, COLS); zeros beyond it."""
    # One-dimensional, so that a thread loads 4 numbers at once: in the shape of a tile of 16-bit numbers it would load
    # 8 by two instructions, and each would use half of the sectors it asks for.
    i = tl.arange(0, ROWS * COLS)
    row, col = first + i // COLS, i % COLS
    values = tl.load(ptr + row.to(tl.int64) * HALF + col, mask=(row < n_tokens) & (col < HALF), other=0.0)
    return tl.reshape(values, (ROWS, COLS))


@triton.jit(do_not_specialize=["n_tokens"])  # it changes from micro-batch to micro-batch
def _rotate_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, n_tokens, n_heads, n_kv_heads,
    q_row, q_head, k_row, k_head, q_out_row, q_out_head, k_out_row, k_out_head,
    INVERSE: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # A program rotates up to HEADS heads of TOKENS tokens by one load of their angles. The first along axis 1 take the
    # query heads, the others the key heads: the compiler keeps 16-byte accesses where a whole program chooses its
    # tensor. HALF is a constant so that 40, of heads of 80, is seen to be a multiple of 8.
    head = tl.program_id(1) * HEADS
    if head < n_heads:
        src_ptr, src_row, src_head = q_ptr, q_row, q_head
        dst_ptr, dst_row, dst_head = q_out_ptr, q_out_row, q_out_head
        heads = n_heads
    else:
        src_ptr, src_row, src_head = k_ptr, k_row, k_head
        dst_ptr, dst_row, dst_head = k_out_ptr, k_out_row, k_out_head
        heads = n_kv_heads
        head -= tl.cdiv(n_heads, HEADS) * HEADS
    first = tl.program_id(0) * TOKENS
    cos = load_angles(cos_ptr, first, n_tokens, TOKENS, HALF, COLS)
    sin = load_angles(sin_ptr, first, n_tokens, TOKENS, HALF, COLS)
    if INVERSE:
        sin = -sin
    token, cols = first + tl.arange(0, TOKENS), tl.arange(0, COLS)[None, :]
    mask = (token < n_tokens)[:, None] & (cols < HALF)
    token = token.to(tl.int64)  # token * src_row passes 2^31
    src = (src_ptr + token * src_row + head * src_head)[:, None] + cols
    dst = (dst_ptr + token * dst_row + head * dst_head)[:, None] + cols
    for _ in range(head, min(head + HEADS, heads)):
        a = tl.load(src, mask=mask).to(tl.float32)
        b = tl.load(src + HALF, mask=mask).to(tl.float32)
        tl.store(dst, a * cos - b * sin, mask=mask)
        tl.store(dst + HALF, b * cos + a * sin, mask=mask)
        src += src_head
        dst += dst_head


# ---- launch: shapes, allocation, grid; torch.ops.cria.* -------------------------------------------------------------


def _launch(q, k, q_out, k_out, cos, sin, inverse):
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    config = launch_config("rope", "rotate", q.device, head_dim // 2)
    grid = triton.cdiv(tokens, config["TOKENS"]), sum(triton.cdiv(n, config["HEADS"]) for n in (heads, kv_heads))
    if grid[0] * grid[1] * head_dim == 0:
        return
    _rotate_kernel[grid](
        q, k, q_out, k_out, cos, sin, tokens, heads, kv_heads,
        *q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
        INVERSE=inverse, HALF=head_dim // 2, COLS=next_power_of_2(head_dim // 2), **config,
    )  # fmt: skip


def _rotate_cpu(q, k, cos, sin, inverse):
    for x in (q, k):
        x.copy_(_rotate_ref(x, cos, -sin if inverse else sin))


def _rotate_native(q, k, cos, sin, inverse):
    native.rope(q, q, cos, sin, inverse)
    native.rope(k, k, cos, sin, inverse)


@operator(
    "rope_rotate", mutates=("q", "k"), cpu=_rotate_cpu, fake=lambda q, k, cos, sin, inverse: None,
    native=_rotate_native,
)  # fmt: skip
def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    """Rotate q (T, H, Dh) and k (T, K, Dh) in place, by the opposite angles if inverse.

    Both may be views with any strides, of one (T, H + 2K, Dh) for example, if their last axis is contiguous and they do
    not overlap. cos, sin: (T, Dh/2) fp32 contiguous.
    """
    _launch(q, k, q, k, cos, sin, inverse)


def unrotate(dq: torch.Tensor, dk: torch.Tensor, angles: Sequence[torch.Tensor]) -> None:
    """Rotate gradients of rotated q and k back, in place.

    angles: [] if nothing was rotated, [cos, sin] of the rows of both, or cos and sin of q's rows, then of k's.
    """
    if len(angles) == 2:
        rotate(dq, dk, *angles, True)
    elif angles:
        rotate(dq, dq[:, :0], *angles[:2], True)
        rotate(dk, dk[:, :0], *angles[2:], True)


def _rotated_cpu(q, k, cos, sin, inverse):
    return rope_ref(q, k, cos, -sin if inverse else sin)


def _rotated_fake(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotated_native(q, k, cos, sin, inverse):
    outs = _rotated_fake(q, k, cos, sin, inverse)
    for x, out in zip((q, k), outs, strict=True):
        native.rope(x, out, cos, sin, inverse)
    return outs


@operator("rope_rotated", cpu=_rotated_cpu, fake=_rotated_fake, native=_rotated_native)
def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k as rotate() does, into new contiguous tensors. q and k stay as they are, and may overlap."""
    q_out, k_out = _rotated_fake(q, k, cos, sin, inverse)
    _launch(q, k, q_out, k_out, cos, sin, inverse)
    return q_out, k_out


def take_angles(op: str, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin as rotate() takes them: contiguous. Raises ValueError unless both are fp32."""
    if not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(f"{op}: cos is {cos.dtype}, sin {sin.dtype}; wanted torch.float32, as rope_cos_sin makes them")
    return cos.contiguous(), sin.contiguous()


# ---- autograd -------------------------------------------------------------------------------------------------------


def _last_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotated(_last_contiguous(q), _last_contiguous(k), cos, sin, False)

    @staticmethod
    def backward(ctx, dq, dk):
        return *rotated(_last_contiguous(dq), _last_contiguous(dk), *ctx.saved_tensors, True), None, None


# ---- public ---------------------------------------------------------------------------------------------------------


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q (T, H, Dh) and k (T, K, Dh) by each token's angles. cos, sin: (T, Dh/2) fp32, which get no gradient.

    Returns both in new tensors. Inside another op, where autograd does not record, rotate() does it in place.
    Raises ValueError if the shapes or dtypes do not fit.
    """
    want = (q.shape[0], q.shape[-1] // 2)
    fits = q.ndim == k.ndim == 3 and q.shape[::2] == k.shape[::2] and q.shape[-1] % 2 == 0 and q.dtype == k.dtype
    if not fits or cos.shape != want or sin.shape != want:
        raise ValueError(
            f"rope: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, cos {tuple(cos.shape)}, sin "
            f"{tuple(sin.shape)}; wanted cos and sin {want}, Dh even, and k with q's T, Dh and dtype"
        )
    if choose_impl("rope", impl, q, has_native=True) == "ref":
        return rope_ref(q, k, cos, sin)
    return _Rope.apply(q, k, *take_angles("rope", cos, sin))

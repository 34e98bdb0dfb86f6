"""Causal attention over packed documents, with grouped queries and shared prefixes.

    o_i = sum_j softmax_j(q_i k_j / sqrt(Dh)) v_j        j over the document's prefix, then over its own rows up to i

T rows hold documents back to back. No document sees another, except that it may name earlier rows as its prefix. Rows
of no document (padding) come out as zeros, whatever they hold. Softmax is computed in fp32.

Bound by the matrix units for long documents, by masked tiles for short ones. Tiles of queries and of keys span
documents, under a mask of each row's range of keys (kernels.ops.attention_plan makes the lists). For Alpaca's lengths
(127 tokens a document in the mean, templates shared) 45% of the computed scores are used with tiles of 64 x 64, 35%
with 128 x 64 and 26% with 128 x 128: hence 64 x 64, and 64 x 32 (54%) for dk and dv. In a long document only the
diagonal is masked, and larger tiles would do.

Forward reads q, writes o, and reads k and v once for each tile of queries that sees them, mostly from L2. Saved for
backward: q, k, v, o and lse (fp32, 4 bytes a row and head). Backward runs one pass over tiles of queries for dq and
delta = rowsum(o do), and one over tiles of keys for dk and dv, which loops over the query heads of a group. No atomics
are used, so results are bit-equal from run to run. Keys that many documents read as their prefix get dk and dv in
several fp32 parts, which a last kernel sums in order. Where RoPE went before, dq and dk are rotated back in registers,
in fp32, before they are written.
Source: arXiv:2205.14135, arXiv:2307.08691; GQA as arXiv:2305.13245.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.native import training as native
from kernels.ops import attention_hopper
from kernels.ops.async_proxy import adds_orders, fence_shared, settle
from kernels.ops.attention_plan import AttentionPlan, QueryDocuments, attention_plan, check_documents
from kernels.ops.attention_ref import attention_ref, backward_cpu, forward_cpu
from kernels.ops.common import choose_impl, launch_config, next_power_of_2, operator
from kernels.ops.rope import load_angles, rope_ref, rotate, take_angles, unrotate

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _load(
    ptr, stride: tl.constexpr, n, dim: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Return a tile (ROWS, BLOCK_D) of n rows, or all if WHOLE, and dim columns; the rest is zero."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = ptr + rows[:, None] * stride + cols[None, :]
    if WHOLE and dim == BLOCK_D:
        return tl.load(at)
    if WHOLE:
        return tl.load(at, mask=(cols < dim)[None, :], other=0.0)
    if dim == BLOCK_D:
        return tl.load(at, mask=(rows < n)[:, None], other=0.0)
    return tl.load(at, mask=(rows < n)[:, None] & (cols < dim)[None, :], other=0.0)


@triton.jit
def _store(
    ptr, stride: tl.constexpr, row, n_rows, dim: tl.constexpr, tile, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store a tile (ROWS, BLOCK_D) in rows from `row` on, up to n_rows, and dim columns."""
    # The address starts from the row's number, so that no part of it is an expression that loading a tile has too: the
    # compiler would compute that once, before the loop, and keep it in 2 to 9 registers too many.
    rows, cols = row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] if dim == BLOCK_D else (rows < n_rows)[:, None] & (cols < dim)[None, :]
    tl.store(ptr + (rows.to(tl.int64) * stride)[:, None] + cols[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_gradient(
    ptr, stride: tl.constexpr, row, n_rows, dim: tl.constexpr, tile, cos_ptr, sin_ptr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Store dq or dk as _store does; turned back by the rows' angles if ROTATED."""
    if ROTATED:
        HALF: tl.constexpr = BLOCK_D // 2
        a, b = tl.split(tl.trans(tl.reshape(tile, (ROWS, 2, HALF)), 0, 2, 1))
        cos = load_angles(cos_ptr, row, n_rows, ROWS, HALF, HALF)
        sin = load_angles(sin_ptr, row, n_rows, ROWS, HALF, HALF)
        tile = tl.join(a * cos + b * sin, b * cos - a * sin)
        tile = tl.reshape(tl.trans(tile, 0, 2, 1), (ROWS, BLOCK_D))
    _store(ptr, stride, row, n_rows, dim, tile, ROWS, BLOCK_D)


@triton.jit
def _visible(keys, lo, hi):
    """Return lo <= keys < hi, as one comparison of unsigned numbers; lo > hi is an empty range."""
    return (keys - lo).to(tl.uint32) < tl.maximum(hi - lo, 0).to(tl.uint32)


@triton.jit
def _limits(ptr, rows, n):
    """Return the keys that query rows see: first own, last own + 1, prefix start, prefix end; none past n."""
    mask = rows < n
    first, last = tl.load(ptr + rows, mask=mask, other=0), tl.load(ptr + n + rows, mask=mask, other=0)
    prefix, prefix_end = (ptr + 2 * n + rows, ptr + 3 * n + rows)
    return first, last, tl.load(prefix, mask=mask, other=0), tl.load(prefix_end, mask=mask, other=0)


@triton.jit
def _listed_visible(code, end, limits, BLOCK_N: tl.constexpr):
    """Return which keys of a listed block each row sees."""
    lo, hi = tl.where(code % 2 == 1, limits[2], limits[0]), tl.where(code % 2 == 1, limits[3], limits[1])
    return _visible((code >> 1) + tl.arange(0, BLOCK_N)[None, :], lo[:, None], tl.minimum(hi, end)[:, None])


@triton.jit
def _narrow(x, dtype: tl.constexpr, ORDERS: tl.constexpr):
    """Return x in dtype, as a left operand of tl.dot."""
    return settle(x.to(dtype)) if ORDERS else x.to(dtype)


@triton.jit
def _softmax_step(q, k, v, o, top, total, scale, visible, MASKED: tl.constexpr, ORDERS: tl.constexpr):
    """Add one block of keys to the running softmax: o, and each row's largest score and sum of exponentials."""
    if ORDERS:
        fence_shared()
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * scale - (new * scale)[:, None])
    shrink = tl.exp2((top - new) * scale)
    total = total * shrink + tl.sum(p, 1)
    o = tl.dot(_narrow(p, v.dtype, ORDERS), v, o * shrink[:, None], input_precision="ieee")
    return o, new, total


# Shapes and strides are constants of a model, so they are constexprs: a row's address is then an offset in the
# instruction instead of a register, which keeps these kernels from spilling. strides: (row, head) of each tensor.
@triton.jit(do_not_specialize=["n_queries"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, limits_ptr, items_ptr, blocks_ptr, n_queries, scale,
    strides: tl.constexpr, group: tl.constexpr, dim: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    head, item = tl.program_id(0).to(tl.int64), items_ptr + tl.program_id(1) * 7
    row0 = tl.load(item) * BLOCK_M
    row64, n, lo, hi = row0.to(tl.int64), n_queries - row0, tl.load(item + 1), tl.load(item + 2)
    q = _load(q_ptr + row64 * strides[0] + head * strides[1], strides[0], n, dim, BLOCK_M, BLOCK_D, False)
    rows = row0 + tl.arange(0, BLOCK_M)
    limits = _limits(limits_ptr, rows, n_queries)
    k_ptr += head // group * strides[3]
    v_ptr += head // group * strides[5]
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -1e38, tl.float32)  # under every score; finite, so that a row that sees nothing is not NaN
    code, end = tl.load(blocks_ptr + 2 * lo), tl.load(blocks_ptr + 2 * lo + 1)
    for i in range(lo, hi):
        start = (code >> 1).to(tl.int64)
        k = _load(k_ptr + start * strides[2], strides[2], end - start, dim, BLOCK_N, BLOCK_D, False)
        v = _load(v_ptr + start * strides[4], strides[4], end - start, dim, BLOCK_N, BLOCK_D, False)
        visible = _listed_visible(code, end, limits, BLOCK_N)
        o, top, total = _softmax_step(q, k, v, o, top, total, scale, visible, True, ORDERS)
        code, end = tl.load(blocks_ptr + 2 * i + 2), tl.load(blocks_ptr + 2 * i + 3)  # ahead of the loads that use it
    prefix0, n_prefix, own0, n_own = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    for i in range(n_prefix + n_own):
        start = tl.where(i < n_prefix, prefix0 + i * BLOCK_N, own0 + (i - n_prefix) * BLOCK_N).to(tl.int64)
        k = _load(k_ptr + start * strides[2], strides[2], BLOCK_N, dim, BLOCK_N, BLOCK_D, True)
        v = _load(v_ptr + start * strides[4], strides[4], BLOCK_N, dim, BLOCK_N, BLOCK_D, True)
        o, top, total = _softmax_step(q, k, v, o, top, total, scale, None, False, ORDERS)
    sees = total != 0  # a NaN too
    o = tl.where(sees[:, None], o / tl.where(sees, total, 1.0)[:, None], 0.0)
    _store(o_ptr + head * strides[7], strides[6], row0, n_queries, dim, o, BLOCK_M, BLOCK_D)
    lse = tl.where(sees, top * scale + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
    tl.store(lse_ptr + head * n_queries + rows, lse, mask=rows < n_queries)


@triton.jit
def _dq_step(q, k, v, do, dq, lse, delta, scale, visible, MASKED: tl.constexpr, ORDERS: tl.constexpr):
    if ORDERS:
        fence_shared()
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    return tl.dot(_narrow(ds, k.dtype, ORDERS), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["n_queries"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, limits_ptr, items_ptr, blocks_ptr,
    n_queries, scale, softmax_scale, strides: tl.constexpr, group: tl.constexpr,
    dim: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ORDERS: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    head, item = tl.program_id(0).to(tl.int64), items_ptr + tl.program_id(1) * 7
    row0 = tl.load(item) * BLOCK_M
    row64, n, lo, hi = row0.to(tl.int64), n_queries - row0, tl.load(item + 1), tl.load(item + 2)
    rows = row0 + tl.arange(0, BLOCK_M)
    o = _load(o_ptr + row64 * strides[6] + head * strides[7], strides[6], n, dim, BLOCK_M, BLOCK_D, False)
    do = _load(do_ptr + row64 * strides[8] + head * strides[9], strides[8], n, dim, BLOCK_M, BLOCK_D, False)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * n_queries + rows, delta, mask=rows < n_queries)
    q = _load(q_ptr + row64 * strides[0] + head * strides[1], strides[0], n, dim, BLOCK_M, BLOCK_D, False)
    lse = tl.load(lse_ptr + head * n_queries + rows, mask=rows < n_queries, other=0.0)
    limits = _limits(limits_ptr, rows, n_queries)
    k_ptr += head // group * strides[3]
    v_ptr += head // group * strides[5]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    code, end = tl.load(blocks_ptr + 2 * lo), tl.load(blocks_ptr + 2 * lo + 1)
    for i in range(lo, hi):
        start = (code >> 1).to(tl.int64)
        k = _load(k_ptr + start * strides[2], strides[2], end - start, dim, BLOCK_N, BLOCK_D, False)
        v = _load(v_ptr + start * strides[4], strides[4], end - start, dim, BLOCK_N, BLOCK_D, False)
        visible = _listed_visible(code, end, limits, BLOCK_N)
        dq = _dq_step(q, k, v, do, dq, lse, delta, scale, visible, True, ORDERS)
        code, end = tl.load(blocks_ptr + 2 * i + 2), tl.load(blocks_ptr + 2 * i + 3)
    prefix0, n_prefix, own0, n_own = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    for i in range(n_prefix + n_own):
        start = tl.where(i < n_prefix, prefix0 + i * BLOCK_N, own0 + (i - n_prefix) * BLOCK_N).to(tl.int64)
        k = _load(k_ptr + start * strides[2], strides[2], BLOCK_N, dim, BLOCK_N, BLOCK_D, True)
        v = _load(v_ptr + start * strides[4], strides[4], BLOCK_N, dim, BLOCK_N, BLOCK_D, True)
        dq = _dq_step(q, k, v, do, dq, lse, delta, scale, None, False, ORDERS)
    dq *= softmax_scale
    row0 = tl.load(item, volatile=True) * BLOCK_M  # again, for the registers of the loops, see _dkdv_kernel
    dq_ptr += head * strides[11]
    _store_gradient(dq_ptr, strides[10], row0, n_queries, dim, dq, cos_ptr, sin_ptr, BLOCK_M, BLOCK_D, ROTATED)


@triton.jit
def _block(blocks_ptr, lo, i, listed, full, SIZE: tl.constexpr):
    """Return (code, end) of block i of a tile of keys: listed blocks, then full ones from query `full` on."""
    at = blocks_ptr + 2 * (lo + tl.minimum(i, listed))  # never beyond the list's last row, which is padding
    start = full + (i - listed) * SIZE
    return tl.where(i < listed, tl.load(at), start * 2), tl.where(i < listed, tl.load(at + 1), start + SIZE)


@triton.jit(do_not_specialize=["n_queries", "n_rows"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, work_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, limits_ptr, seen_ptr,
    items_ptr, blocks_ptr, n_queries, n_rows, scale, softmax_scale,
    strides: tl.constexpr, n_kv_heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ORDERS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    kv_head, item = tl.program_id(0).to(tl.int64), items_ptr + tl.program_id(1) * 6
    row0 = tl.load(item) * BLOCK_N
    row64, n = row0.to(tl.int64), n_rows - row0
    k = _load(k_ptr + row64 * strides[2] + kv_head * strides[3], strides[2], n, dim, BLOCK_N, BLOCK_D, False)
    v = _load(v_ptr + row64 * strides[4] + kv_head * strides[5], strides[4], n, dim, BLOCK_N, BLOCK_D, False)
    keys, block = row0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    seen = tl.load(seen_ptr + keys, mask=keys < n_rows, other=0) != 0
    v = tl.where(seen[:, None], v, 0.0)  # padding's NaN would pass p = 0 by way of dp
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lo, listed = tl.load(item + 1), tl.load(item + 2) - tl.load(item + 1)
    full, n_blocks = tl.load(item + 3), listed + tl.load(item + 4)
    code, end = _block(blocks_ptr, lo, 0, listed, full, BLOCK_M)
    # One loop over heads and blocks, listed or full: two would spill. Scores lie as (keys, queries), so that p and ds
    # are left operands. A number of each query takes BLOCK_M / 4 registers, so it is loaded where it is used.
    for i in range(n_blocks * group):
        start, head = (code >> 1).to(tl.int64), kv_head * group + i // n_blocks
        m = end - start
        mask = block < m
        q = _load(q_ptr + start * strides[0] + head * strides[1], strides[0], m, dim, BLOCK_M, BLOCK_D, False)
        do = _load(do_ptr + start * strides[6] + head * strides[7], strides[6], m, dim, BLOCK_M, BLOCK_D, False)
        if ORDERS:
            fence_shared()
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        lse = tl.load(lse_ptr + head * n_queries + start + block, mask=mask, other=0.0)
        p = tl.exp2(s * scale - lse[None, :])
        limits = limits_ptr + code % 2 * 2 * n_queries + start + block  # own keys, or the prefix
        from_key, to_key = tl.load(limits, mask=mask, other=0), tl.load(limits + n_queries, mask=mask, other=0)
        p = tl.where(_visible(keys[:, None], from_key[None, :], to_key[None, :]), p, 0.0)
        if DV:
            dv = tl.dot(_narrow(p, do.dtype, ORDERS), do, dv, input_precision="ieee")
        if DK:
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            delta = tl.load(delta_ptr + head * n_queries + start + block, mask=mask, other=0.0)
            dk = tl.dot(_narrow(p * (dp - delta[None, :]), q.dtype, ORDERS), q, dk, input_precision="ieee")
        code, end = _block(blocks_ptr, lo, (i + 1) % n_blocks, listed, full, BLOCK_M)  # ahead of the loads that use it
    # Loaded here, row0 once more, as the loop lacks registers. What a load that is not volatile gave would be kept.
    row0, slot = tl.load(item, volatile=True) * BLOCK_N, tl.load(item + 5, volatile=True)
    part = (slot * n_kv_heads + kv_head) * (2 * BLOCK_N)  # its first row in work; int64, as kv_head is
    if DV:
        if slot < 0:
            _store(dv_ptr + kv_head * strides[11], strides[10], row0, n_rows, dim, dv, BLOCK_N, BLOCK_D)
        else:
            _store(work_ptr, BLOCK_D, part + BLOCK_N, part + 2 * BLOCK_N, BLOCK_D, dv, BLOCK_N, BLOCK_D)
    if DK:
        dk *= softmax_scale
        if slot < 0:
            dk_ptr += kv_head * strides[9]
            _store_gradient(dk_ptr, strides[8], row0, n_rows, dim, dk, cos_ptr, sin_ptr, BLOCK_N, BLOCK_D, ROTATED)
        else:
            _store(work_ptr, BLOCK_D, part, part + BLOCK_N, BLOCK_D, dk, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["n_rows"])
def _sum_kernel(
    work_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, splits_ptr, n_rows, strides: tl.constexpr, n_kv_heads: tl.constexpr,
    dim: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Sum the parts of dk (axis 2 of the grid even) or dv (odd) in order, for ROWS rows of a tile in parts."""
    split, kv_head, which = splits_ptr + tl.program_id(0) * 3, tl.program_id(1).to(tl.int64), tl.program_id(2)
    tile, first, n = tl.load(split), tl.load(split + 1).to(tl.int64), tl.load(split + 2)
    which, row = which % 2, which // 2 * ROWS
    part = work_ptr + ((first * n_kv_heads + kv_head) * 2 + which) * (BLOCK_N * BLOCK_D) + row * BLOCK_D
    total = tl.zeros([ROWS * BLOCK_D], tl.float32)  # one-dimensional for whole sectors, see load_angles
    for _ in range(n):
        total += tl.load(part + tl.arange(0, ROWS * BLOCK_D))
        part += n_kv_heads * (2 * BLOCK_N * BLOCK_D)
    total = tl.reshape(total, (ROWS, BLOCK_D))
    row += tile * BLOCK_N
    if which == 0:
        dk_ptr += kv_head * strides[1]
        _store_gradient(dk_ptr, strides[0], row, n_rows, dim, total, cos_ptr, sin_ptr, ROWS, BLOCK_D, ROTATED)
    else:
        _store(dv_ptr + kv_head * strides[3], strides[2], row, n_rows, dim, total, ROWS, BLOCK_D)


# ---- launch: shapes, allocation, grid; torch.ops.cria.* -------------------------------------------------------------


def _config(kernel, x):
    """Return the constexprs and options of a launch on heads as wide as x's last axis."""
    block = max(16, next_power_of_2(x.shape[-1]))
    config = launch_config("attention", kernel, x.device, block)
    if x.dtype == torch.float32:  # no matrix unit multiplies it exactly, and its tiles take twice the shared memory
        config |= {"num_stages": 1}
    if kernel != "sum":
        config["ORDERS"] = x.dtype != torch.float32 and adds_orders("attention", x.device)
    return config | {"BLOCK_D": block}


def _scales(q):
    return LOG2_E / math.sqrt(q.shape[-1]), 1 / math.sqrt(q.shape[-1])


def _strides(*tensors):
    return tuple(stride for t in tensors for stride in t.stride()[:2])


def _forward_fake(q, k, v, limits, query_items, query_blocks):
    n_queries, n_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(n_heads, n_queries, dtype=torch.float32)


def _forward_native(q, k, v, limits, query_items, query_blocks):
    return native.attention_forward(q, k, v, limits)


@operator("attention_forward", cpu=forward_cpu, fake=_forward_fake, native=_forward_native)
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    limits: torch.Tensor,
    query_items: torch.Tensor,
    query_blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o (Q, H, Dh) and lse (H, Q) fp32, to the base 2. q: (Q, H, Dh). k, v: (T, K, Dh), rows contiguous."""
    n_queries, n_heads, head_dim = q.shape
    o, lse = _forward_fake(q, k, v, limits, query_items, query_blocks)
    if o.numel():
        _forward_kernel[n_heads, len(query_items)](
            q, k, v, o, lse, limits, query_items, query_blocks, n_queries, _scales(q)[0], _strides(q, k, v, o),
            n_heads // k.shape[1], head_dim, **_config("forward", q),
        )  # fmt: skip
    return o, lse


def _backward_fake(*_):
    return None


def _backward_native(q, k, v, o, lse, do, dq, dk, dv, limits, *plan_and_angles):
    native.attention_backward(q, k, v, o, lse, do, (dq, dk, dv), limits)
    unrotate(dq, dk, plan_and_angles[-1])


@operator(
    "attention_backward", mutates=("dq", "dk", "dv"), cpu=backward_cpu, fake=_backward_fake, native=_backward_native
)
def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    limits: torch.Tensor,
    query_items: torch.Tensor,
    query_blocks: torch.Tensor,
    seen: torch.Tensor,
    key_items: torch.Tensor,
    key_blocks: torch.Tensor,
    splits: torch.Tensor,
    n_slots: int,
    angles: Sequence[torch.Tensor],
) -> None:
    """Write dq (Q, H, Dh), dk and dv (T, K, Dh). All tensors may be views with contiguous last axes.

    angles: by which q and k were rotated, see unrotate(); dq and dk are then the gradients of what was rotated.
    """
    (n_queries, n_heads, head_dim), (n_rows, n_kv_heads, _) = q.shape, k.shape
    scales, group, delta = _scales(q), n_heads // n_kv_heads, torch.empty_like(lse)
    # A tile is cut into halves only where they are all of it; else rotating back is a launch of its own.
    rotated = bool(angles) and head_dim == _config("dq", q)["BLOCK_D"]
    q_angles, k_angles = (angles[:2], angles[-2:]) if rotated else ((None, None), (None, None))
    if dq.numel():
        _dq_kernel[n_heads, len(query_items)](
            q, k, v, o, do, dq, *q_angles, lse, delta, limits, query_items, query_blocks, n_queries, *scales,
            _strides(q, k, v, o, do, dq), group, head_dim, ROTATED=rotated, **_config("dq", q),
        )  # fmt: skip
    if not dk.numel():
        return
    config, sum_config = _config("dkdv", q), _config("sum", q)
    config.pop("part")  # for the plan, not for the kernel
    passes = [(True, True)] if config.pop("passes") == 1 else [(True, False), (False, True)]  # dk and dv, or in turn
    block_n, block_d = config["BLOCK_N"], config["BLOCK_D"]
    work = q.new_empty(n_slots, n_kv_heads, 2, block_n, block_d, dtype=torch.float32)
    for dk_too, dv_too in passes:
        _dkdv_kernel[n_kv_heads, len(key_items)](
            q, k, v, do, dk, dv, work, *k_angles, lse, delta, limits, seen, key_items, key_blocks, n_queries, n_rows,
            *scales, _strides(q, k, v, do, dk, dv), n_kv_heads, group, head_dim, DK=dk_too, DV=dv_too, ROTATED=rotated,
            **config,
        )  # fmt: skip
    if n_slots:
        _sum_kernel[(len(splits), n_kv_heads, 2 * block_n // sum_config["ROWS"])](
            work, dk, dv, *k_angles, splits, n_rows, _strides(dk, dv), n_kv_heads, head_dim, BLOCK_N=block_n,
            ROTATED=rotated, **sum_config,
        )  # fmt: skip
    if not rotated:
        unrotate(dq, dk, angles)


# ---- autograd -------------------------------------------------------------------------------------------------------


def _forward(q, k, v, hopper, limits, query_items, query_blocks):
    """Return o and lse, by csrc/cuda where a plan's lists for it are given, else by the operator."""
    if hopper is None:
        return forward(q, k, v, limits, query_items, query_blocks)
    return attention_hopper.forward(q, k, v, limits, *hopper)


def _rows_contiguous(*tensors):
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, hopper, n_slots, *plan):
        q, k, v = _rows_contiguous(q, k, v)
        o, lse = _forward(q, k, v, hopper, *plan[:3])
        ctx.save_for_backward(q, k, v, o, lse, *plan)
        ctx.n_slots = n_slots
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, *plan = ctx.saved_tensors
        (do,) = _rows_contiguous(do)
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        backward(q, k, v, o, lse, do, dq, dk, dv, *plan, ctx.n_slots, [])
        return dq, dk, dv, None, None, *[None] * len(plan)


def _split(qkv, n_heads):
    n_kv_heads = (qkv.shape[1] - n_heads) // 2
    return qkv.split((n_heads, n_kv_heads, n_kv_heads), dim=1)


class _RopeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, n_heads, hopper, n_slots, *plan):
        q, k, v = _split(qkv, n_heads)
        rotate(q, k, cos, sin, False)
        o, lse = _forward(q, k, v, hopper, *plan[:3])
        # Detached, because autograd refuses a view of a function's output whose base was written to.
        ctx.save_for_backward(qkv.detach(), cos, sin, o, lse, *plan)
        ctx.n_heads, ctx.n_slots = n_heads, n_slots
        return o

    @staticmethod
    def backward(ctx, do):
        qkv, cos, sin, o, lse, *plan = ctx.saved_tensors
        (do,) = _rows_contiguous(do)
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = _split(dqkv, ctx.n_heads)
        backward(*_split(qkv, ctx.n_heads), o, lse, do, dq, dk, dv, *plan, ctx.n_slots, [cos, sin])
        return dqkv, None, None, None, None, None, *[None] * len(plan)


class _RopeAttentionRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, cos, sin, rows, hopper, n_slots, *plan):
        k, v = kv.chunk(2, dim=1)
        rotate(q, q[:, :0], cos[rows], sin[rows], False)
        rotate(k, k[:, :0], cos, sin, False)
        o, lse = _forward(q, k, v, hopper, *plan[:3])
        ctx.save_for_backward(q.detach(), kv.detach(), cos, sin, rows, o, lse, *plan)
        ctx.n_slots = n_slots
        return o

    @staticmethod
    def backward(ctx, do):
        q, kv, cos, sin, rows, o, lse, *plan = ctx.saved_tensors
        (do,) = _rows_contiguous(do)
        dq, dkv = torch.empty_like(q), torch.empty_like(kv)
        (k, v), (dk, dv) = kv.chunk(2, dim=1), dkv.chunk(2, dim=1)
        angles = [cos[rows], sin[rows], cos, sin]
        backward(q, k, v, o, lse, do, dq, dk, dv, *plan, ctx.n_slots, angles)
        return dq, dkv, None, None, None, None, None, *[None] * len(plan)


# ---- public ---------------------------------------------------------------------------------------------------------


def _resolve_plan(q, k, v, documents, impl) -> tuple[AttentionPlan | None, Any]:
    """Return (plan, None) for the kernels, or (None, (documents, query_rows)) for the reference."""
    if impl == "cuda":
        attention_hopper.check_tensors(q, k, v)
        if isinstance(documents, AttentionPlan) and documents.hopper is None:
            raise ValueError(
                "attention: this plan is not for impl='cuda', wanted one of attention_plan(..., impl='cuda')"
            )
    chosen = impl if impl == "cuda" else choose_impl("attention", impl, q, has_native=True)
    if chosen == "ref":
        if isinstance(documents, AttentionPlan):
            raise ValueError("attention: this plan is for the kernels, wanted one of attention_plan(..., impl='ref')")
        documents, query_rows = documents if isinstance(documents, QueryDocuments) else (documents, None)
        check_documents(documents.cpu(), len(k))
        n_queries = len(k) if query_rows is None else len(query_rows)
    else:
        if not isinstance(documents, AttentionPlan):
            documents, query_rows = documents if isinstance(documents, QueryDocuments) else (documents, None)
            documents = attention_plan(documents, len(k), q.shape[-1], q.device, chosen, query_rows)
        if documents.head_dim != q.shape[-1] or documents.n_rows != len(k):
            raise ValueError(
                f"attention: the plan is for {documents.n_rows} rows of heads of {documents.head_dim}, "
                f"k is {tuple(k.shape)}; make one with attention_plan"
            )
        if chosen == "triton" and len(k) and not len(documents.seen):
            raise ValueError("attention: this plan is for impl='native', wanted one of attention_plan(...)")
        if chosen == "triton" and q.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(f"attention: Dh={q.shape[-1]} is over {MAX_HEAD_DIM}; pass impl='ref'")
        n_queries = documents.limits.shape[1]
    if len(q) != n_queries:
        raise ValueError(
            f"attention: q has {len(q)} rows, the plan is for {n_queries}; see query_rows of attention_plan"
        )
    if not isinstance(documents, AttentionPlan):
        return None, (documents, query_rows)
    if impl != "cuda" and documents.hopper is not None:
        documents = documents._replace(hopper=None)
    return documents, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | AttentionPlan | QueryDocuments,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v within each document, causal. q: (T, H, Dh). k, v: (T, K, Dh), H a multiple of K.

    All three may be views. Returns (T, H, Dh) in q's dtype.
    documents: (N, 4) integers, best on the CPU, or the result of attention_plan for them, which all layers can share. A
    row is one document: start, end, prefix start, prefix end; ends are exclusive, documents are in the order of their
    starts and do not overlap. A prefix is any range of rows before the start; a document without one has (0, 0). With a
    plan for query_rows (L,), q and the result hold only these rows: (L, H, Dh).
    Raises ValueError if the shapes or the documents do not fit.
    """
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and k.shape[2] == q.shape[2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted q (T, H, Dh) and "
            f"k, v (T, K, Dh), H a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; wanted one dtype")
    plan, described = _resolve_plan(q, k, v, documents, impl)
    if plan:
        return _Attention.apply(q, k, v, plan.hopper, plan.n_slots, *plan[:7])
    return attention_ref(q, k, v, *described)


def rope_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    documents: torch.Tensor | AttentionPlan,
    n_heads: int,
    impl: str = "auto",
) -> torch.Tensor:
    """attention(rope(q), rope(k), v), with all three in one tensor.

    qkv: (T, H + 2K, Dh) contiguous, heads of q, then of k, then of v. It is consumed: the kernels rotate q and k in
    place, so nothing else may use it, and no earlier operation may keep it for its backward (autograd raises then). Its
    gradient is one tensor, into which dq, dk and dv are written. cos, sin: (T, Dh/2) fp32. documents: as for
    attention(), without query_rows. Returns (T, H, Dh).
    Raises ValueError if the shapes or the documents do not fit.
    """
    n_kv_heads, odd = divmod(qkv.shape[1] - n_heads, 2) if qkv.ndim == 3 else (0, 0)
    if n_kv_heads < 1 or odd or n_heads % n_kv_heads or not qkv.is_contiguous():
        raise ValueError(
            f"rope_attention: qkv is {tuple(qkv.shape)} {'' if qkv.is_contiguous() else 'not '}contiguous with "
            f"{n_heads} heads of q, wanted (T, H + 2K, Dh) contiguous, H a multiple of K"
        )
    want = (qkv.shape[0], qkv.shape[2] // 2)
    if cos.shape != want or sin.shape != want or qkv.shape[2] % 2:
        raise ValueError(
            f"rope_attention: qkv {tuple(qkv.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            f"wanted cos and sin {want}, and an even Dh"
        )
    q, k, v = _split(qkv, n_heads)
    plan, described = _resolve_plan(q, k, v, documents, impl)
    if plan:
        cos, sin = take_angles("rope_attention", cos, sin)
        return _RopeAttention.apply(qkv, cos, sin, n_heads, plan.hopper, plan.n_slots, *plan[:7])
    return attention_ref(*rope_ref(q, k, cos, sin), v, *described)


def rope_attention_rows(
    q: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    documents: AttentionPlan | QueryDocuments,
    impl: str = "auto",
) -> torch.Tensor:
    """attention(rope(q), rope(k), v), with queries of some rows only.

    q: (U, H, Dh) of the rows `rows` (U,) int64, increasing. kv: (T, 2K, Dh), heads of k, then of v. Both are contiguous
    and consumed, as rope_attention consumes qkv. cos, sin: (T, Dh/2) fp32. documents: attention_plan(...,
    query_rows=rows). Returns (U, H, Dh). Raises ValueError if the shapes or the documents do not fit.
    """
    fits = q.ndim == kv.ndim == 3 and rows.shape == q.shape[:1] and kv.shape[1] % 2 == 0 and kv.shape[1] > 0
    fits = fits and q.shape[2] == kv.shape[2] and q.shape[1] % (kv.shape[1] // 2) == 0
    want = (len(kv), kv.shape[-1] // 2)
    if not fits or cos.shape != want or sin.shape != want or not q.is_contiguous() or not kv.is_contiguous():
        raise ValueError(
            f"rope_attention_rows: q {tuple(q.shape)}, kv {tuple(kv.shape)}, rows {tuple(rows.shape)}, cos "
            f"{tuple(cos.shape)}, sin {tuple(sin.shape)}; wanted contiguous (U, H, Dh), (T, 2K, Dh), (U,), (T, Dh/2)"
        )
    k, v = kv.chunk(2, dim=1)
    plan, described = _resolve_plan(q, k, v, documents, impl)
    if plan:
        cos, sin = take_angles("rope_attention_rows", cos, sin)
        return _RopeAttentionRows.apply(q, kv, cos, sin, rows, plan.hopper, plan.n_slots, *plan[:7])
    q, k = rope_ref(q, q[:, :0], cos[rows], sin[rows])[0], rope_ref(k, k[:, :0], cos, sin)[0]
    return attention_ref(q, k, v, *described)

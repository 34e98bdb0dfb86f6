"""AdamW's kernels: one tile of a tensor, and launches over one tensor or many.

Formula, states and masters: see kernels.ops.adamw, whose reference these kernels follow bit for bit, except for p's
square root and division.
"""

import triton
import triton.language as tl

from kernels.ops.common import COMPILED
from kernels.ops.eight_bit import decode, encode
from kernels.ops.tensor_table import find_tensor, move_pointer

# ---- numbers --------------------------------------------------------------------------------------------------------


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _random(key, group, STREAM: tl.constexpr):
    """Return 16 random bits for each element of the groups of eight, in order."""
    low, high = group.to(tl.int32), (group >> 32).to(tl.int32)
    stream = tl.full(low.shape, STREAM, tl.int32)
    r0, r1, r2, r3 = tl.philox(key, low, high, stream, stream * 0)
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32, bitcast=True)


@triton.jit
def _quiet_bits(x):
    """Return the bits of x with one quiet NaN for all NaNs: the upper half of others may be Inf's, or wrap to -0.

    x is the result of an addition, whose only NaN on a GPU is 0x7FFFFFFF, the greatest integer of all.
    """
    return tl.minimum(x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _upper(bits, extra):
    """Return the upper 16 bits of _quiet_bits plus extra, 0 to 65535. Inf and NaN stay: their lower 16 bits are 0."""
    return ((bits + extra) >> 16).to(tl.int16)


@triton.jit
def _nearest(x):
    """Return the bits of x in bf16, rounded to nearest even."""
    if COMPILED:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        bits = _quiet_bits(x)
        return _upper(bits, 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def _widen(x):
    """Return bf16, or its bits, as fp32. A shift and a mask for two numbers, where a conversion takes three."""
    if COMPILED:
        assembly: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(assembly, "=r,=r,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        return _float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _inverse(x):
    """Return 1 / x within a unit in the last place: one instruction, where a division takes nine."""
    if COMPILED:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


# ---- a tile ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load_fp32(ptr, at, mask, left, STRETCH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the elements `at` (BLOCK,) of an fp32 stream; 0 where mask is false, which is from `left` on at least.

    A thread holds STRETCH neighbours. Eight neighbours would be two loads, each of half of every sector. They are
    loaded four by four instead, and change threads within their warp.
    """
    if STRETCH == 8:
        half, block, place = tl.arange(0, 2), tl.arange(0, BLOCK // 256), tl.arange(0, 128)
        by_four = half[:, None, None] * 128 + block[None, :, None] * 256 + place[None, None, :]
        x = tl.load(ptr + by_four, mask=by_four < left, other=0.0)
        return tl.reshape(tl.permute(x, (1, 0, 2)), (BLOCK,))
    else:
        return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _read(ptr, absmax_ptr, map_ptr, at, mask, left, SIGNED: tl.constexpr, STRETCH: tl.constexpr, BLOCK: tl.constexpr):
    """Return a state in fp32."""
    if ptr.dtype.element_ty == tl.float32:
        return _load_fp32(ptr, at, mask, left, STRETCH, BLOCK)
    elif ptr.dtype.element_ty == tl.int16:
        return _widen(tl.load(ptr + at, mask=mask, other=0))
    else:
        code = tl.load(ptr + at, mask=mask, other=127 if SIGNED else 0)
        block = tl.arange(0, BLOCK // 256)
        absmax = tl.load(absmax_ptr + block, mask=block * 256 < left, other=0.0)
        return decode(code, absmax, map_ptr, SIGNED, BLOCK)


@triton.jit
def _write(x, ptr, absmax_ptr, cells_ptr, at, mask, left, key, group, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Store a state given in fp32."""
    if ptr.dtype.element_ty == tl.float32:
        tl.store(ptr + at, x, mask=mask)
    elif ptr.dtype.element_ty == tl.int16:
        random = _random(key, group, 1 if SIGNED else 2)
        tl.store(ptr + at, _upper(_quiet_bits(x), random), mask=mask)
    else:
        code, absmax = encode(x, cells_ptr, SIGNED, BLOCK)
        block = tl.arange(0, BLOCK // 256)
        tl.store(absmax_ptr + block, absmax, mask=block * 256 < left)
        tl.store(ptr + at, code, mask=mask)


@triton.jit
def _update_tile(
    param_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, low_ptr, master_ptr, map_ptr, cells_ptr, scale,
    decay, rate, rest1, beta2, rest2, eps, key, group, first, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update elements first to first + BLOCK of n, those that exist. group: that of the tile's first eight elements."""
    any_fp32: tl.constexpr = (
        param_ptr.dtype.element_ty == tl.float32 or grad_ptr.dtype.element_ty == tl.float32
        or m_ptr.dtype.element_ty == tl.float32 or master_ptr is not None
    )  # fmt: skip
    # Four neighbours a thread are 128 bits of fp32 and 64 of bf16: whole sectors both. Eight make a warp's 8-bit block.
    STRETCH: tl.constexpr = 4 if any_fp32 and m_absmax_ptr is None else 8
    at = tl.max_contiguous(tl.arange(0, BLOCK), STRETCH)
    left = tl.minimum(n - first, BLOCK).to(tl.int32)
    mask = at < left
    if SHIFT:
        mask &= at >= -first
    group = group + tl.arange(0, BLOCK // 8)

    if grad_ptr.dtype.element_ty == tl.float32:
        g = _load_fp32(grad_ptr + first, at, mask, left, STRETCH, BLOCK) * scale
    else:
        g = _widen(tl.load(grad_ptr + first + at, mask=mask, other=0.0)) * scale
    if m_absmax_ptr is not None:
        m_absmax_ptr += first // 256
        v_absmax_ptr += first // 256
    m = _read(m_ptr + first, m_absmax_ptr, map_ptr, at, mask, left, True, STRETCH, BLOCK)
    v = _read(v_ptr + first, v_absmax_ptr, map_ptr, at, mask, left, False, STRETCH, BLOCK)
    if master_ptr is not None:
        p = _load_fp32(master_ptr + first, at, mask, left, STRETCH, BLOCK)
    elif param_ptr.dtype.element_ty == tl.float32:
        p = _load_fp32(param_ptr + first, at, mask, left, STRETCH, BLOCK)
    else:
        p = _widen(tl.load(param_ptr + first + at, mask=mask, other=0))
        if low_ptr is not None:  # a negative one where rounding half up took one too many
            p = _float(p.to(tl.int32, bitcast=True) + tl.load(low_ptr + first + at, mask=mask, other=0).to(tl.int32))

    m += (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - m * _inverse(tl.sqrt(v) + eps) * rate

    _write(m, m_ptr + first, m_absmax_ptr, cells_ptr, at, mask, left, key, group, True, BLOCK)
    _write(v, v_ptr + first, v_absmax_ptr, cells_ptr, at, mask, left, key, group, False, BLOCK)
    if param_ptr.dtype.element_ty == tl.float32:
        tl.store(param_ptr + first + at, p, mask=mask)
    else:
        if master_ptr is not None:
            tl.store(master_ptr + first + at, p, mask=mask)
            rounded = _nearest(p)
        elif low_ptr is not None:
            bits = _quiet_bits(p)
            tl.store(low_ptr + first + at, bits.to(tl.int16), mask=mask)
            rounded = _upper(bits, 0x8000)
        else:
            rounded = _upper(_quiet_bits(p), _random(key, group, 0))
        tl.store(param_ptr + first + at, rounded, mask=mask)


# ---- launches -------------------------------------------------------------------------------------------------------


@triton.jit
def _number(x, ptr):
    """Return the number at ptr in fp32, also from fp64, which would widen everything after it; x without a ptr."""
    if ptr is not None:
        return tl.load(ptr).to(tl.float32)
    else:
        return x


@triton.jit(do_not_specialize=["key", "group0"])  # they change from step to step, shard to shard
def update_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, low_ptr, master_ptr, map_ptr, cells_ptr,
    lr, lr_ptr, scale, scale_ptr, apply_ptr, rest1, beta2, rest2, eps, factor, weight_decay, key, group0, n,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tensor. key and group0: of Philox. SHIFT: elements of the first eight that precede the tensor."""
    if apply_ptr is not None and tl.load(apply_ptr) == 0:
        return
    program = tl.program_id(0).to(tl.int64)  # int64: bytes of a tensor pass 2^31
    lr = _number(lr, lr_ptr)
    scale = _number(scale, scale_ptr)
    _update_tile(
        param_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, low_ptr, master_ptr, map_ptr, cells_ptr,
        scale, 1.0 - lr * weight_decay, lr * factor, rest1, beta2, rest2, eps,
        key, group0 + program * (BLOCK // 8), program * BLOCK - SHIFT, n, SHIFT, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step"])
def update_many_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, low_ptr, master_ptr, map_ptr, cells_ptr, table_ptr,
    lr, lr_ptr, scale, scale_ptr, apply_ptr, rest1, beta2, rest2, eps, factor, step,
    N: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update TILES tiles of one of many tensors. table_ptr: what kernels.ops.adamw_many makes."""
    if apply_ptr is not None and tl.load(apply_ptr) == 0:
        return
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + find_tensor(table_ptr, chunk, N)
    first = (chunk - tl.load(row_ptr)) * (TILES * BLOCK)
    n = tl.load(row_ptr + N) * (16 if ALIGNED else 1)
    param_ptr = move_pointer(param_ptr, row_ptr + 2 * N, ALIGNED)
    grad_ptr = move_pointer(grad_ptr, row_ptr + 3 * N, ALIGNED)
    m_ptr = move_pointer(m_ptr, row_ptr + 4 * N, ALIGNED)
    v_ptr = move_pointer(v_ptr, row_ptr + 5 * N, ALIGNED)
    if low_ptr is not None:
        low_ptr = move_pointer(low_ptr, row_ptr + 6 * N, ALIGNED)
    if master_ptr is not None:
        master_ptr = move_pointer(master_ptr, row_ptr + 7 * N, ALIGNED)
    if m_absmax_ptr is not None:
        m_absmax_ptr = move_pointer(m_absmax_ptr, row_ptr + 8 * N, False)
        v_absmax_ptr = move_pointer(v_absmax_ptr, row_ptr + 9 * N, False)
    key = (step.to(tl.int64) << 32) | tl.load(row_ptr + 10 * N)
    group0 = tl.load(row_ptr + 11 * N)
    weight_decay = tl.load(row_ptr + 12 * N).to(tl.int32).to(tl.float32, bitcast=True)

    lr = _number(lr, lr_ptr)
    scale = _number(scale, scale_ptr)
    for at in range(0, tl.minimum(n - first, TILES * BLOCK).to(tl.int32), BLOCK):
        _update_tile(
            param_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, low_ptr, master_ptr, map_ptr, cells_ptr,
            scale, 1.0 - lr * weight_decay, lr * factor, rest1, beta2, rest2, eps,
            key, group0 + (first + at) // 8, first + at, n, 0, BLOCK,
        )  # fmt: skip

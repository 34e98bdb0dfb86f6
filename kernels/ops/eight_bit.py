"""Blocks of 256 numbers in 8 bits: one fp32 absolute maximum a block, and for each number the nearest entry of the
dynamic map, in units of that maximum.

The entries are 0, 1, and numbers in the seven decades from 10^-7 to 1. Each decade is cut into equal parts, twice as
many as the decade below, and its entries are the middles of the parts. The signed map has 127 entries above 0 and 127
below; the unsigned map has 254 above. A code is an entry's place in ascending order.

The nearest entry is found without the table: in a decade of n parts, entry k is nearest while
floor(slope x + intercept) = n + k. An unsigned number that is not 0 never becomes 0, because AdamW divides by its root.
A maximum under 2^-126 makes a block of zeros, a maximum that is NaN or Inf a block of NaN.
Source: arXiv:2110.02861; the entries are those of bitsandbytes' create_dynamic_map.
"""

import functools

import torch
import triton
import triton.language as tl

BLOCK = 256  # numbers that share a maximum
TINY = 2.0**-126  # the least maximum with a finite inverse


# ---- the map --------------------------------------------------------------------------------------------------------


def _decades(signed):
    """Return [(upper end, entries)] of the decades: 10^-6 to 1; 1, 2, 4 ... 64 entries of either sign, or 2 ... 128."""
    return [(10.0 ** (i - 6), 2**i if signed else 2 ** (i + 1)) for i in range(7)]


def _positive(signed):
    return [top * (0.1 + 0.9 * (k + 0.5) / n) for top, n in _decades(signed) for k in range(n)]


@functools.cache
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the map (256,) fp32, ascending: 0, 1 and the entries of each decade; signed, their negatives too."""
    positive = _positive(signed)
    negative = [-x for x in reversed(positive)] if signed else []
    return torch.tensor([*negative, 0.0, *positive, 1.0], dtype=torch.float64).float().to(device)


def _pieces(signed):
    """Return ((start, slope, intercept), ...), one linear piece for each decade, which applies from x = start on.

    floor(slope x + intercept), at most 2n - 1, is n + k where x is nearest to entry k of a decade of n entries. Before
    the first piece floor(intercept) stands for 0, from the last piece on for 1. A decade's lowest entry is nearest only
    from the middle between it and the entry below.
    """
    entries, start, pieces = [0.0, *_positive(signed), 1.0], 0, [(0.0, 0.0, 0.5 if signed else 1.5)]
    for top, n in _decades(signed):
        pieces.append(((entries[start] + entries[start + 1]) / 2, n / 0.9 / top, n * 8 / 9))
        start += n
    # The lowest decade's line falls below n at its lower end; these replacements do not.
    pieces[1] = (pieces[1][0], 0.0, 1.5) if signed else (TINY, 1e6, 2.45)
    return (*pieces, ((entries[-2] + 1) / 2, 0.0, 2 * n + 0.5))


SIGNED_PIECES, UNSIGNED_PIECES = tl.constexpr(_pieces(True)), tl.constexpr(_pieces(False))


# ---- reference ------------------------------------------------------------------------------------------------------


def _split_blocks(x):
    """Return x (n,) as (blocks, 256), with zeros appended."""
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def encode_ref(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes (n,) uint8 and maxima (blocks,) fp32 of x (n,) fp32."""
    blocks = _split_blocks(x).abs()
    absmax = blocks.amax(1)
    inverse = torch.where((absmax >= TINY) & absmax.isfinite(), 1 / absmax, 0.0)[:, None]
    ratio = torch.where(inverse > 0, blocks * inverse, 0.0).flatten()[: len(x)]
    starts, slopes, intercepts = torch.tensor(_pieces(signed), dtype=torch.float64).float().to(x.device).T.contiguous()
    piece = torch.bucketize(ratio, starts[1:], right=True)
    intercept = intercepts[piece]
    rank = torch.minimum(ratio * slopes[piece] + intercept, intercept * 2.25 - 0.5).int()
    code = (127 + torch.where(x < 0, -rank, rank)).clamp_(min=0) if signed else rank - 1
    return code.to(torch.uint8), absmax


def decode_ref(code: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the numbers (n,) fp32 that codes (n,) and maxima (blocks,) stand for."""
    return (_split_blocks(dynamic_map(signed, code.device)[code.int()]) * absmax[:, None]).flatten()[: len(code)]


# ---- in a kernel, for N numbers, a multiple of 256 ------------------------------------------------------------------


@triton.jit
def _per_number(x, N: tl.constexpr):
    """Return x (blocks,) repeated for each number, (N,)."""
    return tl.reshape(tl.broadcast_to(x[:, None], (N // 256, 256)), (N,))


@triton.jit
def _rank(ratio, PIECES: tl.constexpr):
    slope, intercept = tl.full(ratio.shape, 0.0, tl.float32), tl.full(ratio.shape, PIECES[0][2], tl.float32)
    for i in tl.static_range(1, 9):
        over = ratio >= PIECES[i][0]
        slope, intercept = tl.where(over, PIECES[i][1], slope), tl.where(over, PIECES[i][2], intercept)
    return tl.minimum(ratio * slope + intercept, intercept * 2.25 - 0.5).to(tl.int32)


@triton.jit
def encode(x, SIGNED: tl.constexpr, N: tl.constexpr):
    """Return codes and maxima of x (N,), as encode_ref. Numbers past a tensor's end must be 0."""
    # Compared as integers, NaN is above Inf, and Inf above all numbers.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(tl.reshape(magnitude, (N // 256, 256)), axis=1).to(tl.float32, bitcast=True)
    usable = (absmax >= 2.0**-126) & (absmax < float("inf"))
    inverse = _per_number(tl.where(usable, tl.div_rn(1.0, absmax), 0.0), N)
    ratio = tl.where(inverse > 0, tl.abs(x) * inverse, 0.0)
    if SIGNED:
        rank = _rank(ratio, SIGNED_PIECES)
        code = tl.maximum(127 + tl.where(x < 0, -rank, rank), 0)  # there is no -1
    else:
        code = _rank(ratio, UNSIGNED_PIECES) - 1
    return code.to(tl.uint8), absmax


@triton.jit
def decode(code, absmax, map_ptr, N: tl.constexpr):
    """Return the numbers that codes (N,) stand for, as decode_ref. map_ptr: the entries of dynamic_map."""
    return tl.gather(tl.load(map_ptr + tl.arange(0, 256)), code.to(tl.int32), 0) * _per_number(absmax, N)

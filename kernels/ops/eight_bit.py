"""Blocks of 256 numbers in 8 bits: one fp32 absolute maximum a block, and for each number the nearest entry of the
dynamic map, in units of that maximum.

The entries are 0, 1, and numbers in the seven decades from 10^-7 to 1. Each decade is cut into equal parts, twice as
many as the decade below, and its entries are the middles of the parts. The signed map has 127 entries above 0 and 127
below; the unsigned map has 254 above. A code is an entry's place in ascending order.

The nearest entry is found without a search. In a decade of n parts, entry k is nearest while
floor(slope x + intercept) = n + k. The kernel reads slope and intercept from a table, at a place that x's exponent and
the first four bits of its mantissa give: a cell. A cell where the decade changes has a line of its own, which is chosen
so that every fp32 number gets the code that the decades give it.

An unsigned number that is not 0 never becomes 0, because AdamW divides by its root. A maximum under 2^-126 makes a
block of zeros, a maximum that is NaN or Inf a block of NaN.
Source: arXiv:2110.02861; the entries are those of bitsandbytes' create_dynamic_map.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.ops.common import COMPILED

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


# ---- reference ------------------------------------------------------------------------------------------------------


def _split_blocks(x):
    """Return x (n,) as (blocks, 256), with zeros appended."""
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _rank_ref(ratio, signed):
    """Return the place (n,) int32 of the entry nearest to each ratio >= 0: 0 for 0, then 1, 2, ... upward."""
    pieces = torch.tensor(_pieces(signed), dtype=torch.float64).float().to(ratio.device)
    starts, slopes, intercepts = pieces.T.contiguous()
    piece = torch.bucketize(ratio, starts[1:], right=True)
    intercept = intercepts[piece]
    return torch.minimum(ratio * slopes[piece] + intercept, intercept * 2.25 - 0.5).int()


def encode_ref(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes (n,) uint8 and maxima (blocks,) fp32 of x (n,) fp32."""
    blocks = _split_blocks(x).abs()
    absmax = blocks.amax(1)
    inverse = torch.where((absmax >= TINY) & absmax.isfinite(), 1 / absmax, 0.0)[:, None]
    rank = _rank_ref(torch.where(inverse > 0, blocks * inverse, 0.0).flatten()[: len(x)], signed)
    code = (127 + torch.where(x < 0, -rank, rank)).clamp_(min=0) if signed else rank - 1
    return code.to(torch.uint8), absmax


def decode_ref(code: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the numbers (n,) fp32 that codes (n,) and maxima (blocks,) stand for."""
    return (_split_blocks(dynamic_map(signed, code.device)[code.int()]) * absmax[:, None]).flatten()[: len(code)]


@functools.cache
def native_maps() -> torch.Tensor:
    """Return the signed and the unsigned map (2, 256 + 27) fp32 as csrc/cpu/adamw.h has them.

    Each is its entries, and the starts, slopes and intercepts of its nine linear pieces.
    """
    pieces = [torch.tensor(_pieces(signed), dtype=torch.float64).float().T.flatten() for signed in (True, False)]
    return torch.stack([torch.cat((dynamic_map(signed), of)) for signed, of in zip((True, False), pieces, strict=True)])


# ---- cells: codes by exponent arithmetic ----------------------------------------------------------------------------

N_CELLS = tl.constexpr(512)  # 353 of them can hold a ratio
SPREAD = tl.constexpr(1.255 * 2.0**-104)  # makes the exponent of [2^-22, 1] 1 to 23; for 1.255 see _cells
ABOVE_ALL = 0x3F800008  # fp32 bits that no ratio reaches: 1 + 2^-22 is the most, where 1 / maximum is subnormal


def _cell(ratio):
    """Return the cell (n,) int32 of each ratio (n,): the exponent and 4 bits of the mantissa of ratio * SPREAD."""
    return (ratio * SPREAD.value).view(torch.int32) >> 19


def _first_bits(holds, n):
    """Return the bits (n,) int32 of the least ratios >= 2^-126 for which holds(ratios (n,)) (n,) is true."""
    low, high = torch.full((n,), 0x007FFFFF, dtype=torch.int32), torch.full((n,), ABOVE_ALL, dtype=torch.int32)
    while (high - low > 1).any():
        middle = (low + high + 1) // 2  # high once they are neighbours
        true = holds(middle.view(torch.float32))
        low, high = torch.where(true, low, middle), torch.where(true, middle, high)
    return high


def _line_through(x, codes):
    """Return (slope, intercept) with floor(slope x + intercept) = codes, for x (n,) fp32 and codes (n,), ascending.

    x are the least and the largest ratio of a cell, and between them the two ratios on either side of each change of
    code. Of 13,617 lines that meet the first and the last change but for the last bits of slope and intercept, the
    first that fits is taken. Raises ValueError if none does.
    """
    if len(x) == 2:
        return 0.0, codes[0] + 0.5
    first, rise, run = x[2].double(), 0.5, (x[-1] - x[0]).double()  # with one change
    if len(x) > 4:
        rise, run = codes[-2] - codes[2], x[-2].double() - first
    slope = (rise / run).float()
    slopes = (slope + torch.arange(-400, 401) * slope * 2**-23)[:, None]
    intercepts = (codes[2] - slopes.double() * first).float()
    for ulps in sorted(range(-8, 9), key=abs):
        moved = intercepts + ulps * intercepts.abs() * 2**-23
        fits = ((x * slopes + moved).floor() == codes).all(1).nonzero()
        if len(fits):
            return slopes[fits[0]].item(), moved[fits[0]].item()
    raise ValueError(f"eight_bit: no line gives the codes {codes.tolist()} at {x.tolist()}")


@functools.cache
def _cells(signed):
    """Return slopes and intercepts, (N_CELLS,) fp32 each: floor(slope x + intercept) is the magnitude of x's code.

    That is the rank of the entry in the signed map, and rank - 1 in the unsigned one. A cell has the line of the decade
    in which it starts, unless that gives a wrong code somewhere. It then gets a line of its own. 1.255 puts bounds of
    cells near 0.1, 0.01 and 1, where decades end, so that such cells hold few changes of code, and lines exist.
    """
    below = 0 if signed else 1  # codes are that much below ranks
    pieces = torch.tensor(_pieces(signed), dtype=torch.float64).float()
    ranks = torch.arange(1, 129) if signed else torch.arange(3, 257)  # the kernel itself tells 0 from the numbers above
    changes = _first_bits(lambda x: _rank_ref(x, signed) >= ranks, len(ranks))
    bounds = _first_bits(lambda x: _cell(x) >= torch.arange(N_CELLS.value + 1), N_CELLS.value + 1)
    bits = torch.cat([bounds, bounds - 1, changes, changes - 1]).unique()
    x = bits[(bits >= bounds[0]) & (bits < bounds[-1])].view(torch.float32)
    codes, cells = _rank_ref(x, signed) - below, _cell(x)
    starts = torch.bucketize(bounds[:-1].view(torch.float32), pieces[1:, 0].contiguous(), right=True)
    slopes, intercepts = pieces[starts, 1], pieces[starts, 2] - below
    # Both codes rise with x, so that they are equal in a whole cell where they are at its ends and at every change.
    wrong = cells[(x * slopes[cells] + intercepts[cells]).floor() != codes].unique()
    for cell in wrong.tolist():
        slopes[cell], intercepts[cell] = _line_through(x[cells == cell], codes[cells == cell])
    return slopes, intercepts


@functools.cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what kernels look up, signed before unsigned: maps (512,) fp32, and cells (1024,) int64.

    The upper half of a cell is the bits of its intercept, the lower half those of its slope.
    """
    cells = torch.cat([torch.stack(_cells(signed), 1).view(torch.int64).flatten() for signed in (True, False)])
    return torch.cat([dynamic_map(signed) for signed in (True, False)]).to(device), cells.to(device)


# ---- in a kernel, for N numbers, a multiple of 256 ------------------------------------------------------------------


@triton.jit
def _per_number(x, N: tl.constexpr):
    """Return x (blocks,) repeated for each number, (N,)."""
    return tl.reshape(tl.broadcast_to(x[:, None], (N // 256, 256)), (N,))


@triton.jit
def _rounded_inverse(x):
    """Return 1 / x, correctly rounded: 7 instructions, where tl.div_rn takes 16."""
    if COMPILED:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def _bytes_to_int32(x):
    """Return bytes as int32: one instruction each, where Triton's conversion takes two."""
    if COMPILED:
        assembly: tl.constexpr = (
            "prmt.b32 $0, $4, 0, 0x4440; prmt.b32 $1, $4, 0, 0x4441; "
            "prmt.b32 $2, $4, 0, 0x4442; prmt.b32 $3, $4, 0, 0x4443;"
        )
        return tl.inline_asm_elementwise(assembly, "=r,=r,=r,=r,r", [x], tl.int32, is_pure=True, pack=4)
    else:
        return x.to(tl.int32)


@triton.jit
def encode(x, cells_ptr, SIGNED: tl.constexpr, N: tl.constexpr):
    """Return codes and maxima of x (N,), as encode_ref. cells_ptr: see tables.

    Numbers past a tensor's end must be 0. Without SIGNED, x holds no number below 0 and no -0.
    """
    # Compared as integers, NaN is above Inf, and Inf above all numbers.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF if SIGNED else x.to(tl.uint32, bitcast=True)
    absmax = tl.max(tl.reshape(magnitude, (N // 256, 256)), axis=1).to(tl.float32, bitcast=True)
    usable = (absmax >= 2.0**-126) & (absmax < float("inf"))
    ratio = tl.abs(x) * _per_number(tl.where(usable, _rounded_inverse(absmax), 0.0), N)
    cell = ((ratio * SPREAD).to(tl.int32, bitcast=True) >> 19) & (N_CELLS - 1)  # a NaN's too
    line = tl.gather(tl.load(cells_ptr + (0 if SIGNED else N_CELLS) + tl.arange(0, N_CELLS)), cell, 0)
    slope, intercept = line.to(tl.int32), (line >> 32).to(tl.int32)
    code = ratio * slope.to(tl.float32, bitcast=True) + intercept.to(tl.float32, bitcast=True)
    if SIGNED:
        if not COMPILED:  # NaN becomes the integer 0 in PTX, but not in numpy
            code = tl.where(code == code, code, 0.0)
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        offset = (code.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True).to(tl.int32)
        return tl.maximum(offset + 127, 0).to(tl.uint8), absmax  # there is no -1
    else:
        return tl.where(ratio >= 2.0**-126, code, 0.0).to(tl.int32).to(tl.uint8), absmax


@triton.jit
def decode(code, absmax, map_ptr, SIGNED: tl.constexpr, N: tl.constexpr):
    """Return the numbers that codes (N,) stand for, as decode_ref. map_ptr: see tables."""
    entries = tl.load(map_ptr + (0 if SIGNED else 256) + tl.arange(0, 256))
    return tl.gather(entries, _bytes_to_int32(code), 0) * _per_number(absmax, N)

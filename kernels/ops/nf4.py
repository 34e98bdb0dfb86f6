"""Weights in 4 bits: NormalFloat codes in blocks of 64, whose absolute maxima are quantised to 8 bits themselves.

    w = (map[code8] * absmax2 + offset) * table[code4]                in fp32, each step rounded, then to out's dtype

A code4 is the place of the entry of `table` nearest to w / absmax of its block; of two equally near, the lower one's.
The maxima of the blocks, less their mean `offset`, are quantised in blocks of 256 to the nearest entry of `map`, in
units of absmax2. 4.127 bits a weight. All numbers have the bits of bitsandbytes 0.50 on a CPU, of its
quantize_4bit(blocksize=64, compress_statistics=True, quant_type="nf4"). Three of its habits matter: a block at the end
that is not whole is divided by its maximum, where others are multiplied by the inverse; code8 is read from a table of
65,536 places between -1 and 1, which moves numbers near 0 by several entries; the mean is torch's, whose last bit
depends on the number of threads.

Bound by its writes: dequantising reads 0.516 bytes a weight and writes 2 in bf16. Quantising is plain torch, or C++ on
a CPU, and never holds more than a chunk in fp32: beside the result a megabyte of numbers on a CPU, 16 on a GPU.
Source: arXiv:2305.14314; table and map are those of bitsandbytes.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.native import nf4 as native
from kernels.ops.common import DTYPES, choose_impl, launch_config, operator

BLOCK = 64  # weights that share a maximum
BLOCK2 = 256  # maxima that share a maximum
LEAST = 1e-38  # a lower maximum is taken as this one before it is inverted
CHUNK = 1 << 18  # weights at a time on a CPU, a megabyte in fp32, which a cache holds; on a GPU 16 times as many
NAMES = "codes", "absmax_codes", "absmax2", "offset"
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4Matrix:
    """A quantised tensor of n numbers, as bitsandbytes keeps it.

    codes: (ceil(n / 2),) uint8, two numbers a byte, the first in the upper half. absmax_codes: (B,) uint8 for the
    B = ceil(n / 64) blocks. absmax2: (ceil(B / 256),) fp32. offset: () fp32, the mean of the blocks' maxima.
    Raises ValueError for other dtypes and sizes.
    """

    codes: torch.Tensor
    absmax_codes: torch.Tensor
    absmax2: torch.Tensor
    offset: torch.Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the dtypes and sizes, which kernels rely on."""
        kinds = torch.uint8, torch.uint8, torch.float32, torch.float32
        sizes = *((size,) for size in nf4_shapes(math.prod(self.shape))), ()
        for name, t, dtype, size in zip(NAMES, self.tensors, kinds, sizes, strict=True):
            if t.dtype != dtype or t.shape != size or not t.is_contiguous() or t.device != self.codes.device:
                raise ValueError(
                    f"NF4Matrix: {name} is {t.dtype} of shape {tuple(t.shape)} on {t.device}, wanted {dtype} of shape "
                    f"{size}, contiguous, on {self.codes.device} for a matrix of shape {tuple(self.shape)}"
                )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes, absmax_codes, absmax2 and offset."""
        return self.codes, self.absmax_codes, self.absmax2, self.offset

    @property
    def n_bytes(self) -> int:
        """Return the bytes that the tensors hold."""
        return sum(t.nbytes for t in self.tensors)

    def to(self, device: torch.device | str) -> "NF4Matrix":
        """Return the quantised tensor on a device."""
        codes, absmax_codes, absmax2, offset = (t.to(device) for t in self.tensors)
        return NF4Matrix(codes, absmax_codes, absmax2, offset, self.shape)


def nf4_shapes(n: int) -> tuple[int, int, int]:
    """Return how many codes, codes of maxima and maxima of these n quantised numbers have."""
    blocks = math.ceil(n / BLOCK)
    return math.ceil(n / 2), blocks, math.ceil(blocks / BLOCK2)


# ---- the tables -----------------------------------------------------------------------------------------------------


@functools.cache
def table(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 16 numbers that codes stand for, fp32, ascending."""
    return torch.tensor(TABLE, dtype=torch.float32, device=device)


@functools.cache
def absmax_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 256 numbers that codes of maxima stand for, fp32, ascending.

    It is the signed map of kernels.ops.eight_bit but for the last bit of 72 entries, which bitsandbytes rounds more
    often: the ends of the parts come from torch.linspace in fp32, on a CPU with fused multiply-add.
    """
    entries = [torch.zeros(1), torch.ones(1)]
    first = torch.tensor(0.1).double()  # fp32's 0.1
    for decade in range(-6, 1):
        n = 2 ** (decade + 6)
        step = ((1 - first.float()) / n).double()
        i = torch.arange(n + 1, dtype=torch.float64)  # products and sums in fp64 are exact here, and rounded once
        ends = torch.where(i < (n + 1) // 2, first + step * i, 1 - step * (n - i)).float()
        middles = (ends[:-1] + ends[1:]) / 2 * torch.tensor(10.0**decade)
        entries += [middles, -middles]
    return torch.cat(entries).sort().values.to(device)


@functools.cache
def _absmax_places(device: torch.device) -> torch.Tensor:
    """Return for each of 65,536 places between -1 and 1 the code of the nearest entry of the map, uint8."""
    entries = absmax_map()
    places = -1 + 2 * torch.arange(1 << 16, dtype=torch.float32) / 65535
    return torch.bucketize(places, (entries[:-1] + entries[1:]) / 2).to(torch.uint8).to(device)


# ---- reference: the specification -----------------------------------------------------------------------------------


def _chunk(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else 16 * CHUNK


def _encode_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the maxima of x (n,), whole blocks of 64 numbers or a part of one."""
    x = x.float()
    if len(x) < BLOCK:
        absmax = x.abs().amax(0, keepdim=True).clamp(min=LEAST)
        ratio = x / absmax
        ratio = torch.nn.functional.pad(ratio, (0, len(x) % 2))
    else:
        blocks = x.view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        ratio = (blocks * (1 / absmax.clamp(min=LEAST))[:, None]).flatten()
    entries = table(x.device)
    code = torch.bucketize(ratio, (entries[:-1] + entries[1:]) / 2, out_int32=True).to(torch.uint8)
    return code[::2] << 4 | code[1::2], absmax


def _quantise_ref(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Write the codes and the maxima of weight (n,), a chunk at a time."""
    n = len(weight)
    whole, chunk = n // BLOCK * BLOCK, _chunk(weight.device)
    pieces = [(a, min(a + chunk, whole)) for a in range(0, whole, chunk)]
    for start, stop in [*pieces, (whole, n)] if whole < n else pieces:
        of_codes = codes[start // 2 : (stop + 1) // 2]
        of_codes[:], absmax[start // BLOCK : math.ceil(stop / BLOCK)] = _encode_ref(weight[start:stop])


def _encode_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes of maxima (B,), absmax2 and offset. Maxima of a block that are all the mean have code 0."""
    offset = absmax.mean()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % BLOCK2)).view(-1, BLOCK2)
    absmax2 = blocks.abs().amax(1)
    ratio = (blocks * (1 / absmax2)[:, None]).nan_to_num(0.0).clamp(-1, 1)
    place = ((ratio + 1) * 0.5 * 65535 + 0.5).int()
    codes = torch.where(absmax2[:, None] > 0, _absmax_places(absmax.device)[place], 0)
    return codes.flatten()[: len(absmax)].contiguous(), absmax2, offset


def _dequantise_ref(
    out: torch.Tensor, codes: torch.Tensor, absmax_codes: torch.Tensor, absmax2: torch.Tensor, offset: torch.Tensor
) -> None:
    """Write to out (n,) the numbers that codes stand for."""
    entries, chunk = table(out.device), _chunk(out.device)
    scale2 = absmax2.repeat_interleave(BLOCK2)[: len(absmax_codes)]
    absmax = absmax_map(out.device)[absmax_codes.int()] * scale2 + offset
    for start in range(0, len(out), chunk):
        part, of = out[start : start + chunk], codes[start // 2 : (start + chunk) // 2]
        values = entries[torch.stack((of >> 4, of & 15), 1).flatten().int()][: len(part)]
        scale = absmax[start // BLOCK : (start + chunk) // BLOCK].repeat_interleave(BLOCK)[: len(part)]
        part.copy_(values * scale)


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def _dequantise_kernel(
    out_ptr, codes_ptr, absmax_codes_ptr, absmax2_ptr, offset_ptr, table_ptr, map_ptr, n, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK numbers. WHOLE: n is a multiple of BLOCK, and codes are given as int32, 8 numbers a word."""
    at = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # words
    to = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    keep, store = None, None
    if WHOLE:
        word = tl.load(codes_ptr + at)
    else:
        keep, store = at * 8 < n, to < n
        word = tl.load(codes_ptr + at * 4, mask=keep, other=0).to(tl.int32)
        for i in tl.static_range(1, 4):
            word |= tl.load(codes_ptr + at * 4 + i, mask=at * 8 + 2 * i < n, other=0).to(tl.int32) << 8 * i
    code8 = tl.load(absmax_codes_ptr + at // 8, mask=keep).to(tl.int32)
    absmax = tl.load(map_ptr + code8, mask=keep) * tl.load(absmax2_ptr + at // 2048, mask=keep) + tl.load(offset_ptr)
    code = (word[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :]) & 15  # the first number of a byte is its upper half
    # The table lies in shared memory, its 16 numbers in as many banks: no lookup waits for another lane's.
    value = tl.gather(tl.load(table_ptr + tl.arange(0, 16)), tl.reshape(code, (BLOCK,)), 0)
    tl.store(out_ptr + to, tl.reshape(value, (BLOCK // 8, 8)) * absmax[:, None], mask=store)


# ---- launch: torch.ops.cria.* ---------------------------------------------------------------------------------------


def _dequantise_native(out, codes, absmax_codes, absmax2, offset):
    native.dequantise(out, codes, absmax_codes, absmax2, offset, absmax_map())


@operator(
    "nf4_dequantise", mutates=("out",), cpu=_dequantise_ref, fake=lambda *arguments: None, native=_dequantise_native
)
def dequantise(
    out: torch.Tensor, codes: torch.Tensor, absmax_codes: torch.Tensor, absmax2: torch.Tensor, offset: torch.Tensor
) -> None:
    """Write to out (n,), contiguous, the numbers that codes stand for."""
    config, n = launch_config("nf4", "dequantise", out.device), len(out)
    whole = n % config["BLOCK"] == 0 and codes.data_ptr() % 16 == 0
    _dequantise_kernel[(triton.cdiv(n, config["BLOCK"]),)](
        out, codes.view(torch.int32) if whole else codes, absmax_codes, absmax2, offset, table(out.device),
        absmax_map(out.device), n, WHOLE=whole, enable_fp_fusion=False, **config,
    )  # fmt: skip


# ---- public ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantise_nf4(weight: torch.Tensor, impl: str = "auto") -> NF4Matrix:
    """Return a tensor of any shape in fp32, bf16 or fp16, quantised on its device.

    It waits for the device once. Raises ValueError for another dtype, a tensor without elements, and NaN or Inf in it.
    """
    if weight.dtype not in DTYPES or not weight.numel():
        raise ValueError(
            f"quantise_nf4: weight is {weight.dtype} of shape {tuple(weight.shape)}, wanted at least one number in "
            f"fp32, bf16 or fp16"
        )
    if impl == "triton":
        raise ValueError("quantise_nf4: impl is 'triton', and there is no such kernel; pass impl='auto'")
    flat = weight.reshape(-1).contiguous()  # of a strided vector, reshape makes a view
    n_codes, n_blocks, _ = nf4_shapes(len(flat))
    codes = torch.empty(n_codes, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(n_blocks, dtype=torch.float32, device=weight.device)
    if choose_impl("quantise_nf4", impl, weight, has_native=True) == "native":
        native.quantise(flat, codes, absmax)
    else:
        _quantise_ref(flat, codes, absmax)
    absmax_codes, absmax2, offset = _encode_absmax(absmax)
    if not offset.isfinite():
        raise ValueError(
            f"quantise_nf4: the weight of shape {tuple(weight.shape)} holds NaN or Inf, or numbers whose maxima have "
            f"no finite mean; wanted finite weights"
        )
    return NF4Matrix(codes, absmax_codes, absmax2, offset, tuple(weight.shape))


@torch.no_grad()
def dequantise_nf4(
    q: NF4Matrix, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Return the numbers of a quantised tensor in fp32, bf16 or fp16: in out if it is given, else in a new tensor.

    out: contiguous, of q's shape and device and of dtype; rows of a larger matrix are.
    Raises ValueError for another dtype or another out.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dequantise_nf4: dtype is {dtype}, wanted fp32, bf16 or fp16")
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    if out.shape != q.shape or out.dtype != dtype or out.device != q.codes.device or not out.is_contiguous():
        raise ValueError(
            f"dequantise_nf4: out is {out.dtype} of shape {tuple(out.shape)} and strides {out.stride()} on "
            f"{out.device}, wanted {dtype} of shape {q.shape}, contiguous, on {q.codes.device}"
        )
    run = _dequantise_ref if choose_impl("dequantise_nf4", impl, out, has_native=True) == "ref" else dequantise
    run(out.view(-1), *q.tensors)
    return out

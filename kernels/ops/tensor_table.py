"""One launch over many tensors of one dtype: a table in the GPU's memory says where each of them lies.

The kernel is given the first tensor. A row of the table holds every tensor's distance from it, and other rows whatever
the kernel wants to know of a tensor. A program works on one chunk of one tensor. The table's first row holds the number
of each tensor's first chunk, so that a program finds its tensor by counting the numbers that are not above its own.

Tensors are aligned if each begins at a multiple of 16 bytes and holds a multiple of 16 elements. Distances between such
tensors count 16 bytes, and sizes 16 elements: Triton sees a product with 16 and moves 128 bits a thread.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl

from kernels.ops.common import next_power_of_2

NO_CHUNK = 1 << 62  # fills the first row
LEAST_ROW = 256  # numbers of a row: models up to 13B have fewer tensors, and so share what is compiled


def is_aligned(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether each tensor begins at a multiple of 16 bytes and holds a multiple of 16 elements."""
    return all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for t in tensors)


def measure_distances(tensors: Sequence[torch.Tensor], aligned: bool) -> list[int]:
    """Return the distance of each tensor from the first, in elements, or in units of 16 bytes if they are aligned."""
    first, unit = tensors[0].data_ptr(), 16 if aligned else tensors[0].element_size()
    return [(t.data_ptr() - first) // unit for t in tensors]


def count_chunks(sizes: Iterable[int], chunk: int) -> list[int]:
    """Return the number of each tensor's first chunk, and at the end the number of chunks in all."""
    return list(itertools.accumulate((-(-size // chunk) for size in sizes), initial=0))


def make_table(rows: Sequence[Sequence[int]], tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return rows of n numbers as a table (rows, N) int64 on the device, without waiting for it.

    N is LEAST_ROW, or the next power of two that n numbers need beyond it. The first row is that of count_chunks.
    tensors: all that a kernel reaches by the table, for what checks accesses. Beside tensors without storage (the meta
    device) the table is real, and lies on the CPU.
    """
    padding = [NO_CHUNK] * (max(LEAST_ROW, next_power_of_2(len(rows[0]))) - len(rows[0]))
    table = torch.tensor([[*row, *padding] for row in rows], pin_memory=device.type == "cuda")
    if device.type == "cuda":
        table = table.to(device, non_blocking=True)
    table.reached = list(tensors)  # type: ignore[attr-defined]
    return table


# ---- in a kernel; N: the length of a row ----------------------------------------------------------------------------


@triton.jit
def find_tensor(table_ptr, chunk, N: tl.constexpr):
    """Return the number of the tensor that a chunk lies in."""
    return tl.sum((tl.load(table_ptr + tl.arange(0, N)) <= chunk).to(tl.int32)) - 1


@triton.jit
def move_pointer(ptr, distance_ptr, ALIGNED: tl.constexpr):
    """Return a pointer to a tensor. ptr: to the first one. distance_ptr: its entry of measure_distances."""
    UNIT: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    return ptr + tl.load(distance_ptr) * UNIT

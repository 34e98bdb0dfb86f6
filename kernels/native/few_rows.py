"""Products of few rows, and what the forward of one token a sequence is given: csrc/cpu/few_rows.h."""

import ctypes
from collections.abc import Sequence

import torch

from kernels.native.arguments import FewRows, Layer
from kernels.native.library import check

TYPES = {torch.float32: 0, torch.bfloat16: 1}
Q8 = 2  # GGUF's q8_0: bytes, 34 for each 32 numbers: an fp16 scale, then signed bytes
Q8_BLOCK, Q8_BYTES = 32, 34


def multiply_few_rows(library: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor, threads: int) -> torch.Tensor:
    """Return x @ w.T (B, N) fp32, summed in fp32, of x (B, D) fp32 and w (N, D) in fp32 or bf16.

    w in uint8 is q8_0, (N, D / 32 * 34). All are contiguous and on the CPU. Raises ValueError if the shapes do not fit.
    """
    in_ = w.shape[1] // Q8_BYTES * Q8_BLOCK if w.dtype == torch.uint8 else w.shape[1]
    if x.dtype != torch.float32 or x.shape[1] != in_ or not (x.is_contiguous() and w.is_contiguous()):
        raise ValueError(f"few_rows: x {tuple(x.shape)} {x.dtype}, wanted contiguous fp32 of (rows, {in_})")
    y, workspace = torch.empty(len(x), len(w)), torch.empty_like(x)
    pointers = (t.data_ptr() for t in (x, w, y, workspace))
    product = FewRows(TYPES.get(w.dtype, Q8), len(x), in_, len(w), threads, *pointers)
    check(library.cria_few_rows(ctypes.byref(product)), "few_rows")
    return y


def new_layers(layers: Sequence[Sequence[torch.Tensor | None]]) -> ctypes.Array[Layer]:
    """Return the layers as C wants them, of each one's tensors in the order of Layer's fields."""
    return (Layer * len(layers))(*(Layer(*(None if t is None else t.data_ptr() for t in one)) for one in layers))

"""A frozen weight of a layer in 4 bits, as QLoRA keeps its base.

It stands where a parameter would. Each of the maps whose rows a weight merges is quantised on its own, as a program
that does not merge them would, so that codes and dequantised values have the bits of bitsandbytes.
Source: arXiv:2305.14314.
"""

from collections.abc import Sequence

import torch
from torch import nn

from kernels import NF4Matrix, dequantise_nf4, nf4_shapes, quantise_nf4


class NF4Weight(nn.Module):
    """A matrix (N, D) whose rows are those of several maps, one below the other.

    Its tensors are buffers: not trained, not in training states, and whole on each of several ranks. The two of fp32
    are kept as int32, so that casting a model to another dtype leaves their bits alone.
    """

    def __init__(self, rows: Sequence[int], columns: int):
        super().__init__()
        self.rows, self.columns = tuple(rows), columns
        for i, n in enumerate(rows):
            n_codes, n_blocks, n_maxima = nf4_shapes(n * columns)
            sizes = {"codes": (n_codes,), "absmax_codes": (n_blocks,), "absmax2": (n_maxima,), "offset": ()}
            for name, size in sizes.items():
                dtype = torch.uint8 if "codes" in name else torch.int32
                self.register_buffer(f"{name}{i}", torch.empty(size, dtype=dtype), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        return sum(self.rows), self.columns

    @property
    def device(self) -> torch.device:
        """Return where the codes are."""
        return self.matrix(0).codes.device

    def map_at(self, first_row: int) -> int:
        """Return which of the merged maps begins at a row."""
        return [sum(self.rows[:i]) for i in range(len(self.rows))].index(first_row)

    def matrix(self, i: int) -> NF4Matrix:
        """Return the quantised rows of map number i, as views."""
        codes, absmax_codes, absmax2, offset = (
            getattr(self, f"{name}{i}") for name in ("codes", "absmax_codes", "absmax2", "offset")
        )
        shape = self.rows[i], self.columns
        return NF4Matrix(codes, absmax_codes, absmax2.view(torch.float32), offset.view(torch.float32), shape)

    def store(self, first_row: int, weight: torch.Tensor) -> None:
        """Quantise the rows of the map that begins at first_row: weight (n, D), of fp64 what fp32 holds of it.

        Raises ValueError for NaN and Inf.
        """
        i = self.map_at(first_row)
        weight = weight.float() if weight.dtype == torch.float64 else weight
        for old, new in zip(self.matrix(i).tensors, quantise_nf4(weight).tensors, strict=True):
            old.copy_(new)

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix (N, D) that the codes stand for, made anew."""
        made = torch.float32 if dtype == torch.float64 else dtype  # codes stand for fp32 numbers
        out = torch.empty(self.shape, dtype=made, device=self.device)
        for i, rows in enumerate(out.split(self.rows)):
            dequantise_nf4(self.matrix(i), made, rows)
        return out.to(dtype)

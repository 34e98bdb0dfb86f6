"""Shards: the rows of a tensor that one process of several holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """Rows [first, end) of a larger tensor, along its first axis. A tensor without axes counts as one row."""

    tensor: torch.Tensor  # these rows
    first: int = 0
    rows: int | None = None  # of the larger tensor; None: this shard is all of it

    def __post_init__(self):
        # A shard without rows may begin anywhere.
        if self.end > self.first and not 0 <= self.first < self.end <= n_rows(self.shape):
            raise ValueError(f"Shard: rows [{self.first}, {self.end}) of a tensor of shape {self.shape}")

    @property
    def end(self) -> int:
        """Return the first row after the shard's."""
        return self.first + n_rows(self.tensor.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        shape = tuple(self.tensor.shape)
        return shape if self.rows is None else (self.rows, *shape[1:])


def n_rows(shape: Sequence[int]) -> int:
    """Return the number of rows of a tensor of this shape: 1 when it has no axes."""
    return shape[0] if len(shape) else 1


def as_shards(tensors: Mapping[str, torch.Tensor | Shard]) -> dict[str, Shard]:
    """Return tensors as shards. A plain tensor becomes the shard that is all of it."""
    return {name: t if isinstance(t, Shard) else Shard(t) for name, t in tensors.items()}


def first_row(rows: int, shards: int, shard: int) -> int:
    """Return the first row of shard number `shard` when FSDP2 divides `rows` rows into `shards` shards.

    Each has ceil(rows / shards) rows; the last ones have fewer, or none.
    """
    return min(rows, -(-rows // shards) * shard)

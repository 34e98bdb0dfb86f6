"""Micro-batches: on the host, and on the device with attention planned."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward.

    A row that predicts several targets (the last row of a prefix) is a loss row of each.
    """

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, from 0 in a document and its prefix
    documents: torch.Tensor  # (N, 4) int32: start, end, prefix start, prefix end; an unshared one has an empty prefix
    loss_rows: torch.Tensor  # (L,) int64, not decreasing: rows whose next token is a target
    targets: torch.Tensor  # (L,) int64
    weights: torch.Tensor | None = None  # (L,) fp32; None is all ones


@dataclass(frozen=True)
class Ready:
    """A micro-batch on the device, with attention planned, for a host that runs ahead of the device."""

    tokens: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,)
    targets: torch.Tensor  # (L,)
    weights: torch.Tensor | None  # (L,)
    rows: torch.Tensor  # (U,) the distinct rows with a loss
    of_rows: torch.Tensor | None  # (L,) each target's index into rows; None: target i has row i
    plans: tuple[Any, Any]  # attention plans: of all layers but the last, and of the last

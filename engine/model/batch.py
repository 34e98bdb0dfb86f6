"""A micro-batch on the host, and the same on the device, ready for a forward."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward, on the host. Each token is one row of the model's tensors (T, D).

    loss_rows has a row once for each target that it predicts. Only the last row of a shared prefix predicts several:
    one for each document that goes on from the prefix.
    """

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, for RoPE; a document continues the count of its prefix
    documents: torch.Tensor  # (N, 4) int32: start, end, prefix start, prefix end; without a prefix, the last two are 0
    loss_rows: torch.Tensor  # (L,) int64, not decreasing: rows whose next token is a target
    targets: torch.Tensor  # (L,) int64
    weights: torch.Tensor | None = None  # (L,) fp32, factor of each loss; None: all are 1


@dataclass(frozen=True)
class DeviceMicroBatch:
    """A micro-batch on the device, with its attention plans. It is prepared ahead, so that a forward does not wait."""

    tokens: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,)
    targets: torch.Tensor  # (L,)
    weights: torch.Tensor | None  # (L,)
    rows: torch.Tensor  # (U,) the loss rows, each once
    row_of_target: torch.Tensor | None  # (L,) index into rows for each target; None: target i has rows[i]
    plans: tuple[Any, Any]  # attention plans: of all layers but the last, and of the last

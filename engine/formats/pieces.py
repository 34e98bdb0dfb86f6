"""Tensors of files, read one after the other into the rows of our parameters that they fill."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import DataError
from engine.base.watching import Watch, watch_silently
from engine.formats.names import Piece, pairs_to_halves
from engine.formats.tensor_files import Stored, is_finite
from engine.model.nf4_weight import NF4Weight
from engine.model.shard import Shard


def read_pieces(
    path: Path,
    stored: Mapping[str, Stored],
    pieces: Mapping[str, Piece],
    parameters: Mapping[str, Any],
    shards: Mapping[str, Shard] | None,
    watch: Watch = watch_silently,
) -> None:
    """Read every tensor into the rows of its piece; of a sharded parameter only into those that this rank holds.

    parameters: {name: a tensor, or a weight in 4 bits}, which is quantised from the dtype of the norms, map after map.
    path: of the model, for messages. Raise DataError for a tensor that is not finite.
    """
    with watch("reading", sum(map(count_elements, pieces.values()))) as advance:
        for name, piece in pieces.items():
            if isinstance(packed := parameters[piece.parameter], NF4Weight):
                whole = torch.empty(piece.shape, dtype=parameters["norm"].dtype, device=packed.device)
                read_piece(path, name, stored[name], piece, whole)
                packed.store(piece.first_row, whole)
            elif (shard := shards[piece.parameter] if shards else None) and shard.rows:
                read_rows_of_shard(path, name, stored[name], piece, shard)
            else:
                read_piece(path, name, stored[name], piece, piece.rows_of(parameters))
            advance(count_elements(piece))


def count_elements(piece: Piece) -> int:
    """Return how many values a piece has."""
    return math.prod(piece.shape)


def read_rows_of_shard(path: Path, name: str, stored: Stored, piece: Piece, shard: Shard) -> None:
    """Read a tensor, if this rank holds some of its rows, and keep those."""
    first, end = piece.first_row, piece.first_row + piece.shape[0]
    first, end = max(first, shard.first), min(end, shard.first + len(shard.tensor))
    if first < end:
        whole = shard.tensor.new_empty(piece.shape)
        read_piece(path, name, stored, piece, whole)
        wanted = whole[first - piece.first_row : end - piece.first_row]
        shard.tensor[first - shard.first : end - shard.first] = wanted


def read_piece(path: Path, name: str, stored: Stored, piece: Piece, rows: torch.Tensor) -> None:
    """Read a tensor into all the rows of its piece. Raise DataError when they then hold NaN or an infinity."""
    for row, column, part in stored.blocks():
        target = rows[row : row + len(part)]
        if part.ndim == 2:
            target = target[:, column : column + part.shape[1]]
        target.copy_(part)
    if not is_finite(rows):
        problem = "holds NaN or an infinity; copy the model anew from where it comes from"
        if all(is_finite(part) for _, _, part in stored.blocks()):
            problem = f"has values beyond {str(rows.dtype).removeprefix('torch.')}; choose another --dtype"
        raise DataError(f"{path}: {stored.file}: {name} {problem}")
    if piece.paired_heads:
        rows.copy_(pairs_to_halves(rows, piece.paired_heads))

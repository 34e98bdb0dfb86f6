"""Tensors of files in the rows of our parameters, and of their shards."""

import contextlib

import pytest
import torch

from engine.base.errors import DataError
from engine.formats.names import Piece
from engine.formats.pieces import read_pieces
from engine.formats.tensor_files import Stored
from engine.model.shard import Shard


def stored(tensor, rows=2):
    """A tensor in a file, that comes in blocks of some rows."""
    blocks = [(at, 0, tensor[at : at + rows]) for at in range(0, len(tensor), rows)]
    return Stored("a file", tuple(tensor.shape), tensor.dtype, lambda: iter(blocks))


@pytest.mark.parametrize("heads", [0, 2])
def test_a_shard_has_the_rows_that_the_whole_parameter_has_there(heads):
    """Of two tensors, one below the other, wherever the shard begins and ends."""
    first, second = torch.arange(24.0).view(8, 3), 100 + torch.arange(12.0).view(4, 3)
    files = {"q": stored(first), "v": stored(second)}
    pieces = {"q": Piece("w", 0, (8, 3), heads), "v": Piece("w", 8, (4, 3), 0)}
    whole, counted = torch.zeros(12, 3), []

    @contextlib.contextmanager
    def watch(label, total):
        counted.append(total)
        yield counted.append

    read_pieces("m", files, pieces, {"w": whole}, None, watch)
    assert counted == [36, 24, 12]
    assert whole[8:].equal(second) and (whole[:8].equal(first)) == (heads == 0)
    for begin in range(12):
        for end in range(begin + 1, 13):
            part = torch.full((end - begin, 3), -1.0)
            read_pieces("m", files, pieces, {"w": None}, {"w": Shard(part, begin, 12)})
            assert part.equal(whole[begin:end]), (begin, end)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "holds NaN or an infinity; copy the model anew"), (float("inf"), "holds NaN or an infinity"),
        (1e6, "has values beyond float16; choose another --dtype"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_finite_is_named_with_its_file_and_the_remedy(value, told):
    tensor = torch.ones(4, 3)
    tensor[3, 1] = value
    with pytest.raises(DataError, match=f"the model: a file: q {told}"):
        rows = {"w": torch.zeros(4, 3).half()}
        read_pieces("the model", {"q": stored(tensor)}, {"q": Piece("w", 0, (4, 3), 0)}, rows, None)

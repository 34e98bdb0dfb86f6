"""Tensors of files in the rows of our parameters, and of their shards."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import DataError
from engine.formats.names import Piece
from engine.formats.pieces import read_pieces
from engine.formats.source import Source
from engine.formats.tensor_files import Stored
from engine.model.nf4_weight import NF4Weight
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_in_4_bits_is_quantised_from_the_dtype_of_the_model(dtype, monkeypatch):
    kept = []
    monkeypatch.setattr(NF4Weight, "store", lambda self, first, whole: kept.append((first, whole)))
    parameters, tensor = {"w": NF4Weight((4, 2), 64), "norm": torch.ones(1, dtype=dtype)}, torch.randn(6, 64)
    files = {"q": stored(tensor[:4]), "v": stored(tensor[4:])}
    pieces = {"q": Piece("w", 0, (4, 64), 0), "v": Piece("w", 4, (2, 64), 0)}
    read_pieces("m", files, pieces, parameters, None)
    assert [first for first, _ in kept] == [0, 4] and {whole.dtype for _, whole in kept} == {dtype}
    assert torch.cat([whole for _, whole in kept]).equal(tensor.to(dtype))


def test_a_model_of_another_shape_is_not_filled():
    source = Source("m", "hf", "its shape", torch.float32, {}, {})
    with pytest.raises(ValueError, match="read_into: the model is another, m holds its shape"):
        source.read_into(SimpleNamespace(config="another"))

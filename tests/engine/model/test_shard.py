"""Shards: which rows each holds."""

from itertools import pairwise

import pytest
import torch

from engine.model.shard import Shard, as_shards, first_row


def test_the_first_row_of_a_shard_is_torchs():
    for rows in range(1, 40):
        for shards in range(1, 9):
            ends = [first_row(rows, shards, i) for i in range(shards + 1)]
            sizes = [len(part) for part in torch.arange(rows).chunk(shards)]
            assert [b - a for a, b in pairwise(ends)] == sizes + [0] * (shards - len(sizes))


def test_a_plain_tensor_is_all_of_its_shard():
    tensor, shard = torch.empty(4, 2), Shard(torch.empty(1, 2), 1, 4)
    found = as_shards({"plain": tensor, "shard": shard})
    assert found["shard"] is shard and found["plain"].tensor is tensor and found["plain"].shape == (4, 2)


@pytest.mark.parametrize("first, held, rows", [(0, 4, None), (0, 4, 4), (0, 3, 4), (1, 3, 4), (3, 1, 4), (9, 0, 4)])
def test_a_shard_of_its_tensor(first, held, rows):
    shard = Shard(torch.empty(held, 2), first, rows)
    assert (shard.end, shard.shape) == (first + held, (rows or held, 2))


@pytest.mark.parametrize("first, held, rows", [(-1, 1, 4), (1, 4, 4), (4, 1, 4), (1, 4, None), (0, 5, 4)])
def test_a_shard_beyond_its_tensor_is_refused(first, held, rows):
    with pytest.raises(ValueError, match=rf"rows \[{first}, {first + held}\) of a tensor of shape"):
        Shard(torch.empty(held, 2), first, rows)

"""Shards: which rows each holds."""

from itertools import pairwise

import torch

from engine.model.shard import first_row


def test_the_first_row_of_a_shard_is_torchs():
    for rows in range(1, 40):
        for shards in range(1, 9):
            ends = [first_row(rows, shards, i) for i in range(shards + 1)]
            sizes = [len(part) for part in torch.arange(rows).chunk(shards)]
            assert [b - a for a, b in pairwise(ends)] == sizes + [0] * (shards - len(sizes))

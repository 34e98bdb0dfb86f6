"""Shards: which rows each holds."""

from itertools import pairwise

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.llama import new_model
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


@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_random_weights_are_norms_of_1_biases_of_0_and_matrices_however_they_are_sharded(n_shards):
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=48, vocab_size=61, attention_bias=True, mlp_bias=True
    )
    model, other = (new_model(config, "cpu", torch.float32) for _ in range(2))
    model.init_weights(5)
    whole = dict(model.named_parameters())
    for name, p in whole.items():
        if p.ndim == 1:
            assert bool((p == (1 if name.endswith("norm") else 0)).all()), name
        else:
            assert 0.018 < p.std() < 0.022 and p.mean().abs() < 0.002, name
    assert sum(p.ndim == 1 for p in whole.values()) == 1 + 6 * config.n_layers  # the norms, and four biases a layer
    for i in range(n_shards):
        first, end = {}, {}
        for name, p in whole.items():
            first[name], end[name] = (first_row(len(p), n_shards, i + more) for more in (0, 1))
        held = {name: torch.full_like(p[first[name] : end[name]], 9.0) for name, p in whole.items()}
        other.init_weights(5, {name: Shard(t, first[name], len(whole[name])) for name, t in held.items()})
        assert all(held[name].equal(p[first[name] : end[name]]) for name, p in whole.items())

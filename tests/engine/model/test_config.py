"""Shapes of a model: how long its texts may be, and how many parameters it has."""

from dataclasses import replace

import pytest
import torch

from engine.model.config import ROPE_KINDS, ModelConfig, RopeScaling
from engine.model.llama import new_model

SHAPE = ModelConfig(
    dim=12, n_layers=3, n_heads=2, n_kv_heads=1, hidden_dim=20, vocab_size=30, max_seq_len=100, head_dim=8
)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 2.005])
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_a_scaled_rope_carries_a_text_past_the_length_of_pretraining(kind, factor):
    """For llama3 and yarn that is a length of their own, for the others max_seq_len, which is always within reach."""
    assert SHAPE.max_positions == 100
    longest = {}
    for original in (40, 300):
        scaling = RopeScaling(factor, kind=kind, original_max_seq_len=original)
        longest[original] = replace(SHAPE, rope_scaling=scaling).max_positions
    of_pretraining = {n: n if kind in ("llama3", "yarn") else 100 for n in longest}
    assert longest == {n: max(100, int(factor * of_pretraining[n])) for n in longest}


@pytest.mark.parametrize("kind", [None, *ROPE_KINDS])
def test_only_a_dynamic_rope_turns_by_the_length_of_a_text_and_only_past_max_seq_len(kind):
    config = replace(SHAPE, rope_scaling=kind and RopeScaling(kind=kind))
    assert [config.turns_by_text_length(n) for n in (1, 100, 101)] == [False, False, kind == "dynamic"]


@pytest.mark.parametrize("more", [{}, {"tied": True}, {"attention_bias": True}, {"mlp_bias": True}, {"n_kv_heads": 2}])
def test_parameters_are_counted_as_the_model_has_them(more):
    config = replace(SHAPE, **more)
    assert config.n_parameters == sum(p.numel() for p in new_model(config, "meta", torch.float32).parameters())

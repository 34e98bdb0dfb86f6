"""Shapes of a model: how long its texts may be, and how many parameters it has."""

from dataclasses import replace

import pytest
import torch

from engine.model.config import MODELS, ROPE_KINDS, ModelConfig, RopeScaling
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


NAMED = {  # as their makers publish them: dim, layers, heads, key heads, hidden, vocabulary, length, eps, theta, tied
    "tiny": (64, 2, 4, 2, 192, 49152, 512, 1e-6, 1e4, True),
    "smollm2-135m": (576, 30, 9, 3, 1536, 49152, 8192, 1e-5, 1e5, True),
    "tinyllama-1.1b": (2048, 22, 32, 4, 5632, 32000, 2048, 1e-5, 1e4, False),
    "llama-7b": (4096, 32, 32, 32, 11008, 32000, 2048, 1e-6, 1e4, False),
    "llama-13b": (5120, 40, 40, 40, 13824, 32000, 2048, 1e-6, 1e4, False),
    "llama2-7b": (4096, 32, 32, 32, 11008, 32000, 4096, 1e-5, 1e4, False),
    "llama3-8b": (4096, 32, 32, 8, 14336, 128256, 8192, 1e-5, 5e5, False),
}


def test_the_named_models_are_those_that_their_makers_publish():
    found = {
        name: (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.hidden_dim, c.vocab_size, c.max_seq_len, c.norm_eps,
               c.rope_theta, c.tied)
        for name, c in MODELS.items()
    }  # fmt: skip
    assert found == NAMED
    for c in MODELS.values():
        assert c.head_dim == c.dim // c.n_heads and (c.rope_scaling, c.attention_bias, c.mlp_bias) == (
            None,
            False,
            False,
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"dim": 0, "vocab_size": "9"},
            "dim is 0, wanted a positive number; vocab_size is '9', wanted a positive number",
        ),
        ({"n_layers": 1.0}, "n_layers is 1.0, wanted a positive number"),
        ({"head_dim": None, "dim": 13}, "dim 13 must be a multiple of n_heads 2, or head_dim be given"),
        ({"head_dim": None, "dim": 6}, "head_dim is 3, wanted an even number: RoPE turns pairs"),
        ({"head_dim": 0}, "head_dim is 0, wanted an even number: RoPE turns pairs"),
        ({"n_heads": 3, "n_kv_heads": 2}, "n_heads 3 must be a multiple of n_kv_heads 2"),
        (
            {"head_dim": 2, "rope_scaling": RopeScaling(kind="dynamic")},
            "head_dim is 2, wanted 4 or more with dynamic RoPE",
        ),
        ({"head_dim": 2, "rope_scaling": RopeScaling(kind="linear")}, None),
        ({"head_dim": 4, "rope_scaling": RopeScaling(kind="dynamic")}, None),
        ({"rope_theta": 1, "rope_scaling": RopeScaling(kind="yarn")}, "rope_theta is 1, wanted more than 1 with yarn"),
        ({"rope_theta": 1}, None),
        (
            {"hidden_dim": -1, "rope_theta": 0.5, "rope_scaling": RopeScaling(kind="yarn")},
            "hidden_dim is -1, wanted a positive number; rope_theta is 0.5, wanted more than 1 with yarn",
        ),
    ],
)  # fmt: skip
def test_a_shape_that_no_model_has_is_told_with_every_problem(changes, told):
    if told is None:
        assert replace(SHAPE, **changes).n_layers == 3
        return
    with pytest.raises(ValueError) as error:
        replace(SHAPE, **changes)
    assert str(error.value) == told

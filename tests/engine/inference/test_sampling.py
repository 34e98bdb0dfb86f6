"""Which settings of a request leave the likeliest token as it is, and which make a draw of their own."""

from dataclasses import fields

import pytest
import torch

from engine.inference.sampling import Sampler, Sampling

CHANGES = {  # whatever the temperature
    "repetition_penalty": 1.5, "frequency_penalty": 0.1, "presence_penalty": -0.1, "bias": {0: 5.0},
    "temperature": 0.5, "n_logprobs": 0,
}  # fmt: skip
LEAVES = {"top_k": 1, "top_p": 0.5, "min_p": 0.5, "seed": 7}  # at temperature 0 the likeliest stays


def test_every_setting_of_a_request_is_heard_or_changes_nothing():
    """A token that is taken without the sampler must be what the sampler would draw."""
    assert {field.name for field in fields(Sampling)} == {*CHANGES, *LEAVES} and Sampling().is_greedy()
    assert [name for name, value in CHANGES.items() if Sampling(**{name: value}).is_greedy()] == []
    assert [name for name, value in LEAVES.items() if not Sampling(**{name: value}).is_greedy()] == []
    for name, value in LEAVES.items():
        logits = torch.tensor([0.0, 2.0, 1.9])
        assert Sampler(Sampling(**{name: value}), [1], logits.device).draw(logits).id == 1


@pytest.mark.parametrize("has_grammar", [True, False])
def test_a_grammar_is_always_asked(has_grammar):
    grammar = object() if has_grammar else None
    assert Sampler(Sampling(), [1], torch.device("cpu"), grammar).is_greedy() == (not has_grammar)

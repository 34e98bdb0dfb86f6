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


CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.5, -1.0, 0.5, -2.0])


@pytest.mark.parametrize(
    ("settings", "change"),  # of each token's logit; the prompt is 0, 2, the answer so far 1, 1, 4
    [
        ({}, [0, 0, 0, 0, 0]), ({"repetition_penalty": 2.0}, [-1.0, -0.75, -1.0, 0, -2.0]),
        ({"frequency_penalty": 0.5}, [0, -1.0, 0, 0, -0.5]), ({"presence_penalty": 0.5}, [0, -0.5, 0, 0, -0.5]),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.25}, [0, -1.25, 0, 0, -0.75]),
        ({"bias": {3: 4.0, 0: -1.0}}, [-1.0, 0, 0, 4.0, 0]),
    ],
)  # fmt: skip
def test_penalties_are_of_what_was_said_and_biases_of_what_they_name(settings, change):
    sampler = Sampler(Sampling(**settings), [0, 2, 0], CPU)
    sampler.counts = {1: 2, 4: 1}
    assert torch.allclose(sampler._adjust(LOGITS.clone()), LOGITS + torch.tensor(change))


P = torch.tensor([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]), ({"top_k": 3}, [0.4, 0.3, 0.2, 0]), ({"top_p": 0.7}, [0.4, 0.3, 0, 0]),
        ({"top_p": 0.71}, [0.4, 0.3, 0.2, 0]), ({"top_p": 1e-6}, [0.4, 0, 0, 0]), ({"min_p": 0.49}, [0.4, 0.3, 0.2, 0]),
        ({"min_p": 0.51}, [0.4, 0.3, 0, 0]), ({"min_p": 1.0}, [0.4, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [0.4, 0.3, 0, 0]),  # 0.7 of the 0.9 that stay is 0.78
        ({"top_k": 3, "top_p": 0.8}, [0.4, 0.3, 0.2, 0]), ({"top_k": 1, "min_p": 0.1}, [0.4, 0, 0, 0]),
    ],
)  # fmt: skip
def test_the_tokens_that_stay_have_their_probabilities(settings, kept, monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: drawn.append(p.clone()) or p.argmax()[None])
    id = Sampler(Sampling(temperature=0.5, **settings), [1], CPU)._draw_id(0.5 * P.log())
    assert id == 0 and torch.allclose(drawn[0], torch.tensor(kept), atol=1e-6)


class Grammar:
    """Forbids the likeliest token, and takes what is drawn."""

    def __init__(self):
        self.taken = []

    def mask(self, logits):
        logits[0] = float("-inf")

    def accept(self, id):
        self.taken.append(id)


@pytest.mark.parametrize("n_logprobs", [None, 0, 2, 99])
def test_log_probabilities_are_the_models_own_and_a_grammar_takes_each_token(n_logprobs):
    grammar = Grammar()
    sampling = Sampling(n_logprobs=n_logprobs, bias={3: 5.0}, presence_penalty=2.0)
    sampler = Sampler(sampling, [1], CPU, grammar)
    draws = [sampler.draw(LOGITS) for _ in range(2)]
    assert [draw.id for draw in draws] == grammar.taken == [3, 3] and sampler.counts == {3: 2}
    own = LOGITS.log_softmax(-1)
    for draw in draws:
        assert draw.logprob == (None if n_logprobs is None else pytest.approx(own[3].item()))
        order = [0, 1, 3, 2, 4][: n_logprobs or 0]
        assert [id for id, _ in draw.likeliest] == order
        assert [p for _, p in draw.likeliest] == pytest.approx(own[order].tolist())

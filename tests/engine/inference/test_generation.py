"""One token is drawn from what its settings leave of the model's distribution."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from engine.inference import generation
from engine.inference.decoder import MAX_ROWS
from engine.inference.generation import generate, sample
from engine.model.config import ModelConfig
from engine.model.llama import new_model

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


@pytest.mark.parametrize(
    "top_p, left",
    [(1.0, {0, 1, 2, 3}), (0.91, {0, 1, 2, 3}), (0.89, {1, 2, 3}), (0.74, {1, 3}), (0.49, {1}), (1e-6, {1})],
)
def test_the_fewest_tokens_that_hold_a_probability_are_left(top_p, left):
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(sample(LOGITS, 1.0, top_p, generator) for _ in range(400))
    assert set(drawn) == left
    whole = sum(float(LOGITS[i].exp()) for i in left)
    for i in left:
        assert drawn[i] / 400 == pytest.approx(float(LOGITS[i].exp()) / whole, abs=0.1)


def test_tokens_that_hold_just_the_probability_are_enough():
    """Of four as likely as each other, whose probabilities are exact, the first two hold a half."""
    generator = torch.Generator().manual_seed(0)
    assert {sample(torch.zeros(4), 1.0, 0.5, generator) for _ in range(60)} == {0, 1}


def test_the_temperature_sharpens_and_0_is_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    assert {sample(LOGITS, 0.0, 1.0, generator) for _ in range(20)} == {1}
    cold, hot = (Counter(sample(LOGITS, t, 1.0, generator) for _ in range(400))[1] / 400 for t in (0.5, 100.0))
    assert cold == pytest.approx(0.25 / 0.345, abs=0.08) and hot == pytest.approx(0.25, abs=0.08)


def test_more_sequences_than_the_decoder_has_room_for_go_through_the_model(monkeypatch):
    """And through the decoder as soon as so few are left that it has."""
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    model, decoded, count = new_model(shape, "cpu", torch.float32, "ref"), [], iter(range(10**6))
    model.init_weights(0)

    def next_logits(tokens, rows):
        decoded.append(list(rows))
        return torch.zeros(len(rows), shape.vocab_size)

    monkeypatch.setattr(generation, "find_decoder", lambda model, cache: SimpleNamespace(next_logits=next_logits))
    monkeypatch.setattr(generation, "sample", lambda *given: 1 if next(count) == MAX_ROWS + 1 else 5)
    answers = generate(model, [[3, 4]] * (MAX_ROWS + 1), {1}, 3)
    assert [len(answer) for answer in answers] == [1, *[3] * MAX_ROWS]
    assert decoded == [list(range(1, MAX_ROWS + 1))]


def test_a_sampled_answer_is_the_same_whatever_is_asked_beside_it():
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    model = new_model(shape, "cpu", torch.float32, "ref")
    model.init_weights(0)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    together = generate(model, prompts, (), 12, temperature=1.0, seed=5)
    assert together == [generate(model, [prompt], (), 12, temperature=1.0, seed=5)[0] for prompt in prompts]
    assert together != generate(model, prompts, (), 12, temperature=1.0, seed=6)

"""One token is drawn from what its settings leave of the model's distribution."""

from collections import Counter

import pytest
import torch

from engine.inference.generation import sample

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


def test_the_temperature_sharpens_and_0_is_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    assert {sample(LOGITS, 0.0, 1.0, generator) for _ in range(20)} == {1}
    cold, hot = (Counter(sample(LOGITS, t, 1.0, generator) for _ in range(400))[1] / 400 for t in (0.5, 100.0))
    assert cold == pytest.approx(0.25 / 0.345, abs=0.08) and hot == pytest.approx(0.25, abs=0.08)

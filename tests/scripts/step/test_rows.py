"""Rows of measured steps: Alpaca's lengths, shared stems, targets."""

import numpy as np
import pytest

from engine.model.config import MODELS
from kernels.measure.alpaca import alpaca_lengths
from scripts.step import rows as step_rows


def test_rows_are_alpacas_and_logical_tokens_leave_out_padding():
    rows = step_rows.alpaca_rows(3, smoke=False)
    assert len(rows) == 3 * 128 and rows.lengths().max() <= 512
    alpaca = alpaca_lengths()
    prompt, response, has_input = alpaca.prompt, alpaca.response, alpaca.has_input
    mean = np.minimum(512, prompt + response).mean()
    assert rows.lengths().mean() == pytest.approx(mean, rel=0.1)
    assert rows.loss_tokens().min() > 0
    for example in (0, 200, 383):
        i = int(rows.sources[example])
        n = min(512, prompt[i] + response[i])
        assert rows.is_target_of(example).tolist() == [False] * prompt[i] + [True] * (n - prompt[i])
    stems = {tuple(rows.tokens_of(e)[: alpaca.shared_prefix[has_input[int(rows.sources[e])]]]) for e in range(100)}
    assert len(stems) == 2
    again = step_rows.alpaca_rows(5, smoke=False)  # the same rows first, whatever the number of steps
    assert (again.lengths()[:384] == rows.lengths()).all() and (again.tokens[:100] == rows.tokens[:100]).all()


@pytest.mark.parametrize("most", [40, 512])
def test_every_row_of_a_step_keeps_a_response(most, monkeypatch):
    monkeypatch.setattr(step_rows, "MAX_LENGTH", most)
    rows = step_rows.alpaca_rows(3, smoke=False)
    assert rows.loss_tokens().min() > 0 and rows.lengths().max() <= most and len(rows) == 3 * 128


def test_a_model_is_the_one_that_is_named_and_steps_take_rows_in_turn():
    for name, shape in MODELS.items():
        assert step_rows.model_shape(name, smoke=False) is shape and step_rows.model_shape(name, True) is step_rows.TOY
    for smoke in (True, False):
        n = step_rows.rows_a_step(smoke)
        taken = np.concatenate([step_rows.examples_of_step(step, smoke) for step in (1, 2, 3)])
        assert taken.tolist() == list(range(3 * n))


def test_rows_of_a_smoke_run_are_short_and_of_many_lengths():
    """Some are cut, not all."""
    rows = step_rows.alpaca_rows(4, smoke=True)
    assert len(rows) == 4 * 6 and rows.tokens.max() < 256 and rows.tokens.min() >= 0
    assert rows.lengths().max() == 64 and 0 < (rows.lengths() == 64).sum() < 12 and rows.loss_tokens().min() > 0

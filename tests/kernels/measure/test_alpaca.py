"""The lengths of Alpaca's rows: their figures, and that nobody changes what all share."""

import pytest

from kernels.measure.alpaca import ALPACA_ROWS, LENGTHS, alpaca_lengths


def test_the_figures():
    alpaca = alpaca_lengths()
    assert len(alpaca) == len(alpaca.response) == len(alpaca.has_input) == 9229 < ALPACA_ROWS
    assert alpaca.shared_prefix == (29, 39) and set(alpaca.has_input) == {0, 1}
    assert (alpaca.prompt.mean(), alpaca.response.mean()) == pytest.approx((61.36, 66.13), abs=0.01)
    assert (alpaca.prompt >= 29 + 10 * alpaca.has_input).all()
    assert LENGTHS.stat().st_size < 100_000


def test_callers_cannot_change_what_they_share():
    assert alpaca_lengths() is alpaca_lengths()
    with pytest.raises(ValueError, match="read-only"):
        alpaca_lengths().prompt[0] = 1

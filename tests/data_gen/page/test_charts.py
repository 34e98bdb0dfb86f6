"""Ticks of charts are round numbers within the axis."""

import pytest

from data_gen.page.charts import choose_log_ticks, choose_ticks


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (1, 59, [1, 2, 5, 10, 20, 50]), (1, 60, [1, 3, 10, 30]), (1, 2999, [1, 3, 10, 30, 100, 300, 1000]),
        (1, 3000, [1, 10, 100, 1000]), (0.2, 10, [0.2, 0.5, 1, 2, 5, 10]), (3, 3, []),
    ],
)  # fmt: skip
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    assert choose_log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    "low, high, ticks", [(0, 5, [0, 1, 2, 3, 4, 5]), (0.1, 0.9, [0.2, 0.4, 0.6, 0.8]), (-2, 2, [-2, -1, 0, 1, 2])]
)
def test_ticks_of_an_axis(low, high, ticks):
    assert choose_ticks(low, high) == pytest.approx(ticks)

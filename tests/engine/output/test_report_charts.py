"""Axes of the report's charts: round numbers, and what is to be shown lies within."""

import pytest

from engine.output.report_charts import choose_ticks, round_up_nicely


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (90, 100, [90, 95, 100]), (-1, 3, [-1, 0, 1, 2, 3]), (0.001, 0.0011, [0.001, 0.00105, 0.0011]),
        (5, 5, [0, 2, 4, 6]), (-5, -5, [-6, -4, -2, 0, 2]), (0, 0, [0, 0.5, 1]),
    ],
)  # fmt: skip
def test_ticks_of_an_axis_reach_from_end_to_end(low, high, ticks):
    found, bottom, top = choose_ticks(low, high, log=False)
    assert found == pytest.approx(ticks) and (bottom, top) == (found[0], found[-1]) and bottom <= low <= high <= top


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (1, 100, [1, 2, 5, 10, 20, 50, 100]), (2, 3, [2]), (1, 10**6, [10**i for i in range(7)]),
        (1, 10**12, [10**i for i in range(0, 13, 2)]), (1.1, 4.5, [1, 2, 5]),
    ],
)  # fmt: skip
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    found, bottom, top = choose_ticks(low, high, log=True)
    assert found == pytest.approx(ticks) and (bottom, top) == pytest.approx((low / 1.2, high * 1.2))


@pytest.mark.parametrize("width, round_width", [(1, 1), (1.1, 2), (2, 2), (2.1, 5), (5, 5), (5.1, 10), (0.03, 0.05)])
def test_a_width_is_rounded_up(width, round_width):
    assert round_up_nicely(width) == pytest.approx(round_width)

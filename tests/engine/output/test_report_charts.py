"""Axes of the report's charts: round numbers, and what is to be shown lies within."""

import pytest

from engine.output.report_charts import POINTS, choose_ticks, draw_path, round_up_nicely, smooth_points, thin_points


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


def test_a_thinned_curve_keeps_every_spike_and_dip():
    points = [(step, 1.0) for step in range(5 * POINTS)]
    for step, value in ((1234, 9.0), (4321, -9.0), (77, None)):
        points[step] = step, value
    kept = thin_points(points)
    assert len(kept) <= POINTS and {(1234, 9.0), (4321, -9.0)} <= set(kept) and kept == sorted(kept)
    assert thin_points(points[:POINTS]) == points[:POINTS]


def test_a_smoothed_point_is_the_mean_around_it():
    """A 20th of the run on both sides together; a gap stays one, and counts in no mean."""
    points = [(step, float(step**2)) for step in range(80)]
    points[50] = 50, None
    smoothed = smooth_points(points)["smoothed"]
    assert smoothed[40][1] == pytest.approx(sum(step**2 for step in range(38, 43)) / 5) and smoothed[50][1] is None
    assert smoothed[49][1] == pytest.approx((47**2 + 48**2 + 49**2 + 51**2) / 4)
    assert smoothed[0][1] == pytest.approx((0 + 1 + 4) / 3)


def test_a_point_between_two_gaps_is_marked_since_it_has_no_line():
    points = [(0.0, 0.1), (0.1, None), (0.2, 0.3), (0.3, None), (0.4, 0.5), (0.5, 0.6)]
    assert draw_path(points, False) == ("M0.0 100.0M200.0 300.0M400.0 500.0L500.0 600.0", [(0.0, 0.1), (0.2, 0.3)])
    assert len(draw_path(points, True)[1]) == 4

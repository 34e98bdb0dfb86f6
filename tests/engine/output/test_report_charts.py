"""Axes of the report's charts: round numbers, and what is to be shown lies within."""

import pytest

from engine.output import report_charts
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


def test_charts_of_odd_values(snapshot, monkeypatch):
    """Of many points, of one, with gaps, on a log axis, from zero on, and of none."""
    monkeypatch.setattr(report_charts, "POINTS", 8)
    wave = [(step, None if step % 7 == 0 else float(step * step % 11)) for step in range(1, 90)]
    charts = {
        "thinned": (smooth_points(wave), False), "one": ({"train": [(5, 2.5)]}, True), "none": ({"train": []}, False),
        "log": ({"train": [(1, 1000.0), (2, 3.0), (40, 0.5)], "eval": [(0, 20.0), (40, 1.0)]}, False),
        "zero": ({"train": [(1000, 20000.0), (25000, 15000.0)]}, True),
        "below": ({"train": [(1, -2.0), (2, 1.0)]}, True),
    }  # fmt: skip
    drawn = [report_charts.render_chart(name, series, zero) for name, (series, zero) in charts.items()]
    assert "\n".join(drawn).replace("><", ">\n<") == snapshot


@pytest.mark.parametrize(
    ("values", "zero", "log"),
    [
        ([1.0, 20.0], False, False), ([1.0, 20.1], False, True),
        ([0.0, 500.0], False, False), ([-1.0, 500.0], False, False),
        ([1.0, 20.1, 20.1], True, False), ([1.0, 1.0, 20.1], True, True), ([1.0, 1.5, 30.0], True, False),
    ],
)  # fmt: skip
def test_an_axis_is_logarithmic_where_the_largest_is_over_20_times_the_least_or_the_median(values, zero, log):
    points = list(enumerate(values))
    assert ("log scale" in report_charts.render_chart("x", {"train": points}, zero)) == log

"""Ticks of charts are round numbers within the axis, and the rings of a sunburst are whole."""

import math
import re

import pytest

from data_gen.page import charts
from data_gen.page.charts import choose_log_ticks, choose_ticks, draw_arc_label
from data_gen.page.verbs import Verb
from tests.helpers.report_page import body_lines


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


@pytest.mark.parametrize("sweep, is_drawn", [(0.02, False), (0.5, True)])
def test_a_label_that_is_too_small_to_read_is_left_out(sweep, is_drawn):
    label = draw_arc_label("a <b>", 1.0, sweep, 60, 120)
    assert (label != "") == is_drawn and ("a &lt;b&gt;" in label) == is_drawn


def test_a_label_is_never_upside_down():
    for start in range(7):
        turn = float(re.search(r"rotate\(([-.\d]+)\)", draw_arc_label("ab", start, 0.5, 60, 120))[1])
        assert -90 <= turn <= 90 or 270 <= turn <= 450


@pytest.mark.parametrize("ring, eighths", [("inner", [5, 3]), ("outer", [5, 2, 1])])
def test_the_arcs_of_a_ring_follow_each_other_once_around(ring, eighths, monkeypatch):
    """The widest verb first, and its objects beside it."""
    arcs = []
    monkeypatch.setattr(
        charts, "draw_arc", lambda start, sweep, a, b, kind, tip: arcs.append((kind, start, sweep)) or ""
    )
    charts.draw_sunburst("title", [Verb("give", 9, [("idea", 2), ("tip", 1)]), Verb("write", 7, [("poem", 5)])], "")
    found = [(start, sweep) for kind, start, sweep in arcs if kind == ring]
    starts = [sum(eighths[:n]) for n in range(len(eighths))]
    assert found == [
        pytest.approx((start * math.pi / 4, n * math.pi / 4)) for start, n in zip(starts, eighths, strict=True)
    ]


def test_a_bar_names_its_share_of_the_total_and_is_as_long_as_it_is_beside_the_longest():
    html = charts.draw_bars([("a", 6, ""), ("b", 3, "")], 12)
    assert re.findall(r"<small>([^<]*)</small>", html) == ["50.0%", "25.0%"]
    assert re.findall(r'width="([\d.]+)%" height', html) == ["100.00", "50.00"]


WHOLE = {
    "few bins": charts.Histogram("A", [(1, 2, 3), (2, 4, 0), (4, 8, 1)], "words", [(2.5, "median 2"), (9, "95%")]),
    "limit": charts.Histogram("B", [(0.0, 0.5, 2), (0.5, 1.0, 7)], "similarity", limit=(0.7, "limit <0.7>"), note="n"),
    "logarithm": charts.Histogram("C", [(1, 10, 900), (10, 100, 12), (100, 3000, 1)], "rows & words", is_log=True),
}


@pytest.mark.parametrize("name", WHOLE)
def test_histograms_are_kept_whole(name, snapshot):
    assert body_lines(WHOLE[name].draw()) == snapshot


def test_other_charts_are_kept_whole(snapshot):
    verbs = [Verb(f"verb{i}", 30 - i, [("noun", 9 - i % 3), ("a very long word indeed", 2)]) for i in range(23)]
    drawn = [
        charts.draw_curves("D", [("a", [2.0, None]), ("b", [None, 0.5]), ("c", [3.5, 1.5])], ["x", "<y>"], "unit", "n"),
        charts.draw_curves("E", [("a", [0.25])], ["x"], "unit"),
        charts.draw_sunburst("F", verbs, "note"),
        charts.draw_sunburst("G", [Verb("only", 5, [("one", 5)])], ""),
        charts.draw_bars([("a", 0, ""), ("b", 1000, "<p>more</p>"), ("c", 2, "")], 1002, "tall"),
        charts.draw_bars([], 0),
    ]
    assert body_lines("\n".join(drawn)) == snapshot


def test_axes_are_kept(snapshot):
    counts = [
        (high, charts.choose_counting_axis(high, whole)) for high in (0, 1, 3, 7, 40, 999) for whole in (True, False)
    ]
    small = [(high, charts.choose_counting_axis(high, False)) for high in (0.03, 0.5, 0.99)]
    plain = [(low, high, choose_ticks(low, high)) for low, high in ((0, 1), (3, 17), (0.7, 1), (95, 1200))]
    logs = [
        (low, high, choose_log_ticks(low, high)) for low, high in ((1, 5), (2, 59), (1, 60), (1, 2999), (7, 30_000))
    ]
    assert "\n".join(map(str, [*counts, *small, *plain, *logs])) + "\n" == snapshot

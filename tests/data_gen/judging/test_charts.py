"""The figure of win rates by length: a point for each group of pairs, within the axis."""

import re

import pytest

from data_gen.judging.charts import BINS, draw_lengths


@pytest.mark.parametrize("gaps", [[], [5], [5, 5, 5]])
def test_equal_lengths_have_no_figure(gaps):
    assert draw_lengths("t", gaps, [1.0] * len(gaps), "") == ""


@pytest.mark.parametrize("shift", [-100, 0, 100])
def test_each_group_is_a_point(shift):
    gaps = [shift + 10 * i for i in range(2 * BINS)]
    html = draw_lengths("Lengths", gaps, [float(i % 4 > 1) for i in range(2 * BINS)], "a note")
    points = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)%"', html)]
    assert len(points) == BINS and [y for _, y in points] == [100.0, 0.0] * (BINS // 2) + [100.0] * (BINS % 2)
    means = [shift + 20 * i + 5 for i in range(BINS)]
    low, high = min(*means, 0), max(*means, 0)
    edge = 0.05 * (high - low)
    wanted = [100 * (mean - low + edge) / (high - low + 2 * edge) for mean in means]
    assert [x for x, _ in points] == pytest.approx(wanted, abs=0.01)
    (zero,) = re.findall(r'class="quantile" x1="([-\d.]+)%"', html)
    assert float(zero) == pytest.approx(100 * (edge - low) / (high - low + 2 * edge), abs=0.01)
    first = f"{gaps[0]:+,} to {gaps[1]:+,} characters: 0% of 2"
    assert first in html and "2 pairs each" in html and "a note" in html

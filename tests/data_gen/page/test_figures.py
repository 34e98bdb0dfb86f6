"""Bins of histograms."""

from itertools import pairwise

import pytest

from data_gen.page.figures import bin_evenly, bin_whole_numbers, count_kinds, find_percentile
from data_gen.page.run_files import Row


@pytest.mark.parametrize("values", [[1], [7] * 5, [1, 2], [3, 3, 1000], list(range(1, 400)), [1, 10**7], [250, 251]])
def test_bins_hold_every_value_once(values):
    bins, _ = bin_whole_numbers(values)
    assert sum(n for _, _, n in bins) == len(values)
    assert all(n == sum(a <= v < b for v in values) and a < b for a, b, n in bins)
    assert all(x[1] == y[0] for x, y in pairwise(bins)) and 2 < len(bins) < 60


def test_even_bins_take_what_lies_outside_into_the_nearest():
    values = [-0.3, 0.0, 0.1, 0.2, 0.29999999999, 0.55, 1.0, 1.7]
    assert bin_evenly(values, 0.0, 1.0, 0.25) == [(0.0, 0.25, 4), (0.25, 0.5, 1), (0.5, 0.75, 1), (0.75, 1.0, 2)]
    assert bin_evenly([0.3 - 1e-9], 0.0, 0.6, 0.3) == [(0.0, 0.3, 0), (0.3, 0.6, 1)], "0.3 as arithmetic has it"


def test_outputs_are_compared_without_the_blanks_around_them():
    rows = [Row("Name it.", "", output, None, None, "") for output in ("a b", " a b\n", "c d")]
    assert count_kinds(rows) == [("output seen in another row", 2)]


@pytest.mark.parametrize("share, value", [(0.5, 5), (0.51, 6), (0.95, 10), (0.9, 9), (0.01, 1), (1, 10)])
def test_a_percentile_is_not_exceeded_by_its_share(share, value):
    assert find_percentile(range(1, 11), share) == value

"""Bins of histograms."""

from itertools import pairwise

import pytest

from data_gen.page.figures import bin_whole_numbers


@pytest.mark.parametrize("values", [[1], [7] * 5, [1, 2], [3, 3, 1000], list(range(1, 400)), [1, 10**7], [250, 251]])
def test_bins_hold_every_value_once(values):
    bins, _ = bin_whole_numbers(values)
    assert sum(n for _, _, n in bins) == len(values)
    assert all(n == sum(a <= v < b for v in values) and a < b for a, b, n in bins)
    assert all(x[1] == y[0] for x, y in pairwise(bins)) and 2 < len(bins) < 60

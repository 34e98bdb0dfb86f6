"""The distance between two loss curves, by which parity is claimed."""

import pytest

from scripts.parity.curves import worst_difference


def test_the_worst_step_of_each_figure_counts_above_the_reference_or_below_it():
    reference = [(2.0, 10.0), (4.0, 10.0), (1.0, 10.0)]
    for curve, worst in (
        (reference, (0.0, 0.0)), ([(2.0, 10.0), (4.4, 9.0), (1.0, 10.5)], (0.1, 0.1)),
        ([(1.0, 10.0), (4.4, 10.0), (1.0, 12.5)], (0.5, 0.25)),
    ):  # fmt: skip
        assert worst_difference(curve, reference) == pytest.approx({"loss": worst[0], "grad_norm": worst[1]})


def test_a_curve_of_another_length_has_no_distance():
    with pytest.raises(ValueError):
        worst_difference([(1.0, 1.0)], [(1.0, 1.0), (1.0, 1.0)])

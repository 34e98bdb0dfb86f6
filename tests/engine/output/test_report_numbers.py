"""Numbers and texts of report.html, as a reader sees them."""

import pytest

from engine.output.report_numbers import (
    TEXT_CHARS,
    clip_text,
    finite_number,
    format_figure,
    format_si,
    format_tick,
    format_time,
    read_column,
)


@pytest.mark.parametrize(
    "value, seen",
    [
        (None, "-"), (0, "0.0000"), (0.00999, "0.00999"), (-0.00999, "-0.00999"), (0.01, "0.0100"), (-0.01, "-0.0100"),
        (999.9, "999.9000"), (1000, "1,000"), (-1234.5, "-1,234"), (1e7, "10,000,000"), (1e-9, "1e-09"),
    ],
)  # fmt: skip
def test_a_figure_has_the_digits_that_a_reader_needs(value, seen):
    assert format_figure(value) == seen


@pytest.mark.parametrize(
    "value, highest, seen",
    [
        (9000, 9999, "9,000"), (9000, 10000, "9k"), (0, 10000, "0"), (0.001, 0.01, "0.001"), (0.0009, 0.01, "0.0009"),
        (0.00012345, 1, "0.000123"), (1234.5678, 5000, "1,234.57"), (-0.0005, 1, "-0.0005"),
    ],
)  # fmt: skip
def test_a_tick(value, highest, seen):
    assert format_tick(value, highest) == seen


@pytest.mark.parametrize(
    "value, seen",
    [
        (999, "999"), (1000, "1k"), (-1000, "-1k"), (999_000, "999k"), (10**6, "1M"), (10**9, "1G"), (10**12, "1T"),
        (1234, "1.23k"), (0.5, "0.5"),
    ],
)  # fmt: skip
def test_a_number_with_a_letter(value, seen):
    assert format_si(value) == seen


@pytest.mark.parametrize(
    "seconds, seen",
    [
        (None, "-"), (0, "-"), (0.04, "0.0s"), (59.4, "59.4s"), (59.6, "1m 00s"), (61, "1m 01s"), (3599, "59m 59s"),
        (3600, "1h 00m"), (90061, "25h 01m"),
    ],
)  # fmt: skip
def test_a_time(seconds, seen):
    assert format_time(seconds) == seen


def test_a_long_text_is_cut_with_a_note():
    assert clip_text("x" * TEXT_CHARS) == "x" * TEXT_CHARS
    assert clip_text("x" * (TEXT_CHARS + 1234)) == "x" * TEXT_CHARS + " … (1,234 characters more)"


@pytest.mark.parametrize("value", [True, False, None, "1", [1], float("nan"), float("inf"), -float("inf"), 1.1e300])
def test_what_is_no_finite_number_is_a_gap(value):
    assert finite_number(value) is None
    assert read_column([{"step": 3, "loss": value}, {"step": 4}, {"step": 5, "loss": -2}], "loss") == [
        (3, None), (4, None), (5, -2)
    ]  # fmt: skip

"""Values as texts and numbers, and numbers as people read them."""

import pytest

from data_gen.page.formatting import (
    as_number,
    as_text,
    clip_text,
    format_dollars,
    format_duration,
    format_percent,
    format_rows,
    shorten_number,
)


@pytest.mark.parametrize("value, text", [("a\n", "a\n"), ("", ""), (None, ""), (5, "5"), ({"é": [1]}, '{"é": [1]}')])
def test_any_value_is_a_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    "value, number",
    [(0, 0), (1.5, 1.5), (10**15, 10**15), (10**15 + 1, None), (-(10**15), -(10**15)), (-(10**15) - 1, None),
     (True, None), ("1", None), (None, None), (float("nan"), None), (float("inf"), None)],
)  # fmt: skip
def test_a_finite_number_of_credible_size(value, number):
    assert as_number(value) == number


@pytest.mark.parametrize(
    "call, arguments, text",
    [
        (clip_text, ("abc", 3), "abc"), (clip_text, ("abcd", 3), "abc … (1 characters more)"),
        (format_rows, (1,), "1 row"), (format_rows, (0,), "0 rows"), (format_rows, (52_000,), "52,000 rows"),
        (format_percent, (0, 5), "0%"), (format_percent, (0, 0), "0%"), (format_percent, (1, 1001), "<0.1%"),
        (format_percent, (1, 1000), "0.1%"), (format_percent, (1, 8), "12.5%"), (format_percent, (8, 8), "100%"),
        (format_percent, (9996, 10000), "100%"), (format_percent, (9994, 10000), "99.9%"),
        (format_dollars, (1234.5,), "$1,234.50"), (format_dollars, (0.1,), "$0.10"), (format_dollars, (0.05,), "$0.05"),
        (format_dollars, (0.0012,), "$0.0012"), (format_dollars, (0,), "$0.00"), (format_dollars, (0.0999,), "$0.1"),
        (format_duration, (5.64,), "5.6s"), (format_duration, (59.6,), "1m 00s"), (format_duration, (184,), "3m 04s"),
        (format_duration, (3720,), "1h 02m"), (shorten_number, (999,), "999"), (shorten_number, (1500,), "1.5k"),
        (shorten_number, (1234,), "1,234"), (shorten_number, (12_345,), "12.3k"), (shorten_number, (2_000_000,), "2M"),
        (shorten_number, (3e9,), "3G"), (shorten_number, (-1000,), "-1k"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(call, arguments, text):
    assert call(*arguments) == text

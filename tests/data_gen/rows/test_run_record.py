"""What run.json and the end of a run say."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen.rows.run_record import format_ranges


@pytest.mark.parametrize(
    ("numbers", "most", "text"),
    [
        ([], None, ""), ([3], None, "3"), ([3, 7, 8, 9, 11], None, "3, 7-9, 11"), ([0, 1, 3, 4], 2, "0-1, 3-4"),
        ([0, 2, 4], 2, "0, 2 ..."),
    ],
)  # fmt: skip
def test_numbers_are_told_as_ranges(numbers, most, text):
    assert format_ranges(numbers, most) == text

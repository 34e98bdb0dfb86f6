"""Time: whatever reads a stranger's text takes a time that grows as a line does, and with a small factor.

python -m tests.helpers.readers prints the table.
"""

import re

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from tests.helpers import hostile
from tests.helpers.readers import READERS, find_patterns, list_all_units, measure_reader


@pytest.mark.parametrize("name", READERS)
def test_time_grows_as_a_line_does(name):
    for unit, _, wrong in measure_reader(name):
        assert not wrong, f"{unit!a}: {wrong}"


def test_every_pattern_gives_texts():
    patterns, units = find_patterns(), set(list_all_units())
    assert len(patterns) > 60 and len(units) > 500
    for name, pattern in patterns.items():
        assert hostile.list_units(pattern, 3) or pattern.match(""), name


@pytest.mark.parametrize("pattern, read", [
    (r"a+b", "search"), (r"\n\s*\S", "search"), (r"(?:a|a)+$", "match"), ("\u201e[^\u201c]{2,2000}\u201c", "search"),
    (r"(\w+\s?)*\.", "search"),
])  # fmt: skip
def test_a_pattern_that_takes_too_long_is_seen(pattern, read):
    """Otherwise this test's other halves would show nothing."""
    compiled = re.compile(pattern)
    call, units = getattr(compiled, read), hostile.list_units(compiled, 40)
    short = [unit for unit in units if hostile.measure_cpu_s(call, hostile.build_text(*unit, 20), times=1) < 0.05]
    slow = len(short) < len(units)  # not even 20 characters are read
    for unit in [] if slow else hostile.find_worst(call, units, 18):
        for n in (24, 5000):
            seconds = hostile.measure_growth(call, unit, n) if n > 24 else [hostile.measure_cpu_s(call, "a" * 24)]
            slow = slow or seconds[-1] > 1 or bool(hostile.describe_growth(seconds, 4 * n))
    assert slow

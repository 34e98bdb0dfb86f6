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


@pytest.mark.parametrize("pattern, n", [(r"a+b", 4000), (r"\n\s*\S", 1500), (r"[a-z]+ ?x", 1500)])
def test_a_pattern_that_takes_too_long_is_seen(pattern, n):
    """Otherwise the other tests would show nothing."""
    compiled = re.compile(pattern)
    worst = hostile.find_worst(compiled.search, hostile.list_units(compiled, 40), 400)
    assert any(hostile.describe_growth(hostile.measure_growth(compiled.search, unit, n), 4 * n) for unit in worst)


def test_a_line_that_is_too_steep_is_seen():
    words = hostile.measure_word_s(20_000)
    for factor, seen in ((3 * hostile.FACTOR, True), (hostile.FACTOR / 3, False)):
        assert bool(hostile.describe_growth([words * factor * k for k in (0.25, 1)], 20_000)) is seen

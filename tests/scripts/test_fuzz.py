"""Damaged files of every kind: refused or read as before, never wrongly, never another error."""

import pytest

from scripts.fuzz import READERS, Reader, fuzz


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_or_harmless(name, tmp_path):
    tally = fuzz(READERS[name], tmp_path, seed=1, more=lambda n: n < 80)
    assert tally.faults == []
    assert tally.counts["tried"] == 80 and tally.slowest < 60


def test_what_the_fuzz_finds(tmp_path):
    """A reader that believes its file, and one that falls over it."""
    make = lambda folder: (folder / "a.json").write_text('{"a": [1, 2]}') and None  # noqa: E731
    tally = fuzz(
        Reader(make, lambda folder: (folder / "a.json").read_bytes(), ("a.json",)), tmp_path, 0, lambda n: n < 20
    )
    assert tally.counts["wrong"] == 20 and "read otherwise" in tally.faults[0]
    tally = fuzz(
        Reader(make, lambda folder: 1 // len((folder / "a.json").read_text()[-1:])), tmp_path, 0, lambda n: n < 60
    )
    assert tally.counts["error"] and any("ZeroDivisionError" in fault for fault in tally.faults)

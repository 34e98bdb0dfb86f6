"""Damaged files of every kind: refused or read as before, never wrongly, never another error."""

import sys
from collections import Counter

import pytest

import scripts.fuzz
from scripts.fuzz import READERS, Reader, Tally, fuzz


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


@pytest.mark.parametrize("bad", [None, *range(3)])
@pytest.mark.parametrize("kind", ["fault", "slow"])
def test_one_reader_that_is_not_sound_makes_the_exit_code(kind, bad, monkeypatch, capsys):
    """Whichever of them it is."""
    tallies = iter([
        Tally(Counter(tried=9), 99.0 if i == bad and kind == "slow" else 0.1,
              ["x: broke"] if i == bad and kind == "fault" else [])
        for i in range(3)
    ])  # fmt: skip
    monkeypatch.setattr(scripts.fuzz, "READERS", dict.fromkeys("abc"))
    monkeypatch.setattr(scripts.fuzz, "fuzz", lambda *_: next(tallies))
    monkeypatch.setattr(sys, "argv", ["fuzz"])
    assert scripts.fuzz.main() == (bad is not None)
    assert ("x: broke" in capsys.readouterr().out) == (bad is not None and kind == "fault")

"""What every measurement's figures go through: summaries, ratios taken in turn, and the file on the disk."""

import itertools
import json
import os

import numpy as np
import pytest

from scripts.base import results
from scripts.base.results import format_mfu, summarize, summarize_ratios, write_json


def test_repeated_measurements_are_told_by_their_median_and_extremes():
    for order in itertools.permutations([3.0, 1.0, 100.0]):
        assert summarize(iter(order)) == {"median": 3.0, "min": 1.0, "max": 100.0}


def test_ratios_are_of_the_first_over_the_second_round_by_round():
    """A slow round slows both; the medians of each alone would say something else."""
    assert summarize_ratios([10.0, 2.0, 9.0], [5.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    with pytest.raises(ValueError):
        summarize_ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"mfu": 0.4}, "40.0%"), ({"mfu": 0.4, "effective_mfu": 0.4}, "40.0%"),
        ({"mfu": 0.4, "effective_mfu": 0.5}, "40.0% (50.0% effective)"), ({"mfu": 0.4, "effective_mfu": None}, "40.0%"),
    ],
)  # fmt: skip
def test_the_effective_mfu_stands_beside_the_other_and_never_alone(record, text):
    assert format_mfu(record) == text


def test_figures_are_written_whole_or_not_at_all_in_a_folder_of_their_own(tmp_path):
    path = tmp_path / "new" / "newer" / "figures.json"
    write_json(path, {"a": np.float32(0.5), "b": [np.int64(2)]})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [2.0]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 0.5 and [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_file_whose_writing_is_cut_short_is_the_old_one(broken, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, broken, lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == [path.name]


CPUINFO = "processor : 0\nmodel name\t: A Chip: @ 2 GHz\nflags : a\nmodel name\t: Another\n"


@pytest.mark.parametrize(
    ("text", "name"), [(CPUINFO, "A Chip: @ 2 GHz"), ("flags: x\n", "of Python"), (None, "of Python")]
)
def test_a_processor_has_the_name_that_linux_gives_it(text, name, monkeypatch, tmp_path):
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(results, "Path", lambda path: {"/proc/cpuinfo": tmp_path / "cpuinfo"}[path])
    monkeypatch.setattr(results.platform, "processor", lambda: "of Python")
    monkeypatch.setattr(results.os, "sched_getaffinity", lambda pid: {0: {1, 3, 5}}[pid])
    assert results.describe_cpu() == {"cpu": name, "cores": 3}


def test_a_date_is_of_year_month_and_day(monkeypatch):
    monkeypatch.setattr(results.time, "strftime", lambda form: f"as {form}")
    assert results.today() == "as %Y-%m-%d"


def test_a_measurements_help_is_its_docstring_line_by_line(capsys):
    doc = "First line.\n\n    python -m x\n"
    parser = results.new_json_parser(doc)
    assert doc in parser.format_help() and "where the figures go" in parser.format_help()
    assert parser.parse_args(["--json", "a"]).json == "a"
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "--json" in capsys.readouterr().err
    assert results.new_parser(doc, "python -m x").format_help().startswith("usage: python -m x [-h]")


def test_figures_are_lines_of_one_value(tmp_path):
    write_json(str(tmp_path / "x.json"), {"b": [1], "a": {}})
    assert (tmp_path / "x.json").read_text() == '{\n "b": [\n  1\n ],\n "a": {}\n}\n'

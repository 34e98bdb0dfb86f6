# ruff: noqa: RUF001 - a text in Chinese
"""data_gen.dedup: files in and out, what is said of a bad one, and progress."""

import json
import re
import sys

import pytest

from data_gen import dedup
from data_gen.base.cli import run_for_exit_code
from tests.helpers.run import command

pytest.importorskip("rapidfuzz")

ROWS = [
    {"output": "x", "instruction": "Name three primary colours.", "id": 7, "deep": {"b": [1, None], "a": 0.1}},
    {"instruction": "name THREE primary colours", "output": "é—\ud83d"},
    {"instruction": "你好，世界", "output": ""},
    {"instruction": "Name three primary numbers now", "output": "2 3 5"},
    {"instruction": "Say something else entirely", "input": "\u2028"},
    {"instruction": "", "z": 1, "a": 2},
    {"instruction": "Say something else entirely please"},
]
KEPT = [0, 2, 3, 4, 5]


def written(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


def read(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("source", ["in.json", "in.jsonl"])
@pytest.mark.parametrize("out", ["out.json", "out.jsonl"])
def test_kept_and_dropped_rows_are_written_in_either_format(source, out, tmp_path, capsys):
    file, out, rejected = written(tmp_path / source, ROWS), tmp_path / out, tmp_path / "no.jsonl"
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(out), "--rejected", str(rejected)]) == 0
    rows = read(out)
    assert rows == [ROWS[i] for i in KEPT]
    assert [list(row) for row in rows] == [list(ROWS[i]) for i in KEPT]
    assert read(rejected) == [
        {
            "row": at + 1,
            "duplicates_row": first + 1,
            "similarity": similarity,
            "duplicates": ROWS[first]["instruction"],
            "dropped": ROWS[at],
        }
        for at, first, similarity in ((1, 0, 1.0), (6, 4, 8 / 9))
    ]
    said = capsys.readouterr()
    assert re.fullmatch(rf"7 rows, 5 kept, 2 dropped in \d+\.\d s: {re.escape(str(out))}\n", said.out)
    assert said.err == ""


def test_command_line_and_another_field(tmp_path, capsys):
    file = written(tmp_path / "in.jsonl", [{"q": "a b c"}, {"q": "a b c d"}, {"q": "z"}])
    done = command("data_gen.dedup", file, "--out", tmp_path / "out.jsonl", "--field", "q")
    assert "3 rows, 2 kept, 1 dropped" in done.stdout
    assert (tmp_path / "out.jsonl").read_text() == '{"q": "a b c"}\n{"q": "z"}\n'
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(tmp_path / "out.jsonl")]) == 3
    assert "in.jsonl:1: no 'instruction' among 'q'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_without_rows_gives_one_without_rows(suffix, tmp_path):
    file, out = written(tmp_path / f"in{suffix}", []), tmp_path / f"out{suffix}"
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(out)]) == 0
    assert read(out) == []


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"instruction": "a"}, {"input": "b"}], ":1:24: row 2: no 'instruction' among 'input'; --field names another"),
        ([{}], ":1: no 'instruction' among no keys"),
        (
            [{"instruction": "a"}, {"instruction": ["b"]}],
            ":1:24: row 2: 'instruction' is of type list, wanted a string",
        ),
        ([{"instruction": None}], ":1: 'instruction' is of type NoneType"),
        ([{"instruction": "a"}, 5], ":1:24: row 2: got int, wanted an object"),
    ],
)
def test_rows_that_are_not_what_they_should_be(rows, says, tmp_path, capsys):
    file, out = written(tmp_path / "in.json", rows), tmp_path / "out.json"
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(out)]) == 3
    assert f"{file}{says}" in capsys.readouterr().err
    assert not out.exists()


def test_files_that_cannot_be(tmp_path, capsys):
    file, out = written(tmp_path / "in.json", ROWS), tmp_path / "out.json"
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a"}\n{"instr')
    (tmp_path / "folder.json").mkdir()

    def fails(code, says, *argv):
        assert run_for_exit_code(dedup.main, list(map(str, argv))) == code
        assert says in capsys.readouterr().err

    fails(3, "absent.json cannot be read", tmp_path / "absent.json", "--out", out)
    fails(3, "broken.jsonl:2 is not JSON", tmp_path / "broken.jsonl", "--out", out)
    for name in ("out.csv", "out", "out.json.gz"):
        fails(2, f"{name}: the suffix says the format; wanted .json or .jsonl", file, "--out", tmp_path / name)
    fails(2, "there is no such folder", file, "--out", tmp_path / "none" / "out.json")
    fails(2, "there is no such folder", file, "--out", out, "--rejected", tmp_path / "none" / "no.jsonl")
    fails(2, "is a file of its own", file, "--out", out, "--rejected", out)
    fails(2, "is a file of its own", file, "--out", out, "--rejected", file)
    fails(1, "folder.json cannot be written", file, "--out", tmp_path / "folder.json")
    with pytest.raises(SystemExit, match="2"):
        dedup.main([str(file)])
    assert not out.exists() and read(file) == ROWS


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    assert list(dedup.show_progress(["a", "b"])) == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dedup, "REPORT_EVERY_S", 0)
    assert list(dedup.show_progress(["a", "b"])) == ["a", "b"]
    assert capsys.readouterr().err == "0 of 2 rows compared\n1 of 2 rows compared\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(dedup.show_progress(["a", "b"])) == ["a", "b"]
    assert "rows compared" not in capsys.readouterr().err


def test_an_instruction_over_other_inputs_is_no_duplicate(tmp_path, capsys):
    """However long the instruction, and however short its inputs."""
    asked = "Translate the following sentence into French, and keep its tone"
    inputs = ["Good morning.", "A red house.", "", "good MORNING", "", "A red house!"]
    rows = [{"instruction": asked + "!" * n, "input": text} for n, text in enumerate(inputs)]
    rows += [{"instruction": asked, "output": "no input"}]
    file, out, rejected = written(tmp_path / "rows.json", rows), tmp_path / "out.json", tmp_path / "no.jsonl"
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(out), "--rejected", str(rejected)]) == 0
    assert read(out) == rows[:3] and "another input" not in capsys.readouterr().out
    assert [line["duplicates_row"] for line in read(rejected)] == [1, 3, 2, 3]
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(out), "--field", "instruction"]) == 0
    assert read(out) == rows[:1]
    assert "6 of the dropped rows have another input; --field instruction+input" in capsys.readouterr().out


def test_a_dropped_row_names_the_row_that_it_repeats_whatever_was_dropped_before():
    asked, rests = (
        ["Name a colour."] * 7,
        ["one two", "One two", "three four", "three four!", "one two", "", "five six"],
    )
    assert list(dedup.find_duplicates(asked, rests)) == [None, 0, None, 2, 0, None, None]
    assert list(dedup.find_duplicates([*asked, "x"], [*rests, "five six"]))[7] is None, "the rest of another text"


def test_an_input_that_is_no_text_is_named(tmp_path, capsys):
    file = written(tmp_path / "rows.json", [{"instruction": "a", "input": 3}])
    assert run_for_exit_code(dedup.main, [str(file), "--out", str(tmp_path / "out.json")]) == 3
    assert ":1: 'input' is of type int, wanted a string" in capsys.readouterr().err


def test_a_table_is_refused_with_what_to_do(tmp_path, capsys):
    (tmp_path / "rows.CSV").write_text("instruction,output\na,b\n")
    assert run_for_exit_code(dedup.main, [str(tmp_path / "rows.CSV"), "--out", str(tmp_path / "out.json")]) == 2
    assert "rows.CSV: wanted JSON or JSONL; save the table as one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.CSV"]

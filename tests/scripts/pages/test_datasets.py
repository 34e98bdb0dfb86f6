"""docs/data.md's table of datasets is what the code reads now."""

import json
import sys

import pytest

from scripts.pages import datasets


def test_the_table_of_datasets_is_what_is_read(monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(sys, "argv", ["datasets", "--check"])
    datasets.main()
    assert datasets.make_table().count("\n| ") == 19
    monkeypatch.setattr(datasets, "make_table", lambda: "another")
    with pytest.raises(SystemExit, match=r"docs/data.md has another table; run python -m scripts"):
        datasets.main()


def test_lines_and_lists_hold_letters_as_they_are():
    rows = [{"text": "Käse, 日本"}, {"text": "b"}]
    assert datasets.write_lines(rows) == '{"text": "Käse, 日本"}\n{"text": "b"}\n'.encode()
    assert datasets.write_list(rows).decode() == json.dumps(rows, ensure_ascii=False, indent=2)
    assert datasets.write_csv(rows).decode().splitlines() == ["text", '"Käse, 日本"', "b"]


def test_another_table_is_told_and_stays(tmp_path, monkeypatch, call_main):
    monkeypatch.setattr(datasets, "PAGE", tmp_path / "data.md")
    monkeypatch.setattr(datasets, "make_table", lambda: "table\n")
    datasets.PAGE.write_text(f"a\n{datasets.START}old\n{datasets.END}b\n")
    assert "another table" in call_main(datasets, "--check") and "old" in datasets.PAGE.read_text()
    assert call_main(datasets) is None and call_main(datasets, "--check") is None
    assert datasets.PAGE.read_text() == f"a\n{datasets.START}table\n{datasets.END}b\n"

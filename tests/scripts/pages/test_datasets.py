"""docs/data.md's table of datasets is what the code reads now."""

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

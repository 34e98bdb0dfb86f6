"""The rows of the demo: as the script makes them, and held-out rows that share nothing with the others."""

import json

from scripts.pages import order_tasks
from scripts.pages.order_tasks import FOLDER, HELD_OUT, TRAIN, render_files


def test_the_rows_that_come_along_are_those_of_the_script():
    for name, text in render_files().items():
        assert (FOLDER / name).read_text() == text


def test_held_out_rows_share_no_value_and_no_wording():
    for field in ("names", "towns", "items", "wordings"):
        ours, theirs = getattr(TRAIN, field), getattr(HELD_OUT, field)
        assert len(set(ours)) == len(ours) and not set(ours) & set(theirs), field


def test_every_order_says_what_its_message_says():
    for text in render_files().values():
        for row in map(json.loads, text.splitlines()):
            order = json.loads(row["output"])
            assert list(order) == ["item", "count", "name", "town", "day"]
            assert all(order[key] in row["input"] for key in ("name", "town", "day", "item"))


def test_the_files_are_written_and_counted(monkeypatch, tmp_path, call_main, capsys):
    monkeypatch.setattr(order_tasks, "FOLDER", tmp_path)
    assert not call_main(order_tasks)
    assert capsys.readouterr().out == "orders.jsonl: 144 rows\norders_held_out.jsonl: 24 rows\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == render_files()

"""A measurement's file: when no more may begin, and what of it is on the disk after every change."""

import json

import pytest

from scripts.base.record_file import RecordFile


@pytest.mark.parametrize(("minutes", "seconds"), [(None, float("inf")), (0, 0.0), (0.5, 30.0), (-1, -60.0)])
def test_nothing_begins_after_its_minutes_and_zero_is_none(minutes, seconds):
    file = RecordFile(None, minutes, {}, clock=lambda: 7.0)
    assert file.seconds_left() == seconds and file.is_time_up() == (seconds <= 0)
    assert file.may_begin("a") == (seconds > 0) and file.result["left_out"] == ["a"] * (seconds <= 0)


def test_what_is_left_out_is_on_the_disk_at_once_beside_what_was_there(tmp_path):
    file = RecordFile(tmp_path / "new" / "x.json", 0, {"records": [1]}, clock=lambda: 7.0)
    for name in "ab":
        file.may_begin(name)
        assert json.loads(file.path.read_text()) == {"records": [1], "left_out": file.result["left_out"]}
    assert file.result["left_out"] == ["a", "b"]

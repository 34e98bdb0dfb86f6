"""What run.json may hold."""

import json

import pytest

from engine.base.errors import DataError
from engine.output.folder import STATUSES, read_prompt_style, read_run

RUN = {"status": "done", "config": {"prompt_style": "alpaca"}, "facts": {}, "tracked_as": "x", "seconds": 1.5}


@pytest.mark.parametrize("changes", [*({"status": status} for status in STATUSES), {"seconds": 0}])
def test_a_record_of_a_run_is_read(changes, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN | changes))
    assert read_run(tmp_path) == RUN | changes and read_prompt_style(tmp_path) == "alpaca"


def test_a_folder_without_one_has_none(tmp_path):
    assert read_run(tmp_path) == {} and read_prompt_style(tmp_path) is None
    (tmp_path / "run.json").write_text('{"status": "done"}')
    assert read_run(tmp_path) == {"status": "done"} and read_prompt_style(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "finished"}, {"status": None}, {"config": []}, {"facts": "x"}, {"tracked_as": 5}, {"seconds": -1},
        {"seconds": "1"}, {"seconds": float("inf")}, {"seconds": float("nan")},
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_damage(changes, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN | changes))
    with pytest.raises(DataError, match=r"run\.json: is damaged.*ask me"):
        read_run(tmp_path, "ask me")


def test_a_prompt_style_that_is_no_text_is_damage(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"config": {"prompt_style": 5}}))
    with pytest.raises(DataError, match=r"run\.json: is damaged.*pass --prompt-style"):
        read_prompt_style(tmp_path)

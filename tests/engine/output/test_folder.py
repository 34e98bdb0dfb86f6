"""Which folders a run may write to, and what run.json may hold."""

import json
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import DataError, UsageError
from engine.output import folder
from engine.output.folder import (
    LOCK,
    STATUSES,
    describe_environment,
    lock_output_folder,
    read_metrics,
    read_prompt_style,
    read_run,
    require_disk_space,
)

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


@pytest.mark.parametrize(
    "names, is_taken",
    [
        ((), True), ((LOCK,), True), ((".tmp-x",), True), (("run.json",), True), (("run.json", "thesis.tex"), True),
        (("thesis.tex",), False), ((LOCK, "thesis.tex"), False), ((".tmp-x", "thesis.tex"), False), ((".git",), False),
    ],
)  # fmt: skip
def test_a_folder_of_something_else_is_left_alone(names, is_taken, tmp_path):
    for name in names:
        (tmp_path / name).write_text("mine")
    if is_taken:
        with lock_output_folder(tmp_path) as out:
            assert out == tmp_path
    else:
        with pytest.raises(UsageError, match=f"holds {names[-1]} and no run.json"), lock_output_folder(tmp_path):
            pass
    assert {path.name for path in tmp_path.iterdir()} | {LOCK} == {*names, LOCK}


def test_one_run_at_a_time_and_no_trace_of_one_that_wrote_nothing(tmp_path):
    out = tmp_path / "new" / "out"
    with lock_output_folder(out):
        with pytest.raises(UsageError, match="another run is writing there"), lock_output_folder(out):
            pass
        assert out.is_dir()
    assert list(tmp_path.iterdir()) == []
    with lock_output_folder(out):
        (out / "run.json").write_text("{}")
    assert {path.name for path in out.iterdir()} == {LOCK, "run.json"}
    below = out / "run.json" / "below"
    with pytest.raises(UsageError, match=r"cannot be written .*; choose another folder"), lock_output_folder(below):
        pass


def test_metrics_are_one_object_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "a"}\n{"event": "b", "step": 10}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"event": "a"}, {"event": "b", "step": 10}]


def test_as_much_disk_as_is_free_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000_000))
    require_disk_space(tmp_path, 2_000_000_000, "make room")
    with pytest.raises(UsageError, match=r"about 2\.1 GB are to be written and 2\.0 GB are free there; make room"):
        require_disk_space(tmp_path, 2_100_000_000, "make room")
    with pytest.raises(UsageError):
        require_disk_space(tmp_path, 2_000_000_001, "make room")


@pytest.mark.parametrize("device, name", [("cuda", "A card"), ("cpu", platform.processor() or "cpu")])
def test_the_environment_names_the_device(device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    found = describe_environment(torch.device(device))
    assert found["device"] == name and found["command"] == sys.argv and found["threads"] == torch.get_num_threads()
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", found["date"])


@pytest.mark.parametrize("is_repository", [True, False])
def test_the_environment_names_the_commit_of_this_program(is_repository, tmp_path, monkeypatch):
    """Not that of the repository where the command is called, and none of a package that was installed."""
    git = ("git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b")
    if is_repository:
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(folder, "__file__", str(tmp_path / "engine" / "output" / "folder.py"))
    found = describe_environment(torch.device("cpu"))["git_commit"]
    if is_repository:
        assert subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout == f"{found}\n"
    else:
        assert found is None


def test_a_block_that_writes_nothing_leaves_none_of_the_folders_that_it_made(tmp_path):
    """But those that were there, and those that something else was put into."""
    (tmp_path / "there").mkdir()
    with lock_output_folder(tmp_path / "there" / "a" / "b" / "c"):
        assert (tmp_path / "there" / "a" / "b" / "c" / LOCK).exists()
    assert (tmp_path / "there").is_dir() and not any((tmp_path / "there").iterdir())
    with lock_output_folder(tmp_path / "there" / "a" / "b" / "c"):
        (tmp_path / "there" / "a" / "else").touch()
    assert [path.name for path in (tmp_path / "there" / "a").iterdir()] == ["else"]

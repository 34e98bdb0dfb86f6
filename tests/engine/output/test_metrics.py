"""metrics.jsonl: every line whole or absent, whatever kills the writer."""

import json
import math
import os
import resource
import signal
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from engine.output.metrics import SPARE, Metrics, pad_line
from tests.helpers.training_states import fork


def read(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def write_for_ever(path, size, told):
    metrics = Metrics(path)
    for step in count(1):
        metrics.write("train", step=step, text="x" * (size + step % 50))
        if step == 3:
            os.write(told, b"3")


@pytest.mark.parametrize("size", [250, 2500, 15000])  # a train line, one that often crosses a page, a long sample
def test_kill_leaves_whole_lines_only(tmp_path, size):
    for i in range(10):
        ready, told = os.pipe()
        writer = fork(partial(write_for_ever, tmp_path / "metrics.jsonl", size, told))
        os.close(told)
        assert os.read(ready, 1) == b"3"
        os.close(ready)
        time.sleep(0.005 + 0.0017 * i)
        os.kill(writer, signal.SIGKILL)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL
        text = (tmp_path / "metrics.jsonl").read_bytes()
        assert not text or text.endswith(b"\n")
        lines = read(tmp_path / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert all(len(line["text"]) == size + line["step"] % 50 for line in lines)
        assert len(lines) >= 3


def test_no_append_crosses_a_page(tmp_path, monkeypatch):
    writes, real = [], os.write
    monkeypatch.setattr(
        os, "write", lambda fd, data: writes.append((os.fstat(fd).st_size, len(data))) or real(fd, data)
    )
    metrics = Metrics(tmp_path / "m")
    for step in range(200):
        metrics.write("train", step=step, text="x" * (step * 97 % 400))
    assert len(writes) == 200  # no train line needs the copy
    for step in range(200, 300):
        metrics.write("train", step=step, text="x" * (step * 97 % 900))
    metrics.write("sample", step=300, text="x" * 9000)
    metrics.close()
    assert all(at // 4096 == (at + length - 1) // 4096 for at, length in writes)
    assert [line["step"] for line in read(tmp_path / "m")] == list(range(301))
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("spare", [-1, 0, 1, 2])
def test_a_line_that_fills_its_page_to_the_byte_is_appended_and_one_byte_more_is_not(tmp_path, monkeypatch, spare):
    writes, real = [], os.write
    monkeypatch.setattr(
        os, "write", lambda fd, data: writes.append((os.fstat(fd).st_size, len(data))) or real(fd, data)
    )
    metrics = Metrics(tmp_path / "m")
    metrics.write("a", text="x" * 1000)
    room = 4096 - (tmp_path / "m").stat().st_size
    around = len(json.dumps({"event": "b", "text": ""})) + 1  # with its newline
    metrics.write("b", text="x" * (room - around - spare))
    metrics.close()
    assert len(writes) == (1 if spare < 0 else 2)
    assert all(at // 4096 == (at + length - 1) // 4096 for at, length in writes)
    assert [line["event"] for line in read(tmp_path / "m")] == ["a", "b"]


def test_json_is_strict_and_exact(tmp_path):
    metrics = Metrics(tmp_path / "m")
    values = dict(
        a=math.nan, b=[math.inf, 0.1 + 0.2], c={"d": -math.inf}, e=2e-5 / 3, f=None, g=True, h="é\u2028\n\x1b"
    )
    metrics.write("train", step=1, **values, surrogate="\udc80", path=Path("out"))
    metrics.close()
    metrics.close()
    (line,) = read(tmp_path / "m")
    wanted = dict(a=None, b=[None, 0.1 + 0.2], c={"d": None}, e=2e-5 / 3, f=None, g=True, h="é\u2028\n\x1b")
    assert line == dict(event="train", step=1, **wanted, surrogate="?", path="out")


def test_a_tensor_of_one_number_is_a_number(tmp_path):
    torch = pytest.importorskip("torch")
    metrics = Metrics(tmp_path / "m")
    metrics.write("train", loss=torch.tensor(0.5), norm=torch.tensor(math.nan))
    assert read(tmp_path / "m") == [dict(event="train", loss=0.5, norm=None)]


def test_resume_keeps_what_came_before(tmp_path):
    path = tmp_path / "m"
    metrics = Metrics(path)
    metrics.write("data", rows=7)
    for step in range(1, 6):
        metrics.write("train", step=step, loss=1 / step)
        if step % 2:
            metrics.write("save", step=step)
    metrics.write("end", step=3, status="stopped")
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'no json\n{"event": "train", "step": 2, "loss"')  # torn
    (tmp_path / ".m.tmp").write_text("left by a kill")
    metrics = Metrics(path, keep_until_step=3)
    metrics.write("train", step=4, loss=9.0)
    metrics.close()
    lines = read(path)
    assert [(line["event"], line.get("step")) for line in lines] == [
        ("data", None), ("train", 1), ("save", 1), ("train", 2), ("train", 3), ("save", 3), ("train", 4)
    ]  # fmt: skip
    assert lines[4]["loss"] == 1 / 3 and lines[6]["loss"] == 9.0
    assert os.listdir(tmp_path) == ["m"]


def test_a_torn_line_that_is_json_is_still_torn(tmp_path):
    (tmp_path / "m").write_text('{"event": "train", "step": 1}\n{"event": "train", "step": 2}')
    Metrics(tmp_path / "m", keep_until_step=5).close()
    assert [line["step"] for line in read(tmp_path / "m")] == [1]


def test_a_new_run_starts_empty_and_resume_needs_no_file(tmp_path):
    (tmp_path / "m").write_text('{"event": "train", "step": 1}\n')
    Metrics(tmp_path / "m").close()
    assert (tmp_path / "m").read_bytes() == b""
    metrics = Metrics(tmp_path / "new", keep_until_step=4)
    metrics.write("train", step=5)
    assert len(read(tmp_path / "new")) == 1


def write_until_full(path, size):
    """Raise unless the disk, of 21,000 bytes, is told as full."""
    metrics = Metrics(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (21_000, 21_000))
    with pytest.raises(OSError, match=r"No space left|File too large"):
        for step in range(1000):
            metrics.write("train", step=step, text="x" * size)


@pytest.mark.parametrize("size", [100, 5000])  # by append; by renamed copy
def test_full_disk_leaves_whole_lines(tmp_path, size):
    assert os.waitpid(fork(partial(write_until_full, tmp_path / "m", size)), 0)[1] == 0
    assert (tmp_path / "m").read_bytes().endswith(b"\n") and len(read(tmp_path / "m")) > 2
    assert os.listdir(tmp_path) == ["m"]


def test_a_line_that_was_written_in_part_is_taken_back(tmp_path, monkeypatch):
    metrics, write = Metrics(tmp_path / "m"), os.write
    metrics.write("train", step=1)
    before = (tmp_path / "m").read_bytes()
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:9]))
    with pytest.raises(OSError, match="No space left"):
        metrics.write("train", step=2)
    assert (tmp_path / "m").read_bytes() == before
    monkeypatch.undo()
    metrics.write("train", step=3)
    assert [line["step"] for line in read(tmp_path / "m")] == [1, 3]


def test_a_copy_that_could_not_take_the_old_files_place_is_removed(tmp_path, monkeypatch):
    (tmp_path / "m").write_text('{"event": "train", "step": 1}\n')

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        Metrics(tmp_path / "m", keep_until_step=1)
    assert os.listdir(tmp_path) == ["m"] and [line["step"] for line in read(tmp_path / "m")] == [1]


def test_spaces_fill_a_page_of_which_a_line_leaves_too_few_bytes():
    for room, spaces in ((1, 0), (2, 1), (SPARE, SPARE - 1), (SPARE + 1, 0), (4096, 0)):
        assert pad_line(b"{}", room) == b"{}" + b" " * spaces + b"\n"


def test_a_resumed_run_keeps_all_that_was_told_up_to_its_step(tmp_path):
    """But how the run ended, which it did not."""
    events = ["train", "eval", "score", "answer", "sample", "save", "skip", "spike"]
    lines = [{"event": event, "step": step} for step in (0, 3, 4) for event in events]
    lines += [{"event": "end", "step": 3}, {"event": "end", "step": None}, {"event": "note"}]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Metrics(path, keep_until_step=3).close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [line for line in lines if line["event"] != "end" and line.get("step", 0) != 4]

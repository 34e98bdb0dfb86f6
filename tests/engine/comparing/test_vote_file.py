"""The file of votes: what was acknowledged is in it, whatever ends the process, and what is no vote is never lost."""

import errno
import json
import os
import random
import signal
from functools import partial

import pytest

pytest.importorskip("starlette")

from data_gen.judging.humans import read_votes
from engine.base.errors import DataError, UsageError
from engine.comparing.vote_file import VoteFile
from tests.helpers.training_states import fork


def row(n, vote="A"):
    return {"prompt": f"Question {n}", "models": ["alpaca", "davinci"], "vote": vote, "answers": ["é" * n, "\ud800"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.jsonl"


def test_votes_come_back_and_the_judge_reads_them(path):
    file = VoteFile(path)
    for n in range(3):
        file.add(row(n))
    file.close()
    again = VoteFile(path)
    assert [kept.row for kept in again.kept] == [row(n) for n in range(3)]
    assert [kept.vote for kept in again.kept] == read_votes(path)
    again.close()


@pytest.mark.parametrize("cut", [1, 5, 12, 30, -1])
def test_a_vote_that_was_cut_off_is_taken_out_and_told(path, capsys, cut):
    file = VoteFile(path)
    file.add(row(1))
    whole = path.read_bytes()
    file.close()
    path.write_bytes(whole + whole.rstrip(b"\n")[:cut])
    file = VoteFile(path)
    assert path.read_bytes() == whole and len(file.kept) == 1
    assert f"{path}:2: a vote that was cut off is taken out" in capsys.readouterr().err
    file.add(row(2))
    file.close()
    assert len(read_votes(path)) == 2


def test_a_last_vote_without_its_newline_is_kept(path):
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)))
    file = VoteFile(path)
    file.add(row(3))
    file.close()
    assert [vote.key for vote in read_votes(path)] == ["Question 1", "Question 2", "Question 3"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("notes of mine", ":1: is not JSON"),
        ("notes of mine\nand more\n", ":1: is not JSON"),
        ('{"a": 1}', ":1: got prompt None"),
        ('{"prompt": "p", "models": ["x", "x"], "vote": "A"}\n', ":1: got prompt 'p'"),
        ("[1]\n", ":1: got a list"),
        (json.dumps(row(1)) + "\n\x00\x00\x00", ":2: is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(path, text, told):
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        VoteFile(path)
    assert path.read_text() == text


def test_a_second_server_is_refused_and_a_folder_that_is_not_there(path):
    file = VoteFile(path)
    with pytest.raises(UsageError, match="another server writes to it"):
        VoteFile(path)
    file.close()
    VoteFile(path).close()
    with pytest.raises(UsageError, match="cannot be written"):
        VoteFile(path / "nowhere")


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    file = VoteFile(path)
    file.add(row(1))
    whole = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(OSError, match="full"):
        file.add(row(2))
    assert path.read_bytes() == whole and len(file.kept) == 1

    def refuse(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        file.add(row(2))
    monkeypatch.undo()
    assert path.read_bytes() == whole and len(file.kept) == 1
    file.add(row(2))
    file.close()
    assert len(read_votes(path)) == 2


def vote_for_ever(path, told):
    file = VoteFile(path)
    while True:
        prompt = str(len(file.kept))
        file.add({"prompt": prompt, "models": ["a", "b"], "vote": "A", "answers": ["x" * 9000, "y"]})
        os.write(told, f"{len(file.kept)}\n".encode())


def test_no_acknowledged_vote_is_lost_to_sigkill(path):
    random.seed(3)
    told = 0
    for _ in range(3):
        read_end, write_end = os.pipe()
        voter = fork(partial(vote_for_ever, path, write_end))
        os.close(write_end)
        with open(read_end) as lines:
            for _ in range(random.randrange(2, 30)):
                told = int(lines.readline())
            os.kill(voter, signal.SIGKILL)
            rest = lines.read().split()  # told before the signal came
        assert os.waitpid(voter, 0)[1] == signal.SIGKILL
        told = int(rest[-1]) if rest else told
    file = VoteFile(path)
    assert told <= len(file.kept) <= told + 1  # one may be on the disk that was not told
    assert [kept.row["prompt"] for kept in file.kept] == [str(n) for n in range(len(file.kept))]
    file.close()

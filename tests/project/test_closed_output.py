"""Whoever reads a command's output may leave (`... | head`): it then ends with 141 and says nothing."""

import contextlib
import errno
import os
import subprocess
import sys

import pytest
from rich.console import Console

import data_gen.base.cli
import kernels.base.commands
from engine.base.errors import DataError, run_main
from tests.helpers.run import ROOT, environment

ENDS = pytest.mark.parametrize(
    "run",
    [
        kernels.base.commands.run_for_reader,
        data_gen.base.cli.run_for_reader,
        lambda main: data_gen.base.cli.run_for_reader(
            lambda: data_gen.base.cli.run_for_exit_code(lambda _: main(), [])
        ),
        lambda main: run_main(lambda _: main(), []),
    ],
    ids=["kernels", "data_gen", "data_gen's main", "engine's main"],
)


@contextlib.contextmanager
def unread(buffering=-1):
    """A standard output whose reader has left. buffering=1: Python writes each line at once, not all at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=buffering) as output, contextlib.redirect_stdout(output):
        yield


def fail(error):
    raise error


@ENDS
@pytest.mark.parametrize(
    "main",
    [
        lambda: print("a line"),
        lambda: [print("x" * 100) for _ in range(1000)],
        lambda: (print("the help"), sys.exit(0)),
    ],
    ids=["one line", "more than a buffer", "help"],
)
@pytest.mark.parametrize("buffering", [1, -1], ids=["by lines", "buffered"])
def test_a_reader_that_leaves_ends_a_command_quietly(capfd, run, main, buffering):
    with unread(buffering):  # closed at its end, as Python does: that writes what is still held
        assert run(main) == 141
    assert capfd.readouterr().err == ""


@ENDS
def test_rich_is_as_quiet(run):
    with unread():
        assert run(lambda: Console(file=sys.stdout).print("a line")) == 141


@ENDS
def test_another_end_keeps_its_code(run):
    with unread():
        assert run(lambda: (print("a line"), sys.exit(3))) == 3


def test_an_error_is_told_without_a_reader(capfd):
    with unread():
        assert run_main(lambda _: (print("a line"), fail(DataError("row 3"))), []) == 3
    assert capfd.readouterr().err == "error: row 3\n"
    with unread(), pytest.raises(KeyError):
        kernels.base.commands.run_for_reader(lambda: (print("a line"), {}["x"]))


def test_another_pipe_is_an_error(capsys):
    gone = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert run_main(lambda _: fail(gone), []) == 1
    assert data_gen.base.cli.run_for_exit_code(lambda _: fail(gone), []) == 1
    assert capsys.readouterr().err.count("error: BrokenPipeError: [Errno 32] Broken pipe; --debug shows where") == 2
    for run in (kernels.base.commands.run_for_reader, data_gen.base.cli.run_for_reader):
        with pytest.raises(BrokenPipeError):
            run(lambda: fail(gone))


@ENDS
def test_a_full_disk_is_told_by_python_at_its_end(run):
    full_disk = pytest.raises(OSError, match="No space left on device")
    with full_disk, open("/dev/full", "w") as output, contextlib.redirect_stdout(output):
        run(lambda: print("a line"))


def test_a_process_without_a_reader():
    reading, writing = os.pipe()
    os.close(reading)
    env = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-m", "data_gen.estimate", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")

"""How a command ends: with its own exit code, and with 141 only where the reader of its output has left."""

import sys

import pytest

from kernels.base import commands
from kernels.base.commands import READER_LEFT, run_for_reader


def leave(error):
    raise error


@pytest.mark.parametrize("has_left", [False, True])
@pytest.mark.parametrize("code", [None, 0, 1, 3, "what is wrong"])
@pytest.mark.parametrize("how", ["return", "exit"])
def test_an_exit_code_is_kept_whether_or_not_its_output_is_read(how, code, has_left, monkeypatch):
    monkeypatch.setattr(commands, "flush_stdout", lambda: not has_left)
    main = (lambda: code) if how == "return" else lambda: sys.exit(code)
    assert run_for_reader(main) == ((code or READER_LEFT) if has_left else code)


@pytest.mark.parametrize("has_left", [False, True])
def test_another_pipe_that_ends_is_no_reader_that_left(has_left, monkeypatch):
    monkeypatch.setattr(commands, "has_reader_left", lambda: has_left)
    if has_left:
        assert run_for_reader(lambda: leave(BrokenPipeError())) == READER_LEFT
    else:
        with pytest.raises(BrokenPipeError):
            run_for_reader(lambda: leave(BrokenPipeError()))


def test_an_exit_on_a_broken_pipe_is_that_of_a_reader_that_left():
    def main():
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            sys.exit(1)

    assert run_for_reader(main) == READER_LEFT


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_other_errors_are_not_passed_over(error):
    with pytest.raises(error):
        run_for_reader(lambda: leave(error()))

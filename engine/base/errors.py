"""Errors with their exit codes.

An error's message says in a line or two what is wrong, what was found, what was wanted and how to put it right.
"""

import contextlib
import errno
import os
import struct
import sys
import traceback
from collections.abc import Callable, Iterator

from kernels.base.commands import has_reader_left, run_for_reader


class CriaError(Exception):
    """A failure at run time."""

    exit_code = 1


class UsageError(CriaError):
    """The command line asks for something that cannot be done."""

    exit_code = 2


class DataError(CriaError):
    """A dataset, a model folder or a checkpoint is not what it should be."""

    exit_code = 3


class DivergedError(CriaError):
    """The loss or the gradient stopped being a number."""

    exit_code = 4


class NotFiniteError(CriaError):
    """A tensor that was to be written holds NaN or an infinity. Nothing of it is on the disk."""

    exit_code = 4


class OtherRankFailed(CriaError):
    """Another rank failed. That rank prints the reason; this one exits with the same code and prints nothing."""

    def __init__(self, rank: int, exit_code: int):
        super().__init__(f"rank {rank} failed")
        self.exit_code = exit_code


class Stopped(BaseException):
    """A signal asked the run to end, and its state is saved.

    It is a BaseException, so that no `except Exception` catches it.
    """

    exit_code = 143


# What Python raises where the content of a file is not what the code that reads it takes it for.
DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, EOFError, OSError,
    struct.error,
)  # fmt: skip


@contextlib.contextmanager
def reading(what: object, remedy: str = "repair the file, or copy it again") -> Iterator[None]:
    """Raise whatever Python raises in a with block that reads what a user's file holds as a DataError naming the file.

    Only the reading belongs into the block: a fault in what comes after must stay the error that it is.
    """
    try:
        yield
    except DAMAGE as error:
        found = f"{type(error).__name__}: {summarize_error(error)}"
        raise DataError(f"{what}: is damaged, or not what it should be ({found}); {remedy}") from error


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error's text, 200 characters at most, or the error's type when it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def run_main(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command's main(argv) and return its exit code.

    A failure is printed on stderr, with a traceback when argv has --debug. argv is sys.argv[1:] by default.
    Where the reader of stdout has left, the command ends with 141 and without a word.
    """
    argv = sys.argv[1:] if argv is None else argv
    return run_for_reader(lambda: call_main(main, argv))


def call_main(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Call main(argv), print its failure and return the exit code."""
    try:
        main(argv)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop at the same step: one message is enough
            print_error(stopped)
        return stopped.exit_code
    except OtherRankFailed as error:
        return error.exit_code
    except KeyboardInterrupt:
        print_error("stopped by SIGINT")
        return Stopped.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and has_reader_left():
            raise
        if "--debug" in argv:
            print_error(traceback.format_exc().rstrip())
        if isinstance(error, CriaError):
            print_error(f"error: {error}")
            return error.exit_code
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            # It comes from the command line: names in files are checked where they are read.
            print_error(f"error: {str(error.filename)[:40]}...: {error.strerror}; give a shorter name")
            return UsageError.exit_code
        print_error(f"error: {type(error).__name__}: {error}; --debug shows where")
        return 1
    return 0


def print_error(text: object) -> None:
    """Print to stderr. Where nobody reads it, the exit code alone tells."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)

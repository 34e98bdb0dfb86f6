"""What the commands of data_gen share: flags, clear errors, exit codes."""

import argparse
import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TextIO

from data_gen.base.help_text import HelpParser

READER_LEFT = 141  # what a shell tells of a program that SIGPIPE ended


class Failure(Exception):
    """A failure at run time. The message says what failed, what was wanted and what to do, in one or two lines."""

    exit_code = 1


class UsageError(Failure):
    """A command line that asks for something impossible."""

    exit_code = 2


class DataError(Failure):
    """A file with unexpected content."""

    exit_code = 3


class Stopped(Failure):
    """A run that a signal ended. Everything that was paid for is on disk."""

    exit_code = 143


class Parser(HelpParser):
    """The argument parser of `python -m data_gen.NAME`. doc: the command's docstring, with its examples.

    Flags take dashes or underscores and no abbreviations. The error for an unknown flag names the nearest one; every
    error is one line and exit code 2. --debug shows tracebacks.
    """

    def __init__(self, name: str, doc: str | None):
        super().__init__(f"data_gen.{name}", doc)
        self.add_argument("--debug", action="store_true", help="show where an error came from")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the parsed flags, or exit with code 2 and an error that names the nearest known flag."""
        words = [normalize_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            named = [f"unknown flag {word}{suggest_nearest(word, flags)}" for word in unknown if word.startswith("-")]
            self.error("; ".join(named or [f"unexpected {word!r}; every value has a flag" for word in unknown]))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def normalize_dashes(word: str) -> str:
    """Return a flag with dashes for underscores: --max_usd=5 as --max-usd=5."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known word nearest to this one, or "" if none is near."""
    found = difflib.get_close_matches(word.partition("=")[0], list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def print_text(text: object, file: TextIO) -> None:
    """Print the text and go on if the reader has left, as tee does on Ctrl-C."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        discard_output(file)


def discard_output(file: TextIO) -> None:
    """Redirect an open file to the null device: later writes to it succeed and go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Call main with the command line and exit. A failure is printed on stderr, with its traceback under --debug."""
    sys.exit(run_for_reader(lambda: run_for_exit_code(main, sys.argv[1:])))


def run_for_exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Call main(argv), print its failure on stderr and return the exit code."""
    try:
        main(argv)
    except KeyboardInterrupt:
        print_text("stopped by a signal", sys.stderr)
        return Stopped.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and has_reader_left():
            raise
        if "--debug" in argv:
            print_text(traceback.format_exc().rstrip(), sys.stderr)
        if isinstance(error, Failure):
            print_text(f"error: {error}", sys.stderr)
            return error.exit_code
        print_text(f"error: {type(error).__name__}: {error}; --debug shows where", sys.stderr)
        return 1
    return 0


# As kernels/base/commands.py has it, which would import torch.


def run_for_reader(main: Callable[[], Any]) -> Any:
    """Return main() or what it exits with, or 141 where the reader of stdout leaves before all is written.

    SIGPIPE stays ignored, because it would also end a command whose peer on another pipe or socket is gone.
    """
    code: Any = READER_LEFT
    try:
        code = main()
    except SystemExit as done:  # rich answers a broken pipe with an exit of its own
        code = READER_LEFT if isinstance(done.__context__, BrokenPipeError) else done.code
    except BrokenPipeError:
        if not has_reader_left():
            raise
    finally:
        if not flush_stdout():
            code = code or READER_LEFT
    return code


def has_reader_left() -> bool:
    """Return whether stdout is a pipe or a socket that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, TypeError):  # closed, or no file of the system
        return False


def flush_stdout() -> bool:
    """Write what stdout holds. Where nobody reads it, send it to the null device and return False."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)
        return False
    except OSError:  # a full disk: Python tries again at its end, and tells
        return True
    return True

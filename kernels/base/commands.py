"""How a command ends: with its exit code, and without a word where the reader of its output has left (`| head`)."""

import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn

READER_LEFT = 141  # what a shell tells of a program that SIGPIPE ended


def run_command(main: Callable[[], Any]) -> NoReturn:
    """Call main and exit with what it returns, or with 141 where the reader of stdout leaves before all is written."""
    sys.exit(run_for_reader(main))


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    except OSError:  # a full disk: Python tries again at its end, and tells
        return True
    return True

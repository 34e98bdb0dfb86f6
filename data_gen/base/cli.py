"""What the commands of data_gen share: flags, clear errors, exit codes, whole files."""

import argparse
import difflib
import json
import os
import sys
import traceback
from pathlib import Path


class Failure(Exception):
    """A failure at run time. A message says who, got, wanted, remedy, in one or two lines."""

    exit_code = 1


class UsageError(Failure):
    """The command line asks for what cannot be done."""

    exit_code = 2


class DataError(Failure):
    """A file is not what it should be."""

    exit_code = 3


class Stopped(Failure):
    """A signal asked the run to end; all that was paid for is on disk."""

    exit_code = 143


class Help(argparse.HelpFormatter):
    """Every flag with its default."""

    def _get_help_string(self, action):
        if action.default is argparse.SUPPRESS or action.required or not action.option_strings:
            return action.help
        default = action.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif default in (None, "", [], {}):
            default = "none"
        return f"{action.help} (default: {str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """An argument parser of python -m data_gen.NAME: dashes and underscores are the same, no abbreviations, an unknown
    flag names the nearest one, every error is one line and exit code 2. It has --debug, which shows tracebacks."""

    def __init__(self, name, doc):
        super().__init__(prog=f"python -m data_gen.{name}", description=doc, formatter_class=Help, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show where an error came from")

    def parse_args(self, args=None, namespace=None):
        words = [dashed(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            named = [f"unknown flag {word}{nearest(word, flags)}" for word in unknown if word.startswith("-")]
            self.error("; ".join(named or [f"unexpected {word!r}; every value has a flag" for word in unknown]))
        return parsed

    def error(self, message):
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def dashed(word):
    """--max_usd=5 as --max-usd=5."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def nearest(word, known):
    found = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def tell(text, file):
    """Prints. A reader that has left, as tee does on Ctrl-C, ends nothing."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        unread(file)


def unread(file):
    """What is written from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def run(main):
    """Exits with the code of main(argv); a failure is told on stderr, with its traceback under --debug."""
    sys.exit(exit_code_of(main, sys.argv[1:]))


def exit_code_of(main, argv):
    try:
        main(argv)
    except KeyboardInterrupt:
        tell("stopped by a signal", sys.stderr)
        return Stopped.exit_code
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        known = isinstance(error, Failure)
        text = error if known else f"{type(error).__name__}: {error}; --debug shows where"
        tell(f"error: {text}", sys.stderr)
        return error.exit_code if known else 1
    return 0


def write_whole(path, chunks):
    """Writes the texts to path: whole, synced and renamed into place, or not at all. UTF-8."""
    path = Path(path)
    new = path.with_name(f".{path.name}.tmp")
    try:
        with open(new, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:  # chunks may be a generator, and fail as it likes
        new.unlink(missing_ok=True)
        raise


def json_line(value):
    """One line of JSONL. A lone surrogate, which UTF-8 cannot hold, stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"


def read_rows(path):
    """The objects of a .json (a list) or .jsonl file. Raises DataError with the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number} is not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: got {type(row).__name__}, wanted an object")
    return rows

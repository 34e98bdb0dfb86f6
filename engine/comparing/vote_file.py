"""The votes: JSON lines in a file, each on the disk before its voter is told so."""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.base.files import to_json_line
from data_gen.judging.humans import Vote, parse_vote
from engine.base.errors import DataError, UsageError, reading
from engine.base.files import sync_folder
from engine.comparing.questions import as_own_errors

BEGIN = b'{"prompt": "'  # of each line written here


class Kept(NamedTuple):
    """A row of the file, and the vote it holds."""

    row: dict[str, Any]
    vote: Vote


class VoteFile:
    """The votes of a file, to which new ones are appended. One process alone may have it open."""

    def __init__(self, path: Path):
        """Open the file, or begin it. Raises DataError and UsageError."""
        self.path = path
        try:
            self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            sync_folder(path.absolute().parent)
        except OSError as error:
            raise UsageError(f"--votes {path}: cannot be written ({error.strerror}); name another file") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"--votes {path}: another server writes to it; name another file") from None
        self.kept: list[Kept] = []
        *lines, rest = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._take(line, f"{path}:{number}")
        if rest:
            self._mend(rest, f"{path}:{len(lines) + 1}")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, and return when it is on the disk. Raises OSError if it cannot be; the file stays as it was."""
        line = to_json_line(row).encode()
        size = os.fstat(self.file).st_size
        try:
            if os.write(self.file, line) < len(line):
                raise OSError("the disk is full")
            os.fsync(self.file)
        except OSError:
            os.ftruncate(self.file, size)
            raise
        self._take(line, f"{self.path}, its last row")

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def _mend(self, rest: bytes, place: str) -> None:
        """Take out a last line whose writing was interrupted: its voter was never told that it is kept."""
        if rest.startswith(BEGIN) or BEGIN.startswith(rest):
            try:
                json.loads(rest)
            except (ValueError, RecursionError):
                print(f"warning: {place}: a vote that was cut off is taken out, {len(rest)} bytes", file=sys.stderr)
                os.ftruncate(self.file, os.fstat(self.file).st_size - len(rest))
                os.fsync(self.file)
                return
        self._take(rest, place)
        os.write(self.file, b"\n")

    def _take(self, line: bytes, place: str) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: is not JSON ({error}); repair the line or name another file") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: got a {type(row).__name__}, wanted the object of a vote")
        with as_own_errors(), reading(place, "repair the line or name another file"):
            self.kept.append(Kept(row, parse_vote(row, place)))

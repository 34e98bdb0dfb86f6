"""metrics.jsonl: one JSON object a line, for programs that follow a run. Rank 0 alone writes it."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.base.files import make_json_safe

PAGE = 4096  # bytes; a multiple of it is a page boundary on every Linux
SPARE = 512  # bytes; where fewer are left in a page, spaces fill it: a train line (about 350) never crosses pages


class Metrics:
    """metrics.jsonl: one strict JSON object a line; a line is whole or absent, whatever kills the process.

    One write(2) is not enough: Linux copies page by page and a SIGKILL stops it between two (6.18, ext4: 1 of 60 kills
    tore a 301-byte line, 7 of 60 a 3,001-byte one, 43 of 60 a 20,001-byte one). So a line that fits into its page is
    appended by one write, and a line that crosses pages (a long sample) comes in with a renamed copy of the file.
    """

    def __init__(self, path: Path, keep_until_step: int | None = None):
        """Open the file: empty, or, for a run resumed after a step, with the lines that find_kept_lines() keeps."""
        self.path = Path(path)
        self.fd: int | None = None
        self._replace([] if keep_until_step is None else find_kept_lines(self.path, keep_until_step))

    def write(self, event: str, **fields: Any) -> None:
        """Append {"event": event, **fields}. NaN and infinities become null. Raises OSError when the disk is full."""
        assert self.fd is not None, "write() after close()"
        text = json.dumps(make_json_safe({"event": event, **fields}), allow_nan=False).encode()
        start = os.fstat(self.fd).st_size
        room = PAGE - start % PAGE
        if len(text) >= room:  # the newline counts too
            with open(self.path, "rb") as lines:
                self._replace(lines, pad_line(text, PAGE - (start + len(text)) % PAGE))
            return
        line = pad_line(text, room - len(text))
        if os.write(self.fd, line) < len(line):
            os.ftruncate(self.fd, start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _replace(self, *chunks):
        """Put a new file in place of the old one in one rename, and append to it from now on."""
        new = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(new, "wb") as file:
                for chunk in chunks:
                    file.writelines([chunk] if isinstance(chunk, bytes) else chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        self.close()
        self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def pad_line(text: bytes, room: int) -> bytes:
    """Return a text as a line. If few bytes (`room`) are left in its page, spaces before the newline fill them."""
    return text + b" " * (room - 1 if room - 1 < SPARE else 0) + b"\n"


def find_kept_lines(path: Path, last_step: int) -> Iterator[bytes]:
    """Yield the lines of an interrupted run that a run resumed after last_step keeps.

    Lines without a step are kept. Lines of later steps, "end" events and torn lines are not.
    """
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for line in lines:
            try:
                event = json.loads(line)
                keep = line.endswith(b"\n") and event["event"] != "end" and (event.get("step") or 0) <= last_step
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue  # torn, or not ours
            if keep:
                yield line


class NoMetrics:
    """Metrics of the ranks other than 0, which write nothing."""

    def write(self, event: str, **fields: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

"""Servers that a measurement starts, each a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """A running engine.serve."""

    url: str  # http://127.0.0.1:PORT
    pid: int

    def resident_mb(self) -> float:
        """Return the megabytes (10^6 bytes) of memory that the process holds, as Linux counts them."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def n_threads(self) -> int:
        """Return the number of the process's threads."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))


@contextlib.contextmanager
def serve_model(flags: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Run engine.serve on a free port until the context ends. log: the file that its lines go to.

    Raises RuntimeError with the log if it ends before it serves, or otherwise than by SIGTERM.
    """
    command = [sys.executable, "-u", "-m", "engine.serve", "--port", "0", *flags]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, **(environment or {})}
        )
        assert process.stdout is not None
        found = re.search(r" at (http://\S+)$", process.stdout.readline())
        if not found:
            process.wait()
            raise RuntimeError(f"engine.serve ended before it served:\n{log.read_text()}")
        try:
            yield Served(found[1], process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=60)
    if code != -signal.SIGTERM:
        raise RuntimeError(f"engine.serve ended with {code}:\n{log.read_text()[-2000:]}")

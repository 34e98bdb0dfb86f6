"""Progress for people: a live bar on a terminal, plain lines elsewhere. Rank 0 alone shows it."""

import os
import shutil
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
# Control characters, which are dropped: text of a model or a dataset must not steer the terminal.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Progress:
    """A live bar on a terminal; elsewhere plain lines, one every `every` steps and one at the last step."""

    def __init__(self, total: int | None, start: int = 0, unit: str = "step", every: int = 1, file: Any = None):
        self.out = Output(sys.stdout if file is None else file)
        self.label, self.done, self.total, self.every = unit, start, total, every
        self.figures: list[str] = []  # of the last step, most important first: a narrow terminal drops the last ones
        self.began = self.last = time.monotonic()
        # Seconds of each of the last steps. Their median, unlike a mean, ignores a step that waits for a save.
        self.durations: deque[float] = deque(maxlen=31)
        self.inner: Progress | None = None  # the work that the bar counts in place of steps
        self.live: Live | None = None
        self.console: Any = None

    def __enter__(self) -> "Progress":
        self.began = self.last = time.monotonic()
        if self.out.isatty():
            self.console = Console(file=cast(IO[str], self.out), force_terminal=True, highlight=False)
            self.console.show_cursor = lambda show=True: False  # never hidden: a killed run could not show it again
            self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def show_step(
        self,
        step: int,
        *,
        loss: float | None,
        lr: float | None,
        grad_norm: float | None,
        tokens_per_second: float | None,
    ) -> None:
        """Show the figures of an optimizer step that has just ended."""
        self._move_to(step)
        pairs = ("loss", loss, ".4f"), ("lr", lr, ".2g"), ("norm", grad_norm, ".2f")
        texts = [f"{name} {'-' if value is None else format(value, form)}" for name, value, form in pairs]
        speed = "- tok/s" if tokens_per_second is None else f"{tokens_per_second:.0f} tok/s"
        self.figures = [texts[0], speed, *texts[1:]]
        if not self.live and (step % self.every == 0 or step == self.total):
            eta = format_duration(self.estimate_seconds_left())
            self._write_line("  ".join([self._format_count(), *texts, speed, f"eta {eta}"]))

    def advance(self, n: int = 1) -> None:
        """Count work that has no loss."""
        self._move_to(self.done + n)

    def print_message(self, text: str) -> None:
        """Print a message above the bar, or as a line of its own. Control characters are dropped; no text is markup."""
        if self.live:
            self.console.print(Text(self.out.clean(text)), soft_wrap=True)
        else:
            self._write_line(text)

    def track(self, label: str, iterable: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Yield from `iterable`, such as the batches of an evaluation, while the bar counts them in place of steps."""
        self.inner = Progress(count_items(iterable, total), unit=label, file=self.out)
        try:
            for item in iterable:
                yield item
                self.inner.advance()
        finally:
            self.inner = None

    def estimate_seconds_left(self) -> float | None:
        """Return the seconds until the last step, None when unknown."""
        if self.total is None or not self.durations:
            return None
        return (self.total - self.done) * statistics.median(self.durations)

    def _move_to(self, done):
        now = time.monotonic()
        if done > self.done:
            self.durations.append((now - self.last) / (done - self.done))
        self.done, self.last = done, now

    def _format_count(self):
        return f"{self.label} {self.done}" + ("" if self.total is None else f"/{self.total}")

    def _write_line(self, text):
        self.out.write(self.out.clean(text) + "\n")
        self.out.flush()

    def _render(self):
        """Return one line as wide as the terminal: count, bar, then as many figures as fit."""
        shown = self.inner or self
        elapsed = format_duration(time.monotonic() - shown.began)
        if shown.done == shown.total:
            texts = [f"took {elapsed}", *shown.figures]
        else:
            texts = [f"eta {format_duration(shown.estimate_seconds_left())}", *shown.figures, f"elapsed {elapsed}"]
        least_bar, most_bar = 10, 40
        free_columns = self.console.width - len(shown._format_count()) - 1 - least_bar
        fits = []
        for text in texts:
            if len(text) + 2 > free_columns:
                break
            fits.append(text)
            free_columns -= len(text) + 2
        bar_width = min(least_bar + free_columns, most_bar)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(
            Text(shown._format_count(), no_wrap=True),
            ProgressBar(shown.total, shown.done, bar_width, complete_style="cyan", finished_style="green"),
            # The time stands first in fits, so that it is dropped last, and last on the screen.
            *(Text(" " + text if i else text, no_wrap=True) for i, text in enumerate(fits[1:] + fits[:1])),
        )
        return row


def track(label: str, iterable: Iterable[T], total: int | None = None, file: Any = None) -> Iterator[T]:
    """Yield from `iterable` under a bar of its own. Where there is no terminal, print one line at the end instead."""
    with Progress(count_items(iterable, total), unit=label, file=file) as progress:
        for item in iterable:
            yield item
            progress.advance()
        if not progress.live:
            progress.print_message(f"{progress._format_count()}  {format_duration(time.monotonic() - progress.began)}")


@contextmanager
def watch_parameters(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show, as an engine.base.watching.Watch, how many million parameters are done: a bar, on a terminal alone."""
    done = 0
    with Progress(max(round(total / 1e6), 1), unit=f"{label}, M parameters") as bar:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            bar.advance(round(done / 1e6) - bar.done)

        yield advance
        bar.advance((bar.total or 0) - bar.done)  # of a model of less than half a million, too


class Output:
    """A text stream that a run can always write to: after a failed write, everything goes to /dev/null.

    So a run goes on when its terminal is closed or the reader of its pipe ends.
    """

    def __init__(self, file: Any):
        self.file: Any = file.file if isinstance(file, Output) else file  # None: the process began with stdout closed
        self.encoding = getattr(self.file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text and return its length."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush what is buffered."""
        self._try("flush")

    def isatty(self) -> bool:
        """Return whether this is a terminal that shows a live bar."""
        return bool(self.file and self.file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"))

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self.file.fileno()

    def clean(self, text: object) -> str:
        """Return the text without control characters, in characters that the stream's encoding has."""
        return str(text).translate(CONTROL).encode(self.encoding, "replace").decode(self.encoding)

    def _try(self, method, *arguments):
        if self.file is None:
            return
        try:
            getattr(self.file, method)(*arguments)
        except (OSError, ValueError):  # no reader, terminal gone, disk full; closed file
            file, self.file = self.file, None
            try:  # what the stream still buffers must go somewhere, or Python ends with exit code 120
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, file.fileno())
                os.close(null)
            except (OSError, ValueError):
                pass


def print_wrapped(text: object) -> None:
    """Print a text, its lines wrapped between words where stdout is a terminal; elsewhere lines stay whole."""
    if not sys.stdout.isatty():
        print(text)
        return
    columns = max(shutil.get_terminal_size().columns, 20)
    for line in str(text).split("\n"):
        indent = line[: len(line) - len(line.lstrip())] + "  "
        print(textwrap.fill(line, columns, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False))


def count_items(iterable: Any, total: int | None) -> int | None:
    """Return the total if it is given, else the length of the iterable, or None when it has no length."""
    return total if total is not None or not hasattr(iterable, "__len__") else len(iterable)


def format_duration(seconds: float | None) -> str:
    """Return seconds as 45s, 1m20s, 2h05m or 3d04h, and "-" for None."""
    if seconds is None:
        return "-"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02d}h"


def plural(n: int, noun: str, ending: str = "s") -> str:
    """Return "1 step", "2 steps", "2 batches": a count with its noun."""
    return f"{n} {noun}{'' if n == 1 else ending}"

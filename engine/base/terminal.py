"""Progress for people: a live bar on a terminal, plain lines elsewhere. Used by rank 0 alone."""

import os
import statistics
import sys
import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Progress:
    """What a person sees: a live bar on a terminal; elsewhere plain lines, every `every` steps and at the last."""

    def __init__(self, total: int | None, start: int = 0, unit: str = "step", every: int = 1, file=None):
        self.out = Output(sys.stdout if file is None else file)
        self.label, self.done, self.total, self.every = unit, start, total, every
        self.figures = []  # of the last step, the most wanted first
        self.began = self.last = time.monotonic()
        self.durations = deque(maxlen=31)  # seconds a step; the median shrugs off the step that waited for a save
        self.inner = None  # the phase that the bar shows in place of the steps
        self.live = self.console = None

    def __enter__(self):
        self.began = self.last = time.monotonic()
        if self.out.isatty():
            self.console = Console(file=self.out, force_terminal=True, highlight=False)
            self.console.show_cursor = lambda show=True: False  # a killed run must leave the terminal its cursor
            self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()
            self.live = None

    def step(self, step: int, *, loss: float, lr: float, grad_norm: float, tokens_per_second: float) -> None:
        """Shows the figures of an optimizer step that has just ended."""
        self._move_to(step)
        pairs = ("loss", loss, ".4f"), ("lr", lr, ".2g"), ("norm", grad_norm, ".2f")
        loss, lr, norm = (f"{name} {'-' if value is None else format(value, form)}" for name, value, form in pairs)
        speed = "- tok/s" if tokens_per_second is None else f"{tokens_per_second:.0f} tok/s"
        self.figures = [loss, speed, lr, norm]
        if not self.live and (step % self.every == 0 or step == self.total):
            self._line("  ".join([self._count(), loss, lr, norm, speed, f"eta {clock(self.eta())}"]))

    def advance(self, n: int = 1) -> None:
        """Counts work that has no loss."""
        self._move_to(self.done + n)

    def say(self, text: str) -> None:
        """A message: above the bar, or a line of its own. Never markup; control characters are dropped."""
        if self.live:
            self.console.print(Text(self.out.clean(text)), soft_wrap=True)
        else:
            self._line(text)

    def phase(self, label: str, iterable, total: int | None = None):
        """Yields from `iterable`, such as the batches of an evaluation, while the bar counts them in place of steps."""
        self.inner = Progress(length(iterable, total), unit=label, file=self.out)
        try:
            for item in iterable:
                yield item
                self.inner.advance()
        finally:
            self.inner = None

    def eta(self):
        """Seconds left, None when unknown."""
        if self.total is None or not self.durations:
            return None
        return (self.total - self.done) * statistics.median(self.durations)

    def _move_to(self, done):
        now = time.monotonic()
        if done > self.done:
            self.durations.append((now - self.last) / (done - self.done))
        self.done, self.last = done, now

    def _count(self):
        return f"{self.label} {self.done}" + ("" if self.total is None else f"/{self.total}")

    def _line(self, text):
        self.out.write(self.out.clean(text) + "\n")
        self.out.flush()

    def _render(self):
        """One row that fits the terminal: count, bar, then as many figures as there is room for."""
        shown = self.inner or self
        elapsed = clock(time.monotonic() - shown.began)
        if shown.done == shown.total:
            texts = [f"took {elapsed}", *shown.figures]
        else:
            texts = [f"eta {clock(shown.eta())}", *shown.figures, f"elapsed {elapsed}"]
        room = self.console.width - len(shown._count()) - 1 - (bar := 10)
        fits = []
        for text in texts:
            if len(text) + 2 > room:
                break
            fits.append(text)
            room -= len(text) + 2
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(
            Text(shown._count(), no_wrap=True),
            ProgressBar(shown.total, shown.done, bar + min(room, 30), complete_style="cyan", finished_style="green"),
            *(Text(" " + text if i else text, no_wrap=True) for i, text in enumerate(fits[1:] + fits[:1])),
        )
        return row


def phase(label: str, iterable, total: int | None = None, file=None):
    """Yields from `iterable` under a bar of its own; where there is no terminal, one line when it has ended."""
    with Progress(length(iterable, total), unit=label, file=file) as progress:
        for item in iterable:
            yield item
            progress.advance()
        if not progress.live:
            progress.say(f"{progress._count()}  {clock(time.monotonic() - progress.began)}")


class Output:
    """A text stream that outlives its reader: after a failed write the rest goes to /dev/null and the run goes on."""

    def __init__(self, file):
        self.file = file.file if isinstance(file, Output) else file  # None: the process began with stdout closed
        self.encoding = getattr(self.file, "encoding", None) or "utf-8"

    def write(self, text):
        self._try("write", text)
        return len(text)

    def flush(self):
        self._try("flush")

    def isatty(self):
        return bool(self.file and self.file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"))

    def fileno(self):
        return self.file.fileno()

    def clean(self, text):
        """`text` without control characters, in characters that the stream's encoding has."""
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


def length(iterable, total):
    return total if total is not None or not hasattr(iterable, "__len__") else len(iterable)


def clock(seconds):
    """Seconds as 45s, 1m20s, 2h05m, 3d04h; "-" when None."""
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

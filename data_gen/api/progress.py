"""The progress of a run: a live line in a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_gen.api.ledger import Entry
from data_gen.api.prices import Budget, format_usd
from data_gen.api.rate import Rate
from data_gen.base.cli import discard_output

PLAIN_EVERY_S = 15
REFRESH_S = 0.25


class Screen(Console):
    """A console on stderr. When its reader leaves, output is discarded: rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Discard further output."""
        discard_output(self.file)  # type: ignore[arg-type]


class RowCounts(Protocol):
    """What is shown of a curator."""

    unit: str  # what a row is called
    wanted: int
    rows: list[Any]
    items: int
    answers: int


class RunState(Protocol):
    """What is shown of a Collector."""

    budget: Budget
    rate: Rate
    last_failure: str

    @property
    def curator(self) -> RowCounts:
        """Return the counts of the rows."""


class Progress:
    """Shows the state of a Collector. With quiet, prints events and no progress."""

    def __init__(self, quiet: bool = False):
        self.console = Screen(file=sys.stderr, highlight=False)
        self.quiet = quiet
        self.live: Live | None = None
        self.started = self.shown = time.monotonic()
        # (time, rows) at the first answer: the rows with which a resumed run begins do not count as speed.
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.quiet:
            self.live = Live(console=self.console, refresh_per_second=1 / REFRESH_S, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal."""
        if self.live:
            self.live.stop()

    def print_line(self, text: str) -> None:
        """Print a line about an event."""
        self.console.print(text, markup=False, soft_wrap=True)

    def show_state(self, run: RunState) -> None:
        """Update the live line, or print a plain one if the last is old."""
        if self.quiet:
            return
        now, rows = time.monotonic(), len(run.curator.rows)
        if self.first is None and run.rate.answers:
            self.first = now, rows
        if self.live:
            self.live.update(self.draw_line(run, now))
        elif now - self.shown >= PLAIN_EVERY_S:
            self.shown = now
            self.print_line(f"{rows:,} of {run.curator.wanted:,} {run.curator.unit} · {self.describe_state(run, now)}")

    def show_reading(self, entries: Iterable[Entry], total: int, curator: RowCounts) -> Iterator[Entry]:
        """Yield the entries of a ledger and show how many are read: a large ledger takes a minute."""
        n = 0
        for entry in entries:
            yield entry
            n += entry.kind == "answer"
            now = time.monotonic()
            if not self.quiet and now - self.shown >= (REFRESH_S if self.live else PLAIN_EVERY_S):
                self.shown = now
                text = f"reading {n:,} of {total:,} recorded answers · {len(curator.rows):,} {curator.unit}"
                if self.live:
                    self.live.update(Text(text))
                else:
                    self.print_line(text)

    def draw_line(self, run: RunState, now: float) -> Table:
        """Return the live line: rows, a bar, and the state."""
        curator = run.curator
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=curator.wanted, completed=len(curator.rows), width=28)
        grid.add_row(f"{len(curator.rows):,}/{curator.wanted:,}", bar, self.describe_state(run, now))
        return grid

    def describe_state(self, run: RunState, now: float) -> str:
        """Return yield, money, answers, requests in flight and the time that remains."""
        curator, budget, rate = run.curator, run.budget, run.rate
        share = len(curator.rows) / curator.items if curator.items else 0
        cap = f" of {format_usd(budget.cap, 2)}" if budget.cap is not None else ""
        state = f"{rate.in_flight} of {int(rate.limit)} in flight"
        if rate.is_open() or rate.wait_s() > 1:
            state = f"waiting {rate.wait_s():.0f} s, {run.last_failure[:60] or 'a limit is reached'}"
        lost = f" (+{format_usd(budget.uncertain)} at most lost)" if budget.uncertain else ""
        parts = [f"yield {share:.0%}", f"{format_usd(budget.spent)}{cap}{lost}", f"{curator.answers:,} answers", state]
        return " · ".join([*parts, f"ETA {self.estimate_remaining(run, now)}"])

    def estimate_remaining(self, run: RunState, now: float) -> str:
        """Return the time that remains by the speed since the first answer, or "?" before any row."""
        if self.first is None or len(run.curator.rows) <= self.first[1]:
            return "?"
        speed = (len(run.curator.rows) - self.first[1]) / max(1e-9, now - self.first[0])
        return format_clock((run.curator.wanted - len(run.curator.rows)) / speed)


def format_clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 4:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

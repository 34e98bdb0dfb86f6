"""The progress of a run: a live line in a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_gen.api.ledger import Entry
from data_gen.api.prices import format_usd
from data_gen.base.cli import discard_output

if TYPE_CHECKING:
    from data_gen.api.collector import Collector, RowKeeper

PLAIN_EVERY_S = 15
REFRESH_S = 0.25


class Screen(Console):
    """A console on stderr. When its reader leaves, output is discarded: rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Discard further output."""
        discard_output(self.file)  # type: ignore[arg-type]


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

    def show_state(self, collector: "Collector") -> None:
        """Update the live line, or print a plain one if the last is old."""
        if self.quiet:
            return
        now, rows = time.monotonic(), len(collector.curator.rows)
        if self.first is None and collector.rate.answers:
            self.first = now, rows
        if self.live:
            self.live.update(self.draw_line(collector, now))
        elif now - self.shown >= PLAIN_EVERY_S:
            self.shown = now
            self.print_line(f"{rows:,} of {collector.curator.wanted:,} rows · {self.describe_state(collector, now)}")

    def show_reading(self, entries: Iterable[Entry], total: int, curator: "RowKeeper") -> Iterator[Entry]:
        """Yield the entries of a ledger and show how many are read: a large ledger takes a minute."""
        n = 0
        for entry in entries:
            yield entry
            n += entry.kind == "answer"
            now = time.monotonic()
            if not self.quiet and now - self.shown >= (REFRESH_S if self.live else PLAIN_EVERY_S):
                self.shown = now
                text = f"reading {n:,} of {total:,} recorded answers · {len(curator.rows):,} rows"
                if self.live:
                    self.live.update(Text(text))
                else:
                    self.print_line(text)

    def draw_line(self, collector: "Collector", now: float) -> Table:
        """Return the live line: rows, a bar, and the state."""
        curator = collector.curator
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=curator.wanted, completed=len(curator.rows), width=28)
        grid.add_row(f"{len(curator.rows):,}/{curator.wanted:,}", bar, self.describe_state(collector, now))
        return grid

    def describe_state(self, collector: "Collector", now: float) -> str:
        """Return yield, money, answers, requests in flight and the time that remains."""
        curator, budget, rate = collector.curator, collector.budget, collector.rate
        share = len(curator.rows) / curator.items if curator.items else 0
        cap = f" of {format_usd(budget.cap, 2)}" if budget.cap is not None else ""
        state = f"{rate.in_flight} of {int(rate.limit)} in flight"
        if rate.is_open() or rate.wait_s() > 1:
            state = f"waiting {rate.wait_s():.0f} s, {collector.last_failure[:60] or 'a limit is reached'}"
        lost = f" (+{format_usd(budget.uncertain)} at most lost)" if budget.uncertain else ""
        parts = [f"yield {share:.0%}", f"{format_usd(budget.spent)}{cap}{lost}", f"{curator.answers:,} answers", state]
        return " · ".join([*parts, f"ETA {self.estimate_remaining(collector, now)}"])

    def estimate_remaining(self, collector: "Collector", now: float) -> str:
        """Return the time that remains by the speed since the first answer, or "?" before any row."""
        if self.first is None or len(collector.curator.rows) <= self.first[1]:
            return "?"
        speed = (len(collector.curator.rows) - self.first[1]) / max(1e-9, now - self.first[0])
        return format_clock((collector.curator.wanted - len(collector.curator.rows)) / speed)


def format_clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 4:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

"""How a run is going: a live line in a terminal, a plain one now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_gen.api.prices import usd
from data_gen.base.cli import unread

PLAIN_EVERY_S = 15
REFRESH_S = 0.25


class Screen(Console):
    """stderr. Where its reader leaves, rich would end the process, with answers in flight."""

    def on_broken_pipe(self):
        unread(self.file)


class Progress:
    """Shows a Collector. With quiet, says what happens and shows no progress."""

    def __init__(self, quiet=False):
        self.console = Screen(file=sys.stderr, highlight=False)
        self.quiet, self.live = quiet, None
        self.started = self.shown = time.monotonic()
        self.first = None  # (time, rows) when the first answer had come: what a resumed run begins with is no speed

    def __enter__(self):
        if self.console.is_terminal and not self.quiet:
            self.live = Live(console=self.console, refresh_per_second=1 / REFRESH_S, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Gives the terminal back as it was."""
        if self.live:
            self.live.stop()

    def say(self, text):
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self, collector):
        if self.quiet:
            return
        now, rows = time.monotonic(), len(collector.curator.rows)
        if self.first is None and collector.rate.answers:
            self.first = now, rows
        if self.live:
            self.live.update(self.drawn(collector, now))
        elif now - self.shown >= PLAIN_EVERY_S:
            self.shown = now
            self.say(f"{rows:,} of {collector.curator.wanted:,} rows · {self.facts(collector, now)}")

    def reading(self, entries, total, curator):
        """The entries of a ledger, while it is told how far the curator has come: large ones take a minute."""
        n = 0
        for entry in entries:
            yield entry
            n += entry.kind == "answer"
            now = time.monotonic()
            if not self.quiet and now - self.shown >= (REFRESH_S if self.live else PLAIN_EVERY_S):
                self.shown = now
                text = f"reading {n:,} of {total:,} recorded answers · {len(curator.rows):,} rows"
                self.live.update(Text(text)) if self.live else self.say(text)

    def drawn(self, collector, now):
        curator = collector.curator
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=curator.wanted, completed=len(curator.rows), width=28)
        grid.add_row(f"{len(curator.rows):,}/{curator.wanted:,}", bar, self.facts(collector, now))
        return grid

    def facts(self, collector, now) -> str:
        curator, budget, rate = collector.curator, collector.budget, collector.rate
        share = len(curator.rows) / curator.items if curator.items else 0
        cap = f" of {usd(budget.cap, 2)}" if budget.cap is not None else ""
        state = f"{rate.in_flight} of {int(rate.limit)} in flight"
        if rate.is_open() or rate.ready_in() > 1:
            state = f"waiting {rate.ready_in():.0f} s, {collector.last_failure[:60] or 'a limit is reached'}"
        lost = f" (+{usd(budget.uncertain)} at most lost)" if budget.uncertain else ""
        parts = [f"yield {share:.0%}", f"{usd(budget.spent)}{cap}{lost}", f"{curator.answers:,} answers", state]
        return " · ".join([*parts, f"ETA {self.eta(collector, now)}"])

    def eta(self, collector, now) -> str:
        if self.first is None or len(collector.curator.rows) <= self.first[1]:
            return "?"
        speed = (len(collector.curator.rows) - self.first[1]) / max(1e-9, now - self.first[0])
        return clock((collector.curator.wanted - len(collector.curator.rows)) / speed)


def clock(seconds) -> str:
    """1:02:03, or 4:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

"""Progress of a run: its own speed, the reason for a wait, and a terminal that is restored."""

import io
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")
pytest.importorskip("rich")

from rich.console import Console

from data_gen.api import progress as module
from data_gen.api.prices import PICO, Budget
from data_gen.api.progress import PLAIN_EVERY_S, Progress, format_clock
from data_gen.api.rate import BREAKER_FAILURES, Rate


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", found := Clock())
    return found


@pytest.fixture
def collector(time):
    curator = SimpleNamespace(unit="rows", rows=[0] * 100, wanted=1000, items=160, answers=8)
    budget = Budget(2 * PICO, PICO // 2, PICO // 100)
    return SimpleNamespace(curator=curator, budget=budget, rate=Rate(32, clock=time), last_failure="500, broken")


def shown(quiet=False, terminal=False):
    progress = Progress(quiet)
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)
    return progress, progress.console.file


def test_a_plain_line_now_and_then(time, collector):
    progress, file = shown()
    with progress:
        for _ in range(40):
            time.now += 1
            progress.show_state(collector)
    told = "100 of 1,000 rows · yield 62% · $0.5000 of $2.00 (+$0.0100 at most lost) · 8 answers"
    assert file.getvalue().splitlines() == [f"{told} · 0 of 4 in flight · ETA ?"] * 2


def test_the_time_left_is_by_the_rows_of_this_run_since_its_first_answer(time, collector):
    progress, _ = shown()
    progress.show_state(collector)
    time.now += 500  # until a first answer
    collector.rate.answers = 1
    progress.show_state(collector)
    assert progress.estimate_remaining(collector, time.now) == "?"
    time.now += 10
    collector.curator.rows += [0] * 100
    progress.show_state(collector)
    assert progress.estimate_remaining(collector, time.now) == "1:20"


def test_a_wait_says_why(time, collector):
    progress, _ = shown()
    for _ in range(BREAKER_FAILURES):
        collector.rate.record_start()
        collector.rate.record_failure(time.now)
    assert "waiting 5 s, 500, broken" in progress.describe_state(collector, time.now)
    time.now += 4.5
    assert "waiting 0 s, 500, broken" in progress.describe_state(collector, time.now), "until a request has got through"
    collector.rate, collector.last_failure = Rate(32, clock=time), ""
    collector.rate.pause(7)
    assert "waiting 7 s, a limit is reached" in progress.describe_state(collector, time.now)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_large_ledger_shows_how_far_it_is_read(time, collector, terminal):
    progress, file = shown(terminal=terminal)
    entries = [SimpleNamespace(kind="answer" if n % 2 else "refused") for n in range(40)]
    with progress:
        for n, _ in enumerate(progress.show_reading(entries, 20, collector.curator)):
            time.now += 1
            if terminal and n == 20:
                progress.live.refresh()
                assert "reading 10 of 20" in file.getvalue()
    if not terminal:
        assert file.getvalue().splitlines() == [
            f"reading {n} of 20 recorded answers · 100 rows" for n in (7, 15)[: 40 // PLAIN_EVERY_S]
        ]


def test_quiet_says_what_happens_alone(time, collector):
    progress, file = shown(quiet=True, terminal=True)
    with progress:
        for _ in progress.show_reading([SimpleNamespace(kind="answer")] * 3, 3, collector.curator):
            time.now += 100
        progress.show_state(collector)
        progress.print_line("[stopped] at the cap")
    assert file.getvalue() == "[stopped] at the cap\n"


def test_the_terminal_is_given_back(collector):
    progress, file = shown(terminal=True)
    with progress:
        progress.show_state(collector)
        progress.close()  # a second signal ends the process within
        text = file.getvalue()
    assert "100/1,000" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.7, "1:00"), (245, "4:05"), (3723, "1:02:03"), (360_000, "100:00:00")]
)
def test_durations_are_shown_with_hours_only_where_there_are_some(seconds, text):
    assert format_clock(seconds) == text

"""Progress on a terminal, in a pipe and with nobody listening."""

import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from engine.base import terminal as log
from engine.base.terminal import Output, Progress, format_duration, track
from tests.helpers.terminals import Terminal

ROOT = Path(__file__).parents[3]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def start(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, **options)


def read(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def figures(**changes):
    return dict(loss=2.34561, lr=1.8e-5, grad_norm=1.234, tokens_per_second=412.3) | changes


# Progress without a terminal


def test_a_plain_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(33, start=11, file=out) as progress:
        now[0] += 80 / 21
        progress.show_step(12, **figures())
    assert out.getvalue() == "step 12/33  loss 2.3456  lr 1.8e-05  norm 1.23  412 tok/s  eta 1m20s\n"


def test_eta_is_of_the_median_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with Progress(100, file=io.StringIO()) as progress:
        assert progress.estimate_seconds_left() is None
        for step, seconds in enumerate([50, 2, 2, 2, 600], 1):  # a first step and a save that took long
            now[0] += seconds
            progress.show_step(step, **figures())
    assert progress.estimate_seconds_left() == 95 * 2


def test_plain_lines_every_so_often_and_the_last():
    out = io.StringIO()
    with Progress(12, every=5, file=out) as progress:
        for step in range(1, 13):
            progress.show_step(step, **figures(loss=math.nan if step == 5 else None, tokens_per_second=None))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["5/12", "10/12", "12/12"]
    assert "loss nan" in lines[0] and "loss -" in lines[1] and "- tok/s" in lines[1]


def test_messages_are_text_without_control_characters():
    out = io.StringIO()
    with Progress(3, file=out) as progress:
        progress.print_message("[red]a[/red] :smile: \x1b[31mb\r\x07\x9b c\nd\te")
    assert out.getvalue() == "[red]a[/red] :smile: [31mb c\nd\te\n"


def test_a_stream_that_knows_ascii_only():
    raw = io.BytesIO()
    with Progress(3, file=io.TextIOWrapper(raw, encoding="ascii")) as progress:
        progress.print_message("héllo")
        assert raw.getvalue() == b"h?llo\n"  # flushed too


def test_phase_ends_with_one_line():
    out = io.StringIO()
    assert list(track("tokenising", range(4), file=out)) == [0, 1, 2, 3]
    assert list(track("reading", iter("ab"), file=out)) == ["a", "b"]
    assert out.getvalue() == "tokenising 4/4  0s\nreading 2  0s\n"


def test_forced_colour_leaves_a_pipe_plain():
    code = "from engine.base.terminal import Progress\nwith Progress(1) as p: p.print_message('hi'); "
    code += "p.show_step(1, loss=1, lr=1, grad_norm=1,"
    process = start(
        code + " tokens_per_second=1)",
        stdout=subprocess.PIPE,
        env=os.environ | {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"},
    )
    text = process.communicate()[0].decode()
    assert text.startswith("hi\nstep 1/1  loss 1.0000") and not CONTROL.search(text)


RUN = """
    import sys
    from engine.base.terminal import Progress, track
    list(track("reading", range(10)))
    with Progress(3000) as progress:
        for step in range(1, 3001):
            progress.show_step(step, loss=1.0, lr=1.0, grad_norm=1.0, tokens_per_second=1.0)
            progress.print_message("x" * 100)
    print("more", flush=True)
    print("lived", file=sys.stderr)
"""


def test_a_reader_that_leaves_does_not_end_the_run():
    process = start(RUN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(), error) == (0, b"lived\n")


def test_a_run_that_starts_without_stdout():
    code = textwrap.dedent(RUN)
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code], cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"lived\n")


# Progress on a terminal


def on_terminal(code, columns=100, hang_up=False, **environment):
    """What `code` shows on a terminal of its own, and its exit code."""
    environment = {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30"} | environment
    terminal = Terminal(textwrap.dedent(code), env=os.environ | environment, stderr=False)
    if not hang_up:
        terminal.read_all()
    os.close(terminal.ours)
    _, error = terminal.process.communicate()
    return terminal.said, error, terminal.process.returncode


LIVE = """
    import time
    from engine.base.terminal import Progress
    with Progress(30) as progress:
        for step in range(1, 31):
            time.sleep(0.02)
            progress.show_step(step, loss=1 + 1 / step, lr=1.8e-05, grad_norm=1.234, tokens_per_second=412.3)
            if step == 10:
                progress.print_message("[bold]saved[/bold] :smile: \\x1b]0;title\\x07")
            if step == 20:
                for _ in progress.track("evaluating", range(8)):
                    time.sleep(0.1)
"""


def test_live_bar_on_a_terminal():
    shown, error, code = on_terminal(LIVE)
    assert (code, error) == (0, "")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "━" in text and re.search(r"eta \d+s", text) and re.search(r"loss 1\.\d{4}", text)
    assert re.search(r"evaluating \d/8", text)
    assert "[bold]saved[/bold] :smile: ]0;title" in text and "\x07" not in shown
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert last.startswith("step 30/30") and re.search(r"took \d+s", last)
    assert "\x1b[?25l" not in shown  # the cursor is never hidden, so no kill can leave it hidden


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_the_bar_fits_its_terminal(columns):
    shown, error, code = on_terminal(LIVE.replace("0.1)", "0)"), columns)
    rows = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert (code, error) == (0, "")
    assert max(len(row) for row in rows if row.startswith("step")) <= columns
    assert sum(row.startswith("step") for row in rows) >= 3
    assert "\x1b[1A" not in shown  # one row: nothing to climb over
    if columns >= 80:
        assert "norm 1.23" in rows[-1] or "norm 1.23" in rows[-2]


def test_a_dumb_terminal_gets_plain_lines():
    shown, _, code = on_terminal(LIVE.replace("0.1)", "0)"), TERM="dumb")
    assert code == 0 and not CONTROL.search(shown.replace("\r\n", "\n"))
    assert shown.splitlines()[0].startswith("step 1/30  loss 2.0000")


def test_a_terminal_that_goes_away_does_not_end_the_run():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + textwrap.dedent(LIVE)
    _, error, code = on_terminal(code, hang_up=True)
    assert (code, error) == (0, "")


def test_output_of_a_closed_file():
    file = io.StringIO()
    out = Output(file)
    file.close()
    out.write("x")
    out.flush()
    assert not out.isatty()


def test_clock():
    assert [format_duration(s) for s in (None, 0, 59.4, 59.6, 80, 3600, 7500, 273600)] == [
        "-", "0s", "59s", "1m00s", "1m20s", "1h00m", "2h05m", "3d04h"
    ]  # fmt: skip


def test_lines_wrap_between_words_on_a_terminal_alone(monkeypatch, capsys):
    text = "data: " + ", ".join(f"{n} examples" for n in range(12)) + "\n  short"
    log.print_wrapped(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    log.print_wrapped(text)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and len(lines) > 4 and lines[-1] == "  short"
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    path = "/data/" + "long-name/" * 8  # what is copied from a terminal stays in one piece
    log.print_wrapped(f"the model is in {path}")
    assert f"  {path}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", ["20", "5"])
def test_a_line_goes_on_two_columns_after_its_own_beginning(columns, monkeypatch, capsys):
    """Whatever blanks it ends with; and no terminal is taken for narrower than 20 columns."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", columns)
    log.print_wrapped("ab cd ef ef ef ef ef ef   \n\n   gh ij ij ij ij ij ij")
    rows = [row.rstrip() for row in capsys.readouterr().out.splitlines()]
    assert rows == ["ab cd ef ef ef ef ef", "  ef", "", "   gh ij ij ij ij ij", "     ij"]


def test_the_bar_at_every_width(monkeypatch, snapshot):
    """At a step, at the last, of an evaluation within a run, and of work that has no end."""
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])

    def show(progress, width):
        progress.console = Console(width=width, file=io.StringIO(), color_system=None)
        progress.console.print(progress._render())
        return f"{width:3} |{progress.console.file.getvalue().removesuffix(chr(10))}|"

    run, endless = Progress(30, start=3, file=io.StringIO()), Progress(None, unit="rows", file=io.StringIO())
    lines = []
    for step, seconds in ((4, 40.0), (17, 130.0), (30, 3600.0)):
        now[0] += seconds
        run.show_step(step, **figures())
        endless.advance(7)
        within = Progress(50, file=io.StringIO())
        items = within.track("evaluating", range(8))
        for _ in range(step // 10 + 2):
            next(items)
            now[0] += 2.0
        for width in (30, 45, 46, 60, 61, 75, 76, 86, 87, 100, 140):
            lines += [show(run, width)]
        lines += [show(progress, width) for progress in (endless, within) for width in (40, 90)]
    assert "\n".join(lines) == snapshot


@pytest.mark.parametrize(
    ("counts", "told"),
    [([400_000], (1, [0, 1])), ([600_000, 600_000, 1_300_000], (2, [1, 0, 1, 0])),
     ([499_999] * 6, (3, [0, 1, 0, 1, 0, 1, 0]))],
)  # fmt: skip
def test_millions_of_parameters_are_counted(counts, told, monkeypatch):
    """Each part rounded with all before it, so that nothing is lost; the bar ends full."""
    made, advanced = [], []

    class Bar(Progress):
        def __init__(self, total, **more):
            super().__init__(total, file=io.StringIO(), **more)
            made.append((total, more))

        def advance(self, n=1):
            advanced.append(n)
            super().advance(n)

    monkeypatch.setattr(log, "Progress", Bar)
    with log.watch_parameters("reading", sum(counts)) as advance:
        for n in counts:
            advance(n)
    assert made == [(told[0], {"unit": "reading, M parameters"})] and advanced == told[1] and sum(advanced) == told[0]

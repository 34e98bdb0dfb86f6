"""What signals do before training and in it, in every order."""

import itertools
import os
import signal

import pytest

from engine.base import signals
from engine.base.errors import Stopped
from engine.base.signals import Signals

NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
KINDS = [getattr(signal, name) for name in NAMES]


@pytest.fixture
def handlers():
    """Give the process its own handlers back."""
    before = {kind: signal.getsignal(kind) for kind in KINDS}
    yield before
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture
def exits(monkeypatch):
    """The codes of ends that a signal asked for."""
    codes = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("name", NAMES)
def test_before_training_a_signal_ends_the_run_at_once(name, handlers, exits):
    ours = Signals()
    with pytest.raises(Stopped, match=f"stopped by {name} before the first step; there is nothing to save"):
        signal.raise_signal(getattr(signal, name))
    assert ours.pending() and exits == []


@pytest.mark.parametrize(("first", "second"), list(itertools.product(NAMES, NAMES)))
def test_in_training_the_first_is_noted_and_a_second_ends_the_process_but_for_a_hang_up(
    first, second, handlers, exits, capfd
):
    """The shell and the kernel both send SIGHUP for one terminal that is closed, also after a Ctrl-C."""
    ours = Signals()
    ours.training = True
    assert not ours.pending()
    ours.handle(getattr(signal, first), None)
    assert ours.pending() and ours.received == first and exits == [] and capfd.readouterr().err == ""
    ours.handle(getattr(signal, second), None)
    assert ours.pending() and exits == [1] * (second != "SIGHUP")
    assert (f"{second} again: leaving at once" in capfd.readouterr().err) == (second != "SIGHUP")


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_hang_up_that_is_ignored_from_the_start_stays_ignored(is_ignored, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    ours = Signals()
    assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == is_ignored
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == ours.handle


def test_after_a_hang_up_what_was_printed_to_the_terminal_goes_nowhere(handlers):
    """A terminal that is still there is printed to, and what is no terminal is left alone."""
    pairs = [os.openpty() for _ in range(3)]
    (gone, _), (there, _), (other, _) = pairs
    reader, writer = os.pipe()
    ours = Signals()
    ours.training, ours.terminals = True, [pairs[0][1], pairs[1][1], pairs[2][1]]
    try:
        for master in (gone, other):
            os.close(master)
        ours.handle(signal.SIGHUP, None)
        assert [os.write(tty, b"x") for _, tty in pairs] == [1, 1, 1] and os.read(there, 9) == b"x"
        os.write(writer, b"y")
        assert os.read(reader, 9) == b"y"
    finally:
        for fd in (there, reader, writer, *(tty for _, tty in pairs)):
            os.close(fd)

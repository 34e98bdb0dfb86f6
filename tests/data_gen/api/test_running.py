"""The signals that stop a run."""

import signal

import pytest

from data_gen.api.running import list_stop_signals


@pytest.mark.parametrize("is_under_nohup", [False, True])
def test_a_hang_up_stops_a_run_unless_it_is_ignored(is_under_nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_under_nohup else signal.SIG_DFL)
    try:
        stops = set(list_stop_signals())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stops == {signal.SIGINT, signal.SIGTERM} | (set() if is_under_nohup else {signal.SIGHUP})

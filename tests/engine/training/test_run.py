"""When a run is asked to stop: by a signal of its own, or by what all ranks have counted."""

from types import SimpleNamespace

import pytest

from engine.training.run import Run


@pytest.mark.parametrize(
    ("ranks", "pending", "counted", "wanted"),
    [(1, True, 0, True), (1, False, 3, False), (2, True, 0, False), (2, False, 1, True), (2, False, 0, False)],
)
def test_one_process_goes_by_its_signals_and_several_by_their_count(ranks, pending, counted, wanted):
    signals, world = SimpleNamespace(pending=lambda: pending), SimpleNamespace(size=ranks)
    run = Run(world, signals, None, None, None, frozenset(), n_signals=counted)
    assert run.is_asked_to_stop() is wanted

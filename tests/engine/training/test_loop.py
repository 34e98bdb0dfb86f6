"""What happens after a step, in order: its report, the end of a run that cannot go on, evaluation, save, a signal."""

from types import SimpleNamespace

import pytest

from engine.base.errors import Stopped
from engine.training import loop


class Stand:
    """A run of 4 steps whose parts write down what is asked of them."""

    def __init__(self, monkeypatch, lost=0, signal=0, runs_ahead=False):
        self.log, self.step, self.signal, self.lost = [], 0, signal, lost
        monkeypatch.setattr(loop, "evaluate_if_due", lambda *args: self.log.append(f"evaluate {args[-1]}"))
        monkeypatch.setattr(loop, "report_step", lambda plan, run, checkpoints, report: self.log.append(report))
        monkeypatch.setattr(loop, "lr_factor", lambda schedule, step, total, warmup: step / total)
        config = SimpleNamespace(lr=2.0, lr_schedule="x", warmup_ratio=0.0, save_every="2")
        self.plan = SimpleNamespace(
            config=config, device=SimpleNamespace(type="cpu"), total_steps=4, runs_ahead=runs_ahead,
            must_wait_after=lambda step: step == 4, saves_during_run=True, is_due=lambda every, step: step % 2 == 0,
        )  # fmt: skip
        self.run = SimpleNamespace(
            progress=SimpleNamespace(print_message=self.log.append), profile=None,
            world=SimpleNamespace(note_place=lambda place: None), is_asked_to_stop=lambda: self.step == self.signal,
        )  # fmt: skip
        self.checkpoints = SimpleNamespace(
            save=lambda step: self.log.append(f"save {step}"), stop_run=self.stop, report_finished_save=lambda: None
        )
        self.steps = SimpleNamespace(take_step=self.take, take_reports=self.report)

    def stop(self, step):
        raise Stopped(f"after {step}")

    def take(self, step, lr):
        self.step = step
        self.log.append(f"take {step} at {lr}")
        return step != self.lost

    def report(self, wait):
        return [f"report {self.step}"] if wait else []

    def train(self, first_step=1):
        loop.train(self.plan, self.run, self.checkpoints, self.steps, None, first_step)
        return self.log


def test_a_step_is_reported_then_evaluated_then_saved(monkeypatch):
    assert Stand(monkeypatch).train(3) == [
        "step 3 begins; its line comes when it has ended",
        "take 3 at 1.5", "report 3", "evaluate 3",
        "take 4 at 2.0", "report 4", "evaluate 4", "save 4",
    ]  # fmt: skip


def test_a_run_ahead_is_reported_where_something_needs_it(monkeypatch):
    log = Stand(monkeypatch, runs_ahead=True).train(2)
    assert [line for line in log if line.startswith("report")] == ["report 4"]


def test_a_step_that_was_not_taken_is_not_in_the_state_that_is_saved(monkeypatch):
    stand = Stand(monkeypatch, lost=2, runs_ahead=True)
    with pytest.raises(Stopped, match="after 1"):
        stand.train()
    assert stand.log[-2:] == ["take 2 at 1.0", "report 2"]


def test_a_signal_ends_the_run_after_the_step_that_it_reached(monkeypatch):
    stand = Stand(monkeypatch, signal=2)
    with pytest.raises(Stopped, match="after 2"):
        stand.train()
    assert stand.log[-4:] == ["report 2", "evaluate 2", "save 2", "report 2"]
    assert Stand(monkeypatch).train(5) == [], "nothing is left to do"

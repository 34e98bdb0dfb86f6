"""What is told and recorded of a step, and when a run gives up: with a run that only remembers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import CriaError, DivergedError
from engine.distributed.world import World
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS
from engine.planning.step_time import flops_per_token
from engine.training import step_report
from engine.training.loss_spikes import SpikeDetector
from engine.training.run import Run
from engine.training.step import StepReport
from engine.training.step_report import count_skipped, list_first, report_step, require_finite_end

SHAPE = MODELS["tiny"]
REPORT = StepReport(
    step=7, lr=0.5, loss=2.0, grad_norm=3.0, is_finite=True, updated_in_backward=False, n_signals=1, seconds=4.0,
    n_tokens=80, n_computed_tokens=60, n_loss_tokens=40, examples=[2, 0],
)  # fmt: skip


@pytest.fixture
def run():
    """Return a run that remembers events, figures and messages."""
    run = Run(
        World(), None, SimpleNamespace(said=[], figures=[]), SimpleNamespace(events=[]), SpikeDetector(6.0), frozenset()
    )
    run.metrics.write = lambda event, **values: run.metrics.events.append((event, values))
    run.progress.print_message = run.progress.said.append
    run.progress.show_step = lambda step, **figures: run.progress.figures.append((step, figures))
    return run


def plan_of(device="cpu", **config):
    return SimpleNamespace(
        config=SimpleNamespace(**{"max_skips": 2, "spike_rollback": False} | config), device=torch.device(device),
        order=SimpleNamespace(steps_per_epoch=3), train=SimpleNamespace(sources=["f:1", "f:2", "f:3"]), total_steps=9,
        model_config=SHAPE, adapter=None,
    )  # fmt: skip


def test_all_figures_of_a_step_are_recorded(run, monkeypatch):
    monkeypatch.setattr(step_report.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    report_step(plan_of(), run, None, REPORT)
    assert run.metrics.events == [("train", {
        "step": 7, "epoch": 2.3333, "loss": 2.0, "lr": 0.5, "grad_norm": 3.0, "examples": 2, "tokens": 80,
        "computed_tokens": 60, "loss_tokens": 40, "step_seconds": 4.0, "tokens_per_second": 20.0, "mfu": None,
        "peak_memory_bytes": 5120,
    })]  # fmt: skip
    assert run.progress.figures == [(7, {"loss": 2.0, "lr": 0.5, "grad_norm": 3.0, "tokens_per_second": 20.0})]
    assert (run.n_signals, run.n_skipped, run.n_spikes, run.progress.said) == (1, 0, 0, [])


@pytest.mark.parametrize(
    "name, n_ranks, adapter", [("H100", 1, None), ("H100", 4, None), ("H100", 1, AdapterConfig(r=4)), (None, 1, None)]
)
def test_on_a_gpu_its_memory_and_the_share_of_the_peak_of_all(name, n_ranks, adapter, run, monkeypatch):
    run.world = SimpleNamespace(size=n_ranks)
    card = name and SimpleNamespace(peak_tflops=5.0)
    monkeypatch.setattr(step_report, "detect_card", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 99)
    plan = plan_of("cuda")
    plan.adapter = adapter
    report_step(plan, run, None, REPORT)
    ((_, found),) = run.metrics.events
    assert found["peak_memory_bytes"] == 99
    assert found["mfu"] == (name and pytest.approx(flops_per_token(SHAPE, adapter) * (60 / 4.0) / (n_ranks * 5e12)))


def test_a_skip_is_told_with_its_rows_and_too_many_end_the_run(run):
    skipped = replace(REPORT, loss=float("inf"), is_finite=False)
    for n in (1, 2):
        report_step(plan_of(), run, None, skipped)
        assert run.n_skipped == n
        assert run.progress.said[-1] == f"step 7: loss inf, gradient norm 3.0; no update ({n} in a row)"
    told = {"step": 7, "reason": "non-finite", "loss": float("inf"), "grad_norm": 3.0, "rows": ["f:3", "f:1"]}
    assert [event for event, _ in run.metrics.events] == ["skip", "train"] * 2 and run.metrics.events[0][1] == told
    assert run.spike_detector.losses == []
    with pytest.raises(DivergedError, match=r"^step 7: 3 steps in a row had no finite loss .*lower --lr.*: f:3, f:1$"):
        report_step(plan_of(), run, None, skipped)
    report_step(plan_of(), run, None, REPORT)
    assert run.n_skipped == 0 and run.spike_detector.losses == [(7, 2.0)]


def test_a_skip_after_an_update_in_backward_ends_the_run(run):
    report_step(plan_of(), run, None, replace(REPORT, updated_in_backward=True))
    with pytest.raises(DivergedError, match=r"step 7: 1 step had no .*some layers are updated already, as --optimizer"):
        report_step(plan_of(), run, None, replace(REPORT, is_finite=False, updated_in_backward=True))


@pytest.mark.parametrize("back_to", [None, 4])
@pytest.mark.parametrize("rollback", [False, True])
def test_a_spike_is_told_and_undone_where_that_is_asked_for(rollback, back_to, run):
    run.spike_detector.losses = [(step, 2.0 + step % 2 / 100) for step in range(-20, 7)]
    checkpoints = SimpleNamespace(roll_back=lambda: back_to)
    plan = plan_of(spike_rollback=rollback, max_skips=1)
    report_step(plan, run, checkpoints, replace(REPORT, loss=9.0))
    text = "step 7: loss 9.0000 is a spike: the median was 2.0000 +- 0.0200"
    if rollback:
        text += (
            "; no state to go back to yet"
            if back_to is None
            else ("; back to the state of step 4, the rows of 3 steps are left out")
        )
    assert run.progress.said == [f"warning: {text}"] and run.n_spikes == 1
    undone = back_to if rollback else None
    spike = {"step": 7, "loss": 9.0, "median": 2.0, "deviation": 0.02, "back_to": undone, "rows": ["f:3", "f:1"]}
    assert run.metrics.events[-1] == ("spike", spike)
    losses, in_spike = run.spike_detector.losses, run.spike_detector.in_spike
    assert (losses[-1][0], in_spike) == ((4, False) if undone else (7, True))
    if undone:
        again = r"step 7: the loss spiked 2 times in a row after the state of step 4; .*f:3, f:1$"
        with pytest.raises(DivergedError, match=again):
            report_step(plan, run, checkpoints, replace(REPORT, loss=9.0))


def test_what_lies_far_apart_is_not_in_a_row(run):
    """A skip after a whole step counts anew, and a spike after quiet ones."""
    run.spike_detector.losses = [(step, 2.0 + step % 2 / 100) for step in range(-30, 0)]
    counts = []
    for step, (loss, is_finite) in enumerate([(9.0, True), (2.0, True), (9.0, True), (2.0, False), (2.0, True)], 1):
        report_step(plan_of(), run, None, replace(REPORT, step=step, loss=loss, is_finite=is_finite))
        counts.append((run.n_spikes, run.n_skipped))
    assert counts == [(1, 0), (0, 0), (1, 0), (1, 1), (0, 0)]


@pytest.mark.parametrize("n_skipped, n_updates, is_full", [(0, 5, False), (2, 0, False), (2, 5, False), (1, 5, True)])
def test_a_run_whose_last_steps_are_not_finite_ends_with_its_state_and_without_a_model(
    n_skipped, n_updates, is_full, run
):
    saved = []

    def save_or_fail(step, why):
        saved.append(step)
        if is_full:
            raise CriaError(f"{why}; the disk is full")

    checkpoints = SimpleNamespace(optimizer=SimpleNamespace(n_updates=n_updates), save_or_fail=save_or_fail)
    run.n_skipped = n_skipped
    if not n_skipped:
        require_finite_end(plan_of(), run, checkpoints)
    else:
        steps = f"the last {n_skipped} step{'s' if n_skipped > 1 else ''} of 9 had no finite loss"
        with pytest.raises(DivergedError, match=steps) as stop:
            require_finite_end(plan_of(), run, checkpoints)
        assert ("checkpoint-9 holds the last update" in str(stop.value)) == (n_updates > 0 and not is_full)
        assert ("the disk is full; lower --lr" in str(stop.value)) == is_full
    assert saved == ([9] if n_skipped and n_updates else [])


@pytest.mark.parametrize(
    "losses, n", [([], 0), ([1], 0), ([None], 1), ([1, None, None], 2), ([None, 1], 0), ([None, 1, None], 1)]
)
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_steps_that_were_skipped_at_the_end_are_counted_again(losses, n, name):
    lines = [{"event": "train", "loss": 1, "grad_norm": 1} | {name: loss} for loss in losses]
    assert count_skipped([*lines, {"event": "eval", "loss": None}]) == n


@pytest.mark.parametrize(
    "n, text", [(0, ""), (1, "0"), (8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "0, 1, 2, 3, 4, 5, 6, 7 ...")]
)
def test_the_first_rows_are_listed(n, text):
    assert list_first([str(i) for i in range(n)]) == text

"""Trackers get every figure of metrics.jsonl at its step, and can neither end nor change a run."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from engine.base.errors import UsageError
from engine.output.metrics import Metrics
from engine.output.trackers import TRACKERS, TrackedMetrics, make_run_name, open_tracker, require_tracker
from tests.helpers.forks import Started
from tests.helpers.run import environment, events
from tests.helpers.small_model import small_model


class FakeRun:
    """A run of a tracker: keeps what it is given, or fails at a call."""

    def __init__(self, fails_at=None):
        self.logged, self.closed, self.fails_at = [], 0, fails_at

    def log(self, figures, step):
        if len(self.logged) == self.fails_at:
            raise ConnectionError("no network\nat all")
        self.logged.append((step, figures))

    def close(self):
        self.closed += 1

    finish = close


def test_figures_go_to_the_tracker_and_texts_do_not(tmp_path):
    tracker, warnings = FakeRun(), []
    metrics = TrackedMetrics(Metrics(tmp_path / "m.jsonl"), tracker, warnings.append)
    metrics.write("train", step=1, loss=2.5, lr=1e-3, mfu=None, tokens=7)
    metrics.write("sample", step=1, prompt="a", text="b")
    metrics.write("answer", step=0, equal=True)
    metrics.write("score", step=0, equal=3)
    metrics.write("skip", step=2, reason="non-finite", loss=math.nan, grad_norm=math.inf, rows=["x"])
    metrics.write("eval", step=2, loss=2.0)
    metrics.write("end", step=None, seconds=3.0, status="stopped")
    metrics.close()
    assert tracker.logged == [
        (1, {"train/loss": 2.5, "train/lr": 1e-3, "train/tokens": 7}), (0, {"score/equal": 3}), (2, {"eval/loss": 2.0}),
    ]  # fmt: skip
    assert tracker.closed == 1 and not warnings and len((tmp_path / "m.jsonl").read_text().splitlines()) == 7


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tmp_path):
    tracker, warnings = FakeRun(fails_at=1), []
    metrics = TrackedMetrics(Metrics(tmp_path / "m.jsonl"), tracker, warnings.append)
    for step in range(1, 5):
        metrics.write("train", step=step, loss=1.0)
    metrics.close()
    assert len(tracker.logged) == 1 and len((tmp_path / "m.jsonl").read_text().splitlines()) == 4
    assert warnings == ["warning: the tracker failed and is left (no network); metrics.jsonl goes on"]


def test_a_tracker_that_is_not_installed_is_told_before_the_model_loads(tmp_path, monkeypatch):
    require_tracker("off")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS[1:]:
        with pytest.raises(
            UsageError, match=f"--tracker {name}: the package {name} is not installed; pip install {name}"
        ):
            require_tracker(name)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_goes_on_under_its_name(tmp_path, monkeypatch, name):
    calls, run = [], FakeRun()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=lambda **options: calls.append(options) or run))
    called = make_run_name(tmp_path / "my-run")
    assert called.startswith("my-run-") and called != make_run_name(tmp_path / "my-run")
    tracker = open_tracker(name, tmp_path, called, {"lr": math.inf, "data": ("a",)}, 0)
    tracker.log({"train/loss": 1.0}, 3)
    tracker.close()
    (options,) = calls
    assert options["name"] == called and options["resume"] == "allow" and options["project"] == "cria"
    assert options["config"] == {"lr": None, "data": ["a"]}
    assert run.logged == [(3, {"train/loss": 1.0})] and run.closed == 1

    def refuse(**_):
        raise RuntimeError("no key\nlog in first")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=refuse))
    with pytest.raises(UsageError, match=f"--tracker {name}: cannot begin: no key; mend that, or leave it out$"):
        open_tracker(name, tmp_path, called, {}, 0)


@pytest.mark.parametrize("after", [0, 2])
def test_a_resumed_run_keeps_the_figures_of_the_step_it_goes_on_after(tmp_path, monkeypatch, after):
    """Those of purge_step and later are dropped by what reads the files."""
    made = []

    class Writer:
        def __init__(self, folder, purge_step, flush_secs):
            made.append((folder, purge_step))

        def add_text(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    open_tracker("tensorboard", tmp_path, "x", {"lr": 1}, after)
    assert made == [(str(tmp_path / "tensorboard"), after + 1)]


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for after, losses in ((0, [3.0, 2.0, 9.0]), (2, [1.0])):  # killed after step 3, resumed after step 2
        tracker = open_tracker("tensorboard", tmp_path, "x", {"lr": 1}, after)
        for step, loss in enumerate(losses, after + 1):
            tracker.log({"train/loss": loss}, step)
        tracker.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]


FAKE_WANDB = """
import importlib.util, json, sys
from types import SimpleNamespace
log = open(sys.argv.pop(1), "a")
def init(**options):
    print(json.dumps(["init", options["name"]]), file=log, flush=True)
    return SimpleNamespace(log=lambda figures, step: print(json.dumps([step, figures]), file=log, flush=True),
                           finish=lambda: print(json.dumps(["finish"]), file=log, flush=True))
sys.modules["wandb"] = SimpleNamespace(init=init, __spec__=importlib.util.spec_from_loader("wandb", None))
from engine import finetune
from engine.base.errors import run_main
from engine.training import step
if STOP:
    import os, signal
    real = step.Steps.take_step
    def stop(self, n, lr):
        if n == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, n, lr)
    step.Steps.take_step = stop
sys.exit(run_main(finetune.main, sys.argv[1:]))
"""


def test_a_run_and_its_resume_are_one_in_the_tracker(tmp_path):
    rows, log, out = tmp_path / "rows.json", tmp_path / "log", tmp_path / "out"
    rows.write_text(json.dumps([{"instruction": f"Count to {i}.", "output": "1 2 3"} for i in range(10)]))
    args = ["--model", small_model(), "--data", rows, "--device", "cpu", "--dtype", "fp32", "--global-batch-size", 2,
            "--epochs", 1, "--out", out, "--tracker", "wandb"]  # fmt: skip
    for stop, code in ((True, 143), (False, 0)):
        process = Started(FAKE_WANDB.replace("STOP", str(stop)), log, *map(str, args), env=environment())
        _, err = process.communicate(timeout=120)
        assert process.returncode == code, err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = [line[1] for line in lines if line[0] == "init"]
    assert len(names) == 2 and len(set(names)) == 1 and names[0].startswith("out-")
    losses = [(line[0], line[1]["train/loss"]) for line in lines if len(line) == 2 and "train/loss" in line[1]]
    assert losses == [(line["step"], line["loss"]) for line in events(out)]
    assert [line for line in lines if line == ["finish"]] == [["finish"], ["finish"]]

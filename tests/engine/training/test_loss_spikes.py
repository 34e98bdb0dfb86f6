"""Which losses are spikes: against plain arithmetic, on the losses of a real run, and after a resume."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from engine.distributed.world import World
from engine.training import saving
from engine.training.config import FinetuneConfig
from engine.training.loss_spikes import LEAST, WINDOW, SpikeDetector
from tests.helpers.run import ROOT


def spikes_of(losses, threshold=6.0):
    spikes = SpikeDetector(threshold)
    return [step for step, loss in enumerate(losses, 1) if spikes.add_loss(step, loss)]


def test_the_loss_of_a_real_run_has_none_and_one_put_there_is_found():
    losses = json.loads((ROOT / "benchmarks" / "optimizer_parity.json").read_text())["loss"]["fp32"]
    assert len(losses) == 200 and spikes_of(losses) == []
    for at in (LEAST, 99, 199):
        assert spikes_of([*losses[:at], 5.0, *losses[at + 1 :]]) == [at + 1]
    assert spikes_of([*losses[: LEAST - 1], 5.0]) == [], "too little to compare with"


def test_the_line_is_where_the_formula_draws_it():
    losses = (2 + 0.1 * torch.randn(WINDOW + 20)).tolist()
    last = losses[-WINDOW:]
    median = statistics.median(last)
    mad = statistics.median([abs(x - median) for x in last])
    line = median + 6 * 1.4826 * mad
    assert 6 * 1.4826 * mad > 6 * median / 100
    assert spikes_of([*losses, line * (1 - 1e-9)]) == [] and spikes_of([*losses, line * (1 + 1e-9)]) == [
        len(losses) + 1
    ]
    steady = [2.0] * LEAST
    assert spikes_of([*steady, 2.0 + 0.119]) == [] and spikes_of([*steady, 2.0 + 0.121]) == [LEAST + 1]


def test_losses_that_stay_high_are_one_spike_and_another_comes_after():
    steady = [2.0, 2.1] * LEAST
    assert spikes_of([*steady, 9.0, 9.0, 2.0, 2.1, 9.0]) == [len(steady) + 1, len(steady) + 5]
    assert spikes_of([*steady, 9.0], threshold=0) == []


def test_what_metrics_tell_is_what_a_run_knew():
    losses = [2.0, 2.1] * LEAST
    lines = [{"event": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    losses[4] = lines[4]["loss"] = 0.0
    lines += [{"event": "train", "step": 33, "loss": None}, {"event": "eval", "step": 33, "loss": 7.0}]
    lines += [{"event": "train", "step": 34, "loss": 9.0}, {"event": "spike", "step": 34, "back_to": 30}]
    spikes = SpikeDetector(6.0)
    spikes.replay(lines)
    assert spikes.losses == list(enumerate(losses[:30], 1))
    assert spikes.add_loss(35, 9.0).loss == 9.0, "the one that was undone is no longer there to be the same spike"


@pytest.mark.parametrize("more", [{}, {"save_every": "end"}, {"save_every": "5", "spike_threshold": 0.0}])
def test_going_back_wants_somewhere_to_go(more):
    with pytest.raises(ValueError, match="--spike-rollback wants a --spike-threshold and states"):
        FinetuneConfig(model="m", data=("d",), spike_rollback=True, **more)
    FinetuneConfig(model="m", data=("d",), spike_rollback=True, save_every="5")


def test_going_back_waits_for_the_state_that_is_being_written(monkeypatch):
    on_disk = [SimpleNamespace(step=20)]
    saver = SimpleNamespace(wait=lambda: on_disk.append(SimpleNamespace(step=30)))
    monkeypatch.setattr(saving.checkpoint, "find_newest", lambda out, say: on_disk[-1])
    loaded = []
    monkeypatch.setattr(saving, "load_checkpoint", lambda found, optimizer: loaded.append(found.step))
    checkpoints = object.__new__(saving.Checkpoints)
    checkpoints.plan, checkpoints.saver, checkpoints.optimizer = SimpleNamespace(out=None), saver, None
    checkpoints.run = SimpleNamespace(world=World(), progress=SimpleNamespace(print_message=None))
    assert checkpoints.roll_back() == 30 and loaded == [30]

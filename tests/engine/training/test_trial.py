"""How long a run would take on this CPU: the arithmetic of the trial, and what it needs."""

import dataclasses
import json
from itertools import accumulate
from types import SimpleNamespace

import pytest

from engine.data.batches import Batches, StepBatch
from engine.data.packing import Packing
from engine.distributed.world import World
from engine.model.config import MODELS
from engine.training import trial
from engine.training.config import FinetuneConfig
from engine.training.prepare import prepare
from engine.training.trial import try_on_cpu
from tests.helpers.small_model import small_model


@pytest.fixture
def plan(tmp_path):
    """Return the plan of a run of 30 rows, all of them in one step, three times."""
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = FinetuneConfig(
        model=str(small_model()), data=(str(tmp_path / "rows.json"),), out=str(tmp_path / "out"), device="cpu",
        token_cache="off", micro_batch_tokens=8192, kernels="ref",
    )  # fmt: skip
    return prepare(config, World(), print)


def test_layers_are_added_up_and_steps_are_counted(plan, monkeypatch):
    """A layer takes 2 s of a micro-batch and 0.25 s of an update, all else 1 and 0.5."""
    seconds = {1: (3.0, 0.75), 2: (5.0, 1.0)}
    asked = []

    def time_layers(plan, shape, batch):
        asked.append((shape, len(batch.tokens)))
        return seconds[shape.n_layers]

    monkeypatch.setattr(trial, "_time_layers", time_layers)
    shape = dataclasses.replace(plan.model_config, n_layers=10)
    found = try_on_cpu(dataclasses.replace(plan, model_config=shape))
    assert (found.micro_batch_s, found.update_s) == (21.0, 3.0)
    assert [dataclasses.replace(s, n_layers=10) for s, _ in asked] == [shape, shape]
    n_computed, n_own = found.n_tokens, plan.train.counts["tokens"]  # one micro-batch, all rows, one step an epoch
    assert plan.order.steps_per_epoch == 1 and 0 < n_computed <= n_own
    assert found.run_s == pytest.approx(plan.total_steps * 24.0)
    assert "projected from a micro-batch of" in str(found)


def test_a_trial_runs_and_leaves_no_gradient_behind(plan):
    found = try_on_cpu(plan)
    assert found.micro_batch_s > 0 and found.update_s > 0 and found.run_s > 0


def test_each_part_takes_as_long_as_its_quickest_try_but_for_the_first_which_warms_up(plan, monkeypatch):
    """A step under way of something else makes a try longer, never shorter."""
    spans = [(0.5, 0.1), (9.0, 0.75), (3.0, 2.0), (2.0, 5.0), (4.0, 1.0)]  # s of a micro-batch, and of an update
    moments = accumulate((span for micro_batch, update in spans for span in (7.0, micro_batch, update)))
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    shape = dataclasses.replace(plan.model_config, n_layers=1)
    batch = Batches(plan.train, plan.order, Packing(64, max_examples=1)).make_step(1).micro_batches[0]
    assert trial._time_layers(plan, shape, batch) == pytest.approx((2.0, 0.75))
    assert next(moments, None) is None


def test_without_the_memory_of_two_layers_nothing_is_tried(plan, monkeypatch):
    """They need 20 bytes a parameter, and may take half of what is free."""
    enough = 2 * 20 * dataclasses.replace(plan.model_config, n_layers=2).n_parameters
    monkeypatch.setattr(trial, "_time_layers", lambda *given: (1.0, 1.0))
    for free, is_tried in ((1000, False), (enough - 1, False), (enough, True), (None, True)):
        monkeypatch.setattr(trial, "read_free_bytes", lambda free=free: free)
        assert (try_on_cpu(plan) is not None) == is_tried


def test_a_run_is_as_many_of_the_largest_micro_batch_as_its_tokens_that_are_computed(monkeypatch):
    """Half of the first step's 80 tokens are shared; of 1,000 an epoch, 6 steps of 4 an epoch take 1,500."""
    batches = [SimpleNamespace(tokens=range(n)) for n in (10, 30, 20)]
    made = []

    class Made:
        def __init__(self, *given):
            made.append(given)

        def make_step(self, step):
            made.append(step)
            return StepBatch(batches, None, 80, 70, 40)

    tried = []
    monkeypatch.setattr(trial, "Batches", Made)
    monkeypatch.setattr(trial, "read_free_bytes", lambda: None)
    monkeypatch.setattr(
        trial, "_time_layers", lambda plan, c, batch: tried.append((c.n_layers, batch)) or (1.0 + c.n_layers, 0.25)
    )
    plan = SimpleNamespace(
        config=SimpleNamespace(loss_norm="micro-mean"), train=SimpleNamespace(counts={"tokens": 1000}),
        packing="packing",
        order=SimpleNamespace(steps_per_epoch=4), total_steps=6, model_config=MODELS["llama-7b"],
    )  # fmt: skip
    found = try_on_cpu(plan)
    assert made == [(plan.train, plan.order, "packing", True), 1] and tried == [(1, batches[1]), (2, batches[1])]
    assert found == trial.Trial(2.0 + 31 * 1.0, 0.25, 30, 750 / 30 * 33.0 + 6 * 0.25)
    said = (
        "on this CPU: about 13m46s, without evaluation and samples (projected from a micro-batch of 30 tokens, 33 s, "
    )
    assert str(found).startswith(said + "and an update, 0.25 s, tried")


@pytest.mark.parametrize("in_backward", [False, True])
def test_layers_are_tried_with_all_that_the_run_asks_for(in_backward, monkeypatch):
    asked = []
    model = SimpleNamespace(
        init_weights=lambda seed: asked.append(("weights", seed)),
        init_adapter=lambda seed: asked.append(("adapter", seed)),
        loss=lambda batch: asked.append(batch) or SimpleNamespace(backward=lambda: None),
    )  # fmt: skip
    optimizer = SimpleNamespace(grad_norm=lambda: 3.0, step=lambda *given: asked.append(given))
    monkeypatch.setattr(trial, "new_model", lambda *given, **named: asked.append((given, named)) or model)
    monkeypatch.setattr(trial, "AdamW", lambda given, **named: asked.append((given, named)) or optimizer)
    config = FinetuneConfig(
        model="tiny", random_init=True, data=("x",), beta1=0.8, beta2=0.98, adam_eps=1e-5, weight_decay=0.3, seed=7,
        master_weights="stochastic", optimizer_states="8bit", grad_clip=0.0 if in_backward else 0.5,
        optimizer_in_backward=in_backward,
    )  # fmt: skip
    plan = SimpleNamespace(config=config, device="cpu", dtype="bf16", kernels="ref", recompute="block", adapter="lora")
    trial._time_layers(plan, "shape", "batch")
    shaped = ("shape", "cpu", "bf16", "ref", "block"), {"accumulate": not in_backward, "adapter": "lora"}
    settings = {"beta1": 0.8, "beta2": 0.98, "eps": 1e-5, "weight_decay": 0.3, "master": "stochastic", "states": "8bit",
                "seed": 7, "impl": "ref"}  # fmt: skip
    steps = ["batch", (1e-6, 3.0, config.grad_clip)] * (1 + trial.TRIES)
    assert asked == [shaped, ("weights", 7), ("adapter", 7), (model, settings), *steps]

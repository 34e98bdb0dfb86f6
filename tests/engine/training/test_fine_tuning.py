"""What a resumed run knows of its earlier starts."""

import dataclasses
import json
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from engine import finetune
from engine.base.errors import DataError, run_main
from engine.distributed.world import World
from engine.output import saver
from engine.training import evaluation, fine_tuning, saving
from engine.training.config import FinetuneConfig
from engine.training.fine_tuning import begin_run, build_model
from engine.training.optimizer import lr_factor
from tests.helpers.run import events
from tests.helpers.small_model import small_model


def train_line(step, loss):
    return {"event": "train", "step": step, "loss": loss, "grad_norm": 1.0}


@pytest.mark.parametrize("losses", [[2.0, None, None], [None, 3.0, 2.0], [None, None, None], [2.0, 1.0, 1.5]])
def test_it_goes_on_counting_where_the_metrics_end(tmp_path, losses):
    """Steps without a finite loss, losses, and what is reported already; not what came after the state."""
    lines = [{"event": "eval", "step": 0, "loss": 3.0}, *(train_line(i, x) for i, x in enumerate(losses, 1))]
    lines += [train_line(4, None), {"event": "eval", "step": 4, "loss": 1.0}, {"event": "end", "step": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SimpleNamespace(log_every=1, tracker="off", spike_threshold=6.0, profile=False)
    plan = SimpleNamespace(total_steps=9, out=tmp_path, config=config)
    signals = SimpleNamespace(training=False)
    with ExitStack() as stack:
        run = begin_run(plan, World(), signals, SimpleNamespace(step=3), stack, "x")
        run.metrics.close()
    n_skipped = next((n for n, loss in enumerate(reversed(losses)) if loss is not None), 3)
    assert run.n_skipped == n_skipped and signals.training
    assert run.spike_detector.losses == [(i, loss) for i, loss in enumerate(losses, 1) if loss is not None]
    assert run.reported == {("eval", 0), *(("train", step) for step in (1, 2, 3))}


def test_a_run_from_the_beginning_keeps_no_line_of_the_one_before(tmp_path):
    lines = [{"event": "data", "rows": 3}, {"event": "eval", "step": 0, "loss": 3.0}, train_line(1, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SimpleNamespace(log_every=1, tracker="off", spike_threshold=6.0, profile=False)
    plan = SimpleNamespace(total_steps=9, out=tmp_path, config=config)
    with ExitStack() as stack:
        run = begin_run(plan, World(), SimpleNamespace(training=False), None, stack, "x")
        run.metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "" and not run.reported and not run.spike_detector.losses


@pytest.mark.parametrize(("found", "first_step"), [(None, 1), (SimpleNamespace(step=3), 4)])
def test_a_profile_is_of_the_first_steps_of_this_start(found, first_step, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(fine_tuning, "StepProfile", lambda *given: made.append(given) or SimpleNamespace(close=print))
    config = SimpleNamespace(log_every=1, tracker="off", spike_threshold=6.0, profile=True)
    plan = SimpleNamespace(total_steps=9, out=tmp_path, config=config, device="cpu")
    with ExitStack() as stack:
        begin_run(plan, World(), SimpleNamespace(training=False), found, stack, "x").metrics.close()
    assert made[0][:4] == (tmp_path, first_step, 9, "cpu")


@pytest.mark.parametrize(("status", "step"), [("done", 9), ("stopped", None), ("failed", None)])
def test_only_a_run_that_is_done_ends_with_its_last_step(status, step, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(fine_tuning, "write_report", lambda out: written.append("report"))
    metrics = SimpleNamespace(write=lambda event, **fields: written.append((event, fields)), close=lambda: None)
    plan = SimpleNamespace(out=tmp_path, total_steps=9)
    fine_tuning.end_run(plan, SimpleNamespace(metrics=metrics), {"status": status, "seconds": 2.5})
    assert written == [("end", {"step": step, "seconds": 2.5, "status": status}), "report"]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == status


def run(rows_file, out, *more):
    """Take two steps in this process."""
    flags = ("--model", small_model(), "--data", rows_file, "--out", out, "--dtype", "fp32", "--global-batch-size", 2,
             "--max-length", 64, "--max-steps", 2, *more)  # fmt: skip
    assert run_main(finetune.main, [*map(str, flags)]) == 0
    return json.loads((out / "run.json").read_text())


def test_the_seconds_of_all_starts_are_added_up(tmp_path, rows_file, monkeypatch):
    """In run.json and in the metrics. What came after the state that a run goes on from is removed as it begins."""
    out = tmp_path / "out"
    record = run(rows_file, out, "--save-every", 1)
    assert 0 < record["seconds"] < 1000
    (out / "run.json").write_text(json.dumps(record | {"status": "running", "seconds": 5000.0}))  # as a kill leaves it
    train, there = fine_tuning.train, []
    monkeypatch.setattr(
        fine_tuning,
        "train",
        lambda *given: (there.extend(path.name for path in out.glob("checkpoint-*")), train(*given)),
    )
    resumed = run(rows_file, out, "--save-every", 1, "--resume", out / "checkpoint-1")
    assert there == ["checkpoint-1"]
    seconds = resumed["seconds"]
    assert resumed["tracked_as"] == record["tracked_as"], "a tracker finds the run by it"
    assert 5000 < seconds < 6000 and [line["seconds"] for line in events(out, "end")] == [seconds]


def test_a_run_that_starts_over_leaves_no_state_of_the_one_before(tmp_path, rows_file):
    """A kill before its first save would else let the same command go on from another run."""
    state, first, left = tmp_path / "checkpoint-7", tmp_path / "checkpoint-0", tmp_path / ".tmp-8"
    for folder in (state, first, left):
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    (tmp_path / "run.json").write_text(json.dumps({"status": "stopped", "seconds": 5000.0}))
    assert run(rows_file, tmp_path, "--resume", "never")["seconds"] < 5000
    assert not state.exists() and not first.exists() and not left.exists()


@pytest.mark.parametrize(
    "more", [{"offload_optimizer": True, "on_cpu": True}, {"optimizer_in_backward": True, "grad_clip": 0.0}], ids=str
)
def test_every_setting_of_the_optimizer_reaches_it(more, monkeypatch):
    """Each of them other than what it is where nobody says anything, but that two of them exclude each other."""
    asked = {"beta1": 0.8, "beta2": 0.98, "adam_eps": 1e-5, "weight_decay": 0.3, "master_weights": "stochastic",
             "optimizer_states": "8bit", "seed": 7} | more  # fmt: skip
    on_cpu = asked.pop("on_cpu", None)
    built = SimpleNamespace(init_weights=lambda *seeded: None, init_adapter=lambda *seeded: None)
    monkeypatch.setattr(fine_tuning.fsdp, "local_shards", lambda model: {})
    shaped = {}
    monkeypatch.setattr(fine_tuning, "new_model", lambda *given, **named: shaped.update(named) or built)
    monkeypatch.setattr(fine_tuning, "AdamW", lambda model, **settings: settings)
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), **asked)
    plan = SimpleNamespace(
        config=config, model_config=None, device="cpu", dtype=None, kernels="ref", recompute="cheap", adapter=None,
        source=None, start_adapter=None, on_cpu=on_cpu,
    )  # fmt: skip
    in_backward = bool(config.optimizer_in_backward)
    assert build_model(plan, World(), None) == (built, {
        "beta1": 0.8, "beta2": 0.98, "eps": 1e-5, "weight_decay": 0.3, "master": "stochastic", "states": "8bit",
        "seed": 7, "impl": "ref", "offload": not in_backward, "on_cpu": not in_backward, "in_backward": in_backward,
    })  # fmt: skip
    assert shaped["accumulate"] != in_backward, "a hook must find the gradient of its own backward"


def test_the_flags_of_a_run_reach_what_obeys_them(tmp_path, rows_file, monkeypatch):
    """Each of them other than what it is where nobody says anything."""
    parts, answered, exported = [], [], {}
    monkeypatch.setattr(fine_tuning, "train", lambda *given: parts.extend(given))
    monkeypatch.setattr(
        evaluation, "answer", lambda model, most, prompts, stop_ids, n: answered.append((most, n)) or prompts
    )
    monkeypatch.setattr(saving, "save_hf", lambda out, model, **options: exported.update(options))
    run(rows_file, tmp_path / "out", "--grad-clip", 0.25, "--seed", 7, "--loss-norm", "micro-mean", "--keep", 3,
        "--recompute", "block", "--log-every", 5, "--spike-threshold", 3.5, "--micro-batch-size", 2,
        "--micro-batch-tokens", 99, "--sample-every", "end", "--sample-tokens", 5, "--max-shard-bytes", 4321,
        )  # fmt: skip
    plan, begun, checkpoints, steps, model, first_step = parts
    assert (steps.grad_clip, steps.seed, steps.model, steps.optimizer.in_backward) == (0.25, 7, model, False)
    assert (steps.prefetcher.last_step, first_step, plan.order.seed) == (plan.total_steps, 1, 7)
    assert (checkpoints.saver.keep, checkpoints.saved_step, checkpoints.optimizer) == (3, None, steps.optimizer)
    assert steps.has_signal == begun.signals.pending and steps.size.batches is checkpoints.batches
    assert (begun.progress.every, begun.spike_detector.threshold, model.recompute) == (5, 3.5, "block")
    batches = steps.prefetcher.batches
    assert batches is checkpoints.batches and batches.mean_of_means
    packing = batches.packing
    assert (packing.max_examples, packing.max_tokens, packing.best_fit) == (2, 99, False)
    assert answered == [(99, 5)] and exported == {
        "max_shard_bytes": 4321, "bos_id": plan.tokenizer.bos_id, "eos_ids": sorted(plan.tokenizer.stop_ids),
        "generation_config": plan.source.generation_config,
    }  # fmt: skip


def test_a_run_that_fails_ends_after_the_state_that_is_being_written(tmp_path, rows_file, monkeypatch):
    """The state of the last save is else lost where the process ends before its thread has."""
    write = saver.write_checkpoint

    def write_late(*given, **more):
        time.sleep(0.5)
        return write(*given, **more)

    def fail(plan, run, checkpoints, *more):
        checkpoints.save(1)
        raise DataError("a fault of ours")

    monkeypatch.setattr(saver, "write_checkpoint", write_late)
    monkeypatch.setattr(fine_tuning, "train", fail)
    flags = ("--model", small_model(), "--data", rows_file, "--out", tmp_path / "out", "--dtype", "fp32",
             "--max-steps", 2, "--global-batch-size", 2, "--max-length", 64)  # fmt: skip
    assert run_main(finetune.main, [*map(str, flags)]) != 0
    assert (tmp_path / "out" / "checkpoint-1" / "manifest.json").exists()


def test_the_rates_are_those_of_the_warm_up_that_was_asked_for(tmp_path, rows_file):
    run(rows_file, tmp_path / "out", "--max-steps", 4, "--warmup-ratio", 0.5, "--lr", 0.25, "--lr-schedule", "linear")
    rates = [0.25 * lr_factor("linear", step, 4, 0.5) for step in range(1, 5)]
    assert [line["lr"] for line in events(tmp_path / "out", "train")] == rates == [0.0, 0.125, 0.25, 0.125]


def test_what_is_given_as_nothing_is_told_as_changed_and_reaches_what_obeys_it(tmp_path, rows_file, monkeypatch):
    """A rate, a norm and a number of spikes of 0 are others than the usual ones."""
    parts = []
    monkeypatch.setattr(fine_tuning, "train", lambda *given: parts.extend(given))
    record = run(rows_file, tmp_path / "out", "--grad-clip", 0, "--lr", 0, "--max-skips", 0, "--spike-threshold", 0,
                 "--seed", 0, "--warmup-ratio", 0, "--no-packing", "--eval-every", "off", "--epochs", 1)  # fmt: skip
    assert set(record["changed"]) == {
        "model", "data", "out", "dtype", "global_batch_size", "max_length", "max_steps", "optimizer_states",
        "grad_clip", "lr", "max_skips", "spike_threshold", "seed", "warmup_ratio", "packing", "eval_every", "epochs",
    }  # fmt: skip
    assert parts[3].grad_clip == 0 and parts[1].spike_detector.threshold == 0 and parts[0].order.seed == 0


def test_a_run_records_the_micro_batches_that_it_ends_with(tmp_path, rows_file, monkeypatch):
    def halve(plan, run, checkpoints, *more):
        batches = checkpoints.batches
        batches.packing = dataclasses.replace(batches.packing, max_tokens=77)

    monkeypatch.setattr(fine_tuning, "train", halve)
    record = run(rows_file, tmp_path / "out")
    assert record["facts"]["max_tokens"] == 77 and record["facts"]["settings"]["max_length"] == 64


def test_each_rank_takes_its_share_of_a_step(tmp_path, monkeypatch):
    made = []

    def make(*given):
        made.extend(given)
        raise DataError("enough")

    monkeypatch.setattr(fine_tuning, "Batches", make)
    monkeypatch.setattr(fine_tuning, "build_model", lambda *given: (None, None))
    world = SimpleNamespace(is_main=False, size=4, rank=3, replicas=1, wait_for_all=lambda: None)
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), loss_norm="micro-mean", out=str(tmp_path))
    plan = SimpleNamespace(config=config, out=tmp_path, train="rows", order="order", packing="packing")
    monkeypatch.setattr(fine_tuning, "describe_run", lambda *given: {"tracked_as": "x"})
    with pytest.raises(DataError, match="enough"):
        fine_tuning.fine_tune(plan, world, None, SimpleNamespace(checkpoint=None))
    assert made == ["rows", "order", "packing", True, 4, 3] and not (tmp_path / "run.json").exists()

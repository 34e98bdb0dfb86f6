"""Steps that change nothing, and the number of those that changed something."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.data import packing
from engine.data.batches import StepBatch
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.output.checkpoint import open_checkpoint
from engine.output.saver import WriterGroup, write_checkpoint
from engine.training import step as step_module
from engine.training.optimizer import AdamW
from engine.training.run_ahead import Prefetcher
from engine.training.saving import load_checkpoint
from engine.training.step import Steps
from tests.helpers.datasets import dataset

ROWS = [[*range(10, 20), i] for i in range(20, 24)]


SHAPE = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)


def make_model(**more):
    """Return a small model in fp32."""
    model = new_model(SHAPE, "cpu", torch.float32, "ref", **more)
    model.init_weights(0)
    return model


def make_optimizer(model, **more):
    return AdamW(model, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, **more)


def take_steps(model, optimizer, n, spoil=None):
    """Take n steps; the gradient of one norm is spoilt at one of them. Return the reports."""
    step = 0

    def change(gradient):
        return torch.full_like(gradient, float("inf")) if step == spoil else gradient

    handle = model.norm.register_hook(change)
    batch = packing.make_micro_batches(dataset(ROWS).get_examples(np.arange(4)), packing.Packing(10**6))
    plan = SimpleNamespace(make_step=lambda step: StepBatch(batch, np.arange(4), 0, 0, 0))
    with Prefetcher(plan, model, last_step=n) as prefetcher:
        steps = Steps(model, optimizer, prefetcher, grad_clip=1.0)
        for step in range(1, n + 1):
            assert steps.take_step(step, 1e-2)
        handle.remove()
        return steps.take_reports(wait=True)


def test_no_two_forwards_of_a_run_draw_the_same_dropout_and_a_resumed_run_draws_it_again():
    """The seed of a draw depends on the run's seed, the step, the rank and the micro-batch."""

    def draw(seed=3, rank=0, first=1):
        drawn = []
        model = SimpleNamespace(
            norm=torch.zeros(1), loss=lambda batch, seed: drawn.append(seed) or torch.zeros((), requires_grad=True)
        )
        optimizer = SimpleNamespace(micro_batch=lambda is_last: nullcontext(), in_backward=False)
        prefetcher = SimpleNamespace(take=lambda step: SimpleNamespace(micro_batches=[None] * 3))
        steps = Steps(model, optimizer, prefetcher, 1.0, SimpleNamespace(size=2, rank=rank), seed=seed)
        for step in range(first, 5):
            steps.compute_gradients(step, 1e-3)
        return drawn

    drawn = [*draw(), *draw(seed=4), *draw(rank=1)]
    assert len(set(drawn)) == len(drawn) == 3 * 4 * 3
    assert draw(first=3) == draw()[2 * 3 :]


def test_a_report_has_the_counts_of_its_batch():
    model = make_model()
    batch = packing.make_micro_batches(dataset(ROWS).get_examples(np.arange(4)), packing.Packing(10**6))
    plan = SimpleNamespace(make_step=lambda step: StepBatch(batch, np.array([3, 1]), 7, 5, 6))
    with Prefetcher(plan, model, last_step=1) as prefetcher:
        steps = Steps(model, make_optimizer(model), prefetcher, grad_clip=1.0)
        steps.take_step(1, 1e-2)
        (report,) = steps.take_reports(wait=True)
    assert (report.n_tokens, report.n_loss_tokens, report.n_computed_tokens, report.n_signals) == (7, 5, 6, 0)
    assert report.examples.tolist() == [3, 1] and (report.step, report.lr) == (1, 1e-2)


def test_an_infinite_gradient_under_a_finite_loss_changes_nothing():
    model = make_model()
    optimizer = make_optimizer(model)
    take_steps(model, optimizer, 3)
    before = {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}
    (report,) = take_steps(model, optimizer, 1, spoil=1)
    assert np.isfinite(report.loss) and not report.is_finite and optimizer.n_updates == 3
    assert all(torch.equal(shard.tensor, before[name]) for name, shard in optimizer.tensors().items())


def test_a_loss_that_is_no_number_over_finite_gradients_changes_nothing(monkeypatch):
    model = make_model()
    optimizer, of = make_optimizer(model), model.loss
    before = {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}
    monkeypatch.setattr(model, "loss", lambda batch, seed: of(batch, seed) + torch.nan)
    (report,) = take_steps(model, optimizer, 1)
    assert np.isnan(report.loss) and np.isfinite(report.grad_norm) and not report.is_finite
    assert all(torch.equal(shard.tensor, before[name]) for name, shard in optimizer.tensors().items())


@pytest.mark.parametrize("replicas", [1, 2])
def test_figures_of_several_ranks_are_those_of_all(replicas):
    """The loss, the norm, the tokens and the signals; each of two replicas has every gradient, two shards half each."""
    mine, theirs = torch.tensor([0.5, 9.0, 30.0, 0.0]), torch.tensor([0.25, 16.0, 12.0, 1.0])
    if replicas == 2:
        theirs[1] = mine[1]
    sent = []

    def add_theirs(t):
        sent.append(t.clone())
        return t + theirs / torch.tensor([1.0, replicas, 1.0, 1.0])

    world = SimpleNamespace(size=2 * replicas, rank=0, replicas=replicas, sum_over_ranks=add_theirs)
    model = SimpleNamespace(norm=torch.zeros(1), loss=lambda batch, seed: mine[0].clone().requires_grad_())
    optimizer = SimpleNamespace(
        micro_batch=lambda is_last: nullcontext(), in_backward=False, step_in_backward=None, n_updates=0,
        grad_norm=lambda: mine[1].sqrt(), step=lambda lr, norm, clip, apply: None,
    )  # fmt: skip
    batch = StepBatch([None], np.arange(4), 60, 40, 30)
    steps = Steps(model, optimizer, SimpleNamespace(take=lambda step: batch), 1.0, world)
    assert steps.take_step(1, 1e-2)
    (report,) = steps.take_reports(wait=True)
    assert sent[0].tolist() == [0.5, 9 / replicas, 30, 0]
    assert report.loss == 0.75 and report.grad_norm == (5 if replicas == 1 else 3)
    assert (report.n_computed_tokens, report.n_signals, report.n_tokens, report.n_loss_tokens) == (42, 1, 60, 40)


def test_a_skipped_step_is_no_update_also_after_a_resume(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    reports = take_steps(model, optimizer, 3, spoil=2)
    assert [report.is_finite for report in reports] == [True, False, True] and optimizer.n_updates == 2
    facts = {"n_updates": optimizer.n_updates}
    folder = write_checkpoint(tmp_path, 1, 3, optimizer.tensors, facts, WriterGroup()).folder
    other = make_optimizer(make_model())
    load_checkpoint(open_checkpoint(folder), other)
    assert other.n_updates == 2


@pytest.mark.parametrize("n_seen", [0, 1, 3])
def test_a_signal_between_micro_batches_ends_a_lone_process_with_nothing_changed(n_seen):
    model = make_model()
    optimizer, seen = make_optimizer(model), []
    before = {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}
    batch = packing.make_micro_batches(dataset(ROWS).get_examples(np.arange(4)), packing.Packing(11))
    assert len(batch) == 4
    plan = SimpleNamespace(make_step=lambda step: StepBatch(batch, np.arange(4), 0, 0, 0))
    model.norm.register_hook(seen.append)
    with Prefetcher(plan, model, last_step=1) as prefetcher:
        steps = Steps(model, optimizer, prefetcher, 1.0, has_signal=lambda: len(seen) == n_seen)
        assert not steps.take_step(1, 1e-2) and steps.take_reports(wait=True) == []
    assert len(seen) == n_seen
    assert all(torch.equal(shard.tensor, before[name]) for name, shard in optimizer.tensors().items())


def test_in_backward_a_parameter_whose_gradient_is_not_finite_is_left_alone():
    """Also under a finite loss. The others are updated before anybody can know."""
    model = make_model(accumulate=False)
    optimizer = make_optimizer(model, in_backward=True)
    before = {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}
    (report,) = take_steps(model, optimizer, 1, spoil=1)
    assert report.updated_in_backward and np.isfinite(report.loss) and not report.is_finite
    changed = {name for name, shard in optimizer.tensors().items() if not torch.equal(shard.tensor, before[name])}
    assert changed == {name for name in before if not name.endswith(".norm")}


def test_a_step_of_several_micro_batches_is_updated_once_after_them():
    """Though the optimizer could update in backward: it would then know the gradient of one micro-batch alone."""
    ends = []
    for in_backward in (False, True):
        model = make_model(accumulate=False)
        optimizer = make_optimizer(model, in_backward=in_backward)
        batch = packing.make_micro_batches(dataset(ROWS).get_examples(np.arange(4)), packing.Packing(11))
        plan = SimpleNamespace(make_step=lambda step, batch=batch: StepBatch(batch, np.arange(4), 0, 0, 0))
        with Prefetcher(plan, model, last_step=1) as prefetcher:
            steps = Steps(model, optimizer, prefetcher, grad_clip=0.0)
            assert len(batch) == 4 and steps.take_step(1, 1e-2)
            (report,) = steps.take_reports(wait=True)
        assert not report.updated_in_backward
        ends.append({name: shard.tensor for name, shard in optimizer.tensors().items()})
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


def test_each_micro_batch_is_told_whether_it_is_the_last_and_none_is_held_after_the_step(monkeypatch):
    """Gradients are then summed over ranks, once; the weights of a step in backward wait for the only micro-batch."""
    told = []
    monkeypatch.setattr(step_module, "set_last_micro_batch", lambda *given: told.append(("model", *given)))
    model = SimpleNamespace(
        norm=torch.zeros(1), loss=lambda batch, seed: told.append(("loss", batch)) or torch.ones((), requires_grad=True)
    )
    stepped = []
    optimizer = SimpleNamespace(
        micro_batch=lambda is_last: told.append(("optimizer", is_last)) or nullcontext(), in_backward=True,
        begin_in_backward=lambda lr, loss: told.append(("begin", lr, float(loss.detach()))), step_in_backward=None,
        grad_norm=lambda: torch.tensor(3.0), n_updates=0,
        step=lambda lr, norm, clip, apply: stepped.append((lr, float(norm), clip, bool(apply))),
    )  # fmt: skip
    for micro_batches in (["a", "b"], ["c"]):
        batch = StepBatch(micro_batches, np.arange(4), 60, 40, 30)
        steps = Steps(model, optimizer, SimpleNamespace(take=lambda step, batch=batch: batch), 0.25)
        assert steps.take_step(5, 1e-2) and steps.pending.batch.micro_batches == ()
    assert told == [
        ("model", model, False), ("optimizer", False), ("loss", "a"), ("model", model, True), ("optimizer", True),
        ("loss", "b"), ("model", model, True), ("optimizer", True), ("loss", "c"), ("begin", 1e-2, 1.0),
    ]  # fmt: skip
    assert stepped == [(1e-2, 3.0, 0.25, True)] * 2

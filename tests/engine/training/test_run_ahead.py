"""What keeps the host out of the device's way, and updates from the host's memory and within backward."""

import dataclasses
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.base.host_memory import SLOTS
from engine.data import packing
from engine.data.batches import StepBatch
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.training.offload import Offload, count_bytes, lay_out_state
from engine.training.optimizer import AdamW
from engine.training.run_ahead import Figures, Mark, Prefetcher, find_cuda_tensors
from tests.helpers.datasets import dataset

ROWS = [[*range(40, 60), i, i + 1, i + 2] for i in range(12)]
SHAPE = dataclasses.replace(MODELS["tiny"], vocab_size=3000)
SETTINGS = dict(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


def feeder_of(make, model):
    """Return a Prefetcher of the micro-batches that make(step) returns, for steps up to 4."""
    return Prefetcher(
        SimpleNamespace(make_step=lambda step: StepBatch(make(step), np.arange(1), 0, 0, 0)), model, last_step=4
    )


def model_of(device, dtype=torch.bfloat16, impl="auto", shape=SHAPE, **options):
    model = new_model(shape, device, dtype, impl, **options)
    model.init_weights(0)
    return model


def batches(examples, **options):
    return packing.make_micro_batches(
        dataset(ROWS).get_examples(np.asarray(examples)), packing.Packing(10**6), **options
    )


# ---- fed ahead ------------------------------------------------------------------------------------------------------


def test_the_next_step_is_made_by_another_thread_while_this_one_runs(device):
    made, threads, gate = [], set(), threading.Event()

    def make(step):
        if step == 2:
            assert gate.wait(30), "step 2 must be made while step 1 is being used"
        threads.add(threading.current_thread().name)
        made.append(step)
        return batches(range(step, step + 3)) if step < 4 else []

    with feeder_of(make, model_of(device)) as feed:
        first = feed.take(1).micro_batches
        assert made == [1] and len(first) == 1
        gate.set()
        end = time.monotonic() + 30
        while 2 not in made and time.monotonic() < end:
            time.sleep(0.01)
        assert made == [1, 2], "step 2 is made before it is asked for"
        for step in (2, 3):
            (ready,) = feed.take(step).micro_batches
            assert ready.tokens.is_cuda == (device == "cuda")
            assert ready.tokens[-3].item() == ROWS[step + 2][-3]
        assert feed.take(4).micro_batches == []
    assert made[:4] == [1, 2, 3, 4] and all("prefetcher" in name for name in threads)


def test_what_was_made_ahead_can_be_forgotten(device):
    size = [2]
    with feeder_of(lambda step: batches(range(size[0])), model_of(device)) as feed:
        feed.take(1)
        size[0] = 5
        feed.drop_prefetched()
        (ready,) = feed.take(2).micro_batches
        assert len(ready.targets) == len(batches(range(5))[0].targets)


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for(device):
    def make(step):
        if step == 2:
            raise ValueError("no such step")
        return batches([0])

    with feeder_of(make, model_of(device)) as feed:
        feed.take(1)
        with pytest.raises(ValueError, match="no such step"):
            feed.take(2)


def test_every_tensor_of_a_ready_micro_batch_is_found(device):
    model = model_of(device)
    found = list(find_cuda_tensors([model.prepare_batch(batches(range(4))[0])]))
    assert bool(found) == (device == "cuda")
    if found:
        assert len(found) >= 5 + 2 * 7


def test_figures_are_what_the_device_computed(device):
    began = Mark(torch.device(device))
    figures = Figures(
        torch.tensor(1.5, device=device), torch.tensor(torch.nan, device=device), torch.tensor(True, device=device)
    )
    loss, norm, finite = figures.read()
    assert loss == 1.5 and norm != norm and finite == 1
    assert figures.mark.seconds_since(began) >= 0


# ---- offload --------------------------------------------------------------------------------------------------------

KINDS = [("split", "fp32"), ("split", "8bit"), ("fp32", "bf16"), ("stochastic", "8bit")]


def train(model, optimizer, n=4, first=0):
    for step in range(first, first + n):
        for batch in batches(range(step, step + 6), scale=1 / 100):
            model.loss(batch).backward()
        norm = optimizer.grad_norm()
        optimizer.step(1e-3, norm, 1.0, apply=torch.isfinite(norm))
        optimizer.zero_grad()
    return {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}


@pytest.mark.parametrize(("master", "states"), KINDS)
def test_offloaded_states_are_bit_equal(device, master, states):
    ends = []
    for offload in (False, True):
        model = model_of(device)
        ends.append(train(model, AdamW(model, master=master, states=states, offload=offload, **SETTINGS)))
    assert ends[0].keys() == ends[1].keys() and all(t.cpu().equal(ends[1][name].cpu()) for name, t in ends[0].items())


def test_offload_keeps_a_few_parameters_states_on_the_device(device):
    model = model_of(device)
    optimizer = AdamW(model, master="split", states="fp32", offload=True, **SETTINGS)
    sizes = [count_bytes(state) for state in optimizer.states.values()]
    assert [len(slot) for slot in optimizer.offload.slots] == [max(sizes)] * SLOTS
    for state in optimizer.states.values():
        views = lay_out_state(optimizer.offload.slots[0], state)
        for name, t in views.tensors().items():
            like = state.tensors()[name]
            assert t.shape == like.shape and t.dtype == like.dtype and t.data_ptr() % 16 == 0
            assert like.device.type == "cpu" and like.is_pinned() == (device == "cuda")
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in views.tensors().values())
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_each_state_visits_once_and_goes_home(device):
    model = model_of(device)
    optimizer = AdamW(model, **SETTINGS, offload=True)
    seen = []
    for name, state in optimizer.offload.states_on_device():
        seen.append(name)
        state.m.fill_(len(seen))
    optimizer.offload.wait()
    assert seen == list(optimizer.params)
    assert all(optimizer.states[name].m.eq(i).all() for i, name in enumerate(seen, 1))
    assert isinstance(optimizer.offload, Offload)


# ---- within backward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_updates_within_backward_are_those_after_it_and_no_gradient_stays(device, tied):
    ends = []
    for within in (False, True):
        model = model_of(device, shape=dataclasses.replace(SHAPE, tied=tied))
        optimizer = AdamW(model, states="8bit", in_backward=within, **SETTINGS)
        norms = []
        for step in range(3):
            (batch,) = batches(range(step, step + 6), scale=1 / 100)
            loss = model.loss(batch)
            if within:
                optimizer.begin_in_backward(1e-3, loss)
            loss.backward()
            assert within == all(p.grad is None for p in model.parameters())
            norms.append(optimizer.grad_norm())
            optimizer.step(1e-3, norms[-1], 0.0, apply=torch.isfinite(loss + norms[-1]))
            optimizer.zero_grad()
        assert optimizer.n_updates == 3
        ends.append(({name: shard.tensor for name, shard in optimizer.tensors().items()}, torch.stack(norms)))
    (after, norms), (within, norms_within) = ends
    assert all(t.equal(within[name]) for name, t in after.items())
    assert torch.allclose(norms, norms_within, rtol=1e-5)


def test_a_step_of_several_micro_batches_accumulates_as_always(device):
    model = model_of(device)
    optimizer = AdamW(model, in_backward=True, **SETTINGS)
    for batch in packing.make_micro_batches(dataset(ROWS).get_examples(np.arange(6)), packing.Packing(50)):
        model.loss(batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    before = model.norm.clone()
    optimizer.step(1e-1, optimizer.grad_norm(), 0.0)
    assert not model.norm.equal(before) and optimizer.n_updates == 1


def test_a_loss_that_is_no_number_updates_nothing_within_backward(device):
    model = model_of(device)
    optimizer = AdamW(model, in_backward=True, **SETTINGS)
    before = {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}
    loss = model.loss(batches(range(6))[0])
    optimizer.begin_in_backward(1e-3, loss * torch.tensor(torch.nan, device=device))
    loss.backward()
    assert all(shard.tensor.equal(before[name]) for name, shard in optimizer.tensors().items())
    assert torch.isfinite(optimizer.grad_norm()), "of the gradients, which are finite here"


def test_a_step_that_was_not_made_ahead_is_made():
    made = []
    with feeder_of(lambda step: made.append(step) or [], model_of("cpu")) as feed:
        for step in (1, 2, 2, 4):  # after 2 the run goes back, or on
            feed.take(step)
            feed.pool.submit(int).result()
    assert made == [1, 2, 3, 2, 3, 4]

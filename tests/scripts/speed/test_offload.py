"""Offloaded updates: three ways, in turn, to the bit."""

import contextlib
import math
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from scripts.speed import offload
from tests.helpers.calls import Calls
from tests.helpers.clocks import Clock, Ticks


@pytest.mark.parametrize("other", [None, "loss", "norm"])
def test_ways_of_offloading_that_differ_in_a_bit_are_no_measurement(other, monkeypatch):
    class Stepper:
        def __init__(self, way, dtype):
            self.way = way

        def step(self, batches):
            found = {"loss": 1.0, "norm": 2.0}
            if other and self.way == offload.WITHIN:
                found[other] += 1e-7
            return offload.Took(1.0, 0.5, **found)

    monkeypatch.setattr(offload, "Stepper", Stepper)
    monkeypatch.setattr(offload, "alpaca_rows", lambda n, smoke: SimpleNamespace(get_examples=lambda which: which))
    monkeypatch.setattr(offload, "make_micro_batches", lambda *_, **__: [1, 2])
    args = Namespace(rounds=2, batch=2, tokens=64, dtype="fp32")
    if other:
        with pytest.raises(AssertionError, match="the bits must be equal"):
            offload.measure_in_turns(args)
    else:
        assert {way: len(found) for way, found in offload.measure_in_turns(args)[0].items()} == dict.fromkeys(
            (offload.ON_DEVICE, offload.AFTER, offload.WITHIN), 2
        )


def test_the_update_is_timed_from_the_known_norm_on(monkeypatch):
    clock, was_last = Clock(monkeypatch, offload), []
    stepper = offload.Stepper.__new__(offload.Stepper)
    loss = torch.zeros((), requires_grad=True)
    stepper.model = SimpleNamespace(loss=lambda batch: clock.take(4.0) or loss + 1)
    norm = lambda: clock.take(2.0) or torch.tensor(3.0)  # noqa: E731
    stepper.optimizer = SimpleNamespace(
        micro_batch=lambda last: was_last.append(last) or contextlib.nullcontext(), grad_norm=norm,
        step=lambda *_, **__: clock.take(1.0),
    )  # fmt: skip
    assert stepper.step([1, 2]) == offload.Took(seconds=11.0, update_s=1.0, loss=2.0, norm=3.0)
    assert was_last == [False, True]


def stand_in_for_steps(monkeypatch, calls):
    """Let the rows, the model and the optimizer note what they are asked."""
    loss = torch.zeros((), requires_grad=True)

    def new_optimizer(model, **settings):
        optimizer = calls.thing(
            f"optimizer {len([line for line in calls.lines if line.startswith('AdamW')])}",
            micro_batch=lambda is_last: contextlib.nullcontext(), grad_norm=lambda: torch.tensor(3.0), step=None,
        )  # fmt: skip
        optimizer.step = lambda *args, **named: calls.lines.append(f"{optimizer.label}.step: {optimizer.is_sharded}")
        return optimizer

    model = calls.thing("model", init_weights=None, loss=lambda batch: loss + 1)
    monkeypatch.setattr(offload, "new_model", calls.stand_in("new_model", model))
    monkeypatch.setattr(offload, "AdamW", calls.stand_in("AdamW", new_optimizer))
    rows = calls.thing("rows", get_examples=lambda which: ("examples", which))
    monkeypatch.setattr(offload, "alpaca_rows", calls.stand_in("alpaca_rows", rows))
    made = calls.stand_in("make_micro_batches", lambda examples, packing, scale: ["a", "b"][: 1 + examples[1][0] // 3])
    monkeypatch.setattr(offload, "make_micro_batches", made)


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    Ticks(monkeypatch, offload)
    calls = Calls()
    monkeypatch.setattr(
        offload.MODEL.__class__, "label", property(lambda config: f"{config.n_layers} layers"), raising=False
    )
    stand_in_for_steps(monkeypatch, calls)
    text = tell(offload, "--rounds", 2, "--batch", 3, "--tokens", 96, "--dtype", "bf16")
    assert text == snapshot and calls.text() == snapshot(name="calls")


def test_a_step_beside_the_update_it_is_given(monkeypatch):
    """The update is called off where the loss or the norm is no number."""
    for loss, norm, applied in ((1.0, 3.0, True), (math.inf, 3.0, False), (1.0, math.nan, False)):
        given = []
        stepper = offload.Stepper.__new__(offload.Stepper)
        stepper.model = SimpleNamespace(loss=lambda batch, loss=loss: torch.tensor(loss, requires_grad=True) + 0)
        stepper.optimizer = SimpleNamespace(
            micro_batch=lambda last: contextlib.nullcontext(), grad_norm=lambda norm=norm: torch.tensor(norm),
            step=lambda *args, given=given, apply: given.append((*args, bool(apply))),
        )  # fmt: skip
        stepper.step([1])
        ((lr, known, clip, apply),) = given
        assert (lr, clip, apply) == (1e-5, 1.0, applied) and known.isnan().item() == (norm != norm)


def test_by_default_the_steps_are_of_eight_rows_in_fp32(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["offload", "--json", "x"])
    assert vars(offload.parse_arguments()) == {"json": "x", "batch": 8, "tokens": 512, "rounds": 5, "dtype": "fp32"}

"""Our measured training step, at toy size on a CPU."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.data import packing
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.planning.cards import CARDS
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.planning.setting import Setting
from engine.training.optimizer import AdamW, lr_factor
from scripts.step import bench, figures, peers
from scripts.step import rows as step_rows
from scripts.step.breakdown import PROFILED
from scripts.step.records import TooLarge


def test_every_variant_names_a_model_and_what_a_user_gets_comes_first():
    """On a card of 141 GB: states that need no 8 bits, and one micro-batch a step."""
    assert list(bench.VARIANTS)[: len(bench.HEADLINE)] == list(bench.HEADLINE)
    first = list(bench.HEADLINE.values())[:2]
    assert [v.states for v in first] == ["fp32", "bf16"] and all(v.tokens == 16640 and v.steps >= 30 for v in first)
    main = bench.VARIANTS[bench.MAIN]
    assert (main.recompute, main.master, main.states, main.sharing) == ("cheap", "split", "8bit", True)
    for name, variant in bench.VARIANTS.items():
        assert name.split(", ")[0] == variant.model in MODELS
        assert variant.impl != "ref" or variant.model != "llama-7b"  # minutes, for a figure that nobody asks for
    assert {name.split(", ")[0] for name in peers.PEERS} <= set(bench.VARIANTS)  # a ratio for each
    assert set(PROFILED) | set(bench.SMOKE) <= set(bench.VARIANTS)


@pytest.mark.parametrize("card", ["H100", "H200"])
def test_variants_fit_the_card_they_are_for(card, monkeypatch):
    """By what engine.planning.memory says; none is tried on a card that it cannot fit."""
    gib = CARDS[card].memory_gib
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=gib * 2**30))
    names = bench.names_for_card(bench.VARIANTS, smoke=False)
    assert ("llama-7b, fp32 states" in names) == (card == "H200")
    dataset = step_rows.alpaca_rows(2, smoke=False)
    for name in names:
        v = bench.VARIANTS[name]
        batches = [
            b for step in (1, 2) for b in packing.make_micro_batches(
                dataset.get_examples(step_rows.examples_of_step(step, False)),
                packing.Packing(v.tokens, share_prefix=v.sharing, multiple=64))
        ]  # fmt: skip
        assert v.least_gib == 0 or len(batches) == 2, name  # a step at once
        largest = max(batches, key=lambda b: len(b.tokens))
        setting = Setting(master=v.master, states=v.states, recompute=v.recompute, offload=v.offload, on_cpu=v.on_cpu)
        batch = BatchShape(len(largest.tokens), len(largest.targets), one_micro_batch=len(batches) == 2)
        used = memory(MODELS[v.model], setting, batch)
        room = gib - 0.6  # scripts.gpu_report has a context of its own there
        assert used.total / 2**30 < (40 if "low memory" in name else room), name


def test_memory_beside_its_estimate(plain, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda: {"peak_gib": 60.0, "peak_reserved_gib": 66.0})
    found = bench.measure_variant(plain, smoke=True)
    assert found["peak_over_estimate"] == pytest.approx(60 / found["estimate_of_tensors_gib"])
    assert found["reserved_over_estimate"] == pytest.approx(66 / (found["estimate_gib"] - CONTEXT_BYTES / 2**30))
    text = figures.format_record({"name": "x", **found, "all_finite": False})
    assert "60.0 GiB" in text and "% of the estimate)" in text and "NOT FINITE" in text


def test_sharing_and_cuts_change_no_loss(plain):
    a, b, c = (
        bench.measure_variant(replace(plain, **changes), smoke=True)
        for changes in ({}, {"sharing": False}, {"tokens": 130, "recompute": "block"})
    )
    assert a["tokens_a_step"] == b["tokens_a_step"] and a["computed_over_logical"] < b["computed_over_logical"] == 1
    assert c["micro_batches_a_step"] > a["micro_batches_a_step"] and c["largest_micro_batch_tokens"] <= 130
    for other in (b, c):
        assert other["first_loss"] == pytest.approx(a["first_loss"], rel=1e-5)
        assert other["last_loss"] == pytest.approx(a["last_loss"], rel=1e-5)
    assert a["first_loss"] == pytest.approx(math.log(256), abs=0.1) and a["all_finite"]
    assert a["estimate_gib"] > a["estimate_of_tensors_gib"] > 0


def test_a_step_is_the_training_loops(plain):
    """The same losses as engine.finetune's pieces in a plain loop."""
    found = bench.Steps(plain, 384, 3, smoke=True)
    for step in (1, 2, 3):
        found.run(step)
    found.read_figures()
    found.close()
    dataset = step_rows.alpaca_rows(3, smoke=True)
    model = new_model(step_rows.TOY, "cpu", torch.float32, "ref")
    model.init_weights(0)
    optimizer = AdamW(model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, states="8bit", impl="ref")
    for step in (1, 2, 3):
        examples = step_rows.examples_of_step(step, True)
        scale = 1 / dataset.loss_tokens()[examples].sum()
        losses = [
            model.loss(b)
            for b in packing.make_micro_batches(dataset.get_examples(examples), packing.Packing(384), scale=scale)
        ]
        sum(losses).backward()
        norm = optimizer.grad_norm()
        optimizer.step(2e-5 * lr_factor("cosine", step, 1221, 0.03), norm, 1.0)
        optimizer.zero_grad()
        assert found.norms[step - 1] == pytest.approx(norm.item(), rel=1e-5)
        assert found.losses[step - 1] == pytest.approx(sum(losses).item(), rel=1e-6)
    assert found.tokens == [int(dataset.lengths()[step_rows.examples_of_step(s, True)].sum()) for s in (1, 2, 3)]


def test_out_of_memory_halves_and_is_recorded(plain, monkeypatch, run_out_of_memory):
    tried, take = [], bench.Steps.run

    def small(self, step):
        tried.append(self.max_tokens)
        if self.max_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And more")
        take(self, step)

    monkeypatch.setattr(bench.Steps, "run", small)
    record = bench.measure_variant(plain, smoke=True)
    assert record["out_of_memory_at"] == [384, 192] and record["tokens"] == 96 and tried == [384, 192, 96, 96]
    assert "out of memory at [384, 192]" in figures.format_record({"name": "x", **record})
    monkeypatch.setattr(bench.Steps, "run", run_out_of_memory)
    with pytest.raises(TooLarge, match="out of memory at 384, 192, 96: CUDA out of memory"):
        bench.measure_variant(plain, smoke=True)


def test_past_the_time_a_variant_ends_early(plain, monkeypatch):
    monkeypatch.setattr(bench, "LEAST_STEPS", 1)
    assert bench.measure_variant(plain, True, lambda: True)["steps"] == 1
    assert bench.measure_variant(plain, True, lambda: False)["steps"] == 2

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
from tests.helpers.calls import Calls


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


def stand_in_steps(monkeypatch, variant, tokens=4096):
    """Return what a variant's parts are given: the model, the optimizer, the packing."""
    given = {}
    model = SimpleNamespace(init_weights=lambda *_: None)

    def new_model(config, device, dtype, impl, recompute, accumulate, shard):
        given.update(config=config, impl=impl, recompute=recompute, accumulate=accumulate, shard=shard)
        return model

    monkeypatch.setattr(bench, "new_model", new_model)
    monkeypatch.setattr(bench, "local_shards", lambda model: None)
    monkeypatch.setattr(bench, "AdamW", lambda model, **settings: given.update(settings))
    monkeypatch.setattr(bench, "Packing", lambda tokens, **how: given.update(tokens=tokens, **how))
    monkeypatch.setattr(bench, "Batches", lambda *_: None)
    monkeypatch.setattr(bench, "CountingPrefetcher", lambda *_: None)
    monkeypatch.setattr(bench, "TrainingSteps", lambda model, optimizer, prefetcher, clip: given.update(clip=clip))
    bench.Steps(variant, tokens, 2, True, "a shard function")
    return given


def test_every_setting_of_a_variant_reaches_the_part_that_obeys_it(monkeypatch):
    """Two variants that differ in each."""
    one = bench.Variant(sharing=True, recompute="cheap", master="split", states="8bit", impl="ref")
    other = bench.Variant(
        sharing=False, recompute="block", master="stochastic", states="bf16", offload=True, on_cpu=True, impl="triton"
    )
    for variant in (one, other):
        given = stand_in_steps(monkeypatch, variant, tokens=777)
        for name in ("recompute", "master", "states", "offload", "on_cpu"):
            assert given[name] == getattr(variant, name), name
        assert given["share_prefix"] == variant.sharing and given["impl"] == variant.impl
        assert given["tokens"] == 777 and given["clip"] == 1.0 and given["accumulate"]
        assert given["shard"] == "a shard function"


def test_steps_before_the_timed_ones_are_in_no_figure_but_the_first_loss():
    def of(n_warm):
        steps = SimpleNamespace(
            config=step_rows.TOY, tokens=[100, 100, 20, 40], computed=[100, 100, 10, 20], norms=[1.0] * 4,
            losses=[4.0, 3.0, 2.0, 1.0], n_batches=[1, 1, 1, 2], seconds=lambda: [50.0, 50.0, 1.0, 2.0],
            prefetcher=SimpleNamespace(largest=(96, 40, 0)),
        )  # fmt: skip
        return bench.record_of(bench.Variant(), steps, n_warm)

    found = of(2)
    assert found["tokens_per_s"] == 20.0 and found["computed_tokens_per_s"] == 10.0 and found["steps"] == 2
    assert found["first_loss"] == 4.0 and found["last_loss"] == 1.0 and found["micro_batches_a_step"] == 1.25
    assert of(0)["step_s_max"] == 50.0 and found["step_s_max"] == 2.0 and found["all_finite"]


@pytest.mark.parametrize("bad", ["losses", "norms"])
def test_one_loss_or_norm_that_is_no_number_is_told(bad):
    fine = {"losses": [1.0, 1.0], "norms": [1.0, 1.0]} | {bad: [1.0, math.inf]}
    steps = SimpleNamespace(
        config=step_rows.TOY, tokens=[1, 1], computed=[1, 1], n_batches=[1, 1], seconds=lambda: [1.0, 1.0],
        prefetcher=SimpleNamespace(largest=(96, 40, 0)), **fine,
    )  # fmt: skip
    assert not bench.record_of(bench.Variant(), steps, 0)["all_finite"]


def test_the_largest_micro_batch_is_that_of_all_steps(monkeypatch):
    sizes = {1: [(5, 2, 1), (9, 3, 2)], 2: [(7, 7, 7)]}
    micro = lambda size: SimpleNamespace(**dict(zip(("tokens", "targets", "rows"), map(range, size), strict=True)))  # noqa: E731
    batches = {step: SimpleNamespace(micro_batches=[micro(s) for s in of]) for step, of in sizes.items()}
    monkeypatch.setattr(bench.Prefetcher, "take", lambda self, step: batches[step])
    prefetcher = bench.CountingPrefetcher.__new__(bench.CountingPrefetcher)
    prefetcher.counts, prefetcher.largest = {}, (0, 0, 0)
    for step in sizes:
        prefetcher.take(step)
    assert prefetcher.largest == (9, 3, 2) and prefetcher.counts == {1: 2, 2: 1}


def test_the_price_that_is_printed_is_that_of_the_run():
    projection = {"what": "Alpaca", "of": "llama-7b", "steps": 9, "minutes": 7.0, "dollars": 1.25,
                  "dollars_an_hour": 2.5, "price_of": "May"}  # fmt: skip
    assert "$1.25 at $2.5 an hour (May)" in "".join(bench.format_part({"projections": [projection]}))


def test_only_the_headline_is_projected_and_each_part_measures_its_own(monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "measure_in_processes", lambda report, part, module, names: measured.append(list(names)))
    monkeypatch.setattr(bench, "names_for_card", lambda names, smoke: list(names))
    monkeypatch.setattr(bench, "project_finetune", lambda record, card: record["name"])
    named = [{"name": name, "tokens_per_s": 1.0} for name in bench.VARIANTS]
    added = {}
    report = SimpleNamespace(
        smoke=False, result={"parts": {"step": {"records": named}}}, add=lambda part, **figures: added.update(figures)
    )
    bench.measure_part(report)
    bench.measure_other_variants(report)
    assert measured[0] == list(bench.HEADLINE) and added["projections"] == list(bench.HEADLINE)
    assert sorted(measured[0] + measured[1]) == sorted(bench.VARIANTS)


def test_settings_of_variants(snapshot):
    text = "\n".join(f"{name}: {variant}" for name, variant in bench.VARIANTS.items())
    assert text.replace(f"impl='{bench.IMPL}'", "impl=here") == snapshot


@pytest.mark.parametrize("price", [1.25, None, 0.0])
def test_the_lines_of_the_report(price):
    projection = {"what": "Alpaca: x", "of": "llama-7b", "steps": 9, "minutes": 7.06, "dollars": price,
                  "dollars_an_hour": 2.5, "price_of": "May"}  # fmt: skip
    record = {"name": "a", "failed": "b"}
    assert bench.format_part({"records": [record], "projections": [projection]}) == [
        "training step, ours:", f"  a{' ' * 61}failed: b",
        "  Alpaca: x 'llama-7b': 9 steps, 7.1 minutes" + (", $1.25 at $2.5 an hour (May)" if price else ""),
    ]  # fmt: skip
    assert bench.format_part({"records": []}) == []


@pytest.mark.parametrize("gpu", [True, False])
def test_a_record_is_told_whole(gpu, monkeypatch):
    """Its figures are of the timed steps; the first loss is the first of all. Estimates are of the largest batch."""
    asked = []
    peaks = {"peak_gib": 60.0 if gpu else None, "peak_reserved_gib": 66.0 if gpu else None}

    def estimate(config, setting, batch):
        asked.append((config, setting, batch))
        return SimpleNamespace(total=40 * 2**30, overhead=4 * 2**30)

    monkeypatch.setattr(bench, "memory", estimate)
    monkeypatch.setattr(bench, "peak_memory", lambda: peaks)
    monkeypatch.setattr(bench, "card_here", lambda: CARDS["H100"])
    steps = SimpleNamespace(
        config=step_rows.TOY, tokens=[5, 100, 300], computed=[5, 80, 400], norms=[1.0] * 3, losses=[4.0, 3.0, 2.0],
        n_batches=[1, 2, 2], seconds=lambda: [9.0, 1.0, 2.0], prefetcher=SimpleNamespace(largest=(96, 40, 10)),
    )  # fmt: skip
    variant = bench.Variant(master="stochastic", states="bf16", recompute="block", offload=True, on_cpu=True)
    found = bench.record_of(variant, steps, 1)
    n = step_rows.TOY.n_parameters
    speed = figures.summarize_speed(n, [100, 300], [80, 400], [1.0, 2.0], CARDS["H100"])
    assert found == {
        "warmup": 1, "parameters": n, **speed, **peaks, "estimate_gib": 40.0, "estimate_of_tensors_gib": 36.0,
        "peak_over_estimate": 60 / 36 if gpu else None,
        "reserved_over_estimate": 66 / (40 - CONTEXT_BYTES / 2**30) if gpu else None,
        "micro_batches_a_step": 5 / 3, "largest_micro_batch_tokens": 96, "first_loss": 4.0, "last_loss": 2.0,
        "all_finite": True,
    }  # fmt: skip
    ((config, setting, batch),) = asked
    assert config is step_rows.TOY and batch == BatchShape(96, 40, False, 30)
    assert setting == Setting(bench.DTYPE, "stochastic", "bf16", "block", True, on_cpu=True)
    steps.n_batches = [1, 1, 1]
    bench.record_of(variant, steps, 1)
    assert asked[-1][2] == BatchShape(96, 40, True, 30)


def test_a_variant_is_measured_after_its_own_warm_up(monkeypatch):
    """Its record tells the micro-batch that was used, and its thread ends."""
    calls = Calls()

    class Steps:
        def __init__(self, variant, tokens, n_steps, smoke):
            calls.lines.append(f"Steps({tokens}, {n_steps}, {smoke})")
            self.run, self.close = calls.stand_in("run"), calls.stand_in("close")
            self.read_figures = calls.stand_in("read")

    monkeypatch.setattr(bench, "Steps", Steps)
    monkeypatch.setattr(bench, "reset_peak_memory", calls.stand_in("reset"))
    monkeypatch.setattr(bench, "record_of", lambda variant, steps, n_warm: {"after": n_warm})
    variant = bench.Variant(tokens=600, steps=4, warmup=2)
    found = bench.measure_variant(variant, smoke=False)
    assert found == {**variant.describe(False), "tokens": 600, "after": 2} and found["model"] == "llama-7b"
    steps = [f"run({i})" for i in range(1, 7)]
    assert calls.lines == ["reset()", "Steps(600, 6, False)", *steps, "read()", "close()"]
    calls.lines.clear()
    bench.measure_variant(variant, smoke=False, is_time_up=lambda: True)
    assert calls.lines[2:] == [*steps[:5], "read()", "close()"]  # three timed ones
    calls.lines.clear()
    found = bench.measure_variant(variant, smoke=True)
    assert found == {**variant.describe(True), "tokens": 384, "after": 0} and found["model"] == "toy"
    assert calls.lines == ["reset()", "Steps(384, 2, True)", "run(1)", "run(2)", "read()", "close()"]


def test_seconds_of_steps_end_where_the_next_begins(monkeypatch):
    monkeypatch.setattr(bench, "Mark", lambda device: SimpleNamespace(at=9.0))
    steps = bench.Steps.__new__(bench.Steps)
    mark = lambda at: SimpleNamespace(at=at, seconds_since=lambda before: at - before.at)  # noqa: E731
    monkeypatch.setattr(bench, "Mark", lambda device: mark(16.0))
    steps.device, steps.marks = "cpu", [mark(1.0), mark(2.0), mark(5.0)]
    assert steps.seconds() == [1.0, 3.0, 11.0] and len(steps.marks) == 3


@pytest.mark.parametrize("smoke", [True, False])
def test_which_variants_a_card_of_this_size_has(smoke, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=130 * 2**30 - 1))
    names = bench.names_for_card(bench.VARIANTS, smoke)
    large = [name for name, variant in bench.VARIANTS.items() if variant.least_gib]
    assert len(large) == 4
    assert names == (list(bench.SMOKE) if smoke else [name for name in bench.VARIANTS if name not in large])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=130 * 2**30))
    assert smoke or bench.names_for_card(bench.VARIANTS, smoke) == list(bench.VARIANTS)

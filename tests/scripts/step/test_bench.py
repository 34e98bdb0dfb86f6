"""Measurements of whole training steps: figures, kinds of kernels, failures and memory, at toy size on a CPU."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.data import packing
from engine.formats.source import open_source
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.planning.cards import CARDS
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.planning.setting import Setting
from engine.training.optimizer import AdamW, lr_factor
from kernels.measure.alpaca import alpaca_lengths
from scripts import gpu_report
from scripts.step import bench as step_bench
from scripts.step import breakdown as step_profile
from scripts.step import common as step_common
from scripts.step import peers as step_peers

H100 = CARDS["H100"]


def strict_json(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture
def plain():
    return step_bench.Variant(impl="ref")


# ---- rows and figures -----------------------------------------------------------------------------------------------


def test_rows_are_alpacas_and_logical_tokens_leave_out_padding():
    rows = step_common.alpaca_rows(3, smoke=False)
    assert len(rows) == 3 * 128 and rows.lengths().max() <= 512
    alpaca = alpaca_lengths()
    prompt, response, has_input = alpaca.prompt, alpaca.response, alpaca.has_input
    mean = np.minimum(512, prompt + response).mean()
    assert rows.lengths().mean() == pytest.approx(mean, rel=0.1)
    assert rows.loss_tokens().min() > 0
    for example in (0, 200, 383):
        i = int(rows.sources[example])
        n = min(512, prompt[i] + response[i])
        assert rows.is_target_of(example).tolist() == [False] * prompt[i] + [True] * (n - prompt[i])
    stems = {tuple(rows.tokens_of(e)[: alpaca.shared_prefix[has_input[int(rows.sources[e])]]]) for e in range(100)}
    assert len(stems) == 2
    again = step_common.alpaca_rows(5, smoke=False)  # the same rows first, whatever the number of steps
    assert (again.lengths()[:384] == rows.lengths()).all() and (again.tokens[:100] == rows.tokens[:100]).all()


def test_mfu_and_speed():
    n = MODELS["llama-7b"].n_parameters
    found = step_common.speed(n, [16000, 17000], [12000, 12500], [1.0, 0.5], H100)
    assert found["tokens_per_s"] == 22000 and found["computed_tokens_per_s"] == pytest.approx(24500 / 1.5)
    assert found["mfu"] == pytest.approx(6 * 6.738e9 * 22000 / 989e12, rel=1e-3)
    assert found["mfu_formula"] == "6 x 6.738e+09 x logical tokens/s / 9.89e+14 (dense bf16 peak of H100)"
    assert (found["step_s_median"], found["step_s_min"], found["step_s_max"]) == (0.75, 0.5, 1.0)
    assert found["computed_over_logical"] == 24500 / 33000 and found["steps"] == 2
    assert step_common.mfu(n, 1e4, None)["mfu"] is None


def test_the_whole_run_is_projected_from_the_step():
    found = step_common.projection({"name": "x", "tokens_per_s": 22000.0}, H100)
    assert found["steps"] == 1221 and found["tokens"] == pytest.approx(19.8e6, rel=0.01)
    assert found["minutes"] == pytest.approx(19.8e6 / 22000 / 60, rel=0.01)
    assert found["dollars"] == pytest.approx(found["minutes"] / 60 * H100.price_per_hour)
    assert "projected from the measured step" in found["what"] and found["price_of"]
    assert step_common.projection({"name": "x", "tokens_per_s": 1.0}, None)["dollars"] is None


def test_every_variant_names_a_model_and_what_is_wanted_comes_first():
    assert list(step_bench.VARIANTS)[:2] == [step_bench.MAIN, step_bench.UNSHARED]
    main = step_bench.VARIANTS[step_bench.MAIN]
    assert main.steps >= 30 and (main.recompute, main.master, main.states, main.sharing) == (
        "cheap",
        "split",
        "8bit",
        1,
    )
    for name, variant in step_bench.VARIANTS.items():
        assert name.split(", ")[0] == variant.model in MODELS
    assert {name.split(", ")[0] for name in step_peers.PEERS} <= set(step_bench.VARIANTS)  # a ratio for each
    assert set(step_profile.PROFILED) | set(step_bench.SMOKE) <= set(step_bench.VARIANTS)


def test_variants_fit_an_h100_by_what_engine_memory_says():
    rows = step_common.alpaca_rows(2, smoke=False)
    room = H100.memory_gib - 0.6  # scripts.gpu_report has a context of its own there
    for name, v in step_bench.VARIANTS.items():
        batches = [
            b for step in (1, 2) for b in packing.make_micro_batches(
                rows, step_common.examples_of(step, False),
                packing.Packing(v.tokens, share_prefix=v.sharing, multiple=64))
        ]  # fmt: skip
        largest = max(batches, key=lambda b: len(b.tokens))
        setting = Setting(master=v.master, states=v.states, recompute=v.recompute, offload=v.offload)
        batch = BatchShape(len(largest.tokens), len(largest.targets), one_micro_batch=len(batches) == 2)
        used = memory(MODELS[v.model], setting, batch)
        assert used.total / 2**30 < (40 if "low memory" in name else room), name


def test_the_card_at_hand(monkeypatch):
    monkeypatch.setattr(step_common, "GPU", True)
    for name, known in (
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None), ("Synthetic 9000", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = step_common.card()
        assert (found and found.name) == known


def test_memory_beside_its_estimate(plain, monkeypatch):
    monkeypatch.setattr(step_bench, "peak_memory", lambda: {"peak_gib": 60.0, "peak_reserved_gib": 66.0})
    found = step_bench.measure(plain, smoke=True)
    assert found["peak_over_estimate"] == pytest.approx(60 / found["estimate_of_tensors_gib"])
    assert found["reserved_over_estimate"] == pytest.approx(66 / (found["estimate_gib"] - CONTEXT_BYTES / 2**30))
    text = step_common.line({"name": "x", **found, "all_finite": False})
    assert "60.0 GiB" in text and "% of the estimate)" in text and "NOT FINITE" in text


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_sharing_and_cuts_change_no_loss(plain):
    a, b, c = (
        step_bench.measure(replace(plain, **changes), smoke=True)
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
    found = step_bench.Steps(plain, 384, 3, smoke=True)
    for step in (1, 2, 3):
        found.take(step)
    found.read()
    found.close()
    rows = step_common.alpaca_rows(3, smoke=True)
    model = new_model(step_common.TOY, "cpu", torch.float32, "ref")
    model.init_weights(0)
    optimizer = AdamW(model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, states="8bit", impl="ref")
    for step in (1, 2, 3):
        examples = step_common.examples_of(step, True)
        scale = 1 / rows.loss_tokens()[examples].sum()
        losses = [model.loss(b) for b in packing.make_micro_batches(rows, examples, packing.Packing(384), scale=scale)]
        sum(losses).backward()
        norm = optimizer.grad_norm()
        optimizer.step(2e-5 * lr_factor("cosine", step, 1221, 0.03), norm, 1.0)
        optimizer.zero_grad()
        assert found.norms[step - 1] == pytest.approx(norm.item(), rel=1e-5)
        assert found.losses[step - 1] == pytest.approx(sum(losses).item(), rel=1e-6)
    assert found.tokens == [int(rows.lengths()[step_common.examples_of(s, True)].sum()) for s in (1, 2, 3)]


def test_out_of_memory_halves_and_is_recorded(plain, monkeypatch):
    tried, take = [], step_bench.Steps.take

    def small(self, step):
        tried.append(self.max_tokens)
        if self.max_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And more")
        take(self, step)

    monkeypatch.setattr(step_bench.Steps, "take", small)
    record = step_bench.measure(plain, smoke=True)
    assert record["out_of_memory_at"] == [384, 192] and record["tokens"] == 96 and tried == [384, 192, 96, 96]
    assert "out of memory at [384, 192]" in step_common.line({"name": "x", **record})
    monkeypatch.setattr(step_bench.Steps, "take", lambda self, step: oom())
    with pytest.raises(step_common.TooLarge, match="out of memory at 384, 192, 96: CUDA out of memory"):
        step_bench.measure(plain, smoke=True)


def test_other_allocators_want_of_memory_is_known():
    for error, is_it in (
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True), (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False), (ValueError("x"), False),
    ):  # fmt: skip
        assert step_common.is_out_of_memory(error) == is_it
    with pytest.raises(ValueError, match="other"):
        step_common.within_memory(8, 1, lambda size: (_ for _ in ()).throw(ValueError("other")))


def oom():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried")


def test_past_the_time_a_variant_ends_early(plain, monkeypatch):
    monkeypatch.setattr(step_bench, "LEAST_STEPS", 1)
    assert step_bench.measure(plain, True, lambda: True)["steps"] == 1
    assert step_bench.measure(plain, True, lambda: False)["steps"] == 2


# ---- processes ------------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path):
    records = step_common.Records(tmp_path / "r.json")
    records.attempt("a", lambda: 1 / 0)
    records.attempt("b", lambda: {"last_loss": float("nan"), "kinds": {"a": np.float32(2)}})
    with pytest.raises(RuntimeError):  # the device can be used no more
        records.attempt("c", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))
    records.deadline = 0
    records.attempt("d", lambda: pytest.fail("began after the time"))
    found = strict_json(tmp_path / "r.json")
    assert [r["name"] for r in found["records"]] == ["a", "b", "c"] and found["left_out"] == ["d"]
    assert found["records"][0]["failed"] == "ZeroDivisionError: division by zero"
    assert found["records"][1]["last_loss"] is None and "CUDA error" in found["records"][2]["failed"]


def test_a_process_that_dies_costs_what_it_was_at(tmp_path):
    report = gpu_report.Report(tmp_path / "report.json", minutes=1, smoke=True)
    began = []

    def run(command, limit, every):
        path = command[command.index("--json") + 1]
        names = command[command.index("--only") + 1 : -1]
        began.append(names)
        records = [{"name": n} for n in names[: names.index("dies")]] if "dies" in names else [{"name": names[0]}]
        left_out = [] if "dies" in names else names[1:]
        gpu_report.write_json(path, {"records": records, "left_out": left_out})
        every()
        return -11 if "dies" in names else 0

    step_common.in_processes(report, run, "step", "m", ["a", "dies", "b", "c"])
    part = json.loads(report.path.read_text())
    assert began == [["a", "dies", "b", "c"], ["dies", "b", "c"], ["b", "c"]]
    assert [r["name"] for r in part["parts"]["step"]["records"]] == ["a", "dies", "b"]
    assert part["parts"]["step"]["records"][1]["failed"] == "its process ended with exit code -11"
    assert part["left_out"] == ["step: c"]
    late = gpu_report.Report(tmp_path / "late.json", minutes=0, smoke=True)
    step_common.in_processes(late, run, "step", "m", ["a", "b"])
    assert late.result["left_out"] == ["step: a, b"] and len(began) == 3
    report.result["parts"] = {}
    step_common.in_processes(report, lambda *a, **k: None, "step", "m", ["a"])
    assert report.result["parts"]["step"]["records"] == [{"name": "a", "failed": "its process ended after its limit"}]


def test_ours_over_peers(tmp_path):
    parts = {
        "step": {"records": [
            {"name": "llama-7b", "tokens_per_s": 30.0}, {"name": "llama-7b, no sharing", "tokens_per_s": 20.0},
            {"name": "tinyllama-1.1b", "failed": "x"},
        ]},
        "peers": {"records": [
            {"name": "llama-7b, transformers", "tokens_per_s": 10.0}, {"name": "llama-7b, x", "absent": "y"},
            {"name": "tinyllama-1.1b, transformers", "tokens_per_s": 1.0},
        ]},
    }  # fmt: skip
    step_peers.compare(parts)
    a, b, c = parts["peers"]["records"]
    assert (a["ours_over_peer"], a["ours_without_sharing_over_peer"]) == (3.0, 2.0)
    assert "ours_over_peer" not in {**b, **c}


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_a_peer_takes_our_step(plain, tmp_path):
    """Padded, it has the losses of our packed steps from the same weights, before and after an update."""
    pytest.importorskip("transformers")
    loop = step_peers.Loop(step_peers.PEERS["llama-7b, transformers"], smoke=True)
    loop.model.save_pretrained(tmp_path)
    ours = step_bench.Steps(replace(plain, states="fp32"), 384, 2, smoke=True)
    open_source(tmp_path).read_into(ours.model)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0  # as the warm-up's first
    for step, n in ((1, 2), (2, 4)):
        ours.take(step)
        loss, tokens, padded = loop.step(step, n)
        ours.read()
        assert ours.losses[-1] == pytest.approx(loss.item(), rel=1e-5) and tokens == ours.tokens[-1] < padded
    ours.close()


def test_micro_batches_of_peers_hold_every_token_once():
    rows = step_common.alpaca_rows(1, smoke=True)
    examples = step_common.examples_of(1, True)
    batches = list(step_peers.micro_batches(rows, examples, 4))
    assert [len(ids) for ids, *_ in batches] == [4, 2]
    assert batches[0][0].shape[1] == rows.lengths().max()
    assert sum(int(mask.sum()) for _, mask, _ in batches) == rows.lengths().sum()
    assert sum(int((labels != -100).sum()) for *_, labels in batches) == rows.loss_tokens().sum()
    for ids, mask, labels in batches:
        assert (labels[labels != -100] == ids[labels != -100]).all() and not mask[labels == -100][-1:].any()


def test_a_peer_that_is_not_there_is_absent(monkeypatch):
    find = step_peers.importlib.util.find_spec
    monkeypatch.setattr(step_peers.importlib.util, "find_spec", lambda name: None if "liger" in name else find(name))
    record = step_peers.measure("llama-7b, transformers + liger", smoke=True)
    assert record["absent"] == "liger-kernel is not installed" and "tokens_per_s" not in record


def test_what_is_compiled_has_met_its_rows_before(monkeypatch):
    met, step, name = [], step_peers.Loop.step, "llama-7b, transformers + compile"
    monkeypatch.setitem(step_peers.PEERS, name, replace(step_peers.PEERS[name], warmup=1))
    monkeypatch.setattr(step_peers, "compile_by_layer", lambda model: None)
    monkeypatch.setattr(step_peers.Loop, "step", lambda self, number, n: met.append(number) or step(self, number, n))
    record = step_peers.measure(name, smoke=True)
    assert met == [1, 2, 1, 2] and record["steps"] == 2
    assert record["tokens_a_step"] * 2 == step_common.alpaca_rows(2, smoke=True).lengths().sum()
    met.clear()
    monkeypatch.setattr(step_peers, "LEAST_STEPS", 1)
    assert step_peers.measure(name, True, lambda: True)["steps"] == 1 and len(met) == 3


def test_peers_halve_too(monkeypatch):
    step, tried = step_peers.Loop.step, []

    def small(self, number, n):
        tried.append(n)
        return oom() if n > 1 else step(self, number, n)

    monkeypatch.setattr(step_peers.Loop, "step", small)
    record = step_peers.measure("llama-7b, transformers", smoke=True)
    assert record["rows"] == 1 and record["out_of_memory_at"] == [2] and tried == [2, 1, 1, 1, 1]
    assert record["steps"] == 2
    assert record["tokens_per_s"] > 0 and record["first_loss"] == pytest.approx(math.log(256), abs=0.1)

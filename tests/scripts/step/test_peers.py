"""Peers' training steps, at toy size on a CPU."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from engine.formats.source import open_source
from engine.model.config import MODELS
from scripts.step import bench, peers, rows
from tests.helpers.calls import Calls


def test_a_peer_takes_our_step(plain, tmp_path):
    """Padded, it has the losses of our packed steps from the same weights, before and after an update."""
    pytest.importorskip("transformers")
    loop = peers.Loop(peers.PEERS["llama-7b, transformers"], smoke=True)
    loop.model.save_pretrained(tmp_path)
    ours = bench.Steps(replace(plain, states="fp32"), 384, 2, smoke=True)
    open_source(tmp_path).read_into(ours.model)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0  # as the warm-up's first
    for step, n in ((1, 2), (2, 4)):
        ours.run(step)
        loss, tokens, padded = loop.step(step, n)
        ours.read_figures()
        assert ours.losses[-1] == pytest.approx(loss.item(), rel=1e-5) and tokens == ours.tokens[-1] < padded
    ours.close()


def test_a_batch_is_copied_to_a_gpu_without_waiting(monkeypatch):
    copied = []
    pinned = SimpleNamespace(to=lambda *where, **how: copied.append((where, how)) or "there")
    batch = SimpleNamespace(pin_memory=lambda: pinned)
    monkeypatch.setattr(peers, "GPU", False)
    assert peers.send_to_device(batch) is batch
    monkeypatch.setattr(peers, "GPU", True)
    assert peers.send_to_device(batch) == "there" and copied == [((peers.DEVICE,), {"non_blocking": True})]


def test_micro_batches_of_peers_hold_every_token_once():
    dataset = rows.alpaca_rows(1, smoke=True)
    examples = rows.examples_of_step(1, True)
    batches = list(peers.micro_batches(dataset, examples, 3))
    assert [len(ids) for ids, *_ in batches] == [3, 3]
    assert max(ids.shape[1] for ids, *_ in batches) == dataset.lengths().max()
    assert sum(int(mask.sum()) for _, mask, _ in batches) == dataset.lengths().sum()
    assert sum(int((labels != -100).sum()) for *_, labels in batches) == dataset.loss_tokens().sum()
    for ids, mask, labels in batches:
        assert (labels[labels != -100] == ids[labels != -100]).all() and (labels[mask == 0] == -100).all()


def test_a_peer_that_is_not_there_is_absent(monkeypatch):
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if "liger" in name else find(name))
    record = peers.measure_peer("llama-7b, transformers + liger", smoke=True)
    assert record["absent"] == "liger-kernel is not installed" and "tokens_per_s" not in record


def test_what_is_compiled_has_met_its_rows_before(monkeypatch):
    met, step, name = [], peers.Loop.step, "llama-7b, transformers + compile"
    monkeypatch.setitem(peers.PEERS, name, replace(peers.PEERS[name], warmup=1))
    monkeypatch.setattr(peers, "compile_by_layer", lambda model: None)
    monkeypatch.setattr(peers.Loop, "step", lambda self, number, n: met.append(number) or step(self, number, n))
    record = peers.measure_peer(name, smoke=True)
    assert met == [1, 2, 1, 2] and record["steps"] == 2
    assert record["tokens_a_step"] * 2 == rows.alpaca_rows(2, smoke=True).lengths().sum()
    met.clear()
    monkeypatch.setattr(peers, "LEAST_STEPS", 1)
    assert peers.measure_peer(name, True, lambda: True)["steps"] == 1 and len(met) == 3


def test_peers_halve_too(monkeypatch, run_out_of_memory):
    step, tried = peers.Loop.step, []

    def small(self, number, n):
        tried.append(n)
        return run_out_of_memory() if n > 1 else step(self, number, n)

    monkeypatch.setattr(peers.Loop, "step", small)
    record = peers.measure_peer("llama-7b, transformers", smoke=True)
    assert record["rows"] == 1 and record["out_of_memory_at"] == [2] and tried == [2, 1, 1, 1, 1]
    assert record["steps"] == 2
    assert record["tokens_per_s"] > 0 and record["first_loss"] == pytest.approx(math.log(256), abs=0.1)


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
    peers.add_ratios(parts)
    a, b, c = parts["peers"]["records"]
    assert (a["ours_over_peer"], a["ours_without_sharing_over_peer"]) == (3.0, 2.0)
    assert "ours_over_peer" not in {**b, **c}


def stand_in_for_transformers(monkeypatch, calls):
    """Let transformers, liger-kernel and torch.compile note what they are asked."""
    made = calls.thing("model", train=None, gradient_checkpointing_enable=None)
    made.model = SimpleNamespace(layers=[calls.thing(f"layer {i}", compile=None) for i in (0, 1)])
    made.loss_function = "loss"
    theirs, liger, inner = ModuleType("transformers"), ModuleType("liger_kernel"), ModuleType("inner")
    theirs.LlamaConfig = calls.stand_in("LlamaConfig", "config")

    def make(config):
        calls.lines.append(f"in {torch.get_default_dtype()} on {torch.empty(0).device}")
        return made

    theirs.LlamaForCausalLM = calls.stand_in("LlamaForCausalLM", make)
    inner.apply_liger_kernel_to_llama = calls.stand_in("apply_liger")
    for name, module in {"transformers": theirs, "liger_kernel": liger, "liger_kernel.transformers": inner}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "compile", calls.stand_in("compile", "compiled loss"))
    return made


@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_peers_model_is_of_our_shape_and_as_it_wants_it(liger, compiled, checkpointing, monkeypatch):
    calls = Calls()
    made = stand_in_for_transformers(monkeypatch, calls)
    monkeypatch.setattr(peers, "GPU", True)
    monkeypatch.setattr(peers, "DTYPE", torch.bfloat16)
    config = replace(MODELS["tinyllama-1.1b"], tied=True, max_seq_len=99)
    assert peers.build_llama(peers.Peer(liger=liger, compiled=compiled, checkpointing=checkpointing), config) is made
    assert torch.get_default_dtype() == torch.float32
    shape = (
        "LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, "
        "num_key_value_heads=4, vocab_size=32000, max_position_embeddings=99, rms_norm_eps=1e-05, "
        "tie_word_embeddings=True, attn_implementation='sdpa', use_cache=False)"
    )
    enable = "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
    compiling = ["layer 0.compile(dynamic=True)", "layer 1.compile(dynamic=True)", "compile('loss', dynamic=True)"]
    assert calls.lines == [
        *["apply_liger()"] * liger, shape, "LlamaForCausalLM('config')", f"in torch.bfloat16 on {peers.DEVICE}",
        "model.train()", *[enable] * checkpointing, *(compiling if compiled else []),
    ]  # fmt: skip
    assert made.loss_function == ("compiled loss" if compiled else "loss")


def test_on_a_cpu_nothing_is_really_compiled(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(peers, "GPU", False)
    peers.compile_by_layer(stand_in_for_transformers(monkeypatch, calls))
    how = "backend='eager', dynamic=True"
    assert calls.lines == [f"layer 0.compile({how})", f"layer 1.compile({how})", f"compile('loss', {how})"]


@pytest.mark.parametrize(
    ("missing", "gpu", "reason"),
    [("transformers", True, "transformers is not installed"), ("liger_kernel", True, "liger-kernel is not installed"),
     ("", False, "liger-kernel is installed; it runs on CUDA alone")],
)  # fmt: skip
def test_what_a_peer_lacks_is_told_beside_what_it_is(missing, gpu, reason, monkeypatch):
    monkeypatch.setattr(peers, "GPU", gpu)
    monkeypatch.setattr(peers, "installed_version", lambda package: f"{package} 1")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == missing else name)
    versions = {package: f"{package} 1" for package in ("transformers", "liger-kernel", "torch")}
    about = {"states": peers.DTYPE_NAME, "versions": versions, "absent": reason}
    name = "llama-7b, transformers + liger, checkpointing"
    assert peers.measure_peer(name, smoke=False) == {"model": "llama-7b", "checkpointing": True, **about}
    name = "llama-7b, transformers + liger"
    assert peers.measure_peer(name, smoke=True) == {"model": "toy", "checkpointing": False, **about}


def test_micro_batches_of_peers_begin_with_the_longest_rows():
    tokens = {4: [1, 2], 7: [3, 4, 5, 6], 9: [7, 8, 9]}
    targets = {4: [0, 1], 7: [0, 0, 1, 1], 9: [0, 1, 0]}
    dataset = SimpleNamespace(
        tokens_of=lambda i: np.array(tokens[i], np.int32), is_target_of=lambda i: np.array(targets[i], bool)
    )
    found = [[t.tolist() for t in batch] for batch in peers.micro_batches(dataset, [4, 7, 9], 2)]
    assert found == [
        [[[3, 4, 5, 6], [7, 8, 9, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]], [[-100, -100, 5, 6], [-100, 8, -100, -100]]],
        [[[1, 2]], [[1, 1]], [[-100, 2]]],
    ]


class Moments:
    """In place of Mark: each is twice as late as the one before."""

    n = 0

    def __init__(self, device):
        Moments.n += 1
        self.at = 2.0**Moments.n

    def seconds_since(self, before):
        return self.at - before.at


@pytest.mark.parametrize("compiled", [False, True])
def test_the_figures_of_a_peer_are_told_whole(compiled, monkeypatch, snapshot):
    """Its steps warm up by two, or by all of them where it is compiled."""
    monkeypatch.setattr(peers, "Mark", Moments)
    monkeypatch.setattr(Moments, "n", 0)
    monkeypatch.setattr(peers, "card_here", lambda: None)
    calls = Calls()
    monkeypatch.setattr(peers, "reset_peak_memory", calls.stand_in("reset"))
    monkeypatch.setattr(peers, "peak_memory", lambda: {"peak_gib": 6.5, "peak_reserved_gib": 7.5})
    loop = peers.Loop.__new__(peers.Loop)
    loop.peer, loop.config, loop.n_steps = peers.Peer(compiled=compiled), rows.TOY, 3
    loop.parameters, loop.optimizer = [torch.zeros(3), torch.zeros(4)], calls.thing("optimizer", zero_grad=None)
    step = lambda number, n: (torch.tensor(float(len(calls.lines))), 100 * number, 150 * number)  # noqa: E731
    loop.step = calls.stand_in("step", step)
    assert json.dumps(loop.measure(4), indent=1) + "\n" + calls.text() == snapshot


def test_a_peers_step_is_clipped_and_over_all_its_targets(monkeypatch):
    calls, given = Calls(), []
    loop = peers.Loop.__new__(peers.Loop)
    loop.smoke, loop.rows, loop.parameters = True, rows.alpaca_rows(2, smoke=True), "parameters"
    loop.optimizer = calls.thing("optimizer", step=None, zero_grad=None)

    def model(input_ids, attention_mask, labels, num_items_in_batch):
        given.append((input_ids.shape[0], num_items_in_batch.item(), int(attention_mask.sum()), input_ids.numel()))
        loss = calls.thing("loss", backward=None)
        loss.detach = lambda: torch.tensor(0.5)
        return SimpleNamespace(loss=loss)

    loop.model = model
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", calls.stand_in("clip"))
    loss, tokens, padded = loop.step(2, 4)
    examples = rows.examples_of_step(2, True)
    targets, lengths = loop.rows.loss_tokens()[examples].sum(), loop.rows.lengths()[examples]
    assert (loss.item(), tokens) == (1.0, lengths.sum()) and padded == sum(n for *_, n in given)
    assert [n for n, *_ in given] == [4, 2] and {of for _, of, *_ in given} == {targets}
    assert sum(n for _, _, n, _ in given) == lengths.sum()
    assert calls.lines == [
        "loss.backward()", "loss.backward()", "clip('parameters', 1.0)", "optimizer.step()", "optimizer.zero_grad()",
    ]  # fmt: skip


def test_the_optimizer_of_a_peer_has_its_states_before_the_first_step(monkeypatch):
    calls, model = Calls(), torch.nn.Linear(2, 3)
    seen = lambda: calls.lines.append(str([p.grad.abs().max().item() for p in model.parameters()]))  # noqa: E731
    optimizer = calls.thing("optimizer", step=seen, zero_grad=None)
    monkeypatch.setattr(torch.optim, "AdamW", calls.stand_in("AdamW", optimizer))
    monkeypatch.setattr(peers, "build_llama", lambda peer, config: model)
    monkeypatch.setattr(peers, "alpaca_rows", calls.stand_in("rows"))
    loop = peers.Loop(peers.Peer("tinyllama-1.1b", steps=7), smoke=False)
    assert loop.n_steps == 7 and loop.config is MODELS["tinyllama-1.1b"]
    assert calls.lines == [
        "rows(7, False)", "AdamW([float32[3, 2], float32[3]], lr=2e-05, weight_decay=0.0, fused=True)",
        "optimizer.step()", "[0.0, 0.0]", "optimizer.zero_grad()",
    ]  # fmt: skip


def test_each_peer_is_measured_in_a_process_of_its_own_and_its_ratio_saved(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(peers, "measure_in_processes", calls.stand_in("measure"))
    monkeypatch.setattr(peers, "add_ratios", calls.stand_in("ratios"))
    for smoke in (True, False):
        calls.lines.clear()
        report = calls.thing("report", save=None)
        report.smoke, report.result = smoke, {"parts": "the parts"}
        peers.measure_part(report)
        names = peers.SMOKE if smoke else peers.PEERS
        assert calls.lines == [
            line for name in names for line in (
                f"measure(report, 'peers', 'scripts.step.peers', [{name!r}])", "ratios('the parts')", "report.save()")
        ]  # fmt: skip


def test_ours_with_bf16_states_is_what_stands_over_peers():
    ours = {"m": 30.0, "m, bf16 states": 60.0, "m, no sharing": 20.0, "m, no sharing, bf16 states": 40.0}
    records = [{"name": name, "tokens_per_s": rate} for name, rate in ours.items()]
    parts = {"step": {"records": records}, "peers": {"records": [{"name": "m, x", "tokens_per_s": 10.0}]}}
    peers.add_ratios(parts)
    (found,) = parts["peers"]["records"]
    assert (found["ours_over_peer"], found["ours_without_sharing_over_peer"]) == (6.0, 4.0)
    assert peers.format_part({}) == [] and peers.format_part({"records": [{"name": "a", "absent": "b"}]}) == [
        "training step, peers (bf16 states, no fp32 master):", f"  a{' ' * 61}absent: b",
    ]  # fmt: skip
    peers.add_ratios({})


def test_settings_of_peers(snapshot):
    assert "\n".join(f"{name}: {peer}" for name, peer in peers.PEERS.items()) == snapshot

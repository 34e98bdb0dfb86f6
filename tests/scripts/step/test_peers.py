"""Peers' training steps, at toy size on a CPU."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.formats.source import open_source
from scripts.step import bench, peers, rows


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

"""The gradient of a weight: errors against fp64, turns with torch."""

import itertools
import json
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from engine.model.config import MODELS
from kernels.native.library import NativeError
from scripts.speed import weight_gradient
from tests.helpers.clocks import Clock, Ticks


def test_the_gradient_of_a_weight_is_timed_after_a_first_round_and_held_to_fp64(monkeypatch):
    clock, rounds = Clock(monkeypatch, weight_gradient), itertools.count()

    def write(out, dy, x, is_added):
        out += dy.T @ x
        clock.take(50.0 if next(rounds) == 0 else 0.5)

    def read():
        clock.take(1.0)  # which each call, torch's too, takes beside what it says
        return clock.now

    monkeypatch.setattr(weight_gradient, "time", SimpleNamespace(process_time=read))
    monkeypatch.setattr(weight_gradient, "write_weight_gradient", write)
    found = weight_gradient.measure(32, 16, 8, rounds=3)
    assert found["gflop_per_s"]["ours"]["min"] == pytest.approx(2 * 32 * 16 * 8 / 1e9 / 1.5)
    assert 0 < found["errors"]["ours"] < 0.01 and found["faster_than_torch"] == pytest.approx(
        {"median": 1 / 1.5, "min": 1 / 1.5, "max": 1 / 1.5}
    )


def test_without_amx_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(weight_gradient, "has_amx", lambda: False)
    monkeypatch.setattr(weight_gradient, "parse_arguments", lambda: Namespace(rounds=1, json=tmp_path / "x"))
    with pytest.raises(NativeError, match="no AMX"):
        weight_gradient.main()


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    """Of small shapes, with a product that is off by an eighth of the largest number of the result."""
    Ticks(monkeypatch, weight_gradient)
    made = []

    def write(out, dy, x, is_added):
        made.append((out.shape, out.dtype, dy.dtype, x.dtype, is_added))
        out += dy.T @ x
        if len(made) in (1, 4):  # the first round of each shape
            out[3, 2] += 100.0

    monkeypatch.setattr(weight_gradient, "has_amx", lambda: True)
    monkeypatch.setattr(weight_gradient, "write_weight_gradient", write)
    monkeypatch.setattr(weight_gradient, "SHAPES", {"a": (32, 16, 8), "b": (64, 8, 24)})
    text = tell(weight_gradient, "--rounds", 2)
    errors = {name: found["errors"] for name, found in json.loads(text.split("\n\n")[0])["figures"].items()}
    for name, (n, rows, columns) in weight_gradient.SHAPES.items():
        draw = torch.Generator().manual_seed(0)
        shapes = (n, rows), (n, columns), (rows, columns)
        dy, x, start = (torch.randn(*shape, generator=draw).bfloat16().double() for shape in shapes)
        largest = (start + dy.T @ x).abs().max().item()
        assert errors[name]["ours"] == pytest.approx(100 / largest, rel=0.02) and 0 < errors[name]["torch"] < 0.01
    assert re.sub(r'"errors": {[^}]*}', '"errors": {}', text) == snapshot
    bf16 = torch.bfloat16
    assert made == [((16, 8), bf16, bf16, bf16, True)] * 3 + [((8, 24), bf16, bf16, bf16, True)] * 3


def test_shapes_are_those_of_the_models():
    """tokens, rows, columns: a weight maps columns to rows; queries, keys and values are one weight."""
    small, large = MODELS["smollm2-135m"], MODELS["llama-7b"]
    dim, heads = small.dim, small.n_heads + 2 * small.n_kv_heads
    assert {
        "SmolLM2-135M wqkv": (4096, dim // small.n_heads * heads, dim), "SmolLM2-135M wo": (4096, dim, dim),
        "SmolLM2-135M w13": (4096, 2 * small.hidden_dim, dim), "SmolLM2-135M w2": (4096, dim, small.hidden_dim),
        "SmolLM2-135M head": (1024, small.vocab_size, dim), "7B wo": (1024, large.dim, large.dim),
    } == weight_gradient.SHAPES  # fmt: skip


def test_flags_have_defaults(defaults_of):
    assert defaults_of(weight_gradient, "--json", "x") == {"json": "x", "rounds": 21}

"""Steps on a CPU, ours beside others': the probe's best setting, steps in turn, ratios."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.scripts.speed.summaries import summary_of

from scripts.speed.data import random_rows_like_alpaca

LENGTHS = np.array([10, 20, 30, 40])


@pytest.fixture
def steps(load_beside_stand_in):
    return load_beside_stand_in("scripts.speed.cpu_step")


def test_the_probe_takes_the_fastest_setting_of_each(steps, monkeypatch):
    """Of the examples of its steps alone."""
    seconds = {
        ("fp32", 1): 5.0,
        ("fp32", 2): 4.0,
        ("fp32", 4): 3.0,
        ("bf16", 1): 2.5,
        ("bf16", 2): 2.0,
        ("bf16", 4): 9.0,
    }
    names = {dtype: name for name, dtype in steps.DTYPES.items()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(steps, "time_step", lambda stepper, examples, micro, threads: seconds[stepper, micro] / threads)
    make = {"ours": lambda dtype: names[dtype]}
    probes, best = steps.probe(make, {"ours": (1, 2, 4)}, LENGTHS, [0, 2], ["fp32", "bf16"])
    assert best["ours"] == {"who": "ours", "dtype": "bf16", "threads": 2, "micro": 2, "tokens_per_s": 40.0}
    assert len(probes) == 8 and {probe["threads"] for probe in probes} == {1, 2}


def test_all_take_each_step_in_turn_at_their_own_setting(steps, monkeypatch):
    taken = []

    def time_step(stepper, examples, micro, threads):
        taken.append((stepper, list(examples), micro))
        return {"cria": 1.0, "transformers": 2.0}[stepper[0]]

    monkeypatch.setattr(steps, "time_step", time_step)
    make = {name: lambda dtype, name=name: (name, dtype) for name in ("cria", "transformers")}
    settings = {
        "cria": {"dtype": "bf16", "micro": 2048}, "transformers": {"dtype": "fp32", "micro": 1},
        "transformers, padded": {"dtype": "fp32", "micro": 4},
    }  # fmt: skip
    rates = steps.measure_in_turns(make, settings, LENGTHS, [[0, 1], [3, 2]])
    assert rates == {"cria": [30.0, 70.0], "transformers": [15.0, 35.0], "transformers, padded": [15.0, 35.0]}
    ours, theirs = ("cria", torch.bfloat16), ("transformers", torch.float32)
    assert taken == [
        (who, examples, micro)
        for examples in ([0, 1], [3, 2])
        for who, micro in ((ours, 2048), (theirs, 1), (theirs, 4))
    ]


def test_each_example_is_picked_once_and_as_long_as_alpacas(steps):
    prompts, responses = np.arange(20, 120), np.full(100, 60)
    dataset = SimpleNamespace(loss_tokens=lambda: responses, lengths=lambda: prompts + responses)
    picked = steps.pick_like_alpaca(dataset, 50, np.random.default_rng(0))
    assert len(set(picked)) == 50
    first = steps.pick_like_alpaca(dataset, 1, np.random.default_rng(0))
    alpaca = steps.alpaca_lengths()
    i = np.random.default_rng(0).integers(len(alpaca), size=1)[0]
    assert abs(prompts[first[0]] - alpaca.prompt[i]) == min(abs(prompts - alpaca.prompt[i]))


def test_a_step_of_ours_is_the_mean_over_its_own_targets(steps):
    """Whatever the budget of a micro-batch."""
    weights = []

    class Model:
        def loss(self, batch):
            weights.append(float(batch.weights.sum()))
            return SimpleNamespace(backward=lambda: None)

    stepper = steps.Ours.__new__(steps.Ours)
    stepper.dataset, stepper.model = random_rows_like_alpaca(20), Model()
    stepper.optimizer = SimpleNamespace(step=lambda *_: None, grad_norm=lambda: 1.0, zero_grad=lambda: None)
    for micro in (10_000, 300):
        weights.clear()
        stepper.step(np.arange(12), micro)
        assert sum(weights) == pytest.approx(1.0, rel=1e-5) and (len(weights) > 1) == (micro == 300)


def test_ours_is_over_each_other(steps, call_main, monkeypatch, tmp_path):
    def setup(dataset):
        monkeypatch.setattr(steps, "find_embedded_gguf", lambda: "gguf")
        monkeypatch.setattr(steps, "open_source", lambda path: None)
        monkeypatch.setattr(steps, "load_tokenizer", lambda path: None)
        monkeypatch.setattr(steps.data, "encode_rows", lambda *_, **__: dataset)
        monkeypatch.setattr(steps, "encode_rows", lambda *_: [([0] * n, []) for n in LENGTHS])

    rates = {"cria": [6.0], steps.TORCH: [4.0], "transformers": [2.0], "transformers, padded": [1.0]}
    found = summary_of(steps, call_main, monkeypatch, tmp_path, rates, setup)
    ratios = {name: ratio["median"] for name, ratio in found["ratio"].items()}
    assert ratios == {steps.TORCH: 1.5, "transformers": 3.0, "transformers, padded": 6.0}
    micro = {name: setting["micro"] for name, setting in found["settings"].items()}
    assert micro == {"cria": 8, steps.TORCH: 8, "transformers": 8, "transformers, padded": 4}

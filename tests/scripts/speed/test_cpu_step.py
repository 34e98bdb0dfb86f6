"""Steps on a CPU, ours beside others': the probe's best setting, steps in turn, ratios."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts.speed.data import random_rows_like_alpaca
from tests.helpers.calls import FOLDER, Calls
from tests.helpers.clocks import Ticks

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
        taken.append((stepper, list(examples), micro, threads))
        return {"cria": 1.0, "transformers": 2.0}[stepper[0]]

    monkeypatch.setattr(steps, "time_step", time_step)
    make = {name: lambda dtype, name=name: (name, dtype) for name in ("cria", "transformers")}
    settings = {
        "cria": {"dtype": "bf16", "micro": 2048, "threads": 2},
        "transformers": {"dtype": "fp32", "micro": 1, "threads": 3},
        "transformers, padded": {"dtype": "fp32", "micro": 4, "threads": 3},
    }  # fmt: skip
    rates = steps.measure_in_turns(make, settings, LENGTHS, [[0, 1], [3, 2]])
    assert rates == {"cria": [30.0, 70.0], "transformers": [15.0, 35.0], "transformers, padded": [15.0, 35.0]}
    ours, theirs = ("cria", torch.bfloat16), ("transformers", torch.float32)
    assert taken == [
        (who, examples, micro, threads)
        for examples in ([0, 1], [3, 2])
        for who, micro, threads in ((ours, 2048, 2), (theirs, 1, 3), (theirs, 4, 3))
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


def test_a_step_of_ours_ends_with_a_clipped_update_and_empty_gradients(steps, monkeypatch):
    calls = Calls()
    monkeypatch.setattr(steps, "make_micro_batches", calls.stand_in("make_micro_batches", ["a", "b"]))
    stepper = steps.Ours.__new__(steps.Ours)
    loss = calls.thing("loss", backward=None)
    stepper.model = calls.thing("model", loss=loss)
    stepper.optimizer = calls.thing("optimizer", grad_norm=2.5, step=None, zero_grad=None)
    stepper.dataset = calls.thing("rows", loss_tokens=np.array([1, 2, 3, 5]), get_examples="examples")
    stepper.step([1, 3], 64)
    packing = "Packing(max_tokens=64, max_examples=None, best_fit=True, share_prefix=True, multiple=1)"
    assert re.sub(r"0\.142857\d+", "1/7", calls.text()).split("\n") == [
        "rows.loss_tokens()", "rows.get_examples([1, 3])", f"make_micro_batches('examples', {packing}, scale=1/7)",
        "model.loss('a')", "loss.backward()", "model.loss('b')", "loss.backward()",
        "optimizer.grad_norm()", "optimizer.step(1e-05, 2.5, 1.0)", "optimizer.zero_grad()",
    ]  # fmt: skip


def test_a_step_is_timed_with_its_own_threads(steps, monkeypatch):
    Ticks(monkeypatch, steps)
    calls = Calls()
    monkeypatch.setattr(torch, "set_num_threads", calls.stand_in("threads"))
    assert steps.time_step(calls.thing("it", step=None), [4, 2], 8, 3) == 4.25
    assert calls.lines == ["threads(3)", "it.step([4, 2], 8)"]


def test_examples_are_picked_by_prompt_and_response_together(steps, monkeypatch):
    """One that is as near in the sum only is not picked; one that was picked is not picked again."""
    alpaca = steps.alpaca_lengths()
    i, k = np.random.default_rng(0).integers(len(alpaca), size=2)
    p, r = int(alpaca.prompt[i]), int(alpaca.response[i])
    prompts = np.array([p + 40, p - 9, p + 3, p + 500])
    responses = np.array([max(0, r - 40), r + 9, r + 2, r])
    dataset = SimpleNamespace(loss_tokens=lambda: responses, lengths=lambda: prompts + responses)
    picked = steps.pick_like_alpaca(dataset, 2, np.random.default_rng(0))
    off = abs(prompts - alpaca.prompt[k]) + abs(responses - alpaca.response[k])
    assert picked[0] == 2 and picked[1] == min((0, 1, 3), key=lambda at: off[at])


class Rows:
    """Rows of these lengths, half of each a response."""

    label = "rows"

    def __init__(self, lengths):
        self.given = lengths

    def __len__(self):
        return len(self.given)

    def lengths(self):
        return self.given

    def loss_tokens(self):
        return self.given // 2


def test_the_whole_measurement(steps, monkeypatch, tell, snapshot):
    """How every contender is made, the rows of every step, and every figure."""
    Ticks(monkeypatch, steps)
    calls, lengths = Calls(), np.arange(20) * 3 + 30
    rows = [SimpleNamespace(instruction=f"I{i}", input="", output="o") for i in range(20)]
    dataset = Rows(lengths)
    source = calls.thing("source", read_into=None)
    source.config = "config"
    stand_ins = {
        "find_embedded_gguf": "gguf", "open_source": source, "load_tokenizer": "tokenizer", "run_module": None,
        "read_rows": (rows, []), "encode_rows": [([0] * n, []) for n in lengths],
        "new_model": calls.thing("model", init_adapter=None), "AdamW": "optimizer",
        "TransformersLoop": calls.thing("loop", step=(1.0, 2.0)),
    }  # fmt: skip
    for name, result in stand_ins.items():
        monkeypatch.setattr(steps, name, calls.stand_in(name, result))
    table = calls.thing("table", select=dataset)
    monkeypatch.setattr(steps.data, "encode_rows", calls.stand_in("our encode_rows", table))
    tokenizers = SimpleNamespace(from_pretrained=calls.stand_in("their tokenizer", "their tokenizer"))
    monkeypatch.setattr(steps.transformers, "AutoTokenizer", tokenizers)
    monkeypatch.setattr(steps.Ours, "step", lambda self, *given: calls.stand_in("our step")(*given))
    monkeypatch.setattr(steps, "SIZES", {"cria": (1024, 2048), "transformers": (1, 4)})
    flags = ("--data", "dir/mine.json", "--batch", 3, "--rounds", 2, "--max-length", 77, "--dtypes", "bf16", "fp32")
    assert tell(steps, *flags) == snapshot
    log = re.sub(r"namespace\(instruction='(\w+)', input='', output='o'\)", r"\1", calls.text())
    assert re.sub(FOLDER, "FOLDER", re.sub(r"\(\[0(, 0)*\], \[\]\)", "R", log)) == snapshot(name="calls")


def test_both_must_train_on_equal_tokens(steps, monkeypatch, call_main):
    for name, result in {"find_embedded_gguf": "", "open_source": 0, "load_tokenizer": 0, "read_rows": ([], 0),
                         "run_module": None, "pick_like_alpaca": np.arange(4),
                         "encode_rows": [([0] * n, []) for n in (10, 20, 30, 41)]}.items():  # fmt: skip
        monkeypatch.setattr(steps, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(steps.data, "encode_rows", lambda *_, **__: SimpleNamespace(select=lambda: Rows(LENGTHS)))
    with pytest.raises(AssertionError, match="both must train on equal tokens"):
        call_main(steps, "--json", "x", "--batch", 2, "--rounds", 1)


def test_by_default_both_dtypes_are_probed_on_the_seed_tasks(steps, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cpu_step", "--json", "x"])
    assert vars(steps.parse_arguments()) == {
        "json": "x", "data": str(steps.SEED_TASKS), "batch": 32, "rounds": 5, "dtypes": ["fp32", "bf16"],
        "max_length": 512,
    }  # fmt: skip
    assert steps.SIZES == {"cria": (1024, 2048, 4096), "transformers": (1, 2, 4, 8)}

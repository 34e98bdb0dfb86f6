"""Steps and decoding on a CPU, ours beside others': the probe's best setting, steps in turn, tokens and ratios."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts.speed.data import random_rows_like_alpaca

LENGTHS = np.array([10, 20, 30, 40])


@pytest.fixture
def steps(load_beside_stand_in):
    return load_beside_stand_in("scripts.speed.cpu_step")


@pytest.fixture
def decoding(load_beside_stand_in):
    return load_beside_stand_in("scripts.speed.decoding")


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


@pytest.mark.parametrize("name", ["all weights", "lora", "peft"])
def test_a_contender_trains_what_its_name_says(name, load_beside_stand_in, monkeypatch):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    contest, lengths = adapter.Contest("", 9, "folder"), SimpleNamespace(lengths=lambda: np.array([2]))
    contest.__dict__ |= {"rows": [], "dataset": lengths}
    monkeypatch.setattr(adapter, "encode_rows", lambda *_: [([1, 2], [1, 2])])
    monkeypatch.setattr(adapter, "find_embedded_gguf", lambda: "gguf")
    monkeypatch.setattr(adapter, "open_source", lambda path: "source")
    monkeypatch.setattr(adapter, "Ours", lambda source, dataset, dtype, impl, config=None: ("ours", dtype, config))
    monkeypatch.setattr(adapter, "Peft", lambda folder, examples, dtype: ("peft", dtype))
    wanted = {
        "all weights": ("ours", torch.float32, None), "lora": ("ours", torch.float32, adapter.ADAPTER),
        "peft": ("peft", torch.float32),
    }  # fmt: skip
    assert contest.make(name, torch.float32) == wanted[name]


def test_a_peak_is_what_the_steps_add_and_a_ratio_that_of_lora(load_beside_stand_in, monkeypatch, tmp_path, call_main):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    peaks = iter([100, 175])
    stepper = SimpleNamespace(step=lambda examples, micro: None)
    contest = SimpleNamespace(dataset=None, make=lambda name, dtype: stepper)
    monkeypatch.setattr(adapter, "read_peak", lambda: next(peaks))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert adapter.measure_peak(contest, "lora", {"threads": 1, "dtype": "fp32", "micro": 1}, [[0]]) == 75
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t  7 kB\nVmRSS:\t 5 kB\n")
    monkeypatch.undo()
    monkeypatch.setattr(adapter, "Path", lambda _: status)
    assert adapter.read_peak() == 7 * 1024


class Dataset(list):
    """Four rows."""

    def __init__(self):
        super().__init__(range(4))

    def lengths(self):
        return LENGTHS

    def select(self):
        return self


def summary_of(module, call_main, monkeypatch, tmp_path, rates, setup):
    """Return the file that main() writes where its contenders have these rates."""
    dataset = Dataset()
    monkeypatch.setattr(module, "run_module", lambda *_: None)
    monkeypatch.setattr(module, "pick_like_alpaca", lambda dataset, n, generator: np.arange(n))
    setting = {"dtype": "bf16", "threads": 2, "micro": 8}
    best = lambda make, sizes, *_: ([], {name: setting for name in sizes})  # noqa: E731
    monkeypatch.setattr(module, "probe", best)
    monkeypatch.setattr(module, "measure_in_turns", lambda make, settings, *_: rates)
    monkeypatch.setattr(module, "load_cpu", lambda: SimpleNamespace(cria_instruction_set=lambda: b"plain"))
    setup(dataset)
    call_main(module, "--json", tmp_path / "x", "--batch", 1, "--rounds", 1)
    return json.loads((tmp_path / "x").read_text())


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


def test_lora_is_over_all_weights_and_over_peft(load_beside_stand_in, call_main, monkeypatch, tmp_path):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")

    def setup(dataset):
        monkeypatch.setattr(adapter, "Contest", lambda *_: SimpleNamespace(dataset=dataset))
        monkeypatch.setattr(adapter, "measure_peaks", lambda contest, settings, steps: dict.fromkeys(settings, 1e9))
        monkeypatch.setattr(adapter.importlib.metadata, "version", lambda _: "1")

    rates = {"all weights": [2.0], "lora": [6.0], "peft": [3.0]}
    found = summary_of(adapter, call_main, monkeypatch, tmp_path, rates, setup)
    assert {name: ratio["median"] for name, ratio in found["ratio"].items()} == {"all weights": 3.0, "peft": 2.0}


# ---- decoding -------------------------------------------------------------------------------------------------------


def test_seconds_a_token_are_of_the_gaps_between_tokens(decoding):
    clock = decoding.Clock()
    clock.ids, clock.times = [5, 6, 7], [(1.0, 10.0), (2.0, 11.0), (5.0, 16.0)]
    assert clock.seconds_a_token() == (2.0, 3.0)


def test_the_tokens_that_two_answers_begin_with_in_common(decoding):
    assert [decoding.count_equal([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [0, 2, 3])] == [3, 1, 0]


def test_transformers_tells_its_tokens_and_not_the_prompt(decoding):
    class Model:
        def generate(self, prompt, max_new_tokens, do_sample, streamer):
            assert not do_sample
            for ids in (prompt, *torch.arange(7, 7 + max_new_tokens).split(1)):
                streamer.put(ids)

    decoding.transformers.generation = SimpleNamespace(BaseStreamer=object)
    contender, clock = decoding.Transformers.__new__(decoding.Transformers), decoding.Clock()
    contender.model = Model()
    contender.answer([1, 2], 3, clock)
    assert clock.ids == [7, 8, 9]


def test_ours_tells_each_token_of_a_greedy_answer(decoding, monkeypatch):
    asked = []

    def generate(model, prompts, stops, n, on_token):
        asked.append((model, prompts, stops, n))
        for token in (7, 8, 9):
            on_token(0, token)

    monkeypatch.setattr(decoding, "generate", generate)
    clock = decoding.Clock()
    decoding.Ours("model").answer([1, 2], 3, clock)
    assert asked == [("model", [[1, 2]], (), 3)] and clock.ids == [7, 8, 9]


def test_transformers_answers_in_bf16_and_past_an_eos(decoding):
    loaded = []

    def load(folder, **how):
        loaded.append((folder, how))
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))

    decoding.transformers.AutoModelForCausalLM = SimpleNamespace(from_pretrained=load)
    contender = decoding.Transformers("dir/mine")
    assert (
        loaded == [("dir/mine", {"dtype": torch.bfloat16})] and contender.model.generation_config.eos_token_id is None
    )


def test_llama_cpp_reads_each_token_but_the_last(decoding, monkeypatch):
    """It begins anew with each answer, and the likeliest token is told."""
    done, rows = [], [[0.0, 3.0, 1.0], [5.0, 1.0, 2.0], [0.0, 1.0, 2.0]]

    class Llama:
        ctx = None

        def __init__(self, path, **how):
            done.append((path, how))

        def reset(self):
            done.append("reset")

        def eval(self, tokens):
            done.append(list(tokens))

        def n_vocab(self):
            return 3

    def logits_of(ctx, i):
        return np.ctypeslib.as_ctypes(np.array(rows.pop(0), np.float32))

    stand_in = SimpleNamespace(Llama=Llama, llama_get_logits_ith=logits_of)
    monkeypatch.setattr(decoding, "llama_cpp", stand_in, raising=False)
    clock = decoding.Clock()
    decoding.LlamaCpp("a.gguf", 4).answer([1, 2], 3, clock)
    assert [int(token) for token in clock.ids] == [1, 0, 2] and done[1:] == ["reset", [1, 2], [1], [0]]
    assert done[0][0] == "a.gguf" and done[0][1]["n_threads"] == done[0][1]["n_threads_batch"] == 4


def test_the_truth_is_of_the_same_weights_in_fp32(decoding, monkeypatch):
    narrow = torch.nn.Linear(3, 2).bfloat16()
    narrow.config, narrow.impl = "config", "ref"
    monkeypatch.setattr(decoding, "new_model", lambda config, device, dtype, impl: torch.nn.Linear(3, 2, dtype=dtype))
    wide = decoding.widen(narrow)
    assert wide.weight.dtype == torch.float32 and torch.equal(wide.weight, narrow.weight.float())


def test_contenders_answer_in_turn_and_ours_is_the_ratios_unit(decoding, monkeypatch):
    """The first turn warms up. Wall seconds are over ours on the clock, CPU seconds over ours of the CPU."""
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(decoding, "time", SimpleNamespace(
        perf_counter=lambda: now["wall"], process_time=lambda: now["cpu"]))  # fmt: skip
    monkeypatch.setattr(decoding, "measure_reading", lambda threads: 1.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    turns = []

    def contender(name, wall, cpu, ids):
        def answer(prompt, n, clock):
            turns.append(name)
            assert n == 3
            slow = 100.0 if turns.count(name) == 1 else 1.0
            for token in ids:
                now["wall"] += slow * wall
                now["cpu"] += slow * cpu
                clock(token)

        return SimpleNamespace(answer=answer)

    contenders = {"cria": contender("cria", 1.0, 2.0, [1, 2, 3]), "other": contender("other", 4.0, 6.0, [1, 9, 3])}
    found = decoding.describe_run(contenders, [0], [1, 2, 3], rounds=2, threads=1)
    assert turns == ["cria", "other"] * 3
    assert found["ratio"]["other"]["max"] == 4.0 and found["cpu_ratio"]["other"]["max"] == 3.0
    assert found["ms_a_token"]["cria"]["max"] == 1e3 and found["cpu_ms_a_token"]["cria"]["max"] == 2e3
    assert found["tokens_as_in_fp32"] == {"cria": 3, "other": 1} and found["ratio"].keys() == {"other"}

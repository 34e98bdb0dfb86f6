"""Decoding on a CPU, ours beside others': tokens, seconds a token, ratios."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.calls import FOLDER, Calls
from tests.helpers.clocks import Clock, Ticks


@pytest.fixture
def decoding(load_beside_stand_in):
    return load_beside_stand_in("scripts.speed.decoding")


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


@pytest.mark.parametrize("with_llama_cpp", [True, False])
def test_the_whole_measurement(with_llama_cpp, decoding, monkeypatch, tell, snapshot):
    """What every model is made of, who answers when, and every figure."""
    Ticks(monkeypatch, decoding)
    calls = Calls()
    weights = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)]

    def model_of(name, device, dtype, impl):
        return SimpleNamespace(label=f"{impl} model", parameters=lambda: weights), "tokenizer", "more"

    def generate(model, prompts, stops, n, on_token=None):
        ids = [*range(n - 1), {"native model": 1, "ref model": 2, "wide": 3}[getattr(model, "label", "wide")]]
        for token in ids if on_token else ():
            on_token(0, token)
        return [ids]

    def contender(*ids):
        return lambda prompt, n, clock: [clock(token) for token in ids]

    for name, result in {
        "load_model": model_of, "choose_kernels": "native", "generate": generate, "run_module": None,
        "encode_prompt": [5, 6], "widen": SimpleNamespace(label="wide"), "measure_reading": 12.5,
        "Transformers": calls.thing("their model", answer=contender(0, 7, 3)),
        "LlamaCpp": calls.thing("llama.cpp", answer=contender(0, 1, 3)),
    }.items():  # fmt: skip
        monkeypatch.setattr(decoding, name, calls.stand_in(name, result))
    monkeypatch.setattr(decoding, "llama_cpp", SimpleNamespace(__version__="0.3") if with_llama_cpp else None)
    flags = ("--gguf", "a.gguf") if with_llama_cpp else ("--gguf", "a.gguf", "--threads", 3)
    text = tell(decoding, "--tokens", 3, "--rounds", 1, *flags)
    assert text == snapshot and re.sub(FOLDER, "FOLDER", calls.text()) == snapshot(name="calls")


def test_without_a_file_llama_cpp_is_left_out(decoding, monkeypatch, capsys, call_main):
    monkeypatch.setattr(decoding, "load_model", lambda *_: ("model", 0, 0))
    monkeypatch.setattr(decoding, "choose_kernels", lambda *_: "ref")
    monkeypatch.setattr(decoding, "encode_prompt", lambda row, tokenizer: row.instruction)
    monkeypatch.setattr(decoding, "generate", lambda *_: [[1]])
    monkeypatch.setattr(decoding, "widen", lambda model: model)
    monkeypatch.setattr(decoding, "run_module", lambda *_: None)
    monkeypatch.setattr(decoding, "Transformers", lambda folder: None)
    monkeypatch.setattr(decoding, "llama_cpp", "it is there")
    run = []

    def describe(contenders, prompt, *_):
        run.append((list(contenders), prompt))
        raise InterruptedError

    monkeypatch.setattr(decoding, "describe_run", describe)
    with pytest.raises(InterruptedError):
        call_main(decoding, "--json", "x")
    assert run == [(["cria", "cria, torch's operators", "transformers"], decoding.PROMPT)]
    assert "llama.cpp is left out: it wants llama_cpp_python and --gguf" in capsys.readouterr().out


def test_memory_is_read_at_the_rate_of_the_fastest_of_ten(decoding, monkeypatch):
    clock, spans, asked = Clock(monkeypatch, decoding), iter([2.0, 1.0, 0.25, *[1.0] * 7, 99.0]), []

    def multiply(library, x, w, threads):
        asked.append((library, x.shape, x.dtype, w.shape, w.dtype, threads))
        clock.take(next(spans))

    monkeypatch.setattr(decoding, "multiply_few_rows", multiply)
    monkeypatch.setattr(decoding, "load_cpu", lambda: "library")
    rows = int(0.001 * 1e9 / 2 / 4096)
    assert decoding.measure_reading(3, 0.001) == rows * 4096 * 2 / 0.25 / 1e9
    assert asked == [("library", (1, 4096), torch.float32, (rows, 4096), torch.bfloat16, 3)] * 10


def test_by_default_one_thread_and_all_are_measured(decoding, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(sys, "argv", ["decoding", "--json", "x"])
    expected = {"json": "x", "gguf": "", "tokens": 64, "rounds": 5, "threads": [1, 6]}
    assert vars(decoding.parse_arguments()) == expected

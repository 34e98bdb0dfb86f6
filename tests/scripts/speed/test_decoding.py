"""Decoding on a CPU, ours beside others': tokens, seconds a token, ratios."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch


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

"""Measurements in turns: who is measured how, which way round a ratio is, and what is left out.

Contenders are stand-ins that take the time they are told to.
"""

import contextlib
import itertools
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.native.library import NativeError
from scripts.speed import adamw, data, dedup, demo, demo_adapter, offload, weight_gradient
from tests.helpers.run import ROOT


class Clock:
    """A clock that only moves when a contender lets it."""

    def __init__(self, monkeypatch, module):
        self.now = 0.0
        read = lambda: self.now  # noqa: E731
        times = SimpleNamespace(process_time=read, perf_counter=read, monotonic=read, sleep=lambda _: None)
        monkeypatch.setattr(module, "time", times)

    def take(self, seconds):
        self.now += seconds


# ---- AdamW ----------------------------------------------------------------------------------------------------------


def test_equal_steps_end_at_the_first_bit_that_differs(monkeypatch):
    """In the parameter, or in any one tensor of its state."""
    real = adamw.kernels.adamw
    for broken in range(4):

        def update(param, grad, state, impl, broken=broken, **given):
            real(param, grad, state, impl="ref", **given)
            if impl == "native" and given["step"] == 3:
                tensors = [param, *state.tensors().values()]
                tensors[broken % len(tensors)].view(-1)[0:1].view(torch.uint8)[0] ^= 1

        monkeypatch.setattr(adamw.kernels, "adamw", update)
        assert adamw.count_equal_steps("split", "bf16", 300, 5) == 2
    monkeypatch.setattr(adamw.kernels, "adamw", lambda *args, impl, **given: real(*args, impl="ref", **given))
    assert adamw.count_equal_steps("none", "fp32", 300, 5) == 5


def test_a_parameter_has_the_type_of_its_mode():
    for master, states in adamw.MODES:
        assert adamw.make(256, master, states)[0].dtype == (torch.float32 if master == "none" else torch.bfloat16)


def test_the_figures_of_adamw_are_over_the_copy_and_torch_in_each_round(monkeypatch, tmp_path, call_main):
    took = {"copy": [1.0, 2.0], "torch": [6.0, 12.0]} | {f"{a}, {b}": [2.0, 4.0] for a, b in adamw.BYTES}
    monkeypatch.setattr(adamw, "measure_in_turns", lambda n, rounds: took)
    monkeypatch.setattr(adamw, "count_equal_steps", lambda master, states, n, steps: steps - (n == 20))
    monkeypatch.setattr(adamw, "load_cpu", lambda: SimpleNamespace(cria_instruction_set=lambda: b"plain"))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    call_main(adamw, "--json", tmp_path / "x", "--parameters", 10, "--times", 1, "--steps", 9, "--sizes", 10, 20, 30)
    found = json.loads((tmp_path / "x").read_text())
    assert set(found["equal_steps"].values()) == {8}
    for (master, states), moved in adamw.BYTES.items():
        figures = found["figures"][f"{master}, {states}"]
        assert figures["faster_than_torch"] == {"median": 3.0, "min": 3.0, "max": 3.0}
        assert figures["of_copy"]["median"] == pytest.approx(moved / 2.0 / 8)


def test_the_first_round_of_adamw_touches_memory_and_is_not_told(monkeypatch):
    clock, steps = Clock(monkeypatch, adamw), []

    def update(param, grad, state, step, **settings):
        assert settings == {"lr": 1e-3, "impl": "native"} | adamw.SETTINGS
        steps.append(step)
        clock.take(100.0 if step == 1 else 1.0)

    monkeypatch.setattr(adamw.kernels, "adamw", update)
    monkeypatch.setattr(adamw, "TorchsWay", lambda n: SimpleNamespace(update=lambda grad: None))
    found = adamw.measure_in_turns(64, rounds=2)
    assert all(found[f"{a}, {b}"] == [1.0, 1.0] for a, b in adamw.BYTES) and set(steps) == {1, 2, 3}


# ---- the gradient of a weight, offloaded updates --------------------------------------------------------------------


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


def took(seconds, update_s, loss=1.0):
    return offload.Took(seconds, update_s, loss, 2.0)


def test_offloaded_steps_are_over_those_that_leave_later_and_those_that_stay(monkeypatch, tmp_path, call_main):
    ways = {offload.ON_DEVICE: took(2.0, 0.5), offload.AFTER: took(4.0, 1.0), offload.WITHIN: took(3.0, 0.25)}
    monkeypatch.setattr(offload, "measure_in_turns", lambda args: ({way: [one] for way, one in ways.items()}, [2]))
    monkeypatch.setattr(offload, "load_cpu", lambda: SimpleNamespace(cria_instruction_set=lambda: b"plain"))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    call_main(offload, "--json", tmp_path / "x")
    found = json.loads((tmp_path / "x").read_text())
    assert found["in_backward_over_after"]["median"] == 0.75 and found["in_backward_over_on_device"]["median"] == 1.5
    assert found["update_gb_per_s"]["median"] == pytest.approx(found["update_bytes"] / 0.25 / 1e9)


@pytest.mark.parametrize("other", [None, "loss", "norm"])
def test_ways_of_offloading_that_differ_in_a_bit_are_no_measurement(other, monkeypatch):
    class Stepper:
        def __init__(self, way, dtype):
            self.way = way

        def step(self, batches):
            found = {"loss": 1.0, "norm": 2.0}
            if other and self.way == offload.WITHIN:
                found[other] += 1e-7
            return offload.Took(1.0, 0.5, **found)

    monkeypatch.setattr(offload, "Stepper", Stepper)
    monkeypatch.setattr(offload, "alpaca_rows", lambda n, smoke: SimpleNamespace(get_examples=lambda which: which))
    monkeypatch.setattr(offload, "make_micro_batches", lambda *_, **__: [1, 2])
    args = Namespace(rounds=2, batch=2, tokens=64, dtype="fp32")
    if other:
        with pytest.raises(AssertionError, match="the bits must be equal"):
            offload.measure_in_turns(args)
    else:
        assert {way: len(found) for way, found in offload.measure_in_turns(args)[0].items()} == dict.fromkeys(
            (offload.ON_DEVICE, offload.AFTER, offload.WITHIN), 2
        )


@pytest.mark.parametrize("way", [offload.ON_DEVICE, offload.AFTER, offload.WITHIN])
def test_a_way_of_offloading_is_what_its_name_says(way, monkeypatch):
    given = {}
    monkeypatch.setattr(offload, "new_model", lambda *_, **__: SimpleNamespace(init_weights=lambda seed: None))
    monkeypatch.setattr(offload, "AdamW", lambda model, **settings: given.update(settings) or SimpleNamespace())
    stepper = offload.Stepper(way, torch.float32)
    assert given["offload"] == given["on_cpu"] == (way != offload.ON_DEVICE)
    assert stepper.optimizer.is_sharded == (way == offload.AFTER)


def test_the_update_is_timed_from_the_known_norm_on(monkeypatch):
    clock, was_last = Clock(monkeypatch, offload), []
    stepper = offload.Stepper.__new__(offload.Stepper)
    loss = torch.zeros((), requires_grad=True)
    stepper.model = SimpleNamespace(loss=lambda batch: clock.take(4.0) or loss + 1)
    norm = lambda: clock.take(2.0) or torch.tensor(3.0)  # noqa: E731
    stepper.optimizer = SimpleNamespace(
        micro_batch=lambda last: was_last.append(last) or contextlib.nullcontext(), grad_norm=norm,
        step=lambda *_, **__: clock.take(1.0),
    )  # fmt: skip
    assert stepper.step([1, 2]) == offload.Took(seconds=11.0, update_s=1.0, loss=2.0, norm=3.0)
    assert was_last == [False, True]


# ---- de-duplication, data -------------------------------------------------------------------------------------------

ROWS = [{"instruction": f"Name {n} uses for a {thing}.", "input": "", "output": "x y"} for n, thing in
        itertools.product(("two", "three"), ("lamp", "chair", "paper clip"))]  # fmt: skip


def test_all_pairs_decide_as_the_index_does_over_several_blocks(monkeypatch):
    """At 0.7 exactly too, and of several duplicates the nearest, of equally near ones the first."""
    monkeypatch.setattr(dedup, "BLOCK", 8)
    texts = [*dedup.make_stream(ROWS, 60, 0), "", "", "a b c d e f g", "a b c d e f g h i j k l m"]
    texts += ["a b c d e f g x y z", "q b c d e f g x y z", "a b c d e f g x y w"]
    answers, _ = dedup.compare_all_pairs(texts)
    assert answers == dedup.deduplicate(texts) and 0 < answers.count(None) < len(texts)


def test_a_stream_is_of_its_seed_and_a_shorter_one_its_beginning():
    long = dedup.make_stream(ROWS, 30, 1)
    assert dedup.make_stream(ROWS, 10, 1) == long[:10] and dedup.make_stream(ROWS, 30, 2) != long


@pytest.mark.parametrize("other", [False, True])
def test_decisions_that_differ_are_no_measurement(other, monkeypatch):
    clock = Clock(monkeypatch, dedup)
    monkeypatch.setattr(dedup, "deduplicate", lambda texts: clock.take(2.0) or [None, 0])
    monkeypatch.setattr(dedup, "compare_all_pairs", lambda texts: ([None, None if other else 0], 6.0))
    if other:
        with pytest.raises(AssertionError, match="decide otherwise"):
            dedup.measure_in_turns(["a", "a"], 2)
    else:
        found = dedup.measure_in_turns(["a", "a"], 2)
        assert found["ratio"]["median"] == 3.0 and found["kept"] == 1 and found["cpu_s"]["median"] == 2.0


def test_each_stream_of_texts_is_as_long_as_it_is_asked_for(monkeypatch, tmp_path, call_main):
    asked = []
    figures = {"kept": 3, "cpu_s": 1.0, "wall_s": 2.0, "peak_bytes": 30, "bytes_before": 10}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(dedup, "read_rows", lambda path: ROWS)
    monkeypatch.setattr(dedup, "measure_in_new_process", lambda texts: asked.append(texts) or figures)
    monkeypatch.setattr(dedup, "measure_in_turns", lambda texts, rounds: asked.append(texts) or {"texts": len(texts)})
    flags = ("--n", 4, "--n-long", 9, "--rounds", 2, "--seed", 5)
    assert not call_main(dedup, "--json", tmp_path / "x", *flags)
    stream = dedup.make_stream(ROWS, 9, 5)
    assert asked == [stream, stream, stream[:4]]
    found = json.loads((tmp_path / "x").read_text())
    assert found["all_pairs"] == {"texts": 4} and found["rounds"] == 2
    assert (found["stream"]["texts"], found["stream"]["kept"]) == (9, 3)
    assert found["source"]["seed"] == 5 and found["source"]["rows_in_it"] == len(ROWS)


def test_memory_is_read_in_bytes():
    now, peak = dedup.read_memory_bytes("VmRSS"), dedup.read_memory_bytes("VmHWM")
    assert 1 << 24 < now <= peak < 1 << 40


@pytest.mark.parametrize("threads", ["2", None])
def test_seconds_of_several_threads_are_refused(threads, monkeypatch, call_main, capsys):
    monkeypatch.setattr(dedup, "read_rows", lambda path: pytest.fail("it is measured"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert call_main(dedup, "--json", "x") == 2 and "OMP_NUM_THREADS=1" in capsys.readouterr().err


def test_rows_are_repeated_to_as_many_as_are_wanted_and_no_more():
    rows = [SimpleNamespace(instruction=f"Q{i}", input="", output=f"One {i}. Two {i}. Three.") for i in range(4)]
    for n in (3, 4, 9):
        made = data.recombine_rows(rows, n)
        assert len(made) == n and len({row["instruction"] for row in made}) == n
        assert [row["output"] for row in made[:4]] == [row.output for row in rows[: min(4, n)]]
        assert made == data.recombine_rows(rows, n)


@pytest.mark.parametrize("most", [50, 512])
def test_random_rows_have_the_lengths_of_alpaca_and_each_keeps_a_response(most, monkeypatch):
    monkeypatch.setattr(data, "MAX_LENGTH", most)
    rows = data.random_rows_like_alpaca(400)
    assert 100 < len(rows) <= 400 and min(rows.loss_tokens()) > 0 and max(rows.lengths()) <= most


def test_a_first_start_finds_no_cache_and_later_ones_do(monkeypatch, tmp_path):
    starts = []
    dataset = SimpleNamespace(counts={"tokens": 8}, sha256=lambda: "x")

    class Table(list):
        def select(self):
            return dataset

    def read_tables(config, tokenizer, message):
        is_cached = Path(config.token_cache).exists()
        Path(config.token_cache).mkdir(exist_ok=True)
        starts.append(is_cached)
        return [(Table([1, 2]), [])], is_cached

    monkeypatch.setattr(data, "read_tables", read_tables)
    monkeypatch.setattr(data, "read_rows", lambda files: ([], []))
    monkeypatch.setattr(data.data, "encode_rows", lambda *_: None)
    (tmp_path / "rows.json").write_text("[]")
    found, figures = data.measure_starts(tmp_path / "rows.json", None, 4)
    assert starts == [False] * 3 + [True] * 4 and found is dataset and figures["tokens_a_row"] == 4


def test_an_epoch_is_packed_to_its_own_budget_and_padding_is_what_is_no_token():
    rows = data.random_rows_like_alpaca(300)
    small, large = data.pack_epoch(rows, 1024), data.pack_epoch(rows, 8192)
    assert small["micro_batches_a_step"] > 2 * large["micro_batches_a_step"] and small["steps"] == 3
    assert 0 < large["padding"] < 0.05 and small["max_tokens"] == 1024 and large["computed_over_logical"] < 1.05


def test_wall_and_cpu_seconds_are_told_in_this_order(monkeypatch):
    walls, cpus = iter([1.0, 4.0]), iter([10.0, 10.5])
    times = SimpleNamespace(perf_counter=lambda: next(walls), process_time=lambda: next(cpus))
    monkeypatch.setattr(data, "time", times)
    assert data.time_call(lambda a: a, 7) == (7, 3.0, 0.5)


# ---- the demo -------------------------------------------------------------------------------------------------------


def test_a_run_of_the_demo_is_told_by_its_own_seconds_and_its_held_out_figures(monkeypatch, tmp_path):
    usages = iter([SimpleNamespace(ru_utime=100.0, ru_stime=10.0), SimpleNamespace(ru_utime=130.0, ru_stime=12.0)])
    started = []
    monkeypatch.setattr(demo, "resource", SimpleNamespace(getrusage=lambda _: next(usages), RUSAGE_CHILDREN=0))
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: started.append(command))
    lines = [{"event": "eval", "loss": 0.8}, {"event": "score", "equal": 1, "answers": 24, "overlap": 0.1},
             {"event": "train", "loss": 9.0}, {"event": "train", "loss": 8.0}, {"event": "eval", "loss": 0.2},
             {"event": "score", "equal": 19, "answers": 24, "overlap": 0.9}]  # fmt: skip
    monkeypatch.setattr(demo, "read_metrics", lambda path: lines)
    found = demo.take_run(tmp_path, ["--seed", "3"])
    assert found["cpu_seconds"] == 32.0 and found["loss"] == [0.8, 0.2] and found["equal"] == [1, 19]
    assert found["answers"] == 24 and found["steps"] == 2 and started[0][-4:] == ["--out", str(tmp_path), "--seed", "3"]


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_each_run_of_the_demo_has_its_seed_and_stands_over_the_demo_of_before(seeds, monkeypatch, tmp_path, call_main):
    given = []

    def take_run(out, flags):
        given.append(flags)
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"config": {"dtype": "bf16"}}))
        return {"cpu_seconds": 30.0 if "--seed" in flags else 40.0}

    monkeypatch.setattr(demo, "take_run", take_run)
    call_main(demo, "--json", tmp_path / "x", "--seeds", seeds)
    assert [flags[1] for flags in given if flags[0] == "--seed"] == [str(seed) for seed in range(seeds)]
    (before,) = [flags for flags in given if flags[0] != "--seed"]
    assert before[-2:] == ["--dtype", "bf16"] and "seed-tasks" in before
    found = json.loads((tmp_path / "x").read_text())
    assert found["cpu_ratio"]["median"] == 0.75 and len(found["runs"]) == seeds


def test_each_kind_of_the_demo_trains_what_it_names_and_is_a_share_of_all_weights(monkeypatch, tmp_path, call_main):
    given = []

    def take_run(out, flags):
        given.append(flags)
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"config": {"dtype": "auto"}, "facts": {"dtype": "bfloat16"}}))
        return {"equal": [1]}

    monkeypatch.setattr(demo_adapter, "take_run", take_run)
    lines = [{"event": "train", "peak_memory_bytes": n} for n in (5, 9, 7)] + [{"event": "eval"}]
    monkeypatch.setattr(demo_adapter, "read_metrics", lambda path: lines)
    call_main(demo_adapter, "--json", tmp_path / "x", "--seeds", 2)
    found = json.loads((tmp_path / "x").read_text())
    assert [flags[1] if flags[0] == "--adapter" else "none" for flags in given] == [*demo_adapter.ADAPTERS] * 2
    assert [flags[-2:] for flags in given] == [["--seed", str(seed)] for seed in (0, 0, 0, 1, 1, 1)]
    assert given[0] == ["--seed", "0"] and given[3] == ["--seed", "1"]  # all weights, at their own learning rate
    state = {run["adapter"]: run["state_bytes"] for run in found["runs"]}
    assert 0.1 * state["none"] < state["lora"] < 0.5 * state["none"] and state["qlora"] < state["lora"]
    makefile = (ROOT / "Makefile").read_text()
    for flags in given:  # as `make demo` has them
        assert flags[0] == "--seed" or " ".join(flags[:-2]).replace(flags[1], "$(ADAPTER)") in makefile
    assert all(run["peak_bytes"] == 9 for run in found["runs"])
    assert all(run["dtype"] == "bfloat16" for run in found["runs"])
    weights = 134_515_008  # SmolLM2-135M: weights and gradients in bf16, fp32 masters as 2 bytes more, m and v in fp32
    assert found["runs"][0]["state_bytes"] == weights * (2 + 2 + 2 + 8)

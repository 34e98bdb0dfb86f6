"""Checks of ranks on one device: what is wrong or not possible is reported as such."""

import itertools
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.output import checkpoint
from engine.text.tokenizer_files import load_tokenizer
from scripts.step import rank_checks
from scripts.step.bench import Variant
from scripts.step.rank_checks import Block, Differs
from tests.helpers.calls import Calls
from tests.helpers.forks import Started


@pytest.fixture
def variant():
    return Variant("tinyllama-1.1b", steps=2, warmup=1)


@pytest.mark.parametrize(
    ("value", "is_right"), [(0.0, True), (1.0, True), (1.001, False), (math.inf, False), (math.nan, False)]
)
def test_a_difference_over_the_most_that_is_wanted_is_told_and_nan_is_one(value, is_right):
    if is_right:
        assert rank_checks.check_difference("losses", value, 1.0) == value
    else:
        with pytest.raises(Differs, match=r"losses: .* apart, wanted at most 1\.00e\+00"):
            rank_checks.check_difference("losses", value, 1.0)


def test_a_difference_counts_to_either_side():
    assert rank_checks.relative_difference(3.0, 2.0) == rank_checks.relative_difference(1.0, 2.0) == 0.5
    assert rank_checks.relative_difference(-3.0, -2.0) == 0.5


def test_a_state_that_is_read_back_otherwise_is_told(variant, monkeypatch):
    load = checkpoint.load

    def flipped(folder, tensors):
        load(folder, tensors)
        next(iter(tensors.values())).tensor.view(-1)[0] += 1

    monkeypatch.setattr(checkpoint, "load", flipped)
    with pytest.raises(Differs, match="1 tensors of a state that was read back, plain"):
        rank_checks.check_one_rank(variant, smoke=True)


@pytest.mark.parametrize("name", ["loss", "norm"])
@pytest.mark.parametrize("times", [4, 4.1])
def test_a_whole_curve_may_differ_by_four_roundings(name, times, variant, monkeypatch):
    apart = {f"largest_{one}_apart": 0.0 for one in ("loss", "norm")}
    apart[f"largest_{name}_apart"] = times * rank_checks.ROUNDING
    monkeypatch.setattr(rank_checks, "run_block", lambda *_: None)
    monkeypatch.setattr(rank_checks, "compare_curves", lambda *_: apart)
    monkeypatch.setattr(rank_checks, "check_save_and_resume", lambda *_: {"saved_bytes": 1})
    if times > 4:
        with pytest.raises(Differs, match=f"{name} of 6 steps"):
            rank_checks.check_one_rank(variant, smoke=True)
    else:
        assert rank_checks.check_one_rank(variant, smoke=True).items() >= {**apart, "saved_bytes": 1}.items()


class Rank(Started):
    """A rank's process, forked from one that has imported the engine."""

    def __init__(self, folder, out, place):
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1"}
        super().__init__(rank_checks.RANK_CODE, *rank_checks.finetune_flags(folder, out), env=environment)
        self.log = folder / f"{out.name}-{place['RANK']}.log"

    def wait(self, timeout=None):
        self.log.write_text("".join(self.communicate(timeout)))
        return self.returncode


def test_two_ranks_of_one_device(monkeypatch):
    monkeypatch.setattr(rank_checks, "start_rank", Rank)
    monkeypatch.setattr(rank_checks, "RANKS_LIMIT_S", 280)
    found = rank_checks.check_two_ranks(smoke=True)
    assert found["steps"] == 4 and found["largest_loss_apart"] < 1e-5 and found["largest_norm_apart"] < 1e-5


@pytest.fixture
def ended(monkeypatch):
    """Ranks that end as told, and what they wrote."""

    def of(codes, log):
        def finetuned(folder, runs):
            (folder / "two-0.log").write_text("a note\n")
            (folder / "two-1.log").write_text(log)
            return codes

        monkeypatch.setattr(rank_checks, "finetune_with_ranks", finetuned)

    return of


def test_what_ranks_of_one_card_cannot_do_is_told_and_what_is_broken_fails(ended):
    ended([77, 77, 0], "x\nnot possible: gloo between ranks of one card: no such op\n")
    found = rank_checks.check_two_ranks(smoke=True)
    assert found == {"absent": "not possible: gloo between ranks of one card: no such op"}
    ended([1, 1, 0], "error: rank 1 broke\n")
    with pytest.raises(RuntimeError, match=r"exit codes \[1, 1, 0\] of two ranks and of one: rank 1 broke"):
        rank_checks.check_two_ranks(smoke=True)
    ended([0, -9, 0], "")
    with pytest.raises(RuntimeError, match=r"-9.*a note"):
        rank_checks.check_two_ranks(smoke=True)


def test_wrong_collectives_are_told(monkeypatch):
    with rank_checks.one_rank():
        rank_checks.check_collectives("cpu")
        monkeypatch.setattr(rank_checks, "reduce_scatter", lambda part, whole: part.zero_())
        with pytest.raises(Differs, match="reduce_scatter over 1 ranks"):
            rank_checks.check_collectives("cpu")


def test_a_rank_runs_the_fine_tuning_with_its_place_and_writes_its_log(monkeypatch, tmp_path):
    started = []

    def start(command, stdout, **how):
        started.append((command, how, Path(stdout.name).name))
        return "process"

    monkeypatch.setattr(rank_checks.subprocess, "Popen", start)
    monkeypatch.setattr(os, "environ", {"HOME": "/h", "RANK": "9"})
    place = {"RANK": "1", "WORLD_SIZE": "2"}
    assert rank_checks.start_rank(tmp_path, tmp_path / "two", place) == "process"
    ((command, how, log),) = started
    assert log == "two-1.log" and (tmp_path / log).exists()
    assert how == {
        "cwd": rank_checks.ROOT, "stderr": rank_checks.subprocess.STDOUT,
        "env": {"HOME": "/h", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    }  # fmt: skip
    folder = str(tmp_path)
    assert command == [
        sys.executable, "-c", rank_checks.RANK_CODE, "--data", f"{folder}/rows.json", "--tokenizer",
        f"{folder}/tokenizer", "--out", f"{folder}/two", *rank_checks.FINETUNE, "--device", rank_checks.DEVICE,
    ]  # fmt: skip


def test_all_ranks_are_started_at_once_and_none_outlives_the_check(monkeypatch, tmp_path):
    calls, ports, now = Calls(), iter([5000, 6000]), iter([100.0, 110.0, 240.0, 260.0])

    def start(folder, out, place):
        name = f"{out.name}-{place['RANK']}"
        process = calls.thing(name, wait=7 if name == "two-1" else 0, kill=None)
        process.poll = lambda: None if name == "one-0" else 0
        return process

    monkeypatch.setattr(rank_checks, "start_rank", calls.stand_in("start", start))
    monkeypatch.setattr(rank_checks, "find_free_port", lambda: next(ports))
    monkeypatch.setattr(rank_checks, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert rank_checks.finetune_with_ranks(Path("f"), {Path("two"): 2, Path("one"): 1}) == [0, 7, 0]
    place = "{{'RANK': '{}', 'WORLD_SIZE': '{}', 'LOCAL_RANK': '0', 'MASTER_PORT': '{}'}})"
    assert calls.lines == [
        f"start(PosixPath('f'), PosixPath('two'), {place.format(0, 2, 5000)}",
        f"start(PosixPath('f'), PosixPath('two'), {place.format(1, 2, 5000)}",
        f"start(PosixPath('f'), PosixPath('one'), {place.format(0, 1, 6000)}",
        "two-0.wait(140.0)", "two-1.wait(10.0)", "one-0.wait(1.0)", "one-0.kill()", "one-0.wait()",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [None, RuntimeError("no such op\nmore"), ValueError()])
def test_a_rank_talks_by_gloo_and_ends_at_once_where_that_is_not_possible(error, monkeypatch, capsys):
    calls = Calls()

    def check(device):
        if error:
            raise error

    def ended(code):
        raise InterruptedError(code)

    monkeypatch.setattr(rank_checks.dist, "init_process_group", calls.stand_in("init"))
    monkeypatch.setattr(rank_checks, "check_collectives", calls.stand_in("check", check))
    monkeypatch.setattr(rank_checks.os, "_exit", ended)
    train = lambda: rank_checks.dist.init_process_group("nccl", rank=1)  # noqa: E731
    monkeypatch.setattr(rank_checks.finetune, "main", train)
    monkeypatch.setattr(rank_checks, "run_main", lambda main: main() or 5)
    with pytest.raises(InterruptedError if error else SystemExit) as done:
        rank_checks.run_as_rank()
    assert calls.lines == ["init('gloo', rank=1)", f"check({rank_checks.DEVICE!r})"]
    assert (done.value.args[0] if error else done.value.code) == (77 if error else 5)
    said = {RuntimeError: "no such op", ValueError: "ValueError"}.get(type(error))
    told = f"not possible: gloo between ranks of one card: {said}\n" if error else ""
    assert capsys.readouterr().out == told


def test_the_message_is_the_first_with_the_mark_else_the_last_line_of_a_log(tmp_path):
    assert rank_checks.find_message(tmp_path, "error: ") == "nothing was said"
    (tmp_path / "one-0.log").write_text("\n")
    (tmp_path / "two-0.log").write_text("first\nlast\n")
    (tmp_path / "two-1.log").write_text("other\n")
    assert rank_checks.find_message(tmp_path, "error: ") == "last"
    (tmp_path / "two-1.log").write_text(f"x error: an error: {'y' * 400}\nerror: second\n")
    assert rank_checks.find_message(tmp_path, "error: ") == f"an error: {'y' * 290}"
    assert rank_checks.find_message(tmp_path, "absent: ") == "last"


FIGURES = {"loss": [2.0, 1.0], "grad_norm": [4.0, 2.0], "tokens": [10, 20], "examples": [8, 8]}


@pytest.mark.parametrize(
    ("ours", "files", "error"),
    [({}, 2, None), ({"tokens": [10, 21]}, 2, r"tokens a step: \[10, 21\] of two ranks, \[10, 20\] of one"),
     ({"examples": [8, 7]}, 2, "examples a step"), ({}, 1, "step-2 of two ranks is in 1 files"),
     ({"loss": [2.0, 1.1]}, 2, r"losses of two ranks and of one: 1\.00e-01 apart"),
     ({"grad_norm": [4.4, 2.0]}, 2, r"gradient norms of two ranks and of one: 1\.00e-01 apart")],
)  # fmt: skip
def test_two_ranks_must_have_the_curve_of_one_and_save_in_two_files(ours, files, error, monkeypatch):
    lines = {"two": FIGURES | ours, "one": FIGURES}
    monkeypatch.setattr(rank_checks, "finetune_with_ranks", lambda folder, runs: [0] * sum(runs.values()))
    monkeypatch.setattr(rank_checks, "read_training_lines", lambda out: lines[out.name])
    monkeypatch.setattr(rank_checks, "list_checkpoints", lambda out: [(1, "no"), (2, out / "step-2")])
    saved = SimpleNamespace(manifest={"files": ["x"] * files})
    monkeypatch.setattr(rank_checks.checkpoint, "open_checkpoint", lambda path: saved)
    monkeypatch.setattr(rank_checks, "ROUNDING", 0.05)
    if error:
        with pytest.raises(Differs, match=error):
            rank_checks.check_two_ranks(smoke=False)
    else:
        expected = {"backend": "gloo", "dtype": "float32", "steps": 2, "largest_loss_apart": 0.0}
        assert rank_checks.check_two_ranks(smoke=False) == {**expected, "largest_norm_apart": 0.0}


def test_steps_without_a_token_are_no_check(monkeypatch):
    monkeypatch.setattr(rank_checks, "finetune_with_ranks", lambda *_: [0, 0, 0])
    monkeypatch.setattr(rank_checks, "read_training_lines", lambda out: FIGURES | {"tokens": []})
    with pytest.raises(Differs, match=r"tokens a step: \[\]"):
        rank_checks.check_two_ranks(smoke=False)


def test_rows_and_a_tokenizer_of_bytes_are_made_for_the_check(tmp_path):
    rank_checks.write_rows(tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 24 and rows[7] == {"instruction": "Say 7 in words.", "input": "nn", "output": "yes " * 4}
    rank_checks.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer.encode("Zwölf!")
    assert len(ids) == len("Zwölf!".encode()) and tokenizer.decode(ids) == "Zwölf!"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)


def test_figures_of_training_lines_alone_are_read(tmp_path):
    lines = [{"event": "start"}, *({"event": "train", **{k: v[i] for k, v in FIGURES.items()}} for i in (0, 1)),
             {"event": "eval", "loss": 9.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rank_checks.read_training_lines(tmp_path) == FIGURES


def test_the_variant_of_a_machine(monkeypatch):
    variant = Variant("tinyllama-1.1b", impl="triton")
    for gpu, smoke in ((True, False), (True, True), (False, False), (False, True)):
        monkeypatch.setattr(rank_checks, "GPU", gpu)
        small = {"tokens": 192, "steps": 2, "warmup": 1} if smoke else {}
        expected = replace(variant, impl="triton" if gpu else "ref", **small)
        assert rank_checks.variant_here(variant, smoke) == expected


def test_a_block_is_told_without_its_warm_up(monkeypatch):
    calls = Calls()
    steps = calls.thing("steps", run=None, read_figures=None, seconds=[1.0, 2.0, 3.0], close=None)
    steps.losses, steps.norms, steps.tokens = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    steps.computed, steps.n_batches = [10, 11, 12], [13, 14, 15]
    for name, result in {"free_memory": None, "reset_peak_memory": None, "Steps": steps, "peak_memory": "peak"}.items():
        monkeypatch.setattr(rank_checks, name, calls.stand_in(name, result))
    monkeypatch.setattr(Variant, "label", "variant", raising=False)
    found = rank_checks.run_block(Variant(tokens=5, warmup=1, steps=2), True, "shard")
    assert found == Block([2.0, 3.0], [1, 2, 3], [4, 5, 6], [8, 9], [11, 12], [14, 15], "peak")
    assert calls.lines == [
        "free_memory()", "reset_peak_memory()", "Steps(variant, 5, 3, True, 'shard')", "steps.run(1)", "steps.run(2)",
        "steps.run(3)", "steps.read_figures()", "steps.seconds()", "peak_memory()", "steps.close()",
    ]  # fmt: skip


def test_the_first_step_may_differ_by_a_rounding_and_later_ones_are_told(monkeypatch):
    monkeypatch.setattr(rank_checks, "ROUNDING", 0.25)
    block = lambda losses, norms: SimpleNamespace(losses=losses, norms=norms)  # noqa: E731
    wanted = block([4.0, 4.0, 2.0], [8.0, 8.0, 1.0])
    assert rank_checks.compare_curves(block([5.0, 7.0, 2.0], [9.0, 8.0, 3.0]), wanted) == {
        "first_loss_apart": 0.25, "first_norm_apart": 0.125, "largest_loss_apart": 0.75, "largest_norm_apart": 2.0
    }  # fmt: skip
    with pytest.raises(Differs, match="loss of the first step"):
        rank_checks.compare_curves(block([6.0, 4.0, 2.0], [8.0, 8.0, 1.0]), wanted)
    with pytest.raises(Differs, match="gradient norm of the first step"):
        rank_checks.compare_curves(block([4.0, 4.0, 2.0], [4.0, 8.0, 1.0]), wanted)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("wrong", [None, "all_reduce", "all_gather", "reduce_scatter"])
def test_collectives_of_several_ranks_are_held_to_their_sums(n, wrong, monkeypatch):
    """As the second of three ranks would see them, or the only one."""
    rank = n // 2

    def all_reduce(total):
        assert total.tolist() == [rank + 1.0] * 4 and total.dtype == torch.float64
        total.fill_(n * (n + 1) / 2 + (wrong == "all_reduce"))

    def all_gather(whole, mine):
        assert mine.tolist() == [rank] * 2 and whole.shape == (2 * n,) and whole.dtype == mine.dtype == torch.bfloat16
        whole.copy_(torch.arange(n).repeat_interleave(2) + (wrong == "all_gather"))

    def reduce_scatter(part, whole):
        assert whole.tolist() == list(range(2 * n)) and part.shape == (2,)
        part.copy_(n * whole[2 * rank : 2 * rank + 2] + (wrong == "reduce_scatter"))

    monkeypatch.setattr(rank_checks.dist, "get_world_size", lambda: n)
    monkeypatch.setattr(rank_checks.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(rank_checks.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(rank_checks, "all_gather", all_gather)
    monkeypatch.setattr(rank_checks, "reduce_scatter", reduce_scatter)
    if wrong:
        with pytest.raises(Differs, match=rf"^{wrong} over {n} ranks: .*, wanted "):
            rank_checks.check_collectives("cpu")
    else:
        rank_checks.check_collectives("cpu")


def test_a_state_is_saved_halfway_and_the_later_losses_are_compared(monkeypatch):
    """It is saved while the run trains on; both resumed runs start after it and are held to the second half."""
    calls, made, weight = Calls(), itertools.count(), torch.zeros(1)

    def new_steps(variant, tokens, n, smoke, shard):
        i = next(made)
        train = lambda step: None if i else weight.add_(step)  # noqa: E731
        steps = calls.thing(f"steps {i}", run=train, read_figures=None, close=None)
        steps.n_steps, steps.losses = n, [4.0, 8.0] if i else [1.0, 2.0, 4.0, 8.0]
        steps.optimizer = SimpleNamespace(tensors=lambda: {"w": SimpleNamespace(tensor=weight, label="w")})
        return steps

    saver = calls.thing("saver", save=None, wait=SimpleNamespace(bytes=99, folder="the folder"), close=None)
    opened = SimpleNamespace(manifest={"n_updates": 2}, label="opened")
    load = lambda found, tensors: tensors["w"].tensor.fill_(3.0)  # noqa: E731
    monkeypatch.setattr(Variant, "label", "variant", raising=False)
    monkeypatch.setattr(rank_checks, "Steps", calls.stand_in("Steps", new_steps))
    monkeypatch.setattr(rank_checks, "Saver", calls.stand_in("Saver", saver))
    monkeypatch.setattr(rank_checks.checkpoint, "open_checkpoint", calls.stand_in("open", opened))
    monkeypatch.setattr(rank_checks.checkpoint, "load", calls.stand_in("load", load))
    found = rank_checks.check_save_and_resume(Variant(tokens=9, steps=4), True, "shard", "folder")
    assert found == {"saved_bytes": 99, "read_back": "bit-equal, sharded and plain", "resumed_loss_apart": 0.0}
    steps_of = lambda i, *numbers: [f"steps {i}.run({n})" for n in numbers]  # noqa: E731
    resumed = lambda i: [  # noqa: E731
        "open('the folder')", "load(opened, {'w': w})", *steps_of(i, 3, 4), f"steps {i}.read_figures()",
        f"steps {i}.close()",
    ]  # fmt: skip
    assert calls.lines == [
        "Steps(variant, 9, 4, True, 'shard')", f"Saver('folder', keep=1, device={rank_checks.DEVICE!r})",
        *steps_of(0, 1, 2), "saver.save(2, {'w': w}, {'n_updates': 2})", *steps_of(0, 3, 4),
        "steps 0.read_figures()", "saver.wait()", "saver.close()", "steps 0.close()",
        "Steps(variant, 9, 4, True, None)", *resumed(1), "Steps(variant, 9, 4, True, 'shard')", *resumed(2),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("w", "m"), ("w",), ("w", "m", "v")])
def test_a_state_has_the_tensors_that_were_saved(names, monkeypatch):
    monkeypatch.setattr(rank_checks.checkpoint, "open_checkpoint", lambda f: SimpleNamespace(manifest={"n_updates": 5}))
    monkeypatch.setattr(rank_checks.checkpoint, "load", lambda found, tensors: None)
    zero = torch.zeros(1)
    optimizer = SimpleNamespace(tensors=lambda: {name: SimpleNamespace(tensor=zero) for name in ("w", "m")})
    steps = SimpleNamespace(
        optimizer=optimizer, n_steps=1, run=None, read_figures=lambda: None, losses=[2.0 + 2**-20, 2.0]
    )
    kept = dict.fromkeys(names, zero)
    if names == ("w", "m"):
        found = rank_checks.resume_and_compare(steps, "folder", kept, 1, [2.0, 2.0], "plain")
        assert found == 2**-21 and optimizer.n_updates == 5
    else:
        with pytest.raises((Differs, KeyError)):
            rank_checks.resume_and_compare(steps, "folder", kept, 1, [2.0, 2.0], "plain")

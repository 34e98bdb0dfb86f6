"""Measurements of ranks on one card, at toy size on a CPU: figures by arithmetic, and what is wrong is no figure."""

import json
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from engine.output import checkpoint, saver
from scripts.pages import gpu_table
from scripts.step import bench as step_bench
from scripts.step import rank_checks
from scripts.step import ranks as rank_bench
from scripts.step.rank_checks import Block, Differs
from scripts.step.ranks import VARIANTS

GIB = {"peak_gib": 9.0, "peak_reserved_gib": 10.0}


@pytest.fixture
def variant():
    return step_bench.Variant("tinyllama-1.1b", steps=2, warmup=1)


def block(seconds, losses=(2.0, 1.0), norms=(1.0, 1.0), gib=9.0):
    n = len(seconds)
    return Block(list(seconds), list(losses), list(norms), [100] * n, [80] * n, [2] * n, dict(GIB, peak_gib=gib))


# ---- FSDP2 against the plain step -----------------------------------------------------------------------------------


def test_one_rank_is_the_plain_step(variant):
    """The real model through FSDP2: the same curve, with gradients that it and not the plain path handled."""
    sharded, models, take = [], weakref.WeakSet(), step_bench.Steps.take

    def watched(self, step):
        take(self, step)
        sharded.append(hasattr(self.model.norm, "to_local"))
        models.add(self.model)
        assert len(models) == 1  # two models of 7B are too much for a card

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_bench.Steps, "take", watched)
        found = rank_bench.over_plain(variant, 4, smoke=True)
    assert sharded == [False] * 3 + [True] * 6 + [False] * 3  # plain, sharded; sharded, plain
    assert found["largest_loss_apart"] < 1e-6 and found["largest_norm_apart"] < 1e-5
    assert found["over_plain_min"] <= found["over_plain"] <= found["over_plain_max"] and found["pairs"] == 2
    assert found["micro_batches_a_step"] > 1  # gradients add up over reductions
    assert not dist.is_initialized()


def test_a_ratio_is_of_neighbours(variant, monkeypatch):
    made = iter([
        block([1.0, 9.0, 1.0], gib=7.0), block([1.1, 1.1, 1.2]), block([2.6, 2.6], gib=8.0), block([2.0, 2.0]),
        block([3.0]), block([3.0]),
    ])  # fmt: skip
    began = []
    monkeypatch.setattr(rank_bench, "block", lambda v, smoke, how=None: began.append(bool(how)) or next(made))
    found = rank_bench.over_plain(variant, 3, smoke=False)
    assert began == [False, True, True, False, False, True]
    assert found["over_plain"] == pytest.approx(1.1) and found["over_plain_max"] == pytest.approx(1.3)
    assert found["over_plain_min"] == 1 and found["plain_step_s_median"] == 2.0 and found["peak_gib"] == 9.0
    assert found["tokens_per_s"] == pytest.approx(600 / (1.1 + 1.1 + 1.2 + 2.6 + 2.6 + 3.0))
    assert found["plain_peak_gib"] == 9.0 and found["first_loss_apart"] == 0
    made = iter([block([1.0]), block([2.0])])
    assert rank_bench.over_plain(variant, 3, False, lambda: True)["pairs"] == 1  # the time is spent


def test_another_curve_is_no_figure(variant, monkeypatch):
    for wrong in ({"losses": (2.1, 1.0)}, {"norms": (1.1, 1.0)}, {"losses": (float("nan"), 1.0)}):
        made = iter([block([1.0]), block([1.0], **wrong)])
        monkeypatch.setattr(rank_bench, "block", lambda *_, made=made: next(made))
        with pytest.raises(Differs, match=r"of the first step: .* apart, wanted at most"):
            rank_bench.over_plain(variant, 1, smoke=False)


def test_without_memory_neither_keeps_a_master(variant, monkeypatch):
    tried = []

    def small(v, smoke, how=None):
        tried.append((v.master, v.tokens, bool(how)))
        if v.master == "split" and how:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return block([1.0])

    monkeypatch.setattr(rank_bench, "block", small)
    found = rank_bench.over_plain(variant, 1, smoke=False)
    assert [master for master, *_ in tried] == ["split", "split", "stochastic", "stochastic"]
    assert {tokens for _, tokens, _ in tried} == {8320} and found["master"] == "stochastic"
    assert "with master split: CUDA out of memory" in rank_bench.text({"name": "x", **found})
    monkeypatch.setattr(rank_bench, "block", lambda v, *_: small(replace(v, master="split"), False, how=True))
    with pytest.raises(torch.OutOfMemoryError):
        rank_bench.over_plain(variant, 1, smoke=False)
    assert not dist.is_initialized()


# ---- saves ----------------------------------------------------------------------------------------------------------


def test_what_a_save_costs():
    """Steps of 1 s; a save makes the step that it is asked for at 0.5 s longer, and each of three others 0.1 s."""
    seconds = [7.0, 1.0, 1.0, 3.5, 1.1, 1.1, 1.1, 7.0, 1.0, 1.0, 1.5, 1.1, 1.1, 1.1]
    told = [SimpleNamespace(held_seconds=h, seconds=4.0, bytes=8e9) for h in (2.0, 0.25)]
    found = rank_bench.costs(seconds, [1, 2, 8, 9], [[3, 4, 5, 6], [10, 11, 12, 13]], told)
    assert found["unsaved_step_s_median"] == 1 and found["meanwhile_over_unsaved"] == pytest.approx(1.1)
    assert found["copy_s"] == pytest.approx(0.5) and found["lost_s"] == pytest.approx(0.8)
    assert found["over_unsaved_at_100"] == pytest.approx(1.008)
    assert found["over_unsaved_an_epoch"] == pytest.approx(1 + 0.8 / 407)
    assert (found["held_s"], found["first_held_s"], found["first_lost_s"]) == (0.25, 2.0, pytest.approx(2.8))
    assert found["gb_per_s"] == 2 and found["steps_meanwhile"] == 3 and len(found["saves"]) == 2


def test_a_save_that_takes_longer_than_its_cadence_is_waited_for():
    told = [SimpleNamespace(held_seconds=0.0, seconds=150.0, bytes=1)]
    found = rank_bench.costs([1.0] * 151, [0], [list(range(1, 151))], told)
    assert found["over_unsaved_at_100"] == pytest.approx(1.5) and found["over_unsaved_an_epoch"] == 1


def test_saves_are_of_the_whole_state_and_beside_steps(variant, tmp_path, monkeypatch):
    states, write, slow = [], saver.write_checkpoint, time.sleep

    def watched(*args):
        slow(0.1)  # some steps are taken meanwhile
        assert not list(args[0].iterdir())  # the disk need not hold two
        saved = write(*args)
        with safe_open(saved.folder / checkpoint.STATE, "pt") as file:
            states.append({name.split(".")[0] for name in file.keys()})  # noqa: SIM118 (no dict)
        return saved

    monkeypatch.setattr(saver, "write_checkpoint", watched)
    found = rank_bench.saves(variant, 2, 200, str(tmp_path), smoke=True)
    assert (
        states[0] == states[1] >= {"param", "m", "v"}
        and len(found["saves"]) == 2
        and found["folder"].startswith(f"{tmp_path} (")
    )
    assert all(save["steps_meanwhile"] >= 1 and save["write_s"] >= 0.0 for save in found["saves"])
    n = rank_bench.shape("", True).n_parameters
    assert 4 * n < found["bytes"] < 16 * n and found["unsaved_steps"] == 4
    assert not list(tmp_path.iterdir())
    assert len(rank_bench.saves(variant, 2, 200, str(tmp_path), True, lambda: True)["saves"]) == 1


def test_a_save_that_never_ends_fails(variant, monkeypatch):
    monkeypatch.setattr(saver.Saver, "poll", lambda self: None)
    with pytest.raises(TimeoutError, match="save 1 is not written after 9 steps"):
        rank_bench.saves(variant, 1, 9, None, smoke=True)


def test_where_there_is_no_room_nothing_is_measured(variant, monkeypatch, tmp_path):
    monkeypatch.setattr(rank_bench, "memory_available", lambda: 10)
    found = rank_bench.saves(variant, 1, 9, str(tmp_path), smoke=True)
    assert found["absent"].startswith("the host's memory has 0.0 GB free, wanted") and "write_s" not in found
    monkeypatch.setattr(rank_bench, "memory_available", lambda: 15e9)
    monkeypatch.setattr(rank_bench.shutil, "disk_usage", lambda folder: SimpleNamespace(free=15e9))
    rank_bench.need_room(10e9, tmp_path)
    monkeypatch.setattr(rank_bench, "filesystem", lambda folder: "tmpfs")
    with pytest.raises(rank_bench.Absent, match=r"the host's memory has 15\.0 GB free, wanted 22\.0"):
        rank_bench.need_room(10e9, tmp_path)
    monkeypatch.setattr(rank_bench.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e9))
    with pytest.raises(rank_bench.Absent, match=rf"{tmp_path} has 5\.0 GB free, wanted 11\.0"):
        rank_bench.need_room(10e9, tmp_path / "x")


# ---- checks ---------------------------------------------------------------------------------------------------------


def test_a_state_that_is_read_back_otherwise_is_told(variant, monkeypatch):
    load = checkpoint.load

    def flipped(folder, tensors):
        load(folder, tensors)
        next(iter(tensors.values())).tensor.view(-1)[0] += 1

    monkeypatch.setattr(checkpoint, "load", flipped)
    with pytest.raises(Differs, match="1 tensors of a state that was read back, plain"):
        rank_checks.check_one_rank(variant, smoke=True)


def test_two_ranks_of_one_device():
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

        monkeypatch.setattr(rank_checks, "finetuned", finetuned)

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
        rank_checks.collectives("cpu")
        monkeypatch.setattr(rank_checks, "reduce_scatter", lambda part, whole: part.zero_())
        with pytest.raises(Differs, match="reduce_scatter over 1 ranks"):
            rank_checks.collectives("cpu")


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_every_variant_begins_with_its_model():
    kinds = (rank_bench.over_plain, rank_bench.saves, rank_checks.check_one_rank)
    for name, measure in VARIANTS.items():
        if getattr(measure, "func", None) in kinds[:2]:
            assert name.split(", ")[0] == measure.args[0].model and measure.args[0].tokens == 8320, name
    assert set(rank_bench.SMOKE) <= set(VARIANTS)


def test_records_are_told_in_both_tables(variant, monkeypatch):
    made = iter([block([0.5], gib=8.0), block([0.55])])
    monkeypatch.setattr(rank_bench, "block", lambda *_: next(made))
    over = {"name": "m, one rank", **rank_bench.over_plain(variant, 1, smoke=False)}
    told = [SimpleNamespace(held_seconds=0.25, seconds=4.0, bytes=8e9)]
    save = {"name": "m, saves", **rank_bench.costs([1.0, 1.5, 1.1], [0], [[1, 2]], told), "folder": "/tmp (ext4)"}
    check = {"name": "checks", "backend": "nccl", "largest_loss_apart": 1e-4, "largest_norm_apart": 2e-3}
    absent, failed = {"name": "a", "absent": "not possible: x"}, {"name": "f", "failed": "Differs: y"}
    records = json.loads(json.dumps([over, save, check, absent, failed]))
    text = "\n".join(rank_bench.table({"records": records}))
    assert "1.100x the plain step of 0.500 s (1.100 to 1.100)  9.0 GiB, plain 8.0" in text
    assert "8.00 GB in 4.0 s (2.00 GB/s) to /tmp (ext4); held 0.250 s" in text and "meanwhile 1.100x" in text
    assert "the same by nccl: losses 1.0e-04 apart" in text and "not possible: x" in text and "Differs: y" in text
    lines = gpu_table.format_steps({"ranks": {"records": records}})
    assert lines == [
        "| FSDP2 over the plain step, m, one rank: 1 pairs of blocks | 1.100x (1.100 to 1.100); 9.0 GiB, "
        "plain 8.0 GiB | |",
        "| m, saves: 8.0 GB to ext4 | 4.0 s, 2.00 GB/s; held 0.250 s, the first 0.250 s; steps meanwhile 1.100x; "
        "the run 1.0060x at --save-every 100 | |",
        "| checks (nccl): losses apart at most | 1.0e-04 | |",
        "| a | not possible: x | |", "| f | Differs: y | |",
    ]  # fmt: skip
    assert rank_bench.table({}) == []

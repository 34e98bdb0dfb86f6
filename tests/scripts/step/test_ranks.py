"""Measurements of ranks on one card, at toy size on a CPU: figures by arithmetic, and no figure for a wrong result."""

import contextlib
import json
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from engine.model.config import MODELS
from engine.output import checkpoint, saver
from scripts.pages import gpu_table
from scripts.step import bench, rank_checks, ranks
from scripts.step.rank_checks import Block, Differs
from scripts.step.ranks import VARIANTS
from scripts.step.rows import TOY
from tests.helpers.calls import Calls

GIB = {"peak_gib": 9.0, "peak_reserved_gib": 10.0}


@pytest.fixture
def variant():
    return bench.Variant("tinyllama-1.1b", steps=2, warmup=1)


def block(seconds, losses=(2.0, 1.0), norms=(1.0, 1.0), gib=9.0):
    n = len(seconds)
    return Block(list(seconds), list(losses), list(norms), [100] * n, [80] * n, [2] * n, dict(GIB, peak_gib=gib))


def test_one_rank_is_the_plain_step(variant):
    """The real model through FSDP2: the same curve, with gradients that it and not the plain path handled."""
    sharded, models, take = [], weakref.WeakSet(), bench.Steps.run

    def watched(self, step):
        take(self, step)
        sharded.append(hasattr(self.model.norm, "to_local"))
        models.add(self.model)
        assert len(models) == 1  # two models of 7B are too much for a card

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Steps, "run", watched)
        found = ranks.measure_fsdp(variant, 4, smoke=True)
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
    monkeypatch.setattr(ranks, "run_block", lambda v, smoke, how=None: began.append(bool(how)) or next(made))
    found = ranks.measure_fsdp(variant, 3, smoke=False)
    assert began == [False, True, True, False, False, True]
    assert found["over_plain"] == pytest.approx(1.1) and found["over_plain_max"] == pytest.approx(1.3)
    assert found["over_plain_min"] == 1 and found["plain_step_s_median"] == 2.0 and found["peak_gib"] == 9.0
    assert found["tokens_per_s"] == pytest.approx((100 / 1.2 + 100 / 2.6) / 2)  # the median of the steps' rates
    assert found["plain_peak_gib"] == 9.0 and found["first_loss_apart"] == 0
    made = iter([block([1.0]), block([2.0])])
    assert ranks.measure_fsdp(variant, 3, False, lambda: True)["pairs"] == 1  # the time is spent


def test_another_curve_is_no_figure(variant, monkeypatch):
    for wrong in ({"losses": (2.1, 1.0)}, {"norms": (1.1, 1.0)}, {"losses": (float("nan"), 1.0)}):
        made = iter([block([1.0]), block([1.0], **wrong)])
        monkeypatch.setattr(ranks, "run_block", lambda *_, made=made: next(made))
        with pytest.raises(Differs, match=r"of the first step: .* apart, wanted at most"):
            ranks.measure_fsdp(variant, 1, smoke=False)


def test_without_memory_neither_keeps_a_master(variant, monkeypatch):
    tried = []

    def small(v, smoke, how=None):
        tried.append((v.master, v.tokens, bool(how)))
        if v.master == "split" and how:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return block([1.0])

    monkeypatch.setattr(ranks, "run_block", small)
    found = ranks.measure_fsdp(variant, 1, smoke=False)
    assert [master for master, *_ in tried] == ["split", "split", "stochastic", "stochastic"]
    assert {tokens for _, tokens, _ in tried} == {8320} and found["master"] == "stochastic"
    assert "with master split: CUDA out of memory" in ranks.format_variant({"name": "x", **found})
    monkeypatch.setattr(ranks, "run_block", lambda v, *_: small(replace(v, master="split"), False, how=True))
    with pytest.raises(torch.OutOfMemoryError):
        ranks.measure_fsdp(variant, 1, smoke=False)
    assert not dist.is_initialized()


def test_what_a_save_costs():
    """Steps of 1 s; a save makes the step that it is asked for at 0.5 s longer, and each of three others 0.1 s."""
    seconds = [7.0, 1.0, 1.0, 3.5, 1.1, 1.1, 1.1, 7.0, 1.0, 1.0, 1.5, 1.1, 1.1, 1.1]
    told = [SimpleNamespace(held_seconds=h, seconds=4.0, bytes=8e9) for h in (2.0, 0.25)]
    found = ranks.summarize_saves(seconds, [1, 2, 8, 9], [[3, 4, 5, 6], [10, 11, 12, 13]], told)
    assert found["unsaved_step_s_median"] == 1 and found["meanwhile_over_unsaved"] == pytest.approx(1.1)
    assert found["copy_s"] == pytest.approx(0.5) and found["lost_s"] == pytest.approx(0.8)
    assert found["over_unsaved_at_100"] == pytest.approx(1.008)
    assert found["over_unsaved_an_epoch"] == pytest.approx(1 + 0.8 / 407)
    assert (found["held_s"], found["first_held_s"], found["first_lost_s"]) == (0.25, 2.0, pytest.approx(2.8))
    assert found["gb_per_s"] == 2 and found["steps_meanwhile"] == 3 and len(found["saves"]) == 2


def test_a_save_that_takes_longer_than_its_cadence_is_waited_for():
    told = [SimpleNamespace(held_seconds=0.0, seconds=150.0, bytes=1)]
    found = ranks.summarize_saves([1.0] * 151, [0], [list(range(1, 151))], told)
    assert found["over_unsaved_at_100"] == pytest.approx(1.5) and found["over_unsaved_an_epoch"] == 1


def test_a_save_that_is_written_within_its_own_step_has_no_steps_beside():
    told = [SimpleNamespace(held_seconds=h, seconds=0.5, bytes=1e9) for h in (2.0, 0.25)]
    found = ranks.summarize_saves([1.0, 3.0, 1.0, 1.25], [0, 2], [[1], [3]], told)
    assert [found[f"meanwhile_over_unsaved{end}"] for end in ("", "_min", "_max")] == [None] * 3
    assert found["step_s_median"] is None and found["steps_meanwhile"] == 0 and found["lost_s"] == 0.25


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
    found = ranks.measure_saves(variant, 2, 200, str(tmp_path), smoke=True)
    assert (
        states[0] == states[1] >= {"param", "m", "v"}
        and len(found["saves"]) == 2
        and found["folder"].startswith(f"{tmp_path} (")
    )
    assert all(save["steps_meanwhile"] >= 1 and save["write_s"] >= 0.0 for save in found["saves"])
    n = TOY.n_parameters
    assert 4 * n < found["bytes"] < 16 * n and found["unsaved_steps"] == 4
    assert not list(tmp_path.iterdir())
    assert len(ranks.measure_saves(variant, 2, 200, str(tmp_path), True, lambda: True)["saves"]) == 1


def test_a_save_that_never_ends_fails(variant, monkeypatch):
    monkeypatch.setattr(saver.Saver, "poll", lambda self: None)
    with pytest.raises(TimeoutError, match="save 1 is not written after 9 steps"):
        ranks.measure_saves(variant, 1, 9, None, smoke=True)


def test_where_there_is_no_room_nothing_is_measured(variant, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "available_memory_bytes", lambda: 10)
    found = ranks.measure_saves(variant, 1, 9, str(tmp_path), smoke=True)
    assert found["absent"].startswith("the host's memory has 0.0 GB free, wanted") and "write_s" not in found
    monkeypatch.setattr(ranks, "available_memory_bytes", lambda: 15e9)
    monkeypatch.setattr(ranks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=15e9))
    ranks.check_space(10e9, tmp_path)
    monkeypatch.setattr(ranks, "filesystem_of", lambda folder: "tmpfs")
    with pytest.raises(ranks.Absent, match=r"the host's memory has 15\.0 GB free, wanted 22\.0"):
        ranks.check_space(10e9, tmp_path)
    monkeypatch.setattr(ranks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e9))
    with pytest.raises(ranks.Absent, match=rf"{tmp_path} has 5\.0 GB free, wanted 11\.0"):
        ranks.check_space(10e9, tmp_path / "x")


def test_every_variant_begins_with_its_model():
    kinds = (ranks.measure_fsdp, ranks.measure_saves, rank_checks.check_one_rank)
    for name, measure in VARIANTS.items():
        if getattr(measure, "func", None) in kinds[:2]:
            assert name.split(", ")[0] == measure.args[0].model and measure.args[0].tokens == 8320, name
    assert set(ranks.SMOKE) <= set(VARIANTS)


def test_records_are_told_in_both_tables(variant, monkeypatch):
    made = iter([block([0.5], gib=8.0), block([0.55])])
    monkeypatch.setattr(ranks, "run_block", lambda *_: next(made))
    over = {"name": "m, one rank", **ranks.measure_fsdp(variant, 1, smoke=False)}
    told = [SimpleNamespace(held_seconds=0.25, seconds=4.0, bytes=8e9)]
    save = {"name": "m, saves", **ranks.summarize_saves([1.0, 1.5, 1.1], [0], [[1, 2]], told), "folder": "/tmp (ext4)"}
    check = {"name": "checks", "backend": "nccl", "largest_loss_apart": 1e-4, "largest_norm_apart": 2e-3}
    absent, failed = {"name": "a", "absent": "not possible: x"}, {"name": "f", "failed": "Differs: y"}
    records = json.loads(json.dumps([over, save, check, absent, failed]))
    text = "\n".join(ranks.format_part({"records": records}))
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
    assert ranks.format_part({}) == []


def test_pairs_alternate_and_the_speed_is_that_of_the_sharded_steps(variant, monkeypatch):
    hows = []

    @contextlib.contextmanager
    def one_rank():
        yield "shard"

    def run_block(variant, smoke, how):
        hows.append(how)
        seconds = [4.0 if how else 2.0]
        return Block(seconds, [1.0], [1.0], [100], [80], [3], {"peak_gib": 7.0 + len(hows)})

    monkeypatch.setattr(ranks, "one_rank", one_rank)
    monkeypatch.setattr(ranks, "run_block", run_block)
    found = ranks.measure_pairs(variant, 3, False, lambda: False)
    assert hows == [None, "shard", "shard", None, None, "shard"]
    assert found["over_plain"] == 2.0 and found["tokens_per_s"] == 25.0 and found["plain_step_s_median"] == 2.0
    assert found["peak_gib"] == 13.0 and found["plain_peak_gib"] == 12.0 and found["pairs"] == 3
    hows.clear()
    assert ranks.measure_pairs(variant, 3, False, lambda: True)["pairs"] == 1


def test_the_memory_and_the_file_system_are_those_that_linux_tells(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\nSwapFree: 1 kB\n",
             "/proc/self/mounts": "a / ext4 rw 0 0\nb /dev/shm tmpfs rw 0 0\nc /dev devtmpfs rw 0 0\n"}  # fmt: skip
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    assert ranks.available_memory_bytes() == 7 * 1024
    found = [ranks.filesystem_of(folder) for folder in ("/dev/shm/x", "/dev/x", "/home", "/dev/shmx")]
    assert found == ["tmpfs", "devtmpfs", "ext4", "devtmpfs"]


@pytest.mark.parametrize(
    ("disk", "memory", "kind", "fits"),
    [(111, 111, "ext4", True), (109, 999, "ext4", False), (999, 109, "ext4", False), (111, 219, "tmpfs", False),
     (111, 221, "tmpfs", True)],
)  # fmt: skip
def test_there_must_be_room_for_a_state_and_for_its_copy(disk, memory, kind, fits, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    monkeypatch.setattr(ranks, "available_memory_bytes", lambda: memory)
    monkeypatch.setattr(ranks, "filesystem_of", lambda _: kind)
    with contextlib.nullcontext() if fits else pytest.raises(ranks.Absent, match="GB free"):
        ranks.check_space(100, tmp_path)


def test_states_go_where_a_variants_name_says(monkeypatch, tmp_path):
    asked = []

    def folder(prefix, dir):
        asked.append(dir)
        raise InterruptedError

    monkeypatch.setattr(ranks.tempfile, "TemporaryDirectory", folder)
    for name, of in ranks.VARIANTS.items():
        if "saves" in name:
            with pytest.raises(InterruptedError):
                of(smoke=True)
            assert (asked[-1] == ranks.IN_MEMORY) == name.endswith("to memory")


def test_the_checks_are_measured_apart_and_all_variants_with_the_part(monkeypatch):
    asked = []
    monkeypatch.setattr(ranks, "measure_in_processes", lambda report, part, module, names: asked.append(list(names)))
    for smoke in (False, True):
        ranks.measure_checks(SimpleNamespace(smoke=smoke))
        ranks.measure_part(SimpleNamespace(smoke=smoke))
    checks = [name for name in ranks.VARIANTS if name.startswith("checks")]
    assert asked == [checks, list(ranks.VARIANTS), ["checks, one rank"], list(ranks.SMOKE)]


SAVE = {
    "bytes": 8.5e9, "write_s": 4.25, "gb_per_s": 2.0, "folder": "/tmp (ext4)", "held_s": 0.25, "first_held_s": 1.5,
    "meanwhile_over_unsaved": 1.125, "over_unsaved_at_100": 1.0625, "over_unsaved_an_epoch": 1.0156, "saves": [],
}  # fmt: skip
FSDP = {"over_plain": 1.0625, "over_plain_min": 1.0, "over_plain_max": 1.25, "plain_step_s_median": 2.5,
        "peak_gib": 9.5, "plain_peak_gib": 8.25}  # fmt: skip
APART = {"largest_loss_apart": 1.5e-4, "largest_norm_apart": 2.5e-3, "backend": "nccl"}
LINES = [
    (SAVE, "8.50 GB in 4.2 s (2.00 GB/s) to /tmp (ext4); held 0.250 s, the first 1.500; steps meanwhile 1.125x; "
           "1.0625x at --save-every 100, 1.0156x with one an epoch"),
    (SAVE | {"meanwhile_over_unsaved": None},
     "8.50 GB in 4.2 s (2.00 GB/s) to /tmp (ext4); held 0.250 s, the first 1.500; steps meanwhile none; "
     "1.0625x at --save-every 100, 1.0156x with one an epoch"),
    (FSDP, "1.062x the plain step of 2.500 s (1.000 to 1.250)  9.5 GiB, plain 8.2"),
    (FSDP | {"peak_gib": None, "master": "stochastic", "out_of_memory": "with master split: x"},
     "1.062x the plain step of 2.500 s (1.000 to 1.250)  master stochastic; out of memory with master split: x"),
    (APART, "the same by nccl: losses 1.5e-04 apart, norms 2.5e-03"),
    (APART | {"read_back": "bit-equal"}, "the same by nccl: losses 1.5e-04 apart, norms 2.5e-03; read back bit-equal"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "line"), LINES)
def test_the_line_of_a_record(record, line):
    record = {"name": "a name", **record}
    assert ranks.format_part({"records": [record]}) == ["ranks, on one card:", f"  a name{' ' * 30}{line}"]


def test_settings_of_variants(snapshot):
    told = {
        name: f"{of.func.__name__}{(*of.args, *of.keywords)}" if isinstance(of, partial) else of.__name__
        for name, of in ranks.VARIANTS.items()
    }
    text = "\n".join(f"{name}: {what}" for name, what in told.items())
    assert text.replace(f"impl='{bench.IMPL}'", "impl=here") == snapshot


def test_a_summary_of_saves_is_told_whole():
    """A save that is not ready before the next one is due holds it up; the first of several is left out."""
    seconds = [1.0, 1.0, 1.0, 2.0, 1.25, 1.5, 1.0, 1.75, 1.125]
    told = [SimpleNamespace(held_seconds=2.0, seconds=8.0, bytes=4e9),
            SimpleNamespace(held_seconds=0.5, seconds=150.0, bytes=6e9)]  # fmt: skip
    found = ranks.summarize_saves(seconds, [0, 1, 2, 6], [[3, 4, 5], [7, 8]], told)
    first = {"held_s": 2.0, "copy_s": 1.0, "write_s": 8.0, "gb_per_s": 0.5, "steps_meanwhile": 2,
             "step_s_median": 1.375, "meanwhile_over_unsaved": 1.375, "lost_s": 1.75}  # fmt: skip
    second = {"held_s": 0.5, "copy_s": 0.75, "write_s": 150.0, "gb_per_s": 0.04, "steps_meanwhile": 1,
              "step_s_median": 1.125, "meanwhile_over_unsaved": 1.125, "lost_s": 0.875}  # fmt: skip
    assert found == {
        "bytes": 4e9, "unsaved_step_s_median": 1.0, "unsaved_steps": 4, **second,
        "meanwhile_over_unsaved_min": 1.125, "meanwhile_over_unsaved_max": 1.125,
        "over_unsaved_at_100": 1 + (0.875 + 50) / 100, "over_unsaved_an_epoch": 1 + 0.875 / 407,
        "first_held_s": 2.0, "first_lost_s": 1.75, "saves": [first, second],
    }  # fmt: skip


def test_saves_follow_steps_without_one_and_are_removed(variant, tmp_path):
    """Each has its own warm-up; steps go on until it is written."""
    calls, reports = Calls(), iter([None, None, "saved", "saved"])
    steps = calls.thing("steps", run=None, read_figures=None, seconds=[1.0] * 20)
    steps.n_steps = 20
    steps.optimizer = SimpleNamespace(tensors=lambda: "tensors", n_updates=7)

    def poll():
        told = next(reports)
        (tmp_path / "saved").mkdir(exist_ok=True)
        return told and SimpleNamespace(folder=tmp_path / "saved", held_seconds=1.0, seconds=2.0, bytes=3e9)

    saver = calls.thing("saver", save=None, poll=poll)
    found = ranks.run_saves(steps, saver, variant, 2, lambda: False)
    taken = [f"steps.run({i})" for i in range(1, 11)]
    save = "saver.save({}, 'tensors', {{'n_updates': 7}})"
    assert calls.lines == [
        *taken[:4], save.format(4), "saver.poll()", taken[4], "saver.poll()", taken[5], "saver.poll()",
        *taken[6:], save.format(10), "saver.poll()", "steps.read_figures()", "steps.seconds()",
    ]  # fmt: skip
    assert found["unsaved_steps"] == 4 and [save["steps_meanwhile"] for save in found["saves"]] == [2, 0]
    assert not (tmp_path / "saved").exists()


def test_pairs_of_blocks_are_told_whole(variant, monkeypatch):
    """Speed is of the sharded blocks, memory the largest of each kind."""
    made = iter([
        Block([2.0, 4.0], [1.0, 1.0], [2.0, 2.0], [100, 200], [80, 90], [2, 3], dict(GIB)),
        Block([3.0, 6.0], [1.0, 1.5], [2.0, 1.0], [110, 220], [88, 99], [5, 5], dict(GIB, peak_gib=7.0)),
        Block([4.0, 8.0], [1.0] * 2, [2.0] * 2, [120, 240], [90, 95], [5, 5], GIB | {"peak_gib": 6.0}),
        Block([1.0, 7.0], [1.0, 1.0], [2.0, 2.0], [100, 200], [80, 90], [9, 9], dict(GIB, peak_gib=11.0)),
    ])  # fmt: skip
    monkeypatch.setattr(ranks, "run_block", lambda *_: next(made))
    monkeypatch.setattr(ranks, "card_here", lambda: None)
    found = ranks.measure_fsdp(variant, 2, smoke=False)
    here = rank_checks.variant_here(variant, False)
    speed = ranks.summarize_speed(
        MODELS["tinyllama-1.1b"].n_parameters, [110, 220, 120, 240], [88, 99, 90, 95], [3.0, 6.0, 4.0, 8.0], None
    )
    assert found == {
        **here.describe(False), "backend": ranks.BACKEND, "pairs": 2, "over_plain": 1.5, "over_plain_min": 1.5,
        "over_plain_max": 1.5, "plain_step_s_median": 3.0, **speed, "micro_batches_a_step": 2.5,
        "peak_gib": 7.0, "peak_reserved_gib": 10.0, "plain_peak_gib": 11.0, "plain_peak_reserved_gib": 10.0,
        "first_loss_apart": 0.0, "first_norm_apart": 0.0, "largest_loss_apart": 0.5, "largest_norm_apart": 0.5,
    }  # fmt: skip

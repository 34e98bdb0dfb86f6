"""Training state: whole whatever kills the process, verified, rotated."""

import copy
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.base.errors import DataError
from engine.formats import tensor_files
from engine.formats.find import list_checkpoints
from engine.model.shard import Shard, as_shards
from engine.output import checkpoint
from engine.output import tensor_rows as shards
from engine.output.checkpoint import Saver
from engine.output.tensor_rows import HostCopy
from tests.helpers.run import ROOT, environment

FACTS = {"settings": {"lr": 1.0}}
POINTS = [
    (os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (os, "open"), (json, "dump"),
    (tensor_files, "load_bytes"),
]  # fmt: skip


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {"m.a": torch.randn(50, 7, generator=g), "v.a": torch.randn(50, 7, generator=g), "master.b": torch.ones(3)}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def loaded(folder):
    empty = {name: torch.full_like(t, float("nan")) for name, t in tensors(0).items()}
    load_folder(folder, empty)
    return empty


def load_folder(folder, wanted):
    checkpoint.load(checkpoint.open_checkpoint(folder), wanted)


def newest(out):
    return checkpoint.find_newest(out, lambda text: None)


def die_before(point, *more):
    """SIGKILLs this process just before its point-th write or rename, or call of what is in more. Returns more so."""
    count = 0

    def count_down(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for module, name in POINTS:
        setattr(module, name, count_down(getattr(module, name)))
    return [count_down(real) for real in more]


def killed_at(point, out, step, keep, seed=None):
    """Saves in a child that dies at that point. True if it did."""
    child = os.fork()
    if child == 0:
        die_before(point)
        checkpoint.save(out, step, tensors(seed or step), FACTS, keep)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_what_is_saved_is_loaded(tmp_path):
    folder = checkpoint.save(tmp_path, 7, tensors(7), FACTS, keep=2)
    found = newest(tmp_path)
    assert found.folder == folder == tmp_path / "checkpoint-7"
    assert found.step == 7 and found.manifest["settings"] == {"lr": 1.0}
    assert pickle.loads(pickle.dumps(found)) == found
    assert equal(loaded(folder), tensors(7))
    assert not any(b"pickle" in p.read_bytes() or p.suffix not in (".json", ".safetensors") for p in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_at_every_write_point_leaves_a_whole_state(tmp_path, keep):
    """Also while older states rotate out: one whole state is always there, and the next save removes what is left."""
    point, seen = 0, set()
    while True:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        for step in (1, 2):
            checkpoint.save(out, step, tensors(step), FACTS, keep)
        killed = killed_at(point, out, 3, keep)
        found = newest(out)
        seen.add(found.step)
        assert equal(loaded(found.folder), tensors(found.step))
        for _, each in list_checkpoints(out):
            checkpoint.open_checkpoint(each)  # none is half there, old or new
        if not killed:
            break
        checkpoint.save(out, 4, tensors(4), FACTS, keep)
        assert newest(out).step == 4
        assert not list(out.glob(".tmp-*")) and len(list_checkpoints(out)) <= keep
    assert point > 8 and seen == {2, 3}, "kills must fall before and after the moment the new state counts"


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, tensors(step), FACTS, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]


def test_a_state_just_saved_is_never_the_one_that_rotates_out(tmp_path):
    for step in (6, 8):
        checkpoint.save(tmp_path, step, tensors(step), FACTS, keep=2)
    assert checkpoint.save(tmp_path, 5, tensors(5), FACTS, keep=2).is_dir()
    checkpoint.remove_later(tmp_path, 5)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


BREAK = {
    "bit flipped": (lambda f: flip(f / "state.safetensors"), "changed since it was written"),
    "truncated": (lambda f: os.truncate(f / "state.safetensors", 100), "100 bytes, its manifest says"),
    "file missing": (lambda f: (f / "state.safetensors").unlink(), "missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "its save never finished"),
    "manifest torn": (lambda f: os.truncate(f / "manifest.json", 30), "not a manifest of ours"),
    "manifest strange": (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest of ours"),
    "manifest deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "not a manifest of ours"),
    "manifest points elsewhere": (
        lambda f: (f / "manifest.json").write_text(
            json.dumps({"format": 1, "step": 2, "files": {"../x": {"bytes": 1, "sha256": ""}}})
        ),
        "not a manifest of ours",
    ),
    "format of the future": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"format": 1', '"format": 9')
        ),
        "format 9, this version reads 1 and 2",
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_state_is_named_and_passed_over(tmp_path, how):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), FACTS, keep=2)
    damage, message = BREAK[how]
    damage(tmp_path / "checkpoint-2")
    told = []
    assert checkpoint.find_newest(tmp_path, told.append).step == 1
    assert len(told) == 1 and "checkpoint-2" in told[0] and message in told[0]
    with pytest.raises(DataError, match="checkpoint-2"):
        checkpoint.open_checkpoint(tmp_path / "checkpoint-2")
    checkpoint.save(tmp_path, 2, tensors(2), FACTS, keep=2)  # the run comes by again
    assert newest(tmp_path).step == 2


def test_when_none_is_whole_that_is_said(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1), FACTS, keep=1)
    flip(tmp_path / "checkpoint-1" / "state.safetensors")
    with pytest.raises(DataError, match=r"no checkpoint is whole; --resume never starts over"):
        newest(tmp_path)


def test_no_state_is_no_fault(tmp_path):
    assert newest(tmp_path) is None


def test_another_models_state_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 1, tensors(1), FACTS, keep=1)
    with pytest.raises(DataError, match=r"2 tensors do not fit this model, first c \(None, wanted \(2,\)\), m.a"):
        load_folder(folder, {**tensors(1), "m.a": torch.zeros(50, 8), "c": torch.zeros(2)})


def test_a_full_disk_leaves_the_older_states_and_no_temporary(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(1), FACTS, keep=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, tensors(2), FACTS, keep=1)
    monkeypatch.undo()
    assert newest(tmp_path).step == 1 and not list(tmp_path.glob(".tmp-*"))
    shutil.rmtree(tmp_path)


def test_a_state_of_the_first_format_is_read_for_ever(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    save_file(tensors(4), folder / "state.safetensors")
    entry = {
        "bytes": (folder / "state.safetensors").stat().st_size,
        "sha256": checkpoint.sha256_of(folder / "state.safetensors"),
    }
    manifest = {"format": 1, "step": 4, **FACTS, "files": {"state.safetensors": entry}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert newest(tmp_path) == checkpoint.Checkpoint(folder, manifest)
    assert equal(loaded(folder), tensors(4))
    ours = checkpoint.save(tmp_path, 5, tensors(4), FACTS, keep=2)  # and of one writer, written for ever
    written = json.loads((ours / "manifest.json").read_text())
    assert list(written) == list(manifest) and written["format"] == 1 and list(written["files"]) == [checkpoint.STATE]


def test_a_state_replaced_by_one_of_its_own_step_is_never_lost(tmp_path):
    """Though it is the only one, and the kill comes between its two renames."""
    point, seen = 0, set()
    killed = True
    while killed:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        checkpoint.save(out, 3, tensors(1), FACTS, keep=1)
        killed = killed_at(point, out, 3, keep=1, seed=2)
        between = not (out / "checkpoint-3").exists()
        folder = newest(out).folder
        if between:  # clean() finds it too
            os.rename(folder, out / ".tmp-was-checkpoint-3")
            checkpoint.remove_temporaries(out)
            seen.add("between")
        seen.add(next(seed for seed in (1, 2) if equal(loaded(folder), tensors(seed))))
        checkpoint.save(out, 3, tensors(3), FACTS, keep=1)
        assert equal(loaded(folder), tensors(3)) and not list(out.glob(".tmp-*"))
    assert point > 12 and seen == {1, 2, "between"}


def test_a_save_leaves_alone_what_others_are_writing_beside_it(tmp_path):
    """A thread that saves must not remove the temporaries of run.json and of the model."""
    for name in (".tmp-run.json", ".tmp-model.safetensors"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".tmp-2").mkdir()
    (tmp_path / ".tmp-old-checkpoint-1").mkdir()
    checkpoint.save(tmp_path, 3, tensors(3), FACTS, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-model.safetensors", ".tmp-run.json", "checkpoint-3"]
    checkpoint.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


# ---- beside the training --------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is set."""
    gate, real = threading.Event(), checkpoint.write_safetensors

    def write(*args, **kwargs):
        assert gate.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_safetensors", write)
    yield gate
    gate.set()


def disk_full_once(monkeypatch, file="state.safetensors"):
    real, calls = checkpoint.write_safetensors, []

    def write(path, *args, **kwargs):
        if path.name == file and not calls:
            calls.append(path)
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_safetensors", write)


def test_training_goes_on_while_a_state_is_written(tmp_path, gate):
    saver, live = Saver(tmp_path, keep=2), tensors(1)
    saver.save(1, live, FACTS)
    assert saver.poll() is None and newest(tmp_path) is None
    for t in live.values():
        t.fill_(-1)
    gate.set()
    done = saver.wait()
    assert (done.step, done.folder) == (1, tmp_path / "checkpoint-1") and equal(loaded(done.folder), tensors(1))
    assert done.bytes == (done.folder / checkpoint.STATE).stat().st_size
    assert done.seconds > 0 and done.held_seconds > 0
    assert saver.wait() is None and saver.poll() is None


def test_what_is_not_copied_is_what_it_is_when_written(tmp_path, gate):
    saver, live = Saver(tmp_path, keep=2), tensors(1)
    saver.save(1, live, FACTS, copy=False)
    live["m.a"].copy_(tensors(2)["m.a"])
    gate.set()
    assert loaded(saver.wait().folder)["m.a"].equal(tensors(2)["m.a"]) and not saver.host_copy.views


def test_a_save_waits_for_the_one_before(tmp_path, gate):
    saver, live, entered = Saver(tmp_path, keep=5), tensors(1), threading.Event()
    saver.save(1, live, FACTS)

    def second():
        for name, t in tensors(2).items():
            live[name].copy_(t)
        entered.set()
        saver.save(2, live, FACTS)

    thread = threading.Thread(target=second)
    thread.start()
    entered.wait()
    thread.join(0.2)
    assert thread.is_alive() and len(saver.untold) == 1
    gate.set()
    thread.join()
    assert equal(loaded(saver.wait().folder), tensors(1))
    second = saver.wait()
    assert second.held_seconds > 0.05 and equal(loaded(second.folder), tensors(2))


def test_every_outcome_is_told_once_in_order(tmp_path, monkeypatch):
    disk_full_once(monkeypatch)
    saver = Saver(tmp_path, keep=9)
    for step in (1, 2, 2, 3):  # one after another, the first fails, one step twice
        saver.save(step, tensors(step), FACTS)
    with pytest.raises(OSError, match="No space left on device") as failed:
        saver.wait()
    assert failed.value.strerror == "No space left on device"
    assert [saver.wait().step for _ in range(3)] == [2, 2, 3] and saver.wait() is None
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3] and not list(tmp_path.glob(".tmp-*"))


def test_poll_tells_a_failure_and_close_hides_none(tmp_path, monkeypatch):
    disk_full_once(monkeypatch)
    saver = Saver(tmp_path, keep=9)
    saver.save(1, tensors(1), FACTS)
    saver.close()
    with pytest.raises(OSError, match="No space"):
        saver.poll()
    assert saver.poll() is None


def test_a_mistake_of_ours_is_told_as_it_is(tmp_path):
    saver = Saver(tmp_path, keep=1)
    saver.save(1, {"a": torch.zeros(2, dtype=torch.complex64)}, FACTS)
    with pytest.raises(KeyError, match="complex64"):
        saver.wait()
    saver.save(2, {"a": torch.zeros(2)}, {"settings": object()})
    with pytest.raises(TypeError, match="object"):
        saver.wait()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="2 writers, wanted an exchange"):
        Saver(tmp_path, 1, writer=0, n_writers=2)


def test_the_copys_memory_is_used_again(tmp_path):
    room = HostCopy(pinned=False)
    first = {name: s.tensor.data_ptr() for name, s in room.copy_shards(as_shards(tensors(1))).items()}
    again = room.copy_shards(as_shards(tensors(2)))
    assert {name: s.tensor.data_ptr() for name, s in again.items()} == first
    assert equal({name: s.tensor for name, s in again.items()}, tensors(2))
    other = {"m.a": torch.ones(9)}
    assert room.copy_shards(as_shards(other))["m.a"].tensor.equal(other["m.a"]) and list(room.views) == ["m.a"]


def test_pinned_memory_is_taken_in_powers_of_two(monkeypatch):
    real, sizes = torch.empty, []

    def empty(size, pin_memory=False, **kwargs):
        sizes.append(size) if pin_memory else None
        return real(size, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(shards, "COPY_ARENA_BYTES", 1024)
    wanted = {str(i): torch.randn(n) for i, n in enumerate((100, 3, 0, 1, 60, 700, 2))}
    more = {"t": torch.randn(6, 4).t()}
    kept = HostCopy(pinned=True).copy_shards(as_shards(wanted | more))
    for name, t in wanted.items():
        assert kept[name].tensor.equal(t) and kept[name].tensor.data_ptr() % 4 == 0
    assert kept["t"].tensor.equal(more["t"]) and sizes == [1024, 4096]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_queued_after_a_save_change_nothing_of_it(tmp_path):
    live = {"a": torch.zeros(64 << 20, device="cuda"), "host": torch.ones(3)}
    saver = Saver(tmp_path, keep=9, device="cuda")
    for step in (1, 2):
        for _ in range(50):
            live["a"] += 1
        saver.save(step, live, FACTS)
        live["a"] *= 1  # queued behind the copy
        live["a"] += 50
        found = {"a": torch.zeros(64 << 20), "host": torch.zeros(3)}
        load_folder(saver.wait().folder, found)
        assert found["a"].eq(50 + 100 * (step - 1)).all() and found["host"].eq(1).all()
        assert all(t.is_pinned() for t in saver.host_copy.views.values())


CHILD = """
import os, signal, sys, time, torch
from pathlib import Path
from engine.output.checkpoint import Saver
from engine.base.signals import Signals
out, how = Path(sys.argv[1]), sys.argv[2]
t = torch.arange(8_000_000.0)
if how == "exit":
    Saver(out, 1).save(1, {"a": t}, {})
else:
    signals = Signals()
    signals.training = True
    saver = Saver(out, 1, 0, 2, lambda told: (print("there", flush=True), time.sleep(100)))
    saver.save(2, {"a": t}, {})
    saver.wait()
"""


def test_a_process_that_ends_finishes_its_save_and_a_second_signal_does_not_wait_for_it(tmp_path):
    def child(how, **kwargs):
        command = [sys.executable, "-c", CHILD, tmp_path / how, how]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, **kwargs)

    for how in ("exit", "hang"):
        (tmp_path / how).mkdir()
    checkpoint.save(tmp_path / "hang", 1, tensors(1), FACTS, keep=1)
    ends, hangs = child("exit"), child("hang", stderr=subprocess.PIPE)
    assert ends.wait(60) == 0
    found = {"a": torch.zeros(8_000_000)}
    load_folder(newest(tmp_path / "exit").folder, found)
    assert found["a"].equal(torch.arange(8_000_000.0))

    assert hangs.stdout.readline() == b"there\n"
    hangs.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert hangs.poll() is None
    hangs.send_signal(signal.SIGTERM)
    assert hangs.wait(30) == 1 and b"leaving at once" in hangs.stderr.read()
    assert equal(loaded(newest(tmp_path / "hang").folder), tensors(1))


# ---- several writers ------------------------------------------------------------------------------------------------


class Meeting:
    """What n threads tell each other, as bytes."""

    def __init__(self, n):
        self.told, self.barrier = [None] * n, threading.Barrier(n)

    def exchange(self, writer):
        def exchange(value):
            self.told[writer] = pickle.dumps(value)
            self.barrier.wait(20)
            told = [pickle.loads(t) for t in self.told]
            self.barrier.wait(20)
            return told

        return exchange


def savers_of(out, n, keep=2):
    meeting = Meeting(n)
    return [Saver(out, keep, i, n, meeting.exchange(i)) for i in range(n)]


def cut(whole, n, at=None):
    """The shards of n writers: rows as FSDP cuts them, or cut at the given rows of each tensor."""
    parts = [{} for _ in range(n)]
    for name, t in whole.items():
        rows = len(t) if t.ndim else 1
        each = -(-rows // n)
        ends = [0, *(min(rows, e) for e in (at(name, rows) if at else [each * i for i in range(1, n)])), rows]
        for i, part in enumerate(parts):
            if t.ndim:
                part[name] = Shard(t[ends[i] : ends[i + 1]], ends[i], rows)
            elif i == n - 1:
                part[name] = Shard(t)
    return parts


def save_together(out, step, parts, keep=2, savers=None, facts=FACTS):
    """[Saved, or what was raised] of every writer."""
    savers = savers or savers_of(out, len(parts), keep)
    for i, (saver, part) in enumerate(zip(savers, parts, strict=True)):
        saver.save(step, part, facts | {"rank": i})
    outcomes = []
    for saver in savers:
        try:
            outcomes.append(saver.wait())
        except Exception as error:
            outcomes.append(error)
    return outcomes


def blank(whole):
    """Memory of the same shapes with other bytes."""
    return {
        name: (t.clone().contiguous().view(-1).view(torch.uint8) ^ 0x55).view(t.dtype).view(t.shape)
        for name, t in whole.items()
    }


def same_bytes(a, b):
    return a.keys() == b.keys() and all(
        a[k].reshape(-1).view(torch.uint8).equal(b[k].reshape(-1).view(torch.uint8)) for k in a
    )


def read_by(folder, whole, n, at=None):
    """What n readers find, put together."""
    found = blank(whole)
    for part in cut(found, n, at):
        load_folder(folder, {name: Shard(t[:0], 0, len(t)) if t.ndim else Shard(t) for name, t in found.items()} | part)
    return found


def random_bytes(shape, dtype, seed):
    n = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape)


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
STATES = st.lists(
    st.tuples(SHAPES, st.sampled_from([torch.bfloat16, torch.float32, torch.int16, torch.uint8])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(STATES, st.sampled_from([1, 2, 3, 4, 7]), st.sampled_from([1, 2, 3, 4, 7]), st.data())
def test_any_number_of_readers_finds_what_any_number_wrote(tmp_path_factory, kinds, n_writers, n_readers, draw):
    out = tmp_path_factory.mktemp("out")
    whole = {f"t{i}": random_bytes(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)}

    def anywhere(n):
        if draw.draw(st.booleans()):
            return None
        return lambda name, rows: sorted(draw.draw(st.lists(st.integers(0, rows), min_size=n - 1, max_size=n - 1)))

    parts = cut(whole, n_writers, anywhere(n_writers))
    done = save_together(out, 1, parts)
    found = newest(out)
    folder, manifest = found.folder, found.manifest
    assert manifest["format"] == (1 if n_writers == 1 else 2) and manifest["rank"] == 0
    assert {d.bytes for d in done} == {sum(p.stat().st_size for p in folder.glob("*.safetensors"))}
    assert same_bytes(read_by(folder, whole, n_readers, anywhere(n_readers)), whole)
    shutil.rmtree(out)


def test_a_writer_that_holds_nothing_writes_no_file(tmp_path):
    whole = {"a": torch.arange(3.0)}
    done = save_together(tmp_path, 1, [*cut(whole, 4), {}, {}])  # of 4 shards the last is empty; two replicas
    files = [f"state-0000{i}-of-00006.safetensors" for i in range(3)]
    assert sorted(p.name for p in done[5].folder.iterdir()) == ["manifest.json", *files]
    manifest = checkpoint.open_checkpoint(done[0].folder).manifest
    assert manifest["tensors"] == {"a": {"dtype": "F32", "shape": [3]}}
    assert [manifest["files"][file]["rows"] for file in files] == [{"a": [i, i + 1]} for i in range(3)]
    assert len({(d.step, d.folder, d.bytes) for d in done}) == 1


def test_a_reader_opens_only_the_files_that_hold_its_rows(tmp_path):
    folder = save_together(tmp_path, 1, cut({"a": torch.arange(10.0)}, 5))[0].folder
    state = checkpoint.open_checkpoint(folder)
    for i in (0, 3, 4):
        (folder / f"state-0000{i}-of-00005.safetensors").unlink()
    found = torch.zeros(3)
    checkpoint.load(state, {"a": Shard(found, 2, 10)})
    assert found.tolist() == [2, 3, 4]
    with pytest.raises(DataError, match="state-00000-of-00005"):
        checkpoint.load(state, {"a": Shard(found, 1, 10)})


@pytest.mark.parametrize("n", [1, 2])
def test_readers_name_what_does_not_fit(tmp_path, n):
    folder = save_together(tmp_path, 1, cut({"a": torch.zeros(4, 2), "b": torch.zeros(4, dtype=torch.int16)}, n))[
        0
    ].folder
    for wanted, message in (
        ({"a": Shard(torch.zeros(2, 2), 0, 5)}, r"2 .*: *a \(\(4, 2\), wanted \(5, 2\)\), b \(\(4,\), wanted None\)"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(4)}, r"1 .*b \(torch.int16, wanted torch.float32\)"),
        ({}, "2 tensors"),
    ):
        with pytest.raises(DataError, match=message.replace(": *", "")):
            load_folder(folder, wanted)
    narrow = {"a": torch.ones(4, 2, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.int16)}
    load_folder(folder, narrow)  # under --allow-changed
    assert not any(t.any() for t in narrow.values())


@pytest.mark.parametrize("n", [1, 2])
def test_a_part_of_a_state_is_read_without_the_rest(tmp_path, n):
    whole = {"param.a": torch.arange(6.0), "param.b": torch.tensor(1.0), "m.a": torch.ones(6), "count": torch.ones(1)}
    parts = cut(whole, n)
    last = {name: parts[-1].pop(name) for name in ("m.a", "count") if name in parts[-1]} if n > 1 else {}
    folder = save_together(tmp_path, 1, [*parts, last])[0].folder
    state = checkpoint.open_checkpoint(folder)
    if n > 1:  # who holds nothing of it
        (folder / "state-00002-of-00003.safetensors").unlink()
    wanted = {name: t for name, t in whole.items() if name.startswith("param.")}
    found = blank(wanted)
    checkpoint.load(state, found, "param.")
    assert same_bytes(found, wanted)
    for other, message in (
        ({"param.a": found["param.a"]}, r"1 .*param.b \(\(\), wanted None\)"),
        (found | {"param.c": torch.zeros(2)}, r"1 .*param.c \(None, wanted \(2,\)\)"),
        (found | {"m.a": torch.zeros(6)}, r"1 .*m.a \(None"),
    ):
        with pytest.raises(DataError, match=message):
            checkpoint.load(state, other, "param.")


def test_one_writers_full_disk_fails_the_save_of_all(tmp_path, monkeypatch):
    savers = savers_of(tmp_path, 3)
    save_together(tmp_path, 1, cut(tensors(1), 3), savers=savers)
    disk_full_once(monkeypatch, "state-00001-of-00003.safetensors")
    for error in save_together(tmp_path, 2, cut(tensors(2), 3), savers=savers):
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        assert error.strerror == "writer 1: No space left on device"
    assert newest(tmp_path).step == 1 and not list(tmp_path.glob(".tmp-*"))
    done = save_together(tmp_path, 2, cut(tensors(2), 3), savers=savers)  # the same step again
    assert same_bytes(read_by(done[0].folder, tensors(2), 2), tensors(2))


def no_memory(monkeypatch, savers):
    def carve(layout):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(savers[1].host_copy, "_allocate", carve)


def no_folder(monkeypatch, savers):
    """As on a second machine that does not see the first one's disk."""
    real = type(savers[0].out).is_dir
    seen = lambda path: real(path) and not (path.name == ".tmp-2" and "saver" in threading.current_thread().name)  # noqa: E731
    monkeypatch.setattr(type(savers[0].out), "is_dir", seen)


def no_rename(monkeypatch, savers):
    real = os.rename

    def rename(old, new):
        if str(old).endswith(".tmp-2"):
            raise OSError(errno.EIO, "Input/output error")
        return real(old, new)

    monkeypatch.setattr(os, "rename", rename)


def no_manifest(monkeypatch, savers):
    def dump(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", dump)


def a_bug(monkeypatch, savers):
    def write(*args, **kwargs):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(checkpoint, "write_safetensors", write)


FAULTS = [
    (no_memory, OSError, "writer 1: no memory for a copy of the state: DefaultCPUAllocator"),
    (no_folder, OSError, "writer 0: .*.tmp-2 is not there; all writers must see the same folder"),
    (no_rename, OSError, "writer 0: Input/output error"),
    (no_manifest, OSError, "writer 0: No space left on device"),
    (a_bug, RuntimeError, "writer 0: ZeroDivisionError: by zero"),
]


@pytest.mark.parametrize(("fault", "kind", "message"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_whatever_fails_on_one_fails_on_all(tmp_path, monkeypatch, fault, kind, message):
    savers = savers_of(tmp_path, 2)
    save_together(tmp_path, 1, cut(tensors(1), 2), savers=savers)
    save_together(tmp_path, 2, cut(tensors(1), 2), savers=savers)  # one of the same step is put back
    for saver in savers:
        saver.host_copy.layout = None
    with monkeypatch.context() as patch:
        fault(patch, savers)
        for error in save_together(tmp_path, 2, cut(tensors(2), 2), savers=savers):
            with pytest.raises(kind, match=message):
                raise error
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    found = newest(tmp_path)
    assert found.step == 2 and same_bytes(read_by(found.folder, tensors(1), 3), tensors(1))
    assert not list(tmp_path.glob(".tmp-*"))
    assert save_together(tmp_path, 3, cut(tensors(3), 2), savers=savers)[1].folder.is_dir()


def test_rows_that_do_not_add_up_are_refused_on_all(tmp_path):
    t = torch.zeros(4)
    for parts, message in (
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[1:], 1, 4)}], r"a: rows \[1, 2\) are held twice"),
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[3:], 3, 4)}], r"a: rows \[2, 3\) are held by no file"),
        ([{"a": Shard(t[:3], 0, 4)}, {}], r"a: rows \[3, 4\) are held by no file"),
        ([{"a": Shard(t)}, {"a": Shard(t)}], r"a: rows \[0, 4\) are held twice"),
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[2:].half(), 2, 4)}], "a: .*F16.*another one of .*F32"),
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[2:], 2, 5)}], "a: .*5.*another one of .*4"),
    ):
        for error in save_together(tmp_path, 1, parts):
            with pytest.raises(ValueError, match=message):
                raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"rows \[3, 7\) of a tensor of shape \(4,\)"):
        Shard(t, 3, 4)
    with pytest.raises(ValueError, match="held by no file"):
        checkpoint.save(tmp_path, 1, {"a": Shard(t[:2], 0, 4)}, FACTS, keep=1)


def test_writers_of_different_steps_notice(tmp_path):
    savers = savers_of(tmp_path, 2)
    for saver, step in zip(savers, (5, 6), strict=True):
        saver.save(step, {}, FACTS)
    for saver in savers:
        with pytest.raises(RuntimeError, match=r"the others at \[\(5, 'begin'\), \(6, 'begin'\)\]"):
            saver.wait()
    assert not list(tmp_path.iterdir())


def in_processes(out, step, parts, victim, point):
    """Saves with a process for each writer, of whom one dies at that point. Their exit codes: 0 saved, 3 it raised."""
    pipes, children = [multiprocessing.Pipe() for _ in parts], []
    for i, part in enumerate(parts):
        if (child := os.fork()) == 0:
            for j, (theirs, mine) in enumerate(pipes):
                theirs.close()
                mine.close() if j != i else None

            def exchange(value, pipe=pipes[i][1]):
                pipe.send(value)
                return pipe.recv()  # EOFError when the others are gone

            if i == victim:
                (exchange,) = die_before(point, exchange)
            saver = Saver(out, 1, i, len(parts), exchange)
            saver.save(step, part, FACTS)
            try:
                saver.wait()
            except Exception:
                os._exit(3)
            os._exit(0)
        children.append(child)
    for _, mine in pipes:
        mine.close()
    try:
        while True:
            told = [theirs.recv() for theirs, _ in pipes]
            for theirs, _ in pipes:
                theirs.send(told)
    except (EOFError, OSError):  # one is gone, or all are
        for theirs, _ in pipes:
            theirs.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_any_writer_at_any_point_leaves_a_whole_state(tmp_path, victim):
    point, seen, killed = 0, set(), True
    while killed:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        checkpoint.save(out, 2, tensors(2), FACTS, keep=1)
        codes = in_processes(out, 3, cut(tensors(3), 2), victim, point)
        killed = codes[victim] == -signal.SIGKILL
        assert set(codes) <= ({-signal.SIGKILL, 0, 3} if killed else {0})
        found = newest(out)
        seen.add(found.step)
        assert same_bytes(read_by(found.folder, tensors(0), 3), tensors(found.step))
        for _, each in list_checkpoints(out):
            checkpoint.open_checkpoint(each)
        assert {p.name for p in out.glob(".tmp-*")} <= {".tmp-3", ".tmp-old-checkpoint-2"}
        if point % 2:
            checkpoint.remove_temporaries(out)
            assert not list(out.glob(".tmp-*"))
        again = save_together(out, 3, cut(tensors(4), 2), keep=1)  # the restarted run comes by again
        assert same_bytes(read_by(again[0].folder, tensors(4), 1), tensors(4))
        assert [p.name for p in out.iterdir()] == ["checkpoint-3"]
    assert point > (15, 6)[victim] and seen == {2, 3}


# ---- odd manifests of several writers -------------------------------------------------------------------------------


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def accepts(folder, manifest, whole):
    """Whether a state with this manifest verifies and loads; all but a DataError is a fault."""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = blank(whole)
    try:
        load_folder(folder, found)
    except DataError:
        return False
    assert same_bytes(found, whole)
    return True


def test_an_odd_manifest_is_a_data_error(tmp_path):
    whole = {"a": torch.arange(6.0).view(3, 2), "s": torch.tensor(1.0)}
    folder = save_together(tmp_path, 1, cut(whole, 2))[0].folder
    manifest = checkpoint.open_checkpoint(folder).manifest
    one, two = manifest["files"]
    assert accepts(folder, manifest, whole)
    odd = (None, [], {}, -1, 0, 1.5, 10**30, True, "", "../x", [[]], {"a": 1}, [0, 3], [float("nan"), 1], [1, 0])
    for path in places(manifest):
        for value in odd:
            free = path and path[0] in ("settings", "rank", "step")  # facts, and any number will do for a step
            other = changed(manifest, path, value)
            assert free or other == manifest or not accepts(folder, other, whole), (path, value)
    files, rows = manifest["files"], manifest["files"][one]["rows"]
    for name in ("../x", "/etc/passwd", "state.safetensors", "manifest.json", one + "\n", one.replace("0", "\u0660")):
        assert not accepts(folder, manifest | {"files": {name: files[one], two: files[two]}}, whole), name
    (folder / f"{one}-").mkdir()
    shutil.copy(folder / one, tmp_path / "elsewhere")
    out_of_it = {f"{one}-/../../elsewhere": files[one], two: files[two]}
    assert not accepts(folder, manifest | {"files": out_of_it}, whole)
    for name in ("b", "../a", ""):
        assert not accepts(folder, changed(manifest, ("files", one, "rows"), rows | {name: [0, 1]}), whole)
    for span in ([0.0, 2.0], [False, 2]):  # equal to what is right, and no row numbers
        assert not accepts(folder, changed(manifest, ("files", one, "rows", "a"), span), whole)
    swapped = {one: files[one] | {"rows": files[two]["rows"]}, two: files[two] | {"rows": rows}}
    assert not accepts(folder, manifest | {"files": swapped}, whole)


def test_each_file_of_several_is_verified(tmp_path):
    for damage, message in (
        (flip, "changed since"), (lambda p: os.truncate(p, 10), "10 bytes, its manifest says"), (os.unlink, "missing"),
    ):  # fmt: skip
        for i in range(3):
            folder = save_together(tmp_path, 1, cut(tensors(1), 3))[0].folder
            path = folder / f"state-0000{i}-of-00003.safetensors"
            damage(path)
            with pytest.raises(DataError, match=f"{path.name}: {message}"):
                checkpoint.open_checkpoint(folder)

"""Training states written beside the training, by one process or several."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import NotFiniteError
from engine.formats import tensor_files
from engine.formats.find import list_checkpoints
from engine.output import checkpoint
from engine.output.checkpoint import STATE
from engine.output.saver import Saver
from tests.helpers.forks import Started
from tests.helpers.training_states import (
    FACTS,
    cut,
    die_before,
    disk_full_once,
    equal,
    fork,
    load_folder,
    loaded,
    newest,
    read_by,
    same_bytes,
    save_checkpoint,
    save_together,
    savers_of,
    tensors,
)


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is set."""
    gate, real = threading.Event(), tensor_files.write_safetensors

    def write(*args, **kwargs):
        assert gate.wait(120)
        return real(*args, **kwargs)

    monkeypatch.setattr("engine.output.saver.write_safetensors", write)
    yield gate
    gate.set()


def test_training_goes_on_while_a_state_is_written(tmp_path, gate):
    saver, live, facts = Saver(tmp_path, keep=2), tensors(1), dict(FACTS)
    saver.save(1, live, facts)
    assert saver.poll() is None and newest(tmp_path) is None
    for t in live.values():
        t.fill_(-1)
    facts.clear()
    gate.set()
    done = saver.wait()
    assert (done.step, done.folder) == (1, tmp_path / "checkpoint-1") and equal(loaded(done.folder), tensors(1))
    assert done.bytes == (done.folder / STATE).stat().st_size
    assert done.seconds > 0 and done.held_seconds > 0
    assert newest(tmp_path).manifest.items() >= FACTS.items()
    assert saver.wait() is None and saver.poll() is None


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
    assert thread.is_alive() and len(saver.unreported) == 1
    gate.set()
    thread.join()
    assert equal(loaded(saver.wait().folder), tensors(1))
    second = saver.wait()
    assert second.held_seconds > 0 and equal(loaded(second.folder), tensors(2))


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
import sys, time, torch
from pathlib import Path
from engine.output.saver import Saver
from engine.base.signals import Signals
out, how = Path(sys.argv[1]), sys.argv[2]
t = torch.arange(8_000_000.0)

class Noted(Signals):
    def handle(self, number, frame):
        super().handle(number, frame)
        (out / "noted").touch()

def hang(_):
    (out / "there").touch()
    time.sleep(1000)

if how == "exit":
    Saver(out, 1).save(1, {"a": t}, {})
else:
    signals = Noted()
    signals.training = True
    saver = Saver(out, 1, 0, 2, hang)
    saver.save(2, {"a": t}, {})
    saver.wait()
"""


def wait_for(path, process):
    """Wait until a process has made a file."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_process_that_ends_finishes_its_save_and_a_second_signal_does_not_wait_for_it(tmp_path):
    ends, hangs = tmp_path / "exit", tmp_path / "hang"
    ends.mkdir(), hangs.mkdir()
    save_checkpoint(hangs, 1, tensors(1), FACTS, keep=1)
    child, hanging = (Started(CHILD, out, out.name) for out in (ends, hangs))
    child.communicate(timeout=120)
    found = {"a": torch.zeros(8_000_000)}
    load_folder(newest(ends).folder, found)
    assert child.returncode == 0 and found["a"].equal(torch.arange(8_000_000.0))

    wait_for(hangs / "there", hanging)
    hanging.terminate()
    wait_for(hangs / "noted", hanging)  # two signals at once would be one
    hanging.terminate()
    _, said = hanging.communicate(timeout=120)
    assert hanging.returncode == 1 and "leaving at once" in said
    assert equal(loaded(newest(hangs).folder), tensors(1))


# ---- several writers ------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr("engine.output.saver.write_safetensors", write)


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


def test_each_writer_tells_the_bytes_of_all(tmp_path):
    saved = save_together(tmp_path, 1, cut(tensors(1), 3))
    n_bytes = sum(file.stat().st_size for file in tmp_path.glob("checkpoint-1/*.safetensors"))
    assert [one.bytes for one in saved] == [n_bytes] * 3 and n_bytes > 4 * 50 * 7 * 2


def test_writers_of_different_steps_notice(tmp_path):
    savers = savers_of(tmp_path, 2)
    for saver, step in zip(savers, (5, 6), strict=True):
        saver.save(step, {}, FACTS)
    for saver in savers:
        with pytest.raises(RuntimeError, match=r"the others at \[\(5, 'begin'\), \(6, 'begin'\)\]"):
            saver.wait()
    assert not list(tmp_path.iterdir())


def save_in_processes(out, step, parts, victim, point):
    """Save with a process for each writer, one of which dies at a point. Return exit codes: 0 saved, 3 raised."""
    pipes = [multiprocessing.Pipe() for _ in parts]

    def save(i):
        for j, (theirs, mine) in enumerate(pipes):
            theirs.close()
            mine.close() if j != i else None

        def exchange(value):
            pipes[i][1].send(value)
            return pipes[i][1].recv()  # EOFError when the others are gone

        if i == victim:
            (exchange,) = die_before(point, exchange)
        saver = Saver(out, 1, i, len(parts), exchange)
        saver.save(step, parts[i], FACTS)
        saver.wait()

    children = [fork(partial(save, i)) for i in range(len(parts))]
    for _, mine in pipes:
        mine.close()
    try:
        while True:
            values = [theirs.recv() for theirs, _ in pipes]
            for theirs, _ in pipes:
                theirs.send(values)
    except (EOFError, OSError):  # one is gone, or all are
        for theirs, _ in pipes:
            theirs.close()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_any_writer_at_any_point_leaves_a_whole_state(tmp_path, victim):
    point, seen, killed = 0, set(), True
    while killed:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        save_checkpoint(out, 2, tensors(2), FACTS, keep=1)
        codes = save_in_processes(out, 3, cut(tensors(3), 2), victim, point)
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


@pytest.mark.parametrize("bad", [0, 1])
def test_a_state_that_is_not_finite_is_written_by_no_writer(tmp_path, bad):
    """Whichever writer holds it, all are told which tensor of whom; the older state stays and no temporary."""
    whole = tensors(1)
    save_together(tmp_path, 1, cut(whole, 2))
    name = next(name for name, t in whole.items() if t.is_floating_point() and t.dim() and len(t) > 2)
    whole[name] = whole[name].clone()
    whole[name][0 if bad == 0 else -1] = float("inf")
    for outcome in save_together(tmp_path, 2, cut(whole, 2)):
        assert isinstance(outcome, NotFiniteError)
        assert str(outcome).startswith(f"writer {bad}: {name} holds NaN or an infinity")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1] and not list(tmp_path.glob(".tmp-*"))


def test_a_copy_waits_for_the_save_that_was_begun_last(tmp_path):
    """Which uses the memory that it is made in; earlier ones that were not asked for have ended."""
    saver, waited = Saver(tmp_path, keep=9), []
    for n in (1, 2, 3):
        saver.unreported.append((SimpleNamespace(exception=lambda n=n: waited.append(n)), 0.0))
    saver.save(4, tensors(4), FACTS)
    saver.unreported[-1][0].result(60)
    assert waited == [3] and newest(tmp_path).step == 4
    saver.pool.shutdown()


def test_no_older_state_goes_before_the_new_one_has_its_name(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), FACTS, keep=2)

    def fail(tmp, final):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.output.saver.rename_into_place", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 3, tensors(3), FACTS, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]

"""Training states of small tensors: saved by one writer or by several, killed on the way, damaged, compared."""

import errno
import json
import os
import pickle
import signal
import threading
import traceback

import torch

from engine.formats import tensor_files
from engine.model.shard import Shard, as_shards
from engine.output import checkpoint
from engine.output.saver import Saver, WriterGroup, write_checkpoint

FACTS = {"settings": {"lr": 1.0}}
POINTS = [
    (os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (os, "open"), (json, "dump"),
    (tensor_files, "load_bytes"),
]  # fmt: skip


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {"m.a": torch.randn(50, 7, generator=g), "v.a": torch.randn(50, 7, generator=g), "master.b": torch.ones(3)}


def save_checkpoint(out, step, tensors, facts, keep):
    """Write out/checkpoint-<step> by one writer, here and now, and return the folder."""
    return write_checkpoint(out, keep, step, lambda: as_shards(tensors), facts, WriterGroup()).folder


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


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def die_before(point, *more):
    """Make this process SIGKILL itself before its point-th write, rename or call of a function in more.

    Return the functions in more, which count their calls.
    """
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
    """Save in a child process that dies at a point, and return whether it did."""

    def save():
        die_before(point)
        save_checkpoint(out, step, tensors(seed or step), FACTS, keep)

    code = os.waitstatus_to_exitcode(os.waitpid(fork(save), 0)[1])
    assert code in (0, -signal.SIGKILL), "the child failed"
    return code != 0


def fork(work):
    """Run work() in a child process, which exits with 0, or 3 where it raised, and return the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    return child


def disk_full_once(monkeypatch, file="state.safetensors"):
    real, calls = tensor_files.write_safetensors, []

    def write(path, *args, **kwargs):
        if path.name == file and not calls:
            calls.append(path)
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("engine.output.saver.write_safetensors", write)


# ---- several writers ------------------------------------------------------------------------------------------------


class Meeting:
    """A place where n threads exchange values, as bytes."""

    def __init__(self, n):
        self.told, self.barrier = [None] * n, threading.Barrier(n)

    def exchange(self, writer):
        def exchange(value):
            self.told[writer] = pickle.dumps(value)
            self.barrier.wait(120)
            told = [pickle.loads(t) for t in self.told]
            self.barrier.wait(120)
            return told

        return exchange


def savers_of(out, n, keep=2):
    meeting = Meeting(n)
    return [Saver(out, keep, i, n, meeting.exchange(i)) for i in range(n)]


def cut(whole, n, at=None):
    """Return the shards of n writers: rows as FSDP cuts them, or cut at the given rows of each tensor."""
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
    """Save by several writers and return what each one's wait() returned or raised."""
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
    """Return tensors of equal shapes and dtypes with other bytes."""
    return {
        name: (t.clone().contiguous().view(-1).view(torch.uint8) ^ 0x55).view(t.dtype).view(t.shape)
        for name, t in whole.items()
    }


def same_bytes(a, b):
    return a.keys() == b.keys() and all(
        a[k].reshape(-1).view(torch.uint8).equal(b[k].reshape(-1).view(torch.uint8)) for k in a
    )


def read_by(folder, whole, n, at=None):
    """Return the tensors that n readers fill together."""
    found = blank(whole)
    for part in cut(found, n, at):
        load_folder(folder, {name: Shard(t[:0], 0, len(t)) if t.ndim else Shard(t) for name, t in found.items()} | part)
    return found

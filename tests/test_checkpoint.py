"""Training state: whole whatever kills the process, verified, rotated."""

import json
import os
import shutil
import signal

import pytest
import torch

from engine import checkpoint
from engine.errors import DataError

FACTS = {"settings": {"lr": 1.0}}
POINTS = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (os, "open"), (json, "dump")]


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {"m.a": torch.randn(50, 7, generator=g), "v.a": torch.randn(50, 7, generator=g), "master.b": torch.ones(3)}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def loaded(folder):
    empty = {name: torch.full_like(t, float("nan")) for name, t in tensors(0).items()}
    checkpoint.load(folder, empty)
    return empty


def newest(out):
    return checkpoint.newest(out, lambda text: None)


def killed_at(point, out, step, keep):
    """Saves in a child that SIGKILLs itself just before its point-th write or rename. True if it was killed."""
    child = os.fork()
    if child == 0:
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
        checkpoint.save(out, step, tensors(step), FACTS, keep)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_what_is_saved_is_loaded(tmp_path):
    folder = checkpoint.save(tmp_path, 7, tensors(7), FACTS, keep=2)
    found, manifest = newest(tmp_path)
    assert found == folder == tmp_path / "checkpoint-7"
    assert manifest["step"] == 7 and manifest["settings"] == {"lr": 1.0}
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
        folder, manifest = newest(out)
        seen.add(manifest["step"])
        assert equal(loaded(folder), tensors(manifest["step"]))
        for _, each in checkpoint.checkpoints(out):
            checkpoint.verify(each)  # none is half there, old or new
        if not killed:
            break
        checkpoint.save(out, 4, tensors(4), FACTS, keep)
        assert newest(out)[1]["step"] == 4
        assert not list(out.glob(".tmp-*")) and len(checkpoint.checkpoints(out)) <= keep
    assert point > 8 and seen == {2, 3}, "kills must fall before and after the moment the new state counts"


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, tensors(step), FACTS, keep=2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [10, 100]


def test_a_state_just_saved_is_never_the_one_that_rotates_out(tmp_path):
    for step in (6, 8):
        checkpoint.save(tmp_path, step, tensors(step), FACTS, keep=2)
    assert checkpoint.save(tmp_path, 5, tensors(5), FACTS, keep=2).is_dir()
    checkpoint.rewind(tmp_path, 5)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [5]


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
        "format 9, this version reads 1",
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_state_is_named_and_passed_over(tmp_path, how):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), FACTS, keep=2)
    damage, message = BREAK[how]
    damage(tmp_path / "checkpoint-2")
    told = []
    assert checkpoint.newest(tmp_path, told.append)[1]["step"] == 1
    assert len(told) == 1 and "checkpoint-2" in told[0] and message in told[0]
    with pytest.raises(DataError, match="checkpoint-2"):
        checkpoint.verify(tmp_path / "checkpoint-2")
    checkpoint.save(tmp_path, 2, tensors(2), FACTS, keep=2)  # the run comes by again
    assert newest(tmp_path)[1]["step"] == 2


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
        checkpoint.load(folder, {**tensors(1), "m.a": torch.zeros(50, 8), "c": torch.zeros(2)})


def test_a_full_disk_leaves_the_older_states_and_no_temporary(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(1), FACTS, keep=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, tensors(2), FACTS, keep=1)
    monkeypatch.undo()
    assert newest(tmp_path)[1]["step"] == 1 and not list(tmp_path.glob(".tmp-*"))
    shutil.rmtree(tmp_path)

"""Training state on disk: written beside the training, by one process or many; atomic, verified, rotated, no pickle.

    checkpoint-N/state.safetensors                 every tensor that resume needs, of one writer; of several:
    checkpoint-N/state-00000-of-00004.safetensors  the rows that writer 0 holds of each; none for who holds nothing
    checkpoint-N/manifest.json                     step, settings and data hashes; size and sha256 of each file; of
                                                   several, which rows of which tensor each holds. Written last.

A save writes .tmp-N/, each writer its file, synced. When all have told that theirs is, writer 0 adds the manifest,
renames the folder, syncs the parent, and only then removes older states, each renamed out of the way first. Whatever
kills whichever process, a folder named checkpoint-N is whole; where the disk lied, its hashes tell, and it is passed
over. Any number of readers take the rows they want from whichever files hold them.

Not torch.distributed.checkpoint: its .metadata is a pickle, which runs what it holds when it is read, and nothing in it
tells a flipped bit.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from engine.base.errors import DataError
from engine.base.files import sync_folder
from engine.formats.find import list_checkpoints
from engine.formats.tensor_files import write_safetensors
from engine.model.shard import Shard, as_shards
from engine.output.tensor_rows import HostCopy, check_layout, described, lay_out, layout_of, read

FORMAT, SHARDED = 1, 2  # of the manifest: one file of whole tensors; several, of some rows each
STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A state on disk. bytes: of all writers; seconds: of writing; held_seconds: those that the caller waited for."""

    step: int
    folder: Path
    bytes: int
    seconds: float
    held_seconds: float = 0.0


# ---- write ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writers:
    """This writer among n, who write one state. exchange(x): [x of every writer], once all have called it."""

    writer: int = 0
    n: int = 1
    exchange: Callable[[object], list] | None = None

    def agree(self, at: tuple, act: Callable) -> list:
        """What act() returned on every writer. Where it failed on one, all raise alike, naming it. at: the same on all.

        A full disk is an OSError; anything else, which is a mistake of ours, a RuntimeError.
        """
        if self.n == 1:
            return [act()]
        done = failure = mine = None
        try:
            done = act()
        except Exception as error:
            mine, is_os = error, isinstance(error, OSError)
            text = error.strerror if is_os and error.strerror else f"{type(error).__name__}: {error}"
            failure = is_os, error.errno if is_os else None, text
        told = self.exchange((at, done, failure))
        if [each[0] for each in told] != [at] * self.n:
            raise RuntimeError(f"writer {self.writer}: at {at}, the others at {[each[0] for each in told]}")
        for writer, (_, _, failure) in enumerate(told):
            if failure:
                is_os, number, text = failure
                text = f"writer {writer}: {text}"
                raise (OSError(number, text) if is_os else RuntimeError(text)) from mine
        return [each[1] for each in told]


def save(out: Path, step: int, tensors: dict[str, torch.Tensor | Shard], facts: dict, keep: int) -> Path:
    """Writes out/checkpoint-<step>, by one process there and then, and removes all but the newest `keep`.

    facts: what resume compares and restores. An OSError (a full disk) leaves the older states as they were and no
    temporary behind.
    """
    return write(out, keep, step, lambda: as_shards(tensors), facts, Writers()).folder


def write(out: Path, keep: int, step: int, arrived: Callable[[], dict[str, Shard]], facts, writers: Writers) -> Saved:
    """This writer's part of a state, in three stages, each of which succeeds on all writers or fails on all."""
    began = time.perf_counter()
    final, tmp = out / f"checkpoint-{step}", out / f".tmp-{step}"
    n, shards = writers.n, {}
    names = [STATE] if n == 1 else [f"state-{i:05}-of-{n:05}.safetensors" for i in range(n)]
    own = names[writers.writer]

    def begin():
        shards.update(arrived())
        if writers.writer == 0:
            sweep(out)
            tmp.mkdir()
        return described(shards)

    def write_own():
        if own not in files:
            return None
        if not tmp.is_dir():
            raise OSError(errno.ENOENT, f"{tmp} is not there; all writers must see the same folder")
        mine = ((name, shards[name].tensor) for name in files[own])
        listed = ((name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in mine)
        sha256 = write_safetensors(tmp / own, listed, sha256=True)
        return own, {"bytes": (tmp / own).stat().st_size, "sha256": sha256}

    def commit():
        if writers.writer == 0:
            if writers.n == 1:
                layout = {"format": FORMAT, "files": written}
            else:
                held = {name: entry | {"rows": files[name]} for name, entry in written.items()}
                layout = {"format": SHARDED, "tensors": whole, "files": held}
            with open(tmp / MANIFEST, "w") as file:
                json.dump({"format": None, "step": step, **facts, **layout}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(tmp)
            put(tmp, final)
            rotate(out, final, keep)

    try:
        whole, files = lay_out(dict(zip(names, writers.agree((step, "begin"), begin), strict=True)))
        written = dict(filter(None, writers.agree((step, "write"), write_own)))
        writers.agree((step, "commit"), commit)
    except BaseException:
        if writers.writer == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return Saved(step, final, sum(entry["bytes"] for entry in written.values()), time.perf_counter() - began)


def put(tmp, final):
    """Renames the new state to its name. One of this step is broken, or of before the run was resumed at an earlier
    one, or the only whole one that there is: until the new one counts, restore() would put it back."""
    was = final.with_name(f".tmp-was-{final.name}")
    try:
        if final.exists():
            os.rename(final, was)
        os.rename(tmp, final)
    except OSError:
        restore(final.parent)
        raise
    sync_folder(final.parent)
    shutil.rmtree(was, ignore_errors=True)


def rotate(out, newest, keep):
    others = [folder for _, folder in list_checkpoints(out) if folder != newest]
    for old in others[: max(0, len(others) - keep + 1)]:
        discard(old)


def discard(folder):
    """Removes a state so that no kill leaves half of one under its name."""
    trash = folder.with_name(f".tmp-old-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def restore(out):
    """Puts back a state whose successor of the same step never got its name."""
    for was in out.glob(".tmp-was-checkpoint-*"):
        final = was.with_name(was.name.removeprefix(".tmp-was-"))
        if not final.exists():
            os.rename(was, final)


def sweep(out):
    """Removes what interrupted saves left, and nothing that another thread is about to rename."""
    restore(out)
    for left in out.glob(".tmp-*"):
        if re.fullmatch(r"\.tmp-(\d+|(old|was)-checkpoint-\d+)", left.name):
            shutil.rmtree(left, ignore_errors=True)


# ---- write beside the training --------------------------------------------------------------------------------------


class Saver:
    """Writes a run's training states in a thread of its own, one at a time, in the order asked for.

    All n writers call save() with the same steps and number; exchange is a collective that this thread calls, three
    times a save, and that must raise, not hang, when a writer is gone. The thread is no daemon: an interpreter that
    ends lets it finish. device: where the tensors are; None: in the host's memory.
    """

    def __init__(
        self, out: Path, keep: int, writer: int = 0, n_writers: int = 1, exchange: Callable | None = None, device=None
    ):
        if n_writers > 1 and exchange is None:
            raise ValueError(f"Saver: {n_writers} writers, wanted an exchange between them")
        self.out, self.keep, self.writers = out, keep, Writers(writer, n_writers, exchange)
        self.device = torch.device(device or "cpu")
        self.host_copy = HostCopy(pinned=self.device.type == "cuda")
        self.pool = ThreadPoolExecutor(1, "saver")
        self.untold = deque()  # [future, held_seconds] of saves that nobody has asked for

    def save(self, step: int, tensors: dict[str, torch.Tensor | Shard], facts: dict, copy: bool = True) -> None:
        """Waits for the save before, copies the tensors to the host's memory and leaves the rest to the thread.

        On a GPU the copy is queued where the caller's kernels are: those queued later change nothing of it, and the
        host does not wait. copy=False: the caller changes nothing until wait(). facts: writer 0's count. Whatever goes
        wrong, also with the copy, is told by wait(), on all writers.
        """
        began = time.perf_counter()
        if self.untold:
            self.untold[-1][0].exception()  # waits: one copy at a time
        try:
            shards = as_shards(tensors)
            shards = self.host_copy.copy_shards(shards) if copy else shards
            cuda = self.device.type == "cuda"
            arrived = partial(_after, torch.cuda.current_stream(self.device).record_event() if cuda else None, shards)
        except Exception as error:
            arrived = partial(_raise, error)
        future = self.pool.submit(write, self.out, self.keep, step, arrived, dict(facts), self.writers)
        self.untold.append([future, time.perf_counter() - began])

    def wait(self) -> Saved | None:
        """The outcome of the oldest save that nobody has asked for yet, once it is known; None when all are told.

        Raises OSError where it failed, on every writer alike; older states are then intact and no temporary is left.
        What an exchange raises comes through: the writers then know of each other no more.
        """
        if not self.untold:
            return None
        future, held_seconds = self.untold[0]
        future.exception()  # waits
        self.untold.popleft()
        return replace(future.result(), held_seconds=held_seconds)

    def poll(self) -> Saved | None:
        """wait() where it would not wait; else None. Writers see the end of a save at different moments."""
        return self.wait() if self.untold and self.untold[0][0].done() else None

    def close(self) -> None:
        """Waits for what is being written and gives the copy's memory back. wait() still tells how it went."""
        self.pool.shutdown()
        self.host_copy = None


def _after(event, shards):
    if event is not None:
        event.synchronize()
    return shards


def _raise(error):
    raise error


# ---- read -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and its manifest, parsed once. Small, and picklable for other ranks."""

    folder: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def remove_temporaries(out: Path) -> None:
    """Remove what an interrupted run left in its output folder. No run may be writing into the folder."""
    sweep(out)
    for left in out.glob(".tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove_later(out: Path, step: int) -> None:
    """Remove the checkpoints after `step` (-1: all): broken ones, and those of steps that the run will repeat."""
    for later, folder in list_checkpoints(out):
        if later > step:
            discard(folder)


def find_newest(out: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint of an output folder, or None if it holds no checkpoint at all.

    Each broken one is passed over with a warning. Raises DataError when every checkpoint is broken.
    """
    broken = []
    restore(out)
    for _, folder in reversed(list_checkpoints(out)):
        try:
            return open_checkpoint(folder)
        except DataError as error:
            broken.append(str(error))
            warn(f"passed over: {error}")
    if broken:
        raise DataError("no checkpoint is whole; --resume never starts over\n" + "\n".join(broken))
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder after checking size and sha256 of every file.

    Raises DataError that names the first broken file.
    """
    manifest = read_manifest(folder)
    files = {folder / name: entry for name, entry in manifest["files"].items()}
    for path, entry in files.items():
        if not path.is_file():
            raise DataError(f"{path}: missing; choose another checkpoint")
        size, wanted = path.stat().st_size, entry["bytes"]
        if size != wanted:
            raise DataError(f"{path}: {size} bytes, its manifest says {wanted}; choose another checkpoint")
    with ThreadPoolExecutor(max(1, min(8, len(files)))) as pool:
        for (path, entry), digest in zip(files.items(), [pool.submit(sha256_of, path) for path in files], strict=True):
            try:
                sha256 = digest.result()
            except OSError as error:  # also when a run that is under way has just removed it
                raise DataError(f"{path}: cannot be read ({error.strerror}); choose another checkpoint") from None
            if sha256 != entry["sha256"]:
                raise DataError(f"{path}: changed since it was written (its sha256 differs); choose another checkpoint")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict:
    """What a manifest says, in a form that can be relied on; its files unread. Raises DataError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        kind = manifest["format"]
        if kind not in (FORMAT, SHARDED):
            raise DataError(f"{folder / MANIFEST}: format {kind}, this version reads {FORMAT} and {SHARDED}")
        insist(type(manifest["step"]) is int, "its step is no number")
        files, known = manifest["files"], re.escape(STATE) if kind == FORMAT else r"state-\d{5}-of-\d{5}\.safetensors"
        for name, entry in files.items():
            insist(re.fullmatch(known, name, re.ASCII), f"a file named {name!r}")
            insist(type(entry["bytes"]) is int and type(entry["sha256"]) is str, f"{name} without size and sha256")
        if kind == FORMAT:
            insist(files, "no file")
        else:
            check_layout(manifest["tensors"], {name: entry["rows"] for name, entry in files.items()})
        return manifest
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}, so its save never finished; choose another checkpoint") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__} {error}"
        raise DataError(f"{folder / MANIFEST}: not a manifest of ours ({what}); choose another checkpoint") from None


def insist(holds, what):
    if not holds:
        raise ValueError(what)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def read_layout(checkpoint: Checkpoint) -> tuple[dict, dict]:
    """Return (whole, files) of a checkpoint in the form of engine.output.tensor_rows. Raises DataError."""
    manifest = checkpoint.manifest
    if manifest["format"] == SHARDED:
        return manifest["tensors"], {name: entry["rows"] for name, entry in manifest["files"].items()}
    return layout_of(checkpoint.folder / STATE)


def load(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor | Shard], prefix: str = "") -> None:
    """Fill the tensors in place from a checkpoint of any number of writers, each with the rows it wants.

    The tensors must be all of the checkpoint's tensors whose names begin with the prefix; the others are not read.
    Raises DataError that lists the names, shapes or kinds of numbers that differ.
    """
    read(checkpoint.folder, *read_layout(checkpoint), as_shards(tensors), prefix)

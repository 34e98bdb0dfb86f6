"""Write training states to disk while training goes on, by one process or by several.

A save writes the folder .tmp-N, each writer one file, synced. Once every writer has reported its file, writer 0 adds
the manifest, renames the folder to checkpoint-N, syncs the parent folder, and only then removes older states, each
renamed out of the way first. Whatever kills whichever process, a folder named checkpoint-N is whole.
"""

import errno
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from engine.base.errors import NotFiniteError
from engine.base.files import sync_file, sync_folder
from engine.formats.tensor_files import write_safetensors
from engine.model.shard import Shard, as_shards
from engine.output.checkpoint import (
    MANIFEST,
    ONE_FILE,
    SHARDED,
    STATE,
    remove_oldest,
    remove_save_temporaries,
    rename_into_place,
)  # fmt: skip
from engine.output.tensor_rows import HostCopy, RowMap, describe_shards, map_rows_to_files

T = TypeVar("T")
Exchange = Callable[[Any], list[Any]]  # a collective: takes one writer's value, returns the values of all writers


@dataclass(frozen=True)
class Saved:
    """A training state that has been written."""

    step: int
    folder: Path
    bytes: int  # of all writers' files
    seconds: float  # of writing
    held_seconds: float = 0.0  # seconds that Saver.save() kept its caller waiting


class Saver:
    """Writes a run's training states in a thread of its own, one at a time, in the order of the calls.

    With several writers each calls save() with the same steps, equally often. The thread calls exchange three times a
    save; exchange must raise, not hang, when a writer is gone. The thread is no daemon: an interpreter that ends lets
    it finish. device: where the tensors are; None is the host's memory.
    """

    def __init__(
        self, out: Path, keep: int, writer: int = 0, n_writers: int = 1, exchange: Exchange | None = None,
        device: torch.device | str | None = None,
    ):  # fmt: skip
        if n_writers > 1 and exchange is None:
            raise ValueError(f"Saver: {n_writers} writers, wanted an exchange between them")
        self.out, self.keep, self.writers = out, keep, WriterGroup(writer, n_writers, exchange)
        self.device = torch.device(device or "cpu")
        self.host_copy: HostCopy | None = HostCopy(pinned=self.device.type == "cuda")
        self.pool = ThreadPoolExecutor(1, "saver")
        self.unreported: deque[tuple[Future[Saved], float]] = deque()  # saves wait() has not reported, held_seconds

    def save(self, step: int, tensors: Mapping[str, torch.Tensor | Shard], facts: dict[str, Any]) -> None:
        """Copy the tensors to the host's memory, once the save before is written, and leave the rest to the thread.

        On a GPU the copy is queued behind the caller's kernels: kernels queued later change nothing of it, and the host
        does not wait. facts: writer 0's go into the manifest. wait() reports on all writers whatever goes wrong, also
        with the copy.
        """
        began = time.perf_counter()
        if self.unreported:
            self.unreported[-1][0].exception()  # waits: there is memory for one copy
        assert self.host_copy is not None, "save() after close()"
        try:
            shards = self.host_copy.copy_shards(as_shards(tensors))
            cuda = self.device.type == "cuda"
            copied = torch.cuda.current_stream(self.device).record_event() if cuda else None
            get_shards: Callable[[], dict[str, Shard]] = partial(wait_for_copy, copied, shards)
        except Exception as error:
            get_shards = partial(raise_error, error)
        future = self.pool.submit(write_checkpoint, self.out, self.keep, step, get_shards, dict(facts), self.writers)
        self.unreported.append((future, time.perf_counter() - began))

    def wait(self) -> Saved | None:
        """Wait for the oldest save that has not been reported and return it; None when all have been.

        Raises OSError where the save failed, on every writer alike; older states are then intact and no temporary is
        left. Raises NotFiniteError, likewise, for a state that holds NaN or an infinity. An error of exchange comes
        through as it is: the writers then know nothing of each other.
        """
        if not self.unreported:
            return None
        future, held_seconds = self.unreported[0]
        future.exception()  # waits; if a signal handler raises meanwhile, the save stays unreported
        self.unreported.popleft()
        return replace(future.result(), held_seconds=held_seconds)

    def poll(self) -> Saved | None:
        """Return what wait() would if the save is done, else None. Other writers may see it end at other moments."""
        return self.wait() if self.unreported and self.unreported[0][0].done() else None

    def close(self) -> None:
        """Wait for what is being written and free the copy's memory. wait() still reports how it went."""
        self.pool.shutdown()
        self.host_copy = None


def wait_for_copy(copied: torch.cuda.Event | None, shards: dict[str, Shard]) -> dict[str, Shard]:
    """Return the shards once the event says that their copy is complete."""
    if copied is not None:
        copied.synchronize()
    return shards


def raise_error(error: Exception) -> NoReturn:
    """Raise an error that happened earlier."""
    raise error


# ---- one save -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriterGroup:
    """The writers of a state, as one of them sees them.

    writer: which of the n writers this process is. All of them call exchange, which waits until all have.
    """

    writer: int = 0
    n: int = 1
    exchange: Exchange | None = None

    def run_stage(self, stage: tuple[int, str], work: Callable[[], T]) -> list[T]:
        """Run work() on every writer and return each one's result. Where it fails on one, raise on all, naming it.

        stage must be equal on all writers. The error is an OSError (a full disk) or a NotFiniteError where that is what
        failed, else a RuntimeError.
        """
        if self.n == 1 or self.exchange is None:
            return [work()]
        result: T | None = None
        failure: tuple[type[Exception], tuple[Any, ...]] | None = None  # what to raise, its arguments: (..., text)
        cause: Exception | None = None
        try:
            result = work()
        except OSError as error:
            text = error.strerror or f"{type(error).__name__}: {error}"
            failure, cause = (OSError, (error.errno, text)), error
        except NotFiniteError as error:
            failure, cause = (NotFiniteError, (str(error),)), error
        except Exception as error:
            failure, cause = (RuntimeError, (f"{type(error).__name__}: {error}",)), error
        stages, results, failures = zip(*self.exchange((stage, result, failure)), strict=True)
        if set(stages) != {stage}:
            raise RuntimeError(f"writer {self.writer}: at {stage}, the others at {list(stages)}")
        for writer, failed in enumerate(failures):
            if failed:
                kind, (*others, text) = failed
                raise kind(*others, f"writer {writer}: {text}") from cause
        return list(results)


def write_checkpoint(
    out: Path,
    keep: int,
    step: int,
    get_shards: Callable[[], dict[str, Shard]],
    facts: dict[str, Any],
    writers: WriterGroup,
) -> Saved:
    """Write one writer's part of a checkpoint and keep the newest `keep` of them.

    Each of the three stages succeeds on all writers or fails on all. A failure, an OSError for a full disk, leaves the
    older checkpoints as they were and no temporary folder.
    """
    began = time.perf_counter()
    final, tmp = out / f"checkpoint-{step}", out / f".tmp-{step}"
    names = [STATE] if writers.n == 1 else [f"state-{i:05}-of-{writers.n:05}.safetensors" for i in range(writers.n)]
    own, is_first = names[writers.writer], writers.writer == 0
    shards: dict[str, Shard] = {}

    def begin():
        shards.update(get_shards())
        if is_first:
            remove_save_temporaries(out)
            tmp.mkdir()
        return describe_shards(shards)

    def write_own():
        if own not in row_map.files:
            return None
        if not tmp.is_dir():
            raise OSError(errno.ENOENT, f"{tmp} is not there; all writers must see the same folder")
        mine = ((name, shards[name].tensor) for name in row_map.files[own])
        entries = ((name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in mine)
        sha256 = write_safetensors(tmp / own, entries, sha256=True)
        return own, {"bytes": (tmp / own).stat().st_size, "sha256": sha256}

    def commit():
        if is_first:
            write_manifest(tmp, step, facts, row_map, written, several=writers.n > 1)
            rename_into_place(tmp, final)
            remove_oldest(final, keep)

    try:
        row_map = map_rows_to_files(dict(zip(names, writers.run_stage((step, "begin"), begin), strict=True)))
        written = dict(filter(None, writers.run_stage((step, "write"), write_own)))
        writers.run_stage((step, "commit"), commit)
    except BaseException:
        if is_first:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return Saved(step, final, sum(entry["bytes"] for entry in written.values()), time.perf_counter() - began)


def write_manifest(
    folder: Path, step: int, facts: dict[str, Any], row_map: RowMap, written: dict[str, dict[str, Any]], several: bool
) -> None:
    """Write the manifest of a folder of files, and wait until all names in the folder are on the disk."""
    parts: dict[str, Any] = {"format": ONE_FILE, "files": written}
    if several:
        files = {name: entry | {"rows": row_map.files[name]} for name, entry in written.items()}
        parts = {"format": SHARDED, "tensors": row_map.tensors, "files": files}
    with open(folder / MANIFEST, "w") as file:
        # parts has the format; naming it here puts it first.
        json.dump({"format": None, "step": step, **facts, **parts}, file, indent=1)
        sync_file(file)
    sync_folder(folder)

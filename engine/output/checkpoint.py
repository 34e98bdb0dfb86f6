"""Training states on disk: which there are, whether they are whole, and what they hold. No pickle.

    checkpoint-N/state.safetensors                 every tensor that resume needs, of one writer; of several writers:
    checkpoint-N/state-00000-of-00004.safetensors  the rows that writer 0 holds of each tensor; absent if it holds none
    checkpoint-N/manifest.json                     step, settings and hashes of the data; size and sha256 of each file;
                                                   of several writers, which rows of which tensor each file holds

engine.output.saver writes them. A folder named checkpoint-N is whole unless the disk changed or lost what was written.
The hashes show such a fault, and the folder is passed over. Any number of readers can read a checkpoint: each takes the
rows it wants from whichever files hold them.

Not torch.distributed.checkpoint: its .metadata is a pickle, which runs what it holds when it is read, and nothing in it
shows a flipped bit.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import DAMAGE, DataError
from engine.base.files import sync_folder
from engine.base.watching import Watch, watch_silently
from engine.formats.find import list_checkpoints
from engine.model.shard import Shard, as_shards
from engine.output.tensor_rows import RowMap, check_row_map, read_file_row_map, read_shards

ONE_FILE, SHARDED = 1, 2  # the manifest's format: one file of whole tensors; several files of some rows each
STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole training state: its folder and its manifest, parsed once. Small and picklable, for other ranks."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


# ---- read -----------------------------------------------------------------------------------------------------------


def find_newest(out: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint of an output folder, or None if the folder holds no checkpoint at all.

    Each broken one is passed over with a warning. Raises DataError when every checkpoint is broken.
    """
    broken = []
    restore_replaced(out)
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
        digests = [pool.submit(hash_file, path) for path in files]
        for (path, entry), digest in zip(files.items(), digests, strict=True):
            try:
                sha256 = digest.result()
            except OSError as error:  # also when a run that is under way has just removed it
                raise DataError(f"{path}: cannot be read ({error.strerror}); choose another checkpoint") from None
            if sha256 != entry["sha256"]:
                raise DataError(f"{path}: changed since it was written (its sha256 differs); choose another checkpoint")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, its form checked and the files it names unread. Raises DataError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        kind = manifest["format"]
        if kind not in (ONE_FILE, SHARDED):
            raise DataError(f"{folder / MANIFEST}: format {kind}, this version reads {ONE_FILE} and {SHARDED}")
        require(type(manifest["step"]) is int and manifest["step"] >= 0, "its step is no number")
        for name in ("n_updates", "max_tokens"):
            value = manifest.get(name, 1)
            require(type(value) is int and 0 <= value < 2**63, f"its {name} is no number")
        for name in ("settings", "model"):
            require(type(manifest.get(name, {})) is dict, f"its {name} are no object")
        files, known = manifest["files"], re.escape(STATE) if kind == ONE_FILE else r"state-\d{5}-of-\d{5}\.safetensors"
        for name, entry in files.items():
            require(re.fullmatch(known, name, re.ASCII), f"a file named {name!r}")
            require(type(entry["bytes"]) is int and type(entry["sha256"]) is str, f"{name} without size and sha256")
        if kind == ONE_FILE:
            require(files, "no file")
        else:
            check_row_map(RowMap(manifest["tensors"], {name: entry["rows"] for name, entry in files.items()}))
        return manifest
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}, so its save never finished; choose another checkpoint") from None
    except DAMAGE as error:
        what = f"{type(error).__name__} {error}"
        raise DataError(f"{folder / MANIFEST}: not a manifest of ours ({what}); choose another checkpoint") from None


def require(holds: object, problem: str) -> None:
    """Raise ValueError with the problem unless a condition holds."""
    if not holds:
        raise ValueError(problem)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def read_row_map(checkpoint: Checkpoint) -> RowMap:
    """Return which rows of which tensor each file of a checkpoint holds. Raises DataError."""
    manifest = checkpoint.manifest
    if manifest["format"] == SHARDED:
        return RowMap(manifest["tensors"], {name: entry["rows"] for name, entry in manifest["files"].items()})
    return read_file_row_map(checkpoint.folder / STATE)


def load(
    checkpoint: Checkpoint,
    tensors: Mapping[str, torch.Tensor | Shard],
    prefix: str = "",
    watch: Watch = watch_silently,
) -> None:
    """Fill the tensors in place from a checkpoint of any number of writers. A Shard gets its rows only.

    The tensors must be all of the checkpoint's tensors whose names begin with the prefix; no other is read. Raises
    DataError that lists the names, shapes or kinds of numbers that differ.
    """
    read_shards(checkpoint.folder, read_row_map(checkpoint), as_shards(tensors), prefix, watch)


# ---- rename and remove ----------------------------------------------------------------------------------------------


def rename_into_place(tmp: Path, final: Path) -> None:
    """Give a new state its name and wait until the name is on the disk.

    A state of that step may be there: broken, older than a resume at an earlier step, or the only whole one. It is
    renamed first and removed last; until the new one has its name, restore_replaced() would put it back.
    """
    replaced = final.with_name(f".tmp-was-{final.name}")
    try:
        if final.exists():
            os.rename(final, replaced)
        os.rename(tmp, final)
    except OSError:
        restore_replaced(final.parent)
        raise
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(out: Path) -> None:
    """Put back each state that was renamed for another one of its step, where that one never got its name."""
    for replaced in out.glob(".tmp-was-checkpoint-*"):
        final = replaced.with_name(replaced.name.removeprefix(".tmp-was-"))
        if not final.exists():
            os.rename(replaced, final)


def remove_oldest(newest: Path, keep: int) -> None:
    """Remove the oldest checkpoints beside the newest one, so that `keep` are left with it."""
    others = [folder for _, folder in list_checkpoints(newest.parent) if folder != newest]
    for folder in others[: max(0, len(others) - keep + 1)]:
        remove_checkpoint(folder)


def remove_checkpoints_after(out: Path, step: int) -> None:
    """Remove the checkpoints after a step (-1: all): broken ones, and those of steps that the run will repeat."""
    for later, folder in list_checkpoints(out):
        if later > step:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that no kill leaves half of it under its name."""
    trash = folder.with_name(f".tmp-old-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_save_temporaries(out: Path) -> None:
    """Remove what interrupted saves left, and nothing that another thread is about to rename."""
    restore_replaced(out)
    for left in out.glob(".tmp-*"):
        if re.fullmatch(r"\.tmp-(\d+|(old|was)-checkpoint-\d+)", left.name):
            shutil.rmtree(left, ignore_errors=True)


def remove_temporaries(out: Path) -> None:
    """Remove everything that an interrupted run left unfinished in its folder. No run may be writing there."""
    remove_save_temporaries(out)
    for left in out.glob(".tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)

"""Training state on disk: atomic, verified, rotated, no pickle.

    checkpoint-N/state.safetensors    every tensor that resume needs
    checkpoint-N/manifest.json        step, settings and data hashes; size and sha256 of each file. Written last.

A save writes .tmp-N/, syncs it, writes the manifest, renames the folder, syncs the parent, and only then removes older
states, each renamed out of the way first. Whatever kills the process, a folder named checkpoint-N is whole; where the
disk lied, its hashes tell, and it is passed over.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import DataError
from engine.folders import sync
from engine.tensor_files import write_safetensors

FORMAT = 1  # of the manifest
STATE, MANIFEST = "state.safetensors", "manifest.json"


def save(out: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict, keep: int) -> Path:
    """Writes out/checkpoint-<step> and removes all but the newest `keep`. facts: what resume compares and restores.

    An OSError (a full disk) leaves the older states as they were and no temporary behind.
    """
    final, tmp = out / f"checkpoint-{step}", out / f".tmp-{step}"
    clean(out)
    try:
        tmp.mkdir()
        listed = ((name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items())
        sha256 = write_safetensors(tmp / STATE, listed, sha256=True)
        files = {STATE: {"bytes": (tmp / STATE).stat().st_size, "sha256": sha256}}
        with open(tmp / MANIFEST, "w") as file:
            json.dump({"format": FORMAT, "step": step, **facts, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(tmp)
        if final.exists():  # of the same step: broken, or from before the run was resumed at an earlier state
            discard(final)
        os.rename(tmp, final)
    except OSError:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    sync(out)
    others = [folder for _, folder in checkpoints(out) if folder != final]
    for old in others[: max(0, len(others) - keep + 1)]:
        discard(old)
    return final


def discard(folder):
    """Removes a state so that no kill leaves half of one under its name."""
    trash = folder.with_name(f".tmp-old-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean(out: Path) -> None:
    """Removes what an interrupted save left."""
    for left in out.glob(".tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def rewind(out: Path, step: int) -> None:
    """Removes the states after `step` (-1: all): broken ones, or of a way that the run no longer takes."""
    for later, folder in checkpoints(out):
        if later > step:
            discard(folder)


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first, unverified."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def verify(folder: Path) -> dict:
    """The manifest of a checkpoint whose every file is whole. Raises DataError that names the first broken one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, step = manifest["files"], manifest["step"]
        recorded = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
        assert isinstance(step, int) and set(files) == {STATE}
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}, so its save never finished; choose another checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DataError(f"{folder / MANIFEST}: not a manifest of ours ({error}); choose another checkpoint") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder / MANIFEST}: format {manifest.get('format')}, this version reads {FORMAT}")
    for path, size, sha256 in recorded:
        if not path.is_file():
            raise DataError(f"{path}: missing; choose another checkpoint")
        if path.stat().st_size != size:
            raise DataError(f"{path}: {path.stat().st_size} bytes, its manifest says {size}; choose another checkpoint")
        if sha256_of(path) != sha256:
            raise DataError(f"{path}: changed since it was written (its sha256 differs); choose another checkpoint")
    return manifest


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def newest(out: Path, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """(folder, manifest) of the newest whole checkpoint, None if there is none at all; warn is told of broken ones.

    Raises DataError when there are checkpoints and none of them is whole.
    """
    broken = []
    for _, folder in reversed(checkpoints(out)):
        try:
            return folder, verify(folder)
        except DataError as error:
            broken.append(str(error))
            warn(f"passed over: {error}")
    if broken:
        raise DataError("no checkpoint is whole; --resume never starts over\n" + "\n".join(broken))
    return None


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fills the tensors in place from a verified checkpoint. Raises DataError listing names or shapes that differ."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            have = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
            want = {name: tuple(t.shape) for name, t in tensors.items()}
            if have != want:
                wrong = sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n))
                raise DataError(
                    f"{folder / STATE}: {len(wrong)} tensors do not fit this model, first "
                    + ", ".join(f"{n} ({have.get(n)}, wanted {want.get(n)})" for n in wrong[:3])
                )
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise DataError(f"{folder / STATE}: {error}; choose another checkpoint") from None

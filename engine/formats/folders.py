"""Folders of model files: what may be opened in one from elsewhere, and how a model in one is replaced whole."""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from engine.base.errors import DataError
from engine.base.files import sync_folder, write_synced
from engine.formats.tensor_files import MAX_HEADER_BYTES, first_line


def member(folder: Path, name: str) -> Path:
    """The path of a file in the folder. Raises DataError for names and links that lead out of it, and what is no file.

    Hugging Face's cache keeps snapshots/<revision>/<name> as links to blobs/ beside it: those may be followed.
    """
    if not name or name in (".", "..") or any(sign in name for sign in "/\\:\0"):
        raise DataError(f"{name!r} is not the name of a file in this folder; refused")
    root, path = folder.resolve(), folder / name
    cache = root.parent.parent
    if root.parent.name == "snapshots" and cache.name.startswith("models--"):
        root = cache
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} is missing, or a link to nothing") from error
    if not target.is_relative_to(root):
        raise DataError(f"{name} is a link out of the folder, to {target}; refused, copy the file in")
    if not stat.S_ISREG(mode):
        raise DataError(f"{name} is not a file")
    return path


def read_json(folder, name, problems) -> dict | None:
    """The object in a JSON file, or None and a problem."""
    try:
        path = member(folder, name)
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, wanted under {MAX_HEADER_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, wanted an object")
        return value
    except DataError as error:
        problems.append(str(error))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name}: not sound JSON: {first_line(error)}")


def json_writer(value) -> Callable[[Path], None]:
    return lambda path: write_synced(path, (json.dumps(value, indent=2) + "\n").encode())


def replace_files(folder: Path, writers: dict[str, Callable[[Path], None]], stale: str):
    """Writes files into a folder, the last name being the one without which it is no model, and removes old files whose
    names match stale. Killed at any moment, it leaves the old model, the new one, or none; never a mixture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = {name: folder / f".tmp-{name}" for name in writers}
    for old in folder.glob(".tmp-*"):
        if old.name.removeprefix(".tmp-") in writers or re.fullmatch(stale, old.name.removeprefix(".tmp-")):
            old.unlink()  # of a save that was killed
    try:
        for name, path in temporaries.items():
            writers[name](path)
    except BaseException:
        for path in temporaries.values():
            path.unlink(missing_ok=True)
        raise
    (folder / list(writers)[-1]).unlink(missing_ok=True)  # from here to the last rename there is no model
    sync_folder(folder)
    for old in folder.iterdir():
        if re.fullmatch(stale, old.name) and old.name not in writers:
            old.unlink()
    for name, path in temporaries.items():
        if name == list(writers)[-1]:
            sync_folder(folder)
        os.replace(path, folder / name)
    sync_folder(folder)

"""Model folders: opening files by names that are not trusted, and replacing one model by another."""

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.base.errors import DataError, summarize_error
from engine.base.files import sync_folder, write_synced
from engine.formats.tensor_files import MAX_HEADER_BYTES


class StandInError(DataError):
    """A file that is there in place of the real one."""

    def __init__(self, name: str, what: str):
        super().__init__(f"{name} is {what}")
        self.name, self.what = name, what


def explain_stand_in(start: bytes) -> str | None:
    """Return what a file that begins with these bytes is, and what to do, if it stands in for the real one."""
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run git lfs pull in its folder, or download the file"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file itself; download the file, where needed after accepting its licence"
    return None


def find_member(folder: Path, name: str) -> Path:
    """Return the path of a file in the folder. The name was read from another file and is not trusted.

    Raise DataError when the name or a link leads out of the folder, or when it is no regular file. Hugging Face's cache
    keeps snapshots/<revision>/<name> as links into blobs/, beside snapshots/; links within such a cache are followed.
    """
    if not name.isprintable() or name in ("", ".", "..") or any(sign in name for sign in "/\\:"):
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
    with path.open("rb") as file:
        if what := explain_stand_in(file.read(64)):
            raise StandInError(name, what)
    return path


def read_json_member(folder: Path, name: str, problems: list[str]) -> dict[str, Any] | None:
    """Return the object in a JSON file of the folder, or None after adding what is wrong with it to problems."""
    try:
        path = find_member(folder, name)
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, wanted under {MAX_HEADER_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin it with a BOM
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, wanted an object")
        return value
    except DataError as error:
        problems.append(str(error))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name}: not sound JSON: {summarize_error(error)}")
    return None


def make_json_writer(value: Any) -> Callable[[Path], None]:
    """Return a function that writes the value as indented JSON to a path, for replace_files."""
    return lambda path: write_synced(path, (json.dumps(value, indent=2) + "\n").encode())


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]], stale: str) -> None:
    """Write the files of a model, {name: writer}, into a folder in place of an old model.

    Without the file of the last name, such as config.json, the folder must not count as a model. That file is removed
    first and written last. So a process that is killed leaves the old model, the new one or none, never a mixture.

    stale: a pattern of the names of model files; such files are removed unless they are written again. Raise OSError
    when the disk refuses a new file; the old model is then unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = {name: folder / f".tmp-{name}" for name in writers}
    for old in folder.glob(".tmp-*"):
        if old.name.removeprefix(".tmp-") in writers or re.fullmatch(stale, old.name.removeprefix(".tmp-")):
            old.unlink()  # left by a save that was killed
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

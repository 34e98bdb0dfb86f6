"""Atomic writes of files: under a temporary name, synced, then renamed. And JSON objects, written and read."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from engine.base.errors import reading


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file so that a reader, even after a crash, finds the old content or all of the new, nothing between.

    Raise OSError when the disk refuses; the old file is then as it was and no temporary file is left.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file and wait until its content is on the disk. A crash on the way leaves part of it."""
    with path.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        sync_file(file)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON, atomically. Raise OSError when the disk refuses."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path, remedy: str = "repair the file, or copy it again") -> dict[str, Any]:
    """Return the object in a JSON file, or {} when there is no file.

    Raise DataError, with the remedy, for one that cannot be read or holds no JSON object: nothing may follow from
    damage that would not follow from the file.
    """
    with reading(path, remedy):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
    return content


def sync_file(file: IO[bytes] | IO[str]) -> None:
    """Flush an open file's buffers and wait until its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the renames and removals in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_json_safe(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN and infinities as null, lone surrogates as "?", 0-d arrays as numbers."""
    if isinstance(value, dict):
        return {str(key): make_json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [make_json_safe(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return make_json_safe(value.item() if hasattr(value, "item") else str(value))

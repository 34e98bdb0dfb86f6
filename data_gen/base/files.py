"""Files of rows: reading JSON and JSONL, and writing whole files."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_gen.base.cli import DataError

FIELDS = ("instruction", "input", "output")  # of an Alpaca row


def write_atomically(path: str | Path, chunks: Iterable[str]) -> None:
    """Write the texts to a file as UTF-8, whole or not at all: a temporary file is synced and then renamed."""
    path = Path(path)
    new = path.with_name(f".{path.name}.tmp")
    try:
        with open(new, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:  # chunks may be a generator that raises anything
        new.unlink(missing_ok=True)
        raise


def to_json_line(value: Any) -> str:
    """Return a value as one line of JSONL. A lone surrogate, which UTF-8 cannot hold, stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a .json file (a list) or a .jsonl file.

    Raise DataError, with the line or row, for a file that cannot be read or holds anything else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number} is not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: got {type(row).__name__}, wanted an object")
    return rows

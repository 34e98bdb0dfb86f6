"""Files of rows: reading JSON and JSONL, and writing whole files."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
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

    Raise DataError, with the line, for a file that cannot be read or holds anything else.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text, object_pairs_hook=make_object)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}:{error.colno} is not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line, object_pairs_hook=make_object))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number} is not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{RowPlace(path, number)}: got {type(row).__name__}, wanted an object")
    return rows


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file. Raise DataError for one that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {describe_encoding(error)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def describe_encoding(error: UnicodeDecodeError) -> str:
    """Return where a file is no UTF-8, and what to do."""
    return f"no UTF-8 at byte {error.start}; unpack it if it is an archive, or save it as UTF-8"


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. Raise ValueError for a repeated key, where json keeps the last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"got the key {twice!r} twice, wanted it once")
    return row


@dataclass(frozen=True)
class RowPlace:
    """The place of a row that read_rows returned, for a message: its text is what an editor jumps to."""

    path: str | Path
    number: int  # counted from 1

    def __str__(self) -> str:
        """Return FILE:LINE, or FILE:LINE:COLUMN where rows share the line, and the number where it is not the line.

        The file is read again, so that rows without a fault cost nothing.
        """
        text = read_text(self.path)
        if text.lstrip()[:1] != "[":
            lines = [n for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            return f"{self.path}:{lines[self.number - 1]}"
        starts = find_rows(text)
        start = starts[self.number - 1]
        line, begin = text.count("\n", 0, start) + 1, text.rfind("\n", 0, start) + 1
        end = text.find("\n", start)
        is_shared = sum(begin <= other < (len(text) if end < 0 else end) for other in starts) > 1
        column = f":{start - begin + 1}" if is_shared else ""
        return f"{self.path}:{line}{column}" + ("" if line == self.number and not column else f": row {self.number}")


def find_rows(text: str) -> list[int]:
    """Return the position of each element of the JSON list in a text."""
    blanks, decoder, starts = re.compile(r"[ \t\r\n,]*"), json.JSONDecoder(), list[int]()
    position = text.index("[") + 1
    while True:
        found = blanks.match(text, position)
        assert found is not None  # it may be empty
        position = found.end()
        if text[position] == "]":
            return starts
        starts.append(position)
        position = decoder.raw_decode(text, position)[1]

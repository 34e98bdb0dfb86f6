"""Validated rows of dataset files. A bad row is reported by file and number, and spoils no other row.

A file is mapped, not loaded, and split into rows before any row is parsed: a JSON list by its quotes and brackets,
JSONL by its newlines. Text stays exactly as it is in the file: nothing is stripped or normalised.
"""

import codecs
import json
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.text.templates import Message, Row

SEED_TASKS = Path(__file__).parents[2] / "data_gen" / "seed_tasks.jsonl"  # embedded: --data seed-tasks
MAX_ROW_BYTES = 8 << 20  # thousands of times an Alpaca row; parsing one takes up to 30 times its bytes
MAX_NESTING = 32  # levels of lists and objects; the row itself is one
SHOWN = 5  # bad rows that an error describes

BLANKS = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(rb"-?(?:[0-9][0-9.eE+-]*|Infinity)|NaN|true|false|null")
# What decides where an element of a list ends. There is no pattern for a whole string, since re would need memory for
# each of its characters. Branches that begin with a literal are three times as fast as a character class.
TOKEN = re.compile(rb'\\.|"|\n|\{|\}|\[|\]')
KINDS: dict[type, str] = {
    str: "a string",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def resolve_data_paths(names: Iterable[str]) -> list[Path]:
    """Return the files that --data names. "seed-tasks" names the embedded seed tasks."""
    return [SEED_TASKS if name == "seed-tasks" else Path(name) for name in names]


@dataclass(slots=True)
class Skipped:
    """A bad row that was left out."""

    source: str
    reason: str


class BadRow(ValueError):
    """A row is not usable; the text says why."""


def read_rows(
    paths: Sequence[Path],
    skip_bad_rows: bool = False,
    progress: Callable[[int, int], None] | None = None,
    require_answers: bool = True,
) -> tuple[list[Row], list[Skipped]]:
    """Return (rows, bad rows that were skipped) of Alpaca or chat files, in order. The content tells JSON from JSONL.

    require_answers: every row must have an answer. If False, rows are prompts: they may lack output or end with a user
    message. progress(done_bytes, total_bytes) is called every 1000 rows.

    Raise DataError with file and row. It lists all bad rows at once, unless skip_bad_rows is set. A file that cannot be
    read, a broken list, or having no row left is always an error.
    """
    rows: list[Row] = []
    skipped: list[Skipped] = []
    total_bytes, done_bytes = sum(len(map_file(path)) for path in paths), 0  # finds a missing file before reading any
    for path in paths:
        data, n_before = map_file(path), len(rows) + len(skipped)
        for number, start, end in split_rows(data, path):
            source = f"{path}:{number}"
            try:
                rows.append(parse_row(data, start, end, source, require_answers))
            except BadRow as bad:
                skipped.append(Skipped(source, str(bad)))
            if progress and number % 1000 == 0:
                progress(done_bytes + start, total_bytes)
        if len(rows) + len(skipped) == n_before:
            raise DataError(f"{path}: got no rows, wanted at least one; leave the file out")
        done_bytes += len(data)
        if progress:
            progress(done_bytes, total_bytes)
    if skipped and not (skip_bad_rows and rows):
        remedy = "--skip-bad-rows drops them" if rows else "no row is left, repair the data"
        lines = [f"data: got {len(skipped)} bad of {len(rows) + len(skipped)} rows, wanted none; {remedy}"]
        lines += [f"  {bad.source}: {bad.reason}" for bad in skipped[:SHOWN]]
        if len(skipped) > SHOWN:
            lines.append(f"  and {len(skipped) - SHOWN} more")
        raise DataError("\n".join(lines))
    if not rows:
        raise DataError("data: got no files, wanted at least one; pass --data FILE")
    return rows, skipped


def map_file(path: Path) -> mmap.mmap:
    """Return the file's bytes, mapped; they are unmapped with the last reference. Raise DataError."""
    try:
        info = os.stat(path)  # before open(), which waits for a writer when the path is a pipe
        if stat.S_ISREG(info.st_mode) and info.st_size:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: got '{error.strerror}', wanted a dataset; check path and permissions") from None
    kind = {stat.S_IFREG: "an empty file", stat.S_IFDIR: "a folder"}.get(stat.S_IFMT(info.st_mode), "no regular file")
    raise DataError(f"{path}: got {kind}, wanted rows as JSON or JSONL; name a file that holds some")


# ---- a file -> the spans of its rows --------------------------------------------------------------------------------

Span = tuple[int, int, int | None]  # number of the row, first byte, end; None: the file ends inside the row


def split_rows(data: mmap.mmap, path: Path) -> Iterator[Span]:
    """Return the spans of a file's rows. Raise DataError for a file that is neither a JSON list nor JSONL."""
    start = 3 if data[:3] == codecs.BOM_UTF8 else 0
    first = skip_blanks(data, start)
    byte = data[first : first + 1]
    if byte == b"[":
        return split_list(data, first + 1, path)
    if byte == b"{":
        return split_lines(data, start)
    got = f"the byte {byte!r}" if byte else "blanks alone"
    raise DataError(f"{path}: got {got}, wanted '[' (JSON) or '{{' (JSONL) at its start; save it as one, in UTF-8")


def skip_blanks(data: mmap.mmap, start: int, *end: int) -> int:
    """Return the position of the first non-blank byte from start on; end, or the file's end, when there is none."""
    match = BLANKS.match(data, start, *end)
    assert match is not None  # it may be empty
    return match.end()


def split_lines(data: mmap.mmap, start: int) -> Iterator[Span]:
    """Yield the spans of the lines that are not blank. The number of a row is its line number."""
    number = 0
    while start < len(data):
        number += 1
        newline = data.find(b"\n", start)
        end = len(data) if newline < 0 else newline
        if skip_blanks(data, start, end) < end:
            yield number, start, end
        start = end + 1


def split_list(data: mmap.mmap, position: int, path: Path) -> Iterator[Span]:
    """Yield the spans of the elements of the list that begins before position. Raise DataError for a broken list."""

    def broken(position: int, wanted: str) -> DataError:
        got = repr(data[position : position + 1]) if position < len(data) else "the end of the file"
        remedy = "repair the list, its other rows cannot be told apart"
        return DataError(f"{path}:{number or 1}: got {got} at byte {position}, wanted {wanted}; {remedy}")

    number, position = 0, skip_blanks(data, position)
    more = data[position : position + 1] != b"]"
    if not more:
        position += 1
    while more:
        number, start = number + 1, skip_blanks(data, position)
        end = find_element_end(data, start)
        if end is None and not is_cut_off(data, start):
            raise broken(start, "a complete row")
        yield number, start, end
        if end is None:
            return
        position = skip_blanks(data, end)
        if data[position : position + 1] not in (b",", b"]"):
            raise broken(position, "',' or ']' after this row")
        more = data[position : position + 1] == b","
        position += 1
    position = skip_blanks(data, position)
    if position < len(data):
        raise broken(position, "nothing after the list")


def find_element_end(data: mmap.mmap, start: int) -> int | None:
    """Return the end of the JSON value at start, or None when there is no complete value.

    A raw newline ends a string, since no JSON string may contain one. So in an indented list, a missing quote spoils
    only its own row.
    """
    if scalar := SCALAR.match(data, start):
        return scalar.end()
    if data[start : start + 1] not in (b"{", b"[", b'"'):
        return None
    depth, quoted = 0, False
    for match in TOKEN.finditer(data, start):
        token = match[0]
        if token == b'"':
            quoted = not quoted
        elif token == b"\n":
            quoted = False
        elif not quoted and token in b"{[":
            depth += 1
        elif not quoted and token in b"}]":
            depth -= 1
        if not depth and not quoted:
            return match.end()
    return None


def is_cut_off(data: mmap.mmap, start: int) -> bool:
    """Return whether the object at start is valid JSON up to the end of the file, and only its end is missing.

    It is not if a bracket is missing in the middle. Then the rows after that must not be dropped as if they were one
    row.
    """
    if data[start : start + 1] != b"{" or len(data) - start > MAX_ROW_BYTES:
        return False
    try:
        text = codecs.utf_8_decode(data[start:], "strict", False)[0].rstrip()  # accepts half a character at the end
        DECODER.decode(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or error.pos >= len(text) - len("-Infinit")
    except (ValueError, RecursionError):
        pass
    return False


# ---- a span -> a row ------------------------------------------------------------------------------------------------


def parse_row(data: mmap.mmap, start: int, end: int | None, source: str, require_answers: bool) -> Row:
    """Return the row in data[start:end]. Raise BadRow."""
    if end is None:
        raise BadRow(f"the file is cut off inside this row, which starts at byte {start}")
    if end - start > MAX_ROW_BYTES:
        raise BadRow(f"got {end - start} bytes, wanted at most {MAX_ROW_BYTES} (MAX_ROW_BYTES)")
    row = require_type(parse_json(data[start:end], start), dict, "row")
    if "messages" in row:
        if "instruction" in row:
            raise BadRow("got both messages and instruction, wanted one of them")
        return Row(source, parse_messages(require_type(row["messages"], list, "messages"), require_answers))
    instruction = get_text(row, "instruction")
    output = get_text(row, "output") if require_answers or row.get("output") is not None else ""
    input = "" if row.get("input") is None else get_text(row, "input")
    if not instruction and not input:
        raise BadRow("got instruction and input both empty, wanted text in one of them")
    return Row(source, None, instruction, input, output)


def parse_messages(messages: list[Any], require_answers: bool) -> tuple[Message, ...]:
    """Return the messages of a chat. Raise BadRow.

    A chat may begin with a system message. Then user and assistant alternate, and the assistant is last. Unless
    require_answers, the user may be last.
    """
    parsed, role = [], "none"
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        require_type(message, dict, name)
        wanted = "assistant" if role == "user" else "user"
        role, content = get_text(message, "role", name + "."), get_text(message, "content", name + ".")
        if role != wanted and not (role == "system" and i == 0):
            or_system = " or a system message" if i == 0 else ""
            raise BadRow(f"{name}.role: got {shorten(role)}, wanted '{wanted}'{or_system}")
        parsed.append((role, content))
    if role != "assistant" and (require_answers or role != "user"):
        raise BadRow(f"messages: got {role} as the last role, wanted assistant")
    return tuple(parsed)


def parse_json(raw: bytes, offset: int) -> Any:
    """Return the JSON value in raw, which lies at offset in its file. Raise BadRow."""
    try:
        value = DECODER.decode(text := raw.decode())
        if not is_deeper(value, MAX_NESTING):
            return value
    except UnicodeDecodeError as error:
        raise BadRow(f"got invalid UTF-8 at byte {offset + error.start} of the file") from None
    except json.JSONDecodeError as error:
        position = offset + len(text[: error.pos].encode())
        raise BadRow(f"got invalid JSON at byte {position} of the file ({error.msg})") from None
    except RecursionError:
        pass
    raise BadRow(f"got lists or objects nested deeper than {MAX_NESTING} levels")


def is_deeper(value: Any, levels: int) -> bool:
    """Return whether a value nests lists and objects deeper than this many levels."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (levels == 0 or any(is_deeper(item, levels - 1) for item in value))


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. Raise BadRow for a repeated key, where json keeps the last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadRow(f"got the key {shorten(key)} twice, wanted it once")
            seen.add(key)
    return row


# Integers become floats. No row needs an integer, and int() of millions of digits takes quadratic time or is refused.
DECODER = json.JSONDecoder(object_pairs_hook=make_object, parse_int=float)


def require_type(value: Any, kind: type, name: str) -> Any:
    """Return the value. Raise BadRow, with this name, when it is of another type."""
    if not isinstance(value, kind):
        raise BadRow(f"{name}: got {KINDS[type(value)]}, wanted {KINDS[kind]}")
    return value


def get_text(row: dict[str, Any], key: str, prefix: str = "") -> str:
    """Return the string at key. Raise BadRow when it is missing, no string or not encodable.

    JSON may escape half a surrogate pair, which UTF-8 cannot hold.
    """
    if key not in row:
        raise BadRow(f"{prefix}{key}: missing, got the keys {shorten(list(row))}")
    value = require_type(row[key], str, prefix + key)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start]
        raise BadRow(f"{prefix}{key}: got the lone surrogate {lone!r} at character {error.start}") from None
    return value


def shorten(value: Any) -> str:
    """Return the repr of a value, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

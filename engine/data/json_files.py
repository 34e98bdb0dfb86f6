"""JSON and JSONL files: the spans of their rows, and the value of each.

A file is split before any row is parsed: a list by its quotes and brackets, JSONL by its newlines. So a bad row spoils
no other, and memory is bounded by one row.
"""

import codecs
import json
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.base.errors import DataError
from engine.data.values import MAX_ROW_BYTES, NO_UTF8, BadRow, Record, shorten

MAX_NESTING = 32  # levels of lists and objects; the row itself is one
MAX_SCAN_BYTES = 256 << 20  # of a file that are searched for the end of its first object
CHUNK = 1 << 16  # bytes whose lines are counted at a time
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
MAX_DIGITS = 18  # of an integer; int() of millions of digits takes quadratic time or is refused
# Keys that make an object a row: no list under one of them is a list of rows.
ROW_KEYS = ("messages", "conversations", "instruction", "prompt", "completion", "text", "chosen")
TEXTS = ("instruction", "output", "text")  # keys whose values are never lists
EACH = "of each"  # the rows of an object that has each under a key of its own

BLANKS = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(rb"-?(?:[0-9][0-9.eE+-]*|Infinity)|NaN|true|false|null")
# What decides where an element of a list ends. There is no pattern for a whole string, since re would need memory for
# each of its characters. Branches that begin with a literal are three times as fast as a character class.
TOKEN = re.compile(rb'\\.|"|\n|\{|\}|\[|\]')


def read_json_records(data: mmap.mmap, path: Path) -> Iterator[Record]:
    """Yield the values of a JSON list or of JSONL lines, each with its number, or with why it is bad."""
    for span in split_rows(data, path):
        value: Any
        try:
            value = load_span(data, span.start, span.end)
        except BadRow as bad:
            value = bad
        yield Record(span.number, span.line, span.column, span.start, value)


def load_span(data: mmap.mmap, start: int, end: int | None) -> Any:
    """Return the value in data[start:end]. Raise BadRow."""
    if end is None:
        raise BadRow(f"the file is cut off inside this row, which starts at byte {start}")
    if end - start > MAX_ROW_BYTES:
        raise BadRow(f"got {end - start} bytes, wanted at most {MAX_ROW_BYTES} (MAX_ROW_BYTES)")
    return parse_json(data[start:end], start)


# ---- a file -> the spans of its rows --------------------------------------------------------------------------------


class Span(NamedTuple):
    """Where a row lies. Lines and columns count from 1; a column of 0: no other row begins on the line."""

    number: int  # of the row, counted from 1; the line, where rows are lines
    line: int
    column: int  # of its first character
    start: int  # its first byte
    end: int | None  # None: the file ends inside the row


class LineCounter:
    """The line and column of positions that only move forward, so that each byte of a file is looked at once."""

    def __init__(self, data: mmap.mmap, start: int):
        self.data, self.position, self.line, self.column = data, start, 1, 1

    def move_to(self, position: int) -> tuple[int, int]:
        """Return (line, column in characters) of a position at or after the last one."""
        for begin in range(self.position, position, CHUNK):
            chunk = self.data[begin : min(begin + CHUNK, position)]
            if n_lines := chunk.count(b"\n"):
                self.line, self.column = self.line + n_lines, 1
                chunk = chunk[chunk.rfind(b"\n") + 1 :]
            self.column += len(chunk.translate(None, CONTINUATION))
        self.position = position
        return self.line, self.column


def split_rows(data: mmap.mmap, path: Path) -> Iterator[Span]:
    """Return the spans of a file's rows. Raise DataError for a file that is neither a JSON list nor JSONL."""
    start = 3 if data[:3] == codecs.BOM_UTF8 else 0
    first = skip_blanks(data, start)
    byte = data[first : first + 1]
    if byte == b"[":
        return split_list(data, first + 1, path, LineCounter(data, start))
    if byte == b"{":
        if problem := explain_object(data, first):
            raise DataError(f"{path}: {problem}")
        return split_lines(data, start)
    got = f"the byte {byte!r}" if byte else "blanks alone"
    raise DataError(
        f"{path}: got {got}, wanted '[' (JSON) or '{{' (JSONL) at its start; save it as one, in UTF-8, or as .csv"
    )


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
            yield Span(number, number, 0, start, end)
        start = end + 1


def split_list(data: mmap.mmap, position: int, path: Path, lines: LineCounter) -> Iterator[Span]:
    """Yield the spans of the elements of the list that begins before position. Raise DataError for a broken list."""

    def broken(position: int, wanted: str) -> DataError:
        row = f"row {number}: " if number else ""
        got = repr(data[position : position + 1]) if position < len(data) else "the end of the file"
        remedy = "repair the list, its other rows cannot be told apart"
        return DataError(f"{path}:{line}:{column}: {row}got {got} at byte {position}, wanted {wanted}; {remedy}")

    number, start = 0, skip_blanks(data, position)
    line, column = lines.move_to(start)
    more, shares_line = data[start : start + 1] != b"]", False
    if not more:
        start = skip_blanks(data, start + 1)
        line, column = lines.move_to(start)
    while more:
        number, end = number + 1, find_element_end(data, start)
        if end is None and not is_cut_off(data, start):
            raise broken(start, "a complete row")
        if end is None:
            yield Span(number, line, column if shares_line else 0, start, None)
            return
        position = skip_blanks(data, end)
        if data[position : position + 1] not in (b",", b"]"):
            raise broken(position, "',' or ']' after this row")
        more = data[position : position + 1] == b","
        position = skip_blanks(data, position + 1)
        next_line, next_column = lines.move_to(position)
        next_shares = more and next_line == line
        yield Span(number, line, column if shares_line or next_shares else 0, start, end)
        start, line, column, shares_line = position, next_line, next_column, next_shares
    if start < len(data):
        raise broken(start, "nothing after the list")


def find_element_end(data: mmap.mmap, start: int, limit: int = sys.maxsize) -> int | None:
    """Return the end of the JSON value at start, or None when there is no complete value before limit.

    A raw newline ends a string, since no JSON string may contain one. So in an indented list, a missing quote spoils
    only its own row.
    """
    if scalar := SCALAR.match(data, start):
        return scalar.end()
    if data[start : start + 1] not in (b"{", b"[", b'"'):
        return None
    depth, quoted = 0, False
    for match in TOKEN.finditer(data, start, limit):
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


# ---- an object that holds rows, or is one over several lines --------------------------------------------------------


def explain_object(data: mmap.mmap, start: int) -> str | None:
    """Return what is wrong with a file that begins with an object, where that is not a row on a line of its own.

    None for JSONL, also where its first line is broken: that is a bad row.
    """
    newline = data.find(b"\n", start)
    end = find_element_end(data, start, start + MAX_SCAN_BYTES)
    several_lines = end is not None and 0 <= newline < end
    if end is None or (not several_lines and skip_blanks(data, end) < len(data)):
        return None
    if end - start <= MAX_ROW_BYTES:
        try:
            parse_json(data[start:end], start)
        except BadRow:
            return None
    if holds_columns(data, start):
        return (
            "got one object whose keys are columns, wanted rows; pandas writes them by "
            "to_json(FILE, orient='records', lines=True)"
        )
    if key := find_wrapped_rows(data, start):
        how = "`jq '[.[]]'`" if key == EACH else "`jq .KEY`"
        return (
            f"got one object whose rows are under the key {key}, wanted the rows themselves; save what is under "
            f"that key as a list, as {how} does"
        )
    if several_lines:
        return "got a JSON object over several lines, wanted rows in a list, [{...}, {...}], or one a line (JSONL)"
    return None


def find_wrapped_rows(data: mmap.mmap, start: int, depth: int = 3) -> str | None:
    """Return the key of an object under which the most bytes of rows lie, such as data or data.train; else None.

    A list of objects is rows, and so are objects under more than one key when they are all that there is.
    """
    members = list(iterate_members(data, start))
    if any(key in ROW_KEYS for key, _, _ in members):
        return None
    found = {key: end - first for key, first, end in members if begins_objects(data, first)}
    if found:
        return shorten(max(found, key=found.__getitem__))
    objects = [(key, first) for key, first, _ in members if data[first : first + 1] == b"{"]
    if depth:
        for key, first in objects:
            if inner := find_wrapped_rows(data, first, depth - 1):
                return shorten(f"{key}.{inner.strip(chr(39))}")
    return EACH if len(objects) > 1 and len(objects) == len(members) else None


def holds_columns(data: mmap.mmap, start: int) -> bool:
    """Return whether an object is a table by its columns, as pandas' to_json writes one: no row has such texts."""
    begins = {key: data[first : first + 1] for key, first, _ in iterate_members(data, start)}
    is_odd = any(begins.get(key) == b"{" for key in ROW_KEYS) or any(begins.get(key) == b"[" for key in TEXTS)
    return is_odd and set(begins.values()) <= {b"{", b"["}


def begins_objects(data: mmap.mmap, start: int) -> bool:
    """Return whether a list that begins with an object is at start."""
    first = skip_blanks(data, start + 1)
    return data[start : start + 1] == b"[" and data[first : first + 1] == b"{"


def iterate_members(data: mmap.mmap, start: int) -> Iterator[tuple[str, int, int]]:
    """Yield (key, first byte of the value, its end) for each member of the sound object at start."""
    position = skip_blanks(data, start + 1)
    while data[position : position + 1] == b'"':
        end = find_element_end(data, position)
        key = json.loads(data[position:end])
        first = skip_blanks(data, skip_blanks(data, end or position) + 1)  # over the colon
        end = find_element_end(data, first)
        if end is None:
            return
        yield key, first, end
        position = skip_blanks(data, skip_blanks(data, end) + 1)  # over the comma


# ---- a span -> its value --------------------------------------------------------------------------------------------


def parse_json(raw: bytes, offset: int) -> Any:
    """Return the JSON value in raw, which lies at offset in its file. Raise BadRow."""
    try:
        value = DECODER.decode(text := raw.decode())
        if not is_deeper(value, MAX_NESTING):
            return value
    except UnicodeDecodeError as error:
        raise BadRow(f"{NO_UTF8} at byte {offset + error.start} of the file") from None
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


def parse_integer(digits: str) -> int | float:
    """Return the number of a JSON integer, as a float where it has more digits than any row needs."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=make_object, parse_int=parse_integer)

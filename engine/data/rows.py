"""Dataset files -> validated rows, one row at a time: a bad row is named by file and number and costs no other row.

A file is mapped, not loaded, and split into rows before any of it is parsed: a list by its quotes and brackets, JSONL
by its newlines. Text is kept exactly as the file has it: nothing is stripped or normalised.
"""

import codecs
import json
import mmap
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import DataError
from engine.text.templates import Row

MAX_ROW_BYTES = 8 << 20  # thousands of times an Alpaca row; parsing one takes up to 30 times its bytes
MAX_NESTING = 32  # levels of lists and objects; the row itself is one
SHOWN = 5  # bad rows that an error spells out

BLANKS = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(rb"-?(?:[0-9][0-9.eE+-]*|Infinity)|NaN|true|false|null")
# What decides where a list's element ends. A pattern for a whole string would need memory for each of its characters;
# a class among these branches, which begin with a literal each, would make re three times as slow.
TOKEN = re.compile(rb'\\.|"|\n|\{|\}|\[|\]')
KINDS = {str: "a string", float: "a number", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}


@dataclass(slots=True)
class Skipped:
    """One bad row."""

    source: str
    reason: str


class BadRow(ValueError):
    """Why a row is bad."""


def read_rows(
    paths: Sequence[Path], skip_bad_rows: bool = False, progress=None, answers: bool = True
) -> tuple[list[Row], list[Skipped]]:
    """The rows of Alpaca or chat files, JSON list or JSONL (told apart by content), in order; and the bad rows skipped.

    answers: whether a row must hold one; without, rows are prompts: no output, or a user's message at the end, will do.
    Raises DataError naming file and row: for all bad rows at once unless skip_bad_rows, and in any case for a file that
    cannot be read, a broken list, or no row left. progress(done_bytes, total_bytes) is called every 1000 rows.
    """
    rows, skipped = [], []
    total_bytes, done_bytes = sum(len(mapped(path)) for path in paths), 0  # a missing file is found before any is read
    for path in paths:
        data, n_before = mapped(path), len(rows) + len(skipped)
        for number, start, end in split(data, path):
            source = f"{path}:{number}"
            try:
                rows.append(parse_row(data, start, end, source, answers))
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
        lines += [f"  and {len(skipped) - SHOWN} more"] * (len(skipped) > SHOWN)
        raise DataError("\n".join(lines))
    if not rows:
        raise DataError("data: got no files, wanted at least one; pass --data FILE")
    return rows, skipped


def mapped(path):
    """The file as bytes that are read when touched, unmapped with the last reference. Raises DataError."""
    try:
        info = os.stat(path)  # before open(), which on a pipe waits for a writer
        if stat.S_ISREG(info.st_mode) and info.st_size:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: got '{error.strerror}', wanted a dataset; check path and permissions") from None
    kind = {stat.S_IFREG: "an empty file", stat.S_IFDIR: "a folder"}.get(stat.S_IFMT(info.st_mode), "no regular file")
    raise DataError(f"{path}: got {kind}, wanted rows as JSON or JSONL; name a file that holds some")


def split(data, path):
    """Yields (number, start, end) of each row; end is None for a last element that the end of the file cuts off."""
    start = 3 if data[:3] == codecs.BOM_UTF8 else 0
    first = BLANKS.match(data, start).end()
    byte = data[first : first + 1]
    if byte == b"[":
        return split_list(data, first + 1, path)
    if byte == b"{":
        return split_lines(data, start)
    got = f"the byte {byte!r}" if byte else "blanks alone"
    raise DataError(f"{path}: got {got}, wanted '[' (JSON) or '{{' (JSONL) at its start; save it as one, in UTF-8")


def split_lines(data, start):
    number = 0
    while start < len(data):
        number += 1
        newline = data.find(b"\n", start)
        end = len(data) if newline < 0 else newline
        if BLANKS.match(data, start, end).end() < end:
            yield number, start, end
        start = end + 1


def split_list(data, position, path):
    """The elements of the list that was opened before position. Raises DataError where the list itself is broken."""

    def broken(position, wanted):
        got = repr(data[position : position + 1]) if position < len(data) else "the end of the file"
        remedy = "repair the list, its other rows cannot be told apart"
        return DataError(f"{path}:{number or 1}: got {got} at byte {position}, wanted {wanted}; {remedy}")

    number, position = 0, BLANKS.match(data, position).end()
    comma = data[position : position + 1] != b"]"
    position += not comma
    while comma:
        number, start = number + 1, BLANKS.match(data, position).end()
        end = element_end(data, start)
        if end is None and not is_cut_off(data, start):
            raise broken(start, "a complete row")
        yield number, start, end
        if end is None:
            return
        position = BLANKS.match(data, end).end()
        if data[position : position + 1] not in (b",", b"]"):
            raise broken(position, "',' or ']' after this row")
        comma = data[position : position + 1] == b","
        position += 1
    position = BLANKS.match(data, position).end()
    if position < len(data):
        raise broken(position, "nothing after the list")


def element_end(data, start):
    """Where the JSON value at start ends, None if it does not. A raw newline, which no JSON string may hold, ends a
    string, so that in an indented list a lost quote spoils its own row alone."""
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


def is_cut_off(data, start):
    """Whether an object starts here that lacks nothing but its end: the parser finds no fault before the end. After a
    lost bracket it does find one, and the rows behind it must not be dropped as if they were one."""
    if data[start : start + 1] != b"{" or len(data) - start > MAX_ROW_BYTES:
        return False
    try:
        text = codecs.utf_8_decode(data[start:], "strict", False)[0].rstrip()  # half a character at the end is no fault
        DECODER.decode(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or error.pos >= len(text) - len("-Infinit")
    except (ValueError, RecursionError):
        pass
    return False


def parse_row(data, start, end, source, answers):
    """The Row in data[start:end]. Raises BadRow."""
    if end is None:
        raise BadRow(f"the file is cut off inside this row, which starts at byte {start}")
    if end - start > MAX_ROW_BYTES:
        raise BadRow(f"got {end - start} bytes, wanted at most {MAX_ROW_BYTES} (MAX_ROW_BYTES)")
    row = check(parse_json(data[start:end], start), dict, "row")
    if "messages" in row:
        if "instruction" in row:
            raise BadRow("got both messages and instruction, wanted one of them")
        return Row(source, parse_messages(check(row["messages"], list, "messages"), answers))
    instruction = text_of(row, "instruction")
    output = text_of(row, "output") if answers or row.get("output") is not None else ""
    input = "" if row.get("input") is None else text_of(row, "input")
    if not instruction and not input:
        raise BadRow("got instruction and input both empty, wanted text in one of them")
    return Row(source, None, instruction, input, output)


def parse_messages(messages, answers):
    """((role, content), ...): a system message or none, then user and assistant in turn, an assistant's at the end; or,
    of a prompt, a user's."""
    parsed, role = [], "none"
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        check(message, dict, name)
        wanted = "assistant" if role == "user" else "user"
        role, content = text_of(message, "role", name + "."), text_of(message, "content", name + ".")
        if role != wanted and not (role == "system" and i == 0):
            raise BadRow(f"{name}.role: got {short(role)}, wanted '{wanted}'{' or a system message' * (i == 0)}")
        parsed.append((role, content))
    if role != "assistant" and (answers or role != "user"):
        raise BadRow(f"messages: got {role} as the last role, wanted assistant")
    return tuple(parsed)


def parse_json(raw, offset):
    """The value in raw, which lies at offset in its file. Raises BadRow."""
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


def is_deeper(value, levels):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inside is not None and (levels == 0 or any(is_deeper(item, levels - 1) for item in inside))


def unique(pairs):
    """The object of these pairs. Raises BadRow for a key that comes twice, of which json would keep the last."""
    if len(row := dict(pairs)) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise BadRow(f"got the key {short(twice)} twice, wanted it once")
    return row


# Integers become floats: none is wanted, and int() takes quadratic time where it takes millions of digits at all.
DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_int=float)


def check(value, kind, name):
    if not isinstance(value, kind):
        raise BadRow(f"{name}: got {KINDS[type(value)]}, wanted {KINDS[kind]}")
    return value


def text_of(row, key, prefix=""):
    """The string at key, checked to be encodable: JSON may escape half a surrogate pair, which no UTF-8 can hold."""
    if key not in row:
        raise BadRow(f"{prefix}{key}: missing, got the keys {short(list(row))}")
    value = check(row[key], str, prefix + key)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start]
        raise BadRow(f"{prefix}{key}: got the lone surrogate {lone!r} at character {error.start}") from None
    return value


def short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Parsing the text of one answer: its whole tasks, and a problem for each task that is broken.

A model that was asked for {"tasks": [{"instruction", "input", "output"}, ...]} may wrap its answer in a fence or in
prose, think aloud first, write a bare list or one object a line, forget commas, or be cut off by its token limit. So
the answer is not parsed as a document. Every `{"` outside of an object begins one. An object with the fields of a task
is a task. After a broken object, reading goes on at the next `{"` behind the object's start. JSON inside a string stays
text, because its quotes are escaped.

It takes linear time: only the complete parts of a broken object are read twice, and where a string ends does not depend
on where reading began.
"""

import json
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from data_gen.base.files import FIELDS

KINDS = {
    "truncated": "the answer reached its token limit inside this task",
    "malformed": "this task is broken JSON",
    "missing field": "this task has no instruction or no output",
    "wrong type": "a field of this task is not a text",
    "no items": "the answer holds no task: it is empty, prose or other JSON",
}
MAX_DEPTH = 64  # levels of objects and lists; a task is on the third
MAX_PROBLEMS = 1000  # reported of one answer: a flood of braces may hold millions
EXCERPT = 200  # characters
LONGEST_KEY = 100  # characters of a key that are compared

BLANK = r"\s\ufeff\u200b\u2060"
BLANKS = re.compile(f"[{BLANK}]*")
BETWEEN = re.compile(f"[{BLANK},\uff0c]*")  # too many or too few commas lose nothing
START = re.compile(rf'\{{[{BLANK}]*"')
SCALAR = re.compile(r"-?(?:[0-9][0-9.eE+-]*|Infinity)|true|false|null|True|False|None|NaN")
MARK = re.compile(r'["{}\[\]]')  # if none of these follows the place where an object breaks, the answer ends there
NAMES_FIELD = re.compile(rf'"[{BLANK}]*(?:{"|".join(FIELDS)})\b', re.IGNORECASE)
STRAY = re.compile(rf'"[{BLANK}]*instruction[{BLANK}]*"[{BLANK}]*[:\uff1a]', re.IGNORECASE)  # a task without its brace
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {char: char for char in "\"\\/'\n"}
SURROGATE = re.compile("[\ud800-\udfff]")
THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)
CLOSERS = {"{": "}", "[": "]"}
NULL, OTHER = object(), object()  # values of a field that are no text


@dataclass(slots=True)
class Level:
    """An object or a list that is being read."""

    start: int
    n_before: int  # entries found before this level began
    fields: dict[str, Any] | None  # {field of a task: value}; None for a list
    closer: str


Entry = tuple[str, Any]  # ("item", task) or (a kind of KINDS, its start)


def parse_answer(text: str, truncated: bool) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """Return the whole tasks of an answer and its problems, each in order.

    A task is {"instruction", "input", "output"} with texts that UTF-8 can hold. A problem is (a kind of KINDS, an
    excerpt). truncated says that the token limit cut the answer off. A key may differ in case and blanks; other keys
    are ignored. A missing or null input becomes "".
    """
    tasks = parse_plain(text)
    if tasks:
        return tasks, []
    entries: list[Entry] = []
    done, position, is_reported = 0, skip_thoughts(text), False
    while True:
        start = START.search(text, position)
        stray = None if is_reported else STRAY.search(text, position, start.start() if start else len(text))
        if stray:
            entries.append(("malformed", stray.start()))
        if not start:
            break
        end, broken, innermost, done = read_object(text, start.start(), entries, done)
        if broken is None:
            position, is_reported = end, False
            continue
        cut_off, first_unread = not MARK.search(text, end), max(broken, done)
        position = max(innermost + 1, done)
        if NAMES_FIELD.search(text, first_unread, end) or (innermost >= done and not is_reported):
            entries.append(("truncated" if cut_off and truncated else "malformed", first_unread))
            is_reported = True  # one problem for everything up to the next object
    items = [payload for kind, payload in entries if kind == "item"]
    problems = [(kind, make_excerpt(text, where)) for kind, where in entries if kind != "item"][:MAX_PROBLEMS]
    if not items and not problems:
        problems = [("no items", make_excerpt(text, 0))]
    return items, problems


def parse_plain(text: str) -> list[dict[str, str]]:
    """Return the tasks of an answer that is what was asked for to the letter, else [].

    That is JSON, {"tasks": [...]} without another key, each task with the three texts alone. Most answers are, and the
    json module reads them sooner than parse_answer does.
    """
    if "\\u00" in text:  # a key may be spelt so
        return []
    try:
        found = json.loads(text, object_pairs_hook=read_pairs)
    except (ValueError, RecursionError):
        return []
    tasks = found.get("tasks") if isinstance(found, dict) and len(found) == 1 else None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and len(task) == len(FIELDS) for task in tasks):
        return []
    if not text.isascii() or "\\u" in text:
        tasks = [{name: join_surrogates(task[name]) for name in FIELDS} for task in tasks]
    return tasks


def read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a task of three texts in the order of FIELDS, or the tasks of an answer. Raises ValueError for others."""
    fields = dict(pairs)
    if len(pairs) == len(fields) == len(FIELDS) and set(fields) == set(FIELDS):
        if all(type(value) is str for value in fields.values()):
            return {name: fields[name] for name in FIELDS}
    elif len(pairs) == 1 and pairs[0][0] == "tasks":
        return fields
    raise ValueError("not as asked for")


def skip_thoughts(text: str) -> int:
    """Return the position behind the thoughts of a model that thinks aloud, 0 if it did not."""
    opened = THOUGHT.match(text)
    if opened:
        end = text.find(f"</{opened[1]}>")
        return len(text) if end < 0 else end
    end = text.rfind("</think>")  # the opening tag may be part of the chat template
    bare = text.lstrip()[:1] not in ("{", "[", "`")
    return end if end >= 0 and bare and START.search(text, end) else 0


def read_object(text: str, start: int, entries: list[Entry], done: int) -> tuple[int, int | None, int, int]:
    """Read the object at start and append its tasks and problems to entries. done is the end of the last task.

    Return (end, None, 0, done). For an object that breaks at end, return (end, start of the broken task, start of the
    innermost object, done).
    """
    stack, position = [Level(start, len(entries), {}, "}")], start + 1
    while stack:
        top, position = stack[-1], skip(BETWEEN, text, position)
        if text.startswith(top.closer, position):
            position += 1
            stack.pop()
            if top.fields is not None and close_object(top, top.fields, entries):
                done = position
            continue
        name = None
        if top.fields is not None:
            key, position = read_string(text, position)
            position = skip(BLANKS, text, position)
            if key is None:
                break
            name = key[:LONGEST_KEY].strip().lower()
            if name in top.fields or text[position : position + 1] not in (":", "\uff1a"):
                break
            position = skip(BLANKS, text, position + 1)
        opener = text[position : position + 1]
        value: Any = OTHER
        if opener == '"':
            value, position = read_string(text, position)
            if value is None:
                break
        elif opener in CLOSERS:
            if len(stack) == MAX_DEPTH:
                break
            stack.append(Level(position, len(entries), {} if opener == "{" else None, CLOSERS[opener]))
            position += 1
        else:
            scalar = SCALAR.match(text, position)
            if not scalar:
                break
            position, value = scalar.end(), NULL if scalar[0] in ("null", "None") else OTHER
        if top.fields is not None and name in FIELDS:
            top.fields[name] = value
    else:
        return position, None, 0, done
    objects = [level for level in stack if level.fields is not None]
    broken = next((level for level in objects if level.fields), objects[-1])
    return position, broken.start, objects[-1].start, done


def skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Return the end of the pattern's match at position. The pattern matches everywhere, if only an empty text."""
    found = pattern.match(text, position)
    return found.end() if found else position


def close_object(closed: Level, fields: MutableMapping[str, Any], entries: list[Entry]) -> bool:
    """Return whether a finished object is a task, whole or with a problem. If so, replace the entries inside it."""
    holds_tasks = len(entries) > closed.n_before
    if not ("instruction" in fields and not holds_tasks) and not ("output" in fields and len(fields) > 1):
        return False
    del entries[closed.n_before :]
    fields = {"input": ""} | {name: value for name, value in fields.items() if value is not NULL}
    if len(fields) < len(FIELDS):
        entries.append(("missing field", closed.start))
    elif OTHER in fields.values():
        entries.append(("wrong type", closed.start))
    else:
        entries.append(("item", {name: decode_string(fields[name]) for name in FIELDS}))
    return True


def read_string(text: str, start: int) -> tuple[str | None, int]:
    """Return the raw characters between the quotes at start and the position behind them, or (None, the break)."""
    if not text.startswith('"', start):
        return None, start
    end = text.find('"', start + 1)
    while end >= 0:
        run = end
        while text[run - 1] == "\\":
            run -= 1
        if (end - run) % 2 == 0:
            return text[start + 1 : end], end + 1
        end = text.find('"', end + 1)
    return None, len(text)


def decode_string(raw: str) -> str:
    r"""Return a JSON string's text. "\d" is no escape in JSON, but models write it and mean \d."""
    if "\\" in raw:
        raw = ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else ESCAPES.get(found[2], found[0]), raw)
    return join_surrogates(raw)


def join_surrogates(text: str) -> str:
    """Return the text with surrogate pairs joined; U+FFFD replaces lone ones, which UTF-8 cannot hold."""
    if SURROGATE.search(text):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def make_excerpt(text: str, start: int) -> str:
    """Return the first EXCERPT characters of the text from start, with blanks and line ends as single spaces."""
    return join_surrogates(" ".join(text[start : start + 2 * EXCERPT].split()))[:EXCERPT]

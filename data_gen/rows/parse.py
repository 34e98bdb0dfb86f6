"""The text of one answer -> its tasks, whatever a model has put around them, and what was wrong with the others.

A model that was asked for {"tasks": [{"instruction", "input", "output"}, ...]} may wrap it in a fence or in prose,
think aloud first, write a bare list or one object a line, forget commas, or be cut off by its token limit. So no
document is parsed: every `{"` outside of an object begins one, an object that holds the fields of a task is a task, and
where an object breaks, reading goes on at the next `{"` behind its start. JSON inside a string is text: its quotes are
escaped.

Linear: of a broken object only parts that were whole are read twice, and a string has one end wherever reading began.
"""

import re
from dataclasses import dataclass

FIELDS = ("instruction", "input", "output")
KINDS = {
    "truncated": "the answer reached its token limit inside this task",
    "malformed": "this task is broken JSON",
    "missing field": "this task has no instruction or no output",
    "wrong type": "a field of this task is not a text",
    "no items": "the answer holds no task: it is empty, prose or other JSON",
}
MAX_DEPTH = 64  # levels of objects and lists; a task is on the third
MAX_PROBLEMS = 1000  # told of one answer: a flood of braces may hold millions
EXCERPT = 200  # characters
LONGEST_KEY = 100  # characters that are looked at

BLANK = r"\s\ufeff\u200b\u2060"
BLANKS = re.compile(f"[{BLANK}]*")
BETWEEN = re.compile(f"[{BLANK},\uff0c]*")  # too many or too few commas lose nothing
START = re.compile(rf'\{{[{BLANK}]*"')
SCALAR = re.compile(r"-?(?:[0-9][0-9.eE+-]*|Infinity)|true|false|null|True|False|None|NaN")
MARK = re.compile(r'["{}\[\]]')  # none of these behind a break: the answer ends there
NAMES_FIELD = re.compile(rf'"[{BLANK}]*(?:{"|".join(FIELDS)})\b', re.IGNORECASE)
STRAY = re.compile(rf'"[{BLANK}]*instruction[{BLANK}]*"[{BLANK}]*[:\uff1a]', re.IGNORECASE)  # a task without its brace
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {char: char for char in "\"\\/'\n"}
SURROGATE = re.compile("[\ud800-\udfff]")
THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)
CLOSERS = {"{": "}", "[": "]"}
NULL, OTHER = object(), object()  # what a field holds that is not a text


@dataclass(slots=True)
class Open:
    """An object or a list that is being read."""

    start: int
    n_before: int  # entries found before it
    fields: dict | None  # of an object: {field of a task: value}
    closer: str


def parse(text: str, truncated: bool) -> tuple[list[dict], list[tuple[str, str]]]:
    """The whole tasks in order, each {"instruction", "input", "output"} of texts that UTF-8 can hold; and the problems
    in order, each (a kind of KINDS, an excerpt). truncated: whether the answer was cut off by its token limit.

    A key may differ in case and blanks; other keys are ignored. No input, or null, is "".
    """
    entries, done, position, told = [], 0, after_thought(text), False  # entries: ("item", task) or (kind, its start)
    while True:
        start = START.search(text, position)
        stray = None if told else STRAY.search(text, position, start.start() if start else len(text))
        if stray:
            entries.append(("malformed", stray.start()))
        if not start:
            break
        end, broken, innermost, done = read_object(text, start.start(), entries, done)
        if broken is None:
            position, told = end, False
            continue
        cut_off, first_unread = not MARK.search(text, end), max(broken, done)
        position = max(innermost + 1, done)
        if NAMES_FIELD.search(text, first_unread, end) or (innermost >= done and not told):
            entries.append(("truncated" if cut_off and truncated else "malformed", first_unread))
            told = True  # of all up to the next object
    items = [payload for kind, payload in entries if kind == "item"]
    problems = [(kind, excerpt(text, where)) for kind, where in entries if kind != "item"][:MAX_PROBLEMS]
    return items, problems if items or problems else [("no items", excerpt(text, 0))]


def after_thought(text):
    """Where the answer begins: after what a model that thinks aloud has thought, drafts included."""
    opened = THOUGHT.match(text)
    if opened:
        end = text.find(f"</{opened[1]}>")
        return len(text) if end < 0 else end
    end = text.rfind("</think>")  # a chat template may hold the opening tag
    bare = text.lstrip()[:1] not in ("{", "[", "`")
    return end if end >= 0 and bare and START.search(text, end) else 0


def read_object(text, start, entries, done):
    """Reads the object at start; what it holds goes to entries. done is where the last task ended.

    Returns (end, None, None, done); for one that breaks at end, (end, start of the broken task, of the innermost
    object, done).
    """
    stack, position = [Open(start, len(entries), {}, "}")], start + 1
    while stack:
        top, position = stack[-1], BETWEEN.match(text, position).end()
        if text.startswith(top.closer, position):
            position += 1
            stack.pop()
            if top.fields is not None and close(top, entries):
                done = position
            continue
        name = None
        if top.fields is not None:
            key, position = read_string(text, position)
            name = key and key[:LONGEST_KEY].strip().lower()
            position = BLANKS.match(text, position).end()
            if key is None or name in top.fields or text[position : position + 1] not in (":", "\uff1a"):
                break
            position = BLANKS.match(text, position + 1).end()
        opener = text[position : position + 1]
        value = OTHER
        if opener == '"':
            value, position = read_string(text, position)
            if value is None:
                break
        elif opener in CLOSERS:
            if len(stack) == MAX_DEPTH:
                break
            stack.append(Open(position, len(entries), {} if opener == "{" else None, CLOSERS[opener]))
            position += 1
        else:
            scalar = SCALAR.match(text, position)
            if not scalar:
                break
            position, value = scalar.end(), NULL if scalar[0] in ("null", "None") else OTHER
        if name in FIELDS:
            top.fields[name] = value
    else:
        return position, None, None, done
    objects = [level for level in stack if level.fields is not None]
    broken = next((level for level in objects if level.fields), objects[-1])
    return position, broken.start, objects[-1].start, done


def close(closed, entries):
    """Whether the closed object was a task, a good one or not; if so, it takes the place of those inside it."""
    fields, holds_tasks = closed.fields, len(entries) > closed.n_before
    if not ("instruction" in fields and not holds_tasks) and not ("output" in fields and len(fields) > 1):
        return False
    del entries[closed.n_before :]
    fields = {"input": ""} | {name: value for name, value in fields.items() if value is not NULL}
    if len(fields) < len(FIELDS):
        entries.append(("missing field", closed.start))
    elif OTHER in fields.values():
        entries.append(("wrong type", closed.start))
    else:
        entries.append(("item", {name: decoded(fields[name]) for name in FIELDS}))
    return True


def read_string(text, start):
    """(what stands between the quotes, raw; where reading goes on), or (None, where it breaks)."""
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


def decoded(raw):
    r"""The text that a string's inside stands for. "\d" is no escape in JSON, but models write it, and mean \d."""
    if "\\" in raw:
        raw = ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else ESCAPES.get(found[2], found[0]), raw)
    return whole(raw)


def whole(text):
    """The text with surrogate pairs joined and lone ones, which UTF-8 cannot hold, replaced by U+FFFD."""
    if SURROGATE.search(text):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def excerpt(text, start):
    return whole(" ".join(text[start : start + 2 * EXCERPT].split()))[:EXCERPT]

"""Validated rows of dataset files. A bad row is reported by file and number, and spoils no other row.

Text stays exactly as it is in the file: nothing is stripped or normalised. Whatever else a row says is obeyed, or the
row is refused by the name of the key, or the key is counted as not read.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.data.chats import TOOLS, Chat, parse_chat, parse_tools, refuse_keys
from engine.data.data_files import map_file, read_records
from engine.data.values import (
    NO_KEY,
    NO_UTF8,
    BadRow,
    Place,
    get_text,
    is_empty,
    name_kind,
    require_text,
    require_type,
    shorten,
)
from engine.text.templates import Message, Row

EMBEDDED = {  # names that --data and --eval-data take for files that come along
    name: Path(__file__).parents[2] / "data_gen" / f"{name.replace('-', '_')}.jsonl"
    for name in ("seed-tasks", "orders", "orders-held-out")
}
SHOWN = 5  # bad rows that an error describes
ALPACA = {"instruction", "input", "output"}
SYSTEM = ("system", "system_prompt")  # a system message of its own key
READ = {  # the keys of each kind of row, of which the first is what tells it
    "messages": ("messages", *SYSTEM, "tools"),
    "conversations": ("conversations", *SYSTEM, "tools"),
    "instruction": ("instruction", "input", "output", "instances", *SYSTEM, "history"),
    "prompt": ("prompt", "completion", *SYSTEM, "tools"),
    "text": ("text",),
}

KNOWN = "instruction and output, messages, conversations, prompt and completion, or text"


def resolve_data_paths(names: Iterable[str]) -> list[Path]:
    """Return the files that --data names: embedded ones by their name, others by their path."""
    return [EMBEDDED.get(name) or Path(name) for name in names]


@dataclass(slots=True)
class Skipped:
    """A bad row that was left out."""

    source: Place
    reason: str


@dataclass(frozen=True)
class Wanted:
    """What rows must have and may have, as read_rows explains it."""

    answers: bool
    tools: bool


def read_rows(
    paths: Sequence[Path],
    skip_bad_rows: bool | None = False,
    progress: Callable[[int, int], None] | None = None,
    require_answers: bool = True,
    with_tools: bool = False,
    unread: Counter[str] | None = None,
) -> tuple[list[Row], list[Skipped]]:
    """Return (rows, bad rows that were skipped) of dataset files, in order. The content tells which kind a file is.

    require_answers: every row must have an answer. If False, rows are prompts: they may lack output or end with a user
    message. with_tools: chats may call tools. progress(done_bytes, total_bytes) is called every 1000 rows. unread
    counts the rows that have a key which is not read, by the key.

    Raise DataError with the place of each bad row, and its number where that is not its line. It lists all bad rows at
    once, unless skip_bad_rows is set; None says that the command has no such flag. A file that cannot be read, a broken
    list, or no row left is always an error.
    """
    rows: list[Row] = []
    skipped: list[Skipped] = []
    wanted = Wanted(require_answers, with_tools)
    total_bytes, done_bytes = sum(len(map_file(path)) for path in paths), 0  # finds a missing file before reading any
    for path in paths:
        n_before = len(rows) + len(skipped)
        name = str(path)
        for number, line, column, position, value in read_records(path):
            source = Place(name, number, line, column)
            keys: set[str] = set()
            try:
                rows.append(parse_row(value, source, wanted, keys))
                if keys and unread is not None:
                    unread.update(keys)
            except BadRow as bad:
                is_named = not line or (line == number and not column)  # by its number, within source
                skipped.append(Skipped(source, str(bad) if is_named else f"row {number}: {bad}"))
            if progress and number % 1000 == 0:
                progress(done_bytes + position, total_bytes)
        if len(rows) + len(skipped) == n_before:
            raise DataError(f"{path}: got no rows, wanted at least one; leave the file out")
        done_bytes += len(map_file(path))
        if progress:
            progress(done_bytes, total_bytes)
    if skipped and not (skip_bad_rows and rows):
        remedy = suggest_repair([bad.reason for bad in skipped], bool(rows), skip_bad_rows is not None)
        lines = [f"data: got {len(skipped)} bad of {len(rows) + len(skipped)} rows, wanted none; {remedy}"]
        lines += [f"  {bad.source}: {bad.reason}" for bad in skipped[:SHOWN]]
        if len(skipped) > SHOWN:
            lines.append(f"  and {len(skipped) - SHOWN} more")
        raise DataError("\n".join(lines))
    if not rows:
        raise DataError("data: got no files, wanted at least one; pass --data FILE")
    return rows, skipped


def suggest_repair(reasons: Sequence[str], any_left: bool, has_flag: bool) -> str:
    """Return what to do about bad rows, told why each is bad, whether other rows are left and a flag drops these."""
    if any(NO_UTF8 in reason for reason in reasons):
        remedy = "save the file as UTF-8 (Excel: CSV UTF-8)"
        return remedy + (", or --skip-bad-rows drops them" if any_left and has_flag else "")
    if any_left:
        return "--skip-bad-rows drops them" if has_flag else "repair them, or leave them out"
    if all(NO_KEY in reason for reason in reasons):
        return f"no row is left; rename their keys to {KNOWN} (docs/data.md)"
    return "no row is left, repair the data"


def parse_row(value: Any, source: str, wanted: Wanted, unread: set[str]) -> Row:
    """Return the row of a record's value, adding the keys that are not read to unread. Raise BadRow."""
    if isinstance(value, BadRow):
        raise value
    row = require_type(value, dict, "row")
    if row.keys() == ALPACA:  # what follows would find nothing, in a third of the time that a row takes
        return parse_instruction(row, source, wanted)
    kinds = [kind for kind in READ if row.get(kind) is not None]  # a table has null where a row lacks a column
    if "instruction" in kinds and kinds[0] != "instruction":
        raise BadRow(f"got both {kinds[0]} and instruction, wanted one of them")
    if kinds[:2] == ["messages", "conversations"]:
        raise BadRow("got both messages and conversations, wanted one of them")
    kind = kinds[0] if kinds else next((kind for kind in READ if kind in row), "instruction")
    refuse_row(row, kind, wanted)
    unread |= {key for key in row if key not in READ[kind] and key != "label" and not is_empty(row[key])}
    if kind == "text":
        text = get_text(row, "text")
        if not text.strip():
            raise BadRow("text: got blanks alone, wanted text; else an end of nothing would be learned")
        return Row(source, None, "" if wanted.answers else text, "", text if wanted.answers else "", is_raw=True)
    if kind == "prompt" and isinstance(row["prompt"], str | None):
        completion = get_text(row, "completion") if wanted.answers else ""
        return Row(source, None, get_text(row, "prompt"), "", completion, is_raw=True)
    if kind == "instruction":
        return parse_instruction(row, source, wanted)
    return parse_turns(row, kind, source, wanted, unread)


def refuse_row(row: dict[str, Any], kind: str, wanted: Wanted) -> None:
    """Raise BadRow for a key that changes what the row means and cannot be obeyed."""
    refuse_keys(row)
    label = row.get("label")
    if not is_empty(label) and str(label).lower() not in ("true", "1", "1.0"):
        raise BadRow(f"label: got {shorten(label)}, wanted true, since the row would be learned; leave it out")
    if row.get("weight") not in (None, "", 1, "1"):
        raise BadRow(f"weight: got {shorten(row['weight'])}, wanted 1, or a weight on each message")
    for key in ("system", "system_prompt", "history", "tools"):
        if key in READ[kind] or is_empty(row.get(key)):
            continue
        raise BadRow(f"{key}: got it beside {kind}, which has no place for it; write the row as messages")
    if not is_empty(row.get("tools")) and not wanted.tools:
        raise BadRow(f"tools: got tools that may be called, {TOOLS}")
    if kind == "prompt" and isinstance(row["prompt"], str) and (find_system(row) or row.get("tools")):
        raise BadRow("system or tools: got them beside a prompt of text, wanted messages as the prompt")


def find_system(row: dict[str, Any]) -> list[Message]:
    """Return the system message that a row has under a key of its own. Raise BadRow."""
    found = [key for key in SYSTEM if not is_empty(row.get(key))]
    if len(found) > 1:
        raise BadRow("got both system and system_prompt, wanted one of them")
    return [("system", get_text(row, key)) for key in found]


def parse_instruction(row: dict[str, Any], source: str, wanted: Wanted) -> Row:
    """Return a row of Alpaca's keys; with a system text or a history it is a chat. Raise BadRow."""
    if not is_empty(row.get("instances")):
        row = unfold_instance(row)
    instruction = get_text(row, "instruction")
    output = get_text(row, "output") if wanted.answers or row.get("output") is not None else ""
    input = "" if row.get("input") is None else get_text(row, "input")
    if not instruction and not input:
        raise BadRow("got instruction and input both empty, wanted text in one of them")
    if row.keys() <= ALPACA:
        return Row(source, None, instruction, input, output)
    before = find_system(row)
    history = [] if is_empty(row.get("history")) else require_type(row["history"], list, "history")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history[{i}]: got {name_kind(pair)}, wanted a list of a question and its answer")
        texts = [require_text(text, f"history[{i}][{n}]") for n, text in enumerate(pair)]
        before += [("user", texts[0]), ("assistant", texts[1])]
    if not before:
        return Row(source, None, instruction, input, output)
    question = f"{instruction}\n\n{input}" if input else instruction  # as the chat styles say an instruction
    return Row(source, (*before, ("user", question), ("assistant", output)))


def unfold_instance(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of self-instruct, whose input and output lie in `instances`, with Alpaca's keys. Raise BadRow."""
    instances = require_type(row["instances"], list, "instances")
    if len(instances) != 1:
        raise BadRow(f"instances: got {len(instances)}, wanted one a row; write each as a row of its own")
    found = require_type(instances[0], dict, "instances[0]")
    both = [key for key in ("input", "output") if not is_empty(row.get(key))]
    if both:
        raise BadRow(f"got both {both[0]} and instances, wanted one of them")
    rest = {key: value for key, value in row.items() if key != "instances"}
    return rest | {key: found[key] for key in ("input", "output") if key in found}


def parse_turns(row: dict[str, Any], kind: str, source: str, wanted: Wanted, unread: set[str]) -> Row:
    """Return a row that is a chat: of messages, conversations, or a prompt and a completion of messages.

    Answers within a prompt carry no loss. Raise BadRow.
    """
    turns = require_type(row[kind], list, kind)
    n_prompt = len(turns) if kind == "prompt" else 0
    if n_prompt and (wanted.answers or not is_empty(row.get("completion"))):
        if "completion" not in row:
            raise BadRow(f"completion: {NO_KEY} {shorten(list(row))}")
        turns = turns + require_type(row["completion"], list, "completion")
    chat: Chat = parse_chat(turns, kind, wanted.answers, wanted.tools, unread)
    unlearned = chat.unlearned | {i for i in range(n_prompt) if chat.messages[i][0] == "assistant"}
    system, more = find_system(row), chat.more
    if system:
        if chat.messages[0][0] == "system":
            raise BadRow(f"got both system and a system message in {kind}, wanted one of them")
        unlearned, more = {i + 1 for i in unlearned}, {i + 1: value for i, value in more.items()}
    tools = [] if is_empty(row.get("tools")) else parse_tools(row["tools"])
    return Row(source, (*system, *chat.messages), unlearned=frozenset(unlearned), tools=tools, more=more)

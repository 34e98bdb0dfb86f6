"""Files of a generation run, as the report reads them: rows, rejections, and the record of the run."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.base.files import FIELDS
from data_gen.page.formatting import as_number, as_text

EXAMPLES = 3  # kept of each reason, and of the duplicates of one instruction
OBJECTS = ("settings", "counts", "cost", "models", "versions")  # parts of run.json


class Row(NamedTuple):
    """A row of a dataset, with its provenance where that is known."""

    instruction: str
    input: str
    output: str
    request: float | None
    usd: float | None
    model: str


class DuplicateGroup(NamedTuple):
    """The number of duplicates of one kept instruction, and the first few of them."""

    n: int
    examples: list[tuple[str, str]]  # (similarity as text, instruction)


class Rejected:
    """The lines of rejected.jsonl, counted, with a few examples of each reason drawn evenly with a fixed seed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # by reason
        self.examples: dict[str, list[dict[str, Any]]] = {}  # by reason
        self.unreadable = 0
        self.similarities: list[float] = []  # of duplicates
        self.duplicate_groups: dict[str, DuplicateGroup] = {}  # by kept instruction
        self.requests: Counter[float] = Counter()  # rejections by request
        self.duplicates: Counter[float] = Counter()  # duplicates by request
        self.rng = random.Random(0)

    def add(self, line: dict[str, Any]) -> None:
        """Count one line, and keep it as an example if the draw says so."""
        reason = as_text(line.get("reason")) or "no reason given"
        self.counts[reason] += 1
        examples, request = self.examples.setdefault(reason, []), as_number(line.get("request"))
        if len(examples) < EXAMPLES:
            examples.append(line)
        elif (place := self.rng.randrange(self.counts[reason])) < EXAMPLES:
            examples[place] = line
        if request is not None:
            self.requests[request] += 1
        if line.get("duplicate_of") is None and line.get("similarity") is None:
            return
        if request is not None:
            self.duplicates[request] += 1
        similarity = as_number(line.get("similarity"))
        if similarity is not None:
            self.similarities.append(similarity)
        kept = as_text(line.get("duplicate_of"))
        if kept:
            n, likes = self.duplicate_groups.get(kept, DuplicateGroup(0, []))
            if n < EXAMPLES:
                like = "" if similarity is None else f"similarity {similarity:.2f}"
                likes.append((like, as_text(line.get("instruction"))))
            self.duplicate_groups[kept] = DuplicateGroup(n + 1, likes)


@dataclass(frozen=True)
class RunRecord:
    """The parts of a run.json. Empty where it is absent or not the record of a generation run."""

    status: Any = None
    started: Any = None
    seconds: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    fault: str = ""  # why nothing of the file could be read


def parse_rows(rows: list[dict[str, Any]]) -> list[Row]:
    """Return rows with Alpaca's keys as Rows, any value made a text."""
    parsed = []
    for row in rows:
        found = row.get("provenance")
        source = found if isinstance(found, dict) else {}
        instruction, input, output = (as_text(row.get(name)) for name in FIELDS)
        request, usd = as_number(source.get("request")), as_number(source.get("usd"))
        parsed.append(Row(instruction, input, output, request, usd, as_text(source.get("model"))))
    return parsed


def read_rejected(path: Path) -> Rejected | None:
    """Return the rejections of a rejected.jsonl, or None without that file. A line that is no object only counts."""
    rejected = Rejected()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rejected.add(json.loads(line))
                except (ValueError, AttributeError, RecursionError):
                    rejected.unreadable += bool(line.strip())
    except OSError:
        return None
    return rejected


def read_run(path: Path) -> RunRecord:
    """Return the record of a run.json, or an empty one if there is none or it is that of another kind of run.

    A part that is no object is left empty, and so is the record of a file that holds no JSON object, but for its fault.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return RunRecord()
    except (OSError, ValueError, RecursionError) as error:
        return RunRecord(fault=f"{path.name} is damaged and left out: {error}")
    if not isinstance(found, dict):
        return RunRecord(fault=f"{path.name} is damaged and left out: it holds no JSON object")
    if not any(isinstance(found.get(part), dict) for part in ("counts", "cost")):
        return RunRecord()
    parts = {part: found[part] for part in OBJECTS if isinstance(found.get(part), dict)}
    return RunRecord(found.get("status"), found.get("started"), found.get("seconds"), **parts)

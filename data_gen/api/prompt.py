"""Prompts: each request has a number N, and its prompt depends only on (--seed, N) and the settings of the prompts.

A prompt shows a few seed tasks and names a few subjects and kinds of task. It never depends on an earlier answer, so
that any number of requests can be in flight, and a batch can hold all of them.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from data_gen.base.cli import DataError
from data_gen.base.files import FIELDS, RowPlace, read_rows, to_json_line
from data_gen.base.language import LANGUAGES

SEED_TASKS = Path(__file__).parent.with_name("seed_tasks.jsonl")
TOPICS = Path(__file__).parent.with_name("topics.txt")
N_SUBJECTS, N_KINDS = 6, 4

Item = TypeVar("Item")

SYSTEM = "You write training data for an assistant that follows instructions. You answer with one JSON object alone."
WORDING = """\
Write {n} new tasks for an assistant that reads and writes text, each with its answer.

Each task has three fields:
- "instruction": what a user asks for, in one or two sentences.
- "input": the text, data or facts that the instruction works on, written out in full. Use "" where the instruction
  needs nothing more; about half of all tasks do.
- "output": the answer that an expert would give, correct and complete, in at most about 120 words.

Rules:
1. Be varied: no two tasks alike, different opening verbs, questions as well as commands, easy and hard, short and long.
2. A task can be solved with text alone: no pictures, sounds, videos, files or web pages, neither to see nor to make.
3. An instruction that speaks of a given text, list, table or piece of code has that very text in "input". Make up
   realistic and specific material; never write a placeholder, a link or "see attached".
4. "input" does not repeat the instruction, and "output" does not repeat "input".
5. Work out sums, dates and logic before you write them down. State facts only where you are sure of them.
6. Each field holds one task only, without numbering and without the words "Instruction", "Input" or "Output".
{language}
Take up some of these subjects, and others that you think of: {subjects}.
Kinds of task that are wanted among others: {kinds}.

Examples of good tasks; write none that resembles them:
{examples}

Answer with {{"tasks": [{{"instruction": "...", "input": "...", "output": "..."}}, ...]}}, with {n} tasks in it."""
FOREIGN = """\
7. Write instruction, input and output in {name}, as native speakers do. The examples below need not be in {name}.
"""

SCHEMA = {
    "type": "object",
    "properties": {
        "tasks": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {field: {"type": "string"} for field in FIELDS},
                "required": list(FIELDS),
                "additionalProperties": False,
            },
        }
    },
    "required": ["tasks"],
    "additionalProperties": False,
}


def make_formats(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the response_format that asks for a schema, the most exact first: {Dialect.format: its value}."""
    exact = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}
    plain = {"type": "json_object"}
    return {"json_schema": exact, "json_object+schema": plain | {"schema": schema}, "json_object": plain, "text": None}


FORMATS = make_formats("tasks", SCHEMA)


@dataclass(frozen=True)
class Prompter:
    """Draws the prompts of requests from seed tasks, ({"instruction", "input", "output", "category"?}, ...)."""

    seeds: tuple[dict[str, str], ...]
    seed: int = 0
    n_tasks: int = 20
    n_examples: int = 3
    language: str = "en"

    @property
    def n_requests(self) -> int | None:
        """Return None: there is no end of prompts."""
        return None

    @property
    def formats(self) -> Mapping[str, Any]:
        """Return the response_format of each Dialect.format."""
        return FORMATS

    def build_messages(self, number: int) -> list[dict[str, str]]:
        """Return the chat messages of the request with this number."""
        rng = random.Random(f"{self.seed}:{number}")
        examples = pick_items(rng, self.seeds, self.n_examples)
        kinds = sorted({seed["category"] for seed in self.seeds if seed.get("category")}) or ["any"]
        text = WORDING.format(
            n=self.n_tasks,
            language="" if self.language == "en" else FOREIGN.format(name=LANGUAGES[self.language]),
            subjects=", ".join(pick_items(rng, read_topics(), N_SUBJECTS)),
            kinds=", ".join(pick_items(rng, kinds, N_KINDS)),
            examples="".join(to_json_line({field: seed[field] for field in FIELDS}) for seed in examples).rstrip(),
        )
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]

    def compute_fingerprint(self) -> dict[str, Any]:
        """Return the settings that decide the prompts, with hashes of texts. Equal ones give equal prompts."""
        words = [SYSTEM, WORDING, FOREIGN, LANGUAGES[self.language], SCHEMA, N_SUBJECTS, N_KINDS, *read_topics()]
        return {
            "seed": self.seed,
            "tasks_per_request": self.n_tasks,
            "examples": self.n_examples,
            "language": self.language,
            "seed_tasks_sha256": hash_text(json.dumps(self.seeds)),
            "wording_sha256": hash_text(json.dumps(words)),
        }


def pick_items(rng: random.Random, items: Iterable[Item], n: int) -> list[Item]:
    """Return n different items in random order. It uses only rng.random(), which is equal in all versions of Python."""
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))[:n]]


@cache
def read_topics() -> tuple[str, ...]:
    """Return the subjects of topics.txt."""
    return tuple(TOPICS.read_text(encoding="utf-8").split("\n")[:-1])


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_seed_tasks(path: str | Path | None = None) -> tuple[dict[str, str], ...]:
    """Return the seed tasks of a .json or .jsonl file, by default of seed_tasks.jsonl.

    A row has Alpaca's fields, or self-instruct's "instances", of which the first is used. Raise DataError with the
    file and row.
    """
    path = Path(path or SEED_TASKS)
    seeds = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            instances = row.get("instances", [row])
            found = {"instruction": row["instruction"]} | {field: instances[0].get(field) or "" for field in FIELDS[1:]}
            kind = row.get("category") or ""
            kind = kind.encode("utf-8", "replace").decode() if isinstance(kind, str) else kind
            if not all(isinstance(text, str) for text in (*found.values(), kind)):
                raise TypeError("a field is not a string")
            if not found["instruction"].strip() or not found["output"].strip():
                raise ValueError("instruction or output is empty")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            wanted = 'wanted {"instruction", "input", "output"} or {"instruction", "instances": [{"input", "output"}]}'
            raise DataError(f"{RowPlace(path, number)}: {what}; {wanted}") from error
        seeds.append({field: text.strip() for field, text in found.items()} | ({"category": kind} if kind else {}))
    if not seeds:
        raise DataError(f"{path} holds no seed task; pass a file with at least one")
    return tuple(seeds)

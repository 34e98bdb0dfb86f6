"""Files that are damaged at random: bits flipped, ends cut off, values of JSON changed for others."""

import json
import random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1.5, 10**30, 10**400, 1e308, float("nan"), "", "\ud800", "x" * 300, "../x", [], {}, [[]],
    {"a": None}, [1, "a"],
)  # fmt: skip


def replace_one(value: Any, new: Any, rng: random.Random) -> Any:
    """Return a JSON value in which one value, chosen at random, is another one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return value | {key: replace_one(value[key], new, rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], replace_one(value[at], new, rng), *value[at + 1 :]]
    return new


def change_json(raw: bytes, rng: random.Random) -> bytes | None:
    """Return a JSON or JSONL file with one of its values changed, None where it is none."""
    lines = raw.splitlines() if raw.count(b"}\n{") else [raw]
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:
        return None
    mark = "a mark that is not there"
    deep, digits = "[" * 5000 + "]" * 5000, "9" * 5000
    new = rng.choice([*HOSTILE, mark, mark])
    text = json.dumps(replace_one(value, new, rng)).replace(json.dumps(mark), rng.choice([deep, digits, "[" * 100_000]))
    return b"\n".join([*lines[:at], text.encode(), *lines[at + 1 :]])


def damage(raw: bytes, name: str, rng: random.Random) -> tuple[str, bytes]:
    """Return (kind of damage, the bytes of a file damaged)."""
    kind = rng.choice(["bit", "bit", "end", "json", "json"])
    if kind == "json" and "json" in name and (changed := change_json(raw, rng)) is not None:
        return kind, changed
    if kind == "end":
        return kind, raw[: rng.randrange(len(raw))]
    flipped = bytearray(raw)
    flipped[rng.randrange(min(len(raw), 4096) if rng.random() < 0.7 else len(raw))] ^= 1 << rng.randrange(8)
    return "bit", bytes(flipped)

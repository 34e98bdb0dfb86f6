"""Damage: one value of a file's JSON, one bit, or its end, and nothing else."""

import json
import random

import pytest

from scripts.base.damaged import HOSTILE, change_json, damage, replace_one

ROWS = [{"a": [1, {"b": 2}], "c": "d"}, {"a": [], "c": "e"}, {"a": [3, 4, 5], "c": "f"}]


def differing_leaves(a, b):
    """Return how many values of two JSON values differ, each counted where both still have the same keys."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return sum(differing_leaves(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return sum(map(differing_leaves, a, b))
    return int(a != b)


@pytest.mark.parametrize("value", [*ROWS, ROWS])
def test_one_value_is_another_and_all_else_stays(value):
    mark = {"new": ["mark"]}
    found = [replace_one(value, mark, random.Random(seed)) for seed in range(60)]
    assert all(differing_leaves(value, one) == 1 and json.dumps(one).count("mark") == 1 for one in found)
    assert len({json.dumps(one) for one in found}) > 1
    assert all(one == mark or len(one) == len(value) for one in found)


def test_a_line_that_is_changed_takes_the_place_of_the_old_one():
    raw = "\n".join(map(json.dumps, ROWS)).encode()
    for seed in range(60):
        lines = change_json(raw, random.Random(seed)).split(b"\n")
        assert len(lines) == 3 and sum(line == old for line, old in zip(lines, raw.split(b"\n"), strict=True)) >= 2
    assert change_json(b"{no json", random.Random(0)) is None


def test_every_kind_of_damage_is_one_change():
    raw, kinds = json.dumps(ROWS).encode(), set()
    for seed in range(200):
        kind, found = damage(raw, "x.json", random.Random(seed))
        kinds.add(kind)
        if kind == "end":
            assert raw.startswith(found) and len(found) < len(raw)
        if kind == "bit":
            changed = [a ^ b for a, b in zip(raw, found, strict=True) if a != b]
            assert len(changed) == 1 and changed[0].bit_count() == 1
    assert kinds == {"bit", "end", "json"}
    assert {damage(raw, "x.bin", random.Random(seed))[0] for seed in range(50)} == {"bit", "end"}


def test_one_seed_is_one_damage(snapshot):
    """Of each kind, of JSON and of JSONL, long values told by their length."""
    files = {"a.json": json.dumps(ROWS[0]).encode(), "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
             "a.bin": bytes(range(64, 90)) * 300}  # fmt: skip
    lines = []
    for name, raw in files.items():
        for seed in range(24):
            kind, found = damage(raw, name, random.Random(seed))
            if kind == "json" and len(found) < 400:
                lines.append(f"{name} {seed} json {found.decode()}")
            elif kind == "bit":
                at = next(i for i, (a, b) in enumerate(zip(raw, found, strict=True)) if a != b)
                lines.append(f"{name} {seed} bit {at}: {raw[at] ^ found[at]}")
            else:
                lines.append(f"{name} {seed} {kind} {len(found)} {found[:40]!r}")
    assert "\n".join(lines) == snapshot


def test_values_that_take_the_place_of_others_are_hostile():
    """Among them very deep lists, closed or not, and very long numbers."""
    raw = b'{"a": 1}'
    found = {change_json(raw, random.Random(seed)) for seed in range(600)}
    inner = {text.removeprefix(b'{"a": ').removesuffix(b"}") for text in found}
    deep = {b"[" * 5000 + b"]" * 5000, b"9" * 5000, b"[" * 100_000}
    assert deep <= inner and {json.dumps(value).encode() for value in HOSTILE} <= inner
    assert deep <= found  # in the place of the whole file too

"""Checks on the shape and variety of data_gen/seed_tasks.jsonl."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

SEED_FILE = Path(__file__).resolve().parents[2] / "data_gen" / "seed_tasks.jsonl"
KEYS = ["id", "category", "instruction", "input", "output"]


@pytest.fixture(scope="module")
def rows():
    with SEED_FILE.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def lcs_length(a, b):
    prev = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(prev[j] + 1 if x == y else max(prev[j + 1], row[j]))
        prev = row
    return prev[-1]


def test_row_count_and_keys(rows):
    assert len(rows) == 175
    assert all(list(row) == KEYS for row in rows)
    assert all(isinstance(value, str) for row in rows for value in row.values())


def test_ids_are_unique_and_consecutive(rows):
    assert [row["id"] for row in rows] == [f"seed_{i:03d}" for i in range(1, 176)]


def test_text_is_stripped_and_present(rows):
    for row in rows:
        assert all(row[key] == row[key].strip() for key in KEYS), row["id"]
        assert row["category"] and row["instruction"] and row["output"], row["id"]


def test_categories_are_varied(rows):
    counts = Counter(row["category"] for row in rows)
    assert len(counts) >= 25
    assert max(counts.values()) <= 15


def test_share_of_rows_with_input(rows):
    share = sum(bool(row["input"]) for row in rows) / len(rows)
    assert 0.5 <= share <= 0.7


def test_instructions_are_not_near_duplicates(rows):
    tokens = [re.findall(r"\w+", row["instruction"].lower()) for row in rows]
    counts = [Counter(t) for t in tokens]
    for i, j in combinations(range(len(rows)), 2):
        a, b = tokens[i], tokens[j]
        limit = 0.7 * (len(a) + len(b)) / 2  # ROUGE-L F = 2 * LCS / (len(a) + len(b))
        # The multiset overlap bounds the LCS from above, so most pairs need no table.
        if sum((counts[i] & counts[j]).values()) > limit:
            assert lcs_length(a, b) <= limit, (rows[i]["id"], rows[j]["id"])

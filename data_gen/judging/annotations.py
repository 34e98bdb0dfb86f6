"""Annotations as AlpacaEval's package reads them: one row a question, preference 1 to 2, a draw 1.5, null unknown."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_gen.api.prices import PICO
from data_gen.base.files import to_json_line, write_atomically
from data_gen.judging.answers import Questions, join_input
from data_gen.judging.comparisons import compute_prompt_hash
from data_gen.judging.verdicts import Judged


def name_annotator(judge: str) -> str:
    """Return the annotator's name: the judge and the hash of its prompt."""
    return f"cria-{judge}-{compute_prompt_hash()[:8]}"


def build_annotation(one: Judged, questions: Questions, annotator: str, seconds: Mapping[int, float]) -> dict[str, Any]:
    """Return the row of a pair. output_1 is the base's. seconds are those of each attempt."""
    pair, verdicts = one.pair, [verdict for verdict in one.verdicts if verdict]
    return {
        "instruction": questions.instructions[pair.question],
        "output_1": pair.base_text,
        "generator_1": questions.names[pair.base],
        "dataset": questions.datasets[pair.question],
        "output_2": pair.other_text,
        "generator_2": "constant answer" if pair.other is None else questions.names[pair.other],
        "annotator": annotator,
        "preference": one.preference,
        "price_per_example": round(sum(verdict.cost for verdict in verdicts) / PICO, 12),
        "time_per_example": round(sum(seconds.get(verdict.attempt, 0) for verdict in verdicts), 3),
        "raw_completion": [verdict and verdict.text for verdict in one.verdicts],
    }


def build_human_annotation(row: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return the row of a person's vote that holds the answers voted on, in the order of its models."""
    shown, texts, vote = row["models"], row["answers"], row["vote"]
    place = shown.index(base)
    preference = 1.5 if vote not in ("A", "B") else 1 if shown["AB".index(vote)] == base else 2
    return {
        "instruction": join_input(row["prompt"], row.get("input") or ""),
        "output_1": texts[place],
        "generator_1": base,
        "dataset": row.get("dataset"),
        "output_2": texts[1 - place],
        "generator_2": shown[1 - place],
        "annotator": "people",
        "preference": preference,
        "price_per_example": 0.0,
        "time_per_example": None,
        "raw_completion": vote,
    }


def write_annotations(
    folder: Path, judged: Sequence[Judged], questions: Questions, judge: str, seconds: Mapping[int, float]
) -> list[Path]:
    """Write annotations.json for two models, a file a pair for more, and canary.json. Return the paths."""
    annotator = name_annotator(judge)
    groups: dict[str, list[Judged]] = {}
    for base, other in itertools.combinations(range(len(questions.names)), 2):
        name = "annotations"
        if len(questions.names) > 2:
            name += f"-{other}-{make_file_name(questions.names[other])}-vs-{make_file_name(questions.names[base])}"
        if name in groups:  # another base's name differs from this one only in what a file's name leaves out
            name += f"-{base}"
        groups[name] = [one for one in judged if (one.pair.base, one.pair.other) == (base, other)]
    groups["canary"] = [one for one in judged if one.pair.other is None]
    paths = []
    for name, some in groups.items():
        if some:
            rows = [build_annotation(one, questions, annotator, seconds) for one in some]
            path = folder / f"{name}.json"
            write_atomically(path, ["[\n", ",\n".join(to_json_line(row).rstrip("\n") for row in rows), "\n]\n"])
            paths.append(path)
    return paths


def make_file_name(name: str) -> str:
    """Return a model's name with only letters, digits, dots and dashes, at most 60 of them."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:60] or "model"

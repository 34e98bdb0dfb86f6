"""Files of answers, and the questions that all of them answer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.base.cli import DataError, UsageError
from data_gen.base.files import RowPlace, read_rows
from data_gen.rows.parse import SURROGATE

WANTED = 'wanted AlpacaEval\'s {"instruction", "output", "generator"?, "dataset"?}, or "response" for "output"'
SHOWN = 80  # characters of an instruction in a message

Key = tuple[str, int]  # an instruction without its blanks, and how often it came before in the file


class Reply(NamedTuple):
    """One answer of a file."""

    instruction: str
    dataset: Any
    output: str


@dataclass(frozen=True)
class AnswerFile:
    """The answers of one model."""

    path: Path
    name: str
    replies: dict[Key, Reply]


@dataclass(frozen=True)
class Questions:
    """Questions with one answer of each model: outputs[q][m] is the answer of model names[m] to instructions[q]."""

    names: tuple[str, ...]
    instructions: tuple[str, ...]
    datasets: tuple[Any, ...]
    outputs: tuple[tuple[str, ...], ...]
    dropped: int = 0  # instructions that some file lacks, left out by --common


def read_answers(path: Path) -> AnswerFile:
    """Return the answers of a .json list or a .jsonl file. Raise DataError with the row and its fault.

    The model is the file's "generator", or the file's name where it says none. What no UTF-8 holds, half a surrogate
    pair, becomes U+FFFD.
    """
    replies: dict[Key, Reply] = {}
    seen: Counter[str] = Counter()
    generators: set[str] = set()
    for number, row in enumerate(read_rows(path), 1):
        instruction, output = row.get("instruction", row.get("prompt")), row.get("output", row.get("response"))
        given = row.get("input") or ""
        if not all(isinstance(text, str) for text in (instruction, output, given)) or not str(instruction).strip():
            raise DataError(f"{RowPlace(path, number)}: got the keys {sorted(row)}; {WANTED}, each a text")
        asked = join_input(str(instruction), given)
        key = make_key(asked)
        replies[key, seen[key]] = Reply(asked, row.get("dataset"), replace_surrogates(str(output)))
        seen[key] += 1
        if row.get("generator"):
            generators.add(replace_surrogates(str(row["generator"])))
    if not replies:
        raise DataError(f"{path} holds no answer; {WANTED}")
    if len(generators) > 1:
        raise DataError(f"{path} holds answers of {', '.join(sorted(generators))}; wanted one model a file")
    return AnswerFile(path, next(iter(generators), path.stem), replies)


def join_input(instruction: str, given: str) -> str:
    """Return an instruction with its input below, as one text."""
    return replace_surrogates(f"{instruction.strip()}\n\n{given.strip()}".strip())


def replace_surrogates(text: str) -> str:
    """Return a text with U+FFFD for each lone surrogate, which could not be sent."""
    return SURROGATE.sub("\ufffd", text)


def make_key(instruction: str) -> str:
    """Return what two files must share of an instruction: everything but the blanks."""
    return " ".join(instruction.split())


def match_answers(files: Sequence[AnswerFile], is_common: bool = False) -> Questions:
    """Return the questions of the files, in the order of the first, with each model's answer.

    Raise DataError where the files differ in their instructions, unless is_common leaves out what one of them lacks,
    and UsageError for two files of one name.
    """
    names = choose_names(files)
    first, *others = files
    every = set(first.replies).union(*(file.replies for file in others))
    keys = [key for key in first.replies if all(key in file.replies for file in others)]
    if len(keys) < len(every) and not is_common:
        faults = []
        for file in files:
            lacking = [key for key in every if key not in file.replies]
            if lacking:
                example = min(lacking)[0][:SHOWN]
                faults.append(f"{file.path} lacks {len(lacking):,} of {len(every):,} instructions, such as {example!r}")
        raise DataError(f"{'; '.join(faults)}; --common compares the {len(keys):,} that every file has")
    if not keys:
        paths = ", ".join(str(file.path) for file in files)
        raise DataError(f"{paths} share no instruction; wanted answers to the same instructions")
    return Questions(
        names,
        tuple(first.replies[key].instruction for key in keys),
        tuple(next((f.replies[key].dataset for f in files if f.replies[key].dataset), None) for key in keys),
        tuple(tuple(file.replies[key].output for file in files) for key in keys),
        len(every) - len(keys),
    )


def choose_names(files: Sequence[AnswerFile]) -> tuple[str, ...]:
    """Return a name for each file: its model's, or the file's own where two files are of one model."""
    counts = Counter(file.name for file in files)
    names = tuple(file.name if counts[file.name] == 1 else file.path.stem for file in files)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two files are called {twice}; give one of them another name, or another generator")
    return names

"""Rows for the report, from every kind of file and row that a fine-tune reads: a bad one is counted and left out."""

import csv
import gzip
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_gen.base.cli import DataError
from data_gen.base.files import describe_encoding

DELIMITERS = ",;\t"
USERS, ANSWERERS = ("user", "human"), ("assistant", "gpt", "chatgpt")


def read_any_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return (rows with Alpaca's keys, how many bad ones were left out) of JSON, JSONL, CSV or parquet, also gzipped.

    Rows are Alpaca's, chats (messages or conversations), prompt and completion, or text. Raise DataError for a file
    that cannot be read or has no good row.
    """
    rows, n_bad = [], 0
    for value in read_values(path):
        row = to_alpaca(value) if isinstance(value, dict) else None
        if row is None:
            n_bad += 1
        else:
            rows.append(row)
    if n_bad and not rows:
        raise DataError(
            f"{path}: none of its {n_bad} rows has an instruction, messages, conversations, a prompt or a text; wanted "
            "one of them in each"
        )
    return rows, n_bad


def read_values(path: Path) -> Iterable[Any]:
    """Return the values of a file's rows, None for one that cannot be parsed. Raise DataError for the whole file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        raw = path.read_bytes()
        if suffixes[-1:] == [".gz"]:
            raw, suffixes = gzip.decompress(raw), suffixes[:-1]
        if suffixes[-1:] == [".parquet"]:
            return importlib.import_module("pyarrow.parquet").read_table(io.BytesIO(raw)).to_pylist()
        text = raw.decode("utf-8-sig")
        if suffixes[-1:] in ([".csv"], [".tsv"]):
            header = text.partition("\n")[0]
            divider = max(DELIMITERS, key=header.count)  # as engine.finetune chooses it
            return list(csv.DictReader(io.StringIO(text), delimiter=divider))
        return json.loads(text) if text.lstrip()[:1] == "[" else list(parse_lines(text))
    except ImportError:
        raise DataError(f'{path} is parquet, which pyarrow reads; pip install "cria-engine[parquet]"') from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {describe_encoding(error)}") from error
    except (OSError, EOFError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def parse_lines(text: str) -> Iterator[Any]:
    """Yield the value of each line of JSONL that is not blank, None for a line that is no JSON."""
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def to_alpaca(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row with Alpaca's keys beside its own, None for one of no kind that is known."""
    if row.get("instruction") is not None:
        return row
    turns = row.get("messages") or row.get("conversations") or row.get("prompt")
    if isinstance(turns, list) and turns:
        return row | read_turns(turns + (row["completion"] if isinstance(row.get("completion"), list) else []))
    if isinstance(row.get("prompt"), str):
        return row | {"instruction": row["prompt"], "output": row.get("completion", "")}
    return row | {"instruction": "", "output": row["text"]} if isinstance(row.get("text"), str) else None


def read_turns(turns: list[Any]) -> dict[str, str]:
    """Return a chat as {instruction: its first question, input: what lies between, output: its last answer}."""
    said = [
        (str(turn.get("role", turn.get("from"))), str(turn.get("content", turn.get("value", ""))))
        for turn in turns
        if isinstance(turn, Mapping)
    ]
    first = next((i for i, (role, _) in enumerate(said) if role in USERS), None)
    last = next((i for i in range(len(said) - 1, -1, -1) if said[i][0] in ANSWERERS), None)
    begin, end = (len(said) if first is None else first + 1), (len(said) if last is None else last)
    return {
        "instruction": "" if first is None else said[first][1],
        "input": "\n\n".join(f"{role}: {text}" for role, text in said[begin:end]),
        "output": "" if last is None else said[last][1],
    }

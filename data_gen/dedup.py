"""Drop the rows of a file whose text nearly repeats an earlier one: ROUGE-L F of 0.7 or more, exactly.

python -m data_gen.dedup rows.json --out kept.json --rejected dropped.jsonl
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_gen.base.cli import DataError, Failure, Parser, UsageError, run_command
from data_gen.base.files import read_rows, to_json_line, write_atomically
from data_gen.rows.rouge import Deduplicator, rouge_l

SUFFIXES = (".json", ".jsonl")
REPORT_EVERY_S = 10  # between lines of progress, if stderr is no terminal


def main(argv: list[str]) -> None:
    """Read FILE, keep the first of near-duplicate rows, and write the kept and dropped ones."""
    parser = Parser("dedup", "Keeps the first of rows whose ROUGE-L F is 0.7 or more, exactly.")
    parser.add_argument("file", help="Alpaca JSON (a list) or JSONL")
    parser.add_argument("--out", required=True, help="where the kept rows go: .json or .jsonl")
    parser.add_argument("--field", default="instruction", help="the text that is compared")
    parser.add_argument("--rejected", help="JSONL of the dropped rows, what they duplicate and how similar they are")
    args = parser.parse_args(argv)
    check_paths(args)
    rows = read_rows(args.file)
    texts = [get_text(row, args.field, f"{args.file}, row {number}") for number, row in enumerate(rows, 1)]

    began, deduplicator = time.monotonic(), Deduplicator()
    kept: list[int] = []
    dropped: list[tuple[int, int]] = []  # a row, and the row that it duplicates
    for index, text in enumerate(show_progress(texts)):
        found = deduplicator.add(text)
        if found is None:
            kept.append(index)
        else:
            dropped.append((index, kept[found]))
    seconds = time.monotonic() - began

    lines = [to_json_line(rows[index]) for index in kept]
    if args.out.endswith(".json"):
        lines = ["[\n", ",\n".join(line.rstrip("\n") for line in lines), "\n]\n"]
    write_lines(args.out, lines)
    if args.rejected:
        write_lines(args.rejected, (to_json_line(describe_rejection(rows, texts, *pair)) for pair in dropped))
    print(f"{len(rows):,} rows, {len(kept):,} kept, {len(dropped):,} dropped in {seconds:.1f} s: {args.out}")


def check_paths(args: Namespace) -> None:
    """Raise UsageError, with all problems at once, for output paths that cannot be written."""
    problems = []
    if Path(args.out).suffix not in SUFFIXES:
        problems.append(f"--out {args.out}: the suffix says the format; wanted {' or '.join(SUFFIXES)}")
    for name, path in (("--out", args.out), ("--rejected", args.rejected)):
        if path and not Path(path).absolute().parent.is_dir():
            problems.append(f"{name} {path}: there is no such folder")
    if args.rejected and Path(args.rejected).absolute() in (Path(args.out).absolute(), Path(args.file).absolute()):
        problems.append(f"--rejected {args.rejected} is a file of its own, not FILE or --out")
    if problems:
        raise UsageError("; ".join(problems))


def get_text(row: dict[str, Any], field: str, where: str) -> str:
    """Return a row's text in the given field. Raise DataError, which begins with where, if it is absent or no text."""
    if field not in row:
        raise DataError(f"{where}: no {field!r} among {', '.join(map(repr, row)) or 'no keys'}; --field names another")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field!r} is of type {type(row[field]).__name__}, wanted a string")
    return row[field]


def describe_rejection(rows: list[dict[str, Any]], texts: list[str], dropped: int, kept: int) -> dict[str, Any]:
    """Return the line about a dropped row and the kept row that it duplicates. Rows are numbered from 1."""
    return {
        "row": dropped + 1,
        "duplicates_row": kept + 1,
        "similarity": rouge_l(texts[dropped], texts[kept]),
        "duplicates": texts[kept],
        "dropped": rows[dropped],
    }


def show_progress(texts: list[str]) -> Iterator[str]:
    """Yield the texts, and show on stderr how many are done: a bar on a terminal, else a line every 10 s."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(texts, "comparing", console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for index, text in enumerate(texts):
        if time.monotonic() - last >= REPORT_EVERY_S:
            last = time.monotonic()
            print(f"{index:,} of {len(texts):,} rows compared", file=sys.stderr, flush=True)
        yield text


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Write a whole file. Raise Failure if it cannot be written."""
    try:
        write_atomically(path, lines)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error}") from error


if __name__ == "__main__":
    run_command(main)

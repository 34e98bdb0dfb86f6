"""Drop the rows of a file whose text nearly repeats an earlier one: ROUGE-L F of 0.7 or more, exactly.

python -m data_gen.dedup rows.json --out kept.json --rejected dropped.jsonl
python -m data_gen.dedup rows.jsonl --out kept.jsonl --field instruction
python -m data_gen.dedup chats.jsonl --out kept.jsonl --field prompt+context

Rows of tasks repeat an instruction over other inputs, so both are compared. `--field instruction` is the rule by which
data_gen.generate keeps the instructions that it makes, and Stanford's.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_gen.base.cli import DataError, Failure, Parser, UsageError, run_command
from data_gen.base.files import RowPlace, read_rows, to_json_line, write_atomically
from data_gen.rows.rouge import Deduplicator, rouge_l

SUFFIXES = (".json", ".jsonl")
TABLES = (".csv", ".tsv", ".parquet")
REPORT_EVERY_S = 10  # between lines of progress, if stderr is no terminal


def main(argv: list[str]) -> None:
    """Read FILE, keep the first of near-duplicate rows, and write the kept and dropped ones."""
    parser = Parser("dedup", __doc__)
    parser.add_argument("file", help="Alpaca JSON (a list) or JSONL")
    parser.add_argument("--out", required=True, help="where the kept rows go: .json or .jsonl")
    parser.add_argument(
        "--field",
        default="instruction+input",
        help="the text that is compared; several with + between, the later may lack",
    )
    parser.add_argument("--rejected", help="JSONL of the dropped rows, what they duplicate and how similar they are")
    args = parser.parse_args(argv)
    check_paths(args)
    rows, (first, *others) = read_rows(args.file), args.field.split("+")
    places = [RowPlace(args.file, number) for number in range(1, len(rows) + 1)]
    texts = [get_text(row, first, where) for row, where in zip(rows, places, strict=True)]
    rests = [get_rest(row, others, where) for row, where in zip(rows, places, strict=True)]
    began, kept, dropped = time.monotonic(), [], []  # dropped: a row, and the row that it duplicates
    for index, found in enumerate(find_duplicates(show_progress(texts), rests)):
        if found is None:
            kept.append(index)
        else:
            dropped.append((index, found))
    seconds = time.monotonic() - began

    lines = [to_json_line(rows[index]) for index in kept]
    if args.out.endswith(".json"):
        lines = ["[\n", ",\n".join(line.rstrip("\n") for line in lines), "\n]\n"]
    write_lines(args.out, lines)
    if args.rejected:
        write_lines(args.rejected, (to_json_line(describe_rejection(rows, texts, *pair)) for pair in dropped))
    print(f"{len(rows):,} rows, {len(kept):,} kept, {len(dropped):,} dropped in {seconds:.1f} s: {args.out}")
    n_other = sum(rows[a].get("input", "") != rows[b].get("input", "") for a, b in dropped)
    if n_other and "input" not in (first, *others):
        print(f"{n_other:,} of the dropped rows have another input; --field {args.field}+input compares it too")


def check_paths(args: Namespace) -> None:
    """Raise UsageError, with all problems at once, for a table, and output paths that cannot be written."""
    problems = []
    if Path(args.file).suffix.lower() in TABLES:
        problems.append(f"{args.file}: wanted JSON or JSONL; save the table as one, as pandas' to_json does")
    if Path(args.out).suffix not in SUFFIXES:
        problems.append(f"--out {args.out}: the suffix says the format; wanted {' or '.join(SUFFIXES)}")
    for name, path in (("--out", args.out), ("--rejected", args.rejected)):
        if path and not Path(path).absolute().parent.is_dir():
            problems.append(f"{name} {path}: there is no such folder")
    if args.rejected and Path(args.rejected).absolute() in (Path(args.out).absolute(), Path(args.file).absolute()):
        problems.append(f"--rejected {args.rejected} is a file of its own, not FILE or --out")
    if problems:
        raise UsageError("; ".join(problems))


def find_duplicates(texts: Iterable[str], rests: Sequence[str]) -> Iterator[int | None]:
    """Yield for each row the index of the earlier one that it duplicates, None for one that is kept.

    A row is a duplicate where its text repeats the text of a kept row, and its rest (other fields) the rest of a row
    that was kept with that text.
    """
    heads, rows_of_heads = Deduplicator(), []  # texts of which no two are duplicates, and the first row of each
    rests_of_heads: dict[int, tuple[Deduplicator, list[int]]] = {}  # of those that came again: their rests, and rows
    for index, (text, rest) in enumerate(zip(texts, rests, strict=True)):
        head = heads.add(text)
        if head is None:
            rows_of_heads.append(index)
            yield None
            continue
        if head not in rests_of_heads:
            first = Deduplicator()
            first.add(rests[rows_of_heads[head]])
            rests_of_heads[head] = first, [rows_of_heads[head]]
        known, rows = rests_of_heads[head]
        found = known.add(rest)
        if found is None:
            rows.append(index)
        yield None if found is None else rows[found]


def get_text(row: dict[str, Any], field: str, where: object) -> str:
    """Return a row's text in the given field. Raise DataError, which begins with where, if it is absent or no text."""
    if field not in row:
        raise DataError(f"{where}: no {field!r} among {', '.join(map(repr, row)) or 'no keys'}; --field names another")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field!r} is of type {type(row[field]).__name__}, wanted a string")
    return row[field]


def get_rest(row: dict[str, Any], fields: Sequence[str], where: object) -> str:
    """Return the texts of other fields, one a line; those that are absent or null are left out."""
    return "\n".join(get_text(row, field, where) for field in fields if row.get(field) is not None)


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

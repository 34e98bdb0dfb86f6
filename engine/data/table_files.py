"""CSV and parquet files: rows by the names of their columns."""

import csv
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.base.errors import DataError, summarize_error
from engine.data.values import MAX_ROW_BYTES, NO_UTF8, BadRow, Record, shorten

DELIMITERS = ",;\t"
BATCH = 256  # rows of a parquet file in memory at a time


def read_csv_records(data: mmap.mmap, path: Path) -> Iterator[Record]:
    """Yield the rows of a CSV file as {column: text}, numbered by their first line. Raise DataError for a broken file.

    The first line names the columns; the most frequent of comma, semicolon and tab in it divides them.
    """
    data.seek(3 if data[:3] == b"\xef\xbb\xbf" else 0)
    newline = data.find(b"\n")
    header = data[data.tell() : len(data) if newline < 0 else newline].decode(errors="replace")
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = (line.decode("utf-8", "surrogateescape") for line in iterate_lines(data))
    reader = csv.reader(lines, delimiter=max(DELIMITERS, key=header.count), strict=True)
    columns: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and not columns:
                columns = check_columns(cells, path)
            elif cells:
                yield Record(line, line, 0, data.tell(), make_row(columns, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: no CSV from here on: {error}; close its quotes, or save it as JSONL") from None


def iterate_lines(data: mmap.mmap) -> Iterator[bytes]:
    """Yield the lines from the file's position on. Raise csv.Error for one of more bytes than a row may have."""
    while (start := data.tell()) < len(data):
        if data.find(b"\n", start, start + MAX_ROW_BYTES) < 0 and len(data) - start > MAX_ROW_BYTES:
            raise csv.Error(f"a line of more than {MAX_ROW_BYTES} bytes")
        yield data.readline()


def check_columns(cells: list[str], path: Path) -> list[str]:
    """Return the names of the columns. Raise DataError where one is empty or comes twice."""
    if len(set(cells)) < len(cells) or "" in cells:
        raise DataError(
            f"{path}: got the columns {shorten(cells)}, wanted a first line that names each column once; delete lines "
            "above it, and columns without a name (pandas: to_csv(FILE, index=False))"
        )
    return cells


def make_row(columns: list[str], cells: list[str]) -> dict[str, str] | BadRow:
    """Return {column: cell}, or why the cells are no row."""
    if len(cells) != len(columns):
        return BadRow(f"got {len(cells)} cells, wanted {len(columns)}, one for each of the columns {shorten(columns)}")
    for column, cell in zip(columns, cells, strict=True):
        if any("\udc80" <= character <= "\udcff" for character in cell):  # what surrogateescape makes of such bytes
            return BadRow(f"{column}: {NO_UTF8}")
    return dict(zip(columns, cells, strict=True))


def read_parquet_records(data: mmap.mmap, path: Path) -> Iterator[Record]:
    """Yield the rows of a parquet file. Raise DataError for a broken file, and where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: got parquet, which wants pyarrow: pip install 'cria-engine[parquet]'") from None
    try:
        file: Any = ParquetFile(pyarrow.BufferReader(data))
        rows = file.metadata.num_rows
        number = 0
        for batch in file.iter_batches(BATCH):
            for value in batch.to_pylist():
                number += 1
                yield Record(number, 0, 0, len(data) * number // rows, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: no sound parquet file: {summarize_error(error)}; download it anew") from None

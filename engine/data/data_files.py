"""Dataset files: which kind each is by its content, and its records."""

import gzip
import mmap
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from engine.base.errors import DataError
from engine.data.json_files import read_json_records
from engine.data.table_files import read_csv_records, read_parquet_records
from engine.data.values import Record

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # Path makes one slash of two
TABLES = (".csv", ".tsv")
UTF16 = "UTF-16, not UTF-8; save it as UTF-8, as `iconv -f UTF-16 -t UTF-8 FILE` does"
OTHERS = {  # what a file begins with that holds no rows: what it is, and what to do
    b"version https://git-lfs": "a git-lfs pointer, not the data; fetch it with `git lfs pull`",
    b"PK\3\4": "a zip archive or an Excel sheet; unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"ARROW1": "an Arrow file; save it as parquet or JSONL",
    b"\xff\xff\xff\xff": "an Arrow stream; save it as parquet or JSONL",
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind (.xls); save the sheet as CSV",
    b"SQLite format 3": "an SQLite database; save its rows as JSONL",
    b"<": "a web page or XML; download the data itself",
}


def map_file(path: Path) -> mmap.mmap:
    """Return the file's bytes, mapped; they are unmapped with the last reference. Raise DataError."""
    try:
        info = os.stat(path)  # before open(), which waits for a writer when the path is a pipe
        if stat.S_ISREG(info.st_mode) and info.st_size:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: got '{error.strerror}', wanted a dataset; {suggest_path(path)}") from None
    kind = {stat.S_IFREG: "an empty file", stat.S_IFDIR: "a folder"}.get(stat.S_IFMT(info.st_mode), "no regular file")
    raise DataError(f"{path}: got {kind}, wanted rows as JSON, JSONL, CSV or parquet; name a file that holds some")


def suggest_path(path: Path) -> str:
    """Return what to do about a path that cannot be opened."""
    if ADDRESS.match(str(path)):
        return "nothing is fetched from an address: download the file, and name that"
    if len(path.parts) == 2 and not path.suffix and not path.parent.exists():
        return f"of the Hub's, `hf download --repo-type dataset {path} --local-dir DIR` fetches the files: name one"
    return "check path and permissions"


def unpack_gzip(data: mmap.mmap, path: Path) -> mmap.mmap:
    """Return what a gzip file holds, mapped from a temporary file that is gone with it. Raise DataError."""
    try:
        with tempfile.TemporaryFile() as unpacked:
            with gzip.GzipFile(fileobj=data) as file:
                shutil.copyfileobj(file, unpacked, 1 << 20)
            if size := unpacked.tell():
                unpacked.flush()
                return mmap.mmap(unpacked.fileno(), size, access=mmap.ACCESS_READ)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: got a gzip file that cannot be unpacked ({error}); download it anew") from None
    raise DataError(f"{path}: got a gzip file of nothing, wanted rows; name a file that holds some")


def read_records(path: Path) -> Iterator[Record]:
    """Return the records of a file of JSON, JSONL, CSV or parquet, also gzipped. Raise DataError.

    A record's position is in the file as it is on the disk.
    """
    data = map_file(path)
    packed_bytes = len(data)
    if data[:2] == GZIP:
        data = unpack_gzip(data, path)
    start = bytes(data[:256]).lstrip(b"\xef\xbb\xbf \t\r\n")
    for begin, what in OTHERS.items():
        if start.startswith(begin):
            raise DataError(f"{path}: got {what}")
    reader = read_json_records
    if start.startswith(PARQUET):
        reader = read_parquet_records
    elif is_table(path) and start[:1] not in (b"[", b"{"):
        reader = read_csv_records
    records = reader(data, path)
    if packed_bytes == len(data):
        return records
    return (record._replace(position=record.position * packed_bytes // len(data)) for record in records)


def is_table(path: Path) -> bool:
    """Return whether a file is CSV or TSV by its name, also gzipped."""
    return path.name.lower().removesuffix(".gz").endswith(TABLES)


def has_rows(path: Path) -> bool:
    """Return whether a file is one of rows, not of plain text: by its first byte, or as a table by its name."""
    start = bytes(map_file(path)[:256]).lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith((b"[", b"{", GZIP, PARQUET)) or is_table(path)

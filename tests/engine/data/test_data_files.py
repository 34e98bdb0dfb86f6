"""What a file that holds no rows is told to be, and which files are of rows."""

import gzip
import json

import pytest

from engine.base.errors import DataError
from engine.data.data_files import has_rows, map_file, read_records
from engine.data.json_files import EACH, find_wrapped_rows

OTHERS = {
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n", "zip archive": b"PK\3\4rest",
    "zstd archive": b"\x28\xb5\x2f\xfdrest", "xz archive": b"\xfd7zXZ\0", "bzip2 archive": b"BZh91AY",
    "Arrow file": b"ARROW1\0\0", "Arrow stream": b"\xff\xff\xff\xff\x10\0", "UTF-16, not": b"\xff\xfe[\0",
    "iconv": b"\xfe\xff\0[", "Excel workbook of the old kind": b"\xd0\xcf\x11\xe0\xa1",
    "SQLite database": b"SQLite format 3\0", "web page": b"\n <html>",
}  # fmt: skip


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_something_else_is_named(what, is_packed, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(gzip.compress(OTHERS[what], mtime=0) if is_packed else OTHERS[what])
    with pytest.raises(DataError, match=f"rows.json: got .*{what}"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content", "is_rows"),
    [
        ("a.txt", b"[]", True), ("a.txt", b"\xef\xbb\xbf \r\n\t{}", True), ("a", gzip.compress(b"x", mtime=0), True),
        ("a", b"PAR1", True), ("a.CSV", b"x", True), ("a.tsv.gz", b"x", True), ("A.CSV.GZ", b"x", True),
        ("a.txt", b"Say it.", False),
        ("a.json", b'"[x]"', False),
    ],
)  # fmt: skip
def test_a_file_of_rows_is_known_by_its_begin_or_as_a_table_by_its_name(name, content, is_rows, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert has_rows(tmp_path / name) == is_rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_positions_are_in_the_file_as_it_is_on_the_disk(name, tmp_path):
    lines = [f'{{"text": "row {i}"}}\n' for i in range(200)] if name == "rows.jsonl" else ["text\n", *["a b\n"] * 200]
    (tmp_path / name).write_text("".join(lines))
    plain = [record.position for record in read_records(tmp_path / name)]
    packed = gzip.compress("".join(lines).encode())
    (tmp_path / f"{name}.gz").write_bytes(packed)
    found = [record.position for record in read_records(tmp_path / f"{name}.gz")]
    n_bytes = sum(map(len, lines))
    assert len(plain) == 200 and found == [position * len(packed) // n_bytes for position in plain]
    assert n_bytes // 2 < plain[-1] <= n_bytes and len(packed) // 2 < found[-1] <= len(packed)


def test_what_is_no_file_of_bytes_is_named(tmp_path):
    (tmp_path / "empty").touch()
    for name, what in (("", "a folder"), ("empty", "an empty file")):
        with pytest.raises(DataError, match=f"got {what}, wanted rows as JSON, JSONL, CSV or parquet"):
            read_records(tmp_path / name)


def test_a_damaged_gzip_file_is_named(tmp_path):
    """Cut off, of another sum, and of blocks that there are none of."""
    whole = gzip.compress(b'{"text": "a"}\n' * 99)
    for content in (whole[:-9], whole[:-8] + b"\0" * 8, whole[:10] + b"\xff" * 40):
        (tmp_path / "rows.json.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"got a gzip file that cannot be unpacked \(.*\); download it anew"):
            list(read_records(tmp_path / "rows.json.gz"))


@pytest.mark.parametrize("first", [True, False])
def test_of_several_lists_the_longest_is_taken_for_the_rows(first, tmp_path):
    data, notes = {"data": [{"text": "a"}] * 9}, {"notes": [{"by": "me"}]}
    (tmp_path / "x.json").write_text(json.dumps(data | notes if first else notes | data))
    assert find_wrapped_rows(map_file(tmp_path / "x.json"), 0) == "'data'"


def test_objects_are_the_rows_of_an_object_that_holds_several_and_nothing_else(tmp_path):
    row = {"instruction": "a", "output": "b"}
    cases = {EACH: {"1": row, "2": row}, None: {"1": row, "2": row, "version": 3}, "": {"1": row}}
    for key, value in cases.items():
        (tmp_path / "x.json").write_text(json.dumps(value))
        assert find_wrapped_rows(map_file(tmp_path / "x.json"), 0) == (key or None)

"""Files of rows that a report is to be made of: damage is told with the file's name."""

import gzip
import json

import pytest

from data_gen.base.cli import DataError
from data_gen.page.row_files import read_values

ROWS = [{"instruction": f"Name {i}.", "output": "x"} for i in range(50)]
PACKED = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode(), mtime=0)


def test_a_packed_file_is_read_as_what_is_in_it(tmp_path):
    for name, content in (("a.jsonl.gz", PACKED), ("a.JSONL.GZ", PACKED), ("b.json", json.dumps(ROWS).encode())):
        (tmp_path / name).write_bytes(content)
        assert read_values(tmp_path / name) == ROWS, name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", PACKED[:-20]),  # cut short
        ("a.jsonl.gz", PACKED[:-6] + b"\0" * 6),  # another checksum
        ("a.jsonl.gz", b"[]"),
        ("a.json", b'[{"instruction": "Name'),
        ("a.json", b"[" * 100_000),
        ("a.jsonl", b"\xff\xfe{}"),
        ("none.json", None),
    ],
)
def test_a_damaged_file_is_told_by_its_name(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read: "):
        read_values(tmp_path / name)


def test_a_line_that_is_no_json_costs_itself_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n[2]\n')
    assert read_values(tmp_path / "a.jsonl") == [{"a": 1}, None, [2]]

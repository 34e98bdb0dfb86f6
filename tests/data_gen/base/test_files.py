"""Files: written whole or not at all, and read with the place of what is wrong in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.base.cli import DataError
from data_gen.base.files import RowPlace, read_rows, to_json_line, write_atomically
from engine.base import errors as engine_errors
from engine.data.rows import read_rows as read_engine_rows
from tests.helpers.run import ROOT

# ---- whole files -----------------------------------------------------------------------------------------------------


def chunks_that_fail(error):
    yield "new" * 100_000
    raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("x"), KeyboardInterrupt()])
def test_a_file_that_is_not_written_whole_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "rows.json"
    write_atomically(path, ["old"])
    with pytest.raises(type(error)):
        write_atomically(path, chunks_that_fail(error))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["rows.json"]


def test_a_surrogate_that_utf8_cannot_hold_leaves_the_old_one(tmp_path):
    path = tmp_path / "rows.json"
    write_atomically(path, ["old"])
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, ["new\ud800"])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["rows.json"]


def test_a_disk_that_is_full_leaves_the_old_one(tmp_path):
    text = f"""
import resource, signal
from data_gen.base.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomically({str(tmp_path / "rows")!r}, ["old"])
try:
    write_atomically({str(tmp_path / "rows")!r}, ["new"] * 1000)
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "27\n" and (tmp_path / "rows").read_text() == "old" and os.listdir(tmp_path) == ["rows"]


def test_a_file_is_synced_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path, order = tmp_path / "x", []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(("sync", os.fstat(fd).st_size)), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", Path(b))), real_replace(a, b)))
    write_atomically(path, ["é\n", "b\r\n"])
    assert order == [("sync", 6), ("replace", path)] and path.read_bytes() == "é\nb\r\n".encode()


def test_a_file_where_none_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none" / "x", tmp_path / "file" / "x"):
        with pytest.raises(OSError):
            write_atomically(path, ["x"])


# ---- rows ------------------------------------------------------------------------------------------------------------

# Lone surrogates of one kind: two that are a pair are one character in JSON.
TEXTS = st.text(st.sampled_from("ab\ud800\ud999\u2028\x85\r\n\0\ufeffé\U0001f600"), max_size=6)
VALUES = st.none() | st.booleans() | st.integers() | st.lists(TEXTS, max_size=2) | TEXTS


@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=2), max_size=3))
@settings(deadline=None)
def test_rows_come_back_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [to_json_line(row) for row in rows]
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in lines)
    write_atomically(path, lines)
    assert read_rows(path) == rows


def test_text_is_written_as_it_is_read():
    assert (
        to_json_line({"a": "é\U0001f600"}) == '{"a": "é\U0001f600"}\n'
        and to_json_line(["é\ud800"]) == '["\\u00e9\\ud800"]\n'
    )


FORMS = {
    "lines": '{"a": 1}\n{"a": "é"}\n',
    "no end": '{"a": 1}\n{"a": "é"}',
    "CRLF": '{"a": 1}\r\n{"a": "é"}\r\n',
    "BOM": '\ufeff{"a": 1}\n{"a": "é"}\n',
    "BOM and list": '\ufeff [{"a": 1},\r\n {"a": "é"}]\r\n',
    "empty lines": '\n  \n{"a": 1}\n\n{"a": "é"}\n\n',
    "list": '\n[{"a": 1}, {"a": "é"}]',
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_rows_are_read_from_every_form_of_file(tmp_path, text):
    path = tmp_path / "rows"
    path.write_bytes(text.encode())
    assert read_rows(path) == [{"a": 1}, {"a": "é"}]


def test_an_empty_file_has_no_row(tmp_path):
    (tmp_path / "rows").write_text("")
    assert read_rows(tmp_path / "rows") == []


BAD = {
    "third line": ('{"a": 1}\n\n{"a": 2,}\n', "rows:3 is not JSON"),
    "third line, CRLF": ('{"a": 1}\r\n{"a": 1}\r\n{"a', "rows:3 is not JSON"),
    "deep line": ('{"a": 1}\n' + '{"a":' * 100_000, "rows:2 is not JSON"),
    "deep list": ("[" * 100_000, "rows is not JSON"),
    "broken list": ('[{"a": 1},]', "rows:1:11 is not JSON"),
    "a row that is none": ('{"a": 1}\n"x"\n', "rows:2: got str, wanted an object"),
    "a key twice": ('{"a": 1}\n{"b": {"k": 1, "a": 2, "k": 2}}\n', "rows:2 .* got the key 'k' twice, wanted it once"),
    "a key twice in a list": ('[{"a": 1, "a": 1}]', "rows .* got the key 'a' twice"),
    "a list in a list": ("[{}, [1]]", "rows:1:6: row 2: got list, wanted an object"),
    "number of 5,000 digits": ("1" * 5000, "rows:1 is not JSON"),
}


@pytest.mark.parametrize("text, said", BAD.values(), ids=BAD)
def test_what_is_wrong_in_a_file_and_where(tmp_path, text, said):
    path = tmp_path / "rows"
    path.write_bytes(text.encode())
    with pytest.raises(DataError, match=said):
        read_rows(path)


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff[{"a": "é"}, {"a": 2},\r\n  {"a": 3}]',
        '[\n{"a": 1},\n{"a": "}{"},\n{"a": 3}\n]',
        '[{"a":\n1}, {"a": 2}\n,\n\n{"a": 3}]',
        '\n{"a": 1}\n\n{"a": 2}\n{"a": 3}',
    ],
)
def test_a_row_is_named_as_a_fine_tune_names_it(tmp_path, text):
    path = tmp_path / "rows"
    path.write_bytes(text.encode())
    assert [str(RowPlace(path, number)) for number in (1, 2, 3)] == name_bad_rows(path)


def name_bad_rows(path):
    """The places of a file's three rows, as engine's reader names those that it refuses."""
    with pytest.raises(engine_errors.DataError) as caught:
        read_engine_rows([path])
    lines = str(caught.value).split("\n")[1:]
    return [line.strip().partition(": instruction: missing")[0] for line in lines]


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin1").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match=r"latin1 cannot be read: no UTF-8 at byte 7; .* save it as UTF-8"):
        read_rows(tmp_path / "latin1")
    for name in ("latin1", "none", ""):
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(tmp_path / name)

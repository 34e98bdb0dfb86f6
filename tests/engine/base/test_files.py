"""Files that are whole or absent, whatever the disk or a signal does in between."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.base.files import make_json_safe, read_json, sync_file, write_atomically, write_json


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, [b"new", b"er"])
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_all_of_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What Python still buffers when the system is asked to sync would not be on the disk."""
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "file", [b"a", b"b"])
    assert calls == [2, "replace"] and (tmp_path / "file").read_bytes() == b"ab"
    with (tmp_path / "text").open("w") as file:
        file.write("\u00e9")
        sync_file(file)
        assert calls[2:] == [2]


def test_json_comes_back_and_what_is_no_object_is_damage(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, "é"], "b": None})
    assert read_json(path) == {"a": [1, "é"], "b": None}
    assert path.read_text() == json.dumps({"a": [1, "é"], "b": None}, indent=1) + "\n"
    for content in (b"", b"[1]", b"{", b'{"a": "\xff"}', b'{"a":' + b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.json: is damaged, .*; ask for it again"):
            read_json(path, "ask for it again")
    assert read_json(tmp_path / "missing") == read_json(path / "in a file") == {}
    with pytest.raises(DataError, match="IsADirectoryError"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    "value, safe",
    [
        (1.5, 1.5), (float("nan"), None), (float("inf"), None), (-float("inf"), None), (None, None), (True, True),
        (3, 3),
        ("a\ud800", "a?"), ({1: (float("nan"), [2])}, {"1": [None, [2]]}), (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (np.int64(7), 7), (np.array(2), 2), (Path("x"), "x"),
    ],
)  # fmt: skip
def test_values_as_json_can_hold_them(value, safe):
    found = make_json_safe(value)
    assert found == safe and type(found) is type(safe) and json.loads(json.dumps(found, allow_nan=False)) == safe

"""Files of figures."""

import json
import os

import pytest

from kernels.measure import machine


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "b.json"
    machine.write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        machine.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}

"""The file of the gate's records."""

import json

import pytest
import triton

from kernels.compiled import records
from kernels.compiled.machine_code import CHIPS


def record(case, registers, op="o", chip="sm_90"):
    fields = {"op": op, "kernel": "k", "case": case, "chip": chip, "triton": triton.__version__, "tile": {}}
    return fields | {"registers": registers}


@pytest.fixture(autouse=True)
def no_assembler(monkeypatch):
    monkeypatch.setattr(records, "ptxas_versions", lambda: {"ptxas": "1.2"})


def test_records_of_other_ops_and_chips_are_kept(tmp_path):
    path = tmp_path / "static.json"
    records.save_records(
        path, [record("a", 1), record("b", 2), record("a", 3, "p"), record("a", 4, "o", "sm_80")], (), CHIPS
    )
    records.save_records(path, [record("a", 5)], ["o"], ["sm_90"])
    kept = {(r["op"], r["case"], r["chip"], r["registers"]) for r in json.loads(path.read_text())["records"]}
    assert kept == {("o", "a", "sm_90", 5), ("p", "a", "sm_90", 3), ("o", "a", "sm_80", 4)}


def test_records_of_other_versions_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "static.json"
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    records.save_records(path, [record("b", 1), record("a", 2)], (), CHIPS)
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert records.find_differences(path, [], (), CHIPS) == []
    records.save_records(path, [record("a", 3)], (), CHIPS)
    once = path.read_text()
    records.save_records(path, [record("a", 3)], (), CHIPS)
    assert path.read_text() == once
    data = json.loads(once)
    assert [(r["case"], r["triton"], r["registers"]) for r in data["records"]] == [
        ("a", "3.6.0", 2),
        ("a", "3.9.0", 3),
        ("b", "3.6.0", 1),
    ]
    assert set(data["versions"]) == {"3.6.0", "3.9.0"}
    assert records.find_differences(path, [record("a", 3)], (), CHIPS) == []
    assert [line[0] for line in records.find_differences(path, [record("a", 4)], (), CHIPS)] == ["-", "+"]

"""The file of the gate's records."""

import json

import triton

from kernels.compiled import records
from kernels.compiled.machine_code import CHIPS


def test_records_of_other_versions_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "static.json"
    monkeypatch.setattr(records, "ptxas_versions", lambda: {"ptxas": "1.2"})

    def record(case, registers):
        fields = {"op": "o", "kernel": "k", "case": case, "chip": "sm_90", "triton": triton.__version__, "tile": {}}
        return fields | {"registers": registers}

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    records.save_records(path, [record("b", 1), record("a", 2)])
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert records.find_differences(path, [], (), CHIPS) == []
    records.save_records(path, [record("a", 3)])
    once = path.read_text()
    records.save_records(path, [record("a", 3)])
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

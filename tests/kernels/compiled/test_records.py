"""The file of the gate's records."""

import json
from types import SimpleNamespace

import pytest
import torch
import triton

from kernels.compiled import records
from kernels.compiled.machine_code import CHIPS, Facts


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


@pytest.mark.parametrize("entry", [None, ("rope", "rotate", "sm_90", "64")])
def test_a_launch_as_its_record_has_it(entry, monkeypatch):
    """The tile is of constants in capitals that are whole numbers; bytes are of what is loaded and stored."""
    monkeypatch.setattr(records, "digest_launch", lambda launch: "digest")
    monkeypatch.setattr(records, "programs_per_sm", lambda facts, chip: (facts.registers, chip))
    launch = SimpleNamespace(
        entry=entry, name="_rotate", case=SimpleNamespace(op="rope_case", label="H=2"), chip="sm_90",
        constexprs=lambda: {"TOKENS": 8, "heads": 4, "WARM": True, "KIND": "bf16", "HEADS": 2},
        options=SimpleNamespace(num_warps=4, num_stages=3),
        signature={"q": "*bf16", "TOKENS": "constexpr", "cos": "*fp32", "n": "i32", "out": "*bf16"},
        arguments={"q": torch.empty(10, 6, dtype=torch.bfloat16), "cos": torch.empty(9), "n": 3,
                   "out": torch.empty(60).half()},
    )  # fmt: skip
    facts = Facts(
        registers=33, stack_bytes=8, shared_bytes=4608, warps=4, tensor_columns=64, instructions=700, alu=90, spills=2,
        spills_in_loops=1, matrix={"HGMMA": 4, "HMMA": 1}, wide=5, narrow=3, loaded=[0, 1], stored=[3],
    )  # fmt: skip
    table = {"rotate": {"sm_90": {"64": {"from": "measured"}}}}
    made = records.make_record(launch, facts, {"rope": table}.__getitem__)
    assert made == {
        "op": "rope" if entry else "rope_case", "kernel": "_rotate", "case": "H=2", "chip": "sm_90",
        "triton": triton.__version__, "tile": {"TOKENS": 8, "HEADS": 2}, "num_warps": 4, "num_stages": 3,
        "from": "measured" if entry else "fixed", "instructions": 700, "alu": 90, "registers": 33, "stack_bytes": 8,
        "spills": 2, "shared_bytes": 4608, "tensor_columns": 64, "programs_per_sm": (33, "sm_90"),
        "matrix": {"HGMMA": 4, "HMMA": 1}, "wide": 5, "narrow": 3, "inputs": "digest",
        "bytes_per_element": round((60 * 2 + 9 * 4 + 60 * 2) / 60, 2),
    }  # fmt: skip
    line = records.format_record(made | {"programs_per_sm": 7})
    assert line == (
        f"sm_90  {made['op']}._rotate (H=2) TOKENS=8 HEADS=2 warps 4 stages 3: 700 instructions, 33 registers, "
        "2 spills, 4.5 KB shared, 7 programs an SM, HGMMA+HMMA, 5 of 8 accesses wide, 4.6 bytes an element"
    )
    assert "no matrix, 5 of 8" in records.format_record(made | {"matrix": {}})


def test_a_difference_is_told_both_ways_and_digests_are_none(tmp_path):
    path = tmp_path / "static.json"
    records.save_records(
        path, [record("a", 1) | {"inputs": "x"}, record("b", 2, "p"), record("c", 3, chip="sm_80")], (), CHIPS
    )
    assert records.find_differences(path, [record("a", 1) | {"inputs": "y"}], ["o"], ["sm_90"]) == []
    changed = records.find_differences(path, [record("a", 9)], (), ["sm_90"])
    assert changed == [
        f"- {json.dumps(record('a', 1))}", f"- {json.dumps(record('b', 2, 'p'))}", f"+ {json.dumps(record('a', 9))}"
    ]  # fmt: skip
    assert records.load_records(tmp_path / "none.json") == {"versions": {}, "records": []}

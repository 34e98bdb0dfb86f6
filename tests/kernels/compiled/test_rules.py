"""The gate can refuse: each rule against a kernel that breaks it, and one that keeps it."""

import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels.compiled.launch_cases import Make, all_cases
from kernels.compiled.launches import patched
from kernels.compiled.machine_code import CHIPS, SHARED_BLOCK, TENSOR_COLUMNS, Facts
from kernels.compiled.rules import Violation, find_unplayed, find_unused, judge, operator_names
from kernels.ops import common
from tests.helpers.compiler import run_compiler


@pytest.fixture(scope="module")
def refused():
    """What the gate says of tests/helpers/gate_kernels.py."""
    done = run_compiler("tests.helpers.gate_kernels")
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


REFUSALS = {
    "copy, unaligned pointer": {("wide", chip) for chip in CHIPS},
    "copy, every other element": {("wide", chip) for chip in CHIPS},
    "sum, few registers": {("stack", chip) for chip in CHIPS},
    "matmul in fp32": {("matrix", chip) for chip in CHIPS},
    "matmul, 16 rows": {("matrix", "sm_90"), ("matrix", "sm_100")},  # too few for HGMMA: HMMA, as on sm_80
    "matmul, many stages": {("shared", chip) for chip in CHIPS},
    "matmul, refused": {("compiles", chip) for chip in CHIPS},
}


@pytest.mark.timeout(3600)  # whichever comes first waits for the compiler
def test_a_bad_kernel_is_refused_by_its_rule_and_a_good_one_is_not(refused):
    found = {}
    for violation in refused["violations"]:
        found.setdefault(violation["case"], set()).add((violation["rule"], violation["chip"]))
    found["matmul, many stages"].discard(("stack", "sm_80"))  # it may spill as well
    assert found == REFUSALS
    good = {record["case"] for record in refused["records"]} - set(REFUSALS)
    assert good == {"copy", "sum", "matmul"}


@pytest.mark.timeout(3600)
def test_a_violation_names_kernel_chip_rule_and_numbers(refused):
    shared = next(v for v in refused["violations"] if v["rule"] == "shared" and v["chip"] == "sm_90")
    text = str(Violation(**shared))
    assert text == "gate matmul sm_90 matmul, many stages: shared: got 393216 bytes; wanted at most 232448"


@pytest.mark.timeout(3600)
def test_records_hold_what_the_code_shows(refused):
    records = {(r["case"], r["chip"]): r for r in refused["records"]}
    copy = records["copy", "sm_90"]
    assert copy["bytes_per_element"] == 4.01 and copy["spills"] == 0 and (copy["wide"], copy["narrow"]) == (4, 1)
    assert copy["tile"] == {"BLOCK": 2048} and copy["num_warps"] == 4 and copy["from"] == "fixed"
    kinds = [set(records["matmul", chip]["matrix"]) for chip in CHIPS]
    assert kinds == [{"HMMA"}, {"HGMMA"}, {"UTCHMMA"}]
    spilled = records["sum, few registers", "sm_90"]
    said = next(v for v in refused["violations"] if v["case"] == spilled["case"] and v["chip"] == "sm_90")["got"]
    stack, instructions, in_loops = map(int, re.findall(r"\d+", said))
    assert (stack, instructions) == (spilled["stack_bytes"], spilled["spills"]) and 0 < in_loops < instructions


WITHIN = {"shared_bytes": SHARED_BLOCK["sm_90"] * 1024, "tensor_columns": TENSOR_COLUMNS}


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        (WITHIN, None), ({"stack_bytes": 8}, "stack"), ({"spills": 1}, "stack"),
        ({"shared_bytes": WITHIN["shared_bytes"] + 1}, "shared"), ({"tensor_columns": TENSOR_COLUMNS + 1}, "shared"),
        ({"dots": 1, "matrix_in_loops": {"HGMMA": 4}}, None), ({"dots": 1}, "matrix"),
        ({"dots": 1, "matrix_in_loops": {"HGMMA": 4, "HMMA": 1}}, "matrix"),
    ],
)  # fmt: skip
def test_one_fact_alone_breaks_a_rule_and_a_limit_itself_is_kept(facts, rule):
    launch = SimpleNamespace(
        case=SimpleNamespace(op="op", label="case"), name="kernel", chip="sm_90",
        arguments={"x": torch.empty(1, dtype=torch.bfloat16, device="meta")},
    )  # fmt: skip
    kept = Facts(registers=32, stack_bytes=0, shared_bytes=0, warps=4)
    assert [violation.rule for violation in judge(launch, replace(kept, **facts))] == [rule] * bool(rule)


@pytest.mark.parametrize(
    ("chip", "triton", "rules"),
    [("sm_90", (3, 6), ["order"]), ("sm_90", (3, 9), ["order"]), ("sm_100", (3, 9), ["order"]), ("sm_100", (3, 8), [])],
)
def test_a_missing_fence_breaks_a_rule_where_the_kernel_may_run(chip, triton, rules, monkeypatch):
    """On sm_100 before Triton 3.9 kernels are refused at their launch, and the gate has nothing to add."""
    monkeypatch.setattr("kernels.ops.async_proxy.TRITON", triton)
    launch = SimpleNamespace(
        case=SimpleNamespace(op="op", label="case"), name="kernel", chip=chip,
        arguments={"x": torch.empty(1, dtype=torch.bfloat16, device="meta")},
    )  # fmt: skip
    found = judge(launch, Facts(registers=32, stack_bytes=0, shared_bytes=0, warps=4, unordered=["x", "y"]))
    assert [violation.rule for violation in found] == rules
    assert all(violation.got == "2 times, first x" for violation in found)


def test_a_launch_table_entry_that_no_case_launches_is_reported():
    table = {
        "forward": {"sm_90": {"64": {"num_warps": 4, "from": "static"}, "128": {"num_warps": 8, "from": "static"}}}
    }
    found = find_unused({("op", "forward", "sm_90", "64")}, {"op": table}, ("sm_80", "sm_90"))
    assert [str(v).split(":")[0] for v in found] == ["op forward sm_90 size 128"]


def test_every_case_gives_its_function_what_it_takes():
    with patched(common, chip_override="sm_90"):
        for case in all_cases():
            function, *args = case.build(Make())
            inspect.signature(getattr(function, "launch", function)).bind(*args)


def test_an_operator_that_no_case_launches_is_reported():
    names = {name for name in operator_names() if "of_tests" not in name}  # tests of the same process add some
    cases = [case for case in all_cases() if "backward" not in case.label]
    found = [violation.op for violation in find_unplayed(cases, names)]
    assert "cria::rms_norm_backward" in found and "cria::rms_norm_forward" not in found
    assert find_unplayed(all_cases(), names) == []

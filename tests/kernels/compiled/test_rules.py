"""The gate can refuse: each rule against a kernel that breaks it, and one that keeps it."""

import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels.compiled import rules
from kernels.compiled.launch_cases import Make, all_cases
from kernels.compiled.launches import patched
from kernels.compiled.machine_code import CHIPS, SHARED_BLOCK, TENSOR_COLUMNS, Facts, Stream
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


def told_of(facts, chip="sm_90", dtype=torch.bfloat16):
    launch = SimpleNamespace(
        case=SimpleNamespace(op="op", label="case"), name="kernel", chip=chip,
        arguments={"n": 3, "x": torch.empty(1, dtype=dtype, device="meta")},
    )  # fmt: skip
    return [str(violation) for violation in judge(launch, facts)]


def test_a_violation_is_told_with_its_numbers():
    good = Facts(registers=32, stack_bytes=0, shared_bytes=0, warps=4)
    head = "op kernel sm_90 case: "
    assert told_of("x" * 40 + "y" * 500) == [f"{head}compiles: got {'y' * 500}; wanted a kernel"]
    assert told_of(replace(good, stack_bytes=8, spills=3, spills_in_loops=2)) == [
        f"{head}stack: got 8 bytes, 3 LDL/STL, 2 of them in loops; wanted none"
    ]
    assert told_of(replace(good, tensor_columns=513)) == [
        f"{head}shared: got 513 columns of tensor memory; wanted at most 512"
    ]
    assert told_of(replace(good, dots=1, matrix_in_loops={"HMMA": 4, "HGMMA": 2})) == [
        f"{head}matrix: got 4 HMMA, 2 HGMMA in loops; wanted HGMMA alone"
    ]
    assert told_of(replace(good, dots=1)) == [f"{head}matrix: got none in loops; wanted HGMMA alone"]
    assert told_of(replace(good, dots=1), dtype=torch.float32) == []
    assert told_of(replace(good, dots=1, matrix_in_loops={"HMMA": 1}), "sm_80") == []


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ([(512, 4, 128), (512, 2, 64)], []), ([(512, 4, 128), (512, 2, 32)], [(32, 512, 2)]),
        ([(512, 4, 64), (512, 2, 32)], [(64, 512, 1), (32, 512, 2)]), ([(512, 2, 128), (64, 4, 16)], []),
        ([(512, 2, 128), (65, 2, 16)], [(16, 65, 2)]), ([(512, 2, 0)], [(0, 512, 1)]), ([], []),
    ],
)  # fmt: skip
def test_accesses_are_as_wide_as_the_widest_elements_allow(streams, said):
    """Of tiles that are more than an eighth of the largest."""
    facts = Facts(registers=32, stack_bytes=0, shared_bytes=0, warps=4)
    facts.streams = [Stream(i + 1, False, n, size, bits) for i, (n, size, bits) in enumerate(streams)]
    got = "; ".join(f"{bits} bits in the load of {n} elements in line {line}" for bits, n, line in said)
    assert told_of(facts) == [f"op kernel sm_90 case: wide: got {got}; wanted 128 bits"] * bool(said)


def test_the_gate_compiles_and_judges_what_is_not_known(monkeypatch):
    """Chip by chip; of what fails to compile there is no record."""
    asked = []
    names = ["a", "b", "c"]

    def record(case, chip, table):
        asked.append((case, chip, table))
        return [SimpleNamespace(name=f"{case} {chip}", entry=(case, chip))]

    monkeypatch.setattr(rules, "record_launches", record)
    monkeypatch.setattr(rules, "describe_launch", lambda launch, table: f"about {launch.name}")
    monkeypatch.setattr(rules, "find_known", lambda launches, told, old: asked.append((told, old)) or {1: "known"})
    monkeypatch.setattr(rules, "compile_all", lambda launches, workers: asked.append(workers) or [
        "an error" if launch.name == "c sm_80" else SimpleNamespace(of=launch.name) for launch in launches
    ])  # fmt: skip
    monkeypatch.setattr(rules, "judge", lambda launch, facts: [f"{launch.name} {getattr(facts, 'of', facts)}"])
    monkeypatch.setattr(rules, "make_record", lambda launch, facts, table: (launch.name, facts.of, table))
    result = rules.run_gate(iter(names), ["sm_80", "sm_90"], "table", 5, ["old"])
    launched = [f"{name} {chip}" for chip in ("sm_80", "sm_90") for name in names]
    assert asked[:6] == [(name, chip, "table") for chip in ("sm_80", "sm_90") for name in names]
    assert asked[6:] == [([f"about {name}" for name in launched], ["old"]), 5]
    compiled = [name for name in launched if name != "b sm_80"]
    assert result.violations == [f"{name} {'an error' if name == 'c sm_80' else name}" for name in compiled]
    kept = [(name, name, "table") for name in compiled if name != "c sm_80"]
    assert result.records == [kept[0], "known", *kept[1:]] and result.n_known == 1
    assert result.launched == {(name, chip) for name in names for chip in ("sm_80", "sm_90")}

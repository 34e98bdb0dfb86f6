"""The command kernels.simulate: every kernel that ships, executed as compiled for each chip."""

import json
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import triton
from triton import knobs

from kernels import simulate
from kernels.measure import simulated_known
from kernels.measure.simulated_cases import simulated_cases
from kernels.measure.simulated_known import choose_samples
from kernels.measure.simulated_records import find_differences, load_records, save_records
from tests.helpers.compiler import run_compiler
from tests.helpers.run import ROOT

RECORDS = ROOT / "benchmarks" / "simulated.json"


@pytest.mark.parametrize("chip", simulate.CHIPS)
def test_every_kernel_is_right_and_breaks_no_rule(chip):
    done = run_compiler("kernels.simulate", "--chip", chip, "--workers", "1", "--check", RECORDS, "--changed")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert ", 0 with something wrong, 0 findings" in done.stdout


def test_a_sample_is_of_every_op_and_dtype_and_of_both_chips():
    cases = simulated_cases()
    samples = choose_samples(cases, simulate.CHIPS)
    assert {(cases[i].case.op, cases[i].dtype) for i, _ in samples} == {(case.case.op, case.dtype) for case in cases}
    assert {chip for _, chip in samples} == set(simulate.CHIPS) and len(samples) < len(cases)


@pytest.mark.parametrize("path", ["ops/rope.py", "../csrc/ptx/flow.cpp", "launch/rope.json", "compiled/ptx.py"])
def test_records_are_known_until_code_changes(path, tmp_path, monkeypatch):
    package = tmp_path / "kernels"
    for folder in ("compiled", "measure", "native", "ops", "launch"):
        shutil.copytree(
            ROOT / "kernels" / folder, package / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for folder in ("ptx", "cuda"):
        shutil.copytree(ROOT / "csrc" / folder, tmp_path / "csrc" / folder)
    monkeypatch.setattr(simulated_known, "PACKAGE", package)
    records = tmp_path / "simulated.json"
    assert not simulated_known.is_recorded(records)
    save_records(records, [], {"seconds": 1, "sources": simulated_known.digest_sources()})
    assert simulated_known.is_recorded(records)
    changed = package / path
    if changed.suffix == ".py":
        changed.write_text("# a comment is no change\n" + changed.read_text())
        assert simulated_known.is_recorded(records)
        changed.write_text(changed.read_text() + "\nADDED = 1\n")
    else:
        changed.write_text(changed.read_text().replace("1", "2", 1))
    assert not simulated_known.is_recorded(records)


def test_it_does_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    monkeypatch.setattr(sys, "argv", ["simulate"])
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        simulate.main()


@pytest.mark.parametrize(("fault", "said"), [("wrong result", "output 0 is off by"), ("no barrier", "race")])
def test_a_fault_in_a_kernel_is_told(fault, said):
    command = (fault, "--op", "rms_norm", "--chip", "sm_90", "--workers", "1")
    done = run_compiler("tests.helpers.wrong_kernels", *command)
    assert said in done.stdout and done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]


def test_records_of_other_cases_are_kept_and_a_difference_is_told(tmp_path):
    kernels = [{"kernel": "_forward_kernel", "instructions": 100}]
    first, second = (
        {
            "op": op,
            "case": "T=1",
            "dtype": "bfloat16",
            "chip": "sm_90",
            "triton": triton.__version__,
            "kernels": kernels,
        }
        for op in ("rope", "swiglu")
    )
    path = tmp_path / "simulated.json"
    assert find_differences(path, [first]) == []  # nothing of this Triton to compare with
    save_records(path, [first], {"seconds": 2, "sources": ""})
    other = {"1.0": {"seconds": 3, "sources": "of another Triton"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": other | load_records(path)["versions"]}))
    save_records(path, [second], None)  # a run of some cases proves nothing and takes no proof away
    assert load_records(path)["versions"] == other | {triton.__version__: {"seconds": 2, "sources": ""}}
    assert find_differences(path, [first, second]) == []
    changed = first | {"kernels": [kernels[0] | {"instructions": 101}]}
    (line,) = find_differences(path, [changed, second])
    assert line.startswith("rope T=1 bfloat16 sm_90") and "100" in line and "101" in line
    (line,) = find_differences(path, [first | {"case": "T=2"}])
    assert "null" in line


RUNS = {  # of flags: whether the sources are known, what is found, and whether the file then tells that all passed
    "all": ([], False, 0, True), "a finding": ([], False, 1, False), "one op": (["--op", "rope"], False, 0, False),
    "one chip": (["--chip", "sm_90"], False, 0, False), "a sample": (["--changed"], True, 0, False),
    "all, as code has changed": (["--changed"], False, 0, True),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_only_a_run_of_all_cases_without_a_finding_is_a_proof(run, tmp_path, monkeypatch, capsys):
    flags, is_known, n_findings, is_proof = RUNS[run]
    checked, written = tmp_path / "checked.json", tmp_path / "written.json"
    few = [next(case for case in simulated_cases() if case.case.op == op) for op in ("rope", "swiglu")]

    def simulated(case, chip):
        about = {"op": case.case.op, "case": case.case.shape, "dtype": str(case.dtype), "chip": chip}
        found = {"wrong": [], "n_findings": n_findings, "findings": [], "triton": triton.__version__, "kernels": []}
        return about | found | {"worst": "none", "error": 0.0, "torch_error": 0.0, "ratio": 0.0}, set()

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    workers = SimpleNamespace(Pool=lambda *_: nullcontext(SimpleNamespace(imap=map)))
    monkeypatch.setattr(simulate.multiprocessing, "get_context", lambda _: workers)
    monkeypatch.setattr(simulate, "simulated_cases", lambda: few)
    monkeypatch.setattr(simulate, "simulate", simulated)
    monkeypatch.setattr(simulate, "format_record", lambda record: record["op"])
    monkeypatch.setattr(simulate, "find_unused", lambda *_: [])
    monkeypatch.setattr(simulate, "is_recorded", lambda path: is_known)
    with pytest.raises(SystemExit) as end:
        simulate.main([*flags, "--json", str(written), "--check", str(checked)])
    assert bool(end.value.code) == bool(n_findings), capsys.readouterr().err
    assert simulated_known.is_recorded(written) == is_proof


def test_a_sample_alone_proves_nothing(capsys):
    """--changed needs the records to compare with."""
    with pytest.raises(SystemExit) as stop:
        simulate.parse_arguments(["--changed"], ["rope"])
    assert stop.value.code == 2 and "--check FILE, which is missing" in capsys.readouterr().err

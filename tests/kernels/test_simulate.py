"""The command kernels.simulate: every kernel that ships, executed as compiled for each chip."""

import json
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs

from kernels import simulate
from kernels.measure import simulated_cases as simulated_cases_module
from kernels.measure import simulated_known, simulated_records
from kernels.measure.cases import swiglu_case
from kernels.measure.peers import plain
from kernels.measure.simulated_cases import simulated_cases
from kernels.measure.simulated_known import choose_samples
from kernels.measure.simulated_records import find_differences, load_records, save_records
from kernels.measure.truth import copy_as_leaves, run_once
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


def test_without_nvcc_there_are_no_cases_of_csrc(monkeypatch):
    monkeypatch.setattr(simulated_cases_module, "has_nvcc", lambda: False)
    assert list(simulated_cases_module.csrc_cases()) == []
    monkeypatch.setattr(simulated_cases_module, "has_nvcc", lambda: True)
    ops = {case.case.op for case in simulated_cases_module.csrc_cases()}
    assert {"adamw_cuda", "grad_norm_cuda"} < ops and all("cuda" in op or "decode" in op for op in ops)


def test_some_gradients_of_the_optimizers_cases_are_zero():
    """700 of them from the middle on, at each step: two whole blocks of 8 bits, and the ends of others."""
    for case in simulated_cases_module.optimizer_cases():
        if case.case.op == "adamw":
            grads = case.case.inputs("cpu", case.dtype).grads
            n = len(grads[0])
            assert len(grads) == 3 and all(
                (g[n // 2 : n // 2 + 700] == 0).all() and (g == 0).sum() < 720 for g in grads
            )


class Launched:
    """A launch's result on the machine, with findings."""

    kernel = "k"
    counters = dict.fromkeys(("blocks", "multiply_adds", "barriers", "load_bytes", "load_sectors", "store_bytes"), 1)
    counters |= dict.fromkeys(("store_sectors", "shared_cycles", "shared_ideal_cycles", "instructions"), 1)
    counters |= {"instructions.float": 5, "instructions.special": 2, "instructions.matrix": 3}

    def __init__(self, *findings):
        self.findings = findings


@pytest.mark.parametrize("fault", [None, "late", "large", "missing"])
def test_a_record_tells_what_both_runs_found(fault, monkeypatch):
    """All findings are counted, each once, and the first five are kept; both runs must give equal bits."""
    case = simulated_records.SimulatedCase(swiglu_case(4, 8), torch.float32)
    modes = []

    def run(chip, case, inputs, upstream, late):
        modes.append((chip, late))
        plainly = plain(lambda bench, i: bench.reference(i))
        results = run_once(plainly(case.case, copy_as_leaves(case.case, inputs), upstream))
        if fault == "late" and late:
            results[1] = results[1] * (1 + 2**-22)
        if fault == "large":
            results[1] = results[1] + 0.5
        if fault == "missing":
            results[1] = None
        launches = [Launched("a", "b", "c"), Launched("a", "d")] if late else [Launched("d", "e", "f", "g")]
        return results, launches

    monkeypatch.setattr(simulated_records, "_run_on", run)
    record, used = simulated_records.simulate(case, "sm_90")
    assert modes == [("sm_90", True), ("sm_90", False)] and used == set()
    assert record["n_findings"] == 7 and record["findings"] == ["k: a", "k: b", "k: c", "k: d", "k: e"]
    assert (record["op"], record["case"], record["dtype"], record["chip"]) == ("swiglu", "T=4 F=8", "float32", "sm_90")
    (kernel,) = record["kernels"]  # of the late run's two launches
    assert kernel["launches"] == 2 and (kernel["float"], kernel["matrix"], kernel["blocks"]) == (14, 6, 2)
    wrong = {
        None: [], "late": ["dgate_up differs between late and early"], "missing": ["dgate_up is None, wanted (4, 16)"],
        "large": ["dgate_up is off by 0.5"],
    }[fault]  # fmt: skip
    assert [said.split(", torch")[0] for said in record["wrong"]] == wrong
    if fault == "large":
        assert record["worst"] == "dgate_up" and record["error"] == 0.5 and record["ratio"] > 1e4
    text = simulated_records.format_record(record)
    assert (
        "FAILS" in text
        and "7 findings" in text
        and "banks 100%" in text
        and text.splitlines()[1:] == [f"    {line}" for line in (*record["wrong"], *record["findings"])]
    )
    clean = record | {"wrong": [], "findings": [], "n_findings": 0}
    assert " ok " in simulated_records.format_record(clean) and "\n" not in simulated_records.format_record(clean)


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


# ---- the command, with a machine that answers at once ---------------------------------------------------------------


def answered(case, chip):
    """Return what a run of a case on a chip tells, and what it used."""
    is_wrong = (case.case.op, chip) == ("rope", "sm_90")
    counters = dict.fromkeys(("load_bytes", "store_bytes", "load_sectors", "store_sectors"), 32)
    counters |= {"instructions": 2_000_000, "shared_cycles": 4, "shared_ideal_cycles": 2}
    return {
        "op": case.case.op, "case": case.case.shape, "dtype": "bfloat16", "chip": chip, "triton": triton.__version__,
        "worst": "dx", "error": 0.5, "torch_error": 0.25, "ratio": 2.0, "wrong": ["dx is off by 0.5"] * is_wrong,
        "n_findings": 2 * is_wrong, "findings": ["k: race", "k: trap"] * is_wrong,
        "kernels": [{"kernel": "k", **counters}],
    }, {(case.case.op, "k", chip, "64")}  # fmt: skip


@pytest.fixture
def stage(monkeypatch):
    """Stand-ins for what the command calls, which note what they are given."""
    noted = []

    def note(name, answer=None):
        return lambda *args, **named: noted.append((name, *args, *named.items())) or answer

    def case(op, shape, chips):
        return SimpleNamespace(case=SimpleNamespace(op=op, shape=shape), chips=chips, dtype=torch.bfloat16)

    both = ("sm_80", "sm_90")
    cases = [case("rope", "T=4", both), case("swiglu", "T=5", both), case("rope", "T=6", ("sm_90",))]
    pool = SimpleNamespace(imap=map)
    workers = SimpleNamespace(Pool=lambda *args: noted.append(("pool", *args)) or nullcontext(pool))
    clock = iter(range(100, 2000, 44))
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(simulate.multiprocessing, "get_context", lambda how: noted.append(("by", how)) or workers)
    monkeypatch.setattr(simulate, "simulated_cases", lambda: cases)
    monkeypatch.setattr(
        simulate, "simulate", lambda case, chip: noted.append((case.case.shape, chip)) or answered(case, chip)
    )
    monkeypatch.setattr(simulate.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(simulate, "find_unused", note("unused", ["an entry"]))
    monkeypatch.setattr(simulate, "is_recorded", note("recorded", False))
    monkeypatch.setattr(simulate, "digest_sources", lambda: "of the sources")
    monkeypatch.setattr(simulate, "save_records", note("save"))
    monkeypatch.setattr(simulate, "find_differences", note("differences", [f"difference {i}" for i in range(25)]))
    monkeypatch.setattr(simulate, "load_records", lambda path: {"versions": {triton.__version__: {}}})
    return noted


def ended(*flags):
    with pytest.raises(SystemExit) as end:
        simulate.main(list(flags))
    return end.value.code


def test_what_a_simulation_prints(stage, capsys, snapshot):
    assert ended("--check", "there.json", "--json", "new.json", "--workers", "3") is True
    said = capsys.readouterr()
    assert f"{said.out}---- errors\n{said.err}".replace(triton.__version__, "VERSION") == snapshot
    by, pool, *runs, (_, used, tables, chips), (_, path, records, proof), (_, checked, compared) = stage
    assert by == ("by", "fork") and pool == ("pool", 3, simulate._prepare_worker)
    jobs = [("T=4", "sm_80"), ("T=5", "sm_80"), ("T=4", "sm_90"), ("T=5", "sm_90"), ("T=6", "sm_90")]
    assert runs == jobs == [(r["case"], r["chip"]) for r in records] and compared is records
    assert used == {(r["op"], "k", r["chip"], "64") for r in records} and chips == ["sm_80", "sm_90"]
    assert set(tables) == {path.stem for path in simulate.common.LAUNCH.glob("*.json")} and tables["rope"]["rotate"]
    assert (str(path), str(checked), proof) == ("new.json", "there.json", None)


def test_a_file_without_records_of_this_triton_is_told(stage, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "load_records", lambda path: {"versions": {"1.0": {}}})
    monkeypatch.setattr(simulate, "find_differences", lambda *_: [])
    ended("--check", "there.json", "--op", "rope")
    said = capsys.readouterr().out
    assert said.endswith(f"there.json holds no records of Triton {triton.__version__}: not compared\n")
    ended("--op", "rope")
    assert "not compared" not in capsys.readouterr().out


def test_a_chip_or_an_op_alone_is_simulated_and_not_all(stage):
    """Entries that nothing uses are looked for on the chips that were simulated, and in a run of all ops."""
    assert ended("--chip", "sm_80") is True and stage[-1][0] == "unused" and stage[-1][3] == ["sm_80"]
    assert stage[2:4] == [("T=4", "sm_80"), ("T=5", "sm_80")] and stage[1][1] == 2
    stage.clear()
    assert ended("--op", "swiglu") is False and stage[2:] == [("T=5", "sm_80"), ("T=5", "sm_90")]


def test_a_proof_tells_its_seconds_and_sources(stage, monkeypatch):
    monkeypatch.setattr(simulate, "find_unused", lambda *_: [])
    monkeypatch.setattr(
        simulate,
        "simulate",
        lambda case, chip: answered(SimpleNamespace(case=SimpleNamespace(op="x", shape="y")), chip),
    )
    assert ended("--json", "new.json") is False
    assert stage[-1][0] == "save" and stage[-1][3] == {"seconds": 44, "sources": "of the sources"}
    assert ended("--json", "new.json", "--chip", "sm_90") is False and stage[-1][3] is None


def test_a_sample_takes_turns_of_the_chips(stage, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "is_recorded", lambda path: str(path) == "there.json")
    assert ended("--changed", "--check", "there.json") is True
    chosen = choose_samples(simulate.simulated_cases(), simulate.CHIPS)
    shapes = ("T=4", "T=5", "T=6")
    jobs = [(shapes[i], chip) for chip in simulate.CHIPS for i in range(3) if (i, chip) in chosen]
    assert [job for job in stage if job[0] in shapes] == jobs and "unused" not in {name for name, *_ in stage}
    assert f"since there.json was written: {len(jobs)} cases are executed as a sample" in capsys.readouterr().out


def test_a_worker_computes_alone_and_new_tensors_hold_nan(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: given.append(n))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: given.append((on, warn_only)))
    monkeypatch.setattr(simulate.warnings, "filterwarnings", lambda what, message: given.append((what, message)))
    simulate._prepare_worker()
    assert given == [1, (True, True), ("ignore", "TRITON_DEFAULT_FP_FUSION")]

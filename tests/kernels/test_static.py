"""The command kernels.static: what ships passes under the installed Triton and the GPU machines' 3.6."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import triton
from triton import knobs

from kernels import static
from kernels.compiled import rules
from kernels.compiled.launch_cases import all_cases
from kernels.compiled.machine_code import CHIPS
from tests.helpers.compiler import run_compiler
from tests.helpers.run import ROOT

RECORDS = ROOT / "benchmarks" / "static.json"
OLDEST = Path(sys.prefix) / "triton-3.6"  # put there by `make test`


@pytest.mark.timeout(3600)  # half a minute of work, which a busy machine may stretch
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_what_ships_passes(version, chip):
    if version == "3.6" and not OLDEST.exists():
        pytest.skip(f"needs Triton 3.6 in {OLDEST}: pip install --no-deps --target {OLDEST} triton==3.6.0")
    command = ("kernels.static", "--chip", chip, "--check", str(RECORDS), "--changed", "--workers", "1")
    if version == "3.6":  # csrc and the launch tables are judged once, with the installed Triton
        command += ("--op", *sorted({case.op for case in all_cases()}))
    done = run_compiler(*command, path=[OLDEST] if version == "3.6" else ())
    assert done.returncode == 0, done.stderr[-4000:]
    if version == "3.6":
        assert "Triton 3.6.0" in done.stdout


def test_it_does_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    monkeypatch.setattr(sys, "argv", ["static"])
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        static.main()


@pytest.mark.parametrize("op", [[], ["--op", "csrc", "rope"], ["--op", "csrc"]])
@pytest.mark.parametrize("broken", [None, "launch", "table", "operator", "csrc"])
def test_whatever_breaks_a_rule_the_gate_fails(broken, op, monkeypatch, capsys):
    """Entries that nothing launches and operators that nothing calls are looked for in a run of all ops alone."""
    said = rules.Violation("op", "kernel", "case", "sm_90", "rule", "got", "wanted")
    found = {name: [said] * (name == broken) for name in ("launch", "table", "operator")}
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(static, "judge_csrc", lambda args: broken == "csrc")
    monkeypatch.setattr(static, "run_gate", lambda *_, **__: rules.GateResult([], found["launch"], set(), 0))
    monkeypatch.setattr(static, "find_unused", lambda *_: found["table"])
    monkeypatch.setattr(static, "find_unplayed", lambda *_: found["operator"])
    monkeypatch.setattr(sys, "argv", ["static", *op])
    with pytest.raises(SystemExit) as end:
        static.main()
    looked_for = {"csrc"} if op[-1:] == ["csrc"] else {"csrc", "launch"} if op else {*found, "csrc"}
    assert bool(end.value.code) == (broken in looked_for)
    assert ("VIOLATION" in capsys.readouterr().err) == (broken in looked_for - {"csrc"})


@pytest.mark.timeout(3600)
def test_a_triton_without_records_is_judged_and_not_compared(tmp_path):
    path = tmp_path / "static.json"
    path.write_text('{"versions": {"1.0": {}}, "records": []}')
    command = ("kernels.static", "--op", "grad_norm", "--chip", "sm_90", "--workers", "1", "--check", str(path))
    done = run_compiler(*command)
    assert done.returncode == 0 and f"holds no records of Triton {triton.__version__}" in done.stdout, done.stderr
    path.write_text(f'{{"versions": {{"{triton.__version__}": {{}}}}, "records": []}}')
    done = run_compiler(*command)
    assert "is stale" in done.stderr and done.returncode == 1


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_every_flag_of_the_gate_reaches_the_part_that_obeys_it(changed, stale, monkeypatch, tmp_path):
    given = {}
    flags = ["--op", "rope", "--chip", "sm_80", "--workers", "3", "--json", str(tmp_path / "new.json")]
    flags += ["--check", str(tmp_path / "old.json"), *(["--changed"] if changed else [])]

    def gate(cases, chips, workers, old_records):
        given["gate"] = [{case.op for case in cases}, chips, workers, old_records]
        return rules.GateResult([], [], set(), 0)

    def note(name, answer=None):
        return lambda *args: given.__setitem__(name, args[1:]) or answer

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(static, "run_gate", gate)
    monkeypatch.setattr(static, "load_records", lambda path: {"records": ["old"], "versions": {triton.__version__: {}}})
    monkeypatch.setattr(static, "save_records", note("save"))
    monkeypatch.setattr(static, "find_differences", note("differences", ["- a"] * stale))
    monkeypatch.setattr(sys, "argv", ["static", *flags])
    with pytest.raises(SystemExit) as end:
        static.main()
    assert bool(end.value.code) == stale
    assert given["gate"] == [{"rope"}, ["sm_80"], 3, ["old"] if changed else ()]
    assert given["save"] == given["differences"] == ([], ["rope"], ["sm_80"])


@pytest.mark.parametrize(("broken", "stale"), [(False, False), (True, False), (False, True)])
def test_csrc_is_judged_and_compared_on_the_chips_asked_for(broken, stale, monkeypatch, tmp_path):
    given = []
    args = Namespace(chip=["sm_80"], json=tmp_path / "new.json", check=tmp_path / "old.json")
    monkeypatch.setattr(static, "judge_library", lambda chips: ([{"chip": chips}], ["x"] * broken, "nvcc 13"))
    monkeypatch.setattr(static, "format_cuda_record", str)
    monkeypatch.setattr(static, "save_cuda_records", lambda path, *rest: given.append(path))
    monkeypatch.setattr(static, "find_cuda_differences", lambda *rest: given.append(rest) or ["- a"] * stale)
    assert static.judge_csrc(args) == (broken or stale)
    assert given == [tmp_path / "cuda.json", (tmp_path / "cuda.json", [{"chip": ["sm_80"]}], "nvcc 13", ["sm_80"])]


def test_an_op_without_cases_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(sys, "argv", ["static", "--op", "softmax"])
    with pytest.raises(SystemExit, match="no cases for softmax"):
        static.main()


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_what_the_gate_prints(monkeypatch, capsys, snapshot, tmp_path):
    """Records, violations, what is known, and the first twenty differences."""
    given = {}
    said = rules.Violation("op", "kernel", "case", "sm_90", "rule", "got", "wanted")

    def gate(cases, chips, workers, old_records):
        given["gate"] = ([case.op for case in cases], chips, workers, old_records)
        return rules.GateResult(["record 1", "record 2"], [said], {"launched"}, 7)

    def note(name, answer):
        return lambda *args: given.__setitem__(name, args) or answer

    cases = [Namespace(op="rope", label="a"), Namespace(op="swiglu", label="b")]
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(static, "all_cases", lambda ops: [case for case in cases if not ops or case.op in ops])
    monkeypatch.setattr(static, "run_gate", gate)
    monkeypatch.setattr(static, "judge_csrc", lambda args: False)
    monkeypatch.setattr(static, "format_record", lambda record: f"line of {record}")
    monkeypatch.setattr(static, "operator_names", lambda: {"rotate"})
    monkeypatch.setattr(static, "find_unused", note("unused", ["an entry"]))
    monkeypatch.setattr(static, "find_unplayed", note("unplayed", ["an operator"]))
    monkeypatch.setattr(static, "load_records", lambda path: {"records": ["old"], "versions": {triton.__version__: {}}})
    monkeypatch.setattr(static, "save_records", note("save", None))
    monkeypatch.setattr(static, "find_differences", note("differences", [f"difference {i}" for i in range(25)]))
    monkeypatch.setattr(sys, "argv", ["static", "--check", "old.json", "--changed", "--json", "new.json"])
    with pytest.raises(SystemExit) as end:
        static.main()
    out = capsys.readouterr()
    text = f"{out.out}---- errors\n{out.err}".replace(triton.__version__, "VERSION")
    assert end.value.code is True and text == snapshot(name="differences")
    assert given["gate"] == (["rope", "swiglu"], list(CHIPS), 2, ["old"]) and given["unplayed"] == (cases, {"rotate"})
    launched, tables, chips = given["unused"]
    assert launched == {"launched"} and "rope" in tables and tables["rope"]["rotate"] and chips == list(CHIPS)
    assert given["save"] == (Path("new.json"), ["record 1", "record 2"], [], list(CHIPS))
    assert given["differences"] == (Path("old.json"), ["record 1", "record 2"], [], list(CHIPS))

    monkeypatch.setattr(static, "load_records", lambda path: {"records": [], "versions": {}})
    monkeypatch.setattr(static, "run_gate", lambda *_, **__: rules.GateResult([], [], set(), 0))
    monkeypatch.setattr(sys, "argv", ["static", "--check", "old.json", "--op", "rope", "csrc"])
    with pytest.raises(SystemExit) as end:
        static.main()
    out = capsys.readouterr()
    text = f"{out.out}---- errors\n{out.err}".replace(triton.__version__, "VERSION")
    assert end.value.code is False and text == snapshot(name="another Triton")


def test_what_the_gate_prints_of_csrc(monkeypatch, capsys, tmp_path):
    records = [{"kernel": "a"}, {"kernel": "b"}]
    monkeypatch.setattr(static, "judge_library", lambda chips: (records, ["a spills"], "nvcc 13"))
    monkeypatch.setattr(static, "format_cuda_record", lambda record: f"line of {record['kernel']}")
    monkeypatch.setattr(static, "find_cuda_differences", lambda *_: [f"difference {i}" for i in range(25)])
    args = Namespace(chip=["sm_90"], json=None, check=tmp_path / "old.json")
    assert static.judge_csrc(args) is True
    out = capsys.readouterr()
    assert out.out.splitlines() == ["line of a", "line of b", "csrc/cuda: 2 kernels, 1 violations, nvcc 13"]
    stale = f"{tmp_path / 'cuda.json'} is stale; run python -m kernels.static --op csrc --json {tmp_path / 'old.json'}"
    assert out.err.splitlines() == ["VIOLATION a spills", *(f"difference {i}" for i in range(20)), stale]
    records.clear()
    assert static.judge_csrc(Namespace(chip=["sm_90"], json=tmp_path / "new.json", check=None)) is True
    assert not list(tmp_path.iterdir())  # what was not built is not written

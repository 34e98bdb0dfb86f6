"""Runs of the report under the limits of a machine that is lent for ten minutes, by a clock that is handed in."""

import json
from types import SimpleNamespace

import pytest
import torch

from scripts import gpu_report
from scripts.base.results import write_json
from scripts.report import kernel_parts, kernel_tests, processes
from scripts.report.report import Report
from scripts.step import bench, peers
from scripts.step.breakdown import PROFILED

RUN_S = 600  # a run that takes longer is killed with all it measured since it last wrote
SECONDS = {
    "peers": 60,
    "ranks": 40,
    "profile": 25,
    "bench": 35,
    "kernels.bench": 30,
    "pytest": 170,
    "kernels.static": 15,
}


class Machine:
    """A GPU machine whose processes take as long as they are told to. begun: what each was asked for."""

    def __init__(self):
        self.now, self.seconds, self.hangs, self.begun = 1000.0, dict(SECONDS), set(), []

    def clock(self):
        return self.now

    def spend(self, name, limit_s=float("inf")):
        """Let a measurement take its time, and return whether it ended within its limit."""
        seconds = (
            float("inf") if name in self.hangs else self.seconds.get(name, self.seconds.get(name.split(":")[0], 1))
        )
        self.now += min(seconds, limit_s)
        return seconds <= limit_s

    def run_command(self, command, limit_s, every=lambda: None, environment=None, **options):
        """Do what processes.run_command does."""
        module, end = command[2].removeprefix("scripts.step."), self.now + limit_s
        if "--json" not in command:
            self.begun.append(module)
            ended = self.spend(module, limit_s)
            if module == "pytest":
                lines = [f"{path}::test_a PASSED" for path in command if path.endswith(".py")]
                options["stdout"].write("\n".join(lines[: None if ended else 3]))
            elif module == "kernels.static":
                options["stdout"].write("80 launches, 0 violations, Triton 3.6.0\n")
            return 0 if ended else None
        path, deadline = (
            command[command.index("--json") + 1],
            self.now + 60 * float(command[command.index("--minutes") + 1]),
        )
        found = {"records": [], "left_out": [], "absent": [], "dtype": "bfloat16", "ceilings": {}}
        is_bench = module == "kernels.bench"
        for name in command[command.index("--op" if is_bench else "--only") + 1 :]:
            if name.startswith("--"):
                break
            if self.now >= deadline:
                found["left_out"].append(f"{name} shape" if is_bench else name)
                continue
            self.begun.append(name)
            if not self.spend(f"{module}:{name}", end - self.now):
                return None
            record = {"op": name, "shape": "s", "who": "ours"} if is_bench else {"name": name, "tokens_per_s": 2e4}
            found["records"].append(record)
            write_json(path, found)
            every()
        write_json(path, found)
        every()
        return 0


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    for module in (processes, kernel_parts, kernel_tests):
        monkeypatch.setattr(module, "run_command", machine.run_command)
    monkeypatch.setattr(processes, "free_memory", lambda: None)  # there is much garbage to look through in a test
    rates = {"copy_gb_per_s": 4300.0, "gemm_tflops": 790.0}
    monkeypatch.setattr(kernel_parts, "measure_peak_rates", lambda *_: machine.spend("peak") and rates)
    monkeypatch.setattr(kernel_parts, "measure_product_rate", lambda *_: machine.spend("product") and 700.0)
    monkeypatch.setattr(kernel_parts, "measure_sustained", lambda *_: machine.spend("sustained") and 650.0)
    card = SimpleNamespace(total_memory=150 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    monkeypatch.setattr(bench, "project_finetune", lambda record, card: {"of": record["name"]})
    machine.seconds |= {"product": 0.2, "sustained": 5}
    return machine


def run(machine, folder, minutes=8, again=False):
    """Make one run of the report. Return it, with how long it took."""
    began = machine.now
    machine.begun = []
    report = Report(folder / "report.json", minutes, smoke=False, clock=machine.clock, out=folder)
    if again:
        report.drop_failures()
    gpu_report.measure_parts(report, list(gpu_report.PARTS))
    assert machine.now - began < RUN_S
    return json.loads((folder / "report.json").read_text())


def names(report, part):
    return [record["name"] for record in report["parts"][part]["records"]]


def test_the_first_run_gives_tests_ceilings_and_the_headline(machine, tmp_path):
    parts = run(machine, tmp_path)["parts"]
    assert parts["warm_up"]["launches"] == 80
    assert all(parts["tests"][name]["passed"] and "ended" not in parts["tests"][name] for name in kernel_tests.TESTS)
    ceilings = parts["ceilings"]
    assert {"copy_gb_per_s", "gemm_tflops_T4096", "gemm_tflops_T16384"} <= ceilings.keys()
    layouts = [
        f"{name}_{kind}" for name in ("qkv", "o", "gate_up", "down", "head") for kind in ("fwd", "dgrad", "wgrad")
    ]
    assert sorted(ceilings["gemm_tflops_T16384"]) == sorted(layouts)
    assert set(ceilings["gemm_tflops_sustained"]) == {"fwd", "dgrad", "wgrad"}
    assert names({"parts": parts}, "step") == list(bench.HEADLINE)
    assert [p["of"] for p in parts["step"]["projections"]] == list(bench.HEADLINE)


def test_later_runs_measure_what_is_missing_and_nothing_twice(machine, tmp_path):
    begun, report = [], {"left_out": ["all"]}
    while report["left_out"]:
        report = run(machine, tmp_path)
        begun += [name for name in machine.begun if name not in ("kernels.static", "kernels.tune")]
        if len(report["runs"]) == 3:
            assert set(names(report, "peers")) == set(peers.PEERS)
            assert {"profile", "step", "kernels"} <= report["parts"].keys()
            assert {"llama-7b, fp32 states", "attention", "adamw", "rms_norm", "swiglu", "checks, one rank"} <= set(
                begun
            )
    assert sorted(set(begun)) == sorted(begun) or len(begun) - len(set(begun)) == len(
        PROFILED
    )  # a step and its profile
    assert set(names(report, "step")) == set(bench.VARIANTS)
    assert {r["op"] for r in report["parts"]["kernels"]["records"]} == set(kernel_parts.bench_ops(False))
    assert len(report["runs"]) < 6
    run(machine, tmp_path)
    assert not set(machine.begun) - {"kernels.static", "kernels.tune"}


def test_what_overruns_is_ended_and_the_headline_is_still_there(machine, tmp_path):
    machine.seconds["pytest"] = 1000
    report = run(machine, tmp_path)
    assert names(report, "step") == list(bench.HEADLINE)
    counts = report["parts"]["tests"]
    assert all("after its limit" in counts[name]["ended"] for name in counts) and counts["references"]["passed"] == 1
    machine.seconds["pytest"] = 20
    report = run(machine, tmp_path)
    assert all("ended" not in figures for figures in report["parts"]["tests"].values())


def test_a_step_that_hangs_costs_itself(machine, tmp_path):
    machine.hangs.add("bench:llama-7b, bf16 states")
    report = run(machine, tmp_path)
    hung = [r for r in report["parts"]["step"]["records"] if r["name"] == "llama-7b, bf16 states"]
    assert hung == [{"name": "llama-7b, bf16 states", "failed": "its process ended after its limit"}]
    machine.hangs.clear()
    report = run(machine, tmp_path)
    assert "llama-7b, no sharing" in machine.begun and "llama-7b, bf16 states" not in machine.begun
    report = run(machine, tmp_path, again=True)
    assert "llama-7b, bf16 states" in machine.begun
    assert not [r for r in report["parts"]["step"]["records"] if "failed" in r]


def test_an_op_whose_benchmark_was_cut_short_is_measured_again_whole(machine, tmp_path):
    def measure():
        report = Report(tmp_path / "report.json", 8, smoke=False, clock=machine.clock)
        kernel_parts.run_benchmarks(report, ["attention", "adamw", "swiglu"])
        return report.result["parts"]["kernels"], report.result["left_out"]

    machine.seconds |= {"kernels.bench:adamw": 1000}
    kernels, left_out = measure()
    assert [r["op"] for r in kernels["records"]] == ["attention"] and left_out == ["kernels.bench --op swiglu"]
    assert kernels["ended"] == {"adamw": "after its limit"}
    kernels["left_out"] = ["attention another shape"]
    result = json.loads((tmp_path / "report.json").read_text())
    write_json(tmp_path / "report.json", result | {"parts": {"kernels": kernels}})
    kernels, left_out = measure()
    assert [r["op"] for r in kernels["records"]] == ["attention", "swiglu"] and not kernels["left_out"] + left_out
    assert machine.begun == ["attention", "adamw", "attention", "swiglu"]


def test_a_cuda_error_in_a_worker_is_not_another_files_failure(machine, tmp_path, monkeypatch):
    calls = []

    def run_command(command, limit_s, **options):
        paths = [path for path in command if path.endswith(".py")]
        calls.append(paths)
        word = "FAILED" if len(paths) > 1 else "PASSED"
        lines = [f"{path}::test_a {word if 'rope' in path else 'PASSED'}" for path in paths]
        lines += [
            f"FAILED {path}::test_a - RuntimeError: CUDA error: x"
            for path in paths
            if "rope" in path and word == "FAILED"
        ]
        options["stdout"].write("\n".join(lines))
        return 0

    monkeypatch.setattr(kernel_tests, "run_command", run_command)
    report = Report(tmp_path / "report.json", 8, smoke=False, clock=machine.clock)
    kernel_tests.run_kernel_tests(report)
    assert calls == [list(kernel_tests.TESTS.values()), [kernel_tests.TESTS["rope"]]]
    assert (
        report.result["parts"]["tests"]["rope"]["passed"] == 1
        and not report.result["parts"]["tests"]["rope"]["failures"]
    )


def test_a_report_of_another_device_is_not_gone_on_with(tmp_path):
    Report(tmp_path / "report.json", 1, smoke=True, device="NVIDIA H100").save()
    with pytest.raises(ValueError, match="NVIDIA H100"):
        Report(tmp_path / "report.json", 1, smoke=True, device="NVIDIA H200")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="something else"):
        Report(tmp_path / "other.json", 1, smoke=True)


def test_again_forgets_what_failed_of_every_part_and_nothing_else(tmp_path):
    report = Report(tmp_path / "report.json", 1, smoke=True)
    fine, failed = {"name": "fine"}, {"name": "failed", "failed": "why"}
    figures = {"passed": 3, "failed": 0, "skipped": 0}
    report.add("tests", fine=figures, failed=figures | {"failed": 1}, died=figures | {"ended": "with exit code -11"})
    kinds = {"fine": {}, "failed": {"failed": "why"}, "wrong": {"wrong": 1.0}, "died": {}}
    rows = [{"op": op} | more for op, more in kinds.items()]
    report.add("kernels", records=[*rows, {"op": "failed"}], ended={"died": "after its limit"})
    for part in ("step", "profile", "peers", "ranks"):
        report.add(part, records=[failed, fine])
    report.drop_failures()
    parts = report.result["parts"]
    assert parts["tests"] == {"fine": figures} and parts["kernels"] == {"records": [{"op": "fine"}], "ended": {}}
    assert all(parts[part]["records"] == [fine] for part in ("step", "profile", "peers", "ranks"))


@pytest.mark.parametrize("part", ["tests", *gpu_report.STEP_PARTS])
@pytest.mark.parametrize("again", [False, True])
def test_a_part_that_failed_before_its_first_record_is_measured_by_the_next_run(part, again, machine, tmp_path):
    """As where a package was missing, which is there now."""
    report = Report(tmp_path / "report.json", 8, smoke=False, clock=machine.clock)
    report.measure_part(part, lambda report: 1 / 0, 1.0)
    assert "ZeroDivisionError" in json.loads((tmp_path / "report.json").read_text())["parts"][part]["failed"]
    report = Report(tmp_path / "report.json", 8, smoke=False, clock=machine.clock)
    if again:
        report.drop_failures()
    measure = gpu_report.PARTS[part][0]
    report.measure_part(part, measure, 1.0)
    found = json.loads((tmp_path / "report.json").read_text())["parts"][part]
    assert "failed" not in found and (len(found) == len(kernel_tests.TESTS) if part == "tests" else found["records"])


@pytest.mark.parametrize("other", ["device", "smoke", "what", "another file"])
def test_a_report_of_something_else_is_refused_and_stays(other, tmp_path):
    path = tmp_path / "report.json"
    Report(path, 8, smoke=False, device="H200").add("machine", device="H200")
    found = json.loads(path.read_text())
    if other == "what":
        found["what"] = "kernels.bench"
    if other == "another file":
        del found["parts"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="give another --out or --json"):
        Report(path, 8, smoke=other == "smoke", device="H100" if other == "device" else "H200")
    assert json.loads(path.read_text()) == found


def test_every_run_of_a_report_is_told_and_its_figures_stay(tmp_path):
    path = tmp_path / "report.json"
    for i in range(3):
        report = Report(path, 8 + i, smoke=True, commit=f"c{i}")
        report.add("a part", **{f"figure {i}": i})
        report.measure_part("b", lambda report: None, 1.0)
    found = json.loads(path.read_text())
    assert [(run["commit"], run["minutes"]) for run in found["runs"]] == [("c0", 8), ("c1", 9), ("c2", 10)]
    assert found["parts"]["a part"] == {"figure 0": 0, "figure 1": 1, "figure 2": 2} and found["commit"] == "c2"


def test_a_part_has_its_share_of_what_is_left_and_its_seconds_are_told(tmp_path):
    """Its failure is told by the last line of it, at most 500 letters."""
    now, deadlines = [1000.0], []

    def measure(report):
        deadlines.append(report.deadline)
        now[0] += 12.34
        if len(deadlines) == 2:
            raise ValueError("first\n" + "x" * 600)

    report = Report(tmp_path / "report.json", 2, smoke=True, clock=lambda: now[0])
    report.measure_part("a", measure, 0.5)
    report.measure_part("b", measure, 0.25)
    report.deadline = 0.0
    report.measure_part("c", measure, 1.0)
    found = json.loads((tmp_path / "report.json").read_text())
    assert deadlines == pytest.approx([1060.0, 1012.34 + 0.25 * 107.66, 1120.0])
    assert found["runs"] == [{"minutes": 2, "seconds": {"a": 12.3, "b": 12.3, "c": 12.3}}]
    assert found["parts"]["b"] == {"failed": ("ValueError: first\n" + "x" * 600)[:500]} and "a" not in found["parts"]
    now[0] = 1120.0
    report.measure_part("d", measure, 1.0)
    assert report.result["left_out"] == ["d"] and len(deadlines) == 3

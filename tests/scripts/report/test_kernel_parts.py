"""The report's kernel benchmarks in processes that die."""

import json

from scripts import gpu_report
from scripts.base.results import write_json
from scripts.report import kernel_parts
from scripts.report.report import Report


def test_benchmarks_of_a_process_that_dies_are_kept(tmp_path, monkeypatch):
    report = Report(tmp_path / "report.json", minutes=600, smoke=True)
    record = {"op": "rope", "shape": "s", "who": "ours", "failed": "RuntimeError: CUDA error: ..."}

    def dies(command, limit_s, every):
        op = command[command.index("--op") + 1]
        found = {
            "records": [record | {"op": op}],
            "absent": [],
            "left_out": [f"{op} x"],
            "dtype": "bfloat16",
            "ceilings": {"a": 1.0},
        }
        write_json(command[command.index("--json") + 1], found)
        every()
        return -6

    monkeypatch.setattr(kernel_parts, "run_command", dies)
    kernel_parts.run_bench(report, ["rope"])
    kernel_parts.run_bench(report, ["swiglu"])
    kernels = json.loads(report.path.read_text())["parts"]["kernels"]
    assert kernels["records"] == [record, record | {"op": "swiglu"}]
    assert kernels["left_out"] == ["rope x", "swiglu x"]
    assert kernels["ended"] == {"rope": "with exit code -6", "swiglu": "with exit code -6"}
    assert "kernels.bench rope ended with exit code -6" in gpu_report.format_report(report.result)

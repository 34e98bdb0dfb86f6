"""Parts of scripts.gpu_report about kernels: the machine, its ceilings, the kernels' tests and their benchmarks."""

import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from kernels.measure.cases import full_cases, toy_cases
from kernels.measure.clock import make_l2_flush, measure_gemm_rate, measure_peak_rates
from kernels.measure.machine import GPU, describe_machine, query_nvidia_smi
from kernels.measure.results import find_absent, format_record
from scripts.report.processes import GRACE_S, describe_exit, read_records, run_command
from scripts.report.report import Report

TESTS = {  # name in the report: file
    **{name: f"tests/kernels/ops/test_{name}.py" for name in (
        "references", "attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy", "adamw"
    )},
    "llama": "tests/engine/model/test_llama.py", "run_ahead": "tests/engine/training/test_run_ahead.py",
}  # fmt: skip
TOKENS = (4096, 8192, 16384)  # of a micro-batch
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
TEST_LIMIT_S = 180  # of one test file
MOST_WORKERS = 14  # pytest-xdist processes; compiling a test's kernels takes far longer than running them


# ---- machine and ceilings -------------------------------------------------------------------------------------------


def measure_machine(report: Report) -> None:
    """Add what the machine is and its clocks."""
    report.add("machine", **describe_machine(), clocks=query_nvidia_smi(*CLOCKS))


def measure_ceilings(report: Report) -> None:
    """Add the rates of copies and GEMMs, and of one layer's linear maps and the head: forward, dgrad, wgrad."""
    repeats = 2 if report.smoke else 10
    flush = make_l2_flush()
    report.add("ceilings", **measure_peak_rates(repeats, flush))
    dim, hidden, vocab = (32, 88, 128) if report.smoke else (4096, 11008, 32000)
    dtype = torch.bfloat16 if GPU else torch.float32
    for tokens in (64,) if report.smoke else TOKENS:
        if not report.may_begin(f"GEMMs at T={tokens}"):
            continue
        rates = {}
        for name, n_in, n_out, rows in (
            ("qkv", dim, 3 * dim, tokens), ("o", dim, dim, tokens), ("gate_up", dim, 2 * hidden, tokens),
            ("down", hidden, dim, tokens), ("head", dim, vocab, tokens // 2),
        ):  # fmt: skip
            shapes = {"fwd": (rows, n_out, n_in), "dgrad": (rows, n_in, n_out), "wgrad": (n_out, n_in, rows)}
            for kind, shape in shapes.items():
                rates[f"{name}_{kind}"] = measure_gemm_rate(repeats, flush, *shape, dtype)
        report.add("ceilings", **{f"gemm_tflops_T{tokens}": rates})


def format_ceilings(figures: dict) -> list[str]:
    """Return a line for each rate."""
    lines = []
    for name, value in figures.items():
        rates = {f"{name} {key}": rate for key, rate in value.items()} if isinstance(value, dict) else {name: value}
        lines += [f"  {key:<40}{rate:>14.1f}" for key, rate in rates.items() if isinstance(rate, float)]
    return lines


# ---- tests ----------------------------------------------------------------------------------------------------------


def run_kernel_tests(report: Report) -> None:
    """Add each test file's counts and the first line of every failure. Each file runs in a process of its own."""
    names = list(TESTS)
    only = ["-k", "rms_norm"] if report.smoke else []
    for name in names[:1] if report.smoke else names:
        if report.may_begin(TESTS[name]):
            limit_s = min(TEST_LIMIT_S, max(20, report.seconds_left()))
            report.add("tests", **{name: run_test_file(TESTS[name], only, limit_s)})


def run_test_file(path: str, only: list[str], limit_s: float) -> dict:
    """Return the counts of a test file, its seconds, and how it ended if its process did not end by itself."""
    # The project's own addopts are for its CI; a plugin that this machine lacks must not matter.
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-o", "addopts=", "-p", "no:cacheprovider", path, *only]
    if GPU and find_spec("xdist"):
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        code = run_command(command, limit_s, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        figures = count_outcomes(output.read())
    if code is None:
        figures["ended"] = f"after its limit of {limit_s:.0f} s"
    elif code not in (0, 1):
        figures["ended"] = f"with exit code {code}: {figures['last_line']}"
    return {**figures, "seconds": time.monotonic() - began}


OUTCOMES = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
SERIAL = re.compile(rf"^(\S+::.*?) ({OUTCOMES})\b", re.M)
PARALLEL = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (\S+::.*?) *$", re.M)  # as pytest-xdist writes it


def count_outcomes(output: str) -> dict:
    """Return the counts and failures in the output of `pytest -v -rfE`, which may be cut short."""
    outcomes = SERIAL.findall(output) + [(name, word) for word, name in PARALLEL.findall(output)]
    words = [word for _, word in outcomes]
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S+(?: collecting)?.*?)(?: - (.*))?$", output, re.M))
    bad = {name: reasons.get(name, "") for name, word in outcomes if word in ("FAILED", "ERROR")}
    lines = output.strip().splitlines() or [""]
    return {
        "passed": words.count("PASSED"), "failed": words.count("FAILED"), "skipped": words.count("SKIPPED"),
        "failures": {**bad, **reasons}, "last_line": lines[-1].strip("= "),
    }  # fmt: skip


def format_tests(tests: dict) -> list[str]:
    """Return a line for each test file, and one for each failure."""
    lines = []
    for name, figures in tests.items():
        if not isinstance(figures, dict):
            continue
        ended = f"; ended {figures['ended']}" if "ended" in figures else ""
        lines.append(
            f"{TESTS[name]}: {figures['passed']} passed, {figures['failed']} failed, "
            f"{figures['skipped']} skipped in {figures['seconds']:.0f} s{ended}"
        )
        lines += [f"    {test}: {reason}" for test, reason in figures["failures"].items()]
    return lines


# ---- benchmarks -----------------------------------------------------------------------------------------------------


def run_kernel_benchmarks(report: Report) -> None:
    """Add the records of kernels.bench, with one process for each op. A smoke run has one process for all."""
    ops = list(dict.fromkeys(case.op for case in (toy_cases() if report.smoke else full_cases())))
    for group in [ops] if report.smoke else [[op] for op in ops]:
        if report.may_begin(f"kernels.bench --op {' '.join(group)}"):
            run_bench(report, group)


def run_bench(report: Report, ops: list[str]) -> None:
    """Add the records of one kernels.bench process while it makes them, and how it ended if it failed."""
    part = report.result["parts"].setdefault("kernels", {"records": [], "absent": [], "left_out": [], "ended": {}})
    before = {name: list(part[name]) for name in ("records", "absent", "left_out")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"

        def take_over():
            if found := read_records(path):
                part.update({name: before[name] + found[name] for name in before})
                part.update(dtype=found["dtype"], ceilings={**part.get("ceilings", {}), ops[0]: found["ceilings"]})
                report.save()

        left_s = max(report.seconds_left(), 1)
        command = [sys.executable, "-m", "kernels.bench", "--op", *ops, "--json", str(path)]
        command += ["--minutes", f"{left_s / 60:.3f}", *(["--smoke"] if report.smoke else [])]
        code = run_command(command, left_s + GRACE_S, every=take_over)  # torch.compile can take a minute
        take_over()
    if code != 0:
        part["ended"] |= dict.fromkeys(ops, describe_exit(code))
        report.save()


def format_benchmarks(part: dict) -> list[str]:
    """Return every record's line, then what is absent, died or was left out."""
    if "records" not in part:
        return []
    lines = [format_record(record) for record in part["records"]]
    for op, who, reason, shapes in find_absent(part):
        where = f" at {'; '.join(shapes)}" if shapes else ""
        lines.append(f"{op}: without {who}{where}: {reason}")
    lines += [f"kernels.bench {op} ended {how}" for op, how in part["ended"].items()]
    return lines + [f"left out for time: {name}" for name in part["left_out"]]

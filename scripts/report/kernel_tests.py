"""The part of scripts.gpu_report that runs the kernels' tests on the device."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from kernels.measure.machine import GPU
from scripts.report.processes import run_command
from scripts.report.report import Report

TESTS = {  # name in the report: file
    **{name: f"tests/kernels/ops/test_{name}.py" for name in (
        "references", "attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy", "adamw"
    )},
    "llama": "tests/engine/model/test_llama.py", "run_ahead": "tests/engine/training/test_run_ahead.py",
}  # fmt: skip
LIMIT_S = 240  # of one pytest process
MOST_WORKERS = 14  # pytest-xdist processes; compiling a test's kernels takes far longer than running them
TRIES = 2  # of a file whose tests did not end, over all runs of a report


def run_kernel_tests(report: Report) -> None:
    """Add each test file's counts and the first line of every failure.

    All files share one pytest process and its workers, which take a quarter of a minute to start. A kernel that breaks
    a worker's CUDA context fails the worker's later tests too, so every file with such a failure, or without an end,
    then runs once more in a process of its own.
    """
    tests = report.result["parts"].setdefault("tests", {})
    names = list(TESTS)[:1] if report.smoke else list(TESTS)
    only = ["-k", "rms_norm"] if report.smoke else []
    waiting = [name for name in names if is_missing(tests.get(name))]
    for group in [waiting, *([name] for name in waiting)]:
        group = [name for name in group if is_missing(tests.get(name)) or has_cuda_error(tests[name])]
        if group and report.may_begin(", ".join(TESTS[name] for name in group)):
            limit_s = min(LIMIT_S, max(20, report.seconds_left()))
            found = run_test_files([TESTS[name] for name in group], report, limit_s, only)
            for name in group:
                tries = tests.get(name, {}).get("tries", 0) + 1
                report.add("tests", **{name: found[TESTS[name]] | {"tries": tries}})


def is_missing(figures: dict | None) -> bool:
    """Return whether a file has not run, or may try again because it did not end."""
    return figures is None or ("ended" in figures and figures["tries"] < TRIES)


def has_cuda_error(figures: dict) -> bool:
    """Return whether a failure may be another test's, which broke the process's GPU or took its memory."""
    return figures["tries"] < TRIES and any("CUDA" in reason for reason in figures["failures"].values())


def run_test_files(paths: Sequence[str], report: Report, limit_s: float, only: Sequence[str] = ()) -> dict[str, dict]:
    """Return each test file's counts and failures, and how they ended if their process did not end by itself."""
    # The project's own addopts are for its CI; a plugin that this machine lacks must not matter.
    flags = ["-v", "-rfE", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    if GPU and find_spec("xdist"):
        flags += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    began = report.clock()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pytest", *flags, *paths, *only]
        # The hundreds of small kernels that tests compile are not worth carrying.
        environment = {"TRITON_CACHE_DIR": cache}
        code = run_command(command, limit_s, environment=environment, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    facts: dict = {"seconds": report.clock() - began}
    if code not in (0, 1):
        last_line = (text.strip().splitlines() or [""])[-1].strip("= ")
        facts["ended"] = (
            f"after its limit of {limit_s:.0f} s" if code is None else f"with exit code {code}: {last_line}"
        )
    return {path: figures | facts for path, figures in count_outcomes(text, paths).items()}


OUTCOMES = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
SERIAL = re.compile(rf"^(\S+::.*?) ({OUTCOMES})\b", re.M)
PARALLEL = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (\S+::.*?) *$", re.M)  # as pytest-xdist writes it
REASONS = re.compile(r"^(?:FAILED|ERROR) (\S+(?: collecting)?.*?)(?: - (.*))?$", re.M)


def is_in_file(test: str, path: str) -> bool:
    """Return whether a test's name is of a file, whose folders pytest may give from elsewhere."""
    return Path(test.split("::")[0]).name == Path(path).name


def count_outcomes(output: str, paths: Sequence[str]) -> dict[str, dict]:
    """Return each file's counts and failures in the output of `pytest -v -rfE`, which may be cut short."""
    outcomes = SERIAL.findall(output) + [(name, word) for word, name in PARALLEL.findall(output)]
    reasons = dict(REASONS.findall(output))
    bad = {name: reasons.get(name, "") for name, word in outcomes if word in ("FAILED", "ERROR")} | reasons
    found = {}
    for path in paths:
        words = [word for name, word in outcomes if is_in_file(name, path)]
        found[path] = {
            "passed": words.count("PASSED"), "failed": words.count("FAILED"), "skipped": words.count("SKIPPED"),
            "failures": {name: reason for name, reason in bad.items() if is_in_file(name, path)},
        }  # fmt: skip
    return found


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

"""Processes of scripts.gpu_report: a crash, a broken CUDA context or a time-out costs one measurement only."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from kernels.measure.machine import free_memory
from scripts.base.results import ROOT
from scripts.report.report import Report

TEE_S = 5  # for the last output to arrive
GRACE_S = 60  # a measurement that has begun when the time is up may take as long
UNPACKED = []  # folders of --wheels, which come first on the path


def python_path() -> str:
    """Return PYTHONPATH for child processes: unpacked wheels, this project, then what the variable held."""
    return os.pathsep.join([*UNPACKED, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def unpack_wheels(wheels: str | Path, folder: str | Path) -> None:
    """Unpack every wheel into one folder, first on the path: Triton must find kernels' source as files."""
    for wheel in sorted(Path(wheels).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    UNPACKED.append(str(folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def run_command(
    command: list[str],
    limit_s: float,
    every: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
    **options,
) -> int | None:
    """Return the exit code of a command, or None if it ran past its limit. Call `every` twice a second meanwhile.

    A command that is ended takes the processes it has started along. environment: variables besides this process's own.
    """
    variables = os.environ | {"COLUMNS": "240", "PYTHONPATH": python_path()} | (environment or {})
    child = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **options)
    try:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(0.5)
            every()
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextlib.contextmanager
def copy_output(path: Path) -> Iterator[None]:
    """Append to a file what this process and its children print while the context lasts, besides printing it."""
    sys.stdout.flush()
    sys.stderr.flush()
    own = [os.dup(fd) for fd in (1, 2)]
    with subprocess.Popen(["tee", "-a", str(path)], stdin=subprocess.PIPE) as tee:
        for fd in (1, 2):
            os.dup2(tee.stdin.fileno(), fd)
        tee.stdin.close()
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, saved in zip((1, 2), own, strict=True):
                os.dup2(saved, fd)
                os.close(saved)
            try:
                tee.wait(TEE_S)  # it ends when nobody holds its input
            except subprocess.TimeoutExpired:  # a process that has outlived its parent does
                tee.kill()


def describe_exit(code: int | None) -> str:
    """Return how a process ended that did not end well, in words."""
    return "after its limit" if code is None else f"with exit code {code}"


def read_records(path: Path) -> dict | None:
    """Return the JSON that a child writes again and again, or None if it has written none yet."""
    return json.loads(path.read_text()) if path.exists() else None


def measure_in_processes(report: Report, part: str, module: str, names: Iterable[str]) -> None:
    """Add the records of `python -m module --only names...` that the part lacks, while they are made.

    If the process dies, the measurement it was at is recorded as failed and another process goes on with the rest.
    """
    found = report.result["parts"].setdefault(part, {}).setdefault("records", [])  # {}: it failed in an earlier run
    waiting = [name for name in names if name not in {record["name"] for record in found}]
    with contextlib.suppress(Exception):  # after a CUDA error this process cannot free memory; the child needs no less
        free_memory()
    while waiting and report.may_begin(f"{part}: {', '.join(waiting)}"):
        code, left_out = measure_in_one_process(report, found, module, waiting)
        report.result["left_out"] += [f"{part}: {name}" for name in left_out]
        done = {record["name"] for record in found} | set(left_out)
        rest = [name for name in waiting if name not in done]
        is_stuck = code is None or len(rest) == len(waiting)  # another process would get no further
        if code != 0 and is_stuck and rest:
            found.append({"name": rest.pop(0), "failed": f"its process ended {describe_exit(code)}"})
        waiting = rest if code != 0 else []
        report.save()


def measure_in_one_process(
    report: Report, found: list[dict], module: str, names: list[str]
) -> tuple[int | None, list[str]]:
    """Append a process's records to `found` while they are made. Return its exit code and the names it left out."""
    before, left_out = list(found), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"

        def take_over():
            if result := read_records(path):
                found[:], left_out[:] = before + result["records"], result["left_out"]
                report.save()

        left_s = max(report.seconds_left(), 1)
        command = [sys.executable, "-m", module, "--json", str(path), "--minutes", f"{left_s / 60:.3f}"]
        command += ["--only", *names, *(["--smoke"] if report.smoke else [])]
        code = run_command(command, left_s + GRACE_S, every=take_over)
        take_over()
    return code, left_out

"""Everything worth measuring on a GPU machine, in one command and one file, within minutes and without a network.

    python -m scripts.gpu_report [--minutes 10] [--only machine,ceilings,...] [--json benchmarks/<device>.json]

The parts are: the machine; its ceilings (copies, and GEMMs at the shapes of LLaMA-7B); the kernels' tests on the
device; whole training steps at the shapes of LLaMA-7B and of a 1.1B model, where their time goes, and peers' steps on
the same rows; the cost of FSDP2 and of states that are saved meanwhile; kernels.bench with every installed peer. The
JSON file is replaced whole after each measurement, so an interruption costs one measurement at most. A part that fails
is recorded with its error, and the rest goes on. No measurement begins when the time is up, and the report names what
was left out. Tests and benchmarks run in processes of their own, one for each test file and each op: a kernel that
breaks the CUDA context takes no other down.

--smoke runs every part at toy size on a CPU, the kernels in Triton's interpreter. scripts/pages/benchmarks.py turns
the JSON into README's table.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported, here and in child processes

from kernels.measure.machine import DEVICE, GPU, query_nvidia_smi
from scripts.base.results import ROOT, new_parser
from scripts.report import kernel_parts as kernels
from scripts.report.processes import unpack_wheels
from scripts.report.report import Report

STEP_PARTS = {"step": "step.bench", "profile": "step.breakdown", "peers": "step.peers", "ranks": "step.ranks"}


def step_module(name: str):
    """Return the module of a part, imported when it is first used: a package it lacks must cost that part only."""
    return importlib.import_module(f"scripts.{STEP_PARTS[name]}")


def measure_step_part(name: str):
    """Return the function that measures a part of STEP_PARTS."""
    return lambda report: step_module(name).measure_part(report)


PARTS = {  # name: what measures it, and the share of the time then left that it may take; the last part has all of it
    "machine": (kernels.measure_machine, 1.0),
    "ceilings": (kernels.measure_ceilings, 0.2),
    "tests": (kernels.run_kernel_tests, 0.4),
    "step": (measure_step_part("step"), 0.5),
    "profile": (measure_step_part("profile"), 0.4),
    "peers": (measure_step_part("peers"), 0.6),
    "ranks": (measure_step_part("ranks"), 0.5),
    "kernels": (kernels.run_kernel_benchmarks, 1.0),
}


def measure_parts(report: Report, names: list[str]) -> None:
    """Measure parts in this order."""
    for name in names:
        measure, share = PARTS[name]
        report.measure_part(name, measure, 1.0 if name == names[-1] else share)


def format_report(result: dict) -> str:
    """Return the report as it is printed: every figure, then what failed and what was left out."""
    parts = result["parts"]
    facts = parts.get("machine", {})
    lines = [f"{facts.get('device', DEVICE)}, commit {result.get('commit')}, {facts.get('date', '')}"]
    lines += kernels.format_ceilings(parts.get("ceilings", {}))
    lines += kernels.format_tests(parts.get("tests", {}))
    lines += kernels.format_benchmarks(parts.get("kernels", {}))
    for name in STEP_PARTS:
        if "records" in parts.get(name, {}):
            lines += step_module(name).format_part(parts[name])
    lines += [f"{name} failed: {part['failed']}" for name, part in parts.items() if "failed" in part]
    lines += [f"left out for time: {name}" for name in result["left_out"]]
    return "\n".join(lines)


def find_commit() -> str | None:
    """Return the commit of this checkout, marked if files differ from it, or None where there is no git."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("-modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def parse_arguments(argv: list[str] | None):
    parser = new_parser(__doc__, "python -m scripts.gpu_report")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing after this long (10)")
    parser.add_argument("--only", help=f"parts, comma-separated, of {', '.join(PARTS)} (all)")
    parser.add_argument("--json", help="where the report goes (benchmarks/<device>.json; with --smoke out/smoke.json)")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask (git's HEAD)")
    parser.add_argument("--wheels", metavar="DIR", help="put the wheels of this folder on the path: peers (none)")
    parser.add_argument("--smoke", action="store_true", help="every part at toy size, on a CPU too")
    args = parser.parse_args(argv)
    args.only = list(PARTS) if args.only is None else args.only.split(",")
    unknown = [name for name in args.only if name not in PARTS]
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    if not GPU and not args.smoke:
        parser.error("no GPU is visible to torch; --smoke tries every part at toy size on the CPU")
    if args.wheels and not list(Path(args.wheels).glob("*.whl")):
        parser.error(f"--wheels: no *.whl in {args.wheels}")
    slug = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if GPU else "cpu"
    args.json = args.json or ("out/smoke.json" if args.smoke else ROOT / "benchmarks" / f"{slug}.json")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes end too
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels:
            unpack_wheels(args.wheels, folder)
        date = time.strftime("%Y-%m-%d %H:%M")
        report = Report(args.json, args.minutes, args.smoke, commit=args.commit or find_commit(), date=date)
        measure_parts(report, args.only)
    if GPU:
        report.add("machine", clocks_at_the_end=query_nvidia_smi(*kernels.CLOCKS))
    print(format_report(report.result))
    print(f"written to {report.path}")


if __name__ == "__main__":
    main()

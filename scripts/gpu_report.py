"""Everything worth measuring on a GPU machine, in three runs of at most ten minutes and without a network.

    python -m scripts.gpu_report --out DIR [--minutes 8] [--only machine,ceilings,...] [--again]

The same command is given until nothing is missing: a run goes on where the runs before it ended. --out is the folder of
everything that is written, and may be carried from machine to machine:

    report.json     every figure; replaced whole after each measurement, so an interruption costs one at most
    log.txt         what was printed
    launch/         launch tables that kernels.tune has improved
    triton.tar.gz   Triton's cache: what is compiled once is compiled for all runs

The parts, in order: the machine; compiling every kernel; the kernels' tests on the device; its ceilings (copies, and
GEMMs as LLaMA-7B's layers use them); training steps as a user of this card gets them; where their time goes;
kernels.bench of the main ops; checks of FSDP2; peers' steps on the same rows; steps in other modes; the cost of FSDP2
and of saves; kernels.bench of all other ops; kernels.tune. The first run is made for all before "profile".

A part that fails is recorded with its error, and the rest goes on. No measurement begins when the time is up, one that
has begun may take another minute, and the report names what was left out. Tests, steps and benchmarks run in processes
of their own: a kernel that breaks the CUDA context takes no other down.

--smoke runs every part at toy size on a CPU, the kernels in Triton's interpreter. scripts/pages/benchmarks.py turns
the JSON into README's table.
"""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported, here and in child processes

from kernels.base.commands import run_command
from kernels.measure.clock import parse_finite
from kernels.measure.machine import DEVICE, GPU, query_nvidia_smi
from scripts.base.results import ROOT, new_parser
from scripts.report import kernel_parts, kernel_tests
from scripts.report.processes import copy_output, unpack_wheels
from scripts.report.report import Report
from scripts.report.triton_cache import carry_cache

STEP_PARTS = {"step": "step.bench", "profile": "step.breakdown", "peers": "step.peers", "ranks": "step.ranks"}

Measure = Callable[[Report], None]


def step_module(name: str):
    """Return the module of a part, imported when it is first used: a package it lacks must cost that part only."""
    return importlib.import_module(f"scripts.{STEP_PARTS[name]}")


def step_part(name: str, function: str = "measure_part") -> Measure:
    """Return the function of a module of STEP_PARTS that measures a part."""
    return lambda report: getattr(step_module(name), function)(report)


def tune(report: Report) -> None:
    """Tune the kernels into the folder launch/ beside the report."""
    kernel_parts.tune_kernels(report, report.out / "launch")


PARTS: dict[str, tuple[Measure, float]] = {  # name: what measures it, and the share of the time left that it may take
    "machine": (kernel_parts.measure_machine, 1.0),
    "warm_up": (kernel_parts.warm_up, 0.3),
    "tests": (kernel_tests.run_kernel_tests, 0.45),
    "ceilings": (kernel_parts.measure_ceilings, 0.3),
    "step": (step_part("step"), 0.9),
    "profile": (step_part("profile"), 0.4),
    "kernels": (kernel_parts.run_main_benchmarks, 0.7),
    "checks": (step_part("ranks", "measure_checks"), 0.7),
    "peers": (step_part("peers"), 0.7),
    "variants": (step_part("step", "measure_other_variants"), 0.5),
    "ranks": (step_part("ranks"), 0.5),
    "other_kernels": (kernel_parts.run_other_benchmarks, 0.6),
    "tune": (tune, 1.0),
}


def measure_parts(report: Report, names: Sequence[str]) -> None:
    """Measure what is missing of parts in this order. The last one may take all the time that is left."""
    for name in names:
        measure, share = PARTS[name]
        report.measure_part(name, measure, 1.0 if name == names[-1] else share)


def format_report(result: dict) -> str:
    """Return the report as it is printed: every figure, then what failed and what was left out."""
    parts = result["parts"]
    facts = parts.get("machine", {})
    lines = [f"{facts.get('device', DEVICE)}, commit {result.get('commit')}, {facts.get('date', '')}"]
    lines += kernel_parts.format_ceilings(parts.get("ceilings", {}))
    lines += kernel_tests.format_tests(parts.get("tests", {}))
    lines += kernel_parts.format_benchmarks(parts.get("kernels", {}))
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "python -m scripts.gpu_report")
    parser.add_argument("--out", type=Path, metavar="DIR", help="everything that is written (out/<device>)")
    parser.add_argument("--minutes", type=parse_finite, default=8.0, help="begin nothing after this long (8)")
    parser.add_argument("--only", help=f"parts, comma-separated, of {', '.join(PARTS)} (all)")
    parser.add_argument("--again", action="store_true", help="measure what failed in earlier runs once more")
    parser.add_argument("--json", type=Path, help="another place for the report (report.json in --out)")
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
    args.device = torch.cuda.get_device_name() if GPU else "CPU"
    args.out = args.out or Path("out", "smoke" if args.smoke else re.sub(r"\W+", "_", args.device.lower()))
    args.json = args.json or args.out / "report.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing until the time is up, and print every figure."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes end too
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"commit": args.commit or find_commit(), "date": time.strftime("%Y-%m-%d %H:%M")}
    try:
        report = Report(args.json, args.minutes, args.smoke, device=args.device, out=args.out, **facts)
    except ValueError as error:
        sys.exit(f"scripts.gpu_report: {error}")
    if args.again:
        report.drop_failures()
    with copy_output(args.out / "log.txt"), tempfile.TemporaryDirectory() as folder:
        if args.wheels:
            unpack_wheels(args.wheels, Path(folder, "wheels"))
        with carry_cache(args.out, Path(folder, "triton")):
            measure_parts(report, args.only)
        if GPU:
            report.add("machine", clocks_at_the_end=query_nvidia_smi(*kernel_parts.CLOCKS))
        print(format_report(report.result))
        print(f"written to {args.out}", flush=True)


if __name__ == "__main__":
    run_command(main)

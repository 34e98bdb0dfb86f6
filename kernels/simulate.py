"""Execute every compiled kernel without a GPU, and check it as a sanitizer would.

    python -m kernels.simulate --op rope --chip sm_90
    python -m kernels.simulate --json benchmarks/simulated.json
    python -m kernels.simulate --check benchmarks/simulated.json --changed

Every op runs forward and backward, in the dtypes that ship, as this version of Triton compiles it for the chip. The
cases are in kernels/measure/simulated_cases.py, and kernels/measure/simulated_records.py says how one is judged. A run
of all cases also fails if an entry of the launch tables is used by none. It does not run under TRITON_INTERPRET=1. The
kernels are executed by the PTX machine (csrc/ptx, kernels/compiled/ptx.py); it has no clock, and says nothing of time.

    --json FILE     writes the records of this version of Triton, and keeps those of others
    --check FILE    fails if the file lacks a case, or if a counter in it differs
    --changed       with --check: executes only one case of each op and dtype, the chips in turn, if
                    no code has changed since the file was written by a run of all cases
                    (kernels/measure/simulated_known.py)
"""

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from rich.progress import track
from triton import knobs

from kernels.base.commands import run_command
from kernels.base.help_text import HelpParser
from kernels.compiled.rules import find_unused
from kernels.measure.simulated_cases import CHIPS, simulated_cases
from kernels.measure.simulated_known import choose_samples, digest_sources, is_recorded
from kernels.measure.simulated_records import (
    find_differences,
    format_record,
    format_summary,
    load_records,
    save_records,
    simulate,
)
from kernels.ops import common


def parse_arguments(argv: Sequence[str] | None, ops: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. ops: the names that --op takes."""
    parser = HelpParser("kernels.simulate", __doc__)
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=ops, default=[], help=f"of {', '.join(ops)}")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail when this Triton's records there differ")
    parser.add_argument(
        "--changed", action="store_true", help="with --check: a sample of the cases if no code has changed since"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that compile and execute")
    args = parser.parse_args(argv)
    if args.changed and not args.check:
        parser.error("--changed compares with the records of --check FILE, which is missing")
    return args


def _simulate_one(job: tuple[int, str]) -> tuple[dict, set]:
    index, chip = job
    return simulate(simulated_cases()[index], chip)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors then hold NaN until they are written
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate the cases that the command line asks for. Exit with 1 if one is wrong."""
    cases = simulated_cases()
    args = parse_arguments(argv, list(dict.fromkeys(case.case.op for case in cases)))
    if knobs.runtime.interpret:
        sys.exit("kernels.simulate: TRITON_INTERPRET is set, and the interpreter breaks triton.compile; unset it")
    chosen = [(i, case) for i, case in enumerate(cases) if not args.op or case.case.op in args.op]
    jobs = [(i, chip) for chip in args.chip for i, case in chosen if chip in case.chips]
    is_whole = not args.op and len(args.chip) == len(CHIPS)
    is_known = args.changed and is_recorded(args.check)
    if is_known:
        samples = choose_samples(cases, CHIPS)
        jobs = [job for job in jobs if job in samples]
        print(f"no code has changed since {args.check} was written: {len(jobs)} cases are executed as a sample")
    started, records, used = time.monotonic(), [], set()
    with multiprocessing.get_context("fork").Pool(args.workers, _prepare_worker) as pool:
        done = pool.imap(_simulate_one, jobs)
        for record, entries in track(done, "simulating", len(jobs), disable=not sys.stderr.isatty()):
            print(format_record(record), flush=True)
            records.append(record)
            used |= entries
    failed = [r for r in records if r["wrong"] or r["n_findings"]]
    violations: list = []
    if not args.op and not is_known:
        tables = {path.stem: common.launch_table(path.stem) for path in sorted(common.LAUNCH.glob("*.json"))}
        violations = find_unused(used, tables, args.chip)
    print(format_summary(records))
    print(*(f"VIOLATION {violation}" for violation in violations), sep="\n", file=sys.stderr)
    seconds = time.monotonic() - started
    print(
        f"{len(records)} cases, {len(failed)} with something wrong, {sum(r['n_findings'] for r in records)} findings, "
        f"Triton {triton.__version__}, {seconds:.0f} s"
    )
    if args.json:
        is_proof = is_whole and not is_known and not failed and not violations
        save_records(args.json, records, {"seconds": round(seconds), "sources": digest_sources()} if is_proof else None)
    differences = find_differences(args.check, records) if args.check else []
    if args.check and triton.__version__ not in load_records(args.check)["versions"]:
        print(f"{args.check} holds no records of Triton {triton.__version__}: not compared")
    if differences:
        print(*differences[:20], sep="\n", file=sys.stderr)
        print(f"{args.check} is stale; run python -m kernels.simulate --json {args.check}", file=sys.stderr)
    sys.exit(bool(failed or violations or differences))


if __name__ == "__main__":
    run_command(main)

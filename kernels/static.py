"""The static gate: compile every launch that ships for chips that are not here, and judge the machine code.

    python -m kernels.static --op attention --chip sm_90
    python -m kernels.static --json records.json
    python -m kernels.static --check records.json --changed

The launches are found by running the launch functions (kernels/compiled/launch_cases.py); the rules are listed
in kernels/compiled/rules.py. The gate needs no GPU and does not run under TRITON_INTERPRET=1. Machine code depends on
the version of Triton, so a file may hold the records of several versions.

csrc/cuda is judged too, where nvcc has built it (kernels/compiled/cuda_code.py; `--op csrc` judges it alone). Its
records, of one version of nvcc, lie in cuda.json beside FILE.

    --json FILE     writes the records of this version, of the ops and chips that were compiled, and
                    keeps all others
    --check FILE    fails if the file's records of this version differ from the new ones
    --changed       with --check: compiles only one launch of each kernel, each for another chip,
                    and every launch whose source, arguments or options have changed since its
                    record was written (kernels/compiled/known.py)
"""

import argparse
import sys
import warnings
from pathlib import Path

import triton
from triton import knobs

from kernels.base.commands import run_command
from kernels.base.help_text import HelpParser
from kernels.compiled.cuda_code import find_cuda_differences, format_cuda_record, judge_library, save_cuda_records
from kernels.compiled.launch_cases import all_cases
from kernels.compiled.machine_code import CHIPS
from kernels.compiled.records import find_differences, format_record, load_records, save_records
from kernels.compiled.rules import find_unplayed, find_unused, operator_names, run_gate
from kernels.ops import common


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = HelpParser("kernels.static", __doc__)
    parser.add_argument("--op", nargs="+", default=[], help="only these; nothing is then found unused or unplayed")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail when this Triton's records there differ")
    parser.add_argument(
        "--changed",
        action="store_true",
        help="with --check: compile one launch of each kernel, and those that differ from FILE in source or arguments",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    return parser.parse_args()


def judge_csrc(args: argparse.Namespace) -> bool:
    """Judge the library of csrc/cuda, print the records, write and compare them. Return whether the gate fails."""
    records, broken, compiler = judge_library(args.chip)
    print(*(format_cuda_record(r) for r in records), sep="\n")
    print(*(f"VIOLATION {line}" for line in broken), sep="\n", file=sys.stderr)
    print(f"csrc/cuda: {len(records)} kernels, {len(broken)} violations, {compiler}")
    if args.json and records:
        save_cuda_records(args.json.with_name("cuda.json"), records, compiler)
    path = args.check.with_name("cuda.json") if args.check else None
    differences = find_cuda_differences(path, records, compiler, args.chip) if path and records else []
    if differences:
        print(*differences[:20], sep="\n", file=sys.stderr)
        print(f"{path} is stale; run python -m kernels.static --op csrc --json {args.check}", file=sys.stderr)
    return bool(broken or differences)


def main() -> None:
    """Run the gate. Exit with 1 on a violation or on a difference from the file of --check."""
    args = parse_arguments()
    if knobs.runtime.interpret:
        sys.exit("kernels.static: TRITON_INTERPRET is set, and the interpreter breaks triton.compile; unset it")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    csrc_fails = (not args.op or "csrc" in args.op) and judge_csrc(args)
    if args.op == ["csrc"]:
        sys.exit(csrc_fails)
    args.op = [op for op in args.op if op != "csrc"]
    cases = all_cases(args.op)
    if not cases:
        sys.exit(f"kernels.static: no cases for {', '.join(args.op)}; see kernels/compiled/launch_cases.py")
    old_records = load_records(args.check)["records"] if args.check and args.changed else ()
    records, violations, launched, n_known = run_gate(cases, args.chip, workers=args.workers, old_records=old_records)
    if not args.op:
        tables = {path.stem: common.launch_table(path.stem) for path in sorted(common.LAUNCH.glob("*.json"))}
        violations += find_unused(launched, tables, args.chip) + find_unplayed(cases, operator_names())
    print(*map(format_record, records), sep="\n")
    print(*(f"VIOLATION {violation}" for violation in violations), sep="\n", file=sys.stderr)
    print(f"{len(records)} launches, {len(violations)} violations, Triton {triton.__version__}")
    if n_known:
        print(f"{n_known} of them as {args.check} has them: nothing that they depend on has changed")
    if args.json:
        save_records(args.json, records, args.op, args.chip)
    differences: list[str] = []
    if args.check and triton.__version__ in load_records(args.check)["versions"]:
        differences = find_differences(args.check, records, args.op, args.chip)
    elif args.check:
        print(f"{args.check} holds no records of Triton {triton.__version__}: not compared")
    if differences:
        print(*differences[:20], sep="\n", file=sys.stderr)
        print(f"{args.check} is stale; run python -m kernels.static --json {args.check}", file=sys.stderr)
    sys.exit(bool(violations or differences or csrc_fails))


if __name__ == "__main__":
    run_command(main)

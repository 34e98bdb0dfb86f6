"""Finds launch configurations by measuring them on the GPU at hand, and writes kernels/launch/<op>.json.

    python -m kernels.tune --op swiglu --minutes 5
    python -m kernels.tune --static --chip sm_90        # no GPU: ranks by what the machine code shows
    TRITON_INTERPRET=1 python -m kernels.tune --smoke   # no GPU: the whole flow at toy size, writes nothing

For each entry of the launch tables that this chip reads, the candidates (kernels/measure/candidates.py) are compiled as
the static gate does, and what it would refuse is left out. The rest are checked against the operator's plain torch
path, timed on the cases that read the entry (CUDA events, medians, sets of inputs that exceed the L2 twice) and
compared by the geometric mean. The entry changes when one is faster by more than 2%, which is what repeated
measurements differ by. It is written as soon as it is known, so that running out of time loses nothing.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kernels.base.commands import run_command
from kernels.base.help_text import HelpParser
from kernels.compiled.launch_cases import Make, all_cases
from kernels.compiled.machine_code import CHIPS
from kernels.measure.candidates import drop_source, find_entries, rank_candidates, write_launch_table
from kernels.measure.clock import parse_finite
from kernels.measure.tuner import Tuner
from kernels.ops import common


def select_ops(named: Sequence[str]) -> list[str]:
    """Return the named ops, or all that have launch tables. Exit if a name is none of them."""
    ops = sorted({case.op for case in all_cases()})
    if unknown := set(named) - set(ops):
        sys.exit(f"kernels.tune: no cases for {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    return [op for op in ops if op in named or not named]


def print_ranks(ops: Sequence[str], chips: Sequence[str], workers: int) -> None:
    """Print the candidates of every entry as their machine code ranks them, the incumbent marked with a star."""
    console = Console(highlight=False, soft_wrap=True)
    for op in ops:
        table = common.launch_table(op)
        for chip in chips:
            for entry in find_entries(op, chip, Make(), table):
                labels = ", ".join(case.label for case in entry.cases)
                console.print(f"{entry}, by {labels}", style="bold", markup=False)
                for row in rank_candidates(entry, table, workers):
                    mark = "*" if row.config == drop_source(entry.config(table)) else " "
                    text = f"{-row.minus_bytes_in_flight / 1024:7.1f} KB in flight, {row.programs:2} programs an SM, "
                    refused = f"refused: {row.rules}" if row.rules else ""
                    console.print(f"  {mark} {text}{row.registers:3} registers  {row.config}  {refused}", markup=False)


def tune(ops: Sequence[str], minutes: float, smoke: bool, out: Path | None, workers: int) -> None:
    """Measure the ops' entries under a progress bar, and write the tables into a folder, if one is given."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    device = "cpu" if smoke else "cuda"
    chip = common.chip(torch.device(device))
    with Progress(*columns, console=console) as progress:

        def show(text):
            progress.console.print(text, markup=False)

        tuner = Tuner(device, chip, minutes, show, smoke, workers)
        n_entries = sum(len(by_chip.get(chip, ())) for op in ops for by_chip in common.launch_table(op).values())
        task = progress.add_task(f"tuning {chip}", total=n_entries)
        write = partial(write_launch_table, folder=out) if out else (lambda op, table: None)
        waiting = []
        for op in ops:
            progress.update(task, description=f"tuning {op} {chip}")
            waiting += tuner.tune(op, write, lambda: progress.advance(task))
    for entry in waiting:
        console.print(f"{entry}: not reached in {minutes:g} minutes, left as it was", markup=False)


def main() -> None:
    """Tune, or rank by the machine code, as the command line says."""
    parser = HelpParser("kernels.tune", __doc__)
    parser.add_argument("--op", nargs="+", default=[], help="only these")
    parser.add_argument("--minutes", type=parse_finite, default=10, help="stop after this many minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", default=common.LAUNCH, help="for the tables")
    parser.add_argument("--dry-run", action="store_true", help="measure, write nothing")
    parser.add_argument("--static", action="store_true", help="without a GPU: rank by the machine code")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS), help="for --static")
    parser.add_argument("--smoke", action="store_true", help="try everything at toy size in the interpreter")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    ops, workers = select_ops(args.op), max(2, (os.cpu_count() or 2) - 2)
    if args.smoke != common.INTERPRETED:
        sys.exit(
            "kernels.tune: --smoke, and it alone, runs in the interpreter: with TRITON_INTERPRET=1, and unset without"
        )
    if args.static:
        print_ranks(ops, args.chip, workers)
    elif args.smoke or torch.cuda.is_available():
        tune(ops, args.minutes, args.smoke, None if args.dry_run or args.smoke else args.out, workers)
    else:
        print(
            "kernels.tune: no GPU here, and only a GPU can be measured; --static ranks by the machine code",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)

"""Microbenchmarks of every kernel against the memory, the matrix units and other libraries, in one run.

    python -m kernels.bench --json bench.json --plot rooflines
    python -m kernels.bench --op attention linear_cross_entropy --minutes 2
    python -m kernels.bench --smoke                                     # no GPU: that it works

A time is the median over at least 20 repetitions of device time between CUDA events. Each repetition takes the next
of several sets of random inputs, together over three times the L2, and the L2 is read full between forward and
backward. The device spins before each repetition so that all its launches are queued: the device is measured, not the
host, at the clocks of short bursts, and the two ceilings are measured likewise. Before timing, outputs and every
gradient are checked against the reference in fp32: an error over twice that of torch's own path in the same dtype makes
the record "wrong", without a time. A fraction is the roofline's time over the measured one; the roofline's time is the
larger of FLOPs / GEMM rate and bytes / copy rate (the formulas are in kernels/measure/cases.py).

Without a GPU, or with --smoke, the references run at toy sizes, and with TRITON_INTERPRET=1 the kernels are checked in
Triton's interpreter. That says nothing of speed, and no rates are printed.
"""

import argparse
from collections.abc import Sequence

from kernels.base.commands import run_command
from kernels.base.help_text import HelpParser
from kernels.measure.benchmark import REPEATS, Benchmark
from kernels.measure.cases import full_cases, toy_cases
from kernels.measure.clock import parse_finite
from kernels.measure.machine import GPU, free_memory
from kernels.measure.results import format_summary
from kernels.ops.common import INTERPRETED


def parse_arguments(argv: Sequence[str] | None, ops: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. ops: the names that --op takes."""
    parser = HelpParser("kernels.bench", __doc__)
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=ops, default=ops, help=f"of {', '.join(ops)}")
    parser.add_argument("--json", metavar="FILE", help="where the figures go; written after every measurement")
    parser.add_argument("--plot", metavar="DIR", help="draw rooflines there; needs matplotlib")
    parser.add_argument("--minutes", type=parse_finite, help="begin no measurement after this many minutes")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each measurement")
    parser.add_argument("--no-peers", action="store_true", help="ours and torch eager alone, of all that are installed")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, each measured once, to see that it works")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line asks for, print them, and write and draw them where asked."""
    cases = list(full_cases() if GPU else toy_cases())
    args = parse_arguments(argv, list(dict.fromkeys(case.op for case in cases)))
    if args.smoke:
        cases, args.repeats = list(toy_cases()), 1
    if not GPU:
        kernels = "the kernels in Triton's interpreter" if INTERPRETED else "no kernels (TRITON_INTERPRET=1 adds them)"
        print(f"No GPU: the references and {kernels}, at toy sizes, which say nothing of speed.")
        args.repeats = min(args.repeats, 5)
    benchmark = Benchmark(args.json, args.minutes, args.repeats, is_toy=args.smoke or not GPU)
    for case in cases:
        if case.op in args.op:
            benchmark.run_case(case, peers=not args.no_peers)
            free_memory()
    print(format_summary(benchmark.result))
    if args.plot:
        from kernels.measure.plot import draw

        try:
            paths = draw(benchmark.result, args.plot)
        except (ImportError, ValueError) as error:
            raise SystemExit(str(error)) from None
        for path in paths:
            print(f"drew {path}")


if __name__ == "__main__":
    run_command(main)

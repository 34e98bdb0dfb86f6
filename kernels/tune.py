"""Finds launch configurations by measuring them on the GPU at hand, and writes kernels/launch/<op>.json.

    python -m kernels.tune [--op NAME ...] [--minutes M] [--dry-run]
    python -m kernels.tune --static [--op NAME ...] [--chip sm_90]    no GPU: ranks by what the machine code shows
    TRITON_INTERPRET=1 python -m kernels.tune --smoke                 no GPU: the whole flow at toy size, writes nothing

For each entry of the launch tables that this chip reads, the candidates (kernels/compiled/launch_cases.py) are compiled as the static
gate does, and what it would refuse is left out. The rest are checked against the operator's plain torch path, timed on
the cases that read the entry (CUDA events, medians, sets of inputs that exceed the L2 twice) and compared by the
geometric mean. The entry changes when one is faster by more than 2%, which is what repeated measurements differ by. It
is written as soon as it is known, so that running out of time loses nothing.
"""

import argparse
import copy
import datetime
import itertools
import json
import math
import os
import statistics
import sys
import time
import warnings
from typing import NamedTuple

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from triton.runtime.jit import JITFunction

from kernels.compiled.launch_cases import CANDIDATES, FOLLOWS, Case, Make, all_cases
from kernels.compiled.machine_code import CHIPS, programs_per_sm
from kernels.ops import common
from kernels.static import ReadTable, compile_all, judge, patched, replay

NOISE = 0.02  # a configuration must be faster by more than this
BATCHES = 7  # a median is of so many
SMOKE = 2  # candidates of an entry
TOY = dict(tokens=24, largest=64, dtype=torch.float32)  # the interpreter does bf16 wrong

# ---- what to measure ------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One configuration of a launch table, and who reads it."""

    op: str
    kernel: str
    chip: str
    size: str
    cases: tuple[Case, ...]

    def config(self, table):
        return table[self.kernel][self.chip][self.size]

    def __str__(self):
        return f"{self.op}.{self.kernel} {self.chip} up to {self.size}"


def without_source(config):
    return {name: value for name, value in config.items() if name != "from"}


def candidates(entry, incumbent):
    """The incumbent, then every combination of CANDIDATES that differs from it."""
    choices = CANDIDATES.get(entry.op, {}).get(entry.kernel, {})
    combinations = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    configs = [without_source(incumbent)]
    return configs + [c for c in (configs[0] | new for new in combinations if new) if c != configs[0]]


def with_config(table, entry, config, source="candidate"):
    """A copy of the table where the entry, and what follows it, is another configuration."""
    table = copy.deepcopy(table)
    table[entry.kernel][entry.chip][entry.size] = config | {"from": source}
    follower, names = FOLLOWS.get((entry.op, entry.kernel), (None, ()))
    if follower:
        table[follower][entry.chip][entry.size] |= {name: config[name] for name in names}
    return table


def using(table, chip):
    """While it lasts, launches read this table, for that chip. There is one op at a time."""
    return patched(common, launch_table=lambda op: table, chip_override=chip)


def entries(op, chip, make, table):
    """The entries that the op's cases read on that chip. Launches are run, but on "meta" nothing is."""
    readers, idle = {}, (lambda *args, **kwargs: None)
    for case in all_cases([op]):
        read = []
        noting = ReadTable(table, lambda path, _, read=read: read.append(path), (op,))
        with using(noting, chip), patched(JITFunction, run=idle if make.device.type == "meta" else JITFunction.run):
            launch(case.build(make))
        for path in dict.fromkeys(read):
            readers.setdefault(path, []).append(case)
    return [Entry(*path, tuple(cases)) for path, cases in readers.items()]


def launch(call):
    op, *args = call
    return getattr(op, "launch", op)(*args)


# ---- does it give the right numbers, and how fast -------------------------------------------------------------------


def tensors(*values):
    """All tensors among values, which may hold lists."""
    return [
        t for v in values for t in (tensors(*v) if isinstance(v, (list, tuple)) else [v] if torch.is_tensor(v) else [])
    ]


def moved(value, device, dtype=None):
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device, dtype) for v in value)
    if not torch.is_tensor(value):
        return value
    return value.detach().to(device, dtype if dtype and value.is_floating_point() else value.dtype, copy=True)


def results(call):
    """What a call returns and what it leaves in its arguments, which it may write."""
    op, *args = call
    return tensors(op(*args), args)


def expected(case, make):
    """(results of the operator's torch path, the same in fp64) for a case with seed 0."""
    torch.manual_seed(0)
    op, *args = case.build(make)
    own = results((op.cpu, *moved(args, "cpu")))
    try:
        return own, results((op.cpu, *moved(args, "cpu", torch.float64)))
    except (RuntimeError, ValueError, TypeError, triton.TritonError):  # an operator on bits, of which fp64 has others
        return own, own


def errors(case, make, own, truth):
    """(error of the launch, what is allowed) of every floating-point result of a case with seed 0. Allowed is twice
    the error of the torch path in the case's own dtype, and one rounding of the result."""
    torch.manual_seed(0)
    op, *args = case.build(make)
    got = tensors(launch((op, *args)), args)
    found = []
    for g, o, t in zip(got, own, truth, strict=True):
        if g.numel() and g.is_floating_point():
            t = t.double()
            allowed = 2 * (o.double() - t).abs().max() + torch.finfo(o.dtype).eps * t.abs().max()
            found.append(((g.detach().cpu().double() - t).abs().max().item(), allowed.item()))
    return found


def off(found, base):
    """What is wrong with errors(), or None. base: the incumbent's, of which twice as much is allowed too; None where
    these are the incumbent's own: it passed its op's tests, which know its arithmetic better, and only NaN is wrong."""
    for i, (error, allowed) in enumerate(found):
        limit = max(allowed, 2 * base[i][0]) if base else sys.float_info.max
        if not error <= limit:
            return f"result {i} is off by {error:.1e}, wanted at most {limit:.1e}"
    return None


def median_ms(case, make):
    """Median time of one launch."""
    sets = [case.build(make)]
    if make.device.type != "cuda":
        start = time.perf_counter()
        launch(sets[0])
        return 1e3 * (time.perf_counter() - start)
    l2 = torch.cuda.get_device_properties(make.device).L2_cache_size
    a_set = sum(t.numel() * t.element_size() for t in tensors(sets[0]))
    sets += [case.build(make) for _ in range(min(7, max(1, -(-2 * l2 // max(1, a_set)))))]
    for call in sets:
        launch(call)
    times = []
    for _ in range(BATCHES):
        torch.cuda._sleep(2_000_000)  # a millisecond, in which launches queue up: then the GPU never waits for the host
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in sets:
            launch(call)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    return statistics.median(times)


def refused(entry, tables, workers):
    """For each table: the gate's violations in the launches of the entry's cases."""
    launches = [
        [x for case in entry.cases for x in replay(case, entry.chip, lambda op, table=table: table) if uses(x, entry)]
        for table in tables
    ]
    facts = iter(compile_all([x for group in launches for x in group], workers))
    return [[(x, found, judge(x, found)) for x, found in zip(group, facts, strict=False)] for group in launches]


def uses(launch, entry):
    kernels = (entry.kernel, *FOLLOWS.get((entry.op, entry.kernel), ())[:1])
    return launch.entry in [(entry.op, kernel, entry.chip, entry.size) for kernel in kernels]


# ---- tuning ---------------------------------------------------------------------------------------------------------


class Tuner:
    """Measures entries one by one until the time is up. say: a function that shows a line."""

    def __init__(self, device, chip, minutes, say, toy=False, workers=1):
        self.chip, self.say, self.toy, self.workers = chip, say, toy, workers
        self.deadline = time.monotonic() + 60 * minutes
        self.make = Make(device, **TOY) if toy else Make(device)
        self.small = Make(device, **TOY) if toy else Make(device, tokens=515)  # of the check: not a multiple of a tile
        name = torch.cuda.get_device_name(device) if device == "cuda" else "no device"
        self.source = f"measured on {name}, Triton {triton.__version__}, {datetime.date.today()}"

    def late(self):
        return time.monotonic() > self.deadline

    def choose(self, entry, table):
        """(configuration, its time over the incumbent's), or None when the time is up. Every decision is said."""
        configs = candidates(entry, entry.config(table))
        if self.toy:
            configs = configs[:SMOKE]
        else:  # before the first launch: a compiler's word is cheaper than a crash
            trials = refused(entry, [with_config(table, entry, config) for config in configs], self.workers)
            ok = [not any(violations for _, _, violations in trial) for trial in trials]
            self.say(f"{entry}: {len(configs)} candidates, {len(configs) - sum(ok)} refused by the static gate")
            configs = [config for i, config in enumerate(configs) if ok[i] or i == 0]
        cases = entry.cases[:1] if self.toy else entry.cases
        answers, scores, base = [expected(case, self.small) for case in cases], [], None
        for config in configs:
            if self.late():
                return None
            score, found = self.score(entry, with_config(table, entry, config), cases, answers, base)
            base = base or found  # of the incumbent
            scores.append(score)
        best = min(range(len(configs)), key=lambda i: scores[i])
        if not scores[best] < (1 - NOISE) * scores[0]:
            best = 0
        return configs[best], scores[best] / scores[0]

    def score(self, entry, table, cases, answers, base):
        """(geometric mean of the cases' milliseconds, infinite where a result is wrong or a launch fails; the errors).
        base: the incumbent's errors, see off()."""
        logs, found = [], []
        with using(table, self.chip):
            for i, case in enumerate(cases):
                try:
                    found.append(errors(case, self.small, *answers[i]))
                    problem = off(found[i], base and base[i])
                    logs.append(math.log(median_ms(case, self.make)))
                except (RuntimeError, triton.TritonError) as error:
                    problem = f"{type(error).__name__}: {error}"
                if problem:
                    self.say(f"{entry}: {without_source(entry.config(table))} in {case.label}: {problem}")
                    return math.inf, None
        return math.exp(sum(logs) / len(logs)), found

    def tune(self, op, write, advance=lambda: None):
        """Goes through the entries of one op; write(op, table) after each. Returns those that were not reached."""
        table = copy.deepcopy(common.launch_table(op))
        todo = entries(op, self.chip, self.small if self.toy else Make(), table)
        while todo and not self.late():
            entry = todo[0]
            chosen = self.choose(entry, table)
            if chosen is None:
                break
            config, ratio = chosen
            old = without_source(entry.config(table))
            if not math.isfinite(ratio):
                self.say(f"{entry}: {old} itself failed and nothing beat it; left as it is")
            else:
                self.say(f"{entry}: {old} " + ("kept" if config == old else f"-> {config}, {ratio:.3f} of its time"))
                table = with_config(table, entry, config, self.source)
                write(op, table)
            todo.pop(0)
            advance()
        return todo


def rank(entry, table, workers):
    """What the machine code says of each candidate: rows, the best first. Refused ones come last; the others by bytes
    in flight, what all programs of an SM load in one pass over their tiles, as that hides memory's latency."""
    configs = candidates(entry, entry.config(table))
    rows = []
    for config, trial in zip(
        configs, refused(entry, [with_config(table, entry, c) for c in configs], workers), strict=True
    ):
        rules = {v.rule for _, _, violations in trial for v in violations}
        facts = [found for _, found, _ in trial if not isinstance(found, str)]
        flight = min(
            (programs_per_sm(f, entry.chip) * sum(s.elements * s.element_bytes for s in f.streams if not s.store))
            for f in facts
        ) if facts else 0  # fmt: skip
        registers = max((f.registers for f in facts), default=0)
        programs = min((programs_per_sm(f, entry.chip) for f in facts), default=0)
        rows.append((len(rules), -flight, config, registers, programs, ", ".join(sorted(rules))))
    return sorted(rows, key=lambda row: row[:2])


# ---- launch tables on disk ------------------------------------------------------------------------------------------


def table_text(table):
    """A launch table as JSON, one configuration a line."""

    def written(value, depth):
        if depth == 3 or not isinstance(value, dict):
            return json.dumps(value)
        indent = "  " * (depth + 1)
        lines = ",\n".join(f"{indent}{json.dumps(key)}: {written(v, depth + 1)}" for key, v in value.items())
        return f"{{\n{lines}\n{'  ' * depth}}}"

    return written(table, 0) + "\n"


def write_launch_table(op, table, folder=common.LAUNCH):
    """Replaces launch/<op>.json, at once or not at all."""
    path = folder / f"{op}.json"
    new = path.with_suffix(".new")
    new.write_text(table_text(table))
    os.replace(new, path)
    common.launch_table.cache_clear()


# ---- command line ---------------------------------------------------------------------------------------------------


def tabled_ops(named):
    ops = sorted({case.op for case in all_cases()})
    if unknown := set(named) - set(ops):
        sys.exit(f"kernels.tune: no cases for {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    return [op for op in ops if op in named or not named]


def show_ranks(ops, chips, workers):
    console = Console(highlight=False, soft_wrap=True)
    for op in ops:
        table = common.launch_table(op)
        for chip in chips:
            for entry in entries(op, chip, Make(), table):
                console.print(
                    f"{entry}, by {', '.join(case.label for case in entry.cases)}", style="bold", markup=False
                )
                for _, flight, config, registers, programs, rules in rank(entry, table, workers):
                    mark = "*" if config == without_source(entry.config(table)) else " "
                    text = f"{-flight / 1024:7.1f} KB in flight, {programs:2} programs an SM, {registers:3} registers"
                    console.print(f"  {mark} {text}  {config}  {rules and 'refused: ' + rules}", markup=False)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", default=[], help="only these")
    parser.add_argument("--minutes", type=float, default=10, help="stop after this long (default 10)")
    parser.add_argument("--dry-run", action="store_true", help="measure, write nothing")
    parser.add_argument("--static", action="store_true", help="without a GPU: rank by the machine code")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS), help="for --static")
    parser.add_argument("--smoke", action="store_true", help="try everything at toy size in the interpreter")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    ops, workers = tabled_ops(args.op), max(2, (os.cpu_count() or 2) - 2)
    if args.smoke != common.INTERPRETED:
        sys.exit(
            "kernels.tune: --smoke, and it alone, runs in the interpreter: with TRITON_INTERPRET=1, and unset without"
        )
    if args.static:
        return show_ranks(ops, args.chip, workers)
    if not (args.smoke or torch.cuda.is_available()):
        print(
            "kernels.tune: no GPU here, and only a GPU can be measured; --static ranks by the machine code",
            file=sys.stderr,
        )
        sys.exit(2)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    device = "cpu" if args.smoke else "cuda"
    chip = common.chip(torch.device(device))
    with Progress(*columns, console=console) as progress:

        def say(text):
            progress.console.print(text, markup=False)

        tuner = Tuner(device, chip, args.minutes, say, args.smoke, workers)
        counts = {op: sum(len(by_chip.get(chip, ())) for by_chip in common.launch_table(op).values()) for op in ops}
        task = progress.add_task(f"tuning {chip}", total=sum(counts.values()))
        write = (lambda op, table: None) if args.dry_run or args.smoke else write_launch_table
        left = []
        for op in ops:
            progress.update(task, description=f"tuning {op} {chip}")
            left += tuner.tune(op, write, lambda: progress.advance(task))
    for entry in left:
        console.print(f"{entry}: not reached in {args.minutes:g} minutes, left as it was", markup=False)


if __name__ == "__main__":
    main()

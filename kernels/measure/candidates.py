"""The entries of the launch tables, and the configurations that the tuner tries for each."""

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kernels.compiled.launch_cases import Case, Make, all_cases
from kernels.compiled.launches import EntryPath, Launch, NotingTable, call_case, compile_all, patched, record_launches
from kernels.compiled.machine_code import Facts, programs_per_sm
from kernels.compiled.rules import Violation, judge
from kernels.ops import common

Config = dict[str, Any]  # constexprs, num_warps and num_stages of one launch, and "from": who chose them
Table = dict[str, dict[str, dict[str, Config]]]  # kernel -> chip -> largest size -> configuration

# op -> kernel -> the values of each constant; the tuner tries every combination.
CANDIDATES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "rms_norm": {
        "forward": dict(ROWS=(1, 2, 4), num_warps=(2, 4, 8, 16)),
        "backward": dict(ROWS=(1, 2), STAGES=(2, 3), programs_per_sm=(1, 2, 4), num_warps=(4, 8, 16)),
        "dw": dict(COLS=(32, 64), ROWS=(32, 64, 128), num_warps=(4, 8)),
    },
    "rope": {"rotate": dict(TOKENS=(4, 8, 16, 32), HEADS=(4, 8, 16), num_warps=(2, 4, 8))},
    "attention": {
        "forward": dict(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)),
        "dq": dict(num_warps=(4, 8), num_stages=(1, 2, 3)),
        "dkdv": dict(BLOCK_M=(32, 64), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(1, 2)),
        "sum": dict(ROWS=(8, 16, 32), num_warps=(2, 4, 8)),
    },
    "linear_cross_entropy": {
        "rows": dict(VECTORS=(256, 512, 1024, 2048), num_warps=(8, 16, 32)),
        "scale": dict(BLOCK=(1024, 2048, 4096, 8192), num_warps=(4, 8)),
    },
    "swiglu": {
        "forward": dict(COLS=(512, 1024, 2048, 4096), num_warps=(2, 4, 8)),
        "backward": dict(COLS=(512, 1024, 2048, 4096), num_warps=(2, 4, 8)),
    },
    "adamw": {
        "update": dict(BLOCK=(512, 1024, 2048, 4096), num_warps=(2, 4, 8)),
        "update_8bit": dict(BLOCK=(1024, 2048, 4096), num_warps=(2, 4, 8)),
    },
    "grad_norm": {
        "partial": dict(TILES=(4, 8, 16), BLOCK=(2048, 4096, 8192), num_warps=(4, 8)),
        "total": dict(BLOCK=(4096, 8192, 16384), num_warps=(8, 16, 32)),
    },
    "nf4": {"dequantise": dict(BLOCK=(1024, 2048, 4096, 8192), num_warps=(2, 4, 8))},
}
# (op, kernel) -> another kernel of the op that must have the same tile, and the constants that it copies.
FOLLOWS = {("attention", "forward"): ("dq", ("BLOCK_M", "BLOCK_N"))}  # one plan serves both


class Entry(NamedTuple):
    """One configuration of a launch table, and the cases that read it."""

    op: str
    kernel: str
    chip: str
    size: str
    cases: tuple[Case, ...]

    def config(self, table: Table) -> Config:
        """Return the entry's configuration in a table."""
        return table[self.kernel][self.chip][self.size]

    def __str__(self) -> str:
        """Return the entry's name in messages."""
        return f"{self.op}.{self.kernel} {self.chip} up to {self.size}"


def drop_source(config: Config) -> Config:
    """Return a configuration without "from", which says who chose it."""
    return {name: value for name, value in config.items() if name != "from"}


def list_candidates(entry: Entry, incumbent: Config) -> list[Config]:
    """Return the incumbent, then every combination of CANDIDATES that differs from it."""
    choices = CANDIDATES.get(entry.op, {}).get(entry.kernel, {})
    combinations = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    configs = [drop_source(incumbent)]
    return configs + [c for c in (configs[0] | new for new in combinations if new) if c != configs[0]]


def replace_config(table: Table, entry: Entry, config: Config, source: str = "candidate") -> Table:
    """Return a copy of the table in which the entry, and the kernel that follows it, have another configuration."""
    table = copy.deepcopy(table)
    table[entry.kernel][entry.chip][entry.size] = config | {"from": source}
    if (entry.op, entry.kernel) in FOLLOWS:
        follower, names = FOLLOWS[entry.op, entry.kernel]
        table[follower][entry.chip][entry.size] |= {name: config[name] for name in names}
    return table


def use_table(table: Table, chip: str) -> contextlib.AbstractContextManager[None]:
    """Make launches read this table, whatever their op, for that chip while the context lasts."""
    return patched(common, launch_table=lambda op: table, chip_override=chip)


@contextlib.contextmanager
def _kernels_idle() -> Iterator[None]:
    """Make launches do nothing while the context lasts, compiled or interpreted."""
    with contextlib.ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patched(kind, run=lambda *args, **kwargs: None))
        yield


def find_entries(op: str, chip: str, make: Make, table: Table) -> list[Entry]:
    """Return the entries that the op's cases read on that chip. No kernel runs."""
    readers: dict[EntryPath, list[Case]] = {}
    for case in all_cases([op]):
        read: list[EntryPath] = []

        def note(path, _, read=read):
            read.append(path)

        with use_table(NotingTable(table, note, (op,)), chip), _kernels_idle():
            call_case(case.build(make))
        for path in dict.fromkeys(read):
            readers.setdefault(path, []).append(case)
    return [Entry(*path, tuple(cases)) for path, cases in readers.items()]


# ---- candidates ranked by machine code ------------------------------------------------------------------------------

Trial = list[tuple[Launch, Facts | str, list[Violation]]]  # the launches of one table


def try_tables(entry: Entry, tables: list[Table], workers: int) -> list[Trial]:
    """Compile and judge, for each table, the launches of the entry's cases that use the entry or its follower."""
    kernels = [entry.kernel]
    if (entry.op, entry.kernel) in FOLLOWS:
        kernels.append(FOLLOWS[entry.op, entry.kernel][0])
    paths = [(entry.op, kernel, entry.chip, entry.size) for kernel in kernels]
    launches = []
    for table in tables:
        recorded = [x for case in entry.cases for x in record_launches(case, entry.chip, {entry.op: table}.__getitem__)]
        launches.append([launch for launch in recorded if launch.entry in paths])
    facts = iter(compile_all([launch for group in launches for launch in group], workers))
    return [
        [(launch, found, judge(launch, found)) for launch, found in zip(group, facts, strict=False)]
        for group in launches
    ]


class Ranked(NamedTuple):
    """One candidate, as its machine code ranks it. Smaller sorts better."""

    n_rules: int  # rules it breaks
    minus_bytes_in_flight: int  # bytes that all programs of an SM load in one pass over their tiles, negative
    config: Config
    registers: int
    programs: int  # an SM
    rules: str  # the rules it breaks, by name


def rank_candidates(entry: Entry, table: Table, workers: int) -> list[Ranked]:
    """Return the candidates, the best first, by their machine code.

    Refused ones come last; the others are sorted by bytes in flight, which hide memory's latency.
    """
    configs = list_candidates(entry, entry.config(table))
    rows = []
    trials = try_tables(entry, [replace_config(table, entry, config) for config in configs], workers)
    for config, trial in zip(configs, trials, strict=True):
        rules = {violation.rule for _, _, violations in trial for violation in violations}
        facts = [found for _, found, _ in trial if not isinstance(found, str)]
        programs = [programs_per_sm(f, entry.chip) for f in facts]
        loaded = [sum(s.elements * s.element_bytes for s in f.streams if not s.store) for f in facts]
        in_flight = min((n * size for n, size in zip(programs, loaded, strict=True)), default=0)
        registers = max((f.registers for f in facts), default=0)
        names = ", ".join(sorted(rules))
        rows.append(Ranked(len(rules), -in_flight, config, registers, min(programs, default=0), names))
    return sorted(rows, key=lambda row: row[:2])


# ---- launch tables on disk ------------------------------------------------------------------------------------------


def format_table(table: Table) -> str:
    """Return a launch table as JSON, one configuration a line."""

    def written(value, depth):
        if depth == 3 or not isinstance(value, dict):
            return json.dumps(value)
        indent = "  " * (depth + 1)
        lines = ",\n".join(f"{indent}{json.dumps(key)}: {written(v, depth + 1)}" for key, v in value.items())
        return f"{{\n{lines}\n{'  ' * depth}}}"

    return written(table, 0) + "\n"


def write_launch_table(op: str, table: Table, folder: Path = common.LAUNCH) -> None:
    """Replace launch/<op>.json. A reader finds the old table or the whole new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{op}.json"
    new = path.with_suffix(".new")
    new.write_text(format_table(table))
    os.replace(new, path)
    common.launch_table.cache_clear()

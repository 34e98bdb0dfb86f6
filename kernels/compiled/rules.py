"""The rules that every shipped launch must keep on every chip, and the gate that applies them.

Rules for each compilation:
  compiles  the compiler accepts it
  stack     no stack frame, no LDL or STL: nothing spills
  shared    a program's shared memory, and tensor memory on sm_100, is within the chip's limit
  matrix    a kernel with tl.dot that is given 16-bit tensors runs the chip's own matrix instruction in a loop (HMMA on
            sm_80, HGMMA on sm_90, UTCHMMA on sm_100), and no older one in that loop
  wide      every stream moves 128 bits a thread and instruction. A stream is a tl.load or tl.store of a tile with over
            1/8 of the elements of the largest that the kernel moves, which leaves out row statistics, indices and small
            tables. Beside a stream of wider elements, it moves as many elements as 128 bits hold of those: bf16 beside
            fp32 moves 64 bits, whole sectors still.
  order     a matrix instruction reads shared memory and registers after the fences that PTX wants (async_order.py)
and for all together:
  unused    every entry of kernels/launch/*.json is launched by some case
  unplayed  every operator of torch.ops.cria is launched by some case
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import ops
from kernels.compiled.known import find_known
from kernels.compiled.launch_cases import Case, Make
from kernels.compiled.launches import EntryPath, Launch, compile_all, patched, record_launches
from kernels.compiled.machine_code import CHIPS, SHARED_BLOCK, TENSOR_COLUMNS, Facts
from kernels.compiled.records import describe_launch, make_record
from kernels.ops import common
from kernels.ops.async_proxy import is_refused

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
CASES_FILE = "kernels/compiled/launch_cases.py"


class Violation(NamedTuple):
    """One broken rule: which launch, what was found and what the rule wants."""

    op: str
    kernel: str
    case: str
    chip: str
    rule: str
    got: str
    wanted: str

    def __str__(self) -> str:
        """Return one line for the terminal."""
        where = " ".join(part for part in (self.op, self.kernel, self.chip, self.case) if part)
        return f"{where}: {self.rule}: got {self.got}; wanted {self.wanted}"


def judge(launch: Launch, facts: Facts | str) -> list[Violation]:
    """Return the violations of one compilation. facts: the facts, or the compiler's error message."""

    def violation(rule, got, wanted):
        return Violation(launch.case.op, launch.name, launch.case.label, launch.chip, rule, got, wanted)

    if isinstance(facts, str):
        return [violation("compiles", facts[-500:], "a kernel")]
    found, limit, best = [], SHARED_BLOCK[launch.chip] * 1024, MATRIX[launch.chip]
    if facts.stack_bytes or facts.spills:
        got = f"{facts.stack_bytes} bytes, {facts.spills} LDL/STL, {facts.spills_in_loops} of them in loops"
        found.append(violation("stack", got, "none"))
    if facts.shared_bytes > limit:
        found.append(violation("shared", f"{facts.shared_bytes} bytes", f"at most {limit}"))
    if facts.tensor_columns > TENSOR_COLUMNS:
        got = f"{facts.tensor_columns} columns of tensor memory"
        found.append(violation("shared", got, f"at most {TENSOR_COLUMNS}"))
    has_half = any(torch.is_tensor(t) and t.dtype in (torch.bfloat16, torch.float16) for t in launch.arguments.values())
    if facts.dots and has_half and set(facts.matrix_in_loops) != {best}:
        got = ", ".join(f"{n} {name}" for name, n in facts.matrix_in_loops.items())
        found.append(violation("matrix", f"{got or 'none'} in loops", f"{best} alone"))
    largest = max((stream.elements for stream in facts.streams), default=0)
    streams = [stream for stream in facts.streams if 8 * stream.elements > largest]
    widest = max((stream.element_bytes for stream in streams), default=1)
    narrow = [
        f"{stream.bits} bits in {stream}" for stream in streams if stream.bits < 128 * stream.element_bytes // widest
    ]
    if narrow:
        found.append(violation("wide", "; ".join(narrow), "128 bits"))
    if facts.unordered and not is_refused(launch.chip):
        found.append(violation("order", f"{len(facts.unordered)} times, first {facts.unordered[0]}", "a fence between"))
    return found


def find_unused(
    launched: Collection[EntryPath | None], tables: dict[str, dict], chips: Iterable[str]
) -> list[Violation]:
    """Return a violation for every entry of the launch tables that is not among the launched ones."""
    chips = tuple(chips)
    return [
        Violation(op, kernel, f"size {size}", chip, "unused", "no launch", f"a case in {CASES_FILE}, or no such entry")
        for op, table in tables.items()
        for kernel, by_chip in table.items()
        for chip in chips
        for size in by_chip.get(chip, ())
        if (op, kernel, chip, size) not in launched
    ]


def find_unplayed(cases: Iterable[Case], operators: set[str]) -> list[Violation]:
    """Return a violation for every operator that no case calls."""
    with patched(common, chip_override="sm_90"):
        played = {getattr(case.build(Make())[0], "_qualname", None) for case in cases}
    return [
        Violation(name, "", "", "", "unplayed", "no launch", f"a case in {CASES_FILE}")
        for name in sorted(operators - played)
    ]


def operator_names() -> set[str]:
    """Return the names of all operators in torch.ops.cria, once every file of kernels/ops is imported."""
    for path in Path(*ops.__path__).glob("*.py"):
        import_module(f"kernels.ops.{path.stem}")
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cria::")}


class GateResult(NamedTuple):
    """The gate's result."""

    records: list[dict]  # as they are written
    violations: list[Violation]
    launched: set[EntryPath | None]  # entries of the launch tables
    n_known: int  # launches that were not compiled, because their machine code is known


def run_gate(
    cases: Iterable[Case],
    chips: Sequence[str] = tuple(CHIPS),
    table: Callable[[str], dict] = common.launch_table,
    workers: int = 2,
    old_records: Sequence[dict] = (),
) -> GateResult:
    """Record, compile and judge the launches of the cases on every chip.

    old_records: a launch that these records already describe is not compiled again, see kernels.compiled.known.
    """
    cases = list(cases)
    launches = [launch for chip in chips for case in cases for launch in record_launches(case, chip, table)]
    known = find_known(launches, [describe_launch(launch, table) for launch in launches], old_records)
    compiled = iter(compile_all([launch for i, launch in enumerate(launches) if i not in known], workers))
    violations, records = [], []
    for i, launch in enumerate(launches):
        if i in known:
            records.append(known[i])
            continue
        facts = next(compiled)
        violations += judge(launch, facts)
        if not isinstance(facts, str):
            records.append(make_record(launch, facts, table))
    return GateResult(records, violations, {launch.entry for launch in launches}, len(known))

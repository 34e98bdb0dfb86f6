"""The static gate: compiles every launch that ships for chips that are not here, and judges the machine code.

    python -m kernels.static [--op NAME ...] [--chip sm_90 ...] [--json FILE] [--check FILE]      exits 1 on a violation

What ships is found by running the launch functions themselves (kernels/compiled/launch_cases.py) on tensors without storage, with
Triton's launch replaced by one that records its arguments; Triton's own binder then derives types and divisibility from
them, as it would on a GPU. Needs no GPU; does not run under TRITON_INTERPRET=1. Machine code depends on the version of
Triton: --json keeps what others wrote to the same file, --check fails where the file differs from what this one makes.

Rules for each compilation:
  compiles  the compiler accepts it
  stack     no stack frame, no LDL or STL: nothing spills
  shared    a program's shared memory, and tensor memory on sm_100, is within the chip's limit
  matrix    a kernel with tl.dot that is given 16-bit tensors runs the chip's own matrix instruction in a loop (HMMA on
            sm_80, HGMMA on sm_90, UTCHMMA on sm_100), and no older one there
  wide      every stream moves 128 bits a thread and instruction. A stream is a tl.load or tl.store of a tile with over
            1/8 of the elements of the largest that the kernel moves, which leaves out row statistics, indices and small
            tables. Streams of one byte an element may move 64 bits.
and for all together:
  unused    every entry of kernels/launch/*.json is launched by some case
  unplayed  every operator of torch.ops.cria is launched by some case
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from rich.progress import track
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.compiled.launch_cases import Case, Make, all_cases
from kernels.compiled.machine_code import CHIPS, SHARED_BLOCK, TENSOR_COLUMNS, programs_per_sm, read_facts
from kernels.ops import common

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


class Violation(NamedTuple):
    op: str
    kernel: str
    case: str
    chip: str
    rule: str
    got: str
    wanted: str

    def __str__(self):
        where = " ".join(part for part in (self.op, self.kernel, self.chip, self.case) if part)
        return f"{where}: {self.rule}: got {self.got}; wanted {self.wanted}"


# ---- replay: what a launch function launches ------------------------------------------------------------------------


@dataclass
class Launch:
    """One recorded launch, with what Triton's JIT derives from its arguments."""

    case: Case
    chip: str
    function: JITFunction
    signature: dict  # name -> type
    constants: dict  # (position,) -> value
    attributes: dict  # (position,) -> divisibility
    options: object  # the backend's, parsed
    arguments: dict  # name -> as it was given
    entry: tuple | None = None  # (op, kernel, chip, size) of the launch configuration in use

    @property
    def name(self):
        return self.function.fn.__name__

    def constexprs(self):
        return {name: self.constants[i,] for i, name in enumerate(self.signature) if (i,) in self.constants}

    def key(self):
        compiled = (self.signature, self.constants, self.attributes, self.options)
        return (self.function.fn.__module__, self.function.fn.__qualname__, self.chip, *map(str, compiled))


def bind(function, args, kwargs, chip):
    """(options, signature, constants, attributes, arguments by name): what Triton's JIT makes of a launch."""
    backend = make_backend(GPUTarget("cuda", CHIPS[chip], 32))
    kwargs = {"debug": False, **kwargs}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    return *function._pack_args(backend, kwargs, bound, specialization, options), bound


class ReadTable(dict):
    """A launch table that reports which of its entries are read: note(path of keys, entry)."""

    def __init__(self, data, note, path):
        deeper = len(path) < 3  # op, kernel, chip, size
        super().__init__({k: ReadTable(v, note, (*path, k)) if deeper else v for k, v in data.items()})
        self.note, self.path = note, path

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if len(self.path) == 3:
            self.note((*self.path, key), value)
        return value


@contextlib.contextmanager
def patched(owner, **attributes):
    old = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


def replay(case, chip, table=common.launch_table):
    """The launches of one case on one chip, of those compiled alike the one that moves most. table: op -> its own."""
    launches, read = [], []

    def record(function, *args, grid, warmup, **kwargs):
        options, signature, constants, attributes, bound = bind(function, args, kwargs, chip)
        launch = Launch(case, chip, function, signature, constants, attributes, options, bound)
        launch.entry = entry_of(launch, read)
        launches.append(launch)

    def reading_table(op):
        return ReadTable(table(op), lambda path, values: read.append((path, values)), (op,))

    with patched(common, chip_override=chip, launch_table=reading_table), patched(JITFunction, run=record):
        op, *args = case.build(Make())  # inside: attention's plan depends on its tiles
        getattr(op, "launch", op)(*args)
    launches.sort(key=lambda launch: sum(t.numel() for t in launch.arguments.values() if torch.is_tensor(t)))
    return list({launch.key(): launch for launch in launches}.values())


def agreement(values, launch):
    """How many of a launch table's values a launch has among its options and constexprs; -1 where one is another there.
    Values that it has not are the launch function's own."""
    given = vars(launch.options) | launch.constexprs()
    known = [name for name in values if name in given and name != "from"]
    return len(known) if all(given[name] == values[name] for name in known) else -1


def entry_of(launch, read):
    """Of the entries read so far, (path, values), the path of the one in use: the last that agrees in most."""
    agreed = [(agreement(values, launch), i) for i, (_, values) in enumerate(read)]
    most, i = max(agreed, default=(-1, 0))
    return read[i][0] if most > 0 else None


# ---- compile --------------------------------------------------------------------------------------------------------


def compile_launch(launch):
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", CHIPS[launch.chip], 32)
    return read_facts(triton.compile(source, target=target, options=launch.options.__dict__))


_work: list = []  # of the worker processes, which inherit it


def _compile_one(index):
    try:
        return compile_launch(_work[index])
    except Exception as error:  # a compiler's complaint is a finding about one kernel, not the gate's end
        return f"{type(error).__name__}: {error}".strip()


def compile_all(launches, workers=2):
    """Facts of each launch, or what the compiler said; identical launches are compiled once."""
    unique = {launch.key(): launch for launch in launches}
    _work[:] = unique.values()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        compiled = track(
            pool.imap(_compile_one, range(len(_work))), "compiling", len(_work), disable=not sys.stderr.isatty()
        )
        facts = dict(zip(unique, compiled, strict=True))
    return [facts[launch.key()] for launch in launches]


# ---- rules ----------------------------------------------------------------------------------------------------------


def judge(launch, facts):
    """The violations of one compilation. facts: a string is what the compiler said instead."""

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
        found.append(
            violation("shared", f"{facts.tensor_columns} columns of tensor memory", f"at most {TENSOR_COLUMNS}")
        )
    half = any(torch.is_tensor(t) and t.dtype in (torch.bfloat16, torch.float16) for t in launch.arguments.values())
    if facts.dots and half and set(facts.matrix_in_loops) != {best}:
        got = ", ".join(f"{n} {name}" for name, n in facts.matrix_in_loops.items())
        found.append(violation("matrix", f"{got or 'none'} in loops", f"{best} alone"))
    largest = max((stream.elements for stream in facts.streams), default=0)
    narrow = [
        f"{stream.bits} bits in {stream}"
        for stream in facts.streams
        if 8 * stream.elements > largest and stream.bits < (64 if stream.element_bytes == 1 else 128)
    ]
    if narrow:
        found.append(violation("wide", "; ".join(narrow), "128 bits"))
    return found


def unused(launched, tables, chips):
    """launched: (op, kernel, chip, size) of entries that were launched. tables: op -> launch table."""
    return [
        Violation(
            op,
            kernel,
            f"size {size}",
            chip,
            "unused",
            "no launch",
            "a case in kernels/compiled/launch_cases.py, or no such entry",
        )
        for op, table in tables.items()
        for kernel, by_chip in table.items()
        for chip in chips
        for size in by_chip.get(chip, ())
        if (op, kernel, chip, size) not in launched
    ]


def unplayed(cases, operators):
    with patched(common, chip_override="sm_90"):
        played = {getattr(case.build(Make())[0], "_qualname", None) for case in cases}
    return [
        Violation(name, "", "", "", "unplayed", "no launch", "a case in kernels/compiled/launch_cases.py")
        for name in sorted(operators - played)
    ]


def operators():
    """The names of all operators in torch.ops.cria."""
    for path in (Path(__file__).parent / "ops").glob("*.py"):
        if "\n@operator(" in path.read_text():
            import_module(f"kernels.ops.{path.stem}")
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cria::")}


# ---- the gate, and its records --------------------------------------------------------------------------------------


def gate(cases, chips=tuple(CHIPS), table=common.launch_table, workers=2):
    """(records, violations, entries that were launched) of the cases' launches."""
    launches = [launch for chip in chips for case in cases for launch in replay(case, chip, table)]
    compiled = list(zip(launches, compile_all(launches, workers), strict=True))
    violations = [violation for launch, facts in compiled for violation in judge(launch, facts)]
    records = [record(launch, facts, table) for launch, facts in compiled if not isinstance(facts, str)]
    return records, violations, {launch.entry for launch in launches}


def record(launch, facts, table):
    op, kernel, chip, size = launch.entry or (launch.case.op, None, None, None)
    return {
        "op": op,
        "kernel": launch.name,
        "case": launch.case.label,
        "chip": launch.chip,
        "triton": triton.__version__,
        "tile": {name: value for name, value in launch.constexprs().items() if name.isupper() and type(value) is int},
        "num_warps": launch.options.num_warps,
        "num_stages": launch.options.num_stages,
        "from": table(op)[kernel][chip][size]["from"] if kernel else "fixed",
        "registers": facts.registers,
        "stack_bytes": facts.stack_bytes,
        "spills": facts.spills,
        "shared_bytes": facts.shared_bytes,
        "tensor_columns": facts.tensor_columns,
        "programs_per_sm": programs_per_sm(facts, launch.chip),
        "matrix": facts.matrix,
        "wide": facts.wide,
        "narrow": facts.narrow,
        "bytes_per_element": bytes_per_element(launch, facts),
    }


def bytes_per_element(launch, facts):
    """Bytes that must move, for each element of the largest tensor: a tensor loaded and stored counts twice."""
    given = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    moved = [launch.arguments[given[i]] for i in (*facts.loaded, *facts.stored)]
    largest = max((t.numel() for t in moved), default=1)
    return round(sum(t.numel() * t.element_size() for t in moved) / largest, 2)


def order(record):
    return tuple(record[name] for name in ("op", "kernel", "case", "chip", "triton")), json.dumps(record["tile"])


def ptxas_versions():
    paths = {"ptxas": knobs.nvidia.ptxas.path, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell.path}
    said = {name: subprocess.run([p, "--version"], capture_output=True, text=True).stdout for name, p in paths.items()}
    return {name: re.search(r"V([\d.]+)", text)[1] for name, text in said.items()}


def load(path):
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "records": []}


def save(path, records):
    """Writes this Triton's records beside those of others, one a line, in an order that does not change."""
    data, version = load(path), triton.__version__
    versions = data["versions"] | {version: ptxas_versions()}
    records = sorted([r for r in data["records"] if r["triton"] != version] + records, key=order)
    lines = ",\n".join(json.dumps(r) for r in records)
    path.write_text(f'{{"versions": {json.dumps(versions, sort_keys=True)},\n"records": [\n{lines}\n]}}\n')


def stale(path, records):
    """How the file differs from these records of this Triton: lines to read, none where it does not."""
    old = {json.dumps(r) for r in load(path)["records"] if r["triton"] == triton.__version__}
    new = {json.dumps(r) for r in records}
    return [f"- {line}" for line in sorted(old - new)] + [f"+ {line}" for line in sorted(new - old)]


def line(r):
    tile = " ".join(f"{name}={value}" for name, value in r["tile"].items())
    return (
        f"{r['chip']:6} {r['op']}.{r['kernel']} ({r['case']}) {tile} warps {r['num_warps']} stages {r['num_stages']}: "
        f"{r['registers']} registers, {r['spills']} spills, {r['shared_bytes'] / 1024:.1f} KB shared, "
        f"{r['programs_per_sm']} programs an SM, {'+'.join(r['matrix']) or 'no matrix'}, "
        f"{r['wide']} of {r['wide'] + r['narrow']} accesses wide, {r['bytes_per_element']} bytes an element"
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.static", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", default=[], help="only these; nothing is then found unused or unplayed")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail when this Triton's records there differ")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    args = parser.parse_args()
    if knobs.runtime.interpret:
        sys.exit("kernels.static: TRITON_INTERPRET is set, and the interpreter breaks triton.compile; unset it")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    cases = all_cases(args.op)
    if not cases:
        sys.exit(f"kernels.static: no cases for {', '.join(args.op)}; see kernels/compiled/launch_cases.py")
    records, violations, launched = gate(cases, args.chip, workers=args.workers)
    if not args.op:
        tables = {path.stem: common.launch_table(path.stem) for path in sorted(common.LAUNCH.glob("*.json"))}
        violations += unused(launched, tables, args.chip) + unplayed(cases, operators())
    print(*map(line, records), sep="\n")
    print(*(f"VIOLATION {violation}" for violation in violations), sep="\n", file=sys.stderr)
    print(f"{len(records)} launches, {len(violations)} violations, Triton {triton.__version__}")
    if args.json:
        save(args.json, records)
    differences = []
    if args.check and triton.__version__ in load(args.check)["versions"]:
        differences = stale(args.check, records)
    elif args.check:
        print(f"{args.check} holds no records of Triton {triton.__version__}: not compared")
    if differences:
        print(*differences[:20], sep="\n", file=sys.stderr)
        print(f"{args.check} is stale; run python -m kernels.static --json {args.check}", file=sys.stderr)
    sys.exit(bool(violations or differences))


if __name__ == "__main__":
    main()

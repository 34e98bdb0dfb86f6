"""The static gate's records: the facts of each shipped launch, one line per launch and version of Triton."""

import json
import re
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

import triton
from triton import knobs

from kernels.compiled.known import digest_launch
from kernels.compiled.launches import Launch
from kernels.compiled.machine_code import Facts, programs_per_sm


def describe_launch(launch: Launch, table: Callable[[str], dict]) -> dict:
    """Return the part of a record that is known before compiling.

    table: returns an op's launch table, which says where a configuration is from.
    """
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
    }


def make_record(launch: Launch, facts: Facts, table: Callable[[str], dict]) -> dict:
    """Return one launch's record. table: see describe_launch."""
    return describe_launch(launch, table) | {
        "instructions": facts.instructions,
        "alu": facts.alu,
        "registers": facts.registers,
        "stack_bytes": facts.stack_bytes,
        "spills": facts.spills,
        "shared_bytes": facts.shared_bytes,
        "tensor_columns": facts.tensor_columns,
        "programs_per_sm": programs_per_sm(facts, launch.chip),
        "matrix": facts.matrix,
        "wide": facts.wide,
        "narrow": facts.narrow,
        "bytes_per_element": _bytes_per_element(launch, facts),
        "inputs": digest_launch(launch),
    }


def _bytes_per_element(launch, facts):
    """Return the bytes that must move for each element of the largest tensor, loads and stores counted apart."""
    given = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    moved = [launch.arguments[given[i]] for i in (*facts.loaded, *facts.stored)]
    largest = max((t.numel() for t in moved), default=1)
    return round(sum(t.numel() * t.element_size() for t in moved) / largest, 2)


def format_record(record: dict) -> str:
    """Return a record as one line for the terminal."""
    tile = " ".join(f"{name}={value}" for name, value in record["tile"].items())
    accesses = record["wide"] + record["narrow"]
    return (
        f"{record['chip']:6} {record['op']}.{record['kernel']} ({record['case']}) {tile} "
        f"warps {record['num_warps']} stages {record['num_stages']}: "
        f"{record['instructions']} instructions, {record['registers']} registers, {record['spills']} spills, "
        f"{record['shared_bytes'] / 1024:.1f} KB shared, {record['programs_per_sm']} programs an SM, "
        f"{'+'.join(record['matrix']) or 'no matrix'}, {record['wide']} of {accesses} accesses wide, "
        f"{record['bytes_per_element']} bytes an element"
    )


# ---- the file -------------------------------------------------------------------------------------------------------


def load_records(path: Path) -> dict:
    """Return {"versions": Triton's version -> versions of ptxas, "records": [...]}; empty if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "records": []}


def save_records(path: Path, records: list[dict], ops: Collection[str], chips: Collection[str]) -> None:
    """Write this Triton's records of the given ops (all if there are none) and chips, and keep all others.

    The file has one record a line, in a fixed order.
    """
    data = load_records(path)
    versions = data["versions"] | {triton.__version__: ptxas_versions()}
    records = sorted([r for r in data["records"] if not _is_among(r, ops, chips)] + records, key=_order)
    lines = ",\n".join(json.dumps(r) for r in records)
    path.write_text(f'{{"versions": {json.dumps(versions, sort_keys=True)},\n"records": [\n{lines}\n]}}\n')


def _is_among(record, ops, chips):
    """Return whether a record is of this Triton, of one of the ops (of any if there are none) and of the chips."""
    return record["triton"] == triton.__version__ and (not ops or record["op"] in ops) and record["chip"] in chips


def _without_inputs(record):
    return json.dumps({name: value for name, value in record.items() if name != "inputs"})


def _order(record):
    return tuple(record[name] for name in ("op", "kernel", "case", "chip", "triton")), json.dumps(record["tile"])


def ptxas_versions() -> dict[str, str]:
    """Return the versions of the assemblers that Triton's wheel carries."""
    paths = {"ptxas": knobs.nvidia.ptxas.path, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell.path}
    said = {name: subprocess.run([p, "--version"], capture_output=True, text=True).stdout for name, p in paths.items()}
    return {name: re.search(r"V([\d.]+)", text)[1] for name, text in said.items()}  # type: ignore[index]  # it prints one


def find_differences(path: Path, records: list[dict], ops: Collection[str], chips: Collection[str]) -> list[str]:
    """Return how the file's records of this Triton differ from these, as lines that begin with - or +.

    Of the file's records only those of the given ops (all if there are none) and chips are compared. Digests of inputs
    may differ: other inputs can give equal machine code.
    """
    old = {_without_inputs(r) for r in load_records(path)["records"] if _is_among(r, ops, chips)}
    new = {_without_inputs(r) for r in records}
    return [f"- {line}" for line in sorted(old - new)] + [f"+ {line}" for line in sorted(new - old)]

"""Writes docs/kernels.md from static.json, cuda.json and simulated.json of benchmarks/, and the ops' docstrings.

python -m scripts.pages.kernels            writes the page
python -m scripts.pages.kernels --check    exits with 1 if the page differs
"""

import ast
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kernels.base.commands import run_command
from kernels.measure.simulated_records import add_counters, share_of_banks, share_of_sectors

ROOT = Path(__file__).parents[2]
RECORDS, SIMULATED = ROOT / "benchmarks" / "static.json", ROOT / "benchmarks" / "simulated.json"
CUDA = ROOT / "benchmarks" / "cuda.json"
DOC = ROOT / "docs" / "kernels.md"
CHIPS = ("sm_80", "sm_90", "sm_100")
OPS_OF_FILE = {  # kernels/ops/<file>.py -> ops of benchmarks/simulated.json; where it is not named, the file's own name
    "adamw": ("adamw", "adamw_cuda"),
    "attention": (
        *("attention", "rope_attention", "rope_attention_rows"),
        *("attention_cuda", "rope_attention_cuda", "rope_attention_rows_cuda"),
    ),
    "grad_norm": ("grad_norm", "grad_norm_cuda"),
    "rms_norm": ("rms_norm", "norm_linear", "norm_linear_rows"),
    "swiglu": ("swiglu", "swiglu_linear"),
}

HEAD = """# The kernels and their machine code on each chip

Made by `python -m scripts.pages.kernels`; do not edit. Each op has two tables. For the first, the static gate
(`python -m kernels.static`) compiles every configuration that ships for {chips}, without a GPU, and reads the machine
code. For the second, `python -m kernels.simulate` executes the compiled kernels on CPU tensors, forward and backward,
and checks every access. This page holds no times: `python -m kernels.bench` measures them.

How to read the first tables: three numbers in a cell are for {chips}; one number holds for all three.

- **tile**: the sizes that one program (thread block) works on. **warps**: per program. **stages**: of pipelined loads.
- **instructions**: of the whole kernel, and in brackets those for integers, logic, comparisons and selections, of which
  an SM takes one for two that it can issue.
- **registers**: per thread, at most 255, for each version of Triton. **spills**: instructions that move registers to
  memory and back; the gate refuses any.
- **shared**: KB of shared memory per program. The chips allow {shared}.
- **programs**: how many an SM holds at once, which registers, warps, shared and tensor memory decide.
- **matrix**: the instruction that multiplies matrices: HMMA on Ampere, HGMMA on Hopper, UTCHMMA on Blackwell.
- **wide**: the share of instructions that move 128 bits or more, among those that access global memory. The others move
  row statistics and indices; the gate refuses any other narrow access.
- **bytes**: how many must move for each element of the largest tensor of the launch.
- **from**: how the configuration was chosen: *static*, by the figures here; *simulated*, by the counters below, which
  disagreed (no GPU has measured it); or *measured* on a GPU (`kernels.tune`).

How to read the second tables: two numbers in a cell are for sm_80, sm_90; one number holds for both.

- **error, ours / torch**: the largest error of an output or gradient against fp64, of our kernels and of torch's own
  path in the same dtype; of all results, the one that is worst beside torch's. Ours may be at most twice torch's.
- **findings**: accesses out of bounds, races, reads of memory that was not written, missing waits and fences, over all
  chips and versions of Triton.
- **instructions**: that all warps execute, in thousands. **sectors**: the bytes asked for, as a share of the 32-byte
  sectors of global memory they touch. **banks**: cycles of shared memory without bank conflicts, as a share of all.

"""


def read_docstring(op: str) -> tuple[str, str | None, str]:
    """Return from an op's docstring its first line, its formula, and the paragraph that says what bounds it."""
    doc = ast.get_docstring(ast.parse((ROOT / "kernels" / "ops" / f"{op}.py").read_text()))
    first, *rest = doc.split("\n\n")
    formula = next((p for p in rest if p.startswith("    ")), None)
    bound = "\n\n".join(p for p in rest if p.lstrip().startswith("Bound by"))
    if bound.endswith(":"):  # what it announces is the next paragraph, a block
        bound += f"\n\n```text\n{rest[rest.index(bound) + 1]}\n```"
    return first, formula, bound


def format_per_chip(values: Iterable[object]) -> str:
    """Return the chips' values joined by slashes, or one value if all are equal."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def format_row(group: dict[str, dict[str, dict]], versions: Sequence[str]) -> str:
    """Return a line of a table. group: version of Triton -> chip -> record."""
    shown = group[versions[0]]

    def cell(value, version=versions[0]):
        return format_per_chip([value(group[version][chip]) if chip in group[version] else "-" for chip in CHIPS])

    first = shown[min(shown)]
    spills = max(r["spills"] for by_chip in group.values() for r in by_chip.values())
    cells = [
        f"`{first['kernel'].strip('_').removesuffix('_kernel')}`",
        first["case"],
        cell(lambda r: " ".join(f"{k}={v}" for k, v in r["tile"].items())),
        cell(lambda r: r["num_warps"]),
        cell(lambda r: r["num_stages"]),
        cell(lambda r: f"{r['instructions']} ({r['alu']})"),
        *(cell(lambda r: r["registers"], version) if version in group else "-" for version in versions),
        spills,
        cell(lambda r: f"{r['shared_bytes'] / 1024:.0f}"),
        cell(lambda r: r["programs_per_sm"]),
        cell(lambda r: "+".join(r["matrix"]) or "-"),
        cell(lambda r: f"{100 * r['wide'] / max(1, r['wide'] + r['narrow']):.0f}%"),
        cell(lambda r: f"{r['bytes_per_element']:.1f}"),
        cell(lambda r: r["from"].split(",")[0]),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def format_simulated_row(name: str, records: Sequence[dict], newest: str) -> str:
    """Return a line of the second table: one case in one dtype. records: of all chips and versions of Triton."""
    worst = max(records, key=lambda r: r["ratio"])
    shown = {r["chip"]: add_counters(r["kernels"]) for r in records if r["triton"] == newest}
    totals = [shown[chip] for chip in sorted(shown)]
    cells = [
        name if len(shown) > 1 else f"{name}, {min(shown)} alone",
        worst["dtype"],
        f"{worst['error']:.2g} / {worst['torch_error']:.2g}",
        sum(r["n_findings"] for r in records),
        format_per_chip(f"{total['instructions'] / 1e3:.0f}" for total in totals),
        format_per_chip(map(share_of_sectors, totals)),
        format_per_chip(map(share_of_banks, totals)),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def render_simulated(file: str, simulated: dict) -> list[str]:
    """Return the lines of the second table of kernels/ops/<file>.py."""
    newest = max(simulated["versions"], key=order_of_version)
    groups: dict[tuple[str, ...], list[dict]] = {}
    for op in OPS_OF_FILE.get(file, (file,)):
        for r in simulated["records"]:
            if r["op"] == op:
                groups.setdefault((op, r["case"], r["dtype"]), []).append(r)
    names = ["executed", "dtype", "error, ours / torch", "findings", "instructions", "sectors", "banks"]
    rows = [
        format_simulated_row(case if op == file else f"{op} {case}", records, newest)
        for (op, case, _), records in groups.items()
    ]
    return ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|", *rows]


def order_of_version(version: str) -> list[int]:
    """Return a version's numbers, by which versions are ordered."""
    return [int(n) for n in version.split(".")]


def render(data: dict, simulated: dict) -> str:
    """Return the page for the gate's records and those of kernels.simulate."""
    versions = sorted(data["versions"], key=order_of_version)
    groups: dict[str, dict] = {}
    for r in data["records"]:
        key = (r["kernel"], r["case"], tuple(r["tile"]))
        groups.setdefault(r["op"], {}).setdefault(key, {}).setdefault(r["triton"], {})[r["chip"]] = r
    registers = [f"registers, Triton {v}" for v in versions]
    names = [
        "kernel",
        "case",
        "tile",
        "warps",
        "stages",
        "instructions",
        *registers,
        "spills",
        "shared",
        "programs",
        "matrix",
    ]
    names += ["wide", "bytes", "from"]
    lines = [HEAD.format(chips=", ".join(CHIPS), shared="163, 227 and 227"), "Compiled by "]
    lines[-1] += "; ".join(f"Triton {v} (ptxas {', '.join(data['versions'][v].values())})" for v in versions) + "."
    lines.append(f"Executed as compiled by Triton {', '.join(sorted(simulated['versions'], key=order_of_version))}.\n")
    for op, kernels in sorted(groups.items()):
        first, formula, bound = read_docstring(op)
        lines += [f"\n## {op}\n", f"{first}\n"]
        lines += [f"```text\n{formula}\n```\n"] if formula else []
        lines += [f"{bound}\n"] if bound else []
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [format_row(group, versions) for _, group in sorted(kernels.items())]
        lines += render_simulated(op, simulated)
    return "\n".join(lines) + "\n"


CUDA_HEAD = """
## csrc/cuda

CUDA C++, compiled by {compiler}. None of it is a default: no GPU has measured it. AdamW, the gradient norm and
attention's forward on sm_90 are executed beside Triton's above, as adamw_cuda, grad_norm_cuda and attention_cuda (with
Triton's backward).

{docstring}

```text
{formula}
```

{bound}
"""


def render_cuda(cuda: dict, simulated: dict) -> str:
    """Return the section of csrc/cuda. cuda: the records of benchmarks/cuda.json."""
    docstring, formula, bound = read_docstring("decode_attention")
    names = ["source", "kernel", "instructions", "registers", "spills", "blocks an SM", "matrix", "wide"]
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for r in cuda["records"]:
        groups.setdefault((r["source"], r["kernel"]), {})[r["chip"]] = r
    rows = []
    for (source, kernel), by_chip in groups.items():
        each = [by_chip[chip] for chip in CHIPS if chip in by_chip]
        kernel += f", on {' and '.join(by_chip)} alone" if len(each) < len(CHIPS) else ""
        cells = [
            format_per_chip(r[name] for r in each) for name in ("instructions", "registers", "spills", "blocks_per_sm")
        ]
        cells += [format_per_chip("+".join(r["matrix"]) or "-" for r in each)]
        cells += [format_per_chip(f"{r['wide']} of {r['wide'] + r['narrow']}" for r in each)]
        rows.append(f"| {source} | {kernel} | {' | '.join(cells)} |")
    head = CUDA_HEAD.format(compiler=cuda["compiler"], docstring=docstring, formula=formula, bound=bound)
    table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *rows]
    return "\n".join([head, *table, *render_simulated("decode_attention", simulated)]) + "\n"


def main() -> None:
    """Write the page; with --check, exit with 1 if the file differs from it."""
    simulated = json.loads(SIMULATED.read_text())
    new = render(json.loads(RECORDS.read_text()), simulated) + render_cuda(json.loads(CUDA.read_text()), simulated)
    if "--check" not in sys.argv:
        DOC.parent.mkdir(exist_ok=True)
        DOC.write_text(new)
    elif not DOC.exists() or DOC.read_text() != new:
        sys.exit("docs/kernels.md is not what benchmarks/*.json say; run python -m scripts.pages.kernels")


if __name__ == "__main__":
    run_command(main)

"""Writes docs/kernels.md from benchmarks/static.json and the ops' docstrings.

python -m scripts.pages.kernels            writes the page
python -m scripts.pages.kernels --check    exits with 1 if the page differs
"""

import ast
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS, DOC = ROOT / "benchmarks" / "static.json", ROOT / "docs" / "kernels.md"
CHIPS = ("sm_80", "sm_90", "sm_100")

HEAD = """# The kernels and their machine code on each chip

Made by `python -m scripts.pages.kernels`; do not edit. The static gate (`python -m kernels.static`) compiles every
configuration that ships for {chips}, without a GPU, and reads the machine code. This page holds no times:
`python -m kernels.bench` measures them.

How to read the tables: three numbers in a cell are for {chips}; one number holds for all three.

- **tile**: the sizes that one program (thread block) works on. **warps**: per program. **stages**: of pipelined loads.
- **registers**: per thread, at most 255, for each version of Triton. **spills**: instructions that move registers to
  memory and back; the gate refuses any.
- **shared**: KB of shared memory per program. The chips allow {shared}.
- **programs**: how many an SM holds at once, which registers, warps, shared and tensor memory decide.
- **matrix**: the instruction that multiplies matrices: HMMA on Ampere, HGMMA on Hopper, UTCHMMA on Blackwell.
- **wide**: the share of instructions that move 128 bits or more, among those that access global memory. The others move
  row statistics and indices; the gate refuses any other narrow access.
- **bytes**: how many must move for each element of the largest tensor of the launch.
- **from**: how the configuration was chosen: *static*, by the figures here, or *measured* on a GPU (`kernels.tune`).

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


def render(data: dict) -> str:
    """Return the page for the gate's records."""
    versions = sorted(data["versions"], key=lambda v: [int(n) for n in v.split(".")])
    groups: dict[str, dict] = {}
    for r in data["records"]:
        key = (r["kernel"], r["case"], tuple(r["tile"]))
        groups.setdefault(r["op"], {}).setdefault(key, {}).setdefault(r["triton"], {})[r["chip"]] = r
    registers = [f"registers, Triton {v}" for v in versions]
    names = ["kernel", "case", "tile", "warps", "stages", *registers, "spills", "shared", "programs", "matrix", "wide"]
    names += ["bytes", "from"]
    lines = [HEAD.format(chips=", ".join(CHIPS), shared="163, 227 and 227"), "Compiled by "]
    lines[-1] += "; ".join(f"Triton {v} (ptxas {', '.join(data['versions'][v].values())})" for v in versions) + ".\n"
    for op, kernels in sorted(groups.items()):
        first, formula, bound = read_docstring(op)
        lines += [f"\n## {op}\n", f"{first}\n"]
        lines += [f"```text\n{formula}\n```\n"] if formula else []
        lines += [f"{bound}\n"] if bound else []
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [format_row(group, versions) for _, group in sorted(kernels.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page; with --check, exit with 1 if the file differs from it."""
    new = render(json.loads(RECORDS.read_text()))
    if "--check" not in sys.argv:
        DOC.parent.mkdir(exist_ok=True)
        DOC.write_text(new)
    elif not DOC.exists() or DOC.read_text() != new:
        sys.exit("docs/kernels.md is not what benchmarks/static.json says; run python -m scripts.pages.kernels")


if __name__ == "__main__":
    main()

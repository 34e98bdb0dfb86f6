"""One case of kernels.simulate: compiled for a chip, executed twice on the PTX machine, and judged.

Once asynchronous copies and matrix products take effect as late as allowed; once as early as possible, with the warps
in reverse order. Both runs must give equal bits and no finding, and no error against fp64 may exceed twice that of
torch's own path in the same dtype.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.compiled.cuda_simulation import cuda_on_machine
from kernels.compiled.launches import EntryPath, NotingTable, patched
from kernels.compiled.simulation import on_machine
from kernels.measure.cases import Inputs
from kernels.measure.peers import plain
from kernels.measure.simulated_cases import SimulatedCase
from kernels.measure.truth import Truth, as_tuple, copy_as_leaves, largest_error, run_once
from kernels.ops import common

COUNTERS = {  # of a record -> of the machine
    "blocks": ("blocks",),
    "instructions": ("instructions",),
    "float": ("instructions.float", "instructions.special"),
    "matrix": ("instructions.matrix",),
    "multiply_adds": ("multiply_adds",),
    "barriers": ("barriers",),
    "load_bytes": ("load_bytes",),
    "load_sectors": ("load_sectors",),
    "store_bytes": ("store_bytes",),
    "store_sectors": ("store_sectors",),
    "shared_cycles": ("shared_cycles",),
    "shared_ideal_cycles": ("shared_ideal_cycles",),
}
MAX_FINDINGS = 5  # of a case, in its record; their number is always there


def _run_on(chip: str, case: SimulatedCase, inputs: Inputs, upstream: tuple, late: bool) -> tuple[list, list]:
    """Return our outputs and gradients on the machine, and its result of each launch. late: see simulate."""
    ready = plain(lambda bench, i: bench.ours(i, "triton"))(case.case, copy_as_leaves(case.case, inputs), upstream)
    early = not late
    with (
        on_machine(chip, late=late, reverse=early) as launches,
        cuda_on_machine(chip, late=late, reverse=early) as of_csrc,
    ):
        return run_once(ready), [*launches, *of_csrc]


def _have_equal_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))  # NaN too


def _count_launches(launches: Sequence[Any]) -> list[dict]:
    """Return the counters of each kernel, summed over its launches."""
    totals: dict[str, Counter] = {}
    for launch in launches:
        total = totals.setdefault(launch.kernel, Counter())
        total["launches"] += 1
        for name, sources in COUNTERS.items():
            total[name] += sum(launch.counters[source] for source in sources)
    return [{"kernel": kernel, **total} for kernel, total in totals.items()]


def simulate(case: SimulatedCase, chip: str) -> tuple[dict, set[EntryPath]]:
    """Return the record of one case on one chip, and the entries of the launch tables that it used."""
    torch.manual_seed(0)
    used: set[EntryPath] = set()
    table = common.launch_table
    inputs = case.case.inputs("cpu", case.dtype)
    outputs = [t.detach() for t in as_tuple(case.case.reference(inputs))]
    upstream = tuple(torch.randn_like(t) if t.is_floating_point() else t for t in outputs)
    truth = Truth(case.case, inputs, upstream, case.dtype, torch.float64)

    def noting_table(op):
        return NotingTable(table(op), lambda path, _: used.add(path), (op,))

    with patched(common, launch_table=noting_table):
        ours, late = _run_on(chip, case, inputs, upstream, late=True)
        again, early = _run_on(chip, case, inputs, upstream, late=False)
    ratio, wrong = truth.check(ours)
    wrong += [
        f"{name} differs between late and early"
        for name, a, b in zip(truth.names, ours, again, strict=True)
        if not _have_equal_bits(a, b)
    ]
    findings = list(dict.fromkeys(f"{r.kernel}: {f}" for r in (*late, *early) for f in r.findings))
    worst, error, theirs = _find_worst(truth, ours)
    record = {
        "op": case.case.op,
        "case": case.case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "chip": chip,
        "triton": triton.__version__,
        "worst": worst,
        "error": error,
        "torch_error": theirs,
        "ratio": round(ratio, 3),
        "wrong": wrong,
        "n_findings": len(findings),
        "findings": findings[:MAX_FINDINGS],
        "kernels": _count_launches(late),
    }
    return record, used


def _find_worst(truth: Truth, ours: Sequence[torch.Tensor | None]) -> tuple[str, float, float]:
    """Return the name, our error and torch's of the result whose error is largest beside torch's."""
    worst, highest = ("none", 0.0, 0.0), -1.0
    for name, a, b, theirs, floor in zip(truth.names, ours, truth.found, truth.errors, truth.floors, strict=True):
        if a is None:
            continue
        error = largest_error(a, b)
        if (ratio := error / max(theirs, floor, 1e-30)) > highest:
            worst, highest = (name, float(f"{error:.3g}"), float(f"{theirs:.3g}")), ratio
    return worst


def add_counters(kernels: Sequence[dict]) -> Counter:
    """Return the sums of all counters of these kernels."""
    total: Counter = Counter()
    for kernel in kernels:
        total.update({name: value for name, value in kernel.items() if name != "kernel"})
    return total


def share_of_sectors(total: dict) -> str:
    """Return the bytes that were asked for, as a share of the 32-byte sectors of global memory that they touch."""
    return share(total["load_bytes"] + total["store_bytes"], 32 * (total["load_sectors"] + total["store_sectors"]))


def share_of_banks(total: dict) -> str:
    """Return the cycles that accesses of shared memory need without bank conflicts, as a share of those they take."""
    return share(total["shared_ideal_cycles"], total["shared_cycles"])


def share(part: float, whole: float) -> str:
    """Return part / whole as a percentage, or "-" if whole is 0."""
    return f"{part / whole:.0%}" if whole else "-"


def format_record(record: dict) -> str:
    """Return a record as one line for the terminal, and a line for each thing that is wrong."""
    total = add_counters(record["kernels"])
    verdict = "FAILS" if record["wrong"] or record["n_findings"] else "ok"
    line = (
        f"{record['chip']} {record['op']:20} {record['case']:44} {record['dtype']:8} {verdict:5} "
        f"{record['worst']:>10} {record['error']:9.3g} / {record['torch_error']:9.3g}  "
        f"{record['n_findings']} findings  {total['instructions'] / 1e6:7.2f} M instructions  "
        f"sectors {share_of_sectors(total)}  banks {share_of_banks(total)}"
    )
    return "\n    ".join([line, *record["wrong"], *record["findings"]])


def format_summary(records: Sequence[dict]) -> str:
    """Return a table of the ops: cases, findings, and the result whose error is largest beside torch's."""
    lines = [f"{'op':21}{'cases':>6}{'wrong':>6}{'findings':>9}  largest error beside torch's"]
    for op in dict.fromkeys(r["op"] for r in records):
        of_op = [r for r in records if r["op"] == op]
        top = max(of_op, key=lambda r: r["ratio"])
        n_wrong, n_findings = sum(bool(r["wrong"]) for r in of_op), sum(r["n_findings"] for r in of_op)
        where = f"{top['worst']} of {top['case']} {top['dtype']} {top['chip']}"
        lines.append(
            f"{op:21}{len(of_op):6}{n_wrong:6}{n_findings:9}  {top['error']:.3g} / {top['torch_error']:.3g}, {where}"
        )
    return "\n".join(lines)


# ---- the file -------------------------------------------------------------------------------------------------------


def load_records(path: Path) -> dict:
    """Return {"versions": Triton's version -> {"seconds", "sources"}, "records": [...]}; empty if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "records": []}


def _key(record: dict) -> tuple[str, ...]:
    return tuple(record[name] for name in ("op", "case", "dtype", "chip", "triton"))


def save_records(path: Path, records: Sequence[dict], whole_run: dict[str, Any] | None) -> None:
    """Write these records over those of equal cases, and keep all others. One record a line, in a fixed order.

    whole_run: {"seconds", "sources"} of a run of all cases (sources: see kernels.measure.simulated_known), None for a
    run of some.
    """
    data = load_records(path)
    kept = {_key(r): r for r in data["records"]} | {_key(r): r for r in records}
    old = data["versions"].get(triton.__version__, {})
    versions = data["versions"] | {triton.__version__: old if whole_run is None else whole_run}
    lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
    path.write_text(f'{{"versions": {json.dumps(versions, sort_keys=True)},\n"records": [\n{lines}\n]}}\n')


def find_differences(path: Path, records: Sequence[dict]) -> list[str]:
    """Return how the counters of these records differ from the file's of this Triton; none if it has none of it.

    Errors are not compared: torch's own depend on the CPU.
    """
    data = load_records(path)
    if triton.__version__ not in data["versions"]:
        return []
    old = {_key(r): r["kernels"] for r in data["records"]}
    return [
        f"{' '.join(_key(r))}: {path} has {json.dumps(old.get(_key(r)))}, now {json.dumps(r['kernels'])}"
        for r in records
        if old.get(_key(r)) != r["kernels"]
    ]

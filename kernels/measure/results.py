"""The results of kernels.bench: rates of a record, and the lines that are printed."""

from typing import Any

from kernels.measure.cases import BenchCase

Record = dict[str, Any]  # one contender and pass of one case, as it is written to JSON
Result = dict[str, Any]  # one run of kernels.bench: machine, ceilings, records, absent, left_out


def compute_rates(
    case: BenchCase, kind: str, ms: float, ceilings: dict[str, float], element_bytes: int
) -> dict[str, Any]:
    """Return the rates of one pass, its work, and its fraction of the roofline.

    kind: "fwd", "bwd" or "fwd+bwd". ceilings: what measure_peak_rates returns.
    """
    works = [case.work[part] for part in kind.split("+")]
    moved = [w.elements * element_bytes + w.bytes for w in works]
    flops = sum(w.flops for w in works)
    bounds = [
        (w.flops / ceilings["gemm_tflops"] / 1e9, b / ceilings["copy_gb_per_s"] / 1e6)
        for w, b in zip(works, moved, strict=True)
    ]
    return {
        "gb_per_s": sum(moved) / ms / 1e6, "tflops": flops / ms / 1e9, "bytes": sum(moved), "flops": flops,
        "fraction": sum(max(b) for b in bounds) / ms,
        "bound": "gemm" if sum(b[0] for b in bounds) >= sum(b[1] for b in bounds) else "copy",
    }  # fmt: skip


def add_ratios(records: list[Record]) -> None:
    """Add to each record of one case its time over ours, and over that of the bare GEMMs."""
    ms = {(r["who"], r["pass"]): r["ms"] for r in records if "ms" in r}
    for r in records:
        if "ms" in r and ("ours", r["pass"]) in ms:
            r["times_ours"] = r["ms"] / ms["ours", r["pass"]]
        if "ms" in r and ("bare GEMM", r["pass"]) in ms:
            r["times_gemm"] = r["ms"] / ms["bare GEMM", r["pass"]]


def format_record(r: Record, is_toy: bool = False) -> str:
    """Return a record as one line. is_toy: of a toy's size, whose times say nothing and are left out."""
    head = f"{r['op']:<21}{r['shape']:<42}{r['who']:<25}"
    if "wrong" in r:
        return f"{head}WRONG RESULT: {r['wrong']}"
    if "failed" in r:
        return f"{head}failed: {r['failed']}"
    if is_toy:
        return f"{head}{r['pass']:<8}{'ran' if r.get('error_over_torch') is None else 'right'}"
    rate = f"{r['tflops']:8.1f} TFLOP/s" if r["bound"] == "gemm" else f"{r['gb_per_s']:8.1f} GB/s   "
    times = f"  {r['times_ours']:5.2f}x ours" if "times_ours" in r and r["who"] != "ours" else ""
    gemm = f"  {r['times_gemm']:5.2f}x bare GEMM" if "times_gemm" in r and r["who"] == "ours" else ""
    return f"{head}{r['pass']:<8}{r['ms']:10.4f} ms {rate} {r['fraction']:7.1%} of {r['bound']}{times}{gemm}"


def find_absent(result: Result) -> list[tuple[str, str, str, list[str]]]:
    """Return [(op, who, reason, shapes)] of the peers that took no part. No shapes: they took part nowhere."""
    took_part = {(r["op"], r["who"]) for r in result["records"]}
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for r in result["absent"]:
        shapes = grouped.setdefault((r["op"], r["who"], r["reason"]), [])
        if (r["op"], r["who"]) in took_part:
            shapes.append(r["shape"])
    return [(*key, shapes) for key, shapes in grouped.items()]


def format_summary(result: Result) -> str:
    """Return the last lines of a run: the ceilings, every record, the absent peers, and what was left out for time."""
    ceilings, device, is_toy = result["ceilings"], result["machine"]["device"], result["is_toy"]
    rates = f"copy {ceilings['copy_gb_per_s']:.1f} GB/s, GEMM {ceilings['gemm_tflops']:.2f} TFLOP/s"
    lines = ["", f"{device}: {'toy sizes, nothing is said of speed' if is_toy else rates}"]
    lines += [format_record(record, is_toy) for record in result["records"]]
    for op, who, reason, shapes in find_absent(result):
        where = f" at {'; '.join(shapes)}" if shapes else ""
        lines.append(f"{op}: without {who}{where}: {reason}")
    return "\n".join(lines + [f"left out for time: {name}" for name in result["left_out"]])

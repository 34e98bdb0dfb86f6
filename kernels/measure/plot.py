"""Pictures of what kernels.bench measured: fractions of the roofline, and the roofline itself. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.measure.results import Record, Result

# Okabe and Ito's palette, which colour-blind readers can tell apart. Ours is always the blue.
OURS, OTHERS = "#0072B2", ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442", "#000000")
PASSES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
MARKERS = "osD^vPXh<>"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind text that crosses a line
STYLE: Any = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10,
    "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip


def draw(result: Result, folder: str | Path) -> list[Path]:
    """Draw every op's fractions and the roofline of a result of kernels.bench into the folder. Return the paths.

    Raises ImportError without matplotlib, ValueError if nothing was timed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("kernels.bench --plot: matplotlib is not installed; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    timed = [r for r in result["records"] if "ms" in r]
    if not timed:
        raise ValueError("kernels.bench: nothing was timed, so there is nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    whole, paths = _widest_passes(timed), []
    with plt.rc_context(STYLE):
        for op in dict.fromkeys(r["op"] for r in timed):
            figure = _draw_bars(plt, op, [r for r in timed if r["op"] == op], _describe_device(result))
            paths.append(_save(plt, figure, folder / f"{op}.png"))
        ours = [r for r in timed if r["who"] == "ours" and r["pass"] == whole[r["op"], r["shape"]] and r["flops"]]
        if ours:
            figure = _draw_roofline(plt, ours, result["ceilings"], _describe_device(result))
            paths.append(_save(plt, figure, folder / "roofline.png"))
    return paths


def _describe_device(result: Result) -> str:
    facts = result["machine"]
    return f"{facts['device']}, torch {facts['torch']}, {facts['date']}"


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)
    return path


def _widest_passes(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """Return (op, shape) -> "fwd+bwd" if it was measured, else "fwd"."""
    passes: dict[tuple[str, str], set[str]] = {}
    for r in records:
        passes.setdefault((r["op"], r["shape"]), set()).add(r["pass"])
    return {key: "fwd+bwd" if "fwd+bwd" in found else "fwd" for key, found in passes.items()}


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = (name for name in names if name != "ours")
    return {"ours": OURS} | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def _draw_bars(plt: Any, op: str, records: Sequence[Record], device: str) -> Any:
    """Return a figure: a panel for each shape, a bar for each contender and pass, its fraction of the roofline."""
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    names = sorted(dict.fromkeys(r["who"] for r in records), key=lambda name: name != "ours")
    colour = _colours(names)
    columns = 1 if len(shapes) <= 4 else 3
    grid = [shapes[i : i + columns] for i in range(0, len(shapes), columns)]
    tallest = [max(sum(r["shape"] == shape for r in records) for shape in row) for row in grid]
    heights = [1.0 + 0.24 * n for n in tallest]
    figure, axes = plt.subplots(
        len(grid), columns, figsize=(8.5 if columns == 1 else 6.5 * columns, sum(heights) + 1.1),
        height_ratios=heights, sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[len(shapes) :]:
        ax.set_axis_off()
    widest = max(1.0, *(r["fraction"] for r in records))
    for ax, shape in zip(axes.flat, shapes, strict=False):
        place, ticks = 0.0, []
        for kind in PASSES:
            rows = sorted((r for r in records if r["shape"] == shape and r["pass"] == kind), key=lambda r: r["ms"])
            for r in rows:
                ax.barh(place, r["fraction"], height=0.8, color=colour[r["who"]])
                ax.text(r["fraction"] + 0.01 * widest, place, _label(r), va="center", fontsize=8, bbox=PAPER)
                place += 1
            if rows:
                ticks.append((place - len(rows) / 2 - 0.5, PASSES[kind]))
                place += 0.7
        ax.set_yticks(*zip(*ticks, strict=True) if len(ticks) > 1 else ([],))
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.set_xlim(0, (1.32 if columns == 1 else 1.45) * widest)
        ax.set_xticks([i / 5 for i in range(6)], [f"{20 * i}%" for i in range(6)])
        ax.axvline(1.0, color="0.3", linewidth=1, linestyle="--")
        ax.grid(axis="x", color="0.9")
        ax.set_title(shape, fontsize=10, loc="left")
    for ax in axes.flat[max(0, len(shapes) - columns) : len(shapes)]:
        ax.tick_params(axis="x", labelbottom=True)
        ax.set_xlabel(f"fraction of the {_name_bound(records)} measured in the same run")
    figure.suptitle(f"{op}\n{device}", fontsize=12, x=0.01, ha="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _name_bound(records: Sequence[Record]) -> str:
    kinds = {r["bound"] for r in records}
    return "roofline" if len(kinds) > 1 else {"copy": "copy rate", "gemm": "GEMM rate"}[kinds.pop()]


def _label(r: Record) -> str:
    rate = f"{r['tflops']:,.0f} TFLOP/s" if r["bound"] == "gemm" else f"{r['gb_per_s']:,.0f} GB/s"
    return f"{r['ms']:.3g} ms, {rate}"


def _draw_roofline(plt: Any, records: Sequence[Record], ceilings: dict[str, float], device: str) -> Any:
    """Return a figure of TFLOP/s against FLOPs a byte, for kernels with matrix products, under the two ceilings."""
    top, slope = ceilings["gemm_tflops"], ceilings["copy_gb_per_s"] / 1e3  # TFLOP/s; TFLOP/s for each FLOP a byte
    spots = [(r["flops"] / r["bytes"], r["tflops"], r) for r in records]
    ridge = top / slope
    left, right = min(ridge, *(x for x, *_ in spots)) / 3, max(ridge, *(x for x, *_ in spots)) * 3
    figure, ax = plt.subplots(figsize=(12.5, 5.6), layout="constrained")
    ax.loglog([left, ridge, right], [left * slope, top, top], color="0.3", linewidth=1.5)
    ax.annotate(
        f"copy {slope * 1e3:,.0f} GB/s",
        (left * 1.2, left * 1.2 * slope),
        xytext=(8, -12),
        textcoords="offset points",
        color="0.3",
    )
    ax.annotate(
        f"GEMM {top:,.0f} TFLOP/s", (right, top), xytext=(0, 5), textcoords="offset points", ha="right", color="0.3"
    )
    for i, op in enumerate(dict.fromkeys(r["op"] for r in records)):
        colour = OURS if i == 0 else OTHERS[(i - 1) % len(OTHERS)]
        own = [(x, y, r) for x, y, r in spots if r["op"] == op]
        for j, (x, y, r) in enumerate(own):
            marker = MARKERS[j % len(MARKERS)]
            label = f"{op}: {r['shape']} ({r['pass']})"
            ax.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white", label=label)
    ax.set_xlim(left, right)
    low = min(y for _, y, _ in spots)
    ax.set_ylim(min(low / 2, left * slope), top * 2)
    ax.set_xlabel("FLOPs a byte that must move")
    ax.set_ylabel("TFLOP/s")
    ax.grid(which="major", color="0.9")
    ax.set_title(f"Roofline of our kernels that multiply matrices\n{device}", loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure

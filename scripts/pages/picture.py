"""README's picture: a loss curve from benchmarks/kernel_parity.json beside the roofline of the ops of LLaMA-7B.

The roofline is arithmetic, not a measurement: FLOPs over bytes of each op as kernels.measure.cases counts them, under
the peaks of an H100's and an H200's data sheets (engine.planning.cards). A dot is the most that an H100 allows the op.

python -m scripts.pages.picture            writes docs/img/overview-light.svg and overview-dark.svg
python -m scripts.pages.picture --check    exits 1 when they show something else
"""

import json
import math
import sys
from pathlib import Path

from engine.planning.cards import CARDS
from kernels.base.commands import run_command
from kernels.measure import cases

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "img"
WIDTH, HEIGHT = 920, 380
TOP, BOTTOM = 92, 318  # of both plots
LEFT_PLOT, RIGHT_PLOT = (50, 430), (528, 900)
THEMES = {
    "light": {
        "text": "#1f2328", "soft": "#59636e", "grid": "#d1d9e0", "wide": "#9ec5f4", "line": "#0550ae", "dot": "#d1570c",
    },
    "dark": {
        "text": "#f0f6fc", "soft": "#9198a1", "grid": "#3d444d", "wide": "#1f4f8f", "line": "#a5d0ff", "dot": "#ff9d57",
    },
}  # fmt: skip
BYTES = 2  # of a bf16 number
POINTS = (  # op, beginning of its shape, pass, label, and where the label stands from its dot: x, y, anchor
    ("attention", "Alpaca mix H=32 Dh", "fwd", "attention, texts of 127 tokens", 12, 16, "start"),
    ("attention", "Alpaca mix, shared", "fwd", "their shared prompt once", 12, 5, "start"),
    ("attention", "dense s=4096 H=32 Dh=128", "fwd", "attention, 4,096", 24, -12, "end"),
    ("swiglu_linear", "T=8192", "fwd", "SwiGLU + down", 6, 54, "start"),
    ("norm_linear", "T=8192 D=4096 N=12288", "fwd", "norm + q, k, v", 6, 30, "start"),
    ("linear_cross_entropy", "7b L=8192", "fwd+bwd", "head + loss", 26, -12, "end"),
)
MEMORY_BOUND = "RMSNorm, RoPE, SwiGLU and AdamW multiply", "no matrices: memory alone bounds them"


def text(x, y, words, kind, size=13, anchor="start", weight=400):
    """Return an SVG text element."""
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" {style}>{words}</text>'


def line(x1, y1, x2, y2, kind, more=""):
    """Return an SVG line element."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" {more}/>'


def path(points, kind, more=""):
    """Return an SVG path through the points."""
    return f'<path d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}" fill="none" {more}/>'


def scale(low, high, first, last, log=False):
    """Return the function from a value between low and high to a place between first and last."""
    f = math.log10 if log else float
    return lambda value: first + (f(value) - f(low)) / (f(high) - f(low)) * (last - first)


def loss_curve(figures):
    """Return the elements of the left plot: the losses of a run with kernels over those of a run with references."""
    curves, steps = figures["loss"], figures["steps"]
    low, high = math.floor(min(curves["references"])), math.ceil(max(curves["references"]))
    x, y = scale(1, steps, *LEFT_PLOT), scale(low, high, BOTTOM, TOP)
    worst = figures["worst_relative_difference"]["loss"]
    parts = [
        text(LEFT_PLOT[0] - 30, 28, "Kernels and plain PyTorch: one loss curve", "text", 17, weight=600),
        text(LEFT_PLOT[0] - 30, 50, f"{steps} steps of a small LLaMA in fp32: losses agree to {worst:.1e}", "soft"),
        *(line(LEFT_PLOT[0], y(tick), LEFT_PLOT[1], y(tick), "grid") for tick in range(low, high + 1)),
        *(text(LEFT_PLOT[0] - 10, y(tick) + 4, tick, "soft", 12, "end") for tick in range(low, high + 1)),
        *(text(x(max(tick, 1)), BOTTOM + 20, tick, "soft", 12, "middle") for tick in range(0, steps + 1, 100)),
        text((LEFT_PLOT[0] + LEFT_PLOT[1]) / 2, BOTTOM + 42, "optimizer step", "soft", 12, "middle"),
    ]
    for name, kind in (("references", "wide"), ("kernels", "line")):
        parts.append(path([(x(i + 1), y(loss)) for i, loss in enumerate(curves[name])], kind))
    for i, (name, kind) in enumerate((("PyTorch references", "wide"), ("our kernels", "line"))):
        at = TOP + 16 + 24 * i
        parts += [line(262, at, 292, at, kind), text(302, at + 4, name, "text")]
    return parts


def work(op, shape, kind):
    """Return (FLOPs, bytes) of one of kernels.measure's cases: an op, the beginning of its shape, and a pass."""
    case = next(c for c in cases.full_cases() if c.op == op and c.shape.startswith(shape))
    done = [case.work[name] for name in kind.split("+")]
    return sum(w.flops for w in done), sum(BYTES * w.elements + w.bytes for w in done)


def roofline():
    """Return the elements of the right plot: the roofs of two cards, and the ops at their arithmetic intensity."""
    h100, h200 = CARDS["H100"], CARDS["H200"]
    x, y = scale(8, 12000, *RIGHT_PLOT, log=True), scale(20, 1600, BOTTOM, TOP, log=True)

    def roof(card, intensity):
        return min(card.peak_tflops, card.bandwidth_gb_per_s * intensity / 1e3)

    def outline(card):
        ridge = card.peak_tflops / card.bandwidth_gb_per_s * 1e3
        return [(x(i), y(roof(card, i))) for i in (8, ridge, 12000)]

    parts = [
        text(RIGHT_PLOT[0] - 44, 28, "What bounds each op of LLaMA-7B", "text", 17, weight=600),
        text(RIGHT_PLOT[0] - 44, 50, "projected from data sheets; no GPU has been measured yet", "soft"),
        *(line(RIGHT_PLOT[0], y(tick), RIGHT_PLOT[1], y(tick), "grid") for tick in (30, 100, 300, 1000)),
        *(text(RIGHT_PLOT[0] - 10, y(tick) + 4, f"{tick:,}", "soft", 12, "end") for tick in (30, 100, 300, 1000)),
        *(text(x(tick), BOTTOM + 20, f"{tick:,}", "soft", 12, "middle") for tick in (10, 100, 1000, 10000)),
        text(sum(RIGHT_PLOT) / 2, BOTTOM + 42, "FLOPs for each byte that must move", "soft", 12, "middle"),
        text(RIGHT_PLOT[0] - 44, TOP - 14, "TFLOP/s, bf16", "soft", 12),
        path(outline(h200), "roof", 'stroke-dasharray="5 4"'), path(outline(h100), "roof"),
        text(x(40) - 8, y(roof(h200, 40)) - 4, f"H200: {h200.bandwidth_gb_per_s / 1e3:g} TB/s", "soft", 12, "end"),
        text(x(24) + 10, y(roof(h100, 24)) + 6, f"H100: {h100.bandwidth_gb_per_s / 1e3:g} TB/s", "soft", 12),
        text(x(190), y(h100.peak_tflops) - 12, f"both: {h100.peak_tflops:g}", "soft", 12, "end"),
        *(text(RIGHT_PLOT[1], BOTTOM - 42 + 16 * i, words, "soft", 12, "end") for i, words in enumerate(MEMORY_BOUND)),
    ]  # fmt: skip
    for op, shape, kind, label, dx, dy, anchor in POINTS:
        flops, moved = work(op, shape, kind)
        at, height = x(flops / moved), y(roof(h100, flops / moved))
        if dy > 20:
            parts.append(line(at, height, at, height + dy - 4, "leader"))
        parts.append(text(at + dx, height + dy, label, "text", 12, anchor))
        parts.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="5.5" class="dot"/>')
    return parts


def picture(theme):
    """Return the whole SVG in the colours of a theme."""
    c = THEMES[theme]
    figures = json.loads((ROOT / "benchmarks" / "kernel_parity.json").read_text())
    style = (
        "text{font-family:-apple-system,'Segoe UI','Noto Sans',Helvetica,Arial,sans-serif}"
        f".text{{fill:{c['text']}}}.soft{{fill:{c['soft']}}}.grid{{stroke:{c['grid']}}}"
        f".wide{{stroke:{c['wide']};stroke-width:7;stroke-linejoin:round}}.line{{stroke:{c['line']};stroke-width:1.6}}"
        f".leader{{stroke:{c['soft']};stroke-width:0.8}}.roof{{stroke:{c['soft']};stroke-width:1.8}}.dot{{fill:{c['dot']}}}"
    )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<style>{style}</style>"]
    return "\n".join([*parts, *loss_curve(figures), *roofline(), "</svg>", ""])


def main():
    wrong = []
    for theme in THEMES:
        file = FOLDER / f"overview-{theme}.svg"
        if "--check" not in sys.argv:
            FOLDER.mkdir(parents=True, exist_ok=True)
            file.write_text(picture(theme))
        elif not file.exists() or file.read_text() != picture(theme):
            wrong.append(file.name)
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not drawn from today's figures; run python -m scripts.pages.picture")


if __name__ == "__main__":
    run_command(main)

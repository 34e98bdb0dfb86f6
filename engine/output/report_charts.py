"""Charts of report.html, as SVG."""

import json
import math
from html import escape

from engine.output.report_numbers import Point, format_count, format_figure, format_tick

POINTS = 1000  # of a curve at most; a longer one keeps the lowest and the highest of each stretch of steps


def render_chart(title: str, series: dict[str, list[Point]], zero: bool = False) -> str:
    """Return a <figure> that draws the curves {name: points}. zero: the axis of values begins at 0.

    Texts and marks sit at percentages, so that they keep their size when the page narrows; only the curves stretch.
    """
    values = sorted(value for points in series.values() for _, value in points if value is not None)
    if not values:
        return f'<figure><figcaption><h3>{title}</h3><span class="note">no data</span></figcaption></figure>'
    steps = sorted({step for points in series.values() for step, _ in points})
    low, high = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)
    log = values[0] > 0 and values[-1] > 20 * (values[len(values) // 2] if zero else values[0])
    ticks, bottom, top = choose_ticks(min(values[0], 0) if zero and not log else values[0], values[-1], log)
    scale = math.log if log else float

    def x(step: float) -> float:
        return (step - low) / (high - low)

    def y(value: float) -> float:
        return 1 - (scale(value) - scale(bottom)) / (scale(top) - scale(bottom))

    axes = [f'<line class="grid" x2="100%" y1="{y(v):.2%}" y2="{y(v):.2%}"/>' for v in ticks]
    axes += [f'<text x="-8" y="{y(v):.2%}" dy=".35em" text-anchor="end">{format_tick(v, top)}</text>' for v in ticks]
    width = max(1, round_up_nicely((high - low) / 5))
    for step in (width * i for i in range(math.ceil(low / width), math.floor(high / width) + 1)):
        axes.append(
            f'<text x="{x(step):.2%}" y="100%" dy="1.5em" text-anchor="middle">{format_tick(step, high)}</text>'
        )
    curves: list[str] = []
    dots: list[str] = []
    keys: list[str] = []
    for name, points in series.items():
        if points:
            kind = {"eval": "eval", "each step": "raw"}.get(name, "train")
            d, marks = draw_path(
                [(x(step), None if v is None else y(v)) for step, v in thin_points(points)], kind == "eval"
            )
            curves.append(f'<path class="{kind}" d="{d}"/>')
            dots += [f'<circle class="{kind}" cx="{a:.2%}" cy="{b:.2%}" r="3.5"/>' for a, b in marks]
            keys.append(f'<span class="label key {kind}">{name}</span>')
    known = [(name, dict(points)) for name, points in series.items()]
    shown = sorted({step for name, points in series.items() if name != "smoothed" for step, _ in thin_points(points)})
    rows = [
        [
            step,
            "  ".join(
                [
                    f"step {format_count(step)}",
                    *[f"{name} {format_figure(values[step])}" for name, values in known if step in values],
                ]
            ),
        ]
        for step in shown
    ]
    return f"""<figure data-range="[{low}, {high}]" data-rows="{escape(json.dumps(rows, ensure_ascii=False))}">
<figcaption><h3>{title}</h3>{"".join(keys) if "eval" in series else ""}
{'<span class="label">log scale</span>' if log else ""}<output></output></figcaption>
<div class="plot"><svg role="img" aria-label="{title} by step"><rect class="hit" width="100%" height="100%"/>
{"".join(axes)}<text x="100%" y="100%" dy="2.9em" text-anchor="end">step</text>
<line class="cursor" y2="100%" display="none"/>
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(curves)}</svg>{"".join(dots)}</svg></div></figure>"""


def choose_ticks(low: float, high: float, log: bool) -> tuple[list[float], float, float]:
    """Return ticks, bottom and top of an axis that shows low..high."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [digit * 10.0**decade for decade in decades[:: -(-len(decades) // 8)] for digit in digits]
        return [value for value in ticks if low / 1.2 <= value <= high * 1.2], low / 1.2, high * 1.2
    if high - low <= 1e-9 * abs(high):
        low, high = min(low, 0), max(high, 0) or 1
    width = round_up_nicely((high - low) / 4)
    first, last = math.floor(low / width), math.ceil(high / width)
    return [i * width for i in range(first, last + 1)], first * width, last * width


def round_up_nicely(width: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not under `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= width * 0.999)


def draw_path(points: list[tuple[float, float | None]], mark_all: bool) -> tuple[str, list[tuple[float, float]]]:
    """Return SVG path data in a 1000 by 1000 box, and the points to mark: all, or those between two gaps."""
    d, marks = [], []
    present = [None, *(value for _, value in points), None]
    for (x, y), before, after in zip(points, present[:-2], present[2:], strict=True):
        if y is not None:
            d.append(f"{'M' if before is None else 'L'}{1000 * x:.1f} {1000 * y:.1f}")
            if mark_all or before is after is None:
                marks.append((x, y))
    return "".join(d), marks


def thin_points(points: list[Point]) -> list[Point]:
    """Return at most POINTS points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= POINTS:
        return points
    kept: list[int] = []
    size = -(-2 * len(points) // POINTS)
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [(value, i) for i in stretch if (value := points[i][1]) is not None] or [(0.0, start)]
        kept += sorted({min(finite)[1], max(finite, key=lambda pair: pair[0])[1]})
    return [points[i] for i in kept]


def smooth_points(points: list[Point]) -> dict[str, list[Point]]:
    """Return {curve: points}: "train", or, of more than 20 points, "each step" and "smoothed".

    A smoothed point is the mean over a window centred on it, a 20th of the run, or less at the ends.
    """
    half, result, sums = len(points) // 40, {"each step": points}, [0.0]
    if len(points) <= 20:
        return {"train": points}
    counts = [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    line = []
    for i, (step, value) in enumerate(points):
        a, b = max(0, i - half), min(len(points), i + half + 1)
        line.append((step, (sums[b] - sums[a]) / (counts[b] - counts[a]) if value is not None else None))
    return result | {"smoothed": line}

"""Charts of judged pairs as hand-made SVG, at percentages like those of a dataset's page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from data_gen.judging.statistics import PRIOR, Interval, fit_lengths, scale_gaps
from data_gen.page.charts import choose_ticks, draw_figure, draw_grid
from data_gen.page.formatting import format_count, shorten_number

BINS, STEPS = 8, 60  # of the chart of lengths: points, and stretches of its curve


@dataclass(frozen=True)
class Lane:
    """A row of a chart: parts (class, percent) of a stacked bar, and an interval on an axis of 0 to 100."""

    name: str
    parts: Sequence[tuple[str, float]]
    value: float
    interval: Interval
    text: str  # beside the bar
    tip: str


def draw_lanes(
    title: str, lanes: Sequence[Lane], middle: float, note: str, keys: Sequence[tuple[str, str]] = ()
) -> str:
    """Return a figure of stacked bars and of intervals under them, with a line at the middle (percent)."""
    items = []
    for lane in lanes:
        marks, left = "", 0.0
        for kind, width in lane.parts:
            marks += f'<rect class="{kind}" x="{left:.2f}%" width="{width:.2f}%" y="0" height="55%"/>'
            left += width
        low, high = (min(100.0, max(0.0, end)) for end in lane.interval)
        marks += f'<line class="limit" x1="{middle:.2f}%" x2="{middle:.2f}%" y1="-10%" y2="110%"/>'
        marks += f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="82%" y2="82%"/>'
        marks += f'<circle class="estimate" cx="{lane.value:.2f}%" cy="82%" r="3.5"/>'
        tip = escape(lane.tip)
        svg = f'<svg role="img" aria-label="{tip}"><g class="tip"><title>{tip}</title>{marks}</g></svg>'
        name = f'<span class="name">{escape(lane.name)}</span>'
        items.append(f'<li><span class="row">{name}{svg}<span class="n">{escape(lane.text)}</span></span></li>')
    return draw_figure(title, f'<ul class="bars lanes">{"".join(items)}</ul>', note, keys, is_long=True)


def draw_lengths(title: str, gaps: Sequence[float], scores: Sequence[float], note: str) -> str:
    """Return a figure of the win rate by difference of length: means of equal groups, and the fitted curve.

    gaps are characters that the other answer is longer, scores 1 for its win and 0.5 for a draw. "" where all gaps are
    equal.
    """
    if not gaps or min(gaps) == max(gaps):
        return ""
    x, y = np.asarray(gaps, dtype=float), np.asarray(scores, dtype=float)
    groups = np.array_split(np.argsort(x, kind="stable"), min(BINS, len(x)))
    means = [float(x[group].mean()) for group in groups]
    edge = 0.05 * (max(*means, 0.0) - min(*means, 0.0)) or 1.0
    low, high = min(*means, 0.0) - edge, max(*means, 0.0) + edge
    a, b = fit_lengths(scale_gaps(gaps), y, np.ones((1, len(x))))[0]
    along = np.linspace(low, high, STEPS + 1)
    curve = 100 / (1 + np.exp(-(a + b * np.tanh(along / x.std()))))
    line = "L".join(f"{1000 * i / STEPS:.1f} {1000 - 10 * value:.1f}" for i, value in enumerate(curve))
    path = f'<path class="curve second" d="M{line}"/>'
    hits, dots = [], []
    for group, mean in zip(groups, means, strict=True):
        place, rate = 100 * (mean - low) / (high - low), 100 * y[group].mean()
        tip = f"{x[group].min():+,.0f} to {x[group].max():+,.0f} characters: {rate:.0f}% of {len(group)}"
        dots.append(f'<g class="tip"><title>{tip}</title><circle cx="{place:.2f}%" cy="{100 - rate:.2f}%" r="4"/></g>')
        hits.append(tip)
    zero = 100 * -low / (high - low)
    label = escape(f"{title}. {'; '.join(hits)}. Fitted at equal length: {100 / (1 + np.exp(-a)):.1f}%")
    ticks = "".join(
        f'<text x="{100 * (tick - low) / (high - low):.2f}%" y="100%" dy="1.5em" text-anchor="middle">'
        f"{shorten_number(tick)}</text>"
        for tick in choose_ticks(low, high)
    )
    plot = f"""<div class="plot"><svg role="img" aria-label="{label}">{"".join(draw_grid([0, 25, 50, 75, 100], 100))}
<line class="quantile" x1="{zero:.2f}%" x2="{zero:.2f}%" y1="0" y2="100%"/>{ticks}
<text x="100%" y="100%" dy="2.9em" text-anchor="end">characters longer</text>
<line class="axis" x2="100%" y1="100%" y2="100%"/>
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" pointer-events="none">{path}</svg>
{"".join(dots)}<text x="-2.9rem" y="-14">win rate, %</text></svg></div>"""
    keys = [(f"{format_count(len(x) / len(hits))} pairs each", ""), (f"fitted, prior {PRIOR:g}", "second")]
    return draw_figure(title, plot, note, keys, is_long=True)

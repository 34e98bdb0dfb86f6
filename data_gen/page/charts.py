"""Charts of the report as hand-made SVG.

Texts and marks of a chart sit at percentages, so they keep their size when the page narrows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

from data_gen.page.figures import Bin, round_width
from data_gen.page.formatting import format_count, format_percent, format_rows, shorten_number
from data_gen.page.verbs import Verb

CENTRE, HOLE, RING, RIM = 360, 78, 192, 352  # radii of the sunburst and its centre, in its own units


def draw_bars(rows: Sequence[tuple[str, float, str]], total: float = 0, kind: str = "") -> str:
    """Return horizontal bars on one scale for [(name, count, HTML to fold out or "")].

    With a total, each bar names its share. kind "narrow" fits half a page, "tall" puts long names above their bars.
    """
    most = max((n for _, n, _ in rows), default=0) or 1
    items = []
    for name, n, more in rows:
        share = f"<small>{format_percent(n, total)}</small>" if total else ""
        bar = f'<rect class="bar" width="{max(0.3, 100 * n / most):.2f}%" height="100%" rx="2"/>'
        bar = f'<svg aria-hidden="true">{bar}</svg>'
        row = f'<span class="name">{escape(name)}</span>{bar}<span class="n">{format_count(n)} {share}</span>'
        row = f'<span class="row">{row}</span>'
        items.append(f"<li><details><summary>{row}</summary>{more}</details></li>" if more else f"<li>{row}</li>")
    folds = " folds" if any(more for _, _, more in rows) else ""
    return f'<ul class="bars {kind}{folds}">{"".join(items)}</ul>'


def draw_figure(
    title: str,
    plot: str,
    note: str = "",
    keys: Sequence[tuple[str, str]] = (),
    is_long: bool = False,
) -> str:
    """Return a figure with its caption, and a line of text about the mark under the pointer.

    keys are (name, class) of the lines to explain.
    """
    key = "".join(f'<span class="label key {kind}">{escape(name)}</span>' for name, kind in keys)
    note = f"<p>{escape(note)}</p>" if note else ""
    caption = f'<figcaption><div class="head"><h3>{escape(title)}</h3>{key}<output></output></div>{note}</figcaption>'
    return f'<figure class="{"long" if is_long else "short"}">{caption}\n{plot}</figure>'


def format_whole_bin(first: float, end: float) -> str:
    """Return the whole numbers of a bin: 5, or 5-9 with an en dash."""
    return format_count(first) if end - first == 1 else f"{format_count(first)}\u2013{format_count(end - 1)}"


@dataclass(frozen=True)
class Histogram:
    """A histogram to draw.

    bins are (first, end, rows). marks are (value, name) of dashed lines, limit (value, name) of a solid one.
    format_bin(first, end) names a bin.
    """

    title: str
    bins: Sequence[Bin]
    unit: str
    marks: Sequence[tuple[float, str]] = ()
    is_log: bool = False
    note: str = ""
    limit: tuple[float, str] | None = None
    format_bin: Callable[[float, float], str] = format_whole_bin

    def draw(self) -> str:
        """Return the figure's HTML."""
        ticks, top = choose_counting_axis(max(n for _, _, n in self.bins))
        parts = [*draw_grid(ticks, top), *(self._draw_bin(*bin, top) for bin in self.bins), *self._draw_ticks()]
        lines = [(*mark, "quantile", lift) for mark, lift in zip(self.marks, (-20, -6), strict=False)]
        if self.limit:
            lines.append((*self.limit, "limit", -6))
        parts += [self._draw_line(*line) for line in lines]
        parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
        counts = "; ".join(f"{self.format_bin(first, end)}: {format_count(n)}" for first, end, n in self.bins if n)
        names = "".join(f", {name}" for _, name in [*self.marks, *([self.limit] if self.limit else [])])
        label = escape(f"{self.title}, rows by {self.unit}{names}. {counts}")
        svg = f'<svg role="img" aria-label="{label}">{"".join(parts)}</svg>'
        return draw_figure(self.title, f'<div class="plot">{svg}</div>', self.note)

    def _x(self, value: float) -> float:
        """Return the place of a value in percent of the width."""
        scale = math.log if self.is_log else float
        low, high = self.bins[0][0], self.bins[-1][1]
        return 100 * (scale(value) - scale(low)) / (scale(high) - scale(low))

    def _draw_bin(self, first: float, end: float, n: int, top: float) -> str:
        left, width, height = self._x(first), self._x(end) - self._x(first), 100 * n / top
        gap = min(0.25, width / 8)
        return (
            f'<g class="bin tip"><title>{self.format_bin(first, end)} {escape(self.unit)}: {format_rows(n)}</title>'
            f'<rect class="hit" x="{left:.3f}%" width="{width:.3f}%" height="100%"/>'
            f'<rect class="bar" x="{left + gap:.3f}%" y="{100 - height:.3f}%" '
            f'width="{width - 2 * gap:.3f}%" height="{height:.3f}%"/></g>'
        )

    def _draw_ticks(self) -> Iterator[str]:
        low, high = self.bins[0][0], self.bins[-1][1]
        values = choose_log_ticks(low, high) if self.is_log else choose_ticks(low, high)
        for value in values:
            x = f"{self._x(value):.2f}%"
            yield f'<text x="{x}" y="100%" dy="1.5em" text-anchor="middle">{shorten_number(value)}</text>'
        scale_note = " (log scale)" if self.is_log else ""
        yield f'<text x="100%" y="100%" dy="2.9em" text-anchor="end">{escape(self.unit)}{scale_note}</text>'

    def _draw_line(self, value: float, name: str, kind: str, lift: int) -> str:
        x = self._x(min(max(value, self.bins[0][0]), self.bins[-1][1]))
        is_right = x > 55
        return (
            f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{lift + 2}" y2="100%"/>'
            f'<text class="{kind}-name" x="{x:.2f}%" y="{lift}" dx="{-4 if is_right else 4}" dy=".3em" '
            f'text-anchor="{"end" if is_right else "start"}">{escape(name)}</text>'
        )


Point: TypeAlias = tuple[str, Sequence[float | None]]  # a tip, and the value of each line


def draw_curves(title: str, points: Sequence[Point], names: Sequence[str], unit: str, note: str = "") -> str:
    """Return a figure of one or two lines over equal stretches of a run, one name a line. A value may be None."""
    most = max((value for _, values in points for value in values if value is not None), default=0)
    ticks, top = choose_counting_axis(most, is_whole=False)
    parts, step = draw_grid(ticks, top), 100 / len(points)
    paths: list[str] = []
    dots: list[str] = []
    for line in range(len(names)):
        kind, path, before = ("", "second")[line], "", None
        for i, (_, values) in enumerate(points):
            value = values[line]
            if value is not None:
                x, y = (i + 0.5) * step, 100 - 100 * value / top
                path += f"{'L' if before is not None else 'M'}{10 * x:.1f} {10 * y:.1f}"
                dots.append(f'<circle class="{kind}" cx="{x:.2f}%" cy="{y:.2f}%" r="2.5"/>')
            before = value
        paths.append(f'<path class="curve {kind}" d="{path}"/>')
    hits = "".join(
        f'<g class="bin tip"><title>{escape(tip)}</title>'
        f'<rect class="hit" x="{i * step:.3f}%" width="{step:.3f}%" height="100%"/></g>'
        for i, (tip, _) in enumerate(points)
    )
    label = escape(f"{title}. {'; '.join(tip for tip, _ in points)}")
    plot = f"""<div class="plot"><svg role="img" aria-label="{label}">{"".join(parts)}{hits}
<text x="0" y="100%" dy="1.5em">first request</text>
<text x="100%" y="100%" dy="1.5em" text-anchor="end">last request</text>
<line class="axis" x2="100%" y1="100%" y2="100%"/>
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" pointer-events="none">{"".join(paths)}</svg>
<g pointer-events="none">{"".join(dots)}</g><text x="-2.9rem" y="-14">{escape(unit)}</text></svg></div>"""
    keys = list(zip(names, ("", "second"), strict=False)) if len(names) > 1 else []
    return draw_figure(title, plot, note, keys, is_long=True)


def draw_sunburst(title: str, verbs: Sequence[Verb], note: str) -> str:
    """Return a sunburst: verbs in the inner ring, widest first, and their objects in the outer one."""
    drawn = [(sum(n for _, n in verb.objects), verb) for verb in verbs]
    drawn.sort(key=lambda pair: (-pair[0], pair[1].verb))
    total, angle = sum(n for n, _ in drawn), 0.0
    groups, labels = [], []
    for index, (n, (verb, rows, nouns)) in enumerate(drawn):
        sweep = 2 * math.pi * n / total
        tip = f"{verb}: {format_rows(n)} drawn of {format_count(rows)} with an object"
        parts = [draw_arc(angle, sweep, HOLE, RING, "inner", tip), draw_arc_label(verb, angle, sweep, HOLE, RING)]
        for noun, of in nouns:
            part = 2 * math.pi * of / total
            parts.append(draw_arc(angle, part, RING, RIM, "outer", f"{verb} … {noun}: {format_rows(of)}"))
            parts.append(draw_arc_label(noun, angle, part, RING, RIM))
            angle += part
        groups.append(f'<g class="v{20 * index // len(drawn)}">{"".join(parts)}</g>')
        labels.append(f"{verb} {n}: " + ", ".join(f"{noun} {of}" for noun, of in nouns))
    label = escape(f"{title}. {'; '.join(labels)}")
    svg = f"""<svg class="wheel" viewBox="0 0 {2 * CENTRE} {2 * CENTRE}" role="img" aria-label="{label}">
{"".join(groups)}
<text class="total" x="{CENTRE}" y="{CENTRE}" text-anchor="middle">{format_count(total)}</text>
<text class="under" x="{CENTRE}" y="{CENTRE + 24}" text-anchor="middle">rows drawn</text></svg>"""
    return draw_figure(title, svg, note)


def draw_arc(start: float, sweep: float, inside: float, outside: float, kind: str, tip: str) -> str:
    """Return a sector of a ring. Angles are radians clockwise from the top."""
    end = start + min(sweep, 2 * math.pi - 2e-3)
    large = int(end - start > math.pi)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (
        (CENTRE + r * math.sin(a), CENTRE - r * math.cos(a))
        for r, a in ((inside, start), (outside, start), (outside, end), (inside, end))
    )
    d = f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}A{outside} {outside} 0 {large} 1 {x2:.1f} {y2:.1f}"
    d += f"L{x3:.1f} {y3:.1f}A{inside} {inside} 0 {large} 0 {x0:.1f} {y0:.1f}Z"
    return f'<path class="{kind}" d="{d}"><title>{escape(tip)}</title></path>'


def draw_arc_label(text: str, start: float, sweep: float, inside: float, outside: float) -> str:
    """Return a text along the radius, as large as its arc allows, or "" if it would be too small to read."""
    middle, angle = (inside + outside) / 2, start + sweep / 2
    fits = min(0.85 * sweep * (inside + outside * 0.15), (outside - inside - 8) / (0.6 * max(len(text), 3)))
    if fits < 8.5:
        return ""
    turn = math.degrees(angle) - 90
    turn += 180 if 90 < turn % 360 < 270 else 0
    x, y = CENTRE + middle * math.sin(angle), CENTRE - middle * math.cos(angle)
    kind, place = "label-of roomy" if fits >= 19 else "label-of", f"translate({x:.1f} {y:.1f}) rotate({turn:.1f})"
    place += f'" text-anchor="middle" dy=".35em" font-size="{min(fits, 16):.1f}'
    return f'<text class="{kind}" transform="{place}">{escape(text)}</text>'


def draw_grid(ticks: Sequence[float], top: float) -> list[str]:
    """Return the horizontal lines and the numbers of an axis from 0 to top."""
    lines, numbers = [], []
    for value in ticks:
        y = f"{100 - 100 * value / top:.2f}%"
        lines.append(f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>')
        numbers.append(f'<text x="-8" y="{y}" dy=".35em" text-anchor="end">{shorten_number(value)}</text>')
    return lines + numbers


def choose_counting_axis(high: float, is_whole: bool = True) -> tuple[list[float], float]:
    """Return the ticks from 0 and the top of an axis of counts."""
    width = round_width((high or 1) / 4)
    width = max(1, width) if is_whole else width
    steps = max(1, math.ceil((high or 1) / width - 1e-9))
    return [i * width for i in range(steps + 1)], steps * width


def choose_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from low to high."""
    width = round_width((high - low) / 5)
    ticks = [round(i * width, 9) for i in range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)]
    return [tick for tick in ticks if low <= tick <= high]


def choose_log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from low to high for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits: tuple[int, ...] = (1,)
    if high / low < 3000:
        digits = (1, 2, 5) if high / low < 60 else (1, 3)
    return [v for v in (digit * 10**decade for decade in decades for digit in digits) if low <= v <= high]

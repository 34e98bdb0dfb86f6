"""The dataset report's look: its style and script, charts as hand-made SVG, and how figures are written.

Texts and marks of a chart sit at percentages, so they keep their size when the page narrows."""

import base64
import hashlib
import math
from html import escape

from data_gen.page.figures import in_common, nice, text_of

EXAMPLE_CHARS, SAMPLE_CHARS = 300, 3000  # of one text at most
FOLDED_CHARS = 600  # a longer text of a sample is folded here
ENTRIES = 100  # of a table at most

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2026; --soft: #626b78; --line: #e2e5ea; --panel: #f6f7f9;
  --main: #2459c4; --other: #c2540a; --warn: #9a5b00; --mark: #fdeaa8; --bar: #7d9fe0;
  --inner: .8 .1; --outer: .9 .055 }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e3e6ea; --soft: #97a1ad;
  --line: #2b3138; --panel: #1b1f25; --main: #7aa7ff; --other: #ff9d57; --warn: #f0b357; --mark: #5d4a12; --bar:
  #4c71b8;
  --inner: .46 .085; --outer: .33 .05 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .3rem; padding-top: 1.2rem; border-top: 1px solid var(--line); font-size: 1.25rem; font-weight:
  650 }
h3 { margin: 0; font-size: .93rem; font-weight: 600 }
p { margin: .3rem 0 0; max-width: 46rem } header p, .note, figcaption p { color: var(--soft); font-size: .87rem }
.note { margin-bottom: 1.1rem } .open { color: var(--warn); font-weight: 600 }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1rem; font-size: .87rem } a { color:
  var(--main) }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--main); outline-offset: 3px; border-radius: 3px }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.1rem 1.5rem;
  margin: 1.75rem 0 0 }
.figures > div { padding-top: .6rem; border-top: 2px solid var(--line) }
.figures dt, .figures small, th, .label, figcaption output { color: var(--soft); font-size: .8rem; font-weight: 400 }
.figures dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3 }
.figures dd, output, text, td, .n { font-variant-numeric: tabular-nums } .figures small { display: block;
  line-height: 1.3 }
figure { display: flow-root; margin: 0 0 1rem; min-width: 0 }
.head { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline }
figcaption output { margin-left: auto; min-height: 1.3em }
.plot { height: 9.5rem; margin: 2.3rem .5rem 2.6rem 2.9rem } .long .plot { height: 14rem }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible } .plot text { fill: var(--soft);
  font-size: 11.5px }
.grid { stroke: var(--line) } .axis { stroke: var(--soft) } .hit { fill: transparent } .bar { fill: var(--bar) }
.bin:hover .bar { fill: var(--main) } .bin:hover .hit { fill: var(--line); fill-opacity: .5 }
.limit { stroke: var(--other) } .plot .limit-name { fill: var(--other) } .quantile { stroke: var(--ink);
  stroke-dasharray: 3 3 }
.plot .quantile-name { fill: var(--ink) }
path.curve { fill: none; stroke: var(--main); stroke-width: 1.8; stroke-linejoin: round; vector-effect:
  non-scaling-stroke }
path.curve.second { stroke: var(--other); stroke-dasharray: 6 3 } circle { fill: var(--main) } circle.second { fill:
  var(--other) }
.key::before { content: ""; display: inline-block; width: 1.3rem; margin-right: .4rem; vertical-align: middle;
  border-top: 2px solid var(--main) } .key.second::before { border-top: 2px dashed var(--other) }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0 2rem }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.6rem 3rem }
.halves > * { min-width: 0 } .apart { margin-top: 1.8rem }
.wheel { display: block; width: 100%; max-width: 44rem; margin: .5rem auto 0 } .wheel path { stroke: var(--page);
  stroke-width: 1.2 }
.wheel text { fill: var(--ink); pointer-events: none } .wheel g:hover > path { stroke: var(--ink) }
.wheel .total { font-size: 24px; font-weight: 650 } .wheel .under { font-size: 13px; fill: var(--soft) }
.inner { fill: oklch(var(--inner) var(--hue)) } .outer { fill: oklch(var(--outer) var(--hue)) }
ul.bars { list-style: none; margin: .5rem 0 0; padding: 0 } .bars > li { padding: .16rem 0 }
.row { display: grid; grid-template-columns: minmax(7rem, 15rem) minmax(3rem, 1fr) 7.5rem; gap: 0 .8rem;
  align-items: center;
  font-size: .87rem } .row .name { overflow-wrap: anywhere; line-height: 1.3 } .row .n { text-align: right;
  white-space: nowrap }
.row svg { display: block; width: 100%; height: .8rem } .row small { display: inline-block; min-width: 3.4rem;
  color: var(--soft) }
.narrow .row { grid-template-columns: 12.5rem minmax(2rem, 1fr) 6.7rem }
.tall .row { grid-template-columns: 1fr 3.5rem } .tall .name { grid-column: 1 / 3; padding-bottom: .15rem }
.tall svg { height: .5rem } .folds.tall svg { margin-left: 1.1rem; width: calc(100% - 1.1rem) }
.tall > li { padding: .3rem 0 }
.list { border-left: 2px solid var(--line); margin: .4rem 0 1rem 1.1rem; padding: .1rem 0 .1rem 1rem }
summary { cursor: pointer } details.more > summary { color: var(--soft); font-size: .87rem }
.bars summary { list-style: none; border-radius: 3px } .bars summary::-webkit-details-marker { display: none }
.bars summary:hover .name { color: var(--main) }
.folds .name { position: relative; padding-left: 1.1rem }
.folds summary .name::before { content: "\\25B8"; position: absolute; left: 0; color: var(--soft) }
.folds details[open] .name::before { content: "\\25BE" }
article { margin: 0 0 1rem; border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
article > div, article > details { padding: .6rem 1rem } article > * + * { border-top: 1px solid var(--line) }
.list article { margin: .5rem 0; font-size: .93rem } .list article > div { padding: .45rem .8rem }
.prompt { background: var(--panel) } .prompt .text { font-weight: 500 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext } .label { display: block }
.wheel + *, figure + details { margin-bottom: 1.8rem }
mark { background: var(--mark); color: inherit; border-radius: 2px }
.pair { display: grid; grid-template-columns: 5.2rem 1fr 1fr } .pair > div { min-width: 0; border: 0 }
.pair .score { background: var(--panel); font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums }
.pair > div + div + div { border-left: 1px solid var(--line) }
table { width: 100%; border-collapse: collapse; font-size: .87rem; margin-top: .4rem } tr { border-bottom: 1px solid
  var(--line) }
th, td { padding: .35rem 1rem .35rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere } .two th {
  width: 45% }
thead th { vertical-align: bottom } td.n, th.n { text-align: right }
@media (min-width: 50rem) { .small figcaption { min-height: 4.1rem } }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.4rem }
  dl.figures { grid-template-columns: 1fr 1fr } figure { position: relative; padding-bottom: .4rem }
  figcaption output { position: absolute; left: 0; right: 0; bottom: 0; line-height: 1.25 }
  .long .plot { margin-bottom: 3.8rem } .wheel { margin-bottom: 1.4rem }
  .row, .narrow .row { grid-template-columns: 1fr 7rem } .tall .row { grid-template-columns: 1fr 3.5rem }
  ul:not(.tall) .n { grid-row: 1; grid-column: 2 } ul:not(.tall) .row svg { grid-row: 2; grid-column: 1 / 3;
  height: .5rem; margin: .15rem 0 .3rem }
  .pair { grid-template-columns: 1fr } .pair > div + div + div { border-left: 0; border-top: 1px solid var(--line) }
  .pair .score { padding: .2rem 1rem } .list { margin-left: 0; padding-left: .7rem }
  .wheel .label-of { display: none } .wheel .roomy { display: inline; font-size: 19px } .wheel .total { font-size:
  32px }
  .wheel .under { font-size: 21px } }
@media print { body { max-width: none; padding: 0; font-size: 12px } nav, output { display: none }
  article, figure, .row, tr, .figures > div { break-inside: avoid } h2, h3 { break-after: avoid }
  .wheel { max-width: 30rem } svg, .prompt, mark, .score { print-color-adjust: exact; -webkit-print-color-adjust:
  exact } }
""" + "".join(f".v{i} {{ --hue: {(i * 18 + 20) % 360} }}\n" for i in range(20))

SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), out = figure.querySelector("output");
  if (!svg || !out) continue;
  svg.addEventListener("pointerover", event => {
    const title = event.target.closest("g.tip, path")?.querySelector("title");
    out.textContent = title ? title.textContent : "";
  });
  svg.addEventListener("pointerleave", () => { out.textContent = ""; });
}
"""

CENTRE, HOLE, RING, RIM = 360, 78, 192, 352  # of the sunburst, in its own units


def bars(rows, total=0, kind=""):
    """[(name, count, HTML to fold out or "")] as horizontal bars on one scale, with their share of a total.

    kind "narrow" is for half a page, "tall" puts long names over their bars."""
    most, items = max((n for _, n, _ in rows), default=0) or 1, []
    for name, n, more in rows:
        share = f"<small>{percent(n, total)}</small>" if total else ""
        bar = f'<rect class="bar" width="{max(0.3, 100 * n / most):.2f}%" height="100%" rx="2"/>'
        bar = f'<svg aria-hidden="true">{bar}</svg>'
        row = f'<span class="name">{escape(name)}</span>{bar}<span class="n">{count(n)} {share}</span>'
        row = f'<span class="row">{row}</span>'
        items.append(f"<li><details><summary>{row}</summary>{more}</details></li>" if more else f"<li>{row}</li>")
    folds = " folds" if any(more for *_, more in rows) else ""
    return f'<ul class="bars {kind}{folds}">{"".join(items)}</ul>'


def figure_of(title, plot, note="", keys=(), long=False):
    """A figure with a line that tells what is under the pointer."""
    key = "".join(f'<span class="label key {kind}">{escape(name)}</span>' for name, kind in keys)
    note = f"<p>{escape(note)}</p>" if note else ""
    caption = f'<figcaption><div class="head"><h3>{escape(title)}</h3>{key}<output></output></div>{note}</figcaption>'
    return f'<figure class="{"long" if long else "short"}">{caption}\n{plot}</figure>'


def histogram(title, bins, unit, marks=(), log=False, note="", limit=None, show=None):
    """Bars over bins [(first, end, count)]; marks [(value, name)] are dashed lines, limit (value, name) a solid one."""
    show = show or (
        lambda first, end: f"{count(first)}" if end - first == 1 else f"{count(first)}\u2013{count(end - 1)}"
    )
    low, high = bins[0][0], bins[-1][1]
    ticks, top = counting_axis(max(n for _, _, n in bins))
    scale = math.log if log else float

    def x(value):
        return 100 * (scale(value) - scale(low)) / (scale(high) - scale(low))

    parts = y_lines(ticks, top)
    for first, end, n in bins:
        left, width, height = x(first), x(end) - x(first), 100 * n / top
        gap = min(0.25, width / 8)
        parts.append(
            f'<g class="bin tip"><title>{show(first, end)} {escape(unit)}: {rows_of(n)}</title>'
            f'<rect class="hit" x="{left:.3f}%" width="{width:.3f}%" height="100%"/>'
            f'<rect class="bar" x="{left + gap:.3f}%" y="{100 - height:.3f}%" '
            f'width="{width - 2 * gap:.3f}%" height="{height:.3f}%"/></g>'
        )
    for value in log_ticks(low, high) if log else [tick for tick in plain_ticks(low, high) if low <= tick <= high]:
        parts.append(f'<text x="{x(value):.2f}%" y="100%" dy="1.5em" text-anchor="middle">{short(value)}</text>')
    scale_note = " (log scale)" if log else ""
    parts.append(f'<text x="100%" y="100%" dy="2.9em" text-anchor="end">{escape(unit)}{scale_note}</text>')
    lines = [(*mark, "quantile", lift) for mark, lift in zip(marks, (-20, -6), strict=False)]
    for value, name, kind, lift in [*lines, *([(*limit, "limit", -6)] if limit else [])]:
        at, right = x(min(max(value, low), high)), x(min(max(value, low), high)) > 55
        parts.append(f'<line class="{kind}" x1="{at:.2f}%" x2="{at:.2f}%" y1="{lift + 2}" y2="100%"/>')
        parts.append(
            f'<text class="{kind}-name" x="{at:.2f}%" y="{lift}" dx="{-4 if right else 4}" dy=".3em" '
            f'text-anchor="{"end" if right else "start"}">{escape(name)}</text>'
        )
    parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
    told = "; ".join(f"{show(first, end)}: {count(n)}" for first, end, n in bins if n)
    said = "".join(f", {name}" for _, name in [*marks, *([limit] if limit else [])])
    svg = f'<svg role="img" aria-label="{escape(f"{title}, rows by {unit}{said}. {told}")}">{"".join(parts)}</svg>'
    return figure_of(title, f'<div class="plot">{svg}</div>', note)


def curves(title, points, names, unit, note=""):
    """Lines over equal stretches: points [(tip, [value of each line or None])] and one name a line."""
    ticks, top = counting_axis(max((v for _, values in points for v in values if v is not None), default=0), False)
    parts, paths, dots, step = y_lines(ticks, top), [], [], 100 / len(points)
    for line in range(len(names)):
        kind, d, before = ("", "second")[line], [], None
        for i, (_, values) in enumerate(points):
            value = values[line]
            if value is not None:
                at, height = (i + 0.5) * step, 100 - 100 * value / top
                d.append(f"{'L' if before is not None else 'M'}{10 * at:.1f} {10 * height:.1f}")
                dots.append(f'<circle class="{kind}" cx="{at:.2f}%" cy="{height:.2f}%" r="2.5"/>')
            before = value
        paths.append(f'<path class="curve {kind}" d="{"".join(d)}"/>')
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
    return figure_of(
        title, plot, note, list(zip(names, ("", "second"), strict=False)) if len(names) > 1 else (), long=True
    )


def sunburst(title, verbs, note):
    """Inner ring: verbs [(verb, rows, [(object, rows)])], widest first; outer ring: their objects."""
    drawn = sorted(
        ((sum(n for _, n in nouns), verb, rows, nouns) for verb, rows, nouns in verbs), key=lambda v: (-v[0], v[1])
    )
    total, angle, groups, said = sum(n for n, *_ in drawn), 0.0, [], []
    for index, (n, verb, rows, nouns) in enumerate(drawn):
        sweep = 2 * math.pi * n / total
        tip = f"{verb}: {rows_of(n)} drawn of {count(rows)} with an object"
        parts = [arc(angle, sweep, HOLE, RING, "inner", tip), arc_label(verb, angle, sweep, HOLE, RING)]
        for noun, of in nouns:
            part = 2 * math.pi * of / total
            parts.append(arc(angle, part, RING, RIM, "outer", f"{verb} … {noun}: {rows_of(of)}"))
            parts.append(arc_label(noun, angle, part, RING, RIM))
            angle += part
        groups.append(f'<g class="v{20 * index // len(drawn)}">{"".join(parts)}</g>')
        said.append(f"{verb} {n}: " + ", ".join(f"{noun} {of}" for noun, of in nouns))
    label = escape(f"{title}. {'; '.join(said)}")
    svg = f"""<svg class="wheel" viewBox="0 0 {2 * CENTRE} {2 * CENTRE}" role="img" aria-label="{label}">
{"".join(groups)}
<text class="total" x="{CENTRE}" y="{CENTRE}" text-anchor="middle">{count(total)}</text>
<text class="under" x="{CENTRE}" y="{CENTRE + 24}" text-anchor="middle">rows drawn</text></svg>"""
    return figure_of(title, svg, note)


def arc(start, sweep, inside, outside, kind, tip):
    """A sector of a ring, clockwise from the top."""
    end = start + min(sweep, 2 * math.pi - 2e-3)
    large = int(end - start > math.pi)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (
        (CENTRE + r * math.sin(a), CENTRE - r * math.cos(a))
        for r, a in ((inside, start), (outside, start), (outside, end), (inside, end))
    )
    d = f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}A{outside} {outside} 0 {large} 1 {x2:.1f} {y2:.1f}"
    d += f"L{x3:.1f} {y3:.1f}A{inside} {inside} 0 {large} 0 {x0:.1f} {y0:.1f}Z"
    return f'<path class="{kind}" d="{d}"><title>{escape(tip)}</title></path>'


def arc_label(text, start, sweep, inside, outside):
    """The text along the radius, as large as its arc allows; none where that is too small to read."""
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


def y_lines(ticks, top):
    lines = [
        f'<line class="grid" x2="100%" y1="{100 - 100 * v / top:.2f}%" y2="{100 - 100 * v / top:.2f}%"/>' for v in ticks
    ]
    return lines + [
        f'<text x="-8" y="{100 - 100 * v / top:.2f}%" dy=".35em" text-anchor="end">{short(v)}</text>' for v in ticks
    ]


def counting_axis(high, whole=True):
    """Ticks from 0 and the top of an axis of counts."""
    width = nice((high or 1) / 4)
    width = max(1, width) if whole else width
    steps = max(1, math.ceil((high or 1) / width - 1e-9))
    return [i * width for i in range(steps + 1)], steps * width


def plain_ticks(low, high):
    width = nice((high - low) / 5)
    return [round(i * width, 9) for i in range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)]


def log_ticks(low, high):
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 60 else (1, 3) if high / low < 3000 else (1,)
    return [v for v in (digit * 10**decade for decade in decades for digit in digits) if low <= v <= high]


def short(value):
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
            return f"{value / size:.3g}{letter}"
    return f"{value:,.6g}"


def count(value):
    return f"{round(value):,}"


def rows_of(n):
    return f"{count(n)} row{'' if n == 1 else 's'}"


def percent(part, whole):
    share = 100 * part / whole if whole else 0
    return "0%" if not part else "<0.1%" if share < 0.1 else f"{share:.0f}%" if share > 99.95 else f"{share:.1f}%"


def dollars(value):
    size = abs(value)
    return f"${value:,.2f}" if size >= 0.1 or abs(value - round(value, 2)) < 1e-9 else f"${value:.2g}"


def clock(seconds):
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"


def sha256(text):
    """What a content security policy calls an inline block by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def field(label, value, first=False):
    """A labelled text of an example; nothing where there is none, unless it is the first, whose label tells more."""
    text = clip(text_of(value), EXAMPLE_CHARS)
    if not text.strip() and not first:
        return ""
    return (
        f'<div class="{"prompt" if first else "field"}"><span class="label">{escape(label)}</span>{passage(text)}</div>'
    )


def folded(text):
    text = clip(text, SAMPLE_CHARS)
    if not text.strip():
        return '<p class="note">empty</p>'
    if len(text) <= FOLDED_CHARS * 1.3:
        return passage(text)
    cut = max(text.rfind(" ", 0, FOLDED_CHARS), text.rfind("\n", 0, FOLDED_CHARS)) + 1
    cut = cut if cut > FOLDED_CHARS / 2 else FOLDED_CHARS
    more = f"{count(len(text) - cut)} characters more"
    return (
        f'{passage(text[:cut].rstrip())}<details class="more"><summary>{more}</summary>{passage(text[cut:])}</details>'
    )


def table(entries):
    words = {"None": "-", "True": "yes", "False": "no"}
    shown = [
        (clip(text_of(key), 100), clip(words.get(str(value)) or text_of(value), 300)) for key, value in entries.items()
    ]
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in shown[:ENTRIES])
    return f'<table class="two">{rows}</table>'


def passage(text):
    return f'<div class="text">{escape(text)}</div>'


def clip(text, most):
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]} … ({count(more)} characters more)"


def marked(text, other):
    return "".join(f"<mark>{escape(piece)}</mark>" if same else escape(piece) for piece, same in in_common(text, other))

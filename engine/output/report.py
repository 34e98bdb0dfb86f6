"""report.html: one page that shows a run, drawn from run.json and metrics.jsonl alone; it loads nothing else."""

import base64
import hashlib
import json
import math
from html import escape
from pathlib import Path

from engine.base.files import write_whole

POINTS = 1000  # of a curve at most; above, each stretch of steps gives its lowest and its highest
TEXT_CHARS = 4000  # of one sample or setting at most
SAMPLES_BYTES = 400_000  # of all samples together; the page stays under 1 MB

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2026; --soft: #626b78; --line: #e2e5ea; --panel: #f6f7f9;
  --train: #2459c4; --eval: #c2540a; --warn: #9a5b00 }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e3e6ea; --soft: #97a1ad; --line: #2b3138;
  --panel: #1b1f25; --train: #7aa7ff; --eval: #ff9d57; --warn: #f0b357 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 1rem; font-size: 1.15rem; font-weight: 650 }
h3 { margin: 0; font-size: .93rem; font-weight: 600 }
header p, .note { margin: .3rem 0 0; color: var(--soft); font-size: .87rem }
.open { color: var(--warn); font-weight: 600 }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.1rem 1.5rem;
  margin: 1.75rem 0 2.75rem }
.figures > div { padding-top: .6rem; border-top: 2px solid var(--line) }
.figures dt, .figures small, th, figcaption small { color: var(--soft); font-size: .8rem; font-weight: 400 }
.figures dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3 }
.figures dd, figcaption output, text, td { font-variant-numeric: tabular-nums }
.figures small { display: block; line-height: 1.3 }
figure { display: flow-root; margin: 0 0 .8rem; min-width: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline; min-height: 1.5rem }
figcaption output { margin-left: auto; color: var(--soft); font-size: .8rem; white-space: pre-wrap }
.plot { height: 11rem; margin: .6rem .5rem 2.4rem 3.4rem } .wide .plot { height: 21rem }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; touch-action: pan-y }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0 2rem }
text { fill: var(--soft); font-size: 11.5px } .grid { stroke: var(--line) }
.axis, .cursor { stroke: var(--soft) } .cursor { stroke-dasharray: 3 3 } .hit { fill: transparent }
path { fill: none; stroke: var(--train); stroke-width: 1.8; stroke-linejoin: round; vector-effect: non-scaling-stroke }
path.raw { stroke-width: 1; opacity: .38 } circle { fill: var(--train) }
path.eval { stroke: var(--eval); stroke-width: 1.3 } circle.eval { fill: var(--eval); stroke: var(--page) }
.key::before { content: ""; display: inline-block; width: 1.1rem; margin-right: .4rem; vertical-align: middle;
  border-top: 2px solid var(--train) }
.key.raw::before { border-top-width: 1px; opacity: .5 }
.key.eval::before { width: .5rem; height: .5rem; border: 0; border-radius: 50%; background: var(--eval) }
article { margin: 0 0 1.25rem; border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 0; max-height: 24rem; overflow: auto }
.prompt { padding: .8rem 1rem; background: var(--panel) } .prompt .text { font-weight: 500 }
.pair { display: grid; grid-template-columns: 1fr 1fr } .pair > div { padding: .8rem 1rem; min-width: 0 }
.pair > div + div { border-left: 1px solid var(--line) } .pair .before { color: var(--soft) }
details { padding: .6rem 1rem; border-top: 1px solid var(--line) } details > div { margin-top: .8rem }
summary { cursor: pointer; color: var(--soft); font-size: .87rem } .label { color: var(--soft); font-size: .8rem }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 3rem }
table { width: 100%; border-collapse: collapse; font-size: .87rem } tr { border-bottom: 1px solid var(--line) }
th, td { padding: .35rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere } th { width: 45%;
  padding-right: 1rem }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.4rem } .wide .plot { height: 15rem }
  dl.figures { grid-template-columns: 1fr 1fr } .pair { grid-template-columns: 1fr }
  .pair > div + div { border-left: 0; border-top: 1px solid var(--line) } figcaption output { margin-left: 0 } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-rows]")) {
  const rows = JSON.parse(figure.dataset.rows), [low, high] = JSON.parse(figure.dataset.range);
  const svg = figure.querySelector("svg"), out = figure.querySelector("output"), cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const step = low + (event.clientX - box.left) / box.width * (high - low);
    const row = rows.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    const x = 100 * (row[0] - low) / (high - low) + "%";
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.removeAttribute("display");
    out.textContent = row[1];
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("display", "none"); out.textContent = ""; });
}
"""


def write_report(out_dir: Path) -> Path:
    """Writes out_dir/report.html, the same bytes for the same run.json and metrics.jsonl; missing parts are left out.

    The counts of a train line (examples, tokens) are those of its one step."""
    out_dir = Path(out_dir)
    page = render(read_run(out_dir / "run.json"), read_events(out_dir / "metrics.jsonl"))
    path = out_dir / "report.html"
    write_whole(path, page.encode("utf-8", errors="replace"))
    return path


def read_run(path):
    try:
        run = json.loads(path.read_bytes())
    except (OSError, ValueError):
        run = None
    run = run if isinstance(run, dict) else {}
    for part in ("config", "model", "data", "environment"):
        run[part] = run[part] if isinstance(run.get(part), dict) else {}
    return run


def read_events(path):
    """{event: [lines]} sorted by step; of a step told twice, the later. A torn line is no line."""
    events = {name: {} for name in ("train", "eval", "sample", "save", "skip", "spike", "end")}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(line)
            line["step"] = number(line.get("step")) or 0
            events[line["event"]][line["step"], str(line.get("prompt", line.get("reason")))] = line
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return {name: sorted(lines.values(), key=lambda line: line["step"]) for name, lines in events.items()}


def render(run, events):
    train, end = events["train"], (events["end"] or [{}])[-1]
    name = str(run["model"].get("name") or run["config"].get("model") or "unnamed model")
    final = next((value for line in (end, *reversed(train)) if (value := number(line.get("loss"))) is not None), None)
    title = f"{name}: {'no loss yet' if final is None else f'loss {final:.4f}'}"
    status = str(end.get("status") or "done") if events["end"] else "in progress or interrupted"
    parameters, started = number(run["model"].get("parameters")), run.get("started")
    facts = [f"{si(parameters)} parameters".replace("G", "B")] if parameters else []
    facts += [f"started {started}"] if started else []
    state = f'<span class="{"" if status == "done" else "open"}">{escape(status)}</span>'
    policy = f"default-src 'none'; style-src '{sha256(STYLE)}'; script-src '{sha256(SCRIPT)}'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>Cria fine-tuning run · {" · ".join([state, *map(escape, facts)])}</p>
</header>
{key_figures(run, train, events["eval"], end, final)}
{loss_chart(train, events["eval"])}
<div class="small">
{chart("Learning rate", {"train": column(train, "lr")}, zero=True)}
{chart("Gradient norm", {"train": column(train, "grad_norm")}, zero=True)}
{chart("Tokens per second", smoothed(column(train, "tokens_per_second")), zero=True)}
</div>
{samples(events["sample"])}
<div class="tables">
<section>{table("Data", run["data"], as_count)}{table("Environment", run["environment"])}{happenings(events)}</section>
<section>{table("Settings", run["config"])}</section>
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def key_figures(run, train, evals, end, final):
    def total(key):
        return sum(number(line.get(key)) or 0 for line in train)

    def row(label, value, note=""):
        note = f"<small>{escape(note)}</small>" if note else ""
        return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{note}</dd></div>"

    losses = [loss for _, loss in column(train, "loss") if loss is not None]
    rows = [row("Final train loss", figure(final), f"from {losses[0]:.4f}" if losses else "")]
    if evals:
        perplexity = number(evals[-1].get("perplexity"))
        note = "" if perplexity is None else f"perplexity {figure(perplexity)}"
        rows.append(row("Eval loss", figure(number(evals[-1].get("loss"))), note))
    epoch = number(train[-1].get("epoch")) if train else None
    rows.append(row("Steps", count(train[-1]["step"] if train else 0), "" if epoch is None else f"epoch {epoch:.4g}"))
    rows += [row("Examples", count(total("examples"))), row("Tokens", count(total("tokens")))]
    busy = total("step_seconds")
    took = next((value for value in (number(run.get("seconds")), number(end.get("seconds")), busy) if value), None)
    rows.append(row("Time", clock(took), f"{clock(busy)} in steps" if busy else ""))
    if busy:
        rows.append(row("Tokens per second", count(total("tokens") / busy), "mean over the steps"))
    mfu = [value for _, value in column(train, "mfu") if value is not None]
    if mfu:
        rows.append(row("MFU", f"{100 * sum(mfu) / len(mfu):.1f}%", "6 · parameters · tokens/s ÷ dense bf16 peak"))
    peak = max((value for _, value in column(train, "peak_memory_bytes") if value is not None), default=None)
    if peak is not None:
        rows.append(row("Peak memory", f"{peak / 2**30:.2f} GiB"))
    return f'<dl class="figures">{"".join(rows)}</dl>'


def loss_chart(train, evals):
    losses = column(train, "loss")
    lost = sum(value is None for _, value in losses)
    note = f'<p class="note">{count(lost)} of {count(len(losses))} steps have no finite loss.</p>' if lost else ""
    return f'<div class="wide">{chart("Loss", smoothed(losses) | {"eval": column(evals, "loss")})}{note}</div>'


def samples(lines):
    """What the model answered before and after, side by side, prompt by prompt."""
    prompts, cards, size = {}, [], 0
    for line in lines:
        prompts.setdefault(str(line.get("prompt", "")), []).append(line)
    for prompt, answers in prompts.items():
        before = answers[0] if answers[0]["step"] <= 0 else None
        after = answers[-1] if answers[-1]["step"] > 0 else None
        between = answers[bool(before) : len(answers) - bool(after)]
        between = between[:: -(-len(between) // 8) or 1]  # eight at most, evenly
        card = f'<article><div class="prompt"><span class="label">Prompt</span>{passage(prompt)}</div>'
        card += '<div class="pair">' + answer("before", "Before training", before)
        card += answer("after", f"After step {count(after['step'])}" if after else "After training", after) + "</div>"
        if between:
            card += f"<details><summary>In between ({len(between)})</summary>"
            card += "".join(answer("", f"Step {count(line['step'])}", line) for line in between) + "</details>"
        size += len(card.encode("utf-8", "replace"))
        if size > SAMPLES_BYTES and cards:
            cards.append(f'<p class="note">{len(prompts) - len(cards)} more prompts are in metrics.jsonl.</p>')
            break
        cards.append(card + "</article>")
    return f"<h2>Samples</h2>{''.join(cards)}" if cards else ""


def answer(kind, label, line):
    text = '<p class="note">no sample</p>' if line is None else passage(str(line.get("text", "")))
    return f'<div class="{kind}"><span class="label">{label}</span>{text}</div>'


def passage(text):
    return f'<div class="text">{escape(clip(text))}</div>'


def happenings(events):
    """Skipped steps, spikes and saves, the last 50."""
    rows = {}
    for line in sorted(events["skip"] + events["spike"] + events["save"], key=lambda line: line["step"])[-50:]:
        if line["event"] == "skip":
            what = f"skipped: {line.get('reason')}"
        elif line["event"] == "spike":
            what = f"loss {figure(number(line.get('loss')))}, a spike over {figure(number(line.get('median')))}"
            what += "" if line.get("back_to") is None else f"; back to the state of step {line['back_to']}"
        else:
            size = number(line.get("bytes"))
            took = number(line.get("seconds"))
            what = f"saved {line.get('path', '')}" + ("" if size is None else f", {size / 1e9:.3g} GB")
            what += "" if took is None else f", {took:.1f} s"
        step = f"step {count(line['step'])}"
        rows[step] = f"{rows[step]}; {what}" if step in rows else what
    return table("Events", rows)


def table(title, entries, show=str):
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in flat(entries, show))
    return f"<h2>{escape(title)}</h2><table>{rows}</table>" if rows else ""


def flat(entries, show, prefix=""):
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from flat(value, show, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield clip(f"{prefix}{key}"), clip(", ".join(map(str, value)))
        else:
            words = {"None": "-", "True": "yes", "False": "no"}
            yield clip(f"{prefix}{key}"), clip(words.get(str(value)) or show(value))


def as_count(value):
    return count(value) if isinstance(value, int) else str(value)


def chart(title, series, zero=False):
    """A <figure> of {name: [(step, value or None)]}. Texts and marks sit at percentages, so they keep their size when
    the page narrows, and only the curves stretch."""
    values = sorted(value for points in series.values() for _, value in points if value is not None)
    if not values:
        return f'<figure><figcaption><h3>{title}</h3><span class="note">no data</span></figcaption></figure>'
    steps = sorted({step for points in series.values() for step, _ in points})
    low, high = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)
    log = values[0] > 0 and values[-1] > 20 * (values[len(values) // 2] if zero else values[0])
    ticks, bottom, top = y_axis(min(values[0], 0) if zero and not log else values[0], values[-1], log)
    scale = math.log if log else float

    def x(step):
        return (step - low) / (high - low)

    def y(value):
        return 1 - (scale(value) - scale(bottom)) / (scale(top) - scale(bottom))

    axes = [f'<line class="grid" x2="100%" y1="{y(v):.2%}" y2="{y(v):.2%}"/>' for v in ticks]
    axes += [f'<text x="-8" y="{y(v):.2%}" dy=".35em" text-anchor="end">{tick(v, top)}</text>' for v in ticks]
    width = max(1, nice((high - low) / 5))
    for step in (width * i for i in range(math.ceil(low / width), math.floor(high / width) + 1)):
        axes.append(f'<text x="{x(step):.2%}" y="100%" dy="1.5em" text-anchor="middle">{tick(step, high)}</text>')
    curves, dots, keys = [], [], []
    for name, points in series.items():
        if points:
            kind = {"eval": "eval", "each step": "raw"}.get(name, "train")
            d, marks = path([(x(step), None if v is None else y(v)) for step, v in thin(points)], kind == "eval")
            curves.append(f'<path class="{kind}" d="{d}"/>')
            dots += [f'<circle class="{kind}" cx="{a:.2%}" cy="{b:.2%}" r="3.5"/>' for a, b in marks]
            keys.append(f'<span class="label key {kind}">{name}</span>')
    known = [(name, dict(points)) for name, points in series.items()]
    told = sorted({step for name, points in series.items() if name != "smoothed" for step, _ in thin(points)})
    rows = [
        [step, "  ".join([f"step {count(step)}", *[f"{name} {figure(of[step])}" for name, of in known if step in of]])]
        for step in told
    ]
    return f"""<figure data-range="[{low}, {high}]" data-rows="{escape(json.dumps(rows, ensure_ascii=False))}">
<figcaption><h3>{title}</h3>{"".join(keys) if "eval" in series else ""}
{'<span class="label">log scale</span>' if log else ""}<output></output></figcaption>
<div class="plot"><svg role="img" aria-label="{title} by step"><rect class="hit" width="100%" height="100%"/>
{"".join(axes)}<text x="100%" y="100%" dy="2.9em" text-anchor="end">step</text>
<line class="cursor" y2="100%" display="none"/>
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(curves)}</svg>{"".join(dots)}</svg></div></figure>"""


def y_axis(low, high, log):
    """Ticks, bottom and top of an axis that shows low..high."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [digit * 10.0**decade for decade in decades[:: -(-len(decades) // 8)] for digit in digits]
        return [value for value in ticks if low / 1.2 <= value <= high * 1.2], low / 1.2, high * 1.2
    if high - low <= 1e-9 * abs(high):
        low, high = min(low, 0), max(high, 0) or 1
    width = nice((high - low) / 4)
    first, last = math.floor(low / width), math.ceil(high / width)
    return [i * width for i in range(first, last + 1)], first * width, last * width


def nice(width):
    """The smallest 1, 2 or 5 times a power of ten that is not under `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= width * 0.999)


def path(points, mark_all):
    """SVG path data in a 1000 by 1000 box, and the points that need a mark: all, or those a gap leaves alone."""
    d, marks = [], []
    present = [None, *(value for _, value in points), None]
    for (x, y), before, after in zip(points, present[:-2], present[2:], strict=True):
        if y is not None:
            d.append(f"{'M' if before is None else 'L'}{1000 * x:.1f} {1000 * y:.1f}")
            if mark_all or before is after is None:
                marks.append((x, y))
    return "".join(d), marks


def thin(points):
    """At most POINTS of them: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= POINTS:
        return points
    kept, size = [], -(-2 * len(points) // POINTS)
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if points[i][1] is not None] or [start]
        kept += sorted({min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])})
    return [points[i] for i in kept]


def smoothed(points):
    """The points, and above 20 of them their mean over a centred 20th of the run (no lag; shorter at the ends)."""
    half, result, known = len(points) // 40, {"each step": points}, [0.0]
    if len(points) <= 20:
        return {"train": points}
    finite = [0]
    for _, value in points:
        known.append(known[-1] + (value or 0.0))
        finite.append(finite[-1] + (value is not None))
    line = []
    for i, (step, value) in enumerate(points):
        a, b = max(0, i - half), min(len(points), i + half + 1)
        line.append((step, (known[b] - known[a]) / (finite[b] - finite[a]) if value is not None else None))
    return result | {"smoothed": line}


def column(lines, key):
    return [(line["step"], number(line.get(key))) for line in lines]


def number(value):
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or value != value:
        return None
    return value


def figure(value):
    if value is None:
        return "-"
    size = abs(value)
    return count(value) if size >= 1000 else f"{value:.4f}" if size >= 0.01 or not size else f"{value:.3g}"


def tick(value, highest):
    """The label of a tick on an axis that goes up to `highest`."""
    return si(value) if highest >= 10000 else f"{value:.3g}" if abs(value) < 0.001 else f"{value:,.6g}"


def count(value):
    return f"{round(value):,}"


def si(value):
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def clip(text):
    more = len(text) - TEXT_CHARS
    return text if more <= 0 else f"{text[:TEXT_CHARS]} … ({count(more)} characters more)"


def clock(seconds):
    if not seconds:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"


def sha256(text):
    """What a content security policy calls an inline block by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

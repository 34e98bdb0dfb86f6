"""report.html: one page that shows a run, drawn from run.json and metrics.jsonl alone; it loads nothing else."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from engine.base.files import write_atomically
from engine.output.report_charts import render_chart, smooth_points
from engine.output.report_numbers import (
    Line,
    clip_text,
    finite_number,
    format_count,
    format_figure,
    format_si,
    format_time,
    read_column,
)
from engine.output.report_style import SCRIPT, STYLE
from engine.output.summary import summarize_losses, summarize_scores

FEW_UPDATES = 10  # fewer are told, as engine.training.plan's FEW
SAMPLES_BYTES = 400_000  # of all samples together; the page stays under 1 MB


def write_report(out_dir: Path) -> Path:
    """Write out_dir/report.html and return its path. Parts that are missing in the folder are left out.

    The bytes depend on run.json and metrics.jsonl alone.
    """
    out_dir = Path(out_dir)
    page = render_page(read_run(out_dir / "run.json"), read_events(out_dir / "metrics.jsonl"))
    path = out_dir / "report.html"
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def read_run(path: Path) -> dict[str, Any]:
    """Return run.json with each of its parts, {} for a part that is missing or unreadable."""
    try:
        run = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        run = None
    run = run if isinstance(run, dict) else {}
    for part in ("config", "model", "data", "environment"):
        run[part] = run[part] if isinstance(run.get(part), dict) else {}
    return run


def read_events(path: Path) -> dict[str, list[Line]]:
    """Return {event: [lines]} of metrics.jsonl, sorted by step.

    Of an event that was written twice for a step the later line is taken. A torn line is left out.
    """
    events: dict[str, dict[tuple, Line]] = {
        name: {} for name in ("train", "eval", "score", "answer", "sample", "save", "skip", "spike", "end")
    }
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(line)
            line["step"] = finite_number(line.get("step")) or 0
            events[line["event"]][line["step"], str(line.get("prompt", line.get("reason")))] = line
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return {name: sorted(lines.values(), key=lambda line: line["step"]) for name, lines in events.items()}


def render_page(run: dict[str, Any], events: dict[str, list[Line]]) -> str:
    """Return the HTML of the page."""
    train, end = events["train"], (events["end"] or [{}])[-1]
    name = str(run["model"].get("name") or run["config"].get("model") or "unnamed model")
    final = next(
        (value for line in (end, *reversed(train)) if (value := finite_number(line.get("loss"))) is not None), None
    )
    title = f"{name}: {summarize_losses(events)}".replace("->", "→")
    status = str(end.get("status") or "done") if events["end"] else "in progress or interrupted"
    parameters, started = finite_number(run["model"].get("parameters")), run.get("started")
    facts = [f"{format_si(parameters)} parameters".replace("G", "B")] if parameters else []
    facts += [f"started {started}"] if started else []
    if score := summarize_scores(events["score"]).replace("->", "→"):
        facts.insert(0, score)
    state = f'<span class="{"" if status == "done" else "open"}">{escape(status)}</span>'
    style, script = hash_inline_block(STYLE), hash_inline_block(SCRIPT)
    policy = f"default-src 'none'; style-src '{style}'; script-src '{script}'; form-action 'none'"
    data, environment = render_table("Data", run["data"], format_entry), render_table("Environment", run["environment"])
    use = render_commands(run) if status == "done" else render_commands(run | {"use": {}})
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
{render_key_figures(run, train, events["eval"], end, final)}
{render_loss_chart(train, events["eval"])}
<div class="small">
{render_chart("Learning rate", {"train": read_column(train, "lr")}, zero=True)}
{render_chart("Gradient norm", {"train": read_column(train, "grad_norm")}, zero=True)}
{render_chart("Tokens per second", smooth_points(read_column(train, "tokens_per_second")), zero=True)}
</div>
{render_samples("Held-out answers", events["answer"])}
{render_samples("Samples", events["sample"])}
{use}
<div class="tables">
<section>{render_settings(run)}</section>
<section>{data}{environment}{render_events(events)}</section>
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def render_key_figures(
    run: dict[str, Any], train: list[Line], evals: list[Line], end: Line, final: float | None
) -> str:
    """Return the figures atop the page. end: the line of the run's end, or {}. final: the last loss."""

    def total(key):  # each train line counts its own step only
        return sum(finite_number(line.get(key)) or 0 for line in train)

    def row(label, value, note=""):
        note = f"<small>{escape(note)}</small>" if note else ""
        return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{note}</dd></div>"

    losses = [loss for _, loss in read_column(train, "loss") if loss is not None]
    rows = []
    if evals:
        perplexity = finite_number(evals[-1].get("perplexity"))
        note = "" if perplexity is None else f"perplexity {format_figure(perplexity)}"
        rows.append(row("Held-out loss", format_figure(finite_number(evals[-1].get("loss"))), note))
    rows.append(row("Last step's loss", format_figure(final), f"from {losses[0]:.4f}" if losses else ""))
    epoch = finite_number(train[-1].get("epoch")) if train else None
    rows.append(
        row("Steps", format_count(train[-1]["step"] if train else 0), "" if epoch is None else f"epoch {epoch:.4g}")
    )
    n_updates = sum((finite_number(line.get("lr")) or 0) > 0 for line in train)
    if train and n_updates < FEW_UPDATES:
        rows.append(row("Updates", format_count(n_updates), "steps with a learning rate over 0; so few hardly train"))
    rows += [row("Examples", format_count(total("examples"))), row("Tokens", format_count(total("tokens")))]
    busy = total("step_seconds")
    took = next(
        (value for value in (finite_number(run.get("seconds")), finite_number(end.get("seconds")), busy) if value), None
    )
    rows.append(row("Time", format_time(took), f"{format_time(busy)} in steps" if busy else ""))
    if busy:
        note, computed = "mean over the steps", total("computed_tokens")
        if 0 < computed < total("tokens"):  # a prefix that examples share is computed once
            note = f"effective; {format_count(computed / busy)} of them computed"
        rows.append(row("Tokens per second", format_count(total("tokens") / busy), note))
    mfu = [value for _, value in read_column(train, "mfu") if value is not None]
    if mfu:
        rows.append(row("MFU", f"{100 * sum(mfu) / len(mfu):.1f}%", "6 · parameters · computed tokens/s ÷ bf16 peak"))
    peak = max((value for _, value in read_column(train, "peak_memory_bytes") if value is not None), default=None)
    if peak is not None:
        rows.append(row("Peak memory", f"{peak / 2**30:.2f} GiB"))
    return f'<dl class="figures">{"".join(rows)}</dl>'


def render_loss_chart(train: list[Line], evals: list[Line]) -> str:
    """Return the chart of train and held-out loss."""
    losses = read_column(train, "loss")
    lost = sum(value is None for _, value in losses)
    note = (
        f'<p class="note">{format_count(lost)} of {format_count(len(losses))} steps have no finite loss.</p>'
        if lost
        else ""
    )
    chart = render_chart("Loss", smooth_points(losses) | {"eval": read_column(evals, "loss")})
    return f'<div class="wide">{chart}{note}</div>'


def render_settings(run: dict[str, Any]) -> str:
    """Return the settings: those that differ from their defaults, then the others folded up.

    A run.json without the names of those that differ has one table of all.
    """
    config, changed = run["config"], run.get("changed")
    if not isinstance(changed, list):
        return render_table("Settings", config)
    first = {name: value for name, value in config.items() if name in changed}
    rest = {name: value for name, value in config.items() if name not in changed}
    folded = f"<summary>{len(rest)} settings as they are by default</summary>{render_table('', rest)}"
    others = f"<details>{folded}</details>"
    return render_table("Settings that differ from the defaults", first) + (others if rest else "")


def render_commands(run: dict[str, Any]) -> str:
    """Return the command of the run and those that use its model, each on a line that can be copied."""
    use = run["use"] if isinstance(run.get("use"), dict) else {}
    commands = [("train it again", run.get("command")), *use.items()]
    lines = "".join(
        f'<p class="label">{escape(str(what))}</p><pre>{escape(clip_text(command))}</pre>'
        for what, command in commands
        if isinstance(command, str)
    )
    return f"<h2>Commands</h2>{lines}" if lines else ""


def render_samples(title: str, lines: list[Line]) -> str:
    """Return each prompt with the model's answers before and after training side by side, under a title."""
    prompts: dict[str, list[Line]] = {}
    cards: list[str] = []
    size = 0
    for line in lines:
        prompts.setdefault(str(line.get("prompt", "")), []).append(line)
    for prompt, answers in prompts.items():
        before = answers[0] if answers[0]["step"] <= 0 else None
        after = answers[-1] if answers[-1]["step"] > 0 else None
        between = answers[bool(before) : len(answers) - bool(after)]
        between = between[:: -(-len(between) // 8) or 1]  # eight at most, evenly
        card = f'<article><div class="prompt"><span class="label">Prompt</span>{render_text(prompt)}</div>'
        if isinstance(wanted := answers[-1].get("wanted"), str):
            card += f'<div class="prompt"><span class="label">Wanted</span>{render_text(wanted)}</div>'
        card += '<div class="pair">' + render_answer("before", "Before training", before)
        card += (
            render_answer("after", f"After step {format_count(after['step'])}" if after else "After training", after)
            + "</div>"
        )
        if between:
            card += f"<details><summary>In between ({len(between)})</summary>"
            card += (
                "".join(render_answer("", f"Step {format_count(line['step'])}", line) for line in between)
                + "</details>"
            )
        size += len(card.encode("utf-8", "replace"))
        if size > SAMPLES_BYTES and cards:
            cards.append(f'<p class="note">{len(prompts) - len(cards)} more prompts are in metrics.jsonl.</p>')
            break
        cards.append(card + "</article>")
    return f"<h2>{title}</h2>{''.join(cards)}" if cards else ""


def render_answer(kind: str, label: str, line: Line | None) -> str:
    """Return one answer. kind: its CSS class."""
    text = '<p class="note">no sample</p>' if line is None else render_text(str(line.get("text", "")))
    return f'<div class="{kind}"><span class="label">{label}</span>{text}</div>'


def render_text(text: str) -> str:
    """Return a text as HTML that keeps its spaces and lines."""
    return f'<div class="text">{escape(clip_text(text))}</div>'


def render_events(events: dict[str, list[Line]]) -> str:
    """Return a table of the last 50 skipped steps, spikes and saves."""
    rows: dict[str, str] = {}
    for line in sorted(events["skip"] + events["spike"] + events["save"], key=lambda line: line["step"])[-50:]:
        if line["event"] == "skip":
            what = f"skipped: {line.get('reason')}"
        elif line["event"] == "spike":
            loss, median = (format_figure(finite_number(line.get(key))) for key in ("loss", "median"))
            what = f"loss {loss}, a spike over {median}"
            what += "" if line.get("back_to") is None else f"; back to the state of step {line['back_to']}"
        else:
            size = finite_number(line.get("bytes"))
            took = finite_number(line.get("seconds"))
            what = f"saved {line.get('path', '')}" + ("" if size is None else f", {size / 1e9:.3g} GB")
            what += "" if took is None else f", {took:.1f} s"
        step = f"step {format_count(line['step'])}"
        rows[step] = f"{rows[step]}; {what}" if step in rows else what
    return render_table("Events", rows)


def render_table(title: str, entries: dict[str, Any], show: Callable[[Any], str] = str) -> str:
    """Return a table of names and values under a title, or "" when it would be empty."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in flatten_entries(entries, show)
    )
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{heading}<table>{rows}</table>" if rows else ""


def flatten_entries(entries: dict[str, Any], show: Callable[[Any], str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each value; names of a nested dict are joined by dots."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from flatten_entries(value, show, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield clip_text(f"{prefix}{key}"), clip_text(", ".join(map(str, value)))
        else:
            words = {"None": "-", "True": "yes", "False": "no"}
            yield clip_text(f"{prefix}{key}"), clip_text(words.get(str(value)) or show(value))


def format_entry(value: Any) -> str:
    """Return a value as text, integers with commas between thousands."""
    return format_count(value) if isinstance(value, int) else str(value)


def hash_inline_block(text: str) -> str:
    """Return the name by which a content security policy allows an inline block."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

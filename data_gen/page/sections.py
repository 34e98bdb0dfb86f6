"""Sections of the report. Each function returns HTML, "" without anything to show."""

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from data_gen.base.language import LANGUAGES
from data_gen.page.blocks import render_field, render_folded, render_table
from data_gen.page.charts import Histogram, Point, draw_bars, draw_curves, draw_sunburst
from data_gen.page.figures import bin_whole_numbers, count_kinds, find_percentile
from data_gen.page.formatting import (
    as_number,
    as_text,
    clip_text,
    format_count,
    format_dollars,
    format_percent,
    format_rows,
)
from data_gen.page.run_files import Rejected, Row, RunRecord
from data_gen.page.verbs import OBJECTS_SHOWN, Verb, count_verbs

SAMPLE_ROWS, REASONS = 30, 40  # shown at most; further reasons are counted
SAMPLE_BYTES = 500_000  # of all samples together; the page stays under 2 MB
STRETCHES = 40  # of the run, in the chart of its yield


def render_lengths(n: int, lengths: dict[str, list[int]]) -> str:
    """Return histograms of the sorted lengths in words of each field, of n rows."""
    charts = []
    for title, found in lengths.items():
        some = [k for k in found if k]
        if some:
            bins, is_log = bin_whole_numbers(some)
            # The whole number k is drawn from k to k + 1.
            middle, most = statistics.median(found), find_percentile(found, 0.95)
            marks = [(middle + 0.5, f"median {middle:,g}"), (most + 0.5, f"95% up to {format_count(most)}")]
            notes = [f"longest {format_count(some[-1])} words"]
            notes += [f"{format_rows(n - len(found))} without"] if len(found) < n else []
            notes += [f"{format_rows(len(found) - len(some))} of no words"] if len(some) < len(found) else []
            charts.append(Histogram(title.capitalize(), bins, "words", marks, is_log, "; ".join(notes)).draw())
    return f'<div class="small">{"".join(charts)}</div>' if charts else ""


def render_content(rows: Sequence[Row], languages: Sequence[str]) -> str:
    """Return the section about verbs, kinds of rows and languages."""
    if not rows:
        return ""
    english = [row.instruction for row, code in zip(rows, languages, strict=True) if code in ("", "en")]
    title = (
        '<h3>Kinds of rows</h3><p class="note">Exact counts of patterns; a row may be of several kinds, or none.</p>'
    )
    parts = [f"<div>{title}{draw_bars([(*kind, '') for kind in count_kinds(rows)], len(rows), 'narrow')}</div>"]
    names = [(LANGUAGES.get(code, "undetermined"), n, "") for code, n in Counter(languages).most_common()]
    if len(names) > 12:
        names = [*names[:11], (f"{len(names) - 11} others", sum(n for _, n, _ in names[11:]), "")]
    title = '<h3>Languages</h3><p class="note">A guess from letters and common words of the instruction, or of the '
    title += "whole row where that is too short to tell.</p>"
    parts.append(f"<div>{title}{draw_bars(names, len(rows), 'narrow')}</div>")
    return f'{render_verbs(english, len(rows))}<div class="halves">{"".join(parts)}</div>'


def render_verbs(english: Sequence[str], n: int) -> str:
    """Return a sunburst and a table of the verbs and objects of the English instructions, of n rows."""
    verbs, with_verb, with_both = count_verbs(english)
    left_out = f"{format_rows(n - len(english))} in other languages are left out." if len(english) < n else ""
    if not verbs:
        return f'<p class="note">Verbs and their objects: none found. {left_out}</p>'
    drawn = sum(of for verb in verbs for _, of in verb.objects)
    both, one = format_count(with_both), format_count(with_verb)
    note = f"""A heuristic from English word lists, without a parser: the first imperative verb and the head of the
        words after it, both found in {both} of {format_count(len(english))} instructions; {one} have a verb, questions
        mostly none. Drawn are the {len(verbs)} commonest verbs with at most {OBJECTS_SHOWN} objects each, the
        commonest: {format_rows(drawn)}, {format_percent(drawn, n)} of the dataset. {left_out}"""
    return draw_sunburst("Verbs and their objects", verbs, " ".join(note.split())) + render_verb_table(verbs)


def render_verb_table(verbs: Sequence[Verb]) -> str:
    """Return the folded table of verbs and their commonest objects."""
    cells = "".join(
        f'<tr><th>{escape(verb)}</th><td class="n">{format_count(k)}</td><td>'
        f"{escape(', '.join(f'{noun} {format_count(of)}' for noun, of in nouns))}</td></tr>"
        for verb, k, nouns in verbs
    )
    head = '<tr><th>verb</th><th class="n">rows with an object</th><th>commonest objects</th></tr>'
    cells = f"<table><thead>{head}</thead><tbody>{cells}</tbody></table>"
    return f'<details class="more"><summary>As a table</summary>{cells}</details>'


def render_rejections(rejected: Rejected | None, counts: dict[str, Any]) -> str:
    """Return bars of the reasons for rejection, with examples, and of the repairs."""
    recorded: Counter[str] = Counter()
    if isinstance(counts.get("rejected"), dict):
        numbers = {as_text(key): as_number(n) for key, n in counts["rejected"].items()}
        recorded.update({reason: n for reason, n in numbers.items() if n})
    found = rejected.counts if rejected else recorded
    parts, notes = [], []
    if found:
        total, ranked = found.total(), sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
        rows = [(clip_text(reason, 120), n, render_examples(rejected, reason)) for reason, n in ranked[:REASONS]]
        if len(ranked) > REASONS:
            rows.append((f"{len(ranked) - REASONS} other reasons", sum(n for _, n in ranked[REASONS:]), ""))
        notes.append(f"{format_count(total)} rejections, each for the first reason that was met; shares are of them.")
        if rejected:
            notes.append("A reason unfolds to a few of them, drawn with a fixed seed.")
        if rejected and recorded and recorded != found:
            notes.append(f"run.json counts {format_count(recorded.total())}.")
        if rejected and rejected.unreadable:
            notes.append(f"{format_count(rejected.unreadable)} lines of rejected.jsonl could not be read.")
        parts.append(f'<p class="note">{" ".join(notes)}</p>{draw_bars(rows, total)}')
    repairs = counts.get("repaired")
    repaired = []
    for name, value in repairs.items() if isinstance(repairs, dict) else ():
        if n := as_number(value):
            repaired.append((clip_text(as_text(name), 120), n, ""))
    if repaired:
        repaired.sort(key=lambda pair: -pair[1])
        parts.append(f'<h3 class="apart">Repaired and kept</h3>{draw_bars(repaired[:REASONS])}')
    return "".join(parts)


def render_examples(rejected: Rejected | None, reason: str) -> str:
    """Return cards of the examples of a reason, or "" without any."""
    cards = []
    for line in rejected.examples.get(reason, ()) if rejected else ():
        origin = [
            f"{key} {clip_text(as_text(line[key]), 40)}" for key in ("request", "item") if line.get(key) is not None
        ]
        similarity = as_number(line.get("similarity"))
        if similarity is not None:
            origin.append(f"similarity {similarity:.2f}")
        head = " · ".join(["instruction" if as_text(line.get("instruction")).strip() else "no instruction", *origin])
        parts = [("instruction", head), ("duplicate_of", "duplicate of"), ("detail", "detail")]
        parts += [("input", "input"), ("output", "output")]
        fields = [render_field(label, line.get(key), key == "instruction") for key, label in parts]
        cards.append(f"<article>{''.join(fields)}</article>")
    return f'<div class="list">{"".join(cards)}</div>' if cards else ""


def render_yield(rows: Sequence[Row], rejected: Rejected | None) -> str:
    """Return the chart of rows kept and duplicates rejected per request, over the run. "" for under 4 requests."""
    kept = Counter(row.request for row in rows if row.request is not None)
    lost: Counter[float] = rejected.requests if rejected else Counter()
    duplicates = rejected.duplicates if rejected else lost
    requests = sorted(kept.keys() | lost.keys())
    if not kept or len(requests) < 4:
        return ""
    size = -(-len(requests) // STRETCHES)
    points: list[Point] = []
    for start in range(0, len(requests), size):
        stretch = requests[start : start + size]
        good, bad, same = (sum(of[request] for request in stretch) for of in (kept, lost, duplicates))
        tip = f"requests {stretch[0]:,g} to {stretch[-1]:,g}: {format_count(good)} kept"
        values = [good / len(stretch)]
        if rejected:
            tip += f", {format_count(same)} duplicates, {format_count(bad - same)} rejected otherwise"
            tip += f"; {format_percent(good, good + bad)} kept"
            values.append(same / len(stretch))
        points.append((tip, values))
    names = ["kept", "rejected as duplicates"] if rejected else ["kept"]
    note = "A falling line of rows kept and a rising one of duplicates say that the run is saturating."
    without = len(rows) - kept.total()
    note += f" {format_rows(without)} without a request number left out." if without else ""
    return draw_curves("Rows per request", points, names, "rows per request", note)


def find_spending(rows: Sequence[Row], run: RunRecord) -> tuple[float | None, str]:
    """Return the dollars of the run and their source, "" for run.json; (None, "") if they are unknown."""
    spent = as_number(run.cost.get("spent_usd"))
    if spent is not None:
        return spent, ""
    known = [row.usd for row in rows if row.usd is not None]
    return (sum(known), "sum over the rows kept") if known else (None, "")


def render_costs(rows: Sequence[Row], run: RunRecord) -> str:
    """Return the tables of dollars, tokens and prices, and of the answers of each model."""
    cost, (spent, source) = run.cost, find_spending(rows, run)
    kept, requests = as_number(run.counts.get("kept")) or len(rows), as_number(run.counts.get("requests"))
    lines: dict[str, str] = {}
    if spent is not None:
        lines["spent"] = format_dollars(spent) + (f" ({source})" if source else "")
    for name, key in (("uncertain", "uncertain_usd"), ("cap", "cap_usd")):
        if value := as_number(cost.get(key)):
            lines[name] = format_dollars(value)
    if spent and kept:
        lines["per 1,000 rows kept"] = format_dollars(1000 * spent / kept)
    if spent and requests:
        lines["per request"] = format_dollars(spent / requests)
    for way, name in (("input", "in"), ("output", "out")):
        tokens, price = as_number(cost.get(f"{way}_tokens")), as_number(cost.get(f"usd_per_million_{name}"))
        if tokens is not None:
            lines[f"{way} tokens"] = format_count(tokens)
        if price is not None:
            lines[f"{way} price"] = f"{format_dollars(price)} per million tokens"
    if isinstance(cost.get("batch"), bool):
        lines["batch prices"] = "yes" if cost["batch"] else "no"
    answers = [(clip_text(as_text(name), 80), n, "") for name, value in run.models.items() if (n := as_number(value))]
    left = f"<div><h3>Dollars and tokens</h3>{render_table(lines)}</div>" if lines else ""
    side = ""
    if answers:
        bars = draw_bars(answers[:REASONS], sum(n for _, n, _ in answers), "narrow")
        side = f"<div><h3>Answers by model</h3>{bars}</div>"
    return f'<div class="halves">{left}{side}</div>' if left else ""


def render_samples(rows: Sequence[Row]) -> str:
    """Return cards of some rows, drawn with a fixed seed, in the order of the file. Long texts are folded."""
    cards: list[str] = []
    size = 0
    for index in sorted(random.Random(0).sample(range(len(rows)), min(SAMPLE_ROWS, len(rows)))):
        row = rows[index]
        head = f'<span class="label">row {format_count(index + 1)}</span>{render_folded(row.instruction)}'
        card = f'<div class="prompt">{head}</div>'
        if row.input.strip():
            card += f'<div><span class="label">input</span>{render_folded(row.input)}</div>'
        card += f'<div><span class="label">output</span>{render_folded(row.output)}</div>'
        size += len(card.encode("utf-8", "replace"))
        if size > SAMPLE_BYTES and cards:
            break
        cards.append(f"<article>{card}</article>")
    note = f"{format_count(len(cards))} of {format_count(len(rows))} rows, drawn with a fixed seed."
    if len(cards) == len(rows):
        note = "All rows."
    return f'<p class="note">{note}</p>{"".join(cards)}' if cards else ""


def render_settings(run: RunRecord) -> str:
    """Return the tables of the run's settings and versions."""
    parts = [
        f"<div><h3>{name}</h3>{render_table(entries)}</div>"
        for name, entries in (("Settings", run.settings), ("Versions", run.versions))
        if entries
    ]
    return f'<div class="halves">{"".join(parts)}</div>' if parts else ""

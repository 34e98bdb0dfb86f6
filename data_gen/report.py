"""report.html: one page that shows an instruction dataset; it loads nothing else.

    python -m data_gen.report out/dataset.jsonl

FILE is Alpaca JSON or JSONL. rejected.jsonl and run.json of a generation run are used where they lie beside it."""

import random
import re
from collections import Counter
from html import escape
from pathlib import Path

from data_gen.base.cli import Parser, UsageError, read_rows, run, write_whole
from data_gen.base.language import LANGUAGES, guess
from data_gen.dedup import tokenize
from data_gen.page.charts import (
    EXAMPLE_CHARS,
    SCRIPT,
    STYLE,
    bars,
    clip,
    clock,
    count,
    curves,
    dollars,
    field,
    folded,
    histogram,
    marked,
    passage,
    percent,
    rows_of,
    sha256,
    sunburst,
    table,
)
from data_gen.page.figures import (
    LIMIT,
    OBJECTS_SHOWN,
    clean,
    even_bins,
    kinds,
    median,
    nearest,
    number,
    percentile,
    read_rejected,
    read_run,
    roots,
    text_of,
    whole_bins,
)

SAMPLE_ROWS, PAIRS, ATTRACTORS, REASONS = 30, 12, 10, 40  # shown at most; of reasons the rest is counted
SAMPLE_BYTES = 500_000  # of all samples together; the page stays under 2 MB
STRETCHES = 40  # of the run, in the chart of its yield


def write_report(path, out=None) -> Path:
    """Writes a page about the rows of a .json or .jsonl file: the same bytes for the same files. Returns its path.

    Raises DataError for a file without rows of instructions, UsageError for an `out` that cannot be."""
    path = Path(path)
    out = Path(out) if out else path.with_name("report.html")
    beside = [path, path.with_name("rejected.jsonl"), path.with_name("run.json")]
    if out.resolve() in [file.resolve() for file in beside]:
        raise UsageError(f"--out: got {out}, which the report is made from; wanted another file")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}; make it first")
    rows = clean(read_rows(path), path)
    rejected = read_rejected(beside[1])
    page = render(path.name, rows, rejected, read_run(beside[2]))
    write_whole(out, [page.encode("utf-8", "replace").decode()])
    return out


def render(name, rows, rejected, told):
    tokens = [tokenize(row.instruction) for row in rows]
    words = {
        "instruction": sorted(map(len, tokens)),
        "input": sorted(len(tokenize(row.input)) for row in rows if row.input.strip()),
        "output": sorted(len(tokenize(row.output)) for row in rows),
    }
    languages = [guess(row.instruction) or guess("\n".join(row[:3])) for row in rows]
    sections = {
        "lengths": ("Lengths", lengths(len(rows), words)),
        "content": ("What the instructions ask for", content(rows, languages)),
        "rejections": ("Rejected and repaired", rejections(rejected, told["counts"])),
        "duplicates": ("Duplicates and near misses", similarity(rows, tokens, rejected)),
        "yield": ("Yield over the run", yield_over_run(rows, rejected)),
        "cost": ("Cost", costs(rows, told)),
        "sample": ("Sample", samples(rows)),
        "settings": ("Settings", settings(told)),
    }
    sections = {key: section for key, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    body = "\n".join(
        f'<section><h2 id="{key}">{title}</h2>\n{html}</section>' for key, (title, html) in sections.items()
    )
    policy = f"default-src 'none'; style-src '{sha256(STYLE)}'; script-src '{sha256(SCRIPT)}'; form-action 'none'"
    title = clip(f"{name}: {rows_of(len(rows))}", EXAMPLE_CHARS)
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
<p>Cria instruction dataset{state(rows, told)}</p>
<nav aria-label="Parts of the page">{links}</nav>
</header>
{key_figures(rows, words, rejected, told)}
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def state(rows, told):
    parts = []
    if told.get("status") is not None:
        status = clip(text_of(told["status"]), 100)
        parts.append(f'<span class="{"" if status == "done" else "open"}">{escape(status)}</span>')
    if told.get("started") is not None:
        parts.append(f"started {escape(clip(moment(text_of(told['started'])), 60))}")
    if number(told.get("seconds")):
        parts.append(f"took {clock(number(told['seconds']))}")
    models = list(told["models"]) or sorted({row.model for row in rows if row.model})
    parts += [escape(clip(model, 80)) for model in models[:3]]
    return "".join(f" · {part}" for part in parts)


def moment(iso):
    """2025-03-01T10:00:59+00:00 as 2025-03-01 10:00 UTC."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?", iso)
    zone = {"Z": " UTC", "+00:00": " UTC", None: ""}.get(found[5], f" {found[5]}") if found else ""
    return f"{found[1]} {found[2]}{zone}" if found else iso


def key_figures(rows, words, rejected, told):
    def figure(label, value, note=""):
        note = f"<small>{escape(note)}</small>" if note else ""
        return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{note}</dd></div>"

    counts, n = told["counts"], len(rows)
    kept, items, requests = (number(counts.get(key)) for key in ("kept", "items", "requests"))
    other = f"run.json counts {count(kept)}" if kept is not None and kept != n else ""
    inputs = len(words["input"])
    parts = [figure("Rows", count(n), other), figure("With input", percent(inputs, n), count(inputs))]
    for name, found in words.items():
        note = "where there is one" if name == "input" else ""
        parts.append(figure(f"Median {name}", f"{median(found):,g} words" if found else "-", note))
    if kept is None or items is None:
        kept, items = n, n + rejected.counts.total() if rejected else 0
    if items:
        parts.append(figure("Yield", percent(kept, items), f"{count(kept)} of {count(items)} items kept"))
    if requests is not None:
        failed = number(counts.get("failed_requests"))
        parts.append(figure("Requests", count(requests), f"{count(failed)} failed" if failed else ""))
    spent, source = spending(rows, told)
    if spent is not None:
        uncertain = number(told["cost"].get("uncertain_usd"))
        parts.append(figure("Spent", dollars(spent), f"and {dollars(uncertain)} uncertain" if uncertain else source))
        if kept:
            parts.append(figure("Per 1,000 rows", dollars(1000 * spent / kept)))
    return f'<dl class="figures">{"".join(parts)}</dl>'


def spending(rows, told):
    """Dollars of the run, and where the number comes from if not from run.json; (None, "") if nothing tells."""
    spent = number(told["cost"].get("spent_usd"))
    known = [row.usd for row in rows if row.usd is not None]
    return (spent, "") if spent is not None else (sum(known), "sum over the rows kept") if known else (None, "")


def lengths(n, words):
    charts = []
    for title, found in words.items():
        some = [k for k in found if k]
        if some:
            bins, log = whole_bins(some)
            middle, most = median(found), percentile(found, 0.95)  # a whole number k is drawn from k to k + 1
            marks = [(middle + 0.5, f"median {middle:,g}"), (most + 0.5, f"95% up to {count(most)}")]
            notes = [f"longest {count(some[-1])} words"]
            notes += [f"{rows_of(n - len(found))} without"] if len(found) < n else []
            notes += [f"{rows_of(len(found) - len(some))} of no words"] if len(some) < len(found) else []
            charts.append(histogram(title.capitalize(), bins, "words", marks, log, "; ".join(notes)))
    return f'<div class="small">{"".join(charts)}</div>' if charts else ""


def content(rows, languages):
    if not rows:
        return ""
    english = [row.instruction for row, code in zip(rows, languages, strict=True) if code in ("", "en")]
    title = (
        '<h3>Kinds of rows</h3><p class="note">Exact counts of patterns; a row may be of several kinds, or none.</p>'
    )
    parts = [f"<div>{title}{bars([(*kind, '') for kind in kinds(rows)], len(rows), 'narrow')}</div>"]
    names = [(LANGUAGES.get(code, "undetermined"), n, "") for code, n in Counter(languages).most_common()]
    if len(names) > 12:
        names = [*names[:11], (f"{len(names) - 11} others", sum(n for _, n, _ in names[11:]), "")]
    title = '<h3>Languages</h3><p class="note">A guess from letters and common words of the instruction, or of the '
    title += "whole row where that is too short to tell.</p>"
    parts.append(f"<div>{title}{bars(names, len(rows), 'narrow')}</div>")
    return f'{verbs_and_objects(english, len(rows))}<div class="halves">{"".join(parts)}</div>'


def verbs_and_objects(english, n):
    verbs, with_verb, with_both = roots(english)
    left_out = f"{rows_of(n - len(english))} in other languages are left out." if len(english) < n else ""
    if not verbs:
        return f'<p class="note">Verbs and their objects: none found. {left_out}</p>'
    drawn = sum(of for *_, nouns in verbs for _, of in nouns)
    note = f"""A heuristic from English word lists, without a parser: the first imperative verb and the head of the
        words after it, both found in {count(with_both)} of {count(len(english))} instructions; {count(with_verb)} have
        a verb, questions mostly none. Drawn are the {len(verbs)} commonest verbs with at most {OBJECTS_SHOWN}
        objects each, the commonest: {rows_of(drawn)}, {percent(drawn, n)} of the dataset. {left_out}"""
    return sunburst("Verbs and their objects", verbs, " ".join(note.split())) + verb_table(verbs)


def verb_table(verbs):
    cells = "".join(
        f'<tr><th>{escape(verb)}</th><td class="n">{count(k)}</td><td>'
        f"{escape(', '.join(f'{noun} {count(of)}' for noun, of in nouns))}</td></tr>"
        for verb, k, nouns in verbs
    )
    head = '<tr><th>verb</th><th class="n">rows with an object</th><th>commonest objects</th></tr>'
    cells = f"<table><thead>{head}</thead><tbody>{cells}</tbody></table>"
    return f'<details class="more"><summary>As a table</summary>{cells}</details>'


def rejections(rejected, counts):
    told = (
        {text_of(key): number(n) for key, n in counts["rejected"].items()}
        if isinstance(counts.get("rejected"), dict)
        else {}
    )
    told = Counter({reason: n for reason, n in told.items() if n})
    found = rejected.counts if rejected else told
    parts, notes = [], []
    if found:
        total, ranked = found.total(), sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
        rows = [(clip(reason, 120), n, examples_of(rejected, reason)) for reason, n in ranked[:REASONS]]
        if len(ranked) > REASONS:
            rows.append((f"{len(ranked) - REASONS} other reasons", sum(n for _, n in ranked[REASONS:]), ""))
        notes.append(f"{count(total)} rejections, each for the first reason that was met; shares are of them.")
        if rejected:
            notes.append("A reason unfolds to a few of them, drawn with a fixed seed.")
        if rejected and told and told != found:
            notes.append(f"run.json counts {count(told.total())}.")
        if rejected and rejected.unreadable:
            notes.append(f"{count(rejected.unreadable)} lines of rejected.jsonl could not be read.")
        parts.append(f'<p class="note">{" ".join(notes)}</p>{bars(rows, total)}')
    repaired = counts.get("repaired") if isinstance(counts.get("repaired"), dict) else {}
    repaired = [(clip(text_of(name), 120), number(n), "") for name, n in repaired.items() if number(n)]
    if repaired:
        repaired.sort(key=lambda pair: -pair[1])
        parts.append(f'<h3 class="apart">Repaired and kept</h3>{bars(repaired[:REASONS])}')
    return "".join(parts)


def examples_of(rejected, reason):
    cards = []
    for line in rejected.examples.get(reason, ()) if rejected else ():
        origin = [f"{key} {clip(text_of(line[key]), 40)}" for key in ("request", "item") if line.get(key) is not None]
        if number(line.get("similarity")) is not None:
            origin.append(f"similarity {number(line['similarity']):.2f}")
        head = " · ".join(["instruction" if text_of(line.get("instruction")).strip() else "no instruction", *origin])
        parts = [("instruction", head), ("duplicate_of", "duplicate of"), ("detail", "detail")]
        parts = [
            field(label, line.get(key), key == "instruction")
            for key, label in [*parts, ("input", "input"), ("output", "output")]
        ]
        cards.append(f"<article>{''.join(parts)}</article>")
    return f'<div class="list">{"".join(cards)}</div>' if cards else ""


def similarity(rows, tokens, rejected):
    """Duplicates that were rejected, and what came closest to being rejected."""
    best, pairs = nearest(tokens)
    left = duplicates(rejected.similarities if rejected else []) + nearest_chart(best)
    right = most_imitated(rejected.attracted if rejected else {})
    halves = "".join(f"<div>{part}</div>" for part in (left, right) if part)
    return f'<div class="halves">{halves}</div>{closest(rows, pairs)}' if halves else ""


def duplicates(similarities):
    if not similarities:
        return ""
    low = LIMIT if min(similarities) >= LIMIT - 1e-6 else 0
    note = f"{rows_of(len(similarities))} rejected as duplicates, by ROUGE-L to the instruction each resembles."
    bins = even_bins(similarities, low, 1, 0.02 if low else 0.05)
    return histogram("Rejected duplicates", bins, "similarity", note=note, show=as_range)


def most_imitated(attracted):
    ranked, rows = sorted(attracted.items(), key=lambda item: (-item[1][0], item[0]))[:ATTRACTORS], []
    for kept, (n, examples) in ranked:
        likes = "".join(
            f'<div><span class="label">{like}</span>{passage(clip(text, EXAMPLE_CHARS))}</div>'
            for like, text in examples
        )
        rows.append((clip(kept, 140), n, f'<div class="list"><article>{likes}</article></div>'))
    note = '<p class="note">Instructions and the number of duplicates that each attracted; the first few unfold.</p>'
    return f"<h3>Most imitated</h3>{note}{bars(rows, 0, 'tall')}" if rows else ""


def as_range(first, end):
    return f"{first:.2f}\u2013{end:.2f}"


def nearest_chart(best):
    if not best:
        return ""
    over = sum(score > LIMIT - 1e-6 for score in best)
    note = f"ROUGE-L of kept instructions to the nearest other one, for a sample of {rows_of(len(best))} against all."
    note += f" {count(over)} of them {'is' if over == 1 else 'are'} at or over the limit of {LIMIT}." if over else ""
    bins, limit = even_bins(best, 0, 1, 0.05), (LIMIT, f"limit {LIMIT}")
    return histogram("Nearest other instruction", bins, "similarity", note=note, show=as_range, limit=limit)


def closest(rows, pairs):
    cards = []
    for score, a, b in pairs[:PAIRS]:
        one, two = clip(rows[a].instruction, EXAMPLE_CHARS), clip(rows[b].instruction, EXAMPLE_CHARS)
        sides = "".join(
            f'<div><span class="label">row {count(at + 1)}</span><div class="text">{marked(text, other)}</div></div>'
            for at, text, other in ((a, one, two), (b, two, one))
        )
        cards.append(f'<article class="pair"><div class="score">{score:.3f}</div>{sides}</article>')
    note = "Near misses in the same sample, each row once. Marked are the words in common, in order."
    head = f'<h3 class="apart">Closest pairs under the limit</h3><p class="note">{note}</p>'
    return f"{head}{''.join(cards)}" if cards else ""


def yield_over_run(rows, rejected):
    kept = Counter(row.request for row in rows if row.request is not None)
    lost = rejected.requests if rejected else Counter()
    requests = sorted(kept.keys() | lost.keys())
    if not kept or len(requests) < 4:
        return ""
    size, points = -(-len(requests) // STRETCHES), []
    for start in range(0, len(requests), size):
        stretch = requests[start : start + size]
        good, bad, same = (
            sum(of[request] for request in stretch) for of in (kept, lost, rejected.duplicates if rejected else lost)
        )
        tip = f"requests {stretch[0]:,g} to {stretch[-1]:,g}: {count(good)} kept"
        tip += (
            f", {count(same)} duplicates, {count(bad - same)} rejected otherwise; {percent(good, good + bad)} kept"
            if rejected
            else ""
        )
        values = [good / len(stretch), same / len(stretch)] if rejected else [good / len(stretch)]
        points.append((tip, values))
    names = ["kept", "rejected as duplicates"] if rejected else ["kept"]
    note = "A falling line of rows kept and a rising one of duplicates say that the run is saturating."
    without = len(rows) - kept.total()
    note += f" {rows_of(without)} without a request number left out." if without else ""
    return curves("Rows per request", points, names, "rows per request", note)


def costs(rows, told):
    cost, (spent, source) = told["cost"], spending(rows, told)
    kept, requests = number(told["counts"].get("kept")) or len(rows), number(told["counts"].get("requests"))
    lines = [("spent", None if spent is None else dollars(spent) + (f" ({source})" if source else ""))]
    lines += [
        (name, number(cost.get(key)) and dollars(number(cost[key])))
        for name, key in (("uncertain", "uncertain_usd"), ("cap", "cap_usd"))
    ]
    lines.append(("per 1,000 rows kept", spent and kept and dollars(1000 * spent / kept)))
    lines.append(("per request", spent and requests and dollars(spent / requests)))
    for way, name in (("input", "in"), ("output", "out")):
        tokens, price = number(cost.get(f"{way}_tokens")), number(cost.get(f"usd_per_million_{name}"))
        lines.append((f"{way} tokens", None if tokens is None else count(tokens)))
        lines.append((f"{way} price", None if price is None else f"{dollars(price)} per million tokens"))
    lines.append(("batch prices", {"True": "yes", "False": "no"}.get(str(cost.get("batch")))))
    lines = [(name, value) for name, value in lines if value]
    answers = [(clip(text_of(name), 80), number(n), "") for name, n in told["models"].items() if number(n)]
    side = (
        f"<div><h3>Answers by model</h3>{bars(answers[:REASONS], sum(n for _, n, _ in answers), 'narrow')}</div>"
        if answers
        else ""
    )
    left = f"<div><h3>Dollars and tokens</h3>{table(dict(lines))}</div>" if lines else ""
    return f'<div class="halves">{left}{side}</div>' if left else ""


def samples(rows):
    """A seeded draw, in the order of the file; long texts are folded."""
    cards, size = [], 0
    for at in sorted(random.Random(0).sample(range(len(rows)), min(SAMPLE_ROWS, len(rows)))):
        row = rows[at]
        parts = [
            ("instruction", row.instruction, ' class="prompt"'),
            ("input", row.input, ""),
            ("output", row.output, ""),
        ]
        card = "".join(
            f'<div{kind}><span class="label">{f"row {count(at + 1)}" if kind else name}</span>{folded(text)}</div>'
            for name, text, kind in parts
            if text.strip() or name != "input"
        )
        size += len(card.encode("utf-8", "replace"))
        if size > SAMPLE_BYTES and cards:
            break
        cards.append(f"<article>{card}</article>")
    note = (
        "All rows."
        if len(cards) == len(rows)
        else f"{count(len(cards))} of {count(len(rows))} rows, drawn with a fixed seed."
    )
    return f'<p class="note">{note}</p>{"".join(cards)}' if cards else ""


def settings(told):
    parts = [
        (name, table(told[key])) for name, key in (("Settings", "settings"), ("Versions", "versions")) if told[key]
    ]
    return (
        f'<div class="halves">{"".join(f"<div><h3>{name}</h3>{html}</div>" for name, html in parts)}</div>'
        if parts
        else ""
    )


def main(argv=None):
    parser = Parser("report", "Writes an HTML page about an instruction dataset.")
    parser.add_argument("file", metavar="FILE", help="Alpaca .json or .jsonl")
    parser.add_argument("--out", metavar="PATH", help="the page; without it report.html beside FILE")
    args = parser.parse_args(argv)
    print(write_report(args.file, args.out))


if __name__ == "__main__":
    run(main)

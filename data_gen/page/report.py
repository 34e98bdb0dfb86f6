"""The report: one HTML page about an instruction dataset, which loads nothing else."""

import re
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from data_gen.base.cli import UsageError, print_text
from data_gen.base.files import write_atomically
from data_gen.base.language import guess_language
from data_gen.page.blocks import EXAMPLE_CHARS
from data_gen.page.document import render_document, render_figure
from data_gen.page.formatting import (
    as_number,
    as_text,
    clip_text,
    format_count,
    format_dollars,
    format_duration,
    format_percent,
    format_rows,
)
from data_gen.page.row_files import read_any_rows
from data_gen.page.run_files import Rejected, Row, RunRecord, parse_rows, read_rejected, read_run
from data_gen.page.sections import (
    find_spending,
    render_content,
    render_costs,
    render_lengths,
    render_rejections,
    render_samples,
    render_settings,
    render_yield,
)
from data_gen.page.similarity import render_similarity
from data_gen.rows.tokens import tokenize


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write a page about the rows of a file, and return its path. Equal files give equal bytes.

    Raise DataError for a file without rows of instructions, UsageError for a path that the page cannot have.
    """
    path = Path(path)
    out = Path(out) if out else path.with_name("report.html")
    beside = [path, path.with_name("rejected.jsonl"), path.with_name("run.json")]
    if out.resolve() in [file.resolve() for file in beside]:
        raise UsageError(f"--out: got {out}, which the report is made from; wanted another file")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}; make it first")
    found, n_bad = read_any_rows(path)
    if n_bad:
        print_text(
            f"warning: {path}: {n_bad} of {len(found) + n_bad} rows are bad, and left out of the page", sys.stderr
        )
    rows = parse_rows(found)
    rejected = read_rejected(beside[1])
    run = read_run(beside[2])
    if run.fault:
        print_text(f"warning: {path.parent}: {run.fault}", sys.stderr)
    page = render_page(path.name, rows, rejected, run, n_bad)
    write_atomically(out, [page.encode("utf-8", "replace").decode()])
    return out


def render_page(name: str, rows: Sequence[Row], rejected: Rejected | None, run: RunRecord, n_bad: int = 0) -> str:
    """Return the HTML of the whole page. name is that of the file of rows, of which n_bad could not be read."""
    tokens = [tokenize(row.instruction) for row in rows]
    lengths = {
        "instruction": sorted(map(len, tokens)),
        "input": sorted(len(tokenize(row.input)) for row in rows if row.input.strip()),
        "output": sorted(len(tokenize(row.output)) for row in rows),
    }
    languages = [guess_language(row.instruction) or guess_language("\n".join(row[:3])) for row in rows]
    sections = {
        "lengths": ("Lengths", render_lengths(len(rows), lengths)),
        "content": ("What the instructions ask for", render_content(rows, languages)),
        "rejections": ("Rejected and repaired", render_rejections(rejected, run.counts)),
        "duplicates": ("Duplicates and near misses", render_similarity(rows, tokens, rejected)),
        "yield": ("Yield over the run", render_yield(rows, rejected)),
        "cost": ("Cost", render_costs(rows, run)),
        "sample": ("Sample", render_samples(rows)),
        "settings": ("Settings", render_settings(run)),
    }
    title = clip_text(f"{name}: {format_rows(len(rows))}", EXAMPLE_CHARS)
    lead = f"Cria instruction dataset{render_state(rows, run)}"
    return render_document(title, lead, render_key_figures(rows, lengths, rejected, run, n_bad), sections)


def render_state(rows: Sequence[Row], run: RunRecord) -> str:
    """Return the line under the title: status, start, duration and models of the run."""
    parts = []
    if run.fault:
        parts.append(f'<span class="open">{escape(clip_text(run.fault, 120))}</span>')
    if run.status is not None:
        status = clip_text(as_text(run.status), 100)
        parts.append(f'<span class="{"" if status == "done" else "open"}">{escape(status)}</span>')
    if run.started is not None:
        parts.append(f"started {escape(clip_text(format_moment(as_text(run.started)), 60))}")
    if seconds := as_number(run.seconds):
        parts.append(f"took {format_duration(seconds)}")
    models = list(run.models) or sorted({row.model for row in rows if row.model})
    parts += [escape(clip_text(model, 80)) for model in models[:3]]
    return "".join(f" · {part}" for part in parts)


def format_moment(iso: str) -> str:
    """Return a time such as 2025-03-01T10:00:59+00:00 as 2025-03-01 10:00 UTC, and any other text as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?", iso)
    if not found:
        return iso
    zone = {"Z": " UTC", "+00:00": " UTC", None: ""}.get(found[5], f" {found[5]}")
    return f"{found[1]} {found[2]}{zone}"


def render_key_figures(
    rows: Sequence[Row], lengths: dict[str, list[int]], rejected: Rejected | None, run: RunRecord, n_bad: int
) -> str:
    """Return the key figures at the top of the page. lengths are the sorted lengths of each field in words."""
    counts, n = run.counts, len(rows)
    kept, items, requests = (as_number(counts.get(key)) for key in ("kept", "items", "requests"))
    other = f"run.json counts {format_count(kept)}" if kept is not None and kept != n else ""
    inputs = len(lengths["input"])
    parts = [
        render_figure("Rows", format_count(n), other),
        render_figure("With input", format_percent(inputs, n), format_count(inputs)),
    ]
    if n_bad:
        parts.append(render_figure("Bad rows", format_count(n_bad), "left out: not readable, or of no known kind"))
    for name, found in lengths.items():
        note = "where there is one" if name == "input" else ""
        parts.append(render_figure(f"Median {name}", f"{statistics.median(found):,g} words" if found else "-", note))
    if kept is None or items is None:
        kept, items = n, n + rejected.counts.total() if rejected else 0
    if items:
        note = f"{format_count(kept)} of {format_count(items)} items kept"
        parts.append(render_figure("Yield", format_percent(kept, items), note))
    if requests is not None:
        failed = as_number(counts.get("failed_requests"))
        note = f"{format_count(failed)} failed" if failed else ""
        parts.append(render_figure("Requests", format_count(requests), note))
    spent, note = find_spending(rows, run)
    if spent is not None:
        if uncertain := as_number(run.cost.get("uncertain_usd")):
            note = f"and {format_dollars(uncertain)} uncertain"
        parts.append(render_figure("Spent", format_dollars(spent), note))
        if kept:
            parts.append(render_figure("Per 1,000 rows", format_dollars(1000 * spent / kept)))
    return f'<dl class="figures">{"".join(parts)}</dl>'

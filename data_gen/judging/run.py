"""A run of the judge: requests out, verdicts in, and what is written at its end."""

import asyncio
import datetime
import importlib.metadata
import json
import platform
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_gen.api.attempt import Limits, RequestBuilder
from data_gen.api.client import Client
from data_gen.api.collector import Collector
from data_gen.api.prices import PICO, Budget, Price
from data_gen.api.progress import Progress
from data_gen.api.rate import Rate
from data_gen.api.running import handle_stop_signals
from data_gen.base.cli import Failure, Stopped
from data_gen.base.files import write_atomically
from data_gen.judging.annotations import name_annotator, write_annotations
from data_gen.judging.answers import Questions
from data_gen.judging.comparisons import Comparisons, VerdictLedger, compute_prompt_hash
from data_gen.judging.humans import Vote, summarize_votes
from data_gen.judging.report import Findings, render_page
from data_gen.judging.statistics import compute_figures
from data_gen.judging.verdicts import VerdictKeeper, join_verdicts
from data_gen.rows.run_record import describe_cost, describe_settings


@dataclass(frozen=True)
class Ending:
    """How a run ended: its status, its cap in picodollars, and its seconds."""

    status: str
    cap: int | None
    seconds: float


def ask_judge(
    options: Namespace, ledger: VerdictLedger, keeper: VerdictKeeper, builder: RequestBuilder, key: str
) -> tuple[str, Failure | None]:
    """Send what has no verdict yet. Return the status and the failure that ended the run."""
    totals = ledger.compute_totals()
    cap = None if options.max_usd is None else int(options.max_usd * PICO)
    with Progress(options.quiet) as progress:
        if totals.answers:
            progress.print_line(f"going on from {totals.answers:,} answers in {ledger.path}")
        client = Client(options.base_url, key, options.timeout)
        rate = Rate(options.concurrency, options.backoff)
        limits = Limits(options.patience, options.max_attempts)
        budget = Budget(cap, totals.spent, totals.uncertain)
        collector = Collector(ledger, keeper, client, rate, budget, builder, limits, progress)
        try:
            asyncio.run(run_requests(collector))
        except Failure as failure:
            return "failed", failure
        finally:
            collector.take_rest()
    if keeper.is_full:
        return "done", None
    done = f"{len(keeper.kept_by_request):,} of {keeper.wanted:,} answers of the judge"
    if collector.status == "stopped":
        return "stopped", Stopped(f"stopped by a signal with {done}; the same command goes on")
    return collector.status, Failure(f"{done}: {collector.status}")


async def run_requests(collector: Collector) -> None:
    """Send requests, stopping at a signal."""
    handle_stop_signals(collector)
    try:
        await collector.run()
    finally:
        await collector.client.close()


def write_results(
    options: Namespace,
    ledger: VerdictLedger,
    keeper: VerdictKeeper,
    questions: Questions,
    comparisons: Comparisons,
    votes: Sequence[Vote],
    price: Price,
    ending: Ending,
) -> tuple[Findings, list[Path]]:
    """Write annotations, rejected.jsonl, run.json and report.html. Return the findings and the main files."""
    judged = [join_verdicts(pair, keeper.verdicts) for pair in comparisons.pairs]
    figures = compute_figures(questions.names, judged, list(keeper.models), options.seed)
    humans = summarize_votes(votes, questions, judged, options.seed)
    record = describe_run(options, ledger, keeper, questions, price, ending)
    record["results"] = figures.describe()
    record["humans"] = [asdict(one) for one in humans]
    paths = write_annotations(options.out, judged, questions, options.judge, ledger.read_seconds())
    keeper.write_losses(options.out, comparisons)
    write_atomically(options.out / "run.json", [json.dumps(record, indent=1) + "\n"])
    findings = Findings(questions, judged, figures, humans, keeper.rejected, record)
    page = render_page(findings)
    write_atomically(options.out / "report.html", [page.encode("utf-8", "replace").decode()])
    return findings, [*paths, options.out / "report.html"]


def describe_run(
    options: Namespace,
    ledger: VerdictLedger,
    keeper: VerdictKeeper,
    questions: Questions,
    price: Price,
    ending: Ending,
) -> dict[str, Any]:
    """Return the content of run.json but for the results: status, judge, settings, counts, cost, versions."""
    totals = ledger.compute_totals()
    started = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=ending.seconds)
    return {
        "status": ending.status,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(ending.seconds, 3),
        "judge": {
            "model": options.judge,
            "answered_as": dict(keeper.models.most_common()),
            "annotator": name_annotator(options.judge),
            "prompt_sha256": compute_prompt_hash(),
        },
        "settings": describe_settings(options),
        "counts": {
            "questions": len(questions.instructions),
            "questions_left_out": questions.dropped,
            "requests": keeper.wanted,
            "verdicts": len(keeper.rows),
            "rejected": dict(keeper.rejected.most_common()),
            "attempts": totals.attempts,
        },
        "cost": describe_cost(totals, ending.cap, price),
        "versions": {"python": platform.python_version(), "openai": importlib.metadata.version("openai")},
    }

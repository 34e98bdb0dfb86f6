"""Builds an instruction dataset over any OpenAI-compatible API: resumable, capped in cost, de-duplicated exactly.

python -m data_gen.generate --model gpt-5.6-luna --max-usd 20 --out out/data
python -m data_gen.generate --base-url http://localhost:8000/v1 --model my-model --price-in 0 --price-out 0
python -m data_gen.generate --model gpt-5.4 --batch --max-usd 80 --rows 52000 --out out/data

The same command resumes a run that was stopped or killed. A request whose answer was recorded is not sent again.
"""

import asyncio
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from data_gen.api.attempt import Limits, RequestBuilder
from data_gen.api.batch import end_batches, run_batches
from data_gen.api.client import Client, find_api_key
from data_gen.api.collector import Collector
from data_gen.api.dialect import Sampling
from data_gen.api.flags import (
    add_request_flags,
    add_run_flags,
    check_language,
    check_run_flags,
    parse_count,
    parse_seconds,
)
from data_gen.api.ledger import Ledger, Totals
from data_gen.api.prices import PICO, Budget, Price, find_price, format_usd, read_price_table, warn_of_end
from data_gen.api.progress import Progress, format_clock
from data_gen.api.prompt import Prompter, read_seed_tasks
from data_gen.api.rate import Rate
from data_gen.api.running import check_settings, handle_stop_signals, interrupt_at_stop_signals
from data_gen.base.cli import Failure, Parser, Stopped, UsageError, print_text, run_command
from data_gen.base.files import write_atomically
from data_gen.page.report import write_report
from data_gen.rows.contamination import Decontaminator
from data_gen.rows.curator import Curator
from data_gen.rows.run_record import describe_run, format_ranges


def build_parser() -> Parser:
    """Return the parser of the command line."""
    flags = Parser("generate", __doc__)
    add_request_flags(flags)
    add = flags.add_argument
    add("--out", type=Path, default=Path("out/data"), help="folder of the ledger, the dataset and the report")
    add("--batch", action="store_true", help="the Batch API: half the price, answers within a day")
    add("--batch-tokens", type=parse_count, help="prompt tokens enqueued at most, where your limit is known")
    add("--poll", type=parse_seconds, default=30, help="seconds between two looks at a batch")
    add("--decontaminate", nargs="+", type=Path, default=[], help="files of evaluation prompts that no row may match")
    add_run_flags(flags)
    return flags


def check_options(options: Namespace) -> None:
    """Raise UsageError for a command line that cannot work."""
    if not options.model and not options.replay:
        raise UsageError("--model is missing; pass the model's name at the server")
    check_language(options.language)
    check_run_flags(options)


def main(argv: list[str]) -> None:
    """Generate or replay a dataset, and write it with its record and report."""
    options = build_parser().parse_args(argv)
    interrupt_at_stop_signals()
    check_options(options)
    seeds = read_seed_tasks(options.seed_tasks)
    decontaminator = Decontaminator(options.decontaminate) if options.decontaminate else None
    curator = Curator(options.rows, seeds, options.language, decontaminator)
    started = time.monotonic()
    failure: Failure | None = None
    if options.replay:
        ledger, price, budget = Ledger(options.out, create=False), Price(0, 0), Budget(None)
        status = replay_ledger(ledger, curator, options.quiet)
    else:
        table = read_price_table(options.prices)
        price = find_price(options.model, options.base_url, table, options.price_in, options.price_out)
        warn_of_end(options.model, options.base_url, table)
        key = find_api_key(options.base_url, os.environ, options.api_key_env)
        ledger = Ledger(options.out)
        prompter = Prompter(seeds, options.seed, options.tasks_per_request, options.examples, options.language)
        sampling = Sampling(options.model, options.max_output_tokens, options.temperature, options.extra)
        builder = RequestBuilder(prompter, sampling, price)
        batch_builder = RequestBuilder(prompter, sampling, price.scale(table.batch))
        status, budget, failure = generate_rows(options, ledger, curator, builder, batch_builder, key)
    seconds = time.monotonic() - started
    try:
        curator.write_files(options.out)
        totals, missing = ledger.compute_totals(), list_missing(ledger, curator)
        record = describe_run(options, curator, totals, status, budget.cap, price, seconds)
        record["counts"]["missing_requests"] = format_ranges(missing)
        write_atomically(options.out / "run.json", [json.dumps(record, indent=1) + "\n"])
        report = write_report(options.out / "dataset.jsonl", options.out / "report.html")
        print_summary(curator, totals, missing, seconds, [options.out / "dataset.json", report])
    except OSError as error:
        why = f"the dataset could not be written: {error}; the ledger is whole, the same command writes it"
        failure = failure or Failure(why)
    ledger.close()
    if failure:
        raise failure


def generate_rows(
    options: Namespace,
    ledger: Ledger,
    curator: Curator,
    builder: RequestBuilder,
    batch_builder: RequestBuilder,
    key: str,
) -> tuple[str, Budget, Failure | None]:
    """Send requests until the dataset is full or the run ends. Return the status, the budget and a failure."""
    check_settings(ledger, builder, options.allow_changed)
    totals = ledger.compute_totals()
    cap = None if options.max_usd is None else int(options.max_usd * PICO)
    budget = Budget(cap, totals.spent, totals.uncertain)
    with Progress(options.quiet) as progress:
        if totals.answers:
            progress.print_line(f"going on from {totals.answers:,} answers in {ledger.path}")
        client = Client(options.base_url, key, options.timeout)
        rate = Rate(options.concurrency, options.backoff)
        limits = Limits(options.patience, options.max_attempts, options.poll, options.batch_tokens)
        collector = Collector(ledger, curator, client, rate, budget, builder, limits, progress)
        try:
            asyncio.run(run_requests(collector, batch_builder, options.batch))
        except Failure as failure:
            collector.take_rest()
            return "failed", budget, failure
    if curator.is_full:
        return "done", budget, None
    collector.take_rest()
    rows = f"{len(curator.rows):,} of {options.rows:,} rows"
    if collector.status == "stopped":
        return "stopped", budget, Stopped(f"stopped by a signal with {rows}; the same command goes on")
    return collector.status, budget, Failure(f"{rows}: {collector.status}")


async def run_requests(collector: Collector, batch_builder: RequestBuilder, is_batch: bool) -> None:
    """Send requests one by one or in batches, stopping at a signal."""
    handle_stop_signals(collector)
    try:
        if is_batch:
            await collector.run(until=lambda: collector.is_dialect_known)
            await run_batches(collector, batch_builder)
        else:
            await end_batches(collector, batch_builder)
            await collector.run()
    finally:
        await collector.client.close()


def replay_ledger(ledger: Ledger, curator: Curator, quiet: bool) -> str:
    """Give the outcomes of a ledger to the curator. Return the status."""
    with Progress(quiet) as progress:
        for entry in progress.show_reading(ledger.read_outcomes(), ledger.compute_totals().answers, curator):
            curator.add_outcome(entry)
    return "done" if curator.is_full and not list_missing(ledger, curator) else "replayed"


def list_missing(ledger: Ledger, curator: Curator) -> list[int]:
    """Return the requests that a dataset lacks: of a full one those before the last that it used, else all."""
    return ledger.list_missing(curator.last_request if curator.is_full else None)


def print_summary(curator: Curator, totals: Totals, missing: list[int], seconds: float, files: list[Path]) -> None:
    """Print rows, money, missing requests, the commonest reasons for rejection, and the files that were written."""
    share = len(curator.rows) / curator.items if curator.items else 0
    top = ", ".join(f"{reason} {n:,}" for reason, n in curator.rejected.most_common(4))
    spent, uncertain = format_usd(totals.spent), format_usd(totals.uncertain)
    gaps = f"requests without an answer, which the same command asks again: {format_ranges(missing, 20)}\n"
    print_text(
        f"{len(curator.rows):,} rows of {curator.items:,} tasks ({share:.0%}) in {format_clock(seconds)}\n"
        f"{spent} spent on {totals.answers:,} answers, at most {uncertain} on lost ones\n"
        f"{gaps if missing else ''}left out: {top or 'nothing'}\n{'  '.join(map(str, files))}",
        sys.stdout,
    )


if __name__ == "__main__":
    run_command(main)

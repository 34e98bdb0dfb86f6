"""Builds an instruction dataset over any OpenAI-compatible API: resumable, capped in cost, de-duplicated exactly.

python -m data_gen.generate --model gpt-4.1-nano --max-usd 10 --out out/data
python -m data_gen.generate --base-url http://localhost:8000/v1 --model my-model --price-in 0 --price-out 0

Give the same command again after a stop or a kill and it goes on; what was answered is never asked again.
"""

import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import time
from argparse import ArgumentTypeError
from decimal import Decimal
from pathlib import Path

from data_gen.api.batch import end_batches, run_batches
from data_gen.api.client import Client, Sampling, key_for
from data_gen.api.collector import Collector, make_ask
from data_gen.api.ledger import Ledger
from data_gen.api.prices import PICO, Budget, Price, host_of, money, price_of, read_table, usd
from data_gen.api.progress import Progress, clock
from data_gen.api.prompt import Prompter, read_seed_tasks
from data_gen.api.rate import Rate
from data_gen.base.cli import Failure, Parser, Stopped, UsageError, run, tell, write_whole
from data_gen.base.language import LANGUAGES
from data_gen.report import write_report
from data_gen.rows.contamination import Decontaminator
from data_gen.rows.curator import Curator

OPENAI = "https://api.openai.com/v1"


def parser():
    flags = Parser("generate", __doc__.split("\n\n")[0])
    add_request_flags(flags)
    add = flags.add_argument
    add("--out", type=Path, default=Path("out/data"), help="folder of the ledger, the dataset and the report")
    add(
        "--max-usd", type=amount, help="never spend more than this, lost answers counted at the most they can have cost"
    )
    add("--concurrency", type=count, default=32, help="requests in flight at most; the server's limits are found out")
    add("--batch", action="store_true", help="the Batch API: half the price, answers within a day")
    add("--batch-tokens", type=count, help="prompt tokens enqueued at most, where your limit is known")
    add("--poll", type=seconds, default=30, help="seconds between two looks at a batch")
    add("--decontaminate", nargs="+", type=Path, default=[], help="files of evaluation prompts that no row may match")
    add("--timeout", type=seconds, default=600, help="seconds for one answer")
    add("--patience", type=seconds, default=900, help="seconds without any answer after which to stop, resumably")
    add(
        "--max-attempts",
        type=count,
        default=8,
        help="failures of one request, while others get through, before it is left out",
    )
    add("--backoff", type=seconds, default=1, help="seconds before a first retry; they double, at random, up to 60")
    add("--replay", action="store_true", help="only make the dataset anew from the ledger; nothing is sent")
    add("--allow-changed", action="store_true", help="go on with other settings than the ledger was begun with")
    add("--quiet", action="store_true", help="no progress")
    return flags


def add_request_flags(flags):
    """Those that shape and price requests; data_gen.estimate has them too."""
    add = flags.add_argument
    add("--model", type=utf8, help="the model's name at the server")
    add("--rows", type=count, default=52_000, help="rows to keep")
    add("--base-url", default=os.environ.get("OPENAI_BASE_URL") or OPENAI, help="the server; also $OPENAI_BASE_URL")
    add("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    add(
        "--price-in",
        type=amount,
        help="dollars a million input tokens, where the table lacks the model; --batch halves it",
    )
    add("--price-out", type=amount, help="dollars a million output tokens")
    add("--prices", type=Path, help="another table of prices than data_gen/prices.json")
    add("--seed-tasks", type=Path, help="seed tasks of your own: Alpaca's fields, or self-instruct's instances")
    add("--language", default="en", help=f"of the rows: {' '.join(sorted(LANGUAGES))}")
    add("--seed", type=int, default=0, help="of the prompts' random choices")
    add("--tasks-per-request", type=count, default=20, help="tasks that one prompt asks for")
    add("--examples", type=count, default=3, help="seed tasks that one prompt shows")
    add("--temperature", type=degree, default=1.0, help="of sampling, left out where the server refuses it")
    add(
        "--max-output-tokens", type=limit, default=4096, help="of one answer; with the prices, what it can cost at most"
    )
    add(
        "--extra", type=fields, default={}, help='more fields of each request, as JSON: \'{"reasoning_effort": "low"}\''
    )


OURS = ("model", "messages", "n", "stream", "max_tokens", "max_completion_tokens")  # what --extra may not set


def kind(wanted, convert, holds=lambda value: True):
    """A converter of a flag's text whose error says what was wanted."""

    def converted(text):
        try:
            value = convert(text)
            if holds(value):
                return value
        except (ValueError, RecursionError):
            pass
        raise ArgumentTypeError(f"got {text!r}, wanted {wanted}")

    return converted


def json_value(text):
    """Raises ValueError where the text is no JSON, or holds NaN or half a letter, which cannot be sent."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


utf8 = kind("UTF-8", lambda text: text.encode() and text)
count = kind("a whole number of at least 1", int, lambda n: n >= 1)
limit = kind("a whole number from 1 to a million", int, lambda n: 1 <= n <= 10**6)
seconds = kind("seconds above 0", float, lambda s: 0 < s < 1e9)
amount = kind("dollars from 0 to a million", money)
degree = kind("a number from 0 to 2", float, lambda t: 0 <= t <= 2)
fields = kind(
    f"a JSON object without {', '.join(OURS)}",
    json_value,
    lambda value: isinstance(value, dict) and not set(value) & set(OURS),
)


def check(options):
    """Everything that can be known to be wrong before anything is done."""
    if not options.model and not options.replay:
        raise UsageError("--model is missing; pass the model's name at the server")
    host_of(options.base_url)
    check_language(options.language)
    if options.patience <= options.timeout and not options.replay:
        raise UsageError(f"--patience {options.patience:g} is not longer than --timeout {options.timeout:g}")
    if "service_tier" in options.extra and options.price_in is None and not options.replay:
        raise UsageError("--extra: a service_tier has prices of its own; pass its --price-in and --price-out")
    if options.prices and not options.prices.is_file():
        raise UsageError(f"--prices {options.prices} is not there")


def check_language(code):
    if code not in LANGUAGES:
        raise UsageError(f"--language is {code!r}, wanted one of {' '.join(sorted(LANGUAGES))}")


def main(argv):
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check(options)
    seeds = read_seed_tasks(options.seed_tasks)
    decontaminator = Decontaminator(options.decontaminate) if options.decontaminate else None
    curator = Curator(options.rows, seeds, options.language, decontaminator)
    started = time.monotonic()
    if options.replay:
        ledger, price = Ledger(options.out, create=False), Price(0, 0)
        status, budget, failure = replay(ledger, curator, options.quiet), Budget(None), None
    else:
        table = read_table(options.prices)
        price = price_of(options.model, options.base_url, table, options.price_in, options.price_out)
        key = key_for(options.base_url, os.environ, options.api_key_env)
        ledger = Ledger(options.out)
        prices = price, price.times(table.batch)
        status, budget, failure = generate(options, ledger, curator, seeds, prices, key)
    try:
        write_outputs(options, ledger, curator, status, budget.cap, price, time.monotonic() - started)
    except OSError as error:
        why = f"the dataset could not be written: {error}; the ledger is whole, the same command writes it"
        failure = failure or Failure(why)
    ledger.close()
    if failure:
        raise failure


def generate(options, ledger, curator, seeds, prices, key):
    """(status, budget, failure) of a run. prices: of a request of its own, and of one in a batch."""
    prompter = Prompter(seeds, options.seed, options.tasks_per_request, options.examples, options.language)
    sampling = Sampling(options.model, options.max_output_tokens, options.temperature, options.extra)
    check_settings(options, ledger, prompter, sampling)
    totals = ledger.totals()
    cap = None if options.max_usd is None else int(options.max_usd * PICO)
    budget = Budget(cap, totals.spent, totals.uncertain)
    with Progress(options.quiet) as progress:
        if totals.answers:
            progress.say(f"going on from {totals.answers:,} answers in {ledger.path}")
        client = Client(options.base_url, key, options.timeout)
        rate = Rate(options.concurrency, options.backoff)
        asks = [make_ask(prompter, sampling, price) for price in prices]
        collector = Collector(ledger, curator, client, rate, budget, prices[0], asks[0], options, progress)
        try:
            asyncio.run(work(collector, options, asks[1], prices[1]))
        except Failure as failure:
            return "failed", budget, failure
    if curator.full:
        return "done", budget, None
    rows = f"{len(curator.rows):,} of {options.rows:,} rows"
    if collector.status == "stopped":
        return "stopped", budget, Stopped(f"stopped by a signal with {rows}; the same command goes on")
    return collector.status, budget, Failure(f"{rows}: {collector.status}")


async def work(collector, options, batch_ask, batch_price):
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop, collector)
    try:
        if options.batch:
            await collector.run(until=lambda: collector.probed)
            await run_batches(collector, options, batch_ask, batch_price)
        else:
            await end_batches(collector, options, batch_ask, batch_price)
            await collector.run()
    finally:
        await collector.client.close()


def stop(collector):
    """On a first signal, what is in flight is waited for; a second one ends the process: the ledger is whole."""
    if collector.stopping:
        collector.progress.close()
        os._exit(Stopped.exit_code)
    collector.progress.say("stopping: waiting for the answers in flight; once more to leave at once")
    collector.stop()


def replay(ledger, curator, quiet):
    with Progress(quiet) as progress:
        for entry in progress.reading(ledger.done(), ledger.totals().answers, curator):
            if entry.request == len(curator.kept_by_request):
                curator.take(entry)
    return "done" if curator.full else "replayed"


def check_settings(options, ledger, prompter, sampling):
    """A ledger begun with other settings is refused, or goes on with the new ones under --allow-changed."""
    now = prompter.fingerprint() | {
        "model": sampling.model,
        "max_output_tokens": sampling.max_output_tokens,
        "temperature": sampling.temperature,
        "extra": sampling.extra,
    }
    then = ledger.settings().get("requests")
    if then is not None and then != now and not options.allow_changed:
        names = [name for name in now if then.get(name) != now[name]]
        told = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in names)
        raise UsageError(f"{ledger.path} was begun with other settings: {told}; pass another --out, or --allow-changed")
    if then != now:
        ledger.set(requests=now)


def write_outputs(options, ledger, curator, status, cap, price, seconds):
    """The dataset, run.json and the report, and a summary of four lines. cap: in picodollars, or None."""
    curator.write(options.out)
    totals = ledger.totals()
    settings = {
        name: str(value) if isinstance(value, Path | Decimal) else value for name, value in vars(options).items()
    }
    settings["decontaminate"] = [str(path) for path in options.decontaminate]
    settings["base_url"] = re.sub("//[^/]*@", "//", options.base_url)  # a name and password
    started = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds)
    about = {
        "status": status,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "settings": settings,
        "counts": curator.counts() | {"attempts": totals.attempts},
        "cost": {
            "spent_usd": totals.spent / PICO,
            "uncertain_usd": totals.uncertain / PICO,
            "cap_usd": None if cap is None else cap / PICO,
            "input_tokens": totals.input_tokens,
            "output_tokens": totals.output_tokens,
            "usd_per_million_in": price.input / 10**6,
            "usd_per_million_out": price.output / 10**6,
            "batch": options.batch,
        },
        "models": dict(curator.models.most_common()),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("openai", "rapidfuzz")},
    }
    write_whole(options.out / "run.json", [json.dumps(about, indent=1) + "\n"])
    report = write_report(options.out / "dataset.jsonl", options.out / "report.html")
    share = len(curator.rows) / curator.items if curator.items else 0
    top = ", ".join(f"{reason} {n:,}" for reason, n in curator.rejected.most_common(4))
    tell(
        f"{len(curator.rows):,} rows of {curator.items:,} tasks ({share:.0%}) in {clock(seconds)}\n"
        f"{usd(totals.spent)} spent on {totals.answers:,} answers, at most {usd(totals.uncertain)} on lost ones\n"
        f"left out: {top or 'nothing'}\n{options.out / 'dataset.json'}  {report}",
        sys.stdout,
    )


if __name__ == "__main__":
    run(main)

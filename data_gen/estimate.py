"""What a dataset will cost, in requests, tokens, dollars and hours, before the first request.

python -m data_gen.estimate --rows 52000                      # every model of the price table
python -m data_gen.estimate --model gpt-5.4 --batch
python -m data_gen.estimate --model gpt-5.4 --out out/data        # by the answers of a run so far
"""

import json
import math
import statistics
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_gen.api.attempt import RequestBuilder
from data_gen.api.dialect import Dialect, Sampling
from data_gen.api.flags import add_request_flags, check_language, parse_count
from data_gen.api.ledger import LEDGER_NAME, Ledger
from data_gen.api.prices import Price, PriceTable, find_price, format_usd, read_price_table
from data_gen.api.progress import format_clock
from data_gen.api.prompt import Prompter, read_seed_tasks
from data_gen.base.cli import Parser, UsageError, run_command

# Assumed if there is no run to measure.
BYTES_A_TOKEN = 4.3  # of English, in byte-level BPE with a vocabulary of 100K to 200K
TOKENS_A_TASK = 83  # 20 tasks in about 1,660 tokens
KEPT_SHARE = 0.5  # of tasks, after filters and de-duplication, on the way to 52,000 rows
TOKENS_A_SECOND = 60  # of one request
N_PROMPTS = 200  # drawn to measure their size


@dataclass(frozen=True)
class Means:
    """The means over requests."""

    input_tokens: float
    output_tokens: float
    rows: float
    source: str  # where the numbers come from, as a phrase


def build_parser() -> Parser:
    """Return the parser of the command line."""
    flags = Parser("estimate", __doc__)
    add_request_flags(flags)
    flags.add_argument("--out", type=Path, help="folder of a run, whose tokens and yield are taken")
    flags.add_argument("--concurrency", type=parse_count, default=32, help="requests in flight")
    flags.add_argument("--batch", action="store_true", help="at the price of the Batch API")
    return flags


def main(argv: list[str]) -> None:
    """Print an estimate for one model, or for every model of the price table."""
    options = build_parser().parse_args(argv)
    check_language(options.language)
    seeds = read_seed_tasks(options.seed_tasks)
    prompter = Prompter(seeds, options.seed, options.tasks_per_request, options.examples, options.language)
    sampling = Sampling(options.model or "", options.max_output_tokens, options.temperature, options.extra)
    builder = RequestBuilder(prompter, sampling, Price(0, 0))
    means = measure_means(options.out) if options.out else assume_means(builder)
    table = read_price_table(options.prices)
    if options.model:
        prices = {
            options.model: find_price(options.model, options.base_url, table, options.price_in, options.price_out)
        }
    else:
        known = {name: one.usd for name, one in table.models.items() if one.usd}
        prices = {name: find_price(name, options.base_url, table, *usd) for name, usd in known.items()}
    print_estimate(options, means, prices, table, builder)


def assume_means(builder: RequestBuilder) -> Means:
    """Return means computed from the bytes of real prompts and the constants above."""
    bodies = [builder.prepare(number, Dialect()).body for number in range(N_PROMPTS)]
    sizes = [len(json.dumps(body, ensure_ascii=False).encode()) for body in bodies]
    source = (
        f"{N_PROMPTS} prompts at {BYTES_A_TOKEN} bytes a token; {TOKENS_A_TASK} tokens a task, of which half are kept"
    )
    # The server cuts an answer off at max_output_tokens.
    output = min(builder.prompter.n_tasks * TOKENS_A_TASK, builder.sampling.max_output_tokens)
    rows = output / TOKENS_A_TASK * KEPT_SHARE
    return Means(statistics.mean(sizes) / BYTES_A_TOKEN, output, rows, f"assumed: {source}")


def measure_means(folder: Path) -> Means:
    """Return the means of the run in a folder. Raise UsageError if it has no row yet."""
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        kept = about["counts"]["kept"]
        if type(kept) is not int or kept < 0:
            raise ValueError(f"its count of kept rows is {str(kept)[:40]!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder}/run.json tells no rows ({error}); wanted the folder of a run") from error
    ledger = Ledger(folder, create=False)
    totals = ledger.compute_totals()
    ledger.close()
    if not totals.answers or not kept:
        raise UsageError(
            f"{folder / LEDGER_NAME} has no answer with a row yet; leave --out away for an estimate without one"
        )
    n = totals.answers
    return Means(totals.input_tokens / n, totals.output_tokens / n, kept / n, f"shown by {n:,} answers in {folder}")


def print_estimate(
    options: Namespace, means: Means, prices: dict[str, Price], table: PriceTable, builder: RequestBuilder
) -> None:
    """Print the requests and tokens, a table of the models' dollars, the cheapest first, and the hours."""
    requests = math.ceil(options.rows / means.rows)
    hours = requests * means.output_tokens / TOKENS_A_SECOND / options.concurrency / 3600
    console = Console(highlight=False)
    console.print(
        f"{options.rows:,} rows: {requests:,} requests of {means.input_tokens:,.0f} tokens in and "
        f"{means.output_tokens:,.0f} out ({means.source})",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    rows = []
    for name, price in prices.items():
        price = price.scale(table.batch) if options.batch else price
        total = requests * price.compute_cost(math.ceil(means.input_tokens), math.ceil(means.output_tokens))
        max_cost = replace(builder, price=price).prepare(0, Dialect()).max_cost
        rows.append((total, name, price, max_cost))
    grid = Table("model", box=None, pad_edge=False)
    for name in ("$/M in", "$/M out", "dollars", "$ a 1,000 rows", "one request at most", "ends"):
        grid.add_column(name, justify="right")
    for total, name, price, max_cost in sorted(rows, key=lambda row: row[:2]):
        each = (f"{price.input / 10**6:g}", f"{price.output / 10**6:g}", format_usd(total, 2))
        _, found = table.find_model(name, options.base_url)
        ends = str(found.ends) if found and found.ends else ""
        grid.add_row(name, *each, format_usd(total * 1000 // options.rows, 3), format_usd(max_cost), ends)
    console.print(grid)
    speed = f"{options.concurrency} in flight at {TOKENS_A_SECOND} tokens/s each (assumed)"
    when = f"{format_clock(3600 * hours)} with {speed}"
    if options.batch:
        when = "answers within a day a round, two or three rounds"
    console.print(f"{when}; prices as of {table.as_of}", markup=False, soft_wrap=True)
    if not options.out:
        thoughts = (
            "a model that reasons bills its reasoning as output: that is not in here, --out with a first run has it"
        )
        console.print(thoughts, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)

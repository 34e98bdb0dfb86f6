"""Compares the answers of models in pairs through any OpenAI-compatible judge: resumable, capped in cost.

python -m data_gen.judge davinci.jsonl out/alpaca/answers.json --judge gpt-5.4 --max-usd 5 --out out/judged
python -m data_gen.judge A.json B.json C.json --judge m --base-url http://localhost:8000/v1 --price-in 0 --price-out 0
python -m data_gen.judge A.json B.json --judge gpt-5.4 --votes votes.jsonl --common --max-usd 2

The same command resumes a run that was stopped or killed, and a verdict that was recorded is not paid for again. The
first file is the baseline. Results are bound to the judge and to the hash of its prompt, which run.json names.
"""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from data_gen.api.attempt import RequestBuilder
from data_gen.api.client import find_api_key
from data_gen.api.dialect import Sampling
from data_gen.api.flags import add_run_flags, add_server_flags, check_run_flags, make_value_parser, parse_utf8
from data_gen.api.prices import PICO, Price, find_price, format_usd, read_price_table, warn_of_end
from data_gen.api.running import check_settings, interrupt_at_stop_signals
from data_gen.base.cli import Failure, Parser, UsageError, print_text, run_command
from data_gen.judging.answers import match_answers, read_answers
from data_gen.judging.comparisons import VerdictLedger, plan_comparisons
from data_gen.judging.humans import read_votes
from data_gen.judging.report import Findings, describe_humans, describe_pair, format_interval
from data_gen.judging.run import Ending, ask_judge, write_results
from data_gen.judging.verdicts import VerdictKeeper

parse_canaries = make_value_parser("a whole number of at least 0", int, lambda n: n >= 0)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    flags = Parser("judge", __doc__)
    add = flags.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="answers of one model each, the baseline first")
    add("--judge", type=parse_utf8, help="the judge's name at the server; a dated one stays the same")
    add("--out", type=Path, default=Path("out/judge"), help="folder of the ledger, the annotations and the report")
    add("--votes", nargs="+", type=Path, default=[], help="files of people's votes, reported beside the judge's")
    canary_help = "questions on which a constant answer stands against the baseline, to try the judge"
    add("--canaries", type=parse_canaries, default=20, help=canary_help)
    add("--common", action="store_true", help="leave out the instructions that some file lacks")
    add("--seed", type=int, default=0, help="of the canary's questions and of the intervals")
    add_server_flags(flags, 0.0, 2048)
    add_run_flags(flags)
    return flags


def check_options(options: Namespace) -> None:
    """Raise UsageError for a command line that cannot work."""
    if len(options.files) < 2:
        raise UsageError(f"got one file, {options.files[0]}; wanted the answers of two models or more")
    if not options.judge:
        raise UsageError("--judge is missing; pass the judge's name at the server")
    check_run_flags(options)


def main(argv: list[str]) -> None:
    """Judge the answers, and write annotations, record and report."""
    options = build_parser().parse_args(argv)
    interrupt_at_stop_signals()
    check_options(options)
    questions = match_answers([read_answers(path) for path in options.files], options.common)
    votes = [vote for path in options.votes for vote in read_votes(path)]
    comparisons = plan_comparisons(questions, options.canaries, options.seed)
    sampling = Sampling(options.judge, options.max_output_tokens, options.temperature, options.extra)
    price, key = Price(0, 0), ""
    if not options.replay:
        table = read_price_table(options.prices)
        price = find_price(options.judge, options.base_url, table, options.price_in, options.price_out)
        warn_of_end(options.judge, options.base_url, table)
        key = find_api_key(options.base_url, os.environ, options.api_key_env)
    started = time.monotonic()
    ledger = VerdictLedger(options.out, create=not options.replay)
    ledger.numbers = comparisons.number_requests(sampling)
    keeper = VerdictKeeper(len(comparisons.shown))
    builder = RequestBuilder(comparisons, sampling, price)
    status, failure = "replayed", None
    check_settings(ledger, builder, options.allow_changed)
    if options.replay:
        for entry in ledger.read_outcomes():
            keeper.add_outcome(entry)
    else:
        status, failure = ask_judge(options, ledger, keeper, builder, key)
    cap = None if options.max_usd is None else int(options.max_usd * PICO)
    ending = Ending(status, cap, time.monotonic() - started)
    try:
        findings, paths = write_results(options, ledger, keeper, questions, comparisons, votes, price, ending)
        print_summary(findings, ledger, paths)
    except OSError as error:
        why = f"the results could not be written: {error}; the ledger is whole, the same command writes them"
        failure = failure or Failure(why)
    ledger.close()
    if failure:
        raise failure


def print_summary(findings: Findings, ledger: VerdictLedger, paths: list[Path]) -> None:
    """Print a line a pair, the ranking, the canary, people's votes, warnings, money and the files."""
    figures, totals = findings.figures, ledger.compute_totals()
    lines = [describe_pair(one) for one in figures.pairs]
    for place, one in enumerate(figures.ranking, 1):
        lines.append(f"{place}. {one.name}: {one.points:+.0f} points (95%: {format_interval(one.interval, '+.0f')})")
    if figures.canary:
        canary = figures.canary
        lines.append(f"canary: a constant answer scored {canary.win_rate.value or 0:.1f}% of {canary.win_rate.n}")
    lines += [describe_humans(one) for one in findings.humans]
    lines += [f"warning: {text}" for text in figures.warnings]
    spent, uncertain = format_usd(totals.spent), format_usd(totals.uncertain)
    lines.append(f"{spent} spent on {totals.answers:,} answers, at most {uncertain} on lost ones")
    print_text("\n".join([*lines, "  ".join(map(str, paths))]), sys.stdout)


if __name__ == "__main__":
    run_command(main)

"""Flags about requests, and parsers of the values of flags."""

import json
import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_gen.api.prices import parse_amount, parse_host
from data_gen.base.cli import Parser, UsageError
from data_gen.base.language import LANGUAGES

Value = TypeVar("Value")

OPENAI = "https://api.openai.com/v1"
OUR_FIELDS = ("model", "messages", "n", "stream", "max_tokens", "max_completion_tokens")  # what --extra may not set


def make_value_parser(
    wanted: str, convert: Callable[[str], Value], is_valid: Callable[[Value], bool] = lambda value: True
) -> Callable[[str], Value]:
    """Return a parser of a flag's text. Its error says what was wanted."""

    def parse(text: str) -> Value:
        try:
            value = convert(text)
            if is_valid(value):
                return value
        except (ValueError, RecursionError):
            pass
        raise ArgumentTypeError(f"got {text!r}, wanted {wanted}")

    return parse


def parse_json(text: str) -> Any:
    """Return a JSON value. Raise ValueError for other texts, and for NaN and lone surrogates, which cannot be sent."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


parse_utf8 = make_value_parser("UTF-8", lambda text: text.encode() and text)
parse_count = make_value_parser("a whole number of at least 1", int, lambda n: n >= 1)
parse_limit = make_value_parser("a whole number from 1 to a million", int, lambda n: 1 <= n <= 10**6)
parse_seconds = make_value_parser("seconds above 0", float, lambda s: 0 < s < 1e9)
parse_dollars = make_value_parser("dollars from 0 to a million", parse_amount)
parse_temperature = make_value_parser("a number from 0 to 2", float, lambda t: 0 <= t <= 2)
parse_fields = make_value_parser(
    f"a JSON object without {', '.join(OUR_FIELDS)}",
    parse_json,
    lambda value: isinstance(value, dict) and not set(value) & set(OUR_FIELDS),
)


def add_request_flags(flags: Parser) -> None:
    """Add the flags that decide the requests for a dataset and their price."""
    add = flags.add_argument_group("the rows").add_argument
    add("--model", type=parse_utf8, help="the model's name at the server")
    add("--rows", type=parse_count, default=52_000, help="rows to keep")
    add("--seed-tasks", type=Path, help="seed tasks of your own: Alpaca's fields, or self-instruct's instances")
    add("--language", default="en", help=f"of the rows: {' '.join(sorted(LANGUAGES))}")
    add("--seed", type=int, default=0, help="of the prompts' random choices")
    add("--tasks-per-request", type=parse_count, default=20, help="tasks that one prompt asks for")
    add("--examples", type=parse_count, default=3, help="seed tasks that one prompt shows")
    add_server_flags(flags, 1.0, 4096)


def add_server_flags(flags: Parser, temperature: float, max_output_tokens: int) -> None:
    """Add the flags about the server, its prices and sampling, with these defaults."""
    add = flags.add_argument_group("server, prices and sampling").add_argument
    add("--base-url", default=os.environ.get("OPENAI_BASE_URL") or OPENAI, help="the server; also $OPENAI_BASE_URL")
    add("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    add(
        "--price-in",
        type=parse_dollars,
        help="dollars a million input tokens, where the table lacks the model; --batch halves it",
    )
    add("--price-out", type=parse_dollars, help="dollars a million output tokens")
    add("--prices", type=Path, help="another table of prices than data_gen/prices.json")
    temperature_help = "of sampling, left out where the server refuses it"
    add("--temperature", type=parse_temperature, default=temperature, help=temperature_help)
    add(
        "--max-output-tokens",
        type=parse_limit,
        default=max_output_tokens,
        help="of one answer; with the prices, what it can cost at most",
    )
    add(
        "--extra",
        type=parse_fields,
        default={},
        help='more fields of each request, as JSON: \'{"reasoning_effort": "low"}\'',
    )


def add_run_flags(flags: Parser) -> None:
    """Add the flags about money, limits and patience of a run."""
    add = flags.add_argument_group("money, limits and patience").add_argument
    most_help = "never spend more than this, lost answers counted at the most they can have cost"
    add("--max-usd", type=parse_dollars, help=most_help)
    in_flight_help = "requests in flight at most; the server's limits are found out"
    add("--concurrency", type=parse_count, default=32, help=in_flight_help)
    add("--timeout", type=parse_seconds, default=600, help="seconds for one answer")
    patience_help = "seconds without any answer after which to stop, resumably"
    add("--patience", type=parse_seconds, default=900, help=patience_help)
    attempts_help = "failures of one request, while others get through, before it is left out"
    add("--max-attempts", type=parse_count, default=8, help=attempts_help)
    backoff_help = "seconds before a first retry; they double, at random, up to 60"
    add("--backoff", type=parse_seconds, default=1, help=backoff_help)
    add("--replay", action="store_true", help="only make the results anew from the ledger; nothing is sent")
    add("--allow-changed", action="store_true", help="go on with other settings than the ledger was begun with")
    add("--quiet", action="store_true", help="no progress")


def check_run_flags(options: Namespace) -> None:
    """Raise UsageError for a server, prices or patience that cannot work."""
    parse_host(options.base_url)
    if options.patience <= options.timeout and not options.replay:
        raise UsageError(f"--patience {options.patience:g} is not longer than --timeout {options.timeout:g}")
    if "service_tier" in options.extra and options.price_in is None and not options.replay:
        raise UsageError("--extra: a service_tier has prices of its own; pass its --price-in and --price-out")
    if options.prices and not options.prices.is_file():
        raise UsageError(f"--prices {options.prices} is not there")


def check_language(code: str) -> None:
    """Raise UsageError for a language that is not known."""
    if code not in LANGUAGES:
        raise UsageError(f"--language is {code!r}, wanted one of {' '.join(sorted(LANGUAGES))}")

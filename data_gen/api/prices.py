"""Prices of tokens: a dated table, and money in whole picodollars, so that a cap is exact."""

import datetime
import json
import math
import re
import sys
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_gen.base.cli import DataError, UsageError, print_text, suggest_nearest

PRICE_TABLE = Path(__file__).parent.with_name("prices.json")
PICO = 10**12  # picodollars in a dollar
MAX_USD = 10**6  # largest amount: the ledger's 64-bit integers hold nine million dollars
MAX_DECIMALS = 1000  # of an amount: an exact 1e-99999999 would fill the memory
NEAR_DAYS = 90  # before the announced end of a model, from which on it is told
WANTED = '{"as_of", "batch", "models": {name: [in, out] or {"input", "output", "as_of", "ends"}}}'


@dataclass(frozen=True)
class Price:
    """Picodollars per token. One dollar per million tokens is a million picodollars per token."""

    input: int
    output: int

    def compute_cost(self, input_tokens: int, output_tokens: int) -> int:
        """Return input_tokens * input + output_tokens * output, in picodollars."""
        return input_tokens * self.input + output_tokens * self.output

    def scale(self, share: Decimal) -> "Price":
        """Return a share of this price, rounded up."""
        return Price(math.ceil(self.input * Fraction(share)), math.ceil(self.output * Fraction(share)))


@dataclass(frozen=True)
class Model:
    """A model of a table: dollars per million tokens, when they were read, and its last day."""

    usd: tuple[Decimal, Decimal] | None  # (input, output), None for a model that has ended
    as_of: str = ""
    ends: datetime.date | None = None  # as announced


@dataclass(frozen=True)
class PriceTable:
    """The prices of a file {"as_of", "host", "batch", "models": {name: [input, output] or the fields of Model}}."""

    as_of: str
    batch: Decimal  # the Batch API's share of the price
    models: dict[str, Model]
    host: str | None = None  # the host that the prices are for, None for any

    def find_model(self, name: str, base_url: str) -> tuple[str, Model | None]:
        """Return the name in the table of a model at a host, which may have a date behind it, and the model."""
        known = self.models if self.host in (None, parse_host(base_url)) else {}
        name = name if name in known else re.sub(r"-\d{4}-\d{2}-\d{2}$", "", name)
        return name, known.get(name)


def read_price_table(path: str | Path | None = None) -> PriceTable:
    """Return the prices of a file, by default of prices.json. Raise DataError with the file and its fault."""
    path = Path(path or PRICE_TABLE)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), parse_float=Decimal, parse_int=Decimal)
        models = {name: read_model(name, value) for name, value in raw["models"].items()}
        return PriceTable(str(raw["as_of"]), parse_amount(raw.get("batch", 1)), models, raw.get("host"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"prices {path}: {what}; wanted {WANTED}") from error


def read_model(name: str, value: Any) -> Model:
    """Return a model of a table: [input, output], or an object with its end. Raise ValueError for anything else."""
    fields = value if isinstance(value, dict) else {}
    ends = fields.get("ends")
    last_day = None if ends is None else datetime.date.fromisoformat(ends)
    if last_day and not {"input", "output"} & set(fields):
        return Model(None, ends=last_day)
    pair = value if isinstance(value, list) else [fields[side] for side in ("input", "output") if side in fields]
    if len(pair) != 2:
        raise ValueError(f"{name} has not two prices, [input, output]")
    return Model((parse_amount(pair[0]), parse_amount(pair[1])), str(fields.get("as_of", "")), last_day)


def parse_amount(value: Any) -> Decimal:
    """Return an amount of dollars from zero to a million, with at most MAX_DECIMALS decimals.

    Raise ValueError for anything else.
    """
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is not a number") from None
    if not amount.is_finite() or not 0 <= amount <= MAX_USD:
        raise ValueError(f"{amount} is not an amount from 0 to {MAX_USD:,}")
    if amount.as_tuple().exponent < -MAX_DECIMALS:  # type: ignore[operator]
        raise ValueError(f"an amount has more than {MAX_DECIMALS} decimals")
    return amount


def find_price(
    model: str,
    base_url: str,
    table: PriceTable,
    given_in: Decimal | None = None,
    given_out: Decimal | None = None,
) -> Price:
    """Return the given prices (--price-in, --price-out), or those of the table. Fractions of a picodollar round up.

    A table with a host has no prices for any other host. Raise UsageError for an unknown price.
    """
    if (given_in is None) != (given_out is None):
        raise UsageError("--price-in and --price-out go together; one of them is given")
    if given_in is None or given_out is None:
        _, found = table.find_model(model, base_url)
        if found is None or found.usd is None:
            host = parse_host(base_url)
            known = [name for name, one in table.models.items() if one.usd and table.host in (None, host)]
            why = f"{model} has no known price at {host}{suggest_nearest(model, known)}"
            if found and found.ends:
                why = f"{model} was announced to end on {found.ends} and has no price here; {list_lasting(table)}"
            raise UsageError(
                f"{why}; pass --price-in and --price-out, dollars a million tokens (0 for your own server)"
            )
        given_in, given_out = found.usd
    return Price(*(math.ceil(Fraction(parse_amount(usd)) * PICO / 10**6) for usd in (given_in, given_out)))


def describe_end(model: str, base_url: str, table: PriceTable, today: datetime.date) -> str:
    """Return a warning about a model whose announced end is near or over, "" for any other."""
    _, found = table.find_model(model, base_url)
    if found is None or found.ends is None or (left := (found.ends - today).days) > NEAR_DAYS:
        return ""
    when = f"in {left} days" if left > 1 else {1: "tomorrow", 0: "today"}.get(left, f"{-left} days ago")
    return f"warning: {model} was announced to end on {found.ends}, {when}; {list_lasting(table)}"


def warn_of_end(model: str, base_url: str, table: PriceTable) -> None:
    """Print a warning on stderr if the announced end of a model is near."""
    if warning := describe_end(model, base_url, table, datetime.date.today()):
        print_text(warning, sys.stderr)


def list_lasting(table: PriceTable) -> str:
    """Return a phrase about the models of a table without an announced end."""
    names = [name for name, one in table.models.items() if one.usd and one.ends is None]
    return f"no end is announced of {', '.join(names)}" if names else "an end is announced of all others as well"


def parse_host(base_url: str) -> str:
    """Return the host of a server's address. Raise UsageError for anything else."""
    try:
        parts = urlsplit(base_url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port):
            return parts.hostname
    except ValueError:  # unclosed brackets, or a port that is no number
        pass
    raise UsageError(f"--base-url {base_url} is no address of a server; wanted one like http://localhost:8000/v1")


class Budget:
    """A cap on spending, in whole picodollars: spent + uncertain + reserved never exceeds it.

    reserved is the most that everything in flight can cost, uncertain the most that lost attempts may have cost.
    """

    def __init__(self, cap: int | None, spent: int = 0, uncertain: int = 0):
        self.cap, self.spent, self.uncertain, self.reserved = cap, spent, uncertain, 0
        self.overrun = False  # the server billed more than an attempt can cost, so the cap cannot be kept

    @property
    def committed(self) -> int:
        """Return spent + uncertain + reserved."""
        return self.spent + self.uncertain + self.reserved

    def reserve(self, max_cost: int) -> bool:
        """Set aside the most that one attempt can cost. Return False if the cap leaves no room."""
        if self.cap is not None and self.committed + max_cost > self.cap:
            return False
        self.reserved += max_cost
        return True

    def settle(self, max_cost: int, cost: int) -> None:
        """Replace the amount set aside for an attempt by its bill."""
        self.reserved -= max_cost
        self.spent += cost
        self.overrun |= cost > max_cost

    def count_lost(self, max_cost: int) -> None:
        """Count the amount set aside for an attempt as uncertain: no whole answer came, but a bill may."""
        self.reserved -= max_cost
        self.uncertain += max_cost


def format_usd(picodollars: int, digits: int = 4) -> str:
    """Return an amount as $0.0123, rounded up, so that it is never less than what was spent."""
    whole, rest = divmod(-(-picodollars * 10**digits // PICO), 10**digits)
    return f"${whole:,}.{rest:0{digits}}" if picodollars else "$0"

"""Prices of tokens: a dated table, and money in whole picodollars, so that a cap is exact."""

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_gen.base.cli import DataError, UsageError, suggest_nearest

PRICE_TABLE = Path(__file__).parent.with_name("prices.json")
PICO = 10**12  # picodollars in a dollar
MAX_USD = 10**6  # largest amount: the ledger's 64-bit integers hold nine million dollars


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
class PriceTable:
    """Dollars per million tokens of a file {"as_of", "host", "batch", "models": {name: [input, output]}}."""

    as_of: str
    batch: Decimal  # the Batch API's share of the price
    models: dict[str, tuple[Decimal, Decimal]]
    host: str | None = None  # the host that the prices are for, None for any


def read_price_table(path: str | Path | None = None) -> PriceTable:
    """Return the prices of a file, by default of prices.json. Raise DataError with the file and its fault."""
    path = Path(path or PRICE_TABLE)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), parse_float=Decimal, parse_int=Decimal)
        models = {}
        for name, pair in raw["models"].items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{name} has not two prices, [input, output]")
            models[name] = parse_amount(pair[0]), parse_amount(pair[1])
        return PriceTable(str(raw["as_of"]), parse_amount(raw.get("batch", 1)), models, raw.get("host"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f'prices {path}: {what}; wanted {{"as_of", "batch", "models": {{name: [in, out]}}}}') from error


def parse_amount(value: Any) -> Decimal:
    """Return an amount of dollars from zero to a million. Raise ValueError for anything else."""
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is not a number") from None
    if not amount.is_finite() or not 0 <= amount <= MAX_USD:
        raise ValueError(f"{amount} is not an amount from 0 to {MAX_USD:,}")
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
        host = parse_host(base_url)
        known = table.models if table.host in (None, host) else {}
        name = model if model in known else re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)
        if name not in known:
            why = f"{model} has no known price at {host}{suggest_nearest(model, known)}"
            raise UsageError(
                f"{why}; pass --price-in and --price-out, dollars a million tokens (0 for your own server)"
            )
        given_in, given_out = known[name]
    return Price(*(math.ceil(Fraction(parse_amount(usd)) * PICO / 10**6) for usd in (given_in, given_out)))


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

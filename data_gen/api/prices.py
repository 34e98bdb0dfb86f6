"""What tokens cost: a dated table, and money in whole picodollars, so that a cap is exact."""

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

from data_gen.base.cli import DataError, UsageError, nearest

TABLE = Path(__file__).parent.with_name("prices.json")
PICO = 10**12  # picodollars in a dollar
MOST_USD = 10**6  # of any amount: the ledger's integers hold nine million dollars


@dataclass(frozen=True)
class Price:
    """Picodollars a token. One dollar a million tokens is a million picodollars a token."""

    input: int
    output: int

    def cost(self, input_tokens: int, output_tokens: int) -> int:
        """input_tokens * input + output_tokens * output, in picodollars."""
        return input_tokens * self.input + output_tokens * self.output

    def times(self, share: Decimal) -> "Price":
        """A share of it, rounded up."""
        return Price(*(math.ceil(price * Fraction(share)) for price in (self.input, self.output)))


@dataclass(frozen=True)
class Table:
    """The prices of a file: {"as_of", "host", "batch", "models": {name: [input, output]}}, dollars a million tokens."""

    as_of: str
    batch: Decimal  # the Batch API's share of the price
    models: dict
    host: str | None = None  # whose prices they are; None: any


def read_table(path=None) -> Table:
    """Raises DataError naming the file and what is wrong in it."""
    path = Path(path or TABLE)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), parse_float=Decimal, parse_int=Decimal)
        for name, pair in raw["models"].items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{name} has not two prices, [input, output]")
        models = {name: tuple(map(money, pair)) for name, pair in raw["models"].items()}
        return Table(str(raw["as_of"]), money(raw.get("batch", 1)), models, raw.get("host"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f'prices {path}: {what}; wanted {{"as_of", "batch", "models": {{name: [in, out]}}}}') from error


def money(value) -> Decimal:
    """A Decimal of zero to a million. Raises ValueError."""
    try:
        value = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is not a number") from None
    if not value.is_finite() or not 0 <= value <= MOST_USD:
        raise ValueError(f"{value} is not an amount from 0 to {MOST_USD:,}")
    return value


def price_of(model, base_url, table: Table, given_in=None, given_out=None) -> Price:
    """Of --price-in and --price-out where given, else of the table; fractions of a picodollar are rounded up.

    A table that names a host speaks of no other: its prices must be given. Raises UsageError.
    """
    if (given_in is None) != (given_out is None):
        raise UsageError("--price-in and --price-out go together; one of them is given")
    if given_in is None:
        host = host_of(base_url)
        known = table.models if table.host in (None, host) else {}
        name = model if model in known else re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)
        if name not in known:
            why = f"{model} has no known price at {host}{nearest(model, list(known))}"
            raise UsageError(
                f"{why}; pass --price-in and --price-out, dollars a million tokens (0 for your own server)"
            )
        given_in, given_out = known[name]
    return Price(*(math.ceil(Fraction(money(usd)) * PICO / 10**6) for usd in (given_in, given_out)))


def host_of(base_url) -> str:
    """Raises UsageError where it is no address of a server."""
    try:
        parts = urlsplit(base_url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port):
            return parts.hostname
    except ValueError:  # brackets that do not close, a port that is none
        pass
    raise UsageError(f"--base-url {base_url} is no address of a server; wanted one like http://localhost:8000/v1")


class Budget:
    """A cap that holds: spent + uncertain + reserved never passes it, in whole picodollars.

    reserved: the most that everything in flight can cost. uncertain: the most that lost attempts can have cost.
    """

    def __init__(self, cap: int | None, spent=0, uncertain=0):
        self.cap, self.spent, self.uncertain, self.reserved = cap, spent, uncertain, 0
        self.overrun = False  # the server billed more than was asked of it: the cap cannot be promised any more

    @property
    def committed(self) -> int:
        return self.spent + self.uncertain + self.reserved

    def reserve(self, most: int) -> bool:
        """Sets most aside for one attempt, or returns False where the cap leaves no room."""
        if self.cap is not None and self.committed + most > self.cap:
            return False
        self.reserved += most
        return True

    def settle(self, most: int, cost: int):
        """An attempt that set most aside was billed cost."""
        self.reserved -= most
        self.spent += cost
        self.overrun |= cost > most

    def lose(self, most: int):
        """An attempt came to no whole answer, and may have been billed."""
        self.reserved -= most
        self.uncertain += most


def usd(picodollars: int, digits: int = 4) -> str:
    """$0.0123, rounded up: what is told is never less than what was spent."""
    whole, rest = divmod(-(-picodollars * 10**digits // PICO), 10**digits)
    return f"${whole:,}.{rest:0{digits}}" if picodollars else "$0"

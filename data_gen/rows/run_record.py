"""The record of a run: run.json."""

import datetime
import importlib.metadata
import platform
from argparse import Namespace
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from data_gen.api.client import hide_secrets
from data_gen.api.ledger import Totals
from data_gen.api.prices import PICO, Price
from data_gen.rows.curator import Curator


def describe_run(
    options: Namespace,
    curator: Curator,
    totals: Totals,
    status: str,
    cap: int | None,
    price: Price,
    seconds: float,
) -> dict[str, Any]:
    """Return the content of run.json: status, settings, counts, cost, models and versions. cap is in picodollars."""
    started = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds)
    versions = {name: importlib.metadata.version(name) for name in ("openai", "rapidfuzz")}
    return {
        "status": status,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "settings": describe_settings(options),
        "counts": curator.summarize() | {"attempts": totals.attempts},
        "cost": describe_cost(totals, cap, price) | {"batch": options.batch},
        "models": dict(curator.models.most_common()),
        "versions": {"python": platform.python_version()} | versions,
    }


def describe_settings(options: Namespace) -> dict[str, Any]:
    """Return the values of all flags as JSON has them, the address without a user name and password."""
    settings = {}
    for name, value in vars(options).items():
        values = [str(one) if isinstance(one, Path | Decimal) else one for one in make_list(value)]
        settings[name] = values if isinstance(value, list) else values[0]
    settings["base_url"] = hide_secrets(options.base_url)
    return settings


def format_ranges(numbers: Sequence[int], most: int | None = None) -> str:
    """Return ascending numbers as 3, 7-9, at most this many ranges of them."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [f"{first}-{last}" if first != last else str(first) for first, last in ranges[:most]]
    return ", ".join(shown) + (" ..." if len(shown) < len(ranges) else "")


def make_list(value: Any) -> list[Any]:
    """Return a list as it is, and any other value as a list of one."""
    return value if isinstance(value, list) else [value]


def describe_cost(totals: Totals, cap: int | None, price: Price) -> dict[str, Any]:
    """Return the dollars, tokens and prices of a run. cap is in picodollars."""
    return {
        "spent_usd": totals.spent / PICO,
        "uncertain_usd": totals.uncertain / PICO,
        "cap_usd": None if cap is None else cap / PICO,
        "input_tokens": totals.input_tokens,
        "output_tokens": totals.output_tokens,
        "usd_per_million_in": price.input / 10**6,
        "usd_per_million_out": price.output / 10**6,
    }

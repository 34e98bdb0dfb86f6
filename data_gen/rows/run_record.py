"""The record of a run: run.json."""

import datetime
import importlib.metadata
import platform
import re
from argparse import Namespace
from decimal import Decimal
from pathlib import Path
from typing import Any

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
    settings = {
        name: str(value) if isinstance(value, Path | Decimal) else value for name, value in vars(options).items()
    }
    settings["decontaminate"] = [str(path) for path in options.decontaminate]
    settings["base_url"] = re.sub("//[^/]*@", "//", options.base_url)  # without a user name and password
    started = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds)
    versions = {name: importlib.metadata.version(name) for name in ("openai", "rapidfuzz")}
    return {
        "status": status,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "settings": settings,
        "counts": curator.summarize() | {"attempts": totals.attempts},
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
        "versions": {"python": platform.python_version()} | versions,
    }

"""Arguments, facts about the machine, summaries of repeated measurements, and the JSON files that scripts write.

Importing this module does not import torch: scripts.speed.dedup measures the memory of a process without it.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from data_gen.base.files import write_atomically

ROOT = Path(__file__).parents[2]


def new_parser(doc: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring, with its line breaks."""
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def new_json_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the module's docstring as help and a required --json."""
    parser = new_parser(doc)
    parser.add_argument("--json", required=True, help="where the figures go")
    return parser


def write_json(path: str | Path, result: dict) -> None:
    """Write a JSON file whole or not at all, and make its folder. A NumPy scalar is written as a number."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(result, indent=1, default=float), "\n"])


def read_cpu_name() -> str:
    """Return the processor's name as Linux gives it, or the best that Python knows elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def describe_cpu() -> dict:
    """Return the processor's name and the number of cores that this process may use."""
    return {"cpu": read_cpu_name(), "cores": len(os.sched_getaffinity(0))}


def today() -> str:
    """Return the date as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d")


def summarize(values: Iterable[float]) -> dict:
    """Return the median and the extremes of repeated measurements."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize_ratios(numerators: Iterable[float], denominators: Iterable[float]) -> dict:
    """Return the median and the extremes of the ratios of measurements that were taken in turn, pair by pair."""
    return summarize(a / b for a, b in zip(numerators, denominators, strict=True))


def format_mfu(record: dict) -> str:
    """Return a record's MFU, and beside it the effective one where rows share a prefix, so that fewer are computed."""
    effective = record.get("effective_mfu") or record["mfu"]
    return f"{record['mfu']:.1%}" + (f" ({effective:.1%} effective)" if effective > record["mfu"] else "")

"""Loss curves of engine.finetune, started as a user starts it, and the distance between two curves."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from scripts.base.results import new_json_parser

FIGURES = ("loss", "grad_norm")


def new_curve_parser(doc: str, *, steps: int, batch: int, max_length: int, lr: float) -> ArgumentParser:
    """Return a parser of the settings that every curve has, with these defaults."""
    parser = new_json_parser(doc)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--max-length", type=int, default=max_length)
    parser.add_argument("--lr", type=float, default=lr)
    return parser


def describe_settings(args: Namespace) -> dict:
    """Return the settings that new_curve_parser parsed, for the JSON file."""
    return {name: getattr(args, name) for name in ("steps", "batch", "max_length", "lr")}


def run_module(*words, environment: dict | None = None) -> None:
    """Run `python -m WORDS...`, and raise CalledProcessError if it fails."""
    command = [sys.executable, "-m", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))


def finetune_curve(args: Namespace, out: Path, *flags, environment: dict | None = None) -> list[tuple[float, float]]:
    """Run engine.finetune with the parsed settings and more flags. Return (loss, gradient norm) of every step."""
    run_module(
        "engine.finetune", "--out", out, "--max-steps", args.steps, "--global-batch-size", args.batch, "--lr", args.lr,
        "--max-length", args.max_length, "--dtype", "fp32", *flags, environment=environment,
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in FIGURES) for line in lines if line["event"] == "train"]


def losses_of(curve: list[tuple[float, float]]) -> list[float]:
    """Return the losses of a curve without its gradient norms."""
    return [loss for loss, _ in curve]


def worst_difference(curve: list[tuple[float, float]], reference: list[tuple[float, float]]) -> dict:
    """Return the largest relative difference of any step's loss, and of any step's gradient norm."""
    return {
        name: max(abs(a[k] / b[k] - 1) for a, b in zip(curve, reference, strict=True))
        for k, name in enumerate(FIGURES)
    }  # fmt: skip

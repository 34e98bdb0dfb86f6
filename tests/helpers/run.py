"""Commands of the project run as a user would run them, what they leave behind, and small helpers of many tests."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.helpers.forks import Started

ROOT = Path(__file__).parents[2]


def command(module, *args, check=True):
    """Run python -m MODULE ARGS in a process of its own, as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=140, check=False, env=environment(),
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def forked(name, *args, check=True):
    """Run engine.NAME in a process of its own, without the seconds that imports take."""
    code = f"import sys\nfrom engine import {name}\nfrom engine.base.errors import run_main\n"
    process = Started(f"{code}sys.exit(run_main({name}.main))", *args, env=environment())
    out, err = process.communicate(timeout=140)
    assert not check or process.returncode == 0, out + err
    return subprocess.CompletedProcess(args, process.returncode, out, err)


finetune, generate, export = (partial(forked, name) for name in ("finetune", "generate", "export"))


# Python for a process of its own: the parts of a run that tests interfere with, under short names.
PARTS_OF_A_RUN = """
import os, signal, sys, time
import torch
from engine import finetune
from engine.base.errors import run_main
from engine.data import packing
from engine.model.llama import Transformer
from engine.output import checkpoint, saver
from engine.training import datasets, evaluation, fine_tuning, loop, plan, prepare, saving, step
from engine.training.optimizer import AdamW
"""

# Python for a process of its own: act() just before the nth call of module.name.
BEFORE_CALL = """
def before(module, name, nth, act):
    real, calls = getattr(module, name), [0]
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            act()
        return real(*args, **kwargs)
    setattr(module, name, call)
"""


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def events(out, event="train"):
    """Return the lines of one event from an output folder's metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def worst(difference):
    return difference.abs().max().item() if difference.numel() else 0.0

"""What measurements of a whole training step share: rows, figures, and how a process hands its records over.

Rows have the lengths of Alpaca's (kernels.measure.alpaca) and random ids, but for the two stems that its
templates begin with, which rows share. Logical tokens are those that the rows hold: padding never counts, and sharing a
prefix does not reduce them.

    MFU = 6 x N x logical tokens/s / dense bf16 peak
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from engine.base.files import make_json_safe
from engine.data.dataset import Dataset
from engine.model.config import MODELS, ModelConfig
from engine.planning.cards import PRICES_OF, card_named
from engine.training.micro_batch_size import is_out_of_memory
from kernels.measure.alpaca import ALPACA_ROWS, alpaca_lengths
from kernels.measure.machine import GPU, free_memory, write_json

ROWS, MAX_LENGTH = 128, 512  # of a step; tokens a row is cut at
EPOCHS = 3
DTYPE = torch.bfloat16 if GPU else torch.float32
TOY = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=256, max_seq_len=64)
TOY_ROWS = 6
GRACE_S = 60  # what has begun when the time is up may take as long


def shape(model: str, smoke: bool) -> ModelConfig:
    return TOY if smoke else MODELS[model]


# ---- rows -----------------------------------------------------------------------------------------------------------


def alpaca_rows(n_steps: int, smoke: bool) -> Dataset:
    """Rows of the mix for so many steps, drawn without repetition while there are enough; the response's tokens are
    targets."""
    vocab_size, max_length, per_step = (TOY.vocab_size, TOY.max_seq_len, TOY_ROWS) if smoke else (32000, 512, ROWS)
    alpaca = alpaca_lengths()
    prompt, response = alpaca.prompt, alpaca.response
    generator = np.random.default_rng(0)
    stems = [generator.integers(3, vocab_size, n) for n in alpaca.shared_prefix]
    usable = prompt < max_length  # a row cut before its response has no loss, and is no example
    if smoke:
        usable &= prompt + response < max_length + 8  # else all were cut, and of one length
    drawn = np.resize(generator.permutation(np.flatnonzero(usable)), n_steps * per_step)
    tokens, is_target = [], []
    for i in drawn:
        stem, n = stems[alpaca.has_input[i]], min(max_length, prompt[i] + response[i])
        tokens.append(np.concatenate([stem, generator.integers(3, vocab_size, n - len(stem))]))
        is_target.append(np.arange(n) >= prompt[i])
    ends = np.cumsum([len(row) for row in tokens])
    begins = ends - [len(row) for row in tokens]
    flat = np.concatenate(tokens).astype(np.int32), np.concatenate(is_target)
    return Dataset(*flat, begins, ends, [str(i) for i in drawn], {})


def examples_of(step: int, smoke: bool) -> np.ndarray:
    """Of alpaca_rows, the examples of a step, counted from 1."""
    per_step = TOY_ROWS if smoke else ROWS
    return np.arange((step - 1) * per_step, step * per_step)


# ---- figures --------------------------------------------------------------------------------------------------------


def card():
    """The card at hand as engine.planning.cards has it, or None."""
    return card_named(torch.cuda.get_device_name()) if GPU else None


def mfu(n_parameters: int, tokens_per_s: float, card) -> dict:
    """Model FLOPs utilisation, and its formula; None on a card whose peak is not known."""
    if card is None:
        return {"mfu": None, "mfu_formula": "6 x N x logical tokens/s / dense bf16 peak, which is not known here"}
    peak = 1e12 * card.peak_tflops
    formula = f"6 x {n_parameters:.4g} x logical tokens/s / {peak:.4g} (dense bf16 peak of {card.name})"
    return {"mfu": 6 * n_parameters * tokens_per_s / peak, "mfu_formula": formula}


def speed(n_parameters: int, tokens: list[int], computed: list[int], seconds: list[float], card) -> dict:
    """Of steps: logical tokens, those that were computed (padding and all), seconds of each."""
    rate = sum(tokens) / sum(seconds)
    return {
        "tokens_per_s": rate, "computed_tokens_per_s": sum(computed) / sum(seconds),
        "computed_over_logical": sum(computed) / sum(tokens), "tokens_a_step": sum(tokens) / len(tokens),
        **mfu(n_parameters, rate, card), "steps": len(seconds), "step_s_median": statistics.median(seconds),
        "step_s_min": min(seconds), "step_s_max": max(seconds),
    }  # fmt: skip


def peak_memory() -> dict:
    """GiB at the peak since it was last reset: of tensors, and of what the allocator held for them."""
    if not GPU:
        return {"peak_gib": None, "peak_reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def projection(record: dict, card) -> dict:
    """The whole Alpaca run at the pace of a measured step: seconds = rows x epochs x mean tokens a row / tokens/s."""
    alpaca = alpaca_lengths()
    tokens = ALPACA_ROWS * EPOCHS * np.minimum(MAX_LENGTH, alpaca.prompt + alpaca.response).mean()
    seconds = tokens / record["tokens_per_s"]
    price = card and card.price_per_hour
    return {
        "what": f"Alpaca: {ALPACA_ROWS} rows x {EPOCHS} epochs, projected from the measured step", "of": record["name"],
        "steps": EPOCHS * -(-ALPACA_ROWS // ROWS), "tokens": round(tokens), "minutes": seconds / 60,
        "dollars": price and price * seconds / 3600, "dollars_an_hour": price, "price_of": price and PRICES_OF,
    }  # fmt: skip


# ---- a process that measures ----------------------------------------------------------------------------------------


class Records:
    """What a process has measured, on disk after every record."""

    def __init__(self, path=None, minutes=None):
        self.path, self.result = path, {"records": [], "left_out": []}
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.save()

    def save(self):
        if self.path:
            write_json(self.path, self.result)

    def spent(self):
        return time.monotonic() > self.deadline

    def attempt(self, name, measure):
        """Adds the record that measure() returns, or how it failed; begins nothing once the time is spent."""
        if self.spent():
            self.result["left_out"].append(name)
            return self.save()
        began, broken = time.monotonic(), None
        try:
            record = measure()
        except Exception as error:  # one measurement's trouble is not another's
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            record = {"failed": f"{type(error).__name__}: {said[0][:300]}"}
            # After an error of the device the process can use it no more: its parent begins another.
            broken = error if "CUDA error" in str(error) and not is_out_of_memory(error) else None
        record = make_json_safe({"name": name, **record, "seconds": time.monotonic() - began})
        self.result["records"].append(record)
        self.save()
        print(line(record), flush=True)
        if broken:
            raise broken
        free_memory()


class TooLarge(Exception):
    """Why nothing smaller is tried."""


def within_memory(size: int, least: int, measure):
    """(measure(size), the sizes that ran out of memory): halved until it does not. Raises TooLarge under `least`."""
    failed = []
    while size >= least:
        try:
            return measure(size), failed
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).split(". ")[0]
        failed.append(size)  # outside the handler, whose traceback keeps what the failed pass held
        gc.collect()
        free_memory()
        size //= 2
    raise TooLarge(f"out of memory at {', '.join(map(str, failed))}: {said}")


def parse(prog, doc, names, argv):
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {'; '.join(names)}"
    )
    parser.add_argument("--json", metavar="FILE", help="where the records go (nowhere)")
    parser.add_argument("--minutes", type=float, help="begin nothing after this long (no limit)")
    parser.add_argument("--smoke", action="store_true", help="at toy size, on a CPU too")
    args = parser.parse_args(argv)
    if not GPU and not args.smoke:
        parser.error("no GPU is visible to torch; --smoke tries everything at toy size on the CPU")
    if not GPU:
        torch.set_num_threads(1)  # toys gain nothing by more
    return args


# ---- its parent, scripts.gpu_report ---------------------------------------------------------------------------------


def in_processes(report, run, part, module, names):
    """The records of `python -m module --only names`, taken over while it runs. Where it dies, what it was at is
    recorded as failed, and another process goes on with the rest."""
    found = report.result["parts"].setdefault(part, {"records": []})["records"]
    free_memory()  # the device is the other process's
    waiting = list(names)
    while waiting and report.take(f"{part}: {', '.join(waiting)}"):
        before, left_out = list(found), []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "records.json"

            def take_over(path=path, before=before, left_out=left_out):
                if path.exists():
                    result = json.loads(path.read_text())
                    found[:], left_out[:] = before + result["records"], result["left_out"]
                    report.save()

            left = max(report.left(), 1)
            command = [sys.executable, "-m", module, "--json", str(path), "--minutes", f"{left / 60:.3f}"]
            command += ["--only", *waiting, *(["--smoke"] if report.smoke else [])]
            ended = run(command, left + GRACE_S, every=take_over)
            take_over()
        report.result["left_out"] += [f"{part}: {name}" for name in left_out]
        done = {record["name"] for record in found} | set(left_out)
        rest = [name for name in waiting if name not in done]
        stuck = ended is None or len(rest) == len(waiting)  # no process got on from there
        if ended != 0 and stuck and rest:
            how = "after its limit" if ended is None else f"with exit code {ended}"
            found.append({"name": rest.pop(0), "failed": f"its process ended {how}"})
        waiting = rest if ended != 0 else []
        report.save()


# ---- what is printed ------------------------------------------------------------------------------------------------


def line(record: dict) -> str:
    """One record of a step, ours or a peer's."""
    if "tokens_per_s" not in record:
        kind = next((kind for kind in ("failed", "absent") if kind in record), None)
        return f"  {record['name']:<62}{kind}: {record[kind]}" if kind else f"  {record['name']}"
    used = "" if record["mfu"] is None else f"  MFU {record['mfu']:5.1%}"
    used += "" if record["peak_gib"] is None else f"  {record['peak_gib']:5.1f} GiB"
    if record.get("peak_over_estimate"):
        used += f" ({record['peak_over_estimate']:.1%} of the estimate)"
    used += "  NOT FINITE" if record.get("all_finite") is False else ""
    halved = f"  out of memory at {record['out_of_memory_at']}" if record.get("out_of_memory_at") else ""
    ratio = f"  ours is {record['ours_over_peer']:.2f}x" if "ours_over_peer" in record else ""
    return (
        f"  {record['name']:<62}{record['tokens_per_s']:>9,.0f} tokens/s  {record['step_s_median']:7.3f} s a step"
        f"{used}{ratio}{halved}"
    )

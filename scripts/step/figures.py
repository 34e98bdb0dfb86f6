"""Figures of measured training steps: speed, MFU, memory, and the projection of a whole fine-tune.

Logical tokens are those that the rows hold: padding never counts, and sharing a prefix does not reduce them. Computed
tokens are fewer where rows share a prefix, and MFU is of them; what sharing saves is named apart, as the effective MFU.

    MFU           = 6 x N x computed tokens/s, without padding / dense bf16 peak
    effective MFU = 6 x N x logical tokens/s / dense bf16 peak
"""

import statistics

import numpy as np
import torch

from engine.planning.cards import PRICES_DATE, find_card_by_device_name
from kernels.measure.alpaca import ALPACA_ROWS, alpaca_lengths
from kernels.measure.machine import GPU
from scripts.base.results import format_mfu
from scripts.step.rows import EPOCHS, MAX_LENGTH, ROWS

DTYPE = torch.bfloat16 if GPU else torch.float32
DTYPE_NAME = str(DTYPE).removeprefix("torch.")
STEPS_AN_EPOCH = -(-ALPACA_ROWS // ROWS)


def card_here():
    """Return the card of this machine as engine.planning.cards knows it, or None."""
    return find_card_by_device_name(torch.cuda.get_device_name()) if GPU else None


def mfu(n_parameters: int, computed_per_s: float, logical_per_s: float, card) -> dict:
    """Return model FLOPs utilisation, its formula and the effective one. Both are None where the peak is unknown."""
    if card is None:
        formula = "6 x N x computed tokens/s / dense bf16 peak, which is not known here"
        return {"mfu": None, "effective_mfu": None, "mfu_formula": formula}
    peak = 1e12 * card.peak_tflops
    formula = f"6 x {n_parameters:.4g} x computed tokens/s / {peak:.4g} (dense bf16 peak of {card.name})"
    shares = {"mfu": computed_per_s, "effective_mfu": logical_per_s}
    return {name: 6 * n_parameters * rate / peak for name, rate in shares.items()} | {"mfu_formula": formula}


def summarize_speed(n_parameters: int, tokens: list[int], computed: list[int], seconds: list[float], card) -> dict:
    """Return the speed of steps from each one's logical tokens, computed tokens (with padding) and seconds.

    tokens_per_s is the median over the steps: one that waits for something else does not lower it. MFU leaves padding
    out: where more tokens are computed than rows hold, it is of those that they hold.
    """
    rate = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
    useful = map(min, tokens, computed)
    computed_rate = statistics.median(n / s for n, s in zip(useful, seconds, strict=True))
    return {
        "tokens_per_s": rate, "tokens_per_s_mean": sum(tokens) / sum(seconds),
        "computed_tokens_per_s": sum(computed) / sum(seconds),
        "computed_over_logical": sum(computed) / sum(tokens), "tokens_a_step": sum(tokens) / len(tokens),
        **mfu(n_parameters, computed_rate, rate, card),
        "steps": len(seconds), "step_s_median": statistics.median(seconds), "step_s_min": min(seconds),
        "step_s_max": max(seconds),
    }  # fmt: skip


def peak_memory() -> dict:
    """Return the peak of tensors and of reserved memory in GiB, since the last reset. On a CPU both are None."""
    if not GPU:
        return {"peak_gib": None, "peak_reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def reset_peak_memory() -> None:
    """Begin a new measurement of peak memory, where there is a GPU."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def project_finetune(record: dict, card) -> dict:
    """Return the duration and price of the whole Alpaca run at the speed of a measured step.

    seconds = rows x epochs x mean tokens a row / tokens/s
    """
    alpaca = alpaca_lengths()
    tokens = ALPACA_ROWS * EPOCHS * np.minimum(MAX_LENGTH, alpaca.prompt + alpaca.response).mean()
    seconds = tokens / record["tokens_per_s"]
    price = card and card.price_per_hour
    return {
        "what": f"Alpaca: {ALPACA_ROWS} rows x {EPOCHS} epochs, projected from the measured step", "of": record["name"],
        "steps": EPOCHS * STEPS_AN_EPOCH, "tokens": round(tokens), "minutes": seconds / 60,
        "dollars": price and price * seconds / 3600, "dollars_an_hour": price, "price_of": price and PRICES_DATE,
    }  # fmt: skip


def format_record(record: dict) -> str:
    """Return the printed line of a step's record, ours or a peer's."""
    if "tokens_per_s" not in record:
        kind = next((kind for kind in ("failed", "absent") if kind in record), None)
        return f"  {record['name']:<62}{kind}: {record[kind]}" if kind else f"  {record['name']}"
    parts = [
        f"  {record['name']:<62}{record['tokens_per_s']:>9,.0f} tokens/s",
        f"{record['step_s_median']:7.3f} s a step",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {format_mfu(record)}")
    if record["peak_gib"] is not None:
        over = record.get("peak_over_estimate")
        parts.append(f"{record['peak_gib']:5.1f} GiB" + (f" ({over:.1%} of the estimate)" if over else ""))
    if record.get("all_finite") is False:
        parts.append("NOT FINITE")
    if "ours_over_peer" in record:
        parts.append(f"ours is {record['ours_over_peer']:.2f}x")
    if record.get("out_of_memory_at"):
        parts.append(f"out of memory at {record['out_of_memory_at']}")
    return "  ".join(parts)

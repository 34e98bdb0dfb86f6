"""Write docs/cards.md: which models fit which cards, trained whole, by LoRA or by QLoRA; how fast, and what it costs.

    python -m scripts.pages.cards            writes the page
    python -m scripts.pages.cards --check    exits with 1 if the page differs

Every number is engine.estimate's projection.
"""

import sys
import textwrap
from pathlib import Path

import torch

from engine.model.config import MODELS
from engine.planning.cards import PRICES_DATE, Card, find_card
from engine.planning.projection import Outcome, estimate_run
from engine.planning.tables import format_duration
from engine.planning.workload import alpaca_mix
from engine.training.config import ADAPTERS, FinetuneConfig
from engine.training.planning_input import recipe_from_config, setting_from_config
from kernels.base.commands import run_command

DOC = Path(__file__).parents[2] / "docs" / "cards.md"
CARDS = {8: "RTX-4060", 12: "RTX-3060", 16: "RTX-4080", 24: "RTX-4090", 48: "L40S"}  # GB: of that size
SHAPES = ("tinyllama-1.1b", "llama-7b", "llama3-8b", "llama-13b")
KINDS = {"none": "all weights", "lora": "LoRA", "qlora": "QLoRA"}  # --adapter
HOST_BYTES = 128e9  # that a desktop may have: offloaded states must fit

HEAD = """# Which model fits which card

Made by `python -m scripts.pages.cards`; do not edit. **Everything here is projected.** The bytes of a step are exact
for weights, gradients, states and activations, which tests count; what CUDA and the allocator take is assumed. Seconds
are arithmetic and bytes over the rates that a card is assumed to reach. `python -m engine.estimate --gpu RTX-4090
--model llama-7b --adapter qlora` tells how a row comes about, for any model and card.
"""


def take_fastest(card: Card, model: str, adapter: str) -> Outcome | None:
    """Return the setting with the most tokens a second among those that fit a card, or None where nothing fits."""
    found = []
    for recompute in ("cheap", "block"):
        config = FinetuneConfig("none", data=("alpaca",), adapter=adapter, recompute=recompute)
        recipe = recipe_from_config(config)
        setting = setting_from_config(config, torch.bfloat16)
        estimate = estimate_run(MODELS[model], card, alpaca_mix(recipe), recipe, setting)
        found += [estimate.outcome] if estimate.fits else estimate.alternatives
    fitting = [outcome for outcome in found if outcome.memory.host <= HOST_BYTES]
    return max(fitting, key=lambda outcome: outcome.projection.tokens_per_s, default=None)


def describe_setting(outcome: Outcome) -> str:
    """Return the flags, other than --adapter, of a setting that fits."""
    setting, flags = outcome.setting, []
    if setting.adapter is None and setting.states != "fp32":
        flags.append(f"--optimizer-states {setting.states}")
    if setting.recompute != "cheap":
        flags.append(f"--recompute {setting.recompute}")
    if setting.master == "stochastic":
        flags.append("--master-weights stochastic")
    if setting.in_backward:
        flags.append("--optimizer-in-backward --grad-clip 0")
    text = " ".join(flags)
    if setting.offload:
        text = f"{text} --offload-optimizer".strip()
    text = f"`{text}`" if text else ""
    return text + (f", {outcome.memory.host / 1e9:.0f} GB on the host" if setting.offload else "")


def row(card: Card, model: str, adapter: str) -> str:
    """Return the row of one model on a card."""
    outcome = take_fastest(card, model, adapter)
    if outcome is None:
        return f"| {model} | {KINDS[adapter]} | does not fit | | | | | |"
    p = outcome.projection
    price = "" if p.dollars is None else f"${p.dollars:.2f}"
    return (
        f"| {model} | {KINDS[adapter]} | {outcome.memory.total / 1e9:.1f} | {outcome.cut.largest.tokens:,} | "
        f"{p.tokens_per_s:,.0f} | {format_duration(p.total_s)} | {price} | {describe_setting(outcome)} |"
    )


def page() -> str:
    """Return the text of docs/cards.md."""
    assert set(KINDS) == set(ADAPTERS)
    config = FinetuneConfig("none", data=("alpaca",))
    about = (
        f"The run: Alpaca's 52,002 rows for {config.epochs} epochs, {config.global_batch_size} rows a step, cut at "
        f"{config.max_length} tokens, packed, their templates computed once. Updates have rank {config.lora_r} and are "
        f"of every linear map. A host with {HOST_BYTES / 1e9:.0f} GB is assumed for `--offload-optimizer`. Of the "
        f"settings that fit, the fastest is shown. Prices are those of {PRICES_DATE} for an hour of a rented card, "
        "where one is known."
    )
    parts = [HEAD, textwrap.fill(about, 118, break_long_words=False, break_on_hyphens=False) + "\n"]
    for size, name in CARDS.items():
        card = find_card(name)
        parts += [
            f"## {size} GB: {name}\n",
            "| model | trained | GB | tokens a micro-batch | tokens/s | the run | price | with |",
            "|---|---|---|---|---|---|---|---|",
            *(row(card, model, adapter) for model in SHAPES for adapter in KINDS), "",
        ]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check exit with 1 if it differs."""
    new = page()
    if "--check" not in sys.argv:
        DOC.write_text(new)
    elif not DOC.exists() or DOC.read_text() != new:
        sys.exit("docs/cards.md is not what the estimate says; run python -m scripts.pages.cards")


if __name__ == "__main__":
    run_command(main)

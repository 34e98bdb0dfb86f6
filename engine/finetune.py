"""Fine-tune a LLaMA.

    python -m engine.finetune --model DIR --data alpaca.json --out DIR

Everything that can be refused is refused before the weights are loaded; engine.training.fine_tuning does the rest.
"""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from engine.base.device import cpu_multiplies_bf16
from engine.base.errors import run_main
from engine.base.flags import parse_flags
from engine.base.signals import Signals
from engine.base.terminal import print_wrapped
from engine.distributed.world import World, start_ranks
from engine.output.folder import lock_output_folder
from engine.planning import tables
from engine.planning.cards import CARDS, detect_card
from engine.planning.projection import estimate_run
from engine.planning.setting import find_mesh_problems
from engine.planning.workload import dataset_mix
from engine.training.config import EMBEDDED_DEFAULTS, FinetuneConfig
from engine.training.fine_tuning import fine_tune
from engine.training.plan import Plan, describe_plan
from engine.training.planning_input import recipe_from_config, setting_from_config
from engine.training.prepare import agree_on_plan, prepare
from engine.training.resume import find_start, is_finished
from engine.training.saving import require_disk_space
from engine.training.stanford_flags import translate_stanford_flags
from engine.training.trial import try_on_cpu


def main(argv: Sequence[str]) -> None:
    """Parse the flags, make the plan, and carry it out unless --dry-run only asks for it."""
    native_bf16 = cpu_multiplies_bf16() and not torch.cuda.is_available()
    # On a CPU that multiplies bf16 natively, bf16 is nearly twice as fast as fp32.
    embedded = EMBEDDED_DEFAULTS | ({"dtype": "bf16"} if native_bf16 else {})
    config, notes = parse_flags(FinetuneConfig, argv, translate_stanford_flags, embedded)
    signals = Signals()
    with ExitStack() as stack:
        world = stack.enter_context(start_ranks(config.device, config.rank_timeout))
        say = print_wrapped if world.is_main else say_nothing
        for note in notes:
            say(note)
        out = Path(config.out)
        world.run_on_all_ranks(lambda: world.is_main and stack.enter_context(lock_output_folder(out)))
        plan = agree_on_plan(world.run_on_all_ranks(lambda: prepare(config, world, say)), world)
        if world.run_on_main(lambda: is_finished(plan)):
            say(f"{out} holds this run, finished; --resume never starts it over")
            return
        start = world.run_on_main(lambda: find_start(plan, say))
        plan = dataclasses.replace(plan, packing=dataclasses.replace(plan.packing, max_tokens=start.max_tokens))
        world.run_on_main(lambda: require_disk_space(plan))
        if not config.dry_run:
            fine_tune(plan, world, signals, start)
            return
        say(describe_plan(plan, world))
        say("")
        if world.is_main:
            print_plan_estimate(plan, world)


def say_nothing(*_: object) -> None:
    """Stand in for print on every rank but the first."""


def print_plan_estimate(plan: Plan, world: World) -> None:
    """Print how long the run takes: on a CPU from a step that is tried, on this machine's GPU by an estimate.

    For a GPU whose figures are not known, and a CPU with too little memory for the trial, the estimate is an H100's.
    """
    if plan.device.type == "cpu" and world.size == 1:
        trial = try_on_cpu(plan)
        print("too little memory for a trial on this CPU" if trial is None else trial)
        if trial is not None:
            print("on a GPU: python -m engine.estimate --help")
            return
    card = detect_card(plan.device)
    if card is None:
        card = CARDS["H100"]
        print(f"Not on this device, whose figures are not known, but on one {card.name}; engine.estimate has others.")
    dtype = plan.dtype if plan.device.type == "cuda" or plan.config.dtype != "auto" else torch.bfloat16
    config, n_cards = dataclasses.replace(plan.config, replicas=plan.replicas), world.size
    problems = find_mesh_problems(n_cards, config.replicas, config.global_batch_size, config.optimizer_in_backward)
    if n_cards > 1 and problems:
        print(f"Not estimated on {n_cards} cards: " + "\n".join(problems))
        return
    recipe, setting = recipe_from_config(config, n_cards), setting_from_config(config, dtype, n_cards)
    mix = dataset_mix(plan.train, recipe)
    tables.print_estimate(estimate_run(plan.model_config, card, mix, recipe, setting))


if __name__ == "__main__":
    sys.exit(run_main(main))

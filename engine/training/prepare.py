"""Prepare a run: check the settings, read the data, make the plan.

Whatever can be refused is refused here, before any weight is loaded.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.base.device import choose_device, choose_dtype, choose_kernels
from engine.base.errors import DataError, UsageError, reading
from engine.base.flags import name_to_flag
from engine.base.terminal import plural
from engine.data.batches import Order
from engine.data.dataset import Dataset
from engine.data.packing import Packing
from engine.distributed.world import World
from engine.formats.adapters import CONFIG, Adapter, describe_other_base, hash_base, open_adapter
from engine.formats.find import find_model
from engine.formats.source import Source, open_source
from engine.model.adapter import AdapterConfig, adapter_from_settings, settings_from_adapter
from engine.model.config import MODELS, ModelConfig
from engine.output.checkpoint import MANIFEST, read_manifest
from engine.output.folder import RESUME_REMEDY, RUN, read_run
from engine.output.trackers import require_tracker
from engine.planning.fitting import GOOD_TOKENS, find_shard_counts
from engine.planning.setting import Setting
from engine.text.chat_templates import pin_date
from engine.text.tokenizer_files import find_tokenizer
from engine.training.config import LORA_FLAGS, FinetuneConfig
from engine.training.datasets import read_datasets
from engine.training.micro_batch_size import choose_mesh_and_tokens, choose_multiple, round_up
from engine.training.optimizer import chooses_cpu
from engine.training.plan import Plan, suggest_more_updates
from engine.training.scoring import require_questions
from kernels.ops.adamw import STATES

SAMPLE_PROMPTS = (
    "Name three things you can do with an old glass jar.",
    "Rewrite the sentence so that it sounds polite: Send me the report now.",
    "Write a two-line poem about rain.",
)
# Settings that may differ when a run is resumed: they change where things go or how often, not what is computed. Data
# is compared by the hash of its tokens, which depends on the tokenizer too, not by the names of its files.
MAY_CHANGE = {
    "adapter_dir", "tokenizer", "data", "eval_data", "token_cache", "out", "device", "micro_batch_tokens",
    "micro_batch_size", "packing", "share_prefix", "recompute", "offload_optimizer", "optimizer_in_backward",
    "eval_every", "score_answers", "sample_every", "sample_prompts", "sample_tokens", "save_every", "keep", "resume",
    "max_shard_bytes",
    "kernels", "deterministic", "replicas", "rank_timeout", "dry_run", "skip_bad_rows", "allow_changed", "max_skips",
    "spike_threshold", "spike_rollback", "log_every", "debug", "profile", "tracker",
}  # fmt: skip
# Settings that name places of one machine; ranks on different machines may differ in them.
PATHS = {"model", "adapter_dir", "tokenizer", "data", "eval_data", "token_cache", "out", "sample_prompts", "resume"}


def prepare(config: FinetuneConfig, world: World, say: Callable[[str], None]) -> Plan:
    """Check the settings, read everything but the weights, and return the plan of the run.

    Raises UsageError or DataError for settings or data that cannot be used.
    """
    require_tracker(config.tracker)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    kernels = choose_kernels(config.kernels, device, dtype)
    on_cpu = chooses_cpu(config.offload_optimizer, kernels, world.size)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
        torch.use_deterministic_algorithms(True)
    source = None if config.random_init else open_source(find_model(config.model))
    model_config = MODELS[config.model] if source is None else source.config
    tokenizer = find_tokenizer(model_config, config.tokenizer, None if source is None else source.path)
    for warning in tokenizer.warnings:
        say(f"warning: {warning}")
    if config.prompt_style == "template":
        tokenizer = pin_date(tokenizer)
    if config.max_length > model_config.max_positions:
        raise UsageError(f"--max-length {config.max_length} is over the model's {model_config.max_positions} positions")
    config = take_recorded_states(config)
    config, start_adapter = take_adapter(config, model_config)
    adapter = adapter_from_settings(vars(config))
    warn_of_adapter(adapter, start_adapter, model_config, source, say)
    check_ranks(config, model_config, world)

    train, held_out = read_datasets(config, tokenizer, world, say)
    order = Order(len(train), config.global_batch_size, config.seed, config.shuffle)
    total_steps = config.epochs * order.steps_per_epoch
    total_steps = min(total_steps, config.max_steps or total_steps)

    multiple = choose_multiple(device, dtype)
    setting, max_tokens = choose_mesh_and_tokens(model_config, config, train, device, dtype, world.size, on_cpu)
    report_states(config, setting, max_tokens, say)
    config = dataclasses.replace(config, optimizer_states=setting.states)
    max_tokens = round_up(config.micro_batch_tokens or max_tokens, multiple)
    share_prefix = config.share_prefix and not model_config.turns_by_text_length(config.max_length)
    packing = Packing(max_tokens, config.micro_batch_size, config.packing, share_prefix, multiple)
    facts = {
        "settings": select_fixed_settings(config, source),
        "dtype": str(dtype).removeprefix("torch."),
        "model": dataclasses.asdict(model_config),
        "data_sha256": train.sha256(),
        "world_size": world.size,
        "random_state": "none: order and samples are functions of seed, epoch and step",
    }
    if source is not None and adapter is not None:
        facts["base_sha256"] = hash_base(source)  # a state holds what is trained alone
    plan = Plan(
        config, Path(config.out), device, dtype, kernels, model_config, source, tokenizer, train, held_out,
        read_prompts(config.sample_prompts), total_steps, packing, setting.replicas, setting.recompute, facts, on_cpu,
        adapter, start_adapter,
    )  # fmt: skip
    require_updates(plan)
    require_questions(plan)
    return plan


def warn_of_adapter(
    adapter: AdapterConfig | None,
    start: Adapter | None,
    model_config: ModelConfig,
    source: Source | None,
    say: Callable[[str], None],
) -> None:
    """Say where an adapter goes on beside other weights than it was trained with, and where new ranks are too wide."""
    warning = describe_other_base(start, source) if start and source else None
    if adapter is not None and start is None:
        warning = adapter.describe_wide_ranks(model_config)
    if warning:
        say(f"warning: {warning}")


def report_states(config: FinetuneConfig, setting: Setting, max_tokens: int, say: Callable[[str], None]) -> None:
    """Say which optimizer states --optimizer-states auto stands for, where they are not the exact ones."""
    if config.optimizer_states == "auto" and setting.states != "fp32":
        room = f"beside micro-batches of {min(GOOD_TOKENS, max_tokens)} tokens"
        say(f"note: --optimizer-states auto is {setting.states}: exact ones (fp32) do not fit this GPU {room}")


def require_updates(plan: Plan) -> None:
    """Raise UsageError for a run that would change no weight, unless --max-steps or --lr 0 asks for it."""
    if plan.n_updates or plan.config.max_steps or not plan.config.lr:
        return
    raise UsageError(
        f"--epochs {plan.config.epochs}, --global-batch-size {plan.config.global_batch_size}: {len(plan.train)} "
        f"examples make {plural(plan.total_steps, 'step')}, and the learning rate, which rises from 0, is 0 in it: no "
        f"weight would change; {suggest_more_updates(plan)}"
    )


def take_adapter(config: FinetuneConfig, model_config: ModelConfig) -> tuple[FinetuneConfig, Adapter | None]:
    """Return the settings with the shape of --adapter-dir's adapter, and that adapter, None without.

    Raises UsageError for updates that the model cannot have, or where --out holds a model of the other kind.
    """
    kept = None
    if config.adapter_dir:
        kept = open_adapter(Path(config.adapter_dir), model_config)
        config = take_shape(config, settings_from_adapter(model_config, kept.config))
    adapter = adapter_from_settings(vars(config))
    problems = adapter.check(model_config) if adapter is not None else []
    if adapter is not None and kept is None and (unused := adapter.find_unused_patterns(model_config)):
        problems.append(f"patterns {', '.join(unused)} fit no map that has an update")
    if problems:
        raise UsageError(f"--adapter {config.adapter}: {'; '.join(problems)}")
    other, what = (CONFIG, "an adapter") if adapter is None else ("config.json", "a whole model")
    if (Path(config.out) / other).exists():
        raise UsageError(f"--out {config.out}: holds {what} ({other}), beside which this run's would be misread; "
                         "choose another folder")  # fmt: skip
    return config, kept


def take_shape(config: FinetuneConfig, shape: dict[str, Any]) -> FinetuneConfig:
    """Return the settings with the shape of the adapter of --adapter-dir. --lora-dropout, which is none, may be given.

    Raises UsageError for another flag that names a shape of its own.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneConfig)}
    given = [name for name in shape if getattr(config, name) != defaults[name]]
    wrong = [name for name in given if name != "lora_dropout" and getattr(config, name) != shape[name]]
    if wrong:
        flags = ", ".join(map(name_to_flag, wrong))
        raise UsageError(f"--adapter-dir {config.adapter_dir}: its shape is not that of {flags}; leave them out")
    return dataclasses.replace(config, **{name: value for name, value in shape.items() if name not in given})


def take_recorded_states(config: FinetuneConfig) -> FinetuneConfig:
    """Return the settings with the optimizer states of the run that they may go on with, if they leave the choice.

    A GPU with other free memory would otherwise choose others, which the training state does not hold.
    """
    if config.optimizer_states != "auto" or config.resume == "never":
        return config
    if config.resume == "auto":
        file, recorded = Path(config.out) / RUN, read_run(Path(config.out)).get("facts", {})
    else:
        file, recorded = Path(config.resume) / MANIFEST, read_manifest(Path(config.resume))
    with reading(file, RESUME_REMEDY):
        states = recorded.get("settings", {}).get("optimizer_states")
        if states not in (None, *STATES):
            raise ValueError(f"its optimizer_states are {str(states)[:40]!r}")
    return dataclasses.replace(config, optimizer_states=states) if states else config


def select_fixed_settings(config: FinetuneConfig, source: Source | None) -> dict:
    """Return the settings that must be equal when a run is resumed, because they decide what is computed."""
    left_out = MAY_CHANGE if config.adapter != "none" else {*MAY_CHANGE, "adapter", *LORA_FLAGS}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}  # as JSON gives them back
    settings["model"] = config.model if source is None else str(source.path.resolve())
    if config.loss_norm == "micro-mean":  # the loss then depends on how a step is cut
        settings["micro_batch_size"] = config.micro_batch_size
    if config.spike_rollback:  # the model then depends on which steps are left out
        settings["spike_rollback"] = config.spike_threshold
    return settings


def check_ranks(config: FinetuneConfig, model_config: ModelConfig, world: World) -> None:
    """Raise UsageError for settings that several ranks cannot follow."""
    if world.size > 1 and config.optimizer_in_backward:
        raise UsageError(f"--optimizer-in-backward with {world.size} ranks: gradients are summed first; leave it out")
    if config.global_batch_size < world.size:
        raise UsageError(
            f"--global-batch-size {config.global_batch_size} is under the {world.size} ranks; pass as many"
        )
    if config.replicas and world.size % config.replicas:
        counts = [r for r in range(1, world.size + 1) if world.size % r == 0]
        raise UsageError(f"--replicas {config.replicas} of {world.size} ranks; wanted one of {join_numbers(counts)}")
    shards = world.size // (config.replicas or 1)
    if config.replicas and shards not in (
        counts := find_shard_counts(
            model_config, config.optimizer_states, world.size, adapter_from_settings(vars(config))
        )
    ):
        raise UsageError(
            f"--optimizer-states 8bit on {shards} shards would cut a block of 256 elements; wanted one of "
            f"{join_numbers(counts[:8])} ranks a replica, or other states"
        )


def join_numbers(numbers: Sequence[int]) -> str:
    """Return the numbers as "1, 2, 4"."""
    return ", ".join(map(str, numbers))


def read_prompts(name: str) -> list[str]:
    """Return the sample prompts, one from each line of the file; without a file, three of our own."""
    if not name:
        return list(SAMPLE_PROMPTS)
    try:
        prompts = [line for line in Path(name).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--sample-prompts {name}: cannot be read ({error}); give a UTF-8 text file") from None
    if not prompts:
        raise DataError(f"--sample-prompts {name}: holds no prompt; write one a line")
    return prompts


def agree_on_plan(plan: Plan, world: World) -> Plan:
    """Return the plan that all ranks follow, with the smallest micro-batches and fewest replicas that any rank chose.

    Where --recompute auto is "none" on some ranks only, it is "cheap" on all.

    Also arranges the ranks in replicas. Raises DataError where a rank read other data or was given other settings.
    """

    def fingerprint(dataset: Dataset | None) -> str | None:
        return dataset.sha256() if dataset else None

    mine = {
        "data": plan.facts["data_sha256"], "held-out data": fingerprint(plan.held_out),
        "sample prompts": plan.sample_prompts,
        "settings": {k: v for k, v in dataclasses.asdict(plan.config).items() if k not in PATHS | {"optimizer_states"}},
        "optimizer states (choose them by --optimizer-states)": plan.config.optimizer_states,
        "model": plan.facts["model"], "base": plan.facts.get("base_sha256"), "dtype": plan.facts["dtype"],
        "kernels": plan.kernels,
    }  # fmt: skip
    first, *rest = world.gather(mine)
    for rank, theirs in enumerate(rest, 1):
        if other := " and ".join(what for what in first if theirs[what] != first[what]):
            raise world.error_on_all_ranks(DataError(
                f"rank {rank} has other {other} than rank 0; files and flags must be the same on every machine"
            ))  # fmt: skip
    max_tokens, replicas = world.min_over_ranks(plan.packing.max_tokens), world.min_over_ranks(plan.replicas)
    world.arrange_replicas(replicas)
    if plan.config.recompute == "auto" and not world.min_over_ranks(int(plan.recompute == "none")):
        plan = dataclasses.replace(plan, recompute="cheap")
    return dataclasses.replace(
        plan, packing=dataclasses.replace(plan.packing, max_tokens=max_tokens), replicas=replicas
    )

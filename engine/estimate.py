"""Will a fine-tune fit a GPU, how long will it take, and what will it cost?

    python -m engine.estimate --model llama-7b --gpu H100
    python -m engine.estimate --model llama2-7b --gpu "A100 40GB" --optimizer-states 8bit
    python -m engine.estimate --model /models/llama-13b --data rows.jsonl --gpus 8 --json out.json

engine.planning computes the bytes and the seconds. No GPU is needed. Figures are labelled projected unless a report in
benchmarks/ measured them on the GPU. Figures of several GPUs are always projected, because none was measured.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from engine.base.device import DTYPES
from engine.base.errors import CriaError, UsageError, run_main
from engine.base.flags import flag, name_to_flag, parse_flags, suggest_nearest
from engine.base.terminal import print_wrapped
from engine.data.dataset import encode_rows
from engine.data.rows import read_rows, resolve_data_paths
from engine.formats.find import find_model
from engine.formats.source import open_source
from engine.model.config import MODELS, ModelConfig
from engine.planning.cards import CARDS, PRICES_DATE, change_card, find_card
from engine.planning.projection import Estimate, estimate_run
from engine.planning.setting import Recipe, find_mesh_problems
from engine.planning.tables import estimate_as_json, print_estimate
from engine.planning.workload import Mix, alpaca_mix, dataset_mix
from engine.text.tokenizer_files import find_tokenizer
from engine.training.config import GROUPS, HINTS, FinetuneConfig
from engine.training.planning_input import recipe_from_config, setting_from_config


def shared_flag(name: str) -> Any:
    """Return a field for the flag of this name, with the default and the help that it has in engine.finetune."""
    field: Field = next(field for field in fields(FinetuneConfig) if field.name == name)
    return flag(field.default, **field.metadata)


@dataclass(frozen=True)
class EstimateConfig:
    """Whether a fine-tune fits a card, how long it takes and what it costs. Needs no GPU, no weights and no data.

    Without --data the rows are Alpaca's: 52,002, with the lengths of 9,229 of them.
    """

    GROUPS: ClassVar = {
        "the card": (
            "gpu", "gpus", "gpu_memory", "gpu_tflops", "gpu_bandwidth", "host_bandwidth", "price_per_hour",
        ),
    } | GROUPS  # fmt: skip
    HINTS: ClassVar = HINTS
    model: str = flag("", "named shape, folder (Hugging Face or Meta layout) or .gguf file", alias="model_name_or_path")
    gpu: str = flag("H100", "the card, one of " + ", ".join(CARDS))
    gpus: int = flag(1, "cards; several are projected")
    replicas: int | None = shared_flag("replicas")
    gpu_memory: float | None = flag(None, "GiB of another card, as torch tells its total_memory (auto: of --gpu)")
    gpu_tflops: float | None = flag(None, "its dense bf16 peak, TFLOP/s (auto: of --gpu)")
    gpu_bandwidth: float | None = flag(None, "its memory's bandwidth, GB/s (auto: of --gpu)")
    host_bandwidth: float | None = flag(
        None, "of the host's memory, GB/s read and written, which --offload-optimizer may wait for (auto: of --gpu)"
    )
    price_per_hour: float | None = flag(None, f"dollars an hour of one card (auto: a table of {PRICES_DATE})")
    json: str = flag("", "file for the same as JSON")
    tokenizer: str = shared_flag("tokenizer")
    data: tuple[str, ...] = shared_flag("data")
    epochs: int = shared_flag("epochs")
    max_steps: int | None = shared_flag("max_steps")
    global_batch_size: int = shared_flag("global_batch_size")
    micro_batch_tokens: int | None = shared_flag("micro_batch_tokens")
    micro_batch_size: int | None = shared_flag("micro_batch_size")
    max_length: int = shared_flag("max_length")
    grad_clip: float = shared_flag("grad_clip")
    seed: int = shared_flag("seed")
    dtype: str = shared_flag("dtype")
    adapter: str = shared_flag("adapter")
    lora_r: int = shared_flag("lora_r")
    lora_alpha: float = shared_flag("lora_alpha")
    lora_dropout: float = shared_flag("lora_dropout")
    lora_targets: tuple[str, ...] = shared_flag("lora_targets")
    rslora: bool = shared_flag("rslora")
    lora_rank_pattern: tuple[str, ...] = shared_flag("lora_rank_pattern")
    lora_alpha_pattern: tuple[str, ...] = shared_flag("lora_alpha_pattern")
    lora_save: tuple[str, ...] = shared_flag("lora_save")
    prompt_style: str = shared_flag("prompt_style")
    train_on_prompt: bool = shared_flag("train_on_prompt")
    share_prefix: bool = shared_flag("share_prefix")
    master_weights: str = shared_flag("master_weights")
    optimizer_states: str = shared_flag("optimizer_states")
    offload_optimizer: bool = shared_flag("offload_optimizer")
    optimizer_in_backward: bool = shared_flag("optimizer_in_backward")
    recompute: str = shared_flag("recompute")
    save_every: str = shared_flag("save_every")
    skip_bad_rows: bool = shared_flag("skip_bad_rows")
    debug: bool = shared_flag("debug")

    def __post_init__(self) -> None:
        problems = find_mesh_problems(self.gpus, self.replicas, self.global_batch_size, self.optimizer_in_backward)
        try:
            find_card(self.gpu)
        except ValueError as error:
            problems.append(str(error))
        try:
            self.to_finetune_config()
        except ValueError as error:
            problems += str(error).split("\n")
        for name in ("gpu_memory", "gpu_tflops", "gpu_bandwidth", "host_bandwidth"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name_to_flag(name)} is {getattr(self, name)}, wanted more than 0")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            problems.append(f"--price-per-hour is {self.price_per_hour}, wanted 0 or more")
        if not self.model:
            problems.append("--model is missing")
        elif self.model not in MODELS and not Path(self.model).expanduser().exists():
            problems.append(
                f"--model {self.model}: no such folder or file{suggest_nearest(self.model, MODELS)}; give one, or "
                f"one of the shapes {', '.join(MODELS)}"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def to_finetune_config(self) -> FinetuneConfig:
        """Return engine.finetune's settings with these flags. Raises ValueError naming every problem."""
        stand_ins = {"model": "none", "data": self.data or ("none",)}  # a named shape has weights for all we know
        return FinetuneConfig(**{name: getattr(self, name) for name in SHARED_FLAGS} | stand_ins)


SHARED_FLAGS = [f.name for f in fields(EstimateConfig) if f.name in {g.name for g in fields(FinetuneConfig)}]


def read_mix(config: EstimateConfig, recipe: Recipe, c: ModelConfig, model_path: Path | None) -> Mix:
    """Return the token counts of --data under the model's tokenizer.

    Without --data they are Alpaca's. Without a tokenizer each row of --data is taken to be as long as one of Alpaca's.
    """
    if not config.data:
        return alpaca_mix(recipe)
    with_tools = config.prompt_style == "template"
    rows, _ = read_rows(resolve_data_paths(config.data), config.skip_bad_rows, with_tools=with_tools)
    try:
        tokenizer = find_tokenizer(c, config.tokenizer, model_path)
    except CriaError as error:
        if config.tokenizer:
            raise
        what = f"{len(rows):,} rows, of Alpaca's lengths for want of a tokenizer ({error})"
        return alpaca_mix(recipe, len(rows), what)
    table = encode_rows(rows, tokenizer, config.prompt_style, config.max_length, config.train_on_prompt)
    return dataset_mix(table.select(), recipe)


def estimate(config: EstimateConfig) -> Estimate:
    """Return the memory, time and cost of the run that the flags describe."""
    source = None if config.model in MODELS else open_source(find_model(config.model))
    c = MODELS[config.model] if source is None else source.config
    card = change_card(
        find_card(config.gpu), config.gpu_memory, config.gpu_tflops, config.gpu_bandwidth, config.price_per_hour
    )
    if config.host_bandwidth is not None:
        card = replace(card, host_gb_per_s=config.host_bandwidth)
    if config.max_length > c.max_positions:
        raise UsageError(f"--max-length {config.max_length} is over the model's {c.max_positions} positions")
    finetuning, dtype = config.to_finetune_config(), DTYPES["bf16" if config.dtype == "auto" else config.dtype]
    recipe = replace(recipe_from_config(finetuning, config.gpus), model=config.model)
    setting = setting_from_config(finetuning, dtype, config.gpus)
    if setting.adapter is not None and (problems := setting.adapter.check(c)):
        raise UsageError(f"--adapter {config.adapter}: {'; '.join(problems)}")
    mix = read_mix(config, recipe, c, None if source is None else source.path)
    return estimate_run(c, card, mix, recipe, setting)


def main(argv: Sequence[str]) -> None:
    """Print the estimate, and write it to --json. Raises UsageError for a file that cannot be written."""
    config, _ = parse_flags(EstimateConfig, argv, None, {"model": "llama-7b"})
    names_card = any(word.partition("=")[0] == "--gpu" for word in argv)
    if config.gpu_memory is not None and not names_card and None in (config.gpu_tflops, config.gpu_bandwidth):
        print_wrapped(
            f"note: a card of {config.gpu_memory:g} GiB, but without --gpu its speed is taken to be that of one "
            f"{config.gpu}; --gpu names another of {', '.join(CARDS)}; --gpu-tflops and --gpu-bandwidth are for others"
        )
    found = estimate(config)
    print_estimate(found, own_price=config.price_per_hour is not None)
    if config.json:
        text = json.dumps(estimate_as_json(found, asdict(config)), indent=1, allow_nan=False)
        try:
            Path(config.json).write_text(text + "\n")
        except OSError as error:
            raise UsageError(f"--json {config.json}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(run_main(main))

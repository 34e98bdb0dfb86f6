"""Will it fit, how long does it take, what does it cost.

    python -m engine.estimate --model llama-7b --gpu H100

engine.planning.memory has the bytes, engine.planning.cards the seconds. Nothing here needs a GPU, and what no report in benchmarks/
measured on the card is labelled projected. So are several cards: none has been measured.
"""

import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from engine.base.device import DTYPES
from engine.base.errors import UsageError, exit_code_of
from engine.base.flags import from_cli, knob, nearest
from engine.data.batches import count_steps_per_epoch
from engine.formats.find import find_model
from engine.formats.source import open_source
from engine.model.config import MODELS, ModelConfig
from engine.planning.cards import (
    CARDS,
    GIB,
    PRICES_OF,
    Card,
    Rates,
    Traffic,
    Work,
    block_seconds,
    cards_of,
    chosen_card,
    find_card,
    rates,
    step_seconds,
    update_bytes,
)
from engine.planning.memory import (
    MOST_TOKENS,
    cheapest_that_fits,
    largest_micro_batch,
    layout_that_fits,
    memory,
    setting_of,
    state_bytes,
    traffic,
)
from engine.planning.tables import as_json, tell
from engine.planning.workload import Mix, Plan, alpaca_mix, cut, file_mix
from engine.training.config import FinetuneConfig
from engine.training.micro_batch_size import shards_of_8bit

MOST_GPUS = 64
COMPUTING = ("gemm", "attention", "memory", "host")  # of a step, what hides communication
GOOD_TOKENS = 2048  # with fewer in a micro-batch the GEMMs wait for their weights


# ---- settings -------------------------------------------------------------------------------------------------------


def divisors(n: int) -> str:
    return ", ".join(str(r) for r in range(1, n + 1) if n % r == 0)


def same(name):
    """The flag as engine.finetune has it: default and help."""
    field = next(field for field in fields(FinetuneConfig) if field.name == name)
    return knob(field.default, **field.metadata)


@dataclass(frozen=True)
class EstimateConfig:
    """Whether a fine-tune fits a card, how long it takes and what it costs. Needs no GPU, no weights and no data.

    Without --data the rows are Alpaca's: 52,002, with the lengths of 9,229 of them.
    """

    model: str = knob("", "named shape, folder (Hugging Face or Meta layout) or .gguf file", alias="model_name_or_path")
    gpu: str = knob("H100", "the card, one of " + ", ".join(CARDS))
    gpus: int = knob(1, "cards; several are projected")
    replicas: int | None = same("replicas")
    gpu_memory: float | None = knob(None, "GiB of another card, as torch tells its total_memory (auto: of --gpu)")
    gpu_tflops: float | None = knob(None, "its dense bf16 peak, TFLOP/s (auto: of --gpu)")
    gpu_bandwidth: float | None = knob(None, "its memory's bandwidth, GB/s (auto: of --gpu)")
    price_per_hour: float | None = knob(None, f"dollars an hour of one card (auto: a table of {PRICES_OF})")
    json: str = knob("", "file for the same as JSON")
    tokenizer: str = same("tokenizer")
    data: tuple[str, ...] = same("data")
    epochs: int = same("epochs")
    max_steps: int | None = same("max_steps")
    global_batch_size: int = same("global_batch_size")
    micro_batch_tokens: int | None = same("micro_batch_tokens")
    micro_batch_size: int | None = same("micro_batch_size")
    max_length: int = same("max_length")
    grad_clip: float = same("grad_clip")
    seed: int = same("seed")
    dtype: str = same("dtype")
    prompt_style: str = same("prompt_style")
    train_on_prompt: bool = same("train_on_prompt")
    share_prefix: bool = same("share_prefix")
    master_weights: str = same("master_weights")
    optimizer_states: str = same("optimizer_states")
    offload_optimizer: bool = same("offload_optimizer")
    optimizer_in_backward: bool = same("optimizer_in_backward")
    recompute: str = same("recompute")
    save_every: str = same("save_every")
    skip_bad_rows: bool = same("skip_bad_rows")
    debug: bool = same("debug")

    def __post_init__(self):
        problems = []
        if not 1 <= self.gpus <= MOST_GPUS:
            problems.append(f"--gpus is {self.gpus}, wanted 1 to {MOST_GPUS}")
        elif left := self.global_batch_size % self.gpus:
            lower = self.global_batch_size - left
            problems.append(
                f"--global-batch-size {self.global_batch_size} is not divisible by --gpus {self.gpus}: every card "
                f"takes the same number; pass {f'{lower} or ' if lower > 0 else ''}{lower + self.gpus}"
            )
        if 1 <= self.gpus <= MOST_GPUS and self.gpus % (self.replicas or 1):
            problems.append(f"--replicas {self.replicas} of --gpus {self.gpus}; wanted one of {divisors(self.gpus)}")
        if self.gpus > 1 and self.optimizer_in_backward:
            problems.append(
                f"--optimizer-in-backward with --gpus {self.gpus} is not projected: each card holds a part of the "
                "gradients alone; leave out one of the two"
            )
        try:
            find_card(self.gpu)
        except ValueError as error:
            problems.append(str(error))
        stand_ins = {"model": self.model or "none", "random_init": self.model in MODELS, "data": self.data or ("none",)}
        try:  # the rest as engine.finetune takes it
            FinetuneConfig(**{name: getattr(self, name) for name in SHARED} | stand_ins)
        except ValueError as error:
            problems += str(error).split("\n")
        for name in ("gpu_memory", "gpu_tflops", "gpu_bandwidth"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                problems.append(f"--{name.replace('_', '-')} is {getattr(self, name)}, wanted more than 0")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            problems.append(f"--price-per-hour is {self.price_per_hour}, wanted 0 or more")
        if not self.model:
            problems.append("--model is missing")
        elif self.model not in MODELS and not Path(self.model).expanduser().exists():
            problems.append(
                f"--model {self.model}: no such folder or file{nearest(self.model, MODELS)}; give one, or one of the "
                f"shapes {', '.join(MODELS)}"
            )
        if problems:
            raise ValueError("\n".join(problems))


SHARED = [f.name for f in fields(EstimateConfig) if f.name in {g.name for g in fields(FinetuneConfig)}]


def several_cards(config: FinetuneConfig, cards: int, replicas: int) -> EstimateConfig:
    """A run's settings on so many cards. Raises ValueError where those are not projected."""
    return EstimateConfig(**{name: getattr(config, name) for name in SHARED} | {"gpus": cards, "replicas": replicas})


# ---- projecting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Speed and cost of a whole fine-tune."""

    work: Work  # of a step on each card
    seconds: dict[str, float]  # of a step, by what bounds it
    block_s: tuple[float, float]  # of a block's forward and backward in a micro-batch
    traffic: Traffic  # which each card sends
    tokens_per_s: float  # logical, of all cards
    mfu: float  # 6 N logical tokens a second / peak
    steps: int
    total_s: float
    dollars: float | None

    @property
    def communication_bytes(self) -> int:
        """That each card sends in a step."""
        return sum(self.traffic.of_step(self.work.micro_batches).values())

    @property
    def communication_s(self) -> float:
        """Of which seconds["communication"], the sum of late, is not hidden."""
        return sum(self.traffic.seconds(self.work.micro_batches).values())

    @property
    def late(self) -> dict[str, float]:
        return self.traffic.late(self.work.micro_batches, *self.block_s)


def project(config, c: ModelConfig, card: Card, speed: Rates, mix: Mix, plan: Plan, setting: dict) -> Projection:
    cards = setting["cards"] * setting["replicas"]
    state = state_bytes(c, setting["dtype"], setting["master"], setting["states"], setting["cards"])
    tokens = min(mix.logical, mix.own + mix.prefix * plan.micro_batches)
    work = Work(tokens, mix.loss_rows, mix.pairs, mix.query_pairs, plan.micro_batches)
    sent = traffic(c, card, setting["dtype"], setting["cards"], setting["replicas"])
    seconds = step_seconds(
        c, card, speed, work, size=setting["dtype"].itemsize, recompute=setting["recompute"],
        update_bytes=update_bytes(*state[:3], setting["master"]) + state[0],  # the gradients' norm reads them once more
        offload_bytes=state[1] + state[2] if setting["offload"] else 0, traffic=sent,
    )  # fmt: skip
    blocks = block_seconds(c, work, setting["recompute"], sum(seconds[kind] for kind in COMPUTING))
    per_step = min(config.global_batch_size, mix.examples)
    steps = min(
        config.epochs * count_steps_per_epoch(mix.examples, config.global_batch_size), config.max_steps or math.inf
    )
    total_s = seconds["total"] * min(steps, config.epochs * mix.examples / per_step)  # an epoch's last is smaller
    rate = cards * mix.logical / seconds["total"]
    dollars = None if card.price_per_hour is None else total_s / 3600 * cards * card.price_per_hour
    mfu = 6 * c.n_parameters * rate / (1e12 * card.peak_tflops * cards)
    return Projection(work, seconds, blocks, sent, rate, mfu, steps, total_s, dollars)


def estimate(config: EstimateConfig) -> dict:
    """Everything that is printed, of what the command line names."""
    source = None if config.model in MODELS else open_source(find_model(config.model))
    c = MODELS[config.model] if source is None else source.config
    card = chosen_card(config)
    if config.max_length > c.max_seq_len:
        raise UsageError(f"--max-length {config.max_length} is over the model's {c.max_seq_len} positions")
    mix = file_mix(config, c, source and source.path) if config.data else alpaca_mix(config)
    return estimate_on(card, config, c, mix, DTYPES["bf16" if config.dtype == "auto" else config.dtype])


def layout(config, c: ModelConfig, room: int, tokens: int, share: dict, setting: dict) -> dict:
    """{"cards": of a replica, "replicas"} as --replicas says, or as fits beside so many tokens in one card's share of a
    step. Raises UsageError where blocks of 8-bit states would be cut."""
    n, cards, eight = cards_of(config), setting["cards"], setting["states"] == "8bit"
    counts = shards_of_8bit(c) if eight and n > 1 else None
    if n > 1 and config.replicas is None:
        least = min(config.max_length, share["most_tokens"])
        asked = share | setting
        replicas, _ = layout_that_fits(c, room, n, share_tokens=tokens, least_tokens=least, counts=counts, **asked)
        return {"cards": n // replicas, "replicas": replicas}
    if counts and cards not in counts:
        wanted = " or ".join(str(n // count) for count in reversed(counts) if n % count == 0)
        raise UsageError(
            f"--optimizer-states 8bit over {cards} shards would cut a block of 256 elements; wanted --replicas {wanted}"
            ", or other states"
        )
    return {"cards": cards, "replicas": setting["replicas"]}


def estimate_on(card: Card, config, c: ModelConfig, mix: Mix, dtype: torch.dtype) -> dict:
    """Everything that is printed. config: an EstimateConfig, or the FinetuneConfig of a run."""
    room, speed = int(card.memory_gib * GIB), rates(card)
    whole = cut(mix, 2**40, config.micro_batch_size)  # a step in as few micro-batches as there can be
    step = whole.tokens if whole.one_micro_batch else None
    most = min(config.micro_batch_tokens or MOST_TOKENS, step or MOST_TOKENS)
    share = {"loss_share": mix.loss_share, "most_tokens": most, "step_tokens": step}
    setting = setting_of(config, dtype)
    setting |= layout(config, c, room, whole.tokens, share, setting)

    def of(budget, setting):
        plan = cut(mix, budget, config.micro_batch_size)
        used = memory(c, tokens=plan.tokens, loss_rows=plan.loss_rows, one_micro_batch=plan.one_micro_batch, **setting)
        return plan, used, project(config, c, card, speed, mix, plan, setting)

    fitting = largest_micro_batch(c, room, **share, **setting)
    budget = config.micro_batch_tokens or max(fitting, config.max_length)  # auto: what fits, or the least
    plan, used, projection = of(budget, setting)
    alternatives = []
    if used.total > room:
        wish = min(most, config.micro_batch_tokens or GOOD_TOKENS)
        ways = cheapest_that_fits(c, room, tokens=wish, least_tokens=config.max_length, **share, **setting)
        if cards_of(config) > 1:
            counts = shards_of_8bit(c)
            ways = [way for way in ways if way.setting["states"] != "8bit" or way.setting["cards"] in counts]
        alternatives = [(way.flags, way.setting, *of(way.tokens, way.setting)) for way in ways]
    return {
        "config": config, "model": c, "card": card, "speed": speed, "mix": mix, "setting": setting, "room": room,
        "plan": plan, "memory": used, "projection": projection, "alternatives": alternatives,
    }  # fmt: skip


def main(argv):
    config, _ = from_cli(EstimateConfig, argv, None, {"model": "llama-7b"})
    found = estimate(config)
    tell(found)
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"--json {config.json}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

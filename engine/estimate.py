"""Will it fit, how long does it take, what does it cost.

    python -m engine.estimate --model llama-7b --gpu H100

engine.memory has the bytes, engine.cards the seconds. Nothing here needs a GPU, and what no report in benchmarks/
measured on the card is labelled projected. So are several cards: none has been measured.
"""

import json
import math
import sys
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.cards import (
    ATTENTION_SHARE,
    CARDS,
    GIB,
    KERNEL_SHARE,
    MACHINE,
    PRICES_OF,
    Card,
    Rates,
    Traffic,
    Work,
    block_seconds,
    cards_of,
    chosen_card,
    find_card,
    gemm_flops,
    label_of,
    rates,
    step_seconds,
    update_bytes,
)
from engine.cli import from_cli
from engine.config import MODELS, FinetuneConfig, ModelConfig, knob, nearest
from engine.data import steps_per_epoch
from engine.errors import UsageError, exit_code_of
from engine.load import DTYPES, find_model
from engine.log import Output, strict
from engine.memory import (
    MOST_TOKENS,
    cheapest_that_fits,
    gb,
    largest_micro_batch,
    layout_that_fits,
    memory,
    memory_rows,
    setting_of,
    state_bytes,
    traffic,
)
from engine.mix import Mix, Plan, alpaca_mix, cut, file_mix
from engine.model import new_model
from engine.optim import counts_that_fit
from engine.weights import open_source

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
    steps = min(config.epochs * steps_per_epoch(mix.examples, config.global_batch_size), config.max_steps or math.inf)
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


def shards_of_8bit(c: ModelConfig) -> list[int]:
    """Into how many a replica can be cut with 8-bit states."""
    return counts_that_fit(
        {name: tuple(p.shape) for name, p in new_model(c, "meta", torch.bfloat16).named_parameters()}
    )


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


# ---- telling --------------------------------------------------------------------------------------------------------


def duration(seconds):
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"


def show(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]], file=None) -> None:
    """A table, drawn by rich on a terminal, in aligned plain text elsewhere. Columns of numbers end together; the last
    column is text, which may wrap."""
    out = Output(sys.stdout if file is None else file)
    columns = list(zip(*rows, strict=True))
    right = [all(cell[:1] in "0123456789$" for cell in column) for column in columns[:-1]] + [False]
    if out.isatty():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if right[i] else "left", no_wrap=i < len(head) - 1)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in ("total", "step") else None)
        console = Console(file=out, force_terminal=True, highlight=False)
        console.print(table)
        console.print()
        return
    widths = [max(len(cell) for cell in (name, *column)) for name, column in zip(head, columns, strict=True)]
    out.write(title + "\n")
    for row in [head, *rows]:
        cells = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        out.write("  " + "  ".join(cells).rstrip() + "\n")
    out.write("\n")


def time_rows(found: dict) -> list[tuple[str, str, str]]:
    """(what, milliseconds of a step, the arithmetic) of each part that takes time, and of the step."""
    card, speed, mix, projection = found["card"], found["speed"], found["mix"], found["projection"]
    ms, work = projection.seconds, projection.work
    flops = gemm_flops(found["model"], work, found["setting"]["recompute"])
    why = {
        "gemm": f"{flops:.3g} FLOP at {speed.gemm_flops_per_s / 1e12:.0f} of {card.peak_tflops:g} TFLOP/s",
        "attention": f"at {ATTENTION_SHARE} of that, masked tiles and all",
        "memory": f"norms, RoPE, SwiGLU, loss: {KERNEL_SHARE} of a copy's {speed.copy_bytes_per_s / 1e9:,.0f} GB/s",
        "update": "gradient norm and AdamW, at the same rate",
        "host": "launches that the card waits for",
        "offload": f"master and states over PCIe, {card.pcie_gb_per_s:g} GB/s each way",
    }
    rows = [(name, f"{1e3 * ms[name]:.1f}", text) for name, text in why.items() if ms[name]]
    if cards_in(found) > 1:
        text = (
            f"not hidden of {1e3 * projection.communication_s:,.0f} ms, {projection.communication_bytes / 1e9:,.0f} GB"
        )
        rows.append(("communication", f"{1e3 * ms['communication']:.1f}", text))
    cut = f"{work.micro_batches} micro-batch{'es' * (work.micro_batches > 1)}"
    tokens = f"{work.tokens:,.0f} tokens computed of {mix.logical:,.0f}"
    return [*rows, ("step", f"{1e3 * ms['total']:.1f}", f"{tokens}, {cut}")]


def cards_in(found: dict) -> int:
    return found["setting"]["cards"] * found["setting"]["replicas"]


def layout_name(cards: int, replicas: int) -> str:
    if replicas == 1:
        return f"sharded over {cards}"
    return f"{replicas} replicas" + f" of {cards} shards" * (cards > 1)


COLLECTIVES = {
    "gather_forward": "all-gather, forward", "gather_backward": "all-gather, backward",
    "reduce": "reduce-scatter", "sum": "all-reduce",
}  # fmt: skip


def collective_rows(projection: Projection) -> list[tuple[str, str, str, str]]:
    """(collective, GB that a card sends in a step, milliseconds, how) of each kind that there is."""
    sent, n, rows = projection.traffic, projection.work.micro_batches, []
    seconds = sent.seconds(n)
    for kind, n_bytes in sent.of_step(n).items():
        times, (block, others) = (1, sent.sum) if kind == "sum" else (n, getattr(sent, kind.partition("_")[0]))
        rate = sent.sum_bytes_per_s if kind == "sum" else sent.bytes_per_s
        how = (
            f"{times * sent.layers} of {block / 1e6:,.0f} MB, {times} of {others / 1e6:,.0f}, at {rate / 1e9:.0f} GB/s"
        )
        if n_bytes:
            rows.append((COLLECTIVES[kind], f"{n_bytes / 1e9:.1f}", f"{1e3 * seconds[kind]:.1f}", how))
    return rows


def tell_communication(found: dict) -> None:
    """What each card sends in a step, and what of it computing waits for."""
    projection = found["projection"]
    setting, (forward, backward) = found["setting"], projection.block_s
    title = f"Communication of a step, each card: {layout_name(setting['cards'], setting['replicas'])}; projected"
    show(title, ("collective", "GB", "ms", "how"), collective_rows(projection))
    waits = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in projection.late.items())
    text = f"A block computes {1e3 * forward:.2f} ms forward, {1e3 * backward:.2f} backward; not hidden: {waits} ms."
    print(textwrap.fill(text, 80) + "\n")


def tell_host(found: dict) -> None:
    """What the computer's memory holds for its cards."""
    used, cards = found["memory"], min(cards_in(found), MACHINE)
    parts = [f"{gb(used.host)} GB a card of master and states"] * (used.host > 0)
    parts += [f"{gb(used.host_copy)} GB a card for the copy of a state that is saved"] * (used.host_copy > 0)
    if parts:
        of_all = f"; {gb(host_bytes(found))} GB in a machine" * (cards > 1)
        print(textwrap.fill(f"On the host: {', '.join(parts)}{of_all}", 80) + "\n")


def host_bytes(found: dict) -> int:
    """Of the fullest machine: master and states of all its cards, copies of those whose shards a checkpoint holds."""
    used, setting = found["memory"], found["setting"]
    return used.host * min(cards_in(found), MACHINE) + used.host_copy * min(setting["cards"], MACHINE)


def tell(found: dict) -> None:
    """Prints everything."""
    config, c, card, mix, plan = (found[name] for name in ("config", "model", "card", "mix", "plan"))
    cards, setting = cards_in(found), found["setting"]
    if cards > 1:
        print(textwrap.fill(label_of(cards), 80) + "\n")
    on = f"on each of {cards} {card.name}" if cards > 1 else f"on one {card.name}"
    on += f", {layout_name(setting['cards'], setting['replicas'])}" * (cards > 1)
    title = textwrap.fill(f"Memory: {config.model}, {c.n_parameters:.3g} parameters, {on}", 80)
    rows = memory_rows(found["memory"], found["room"], plan.tokens, **setting)
    show(title, ("kind", "GB", "what"), rows)
    tell_host(found)
    if found["memory"].total > found["room"]:
        tell_alternatives(found)
        return
    projection, speed = found["projection"], found["speed"]
    title = f"Time of a step: {mix.per_step} examples{' a card' * (cards > 1)} of {mix.what}; {speed.source}"
    show(title, ("part", "ms", "at"), time_rows(found))
    if cards > 1:
        tell_communication(found)
    print(
        f"{projection.tokens_per_s:,.0f} tokens/s ({speed.source}), MFU {projection.mfu:.0%}: "
        f"6 x {c.n_parameters:.3g} x tokens/s / {f'{cards} / ' * (cards > 1)}{card.peak_tflops:g}e12"
    )
    print(f"{projection.steps:,} steps, {config.epochs} epochs: {duration(projection.total_s)}, {cost(found)}")
    for step in measured_steps(found):
        total_s = projection.total_s * projection.tokens_per_s / step["tokens_per_s"]
        print(
            f"measured in {speed.report}: {step['tokens_per_s']:,.0f} tokens/s in micro-batches of {step['tokens']:,} "
            f"tokens, peak {step['peak_gib']:.1f} GiB; that is {duration(total_s)}"
        )


def measured_steps(found: dict) -> list[dict]:
    """The steps of this model in this setting that a report of the card has."""
    config, setting = found["config"], found["setting"]
    wanted = {"model": config.model, "sharing": config.share_prefix}
    wanted |= {name: setting[name] for name in ("master", "states", "recompute", "offload")}
    wanted |= {name: setting[name] for name in ("cards", "replicas")} if cards_in(found) > 1 else {}
    figures = {"tokens_per_s", "tokens", "peak_gib"}  # which a step that failed has not
    return [
        step for step in found["speed"].steps
        if figures <= step.keys() and all(step.get(name) == value for name, value in wanted.items())
    ]  # fmt: skip


def cost(found):
    config, dollars, price = found["config"], found["projection"].dollars, found["card"].price_per_hour
    if dollars is None:
        return "at no known price; pass --price-per-hour"
    cards = f"{cards_in(found)} x " * (cards_in(found) > 1)
    given = getattr(config, "price_per_hour", None) is not None
    return f"${dollars:.2f} at {cards}${price:.2f} an hour" + f" ({PRICES_OF})" * (not given)


def tell_alternatives(found: dict) -> None:
    """What fits instead, or how far the least is from it."""
    a_card = "a card " * (cards_in(found) > 1)
    rows = [
        (
            gb(used.total), f"{p.tokens_per_s:,.0f}", duration(p.total_s),
            "no price" if p.dollars is None else f"${p.dollars:.2f}",
            " ".join(flags) + f"  ({gb(used.host)} GB {a_card}on the host)" * (used.host > 0),
        )
        for flags, _, _, used, p in found["alternatives"]
    ]  # fmt: skip
    if rows:
        title = f"What fits, the cheapest in speed and mathematics first; {found['speed'].source}"
        show(title, ("GB", "tokens/s", "time", "cost", "with"), rows)
        return
    least = least_bytes(found)
    fitting = [card.name for card in CARDS.values() if card.memory_gib * GIB >= least]
    print(f"Nothing fits: {gb(least)} GB {a_card}are the least that any setting takes.")
    if fitting:
        print(f"These cards have as much: {', '.join(fitting)}")


def least_bytes(found):
    """Of the settings that take the least: all state on the host, or no gradients in steps of one example."""
    tokens = found["config"].max_length
    setting = found["setting"] | {"states": "8bit", "recompute": "block", "master": "stochastic"}
    ways = [{"offload": True, "in_backward": False}, {"offload": False, "in_backward": True, "one_micro_batch": True}]
    ways = ways if cards_in(found) == 1 else ways[:1]
    return min(memory(found["model"], tokens=tokens, loss_rows=tokens, **setting | way).total for way in ways)


def as_json(found: dict) -> dict:
    """found as what JSON can say, every quantity with its unit."""
    card, speed, cards = found["card"], found["speed"], cards_in(found)

    def projected(setting, plan, used, projection):
        sent, n = projection.traffic, plan.micro_batches
        return {
            "shards": setting["cards"], "replicas": setting["replicas"],
            "memory_bytes": asdict(used) | {"total": used.total, "room": found["room"]},
            "fits": used.total <= found["room"], "micro_batch_tokens": plan.tokens,
            "micro_batches": plan.micro_batches, "computed_tokens": projection.work.tokens,
            "communication_bytes": projection.communication_bytes, "communication_s": projection.communication_s,
            "collectives": asdict(sent) | {"bytes": sent.of_step(n), "seconds": sent.seconds(n)},
            "block_s": projection.block_s, "not_hidden_s": projection.late,
            "step_s": projection.seconds, "tokens_per_s": projection.tokens_per_s, "mfu": projection.mfu,
            "steps": projection.steps, "total_s": projection.total_s, "dollars": projection.dollars,
        }  # fmt: skip

    return strict({
        "what": "engine.estimate", "config": asdict(found["config"]), "model": asdict(found["model"]),
        "parameters": found["model"].n_parameters, "cards": cards, "label": label_of(cards) if cards > 1 else None,
        "card": asdict(card), "prices_of": PRICES_OF, "host_bytes_of_a_machine": host_bytes(found),
        "mix": asdict(found["mix"]), "source": speed.source, "report": speed.report,
        "gemm_flops_per_s": speed.gemm_flops_per_s, "copy_bytes_per_s": speed.copy_bytes_per_s,
        "measured_steps": measured_steps(found),
        **projected(found["setting"], found["plan"], found["memory"], found["projection"]),
        "alternatives": [
            {"flags": flags, **projected(*others)} for flags, *others in found["alternatives"]
        ],
    })  # fmt: skip


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

"""How an estimate is printed, in tables and sentences, and how it is written as JSON."""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.table import Table

from engine.base.files import make_json_safe
from engine.base.terminal import Output
from engine.planning.cards import CARDS, GIB, MACHINE_GPUS, PORT_GB_PER_S, PRICES_DATE
from engine.planning.fitting import find_least_bytes, find_least_bytes_of_adapters
from engine.planning.memory import Memory
from engine.planning.projection import Estimate, Outcome, Projection
from engine.planning.setting import Setting, describe_mesh
from engine.planning.step_time import ATTENTION_SHARE, KERNEL_SHARE, gemm_flops, host_update_bytes
from engine.planning.weights import count_trained, state_bytes

Row = tuple[str, ...]
WIDTH = 80  # columns of a paragraph


def format_gb(n_bytes: int) -> str:
    """Return bytes as GB with two digits."""
    return f"{n_bytes / 1e9:.2f}"


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: "90 s", "17 min", "3.2 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"


def print_paragraph(text: str) -> None:
    """Print text in lines of WIDTH columns, and an empty line."""
    print(textwrap.fill(text, WIDTH) + "\n")


def print_table(title: str, head: Row, rows: Sequence[Row], file: IO[str] | None = None) -> None:
    """Print a table, drawn by rich on a terminal and in aligned plain text elsewhere.

    Columns of numbers are aligned to the right. The last column is text, which may wrap.
    """
    out = Output(sys.stdout if file is None else file)
    columns = list(zip(*rows, strict=True))
    is_right = [all(cell[:1] in "0123456789$" for cell in column) for column in columns[:-1]] + [False]
    if out.isatty():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if is_right[i] else "left", no_wrap=i < len(head) - 1)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in ("total", "step") else None)
        console = Console(file=cast(IO[str], out), force_terminal=True, highlight=False)
        console.print(table)
        console.print()
        return
    widths = [max(len(cell) for cell in (name, *column)) for name, column in zip(head, columns, strict=True)]
    out.write(title + "\n")
    for row in [head, *rows]:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        )
        out.write("  " + "  ".join(cells).rstrip() + "\n")
    out.write("\n")


# ---- rows of the tables ---------------------------------------------------------------------------------------------


def memory_rows(used: Memory, available_bytes: int, tokens: int, setting: Setting) -> list[Row]:
    """Return (kind, GB, what it is) of each kind of memory and of their sum."""
    dtype = str(setting.dtype).removeprefix("torch.")
    shards, replicas = setting.shards, setting.replicas
    masters = {"split": "the 16 bits that bf16 lacks", "fp32": "in fp32", "stochastic": "none: rounded at random"}
    of_master = masters[setting.master] if setting.dtype == torch.bfloat16 else "the weights themselves"
    of_states = f"m and v, {setting.states}"
    if used.host:
        where = "on the host" if setting.on_cpu else f"{format_gb(used.host)} GB of master and states on the host"
        of_states += f"; {where}"
    of_gradients = dtype if setting.adapter is None else f"{dtype}, of what is trained"
    of_weights = f"{dtype}, 1/{shards} of them" if shards > 1 else dtype
    if setting.adapter is not None:
        of_weights += f", {format_gb(used.trained)} GB of them trained"
    if setting.packed:
        of_weights = f"matrices in 4 bits; the rest {of_weights}"
    if replicas > 1 and used.gradients > used.weights:
        of_gradients += ", and fp32 to be summed"
    if setting.gradients_leave:
        of_gradients += ", those there at once: they leave in backward"
    elif setting.adapter is None and used.gradients < used.weights:
        of_gradients += ", those there at once"
    which = "the head's logits" if used.head >= used.backward else "a layer's backward"
    of_temporaries = f"{which}: the larger of {format_gb(used.head)} and {format_gb(used.backward)}"
    a_token = used.activations / tokens
    of_token = f"{a_token / 1e6:.2f} MB" if a_token >= 1e6 else f"{a_token / 1e3:.1f} kB"
    left = available_bytes - used.total
    verdict = f"fits, {format_gb(left)} left" if left >= 0 else f"does not fit, {format_gb(-left)} too much"
    rows = [
        ("weights", used.weights, of_weights),
        ("fp32 master", used.master, of_master),
        ("optimizer states", used.states, of_states),
        ("gradients", used.gradients, of_gradients),
    ]
    if used.gathered:
        whole = "two blocks' weights; a block's and head's gradients"
        copied = "copies of a block's and head's weights; their gradients"
        rows.append(("gathered", used.gathered, copied if shards == 1 else whole))
    rows += [
        ("activations", used.activations, f"{tokens:,} tokens, {of_token} each"),
        ("temporaries", used.temporaries, of_temporaries),
        ("overhead", used.overhead, "CUDA and its libraries, the allocator: assumed"),
        ("total", used.total, f"of {format_gb(available_bytes)} ({available_bytes / GIB:.2f} GiB): {verdict}"),
    ]
    return [(kind, format_gb(n_bytes), text) for kind, n_bytes, text in rows]


def time_rows(estimate: Estimate) -> list[Row]:
    """Return (part, milliseconds, how they are computed) of each part of a step that takes time, and of the step."""
    card, speed, setting, projection = (
        estimate.card,
        estimate.rates,
        estimate.outcome.setting,
        estimate.outcome.projection,
    )
    seconds, work = projection.seconds, projection.work
    flops = gemm_flops(estimate.model, work, setting.recompute, setting.adapter)
    why = {
        "gemm": f"{flops:.3g} FLOP at {speed.gemm_flops_per_s / 1e12:.0f} of {card.peak_tflops:g} TFLOP/s",
        "attention": f"at {ATTENTION_SHARE} of that, masked tiles and all",
        "memory": f"norms, RoPE, SwiGLU, loss: {KERNEL_SHARE} of a copy's {speed.copy_bytes_per_s / 1e9:,.0f} GB/s",
        "dequantise": "matrices in 4 bits, made whole for each product: that rate",
        "update": "gradient norm, AdamW: that rate, or instructions",
        "host": "launches that the card waits for",
    } | offload_texts(estimate)
    rows: list[Row] = [(name, f"{1e3 * seconds[name]:.1f}", text) for name, text in why.items() if seconds[name]]
    if setting.n_cards > 1:
        communication_ms, sent_gb = 1e3 * projection.communication_s, projection.communication_bytes / 1e9
        text = f"not hidden of {communication_ms:,.0f} ms, {sent_gb:,.0f} GB"
        rows.append(("communication", f"{1e3 * seconds['communication']:.1f}", text))
    batches = "1 micro-batch" if work.micro_batches == 1 else f"{work.micro_batches} micro-batches"
    tokens = f"{work.tokens:,.0f} tokens computed of {estimate.mix.logical:,.0f}"
    return [*rows, ("step", f"{1e3 * seconds['total']:.1f}", f"{tokens}, {batches}")]


def offload_texts(estimate: Estimate) -> dict[str, str]:
    """Return how the parts of a step are computed that offloaded states change: "update", "offload" or both."""
    card, setting, seconds = estimate.card, estimate.outcome.setting, estimate.outcome.projection.seconds
    if not setting.offload:
        return {}
    state, pcie = state_bytes(estimate.model, setting), f"at PCIe's {card.pcie_gb_per_s:g} GB/s each way"
    moved = host_update_bytes(state, replace(setting, on_cpu=True)) / 1e9
    if not setting.on_cpu:
        rate = moved / seconds["offload"]
        return {"offload": f"master and states {pcie}; CRIA_OPTIMIZER=cpu is sooner over {rate:.0f} GB/s of RAM"}
    when = "longer than backward" if setting.gradients_leave else "after backward"
    return {
        "update": f"by the CPU: {moved:,.0f} GB at --host-bandwidth {card.host_gb_per_s:g}, or PCIe",
        "offload": f"gradients {pcie}, {when}",
    }


COLLECTIVES = {
    "gather_forward": "all-gather, forward", "gather_backward": "all-gather, backward",
    "reduce": "reduce-scatter", "sum": "all-reduce",
}  # fmt: skip


def collective_rows(projection: Projection) -> list[Row]:
    """Return (collective, GB that a GPU sends in a step, milliseconds, how) of each kind of collective in use."""
    sent, n = projection.traffic, projection.work.micro_batches
    seconds = sent.seconds(n)
    rows: list[Row] = []
    for kind, n_bytes in sent.step_bytes(n).items():
        times, (block, others) = (1, sent.sum) if kind == "sum" else (n, getattr(sent, kind.partition("_")[0]))
        rate = sent.sum_bytes_per_s if kind == "sum" else sent.bytes_per_s
        how = f"{times * sent.layers} of {block / 1e6:,.0f} MB, {times} of {others / 1e6:,.0f}"
        if kind == "gather_backward":
            how = f"{times * (sent.layers - 1)} of {block / 1e6:,.0f} MB"
        how += f", at {rate / 1e9:.0f} GB/s"
        if n_bytes:
            rows.append((COLLECTIVES[kind], f"{n_bytes / 1e9:.1f}", f"{1e3 * seconds[kind]:.1f}", how))
    return rows


def alternative_row(outcome: Outcome) -> Row:
    """Return (GB, tokens/s, time, cost, flags) of a setting that fits."""
    projection, used = outcome.projection, outcome.memory
    flags = " ".join(outcome.flags)
    if used.host:
        a_card = "a card " if outcome.setting.n_cards > 1 else ""
        flags += f"  ({format_gb(used.host)} GB {a_card}on the host)"
    return (
        format_gb(used.total), f"{projection.tokens_per_s:,.0f}", format_duration(projection.total_s),
        "no price" if projection.dollars is None else f"${projection.dollars:.2f}", flags,
    )  # fmt: skip


# ---- printing -------------------------------------------------------------------------------------------------------


def projection_label(n_cards: int) -> str:
    """Return the sentence to print with figures of several GPUs: they are projected."""
    label = "projected: no run on several cards was measured; sharded by FSDP2, a block at a time"
    label += "; a step's tokens shared out evenly"  # the fullest of 8 GPUs has 1.01 of the mean's
    return label + (
        f"; machines of {MACHINE_GPUS}, joined by {8 * PORT_GB_PER_S} Gb/s a card" if n_cards > MACHINE_GPUS else ""
    )


def host_bytes(outcome: Outcome) -> int:
    """Return the host memory of the fullest machine.

    It holds the offloaded states of all its GPUs, and the copies of those whose shards a checkpoint holds.
    """
    used, setting = outcome.memory, outcome.setting
    return used.host * min(setting.n_cards, MACHINE_GPUS) + used.host_copy * min(setting.shards, MACHINE_GPUS)


def print_memory(estimate: Estimate) -> None:
    """Print the table of memory on the GPU, and what the host's memory holds."""
    outcome, setting, used = estimate.outcome, estimate.outcome.setting, estimate.outcome.memory
    where = f"on one {estimate.card.name}"
    if setting.n_cards > 1:
        where = f"on each of {setting.n_cards} {estimate.card.name}, {describe_mesh(setting.shards, setting.replicas)}"
    title = f"Memory: {estimate.recipe.model}, {estimate.model.n_parameters:.3g} parameters, {where}"
    rows = memory_rows(used, estimate.available_bytes, outcome.cut.largest.tokens, setting)
    print_table(textwrap.fill(title, WIDTH), ("kind", "GB", "what"), rows)
    parts = []
    if used.host:
        what = "master, states, gradients and weights" if setting.on_cpu else "master and states"
        parts.append(f"{format_gb(used.host)} GB a card of {what}")
    if used.host_copy:
        parts.append(f"{format_gb(used.host_copy)} GB a card for the copy of a state that is saved")
    if parts:
        of_machine = f"; {format_gb(host_bytes(outcome))} GB in a machine" if setting.n_cards > 1 else ""
        print_paragraph(f"On the host: {', '.join(parts)}{of_machine}")


def print_communication(outcome: Outcome) -> None:
    """Print what each GPU sends in a step, and how long computing waits for it."""
    projection, (forward_s, backward_s) = outcome.projection, outcome.projection.block_s
    mesh = describe_mesh(outcome.setting.shards, outcome.setting.replicas)
    title = f"Communication of a step, each card: {mesh}; projected"
    print_table(title, ("collective", "GB", "ms", "how"), collective_rows(projection))
    waits = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in projection.not_hidden_seconds.items())
    print_paragraph(
        f"A block computes {1e3 * forward_s:.2f} ms forward, {1e3 * backward_s:.2f} backward; not hidden: {waits} ms."
    )


def print_speed(estimate: Estimate, own_price: bool) -> None:
    """Print the table of a step's time, the speed and cost of the run, and the steps that a report measured."""
    card, speed, mix, projection = estimate.card, estimate.rates, estimate.mix, estimate.outcome.projection
    cards = estimate.outcome.setting.n_cards
    a_card, of_cards = (" a card", f"{cards} / ") if cards > 1 else ("", "")
    title = f"Time of a step: {mix.per_step} examples{a_card} of {mix.what}; {speed.source}"
    print_table(title, ("part", "ms", "at"), time_rows(estimate))
    if cards > 1:
        print_communication(estimate.outcome)
    computed = cards * projection.work.tokens / projection.seconds["total"]
    print(
        f"{projection.tokens_per_s:,.0f} tokens/s ({speed.source}), effective: a shared prefix is computed once\n"
        f"{computed:,.0f} computed tokens/s, MFU {projection.mfu:.0%}: "
        f"{describe_flops(estimate)} x tokens/s / {of_cards}{card.peak_tflops:g}e12"
    )
    duration = format_duration(projection.total_s)
    print(
        f"{projection.steps:,} steps, {estimate.recipe.epochs} epochs: {duration}, {describe_cost(estimate, own_price)}"
    )
    for step in find_measured_steps(estimate):
        total_s = projection.total_s * projection.tokens_per_s / step["tokens_per_s"]
        print(
            f"measured in {speed.report}: {step['tokens_per_s']:,.0f} tokens/s in micro-batches of {step['tokens']:,} "
            f"tokens, peak {step['peak_gib']:.1f} GiB; that is {format_duration(total_s)}"
        )


def describe_flops(estimate: Estimate) -> str:
    """Return the operations a token that MFU counts, in words."""
    n, adapter = estimate.model.n_parameters, estimate.outcome.setting.adapter
    if adapter is None:
        return f"6 x {n:.3g}"
    return f"(4 x {n:.3g} + 6 x {count_trained(estimate.model, adapter):.3g})"


def print_alternatives(estimate: Estimate) -> None:
    """Print the settings that fit instead, or the least memory that any setting takes; and what adapters take."""
    setting, tokens = estimate.outcome.setting, estimate.recipe.max_length
    if estimate.alternatives:
        title = f"What fits, the cheapest in speed and mathematics first; {estimate.rates.source}"
        rows = [alternative_row(outcome) for outcome in estimate.alternatives]
        print_table(title, ("GB", "tokens/s", "time", "cost", "with"), rows)
    if setting.adapter is None:
        least_bytes = find_least_bytes_of_adapters(estimate.model, setting, tokens)
        ways = [f"--adapter {name} (from {format_gb(least)} GB)" for name, least in least_bytes.items()]
        print_paragraph(f"Adapters take less: {', '.join(ways)}.")
    if estimate.alternatives:
        return
    least = find_least_bytes(estimate.model, setting, tokens)
    a_card = "a card " if setting.n_cards > 1 else ""
    print(f"Nothing fits: {format_gb(least)} GB {a_card}are the least that any setting takes.")
    fitting = [card.name for card in CARDS.values() if card.memory_gib * GIB >= least]
    if fitting:
        print(textwrap.fill(f"These cards have as much: {', '.join(fitting)}", WIDTH))


def print_estimate(estimate: Estimate, own_price: bool = False) -> None:
    """Print the memory of a run, and its speed and cost, or, where it does not fit, what does.

    own_price: the GPU's price is the user's, not the table's.
    """
    cards = estimate.outcome.setting.n_cards
    if cards > 1:
        print_paragraph(projection_label(cards))
    print_memory(estimate)
    if estimate.fits:
        print_speed(estimate, own_price)
    else:
        print_alternatives(estimate)


def describe_cost(estimate: Estimate, own_price: bool) -> str:
    """Return the run's cost in words, with the date of the table's price."""
    dollars, price, cards = (
        estimate.outcome.projection.dollars,
        estimate.card.price_per_hour,
        estimate.outcome.setting.n_cards,
    )
    if dollars is None:
        return "at no known price; pass --price-per-hour"
    times = f"{cards} x " if cards > 1 else ""
    return f"${dollars:.2f} at {times}${price:.2f} an hour" + ("" if own_price else f" ({PRICES_DATE})")


def find_measured_steps(estimate: Estimate) -> list[dict[str, Any]]:
    """Return the steps of this model in this setting that a report of the GPU measured."""
    setting = estimate.outcome.setting
    wanted: dict[str, Any] = {"model": estimate.recipe.model, "sharing": estimate.recipe.share_prefix}
    wanted |= {name: getattr(setting, name) for name in ("master", "states", "recompute", "offload")}
    wanted["adapter"] = setting.adapter and (
        "qlora" if setting.packed else "lora"
    )  # reports name it where there is one
    if setting.offload:
        wanted["on_cpu"] = setting.on_cpu
    if setting.n_cards > 1:
        wanted |= {"cards": setting.shards, "replicas": setting.replicas}
    figures = {"tokens_per_s", "tokens", "peak_gib"}  # a step that failed lacks them
    return [
        step for step in estimate.rates.steps
        if figures <= step.keys() and all(step.get(name) == value for name, value in wanted.items())
    ]  # fmt: skip


# ---- JSON -----------------------------------------------------------------------------------------------------------


def outcome_as_json(outcome: Outcome, available_bytes: int) -> dict[str, Any]:
    """Return one setting's outcome as JSON can hold it, every quantity with its unit."""
    used, projection, n = outcome.memory, outcome.projection, outcome.cut.micro_batches
    sent = projection.traffic
    return {
        "shards": outcome.setting.shards, "replicas": outcome.setting.replicas,
        "memory_bytes": asdict(used) | {"total": used.total, "room": available_bytes},
        "fits": used.total <= available_bytes, "micro_batch_tokens": outcome.cut.largest.tokens,
        "micro_batches": n, "computed_tokens": projection.work.tokens,
        "communication_bytes": projection.communication_bytes, "communication_s": projection.communication_s,
        "collectives": asdict(sent) | {"bytes": sent.step_bytes(n), "seconds": sent.seconds(n)},
        "block_s": projection.block_s, "not_hidden_s": projection.not_hidden_seconds,
        "step_s": projection.seconds, "tokens_per_s": projection.tokens_per_s, "mfu": projection.mfu,
        "steps": projection.steps, "total_s": projection.total_s, "dollars": projection.dollars,
    }  # fmt: skip


def estimate_as_json(estimate: Estimate, config: dict[str, Any]) -> dict[str, Any]:
    """Return an estimate and the command's flags (config) as JSON can hold them, every quantity with its unit."""
    speed, cards = estimate.rates, estimate.outcome.setting.n_cards
    return make_json_safe({
        "what": "engine.estimate", "config": config, "model": asdict(estimate.model),
        "parameters": estimate.model.n_parameters, "cards": cards,
        "label": projection_label(cards) if cards > 1 else None,
        "card": asdict(estimate.card), "prices_of": PRICES_DATE,
        "host_bytes_of_a_machine": host_bytes(estimate.outcome),
        "mix": asdict(estimate.mix), "source": speed.source, "report": speed.report,
        "gemm_flops_per_s": speed.gemm_flops_per_s, "copy_bytes_per_s": speed.copy_bytes_per_s,
        "measured_steps": find_measured_steps(estimate),
        **outcome_as_json(estimate.outcome, estimate.available_bytes),
        "alternatives": [
            {"flags": outcome.flags, **outcome_as_json(outcome, estimate.available_bytes)}
            for outcome in estimate.alternatives
        ],
    })  # fmt: skip

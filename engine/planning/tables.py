"""What engine.estimate found, in tables, sentences and JSON."""

import sys
import textwrap
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from engine.base.files import strict
from engine.base.terminal import Output
from engine.planning.cards import ATTENTION_SHARE, CARDS, GIB, KERNEL_SHARE, MACHINE, PRICES_OF, gemm_flops, label_of
from engine.planning.memory import gb, layout_name, memory, memory_rows


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


COLLECTIVES = {
    "gather_forward": "all-gather, forward", "gather_backward": "all-gather, backward",
    "reduce": "reduce-scatter", "sum": "all-reduce",
}  # fmt: skip


def collective_rows(projection) -> list[tuple[str, str, str, str]]:
    """(collective, GB that a card sends in a step, milliseconds, how) of each kind that there is."""
    sent, n, rows = projection.traffic, projection.work.micro_batches, []
    seconds = sent.seconds(n)
    for kind, n_bytes in sent.of_step(n).items():
        times, (block, others) = (1, sent.sum) if kind == "sum" else (n, getattr(sent, kind.partition("_")[0]))
        rate = sent.sum_bytes_per_s if kind == "sum" else sent.bytes_per_s
        how = f"{times * sent.layers} of {block / 1e6:,.0f} MB, {times} of {others / 1e6:,.0f}"
        if kind == "gather_backward":
            how = f"{times * (sent.layers - 1)} of {block / 1e6:,.0f} MB"
        how += f", at {rate / 1e9:.0f} GB/s"
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

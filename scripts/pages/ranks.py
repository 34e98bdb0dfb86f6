"""Writes docs/ranks.md: what several cards send each other in a step, what computing hides of it, and what a run costs.

python -m scripts.pages.ranks            writes it
python -m scripts.pages.ranks --check    exits 1 when it says something else

Every number is engine.estimate's, projected: none was measured on several cards.
"""

import sys
import textwrap
from pathlib import Path

import torch

from engine.base.errors import UsageError
from engine.estimate import COMPUTING, EstimateConfig, estimate
from engine.model.config import MODELS
from engine.planning.cards import (
    COPY_SHARE,
    LINK_SHARE,
    MACHINE,
    PORT_GB_PER_S,
    Work,
    block_seconds,
    find_card,
    rates,
    step_seconds,
)
from engine.planning.memory import layout_name, traffic
from engine.planning.tables import duration
from engine.planning.workload import alpaca_mix

DOC = Path(__file__).parents[2] / "docs" / "ranks.md"
GPUS, CARDS, SHAPES, STATES = 8, ("A100-80", "H100"), ("llama-7b", "llama-13b"), ("fp32", "8bit")
LAYOUTS = (1, 2, 4, 8)  # replicas
ROWS = EstimateConfig("llama-7b").global_batch_size

HEAD = """# Several cards: the communication plan

Made by `python -m scripts.pages.ranks`; do not edit. **Everything here is projected**: no run on several GPUs was
measured. Bytes are exact (a test counts FSDP2's collectives); seconds are bytes over the rate that a link is assumed to
reach, and arithmetic over the rate that a card is assumed to reach. `python -m engine.estimate --gpus N` says the same
of any model, card and layout.

N cards are R replicas (`--replicas`) of S = N / R shards. A group is a block, or the embedding, the final norm and the
head together. P is the number of parameters, L the number of blocks, n the number of micro-batches of a step.

## Which collective when

| collective | of | when | numbers that a card sends, a group | how many a step |
|---|---|---|---|---|
| all-gather | bf16 weights | before a group's forward | (S - 1) / S of its parameters | n (L + 1) |
| all-gather | bf16 weights | before its backward, but for E and block L | the same | n (L - 1) |
| reduce-scatter | fp32 gradients | after its backward | the same | n (L + 1) |
| all-reduce | their sums, fp32 | after the last micro-batch's reduce-scatter | 2 (R - 1) / R of a shard | L + 1 |

With one shard (R = N, plain data parallelism) there are all-reduces alone; with one replica none of them.

In forward the gather of block i + 1 is queued while block i computes, and starts when i's own weights have been copied
out of its buffer. In backward the gather of block i - 1 is queued as block i begins, and its reduce-scatter, then
its all-reduce, run under the backward of block i - 1. Each kind has a stream of its own:

```text
forward    gathers    E  1 | 2  | 3  | ...  | L
           computes        | 1  | 2  | ...  | L - 1 | L | loss
backward   gathers    L-1  | L-2   | L-3   | ...  |         |
           reduces         |       | L     | ...  | 3       | 2       | 1  E
           computes   E    | L     | L-1   | ...  | 2       | 1       |
```

E is the group outside of blocks. E and block L stay whole from forward to backward, which begins with them. So four
things are not hidden, whatever the cards:

- **begin**: E and block 1 are gathered before anything can compute;
- **end**: the first block's and E's reductions (and all-reduces) come after all computing;
- **forward**: in each block, what its neighbour's gather takes longer than the block computes;
- **backward**: what a gather and a reduce-scatter (and an all-reduce, in the last micro-batch) take longer than a
  block's backward. They share the same links, so their seconds add up, unless replicas lie in different machines.

The update waits for the last gradient, and the next step's first gather for the update.

## Which layout

In bytes a parameter, of bf16 weights and fp32 reductions, a card sends in a step

```text
n x 8 (S - 1) / S  +  8 (R - 1) / (R S)       that is 8 (N - 1) / N when n = 1, whatever the layout
```

but for the weights of E and block L, which are gathered once. So where a card's share of a step is one micro-batch, and
all links are alike, layouts send the same. But a card updates P / S parameters and keeps 4 P / S bytes of fp32 sums, so
more replicas take longer and more room. They pay off where a step has several micro-batches that do not hide their
communication, or where machines are joined by slower links than their cards are. Hence `--replicas` auto: one replica
where a card's share of a step is one micro-batch, else as many as fit without more micro-batches.
"""


def ways(card: str, model: str, states: str) -> dict:
    """{replicas, None for auto: what estimate finds; None where it refuses to cut 8-bit states so}."""
    found = {}
    for r in (None, *LAYOUTS):
        try:
            found[r] = estimate(EstimateConfig(model, card, GPUS, replicas=r, optimizer_states=states))
        except UsageError:
            found[r] = None
    return found


def fits(found: dict | None) -> bool:
    return found is not None and found["memory"].total <= found["room"]


def name_of(r: int, n: int = GPUS) -> str:
    return layout_name(n // r, r)


def text(words: str) -> str:
    return textwrap.fill(words, 120) + "\n"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def costs(found: dict) -> str:
    """Memory, bytes, seconds and money of each layout."""
    auto = found[None]["setting"]["replicas"]
    rows = []
    for r in LAYOUTS:
        way, name = found[r], f"**{name_of(r)}**" if r == auto else name_of(r)
        memory_gb = "8-bit blocks would be cut" if way is None else f"{way['memory'].total / 1e9:.1f}"
        if not fits(way):
            rows.append((name, memory_gb + ": does not fit" * (way is not None)))
            continue
        p, plan = way["projection"], way["plan"]
        sent = p.traffic.of_step(plan.micro_batches)
        rows.append((
            name, memory_gb, f"{plan.micro_batches} x {p.work.tokens / plan.micro_batches:,.0f}",
            *(f"{sent[kind] / 1e9:.1f}" if sent[kind] else "" for kind in sent),
            f"{1e3 * p.communication_s:.0f}", f"{1e3 * p.seconds['communication']:.0f}",
            f"{1e3 * p.seconds['update']:.0f}", f"{1e3 * p.seconds['total']:.0f}",
            f"{p.tokens_per_s:,.0f}", f"{p.total_s / 60:.1f}", f"{p.dollars:.2f}",
        ))  # fmt: skip
    head = (
        "layout", "GB a card", "micro-batches x tokens", "all-gather forward, GB", "backward, GB", "reduce-scatter, GB",
        "all-reduce, GB", "communication, ms", "not hidden, ms", "update, ms", "step, ms", "tokens/s", "run, min", "$",
    )  # fmt: skip
    rows = [(*row, *[""] * (len(head) - len(row))) for row in rows]
    return table(head, rows)


def blocks(found: dict) -> str:
    """A block's collectives beside a block's computing, of each layout that fits."""
    rows = []
    for r in filter(lambda r: fits(found[r]), LAYOUTS):
        p = found[r]["projection"]
        sent, (forward, backward) = p.traffic, p.block_s
        gather, reduce, sums = sent.of_group(0, True)
        mb = " / ".join(f"{n / 1e6:,.0f}" for n in (sent.gather[0], sent.reduce[0], sent.sum[0]))
        beside = sent.together(gather, reduce, sums)
        rows.append((
            name_of(r), mb, f"{1e3 * gather:.2f} / {1e3 * forward:.2f}", f"{1e3 * beside:.2f} / {1e3 * backward:.2f}",
            *(f"{1e3 * s:.1f}" for s in p.late.values()),
        ))  # fmt: skip
    head = (
        "layout", "a block's gather / reduction / all-reduce, MB", "gather / forward, ms",
        "gather + reduction + all-reduce / backward, ms", "begin, ms", "forward, ms", "backward, ms", "end, ms",
    )  # fmt: skip
    return table(head, rows)


def verdict(found: dict) -> str:
    """What auto takes, and what the fastest that fits gains on it."""
    auto = found[None]
    mine = auto["setting"]["replicas"]
    fastest = min(filter(lambda r: fits(found[r]), LAYOUTS), key=lambda r: found[r]["projection"].seconds["total"])
    taken = f"`--replicas` auto takes {name_of(mine)}"
    if fastest == mine:
        return taken + ", projected to be the fastest that fits."
    late = 1e3 * (auto["projection"].seconds["total"] - found[fastest]["projection"].seconds["total"])
    return taken + f"; {name_of(fastest)} is projected to be {late:.0f} ms a step faster."


def case(card: str, model: str, states: str) -> str:
    found = ways(card, model, states)
    title = f"### {GPUS} x {card}, {model}, {states} states"
    return "\n".join((f"{title}\n", costs(found), f"{verdict(found)}\n", blocks(found)))


def tokens_that_hide(card_name: str, model: str, replicas: int) -> int:
    """The fewest tokens of a micro-batch, Alpaca's in kind, whose blocks hide what goes beside them."""
    c, card = MODELS[model], find_card(card_name)
    mix = alpaca_mix(EstimateConfig(model, card_name, GPUS))
    whole = mix.own + mix.prefix
    sent = traffic(c, card, torch.bfloat16, GPUS // replicas, replicas)

    def waits(tokens):
        work = Work(tokens, *(tokens * n / whole for n in (mix.loss_rows, mix.pairs, mix.query_pairs)), 1)
        seconds = step_seconds(c, card, rates(card), work, size=2, recompute="cheap", update_bytes=0)
        late = sent.late(1, *block_seconds(c, work, "cheap", sum(seconds[kind] for kind in COMPUTING)))
        return late["forward"] + late["backward"] > 0

    few, many = 0, 1 << 16
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if waits(middle) else (few, middle)
    return many


def hiding() -> str:
    rows = [
        (f"{GPUS} x {card}, {model}", *(f"{tokens_that_hide(card, model, r):,}" for r in LAYOUTS))
        for card in CARDS for model in SHAPES
    ]  # fmt: skip
    return table(("tokens a card and micro-batch", *(name_of(r) for r in LAYOUTS)), rows)


def machines(card: str, model: str, n: int) -> str:
    """Sharded over all machines, or replicas that each stay in one."""
    rows = []
    for batch in (ROWS, 8 * ROWS, 64 * ROWS):
        for r in (1, n // MACHINE):
            config = EstimateConfig(model, card, n, replicas=r, global_batch_size=batch, micro_batch_tokens=4096)
            p = estimate(config)["projection"]
            sent, micro_batches = p.traffic.seconds(p.work.micro_batches), p.work.micro_batches
            inside = sum(s for kind, s in sent.items() if kind != "sum")
            rows.append((
                f"{batch:,}", name_of(r, n), micro_batches, f"{1e3 * inside:.0f}", f"{1e3 * sent['sum']:.0f}",
                f"{1e3 * p.seconds['communication']:.0f}", f"{1e3 * p.seconds['total']:.0f}", f"{p.tokens_per_s:,.0f}",
                duration(p.total_s),
            ))  # fmt: skip
    head = (
        "rows a step", "layout", "micro-batches", "gathers and reductions, ms", "all-reduce, ms", "not hidden, ms",
        "step, ms", "tokens/s", "run",
    )  # fmt: skip
    return table(head, rows)


def assumed() -> str:
    rows = []
    for card in map(find_card, CARDS):
        speed = rates(card)
        rows.append((
            card.name, f"{card.nvlink_gb_per_s:g}", f"{card.bus_bytes_per_s(GPUS) / 1e9:g}",
            f"{speed.gemm_flops_per_s / 1e12:.0f} of {card.peak_tflops:g}", f"{speed.copy_bytes_per_s / 1e9:,.0f}",
            f"{card.price_per_hour:.2f}", speed.source,
        ))  # fmt: skip
    head = ("card", "NVLink one way, GB/s", "bus rate, GB/s", "GEMM, TFLOP/s", "copy, GB/s", "$ an hour", "source")
    return table(head, rows)


def page() -> str:
    far = "H100", "llama-13b", 64
    parts = [
        HEAD, "## What is assumed\n", assumed(),
        text(
            f"NCCL is assumed to reach {LINK_SHARE} of a link, a copy {COPY_SHARE} of the memory's bandwidth; "
            "`engine/planning/cards.py` has the sources. A block computes its share of a step's matrix products, a third of it "
            "in forward. What a collective takes to start, and a ring's hops, are not counted."
        ),
        f"## {GPUS} cards, {ROWS} rows a step\n",
        text(
            "Alpaca's 52,002 rows for 3 epochs, cut at 512 tokens, `--recompute cheap`, fp32 masters as 16 bits more. "
            "What auto takes is in bold. GB and ms are a card's, of one step."
        ),
        *(case(card, model, states) for card in CARDS for model in SHAPES for states in STATES),
    ]  # fmt: skip
    parts += [
        "## Where the plan breaks\n",
        text(
            "A block's gather takes as long for one token as for a million. With fewer computed tokens in a card's "
            "micro-batch than these, blocks wait for the links. A larger `--global-batch-size` hides more; more cards "
            "hide less, as each has fewer rows. Where there are replicas the figure is the last micro-batch's, whose "
            "all-reduces share the links."
        ),
        hiding(),
        "## Over machines\n",
        text(
            f"{far[2]} x {far[0]} in machines of {MACHINE}, a port of {8 * PORT_GB_PER_S} Gb/s beside each card; "
            f"{far[1]}, fp32 states, micro-batches of at most 4,096 tokens. Sharded over all, each micro-batch's "
            "gathers and reductions cross machines; replicas that stay in one do both over NVLink, and ports carry one "
            "all-reduce a step, beside them. With a port a card the two come out alike, but that a card of the first "
            f"updates a {far[2]}th of the parameters. Rings of {far[2]} have {far[2] - 1} hops, those of {MACHINE} "
            f"have {MACHINE - 1}, which is not counted; and machines with fewer ports favour replicas."
        ),
        machines(*far),
    ]  # fmt: skip
    return "\n".join(parts)


def main():
    new = page()
    if "--check" not in sys.argv:
        DOC.parent.mkdir(exist_ok=True)
        DOC.write_text(new)
    elif not DOC.exists() or DOC.read_text() != new:
        sys.exit("docs/ranks.md is not what the estimate says; run python -m scripts.pages.ranks")


if __name__ == "__main__":
    main()

"""Write docs/ranks.md: what several GPUs send each other in a step, how much computing hides, and what a run costs.

    python -m scripts.pages.ranks            writes the page
    python -m scripts.pages.ranks --check    exits with 1 if the page differs

Every number is engine.estimate's projection: none was measured on several GPUs.
"""

import contextlib
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import UsageError
from engine.model.config import MODELS
from engine.planning.cards import COPY_SHARE, LINK_SHARE, MACHINE_GPUS, PORT_GB_PER_S, find_card, find_rates
from engine.planning.projection import Estimate, estimate_run
from engine.planning.setting import Setting, describe_mesh
from engine.planning.step_time import COMPUTING, Work, block_seconds, step_seconds, step_traffic
from engine.planning.tables import format_duration
from engine.planning.workload import alpaca_mix
from engine.training.config import FinetuneConfig
from engine.training.planning_input import recipe_from_config, setting_from_config
from kernels.base.commands import run_command

DOC = Path(__file__).parents[2] / "docs" / "ranks.md"
GPUS, CARDS, SHAPES, STATES = 8, ("A100-80", "H100", "H200"), ("llama-7b", "llama-13b"), ("fp32", "8bit")
LAYOUTS = (1, 2, 4, 8)  # replicas
ROWS = FinetuneConfig.global_batch_size

HEAD = """# Several GPUs: the communication plan

Made by `python -m scripts.pages.ranks`; do not edit. **Everything here is projected**: no run on several GPUs was
measured. Bytes are exact: a test counts FSDP2's collectives. Seconds are bytes over the rate that a link is assumed to
reach, and arithmetic over the rate that a GPU is assumed to reach. `python -m engine.estimate --gpus N` gives the same
figures for any model, GPU and mesh.

N GPUs hold R replicas (`--replicas`) of S = N / R shards. A group is a block, or the embedding, the final norm and the
head together, which is called E. P is the number of parameters, L the number of blocks, n the number of micro-batches
of a step.

## Which collective runs when

| collective | of | when | numbers that a GPU sends, a group | how many a step |
|---|---|---|---|---|
| all-gather | bf16 weights | before a group's forward | (S - 1) / S of its parameters | n (L + 1) |
| all-gather | bf16 weights | before its backward, but not E, block L | (S - 1) / S of its parameters | n (L - 1) |
| reduce-scatter | fp32 gradients | after its backward | (S - 1) / S of its parameters | n (L + 1) |
| all-reduce | their sums, fp32 | after the last micro-batch's reduce-scatter | 2 (R - 1) / R of a shard | L + 1 |

With one shard (R = N, plain data parallelism) only all-reduces are needed. With one replica none are.

In forward the gather of block i + 1 is queued while block i computes. It starts when the weights of block i have been
copied out of the gather's buffer. In backward the gather of block i - 1 is queued when block i begins. The
reduce-scatter of block i, and then its all-reduce, run during the backward of block i - 1. Each kind has a stream of
its own:

```text
forward    gathers    E  1 | 2  | 3  | ...  | L
           computes        | 1  | 2  | ...  | L - 1 | L | loss
backward   gathers    L-1  | L-2   | L-3   | ...  |         |
           reduces         |       | L     | ...  | 3       | 2       | 1  E
           computes   E    | L     | L-1   | ...  | 2       | 1       |
```

E and block L stay whole from forward to backward, which begins with them. So computing waits four times, whatever the
GPUs:

- **begin**: E and block 1 are gathered before anything can compute;
- **end**: the reductions (and all-reduces) of block 1 and E come after all computing;
- **forward**: each block waits for the gather of its weights, by as much as that takes longer than the block before it;
- **backward**: each block waits by as much as a gather and a reduce-scatter (and an all-reduce, in the last
  micro-batch) take longer than a block's backward. They share links, so that their seconds add up, unless replicas lie
  in different machines.

The update waits for the last gradient, and the next step's first gather waits for the update.

## Which mesh

With bf16 weights and fp32 reductions a GPU sends, in bytes a parameter and step,

```text
n x 8 (S - 1) / S  +  8 (R - 1) / (R S)       which is 8 (N - 1) / N when n = 1, for every mesh
```

except that the weights of E and block L are gathered only once. So every mesh sends the same number of bytes if a GPU's
share of a step is one micro-batch and all links are alike. But a GPU updates P / S parameters and keeps 4 P / S bytes
of fp32 sums, so that more replicas take more time and more memory. Replicas pay off where a step has several
micro-batches that do not hide their communication, or where the links between machines are slower than those within.
Hence `--replicas` auto takes one replica where a GPU's share of a step is one micro-batch, and otherwise as many as fit
without more micro-batches.
"""


def config_of(model: str, **changes: Any) -> FinetuneConfig:
    """Return the settings of a run of a named shape, engine.finetune's defaults but for the changes."""
    return FinetuneConfig(model, random_init=True, data=("alpaca",), **changes)


def estimate(card: str, n_cards: int, config: FinetuneConfig) -> Estimate:
    """Return the estimate of the run on n_cards GPUs, trained on Alpaca."""
    recipe = recipe_from_config(config, n_cards)
    setting = setting_from_config(config, torch.bfloat16, n_cards)
    return estimate_run(MODELS[config.model], find_card(card), alpaca_mix(recipe), recipe, setting)


def estimates(card: str, model: str, states: str) -> dict[int, Estimate]:
    """Return the estimate for each number of replicas, without those that would cut blocks of 8-bit states."""
    found = {}
    for r in LAYOUTS:
        with contextlib.suppress(UsageError):
            found[r] = estimate(card, GPUS, config_of(model, replicas=r, optimizer_states=states))
    return found


def auto_replicas(card: str, model: str, states: str) -> int:
    """Return the number of replicas that --replicas auto takes."""
    return estimate(card, GPUS, config_of(model, optimizer_states=states)).outcome.setting.replicas


def mesh_name(replicas: int, n_cards: int = GPUS) -> str:
    """Return in words how the GPUs share the model."""
    return describe_mesh(n_cards // replicas, replicas)


def text(words: str) -> str:
    """Return a paragraph in lines of 120 columns."""
    return textwrap.fill(words, 120) + "\n"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def costs_table(found: dict[int, Estimate], auto: int) -> str:
    """Return the table of each mesh's memory, bytes, seconds and money; auto's is in bold."""
    rows: list[tuple[str, ...]] = []
    for r in LAYOUTS:
        way, name = found.get(r), f"**{mesh_name(r)}**" if r == auto else mesh_name(r)
        if way is None:
            rows.append((name, "8-bit blocks would be cut"))
            continue
        memory_gb = f"{way.outcome.memory.total / 1e9:.1f}"
        if not way.fits:
            rows.append((name, f"{memory_gb}: does not fit"))
            continue
        p, n = way.outcome.projection, way.outcome.cut.micro_batches
        sent = p.traffic.step_bytes(n)
        rows.append((
            name, memory_gb, f"{n} x {p.work.tokens / n:,.0f}",
            *(f"{sent[kind] / 1e9:.1f}" if sent[kind] else "" for kind in sent),
            f"{1e3 * p.communication_s:.0f}", f"{1e3 * p.seconds['communication']:.0f}",
            f"{1e3 * p.seconds['update']:.0f}", f"{1e3 * p.seconds['total']:.0f}",
            f"{p.tokens_per_s:,.0f}", f"{p.total_s / 60:.1f}", f"{p.dollars:.2f}",
        ))  # fmt: skip
    head = (
        "mesh", "GB a GPU", "micro-batches x tokens", "all-gather forward, GB", "backward, GB", "reduce-scatter, GB",
        "all-reduce, GB", "communication, ms", "not hidden, ms", "update, ms", "step, ms", "tokens/s", "run, min", "$",
    )  # fmt: skip
    rows = [(*row, *[""] * (len(head) - len(row))) for row in rows]
    return table(head, rows)


def blocks_table(found: dict[int, Estimate]) -> str:
    """Return the table of a block's collectives beside its computing, of each mesh that fits."""
    rows = []
    for r, way in found.items():
        if not way.fits:
            continue
        p = way.outcome.projection
        sent, (forward, backward) = p.traffic, p.block_s
        gather, reduce, sums = sent.group_seconds(0, True)
        mb = " / ".join(f"{n / 1e6:,.0f}" for n in (sent.gather[0], sent.reduce[0], sent.sum[0]))
        beside = sent.concurrent_seconds(gather, reduce, sums)
        rows.append((
            mesh_name(r), mb, f"{1e3 * gather:.2f} / {1e3 * forward:.2f}", f"{1e3 * beside:.2f} / {1e3 * backward:.2f}",
            *(f"{1e3 * s:.1f}" for s in p.not_hidden_seconds.values()),
        ))  # fmt: skip
    head = (
        "mesh", "a block's gather / reduction / all-reduce, MB", "gather / forward, ms",
        "gather + reduction + all-reduce / backward, ms", "begin, ms", "forward, ms", "backward, ms", "end, ms",
    )  # fmt: skip
    return table(head, rows)


def verdict(found: dict[int, Estimate], auto: int) -> str:
    """Return the sentence that names the mesh auto takes, and how much faster another would be."""
    step_s = {r: way.outcome.projection.seconds["total"] for r, way in found.items() if way.fits}
    fastest = min(step_s, key=step_s.__getitem__)
    taken = f"`--replicas` auto takes {mesh_name(auto)}"
    if fastest == auto:
        return taken + ", projected to be the fastest that fits."
    late_ms = 1e3 * (step_s[auto] - step_s[fastest])
    return taken + f"; {mesh_name(fastest)} is projected to be {late_ms:.0f} ms a step faster."


def case(card: str, model: str, states: str) -> str:
    """Return the section of one GPU, model and kind of optimizer states."""
    found, auto = estimates(card, model, states), auto_replicas(card, model, states)
    title = f"### {GPUS} x {card}, {model}, {states} states"
    return "\n".join((f"{title}\n", costs_table(found, auto), f"{verdict(found, auto)}\n", blocks_table(found)))


def tokens_that_hide(card_name: str, model: str, replicas: int) -> int:
    """Return the fewest tokens of a micro-batch of Alpaca's rows during which computing hides its communication."""
    c, card = MODELS[model], find_card(card_name)
    speed, mix = find_rates(card), alpaca_mix(recipe_from_config(config_of(model), GPUS))
    whole = mix.own + mix.prefix
    sent = step_traffic(c, card, Setting(shards=GPUS // replicas, replicas=replicas))

    def waits(tokens: int) -> bool:
        part = tokens / whole
        work = Work(tokens, part * mix.loss_rows, part * mix.pairs, part * mix.query_pairs, micro_batches=1)
        seconds = step_seconds(c, card, speed, work, Setting(), update_s=0.0)
        late = sent.not_hidden_seconds(1, *block_seconds(c, work, Setting(), sum(seconds[kind] for kind in COMPUTING)))
        return late["forward"] + late["backward"] > 0

    few, many = 0, 1 << 16
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if waits(middle) else (few, middle)
    return many


def hiding_table() -> str:
    """Return the table of the tokens that hide a micro-batch's communication, by GPU, model and mesh."""
    rows = [
        (f"{GPUS} x {card}, {model}", *(f"{tokens_that_hide(card, model, r):,}" for r in LAYOUTS))
        for card in CARDS for model in SHAPES
    ]  # fmt: skip
    return table(("tokens of a GPU's micro-batch", *(mesh_name(r) for r in LAYOUTS)), rows)


def machines_table(card: str, model: str, n: int) -> str:
    """Return the table of a model sharded over all machines, and of replicas that each stay in one."""
    rows = []
    for batch in (ROWS, 8 * ROWS, 64 * ROWS):
        for r in (1, n // MACHINE_GPUS):
            config = config_of(model, replicas=r, global_batch_size=batch, micro_batch_tokens=4096)
            p = estimate(card, n, config).outcome.projection
            sent, micro_batches = p.traffic.seconds(p.work.micro_batches), p.work.micro_batches
            inside = sum(s for kind, s in sent.items() if kind != "sum")
            rows.append((
                f"{batch:,}", mesh_name(r, n), micro_batches, f"{1e3 * inside:.0f}", f"{1e3 * sent['sum']:.0f}",
                f"{1e3 * p.seconds['communication']:.0f}", f"{1e3 * p.seconds['total']:.0f}", f"{p.tokens_per_s:,.0f}",
                format_duration(p.total_s),
            ))  # fmt: skip
    head = (
        "examples a step", "mesh", "micro-batches", "gathers and reductions, ms", "all-reduce, ms", "not hidden, ms",
        "step, ms", "tokens/s", "run",
    )  # fmt: skip
    return table(head, rows)


def assumed_table() -> str:
    """Return the table of the rates that each GPU is assumed to reach."""
    rows = []
    for card in map(find_card, CARDS):
        speed = find_rates(card)
        rows.append((
            card.name, f"{card.nvlink_gb_per_s:g}", f"{card.bus_bytes_per_s(GPUS) / 1e9:g}",
            f"{speed.gemm_flops_per_s / 1e12:.0f} of {card.peak_tflops:g}", f"{speed.copy_bytes_per_s / 1e9:,.0f}",
            f"{card.price_per_hour:.2f}", speed.source,
        ))  # fmt: skip
    head = ("GPU", "NVLink one way, GB/s", "bus rate, GB/s", "GEMM, TFLOP/s", "copy, GB/s", "$ an hour", "source")
    return table(head, rows)


def page() -> str:
    """Return the text of docs/ranks.md."""
    far = "H100", "llama-13b", 64
    parts = [
        HEAD, "## What is assumed\n", assumed_table(),
        text(
            f"NCCL is assumed to reach {LINK_SHARE} of a link's rate, a copy {COPY_SHARE} of the memory's bandwidth. "
            "`engine/planning/cards.py` names the sources. A block computes its share of a step's matrix products, a "
            "third of it in forward. The time to start a collective and the hops of a ring are not counted."
        ),
        f"## {GPUS} GPUs, {ROWS} examples a step\n",
        text(
            "The run: Alpaca's 52,002 rows for 3 epochs, cut at 512 tokens, `--recompute cheap`, `--master-weights "
            "split`. The mesh that auto takes is in bold. GB and ms are those of one GPU in one step."
        ),
        *(case(card, model, states) for card in CARDS for model in SHAPES for states in STATES),
    ]  # fmt: skip
    parts += [
        "## Where the plan breaks\n",
        text(
            "A block's gather takes as long for one token as for a million. If a GPU's micro-batch has fewer computed "
            "tokens than in this table, blocks wait for the links. A larger `--global-batch-size` hides more. More "
            "GPUs hide less, because each has fewer examples. With replicas the figure is that of the last "
            "micro-batch, whose all-reduces share the links."
        ),
        hiding_table(),
        "## Over machines\n",
        text(
            f"{far[2]} x {far[0]} in machines of {MACHINE_GPUS}, with a port of {8 * PORT_GB_PER_S} Gb/s for each GPU, "
            f"train {far[1]} with fp32 states in micro-batches of at most 4,096 tokens. If the model is sharded over "
            "all GPUs, each micro-batch's gathers and reductions cross machines. Replicas that stay in one machine "
            "gather and reduce over NVLink, and meanwhile the ports carry one all-reduce a step. With a port for each "
            f"GPU both take about as long, except that a GPU of the first updates a {far[2]}th of the parameters. The "
            f"hops of rings ({far[2] - 1} of {far[2]} GPUs, {MACHINE_GPUS - 1} of {MACHINE_GPUS}) are not counted. "
            "Machines with fewer ports favour replicas."
        ),
        machines_table(*far),
    ]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check exit with 1 if it differs."""
    new = page()
    if "--check" not in sys.argv:
        DOC.parent.mkdir(exist_ok=True)
        DOC.write_text(new)
    elif not DOC.exists() or DOC.read_text() != new:
        sys.exit("docs/ranks.md is not what the estimate says; run python -m scripts.pages.ranks")


if __name__ == "__main__":
    run_command(main)

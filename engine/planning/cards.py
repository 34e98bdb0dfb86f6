"""What a card is, what it costs, and how long a training step takes on it.

Memory is torch's total_memory, as the out-of-memory messages of each card tell it ("a total capacity of 79.11 GiB").
Peaks are dense bf16 with fp32 sums, bandwidths the memory's: of NVIDIA's data sheets (A100, H100, H200, L40S, HGX B200)
and whitepapers (GA102, AD102, RTX Blackwell). GeForce cards sum in fp32 at half the rate of their fp16 headline.

What a large GEMM reaches of the peak: 271 of 312 TFLOP/s on an A100, 750 of 989 on an H100, whose power sets the clock.
B200 and L40S (the 4090's chip, at the full rate, on 350 W) are assumed to be bound by power alike, at 0.75 and 0.7.
GeForce cards at half rate are bound by their matrix units: cuBLAS reaches 0.88 to 0.96 of such a peak on an L20; 0.85
is assumed. Copies are assumed to reach 0.9 of the bandwidth. A report that scripts.gpu_report left in benchmarks/
replaces both by what it measured on the card.

Of a link between cards, one way, NCCL is assumed to move 0.8: 370 of 450 GB/s all-gathering over an H100's NVLink, 240
of 300 over an A100's (github.com/NVIDIA/nccl-tests issues 212, 149), and so over PCIe, where GeForce cards, which know
no peers, may reach less. Over 8 cards are machines of 8, joined by a 400 Gb/s port a card. Ranks fill one machine after
the other, so the shards of a replica of up to 8 meet over NVLink, and ports carry the sums of replicas alone.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.base.flags import nearest
from engine.model.config import ModelConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 1 << 30

KERNEL_SHARE = 0.9  # of the copy rate, that kernels bound by memory are built for
COPY_SHARE = 0.9  # of the memory's bandwidth
ATTENTION_SHARE = 0.4  # of the GEMM rate: FlashAttention-2's 294 TFLOP/s of 750 on an H100
LINK_SHARE = 0.8  # of a link's one way, that NCCL moves
MACHINE, PORT_GB_PER_S = 8, 50  # cards that NVLink joins, and what leaves their machine beside each of them
MASKED_KEYS = 100  # a query multiplies about so many keys that it does not see: 45% of use at Alpaca's 82 that it sees
LAUNCH_S, LAUNCHES = (
    8e-6,
    45,
)  # the host's time for one launch under autograd, and a layer's launches in both directions


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    device: str  # in torch.cuda.get_device_name()
    memory_gib: float
    peak_tflops: float  # dense bf16
    bandwidth_gb_per_s: float
    gemm_share: float  # of the peak, in a large GEMM
    pcie_gb_per_s: float  # one way, pinned: 25 of gen4's 32, 50 of gen5's 64
    price_per_hour: float | None  # dollars
    nvlink_gb_per_s: float = 0  # one way, to all the others together; 0: they meet over PCIe

    def bus_bytes_per_s(self, shards: int, replicas: int = 1) -> float:
        """What an all-gather or reduce-scatter among the shards of each replica sends from each card, and receives at
        once: nccl-tests' bus bandwidth. Across machines a ring leaves each by as many ports as it has cards there."""
        return self.reached(None if within_machines(shards, replicas) else math.gcd(shards, MACHINE))

    def sum_bytes_per_s(self, shards: int, replicas: int) -> float:
        """The same of an all-reduce among replicas: of the cards that hold one shard, every shards-th."""
        return self.reached(None if shards * replicas <= MACHINE else max(1, MACHINE // shards))

    def reached(self, ports: int | None) -> float:
        """Bytes a second over a card's own link, and over so many ports of its machine unless None."""
        link = self.nvlink_gb_per_s or self.pcie_gb_per_s
        return 1e9 * LINK_SHARE * min(link, math.inf if ports is None else ports * PORT_GB_PER_S)


# One card on demand, lowest listed price: RunPod in March 2026 (deploybase.ai/articles/runpod-gpu-pricing); the A100 of
# 40 GB, which RunPod does not list, at Lambda in May 2026. NVLink is half of what the data sheets of November 2026 say.
PRICES_OF = "March 2026"
CARDS = {
    card.name: card
    for card in (
        Card("A100-40", "A100-SXM4-40GB", 39.39, 312, 1555, 0.869, 25, 1.48, 300),
        Card("A100-80", "A100-SXM4-80GB", 79.15, 312, 2039, 0.869, 25, 1.39, 300),
        Card("H100", "H100 80GB HBM3", 79.11, 989, 3350, 0.758, 50, 2.69, 450),
        Card("H200", "NVIDIA H200", 139.80, 989, 4800, 0.758, 50, 3.59, 450),
        Card("B200", "NVIDIA B200", 178.35, 2250, 7700, 0.75, 50, 5.98, 900),
        Card("L40S", "L40S", 44.39, 362, 864, 0.7, 25, 0.79),
        Card("RTX-3090", "RTX 3090", 23.69, 71, 936, 0.85, 25, 0.22),
        Card("RTX-4090", "RTX 4090", 23.64, 165, 1008, 0.85, 25, 0.34),
        Card("RTX-5090", "RTX 5090", 31.36, 209, 1792, 0.85, 50, 0.69),
    )
}


def within_machines(shards: int, replicas: int) -> bool:
    """Whether no replica lies in more than one machine."""
    return shards * replicas <= MACHINE or MACHINE % shards == 0


def cards_of(config) -> int:
    """Cards of an EstimateConfig; a FinetuneConfig's run has one."""
    return getattr(config, "gpus", 1)


def label_of(cards: int) -> str:
    """What is to be known of figures of several cards."""
    label = "projected: no run on several cards was measured; sharded by FSDP2, a block at a time"
    label += "; a step's tokens shared out evenly"  # the fullest of 8 cards has 1.01 of the mean's
    return label + f"; machines of {MACHINE}, joined by {8 * PORT_GB_PER_S} Gb/s a card" * (cards > MACHINE)


def find_card(name: str) -> Card:
    """The card that is meant: case, spaces, dashes and RTX do not matter. Raises ValueError for an unknown one."""

    def plain(text):
        return re.sub(r"[^a-z0-9]|rtx", "", text.lower())

    for card in CARDS.values():
        if plain(card.name) == plain(name):
            return card
    raise ValueError(
        f"--gpu is {name!r}, wanted one of {', '.join(CARDS)}{nearest(name.upper(), CARDS)}; of another card give "
        "--gpu-memory, --gpu-tflops and --gpu-bandwidth"
    )


def chosen_card(config) -> Card:
    """The card that an EstimateConfig names, with what its flags say otherwise."""
    card = find_card(config.gpu)
    changes = {
        "memory_gib": config.gpu_memory, "peak_tflops": config.gpu_tflops, "bandwidth_gb_per_s": config.gpu_bandwidth,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:  # another card, whose name no report has
        card = replace(card, **changes, name=f"like {card.name}", device="none", price_per_hour=None)
    return card if config.price_per_hour is None else replace(card, price_per_hour=config.price_per_hour)


def card_named(device_name: str) -> Card | None:
    """The card that torch calls so; None for one not in the table, as the NVL cards, whose clocks are lower."""
    return next((card for card in CARDS.values() if card.device in device_name and "NVL" not in device_name), None)


def card_at_hand(device: torch.device) -> Card | None:
    """The card of a CUDA device, with the memory that it has; None for a CPU and for one not in the table."""
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card and replace(card, memory_gib=torch.cuda.get_device_properties(device).total_memory / GIB)


# ---- what was measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What the card is expected to reach, and who says so."""

    gemm_flops_per_s: float
    copy_bytes_per_s: float
    report: str | None = None  # the file that measured both; None is the data sheet
    steps: tuple = ()  # whole training steps that it measured: dicts, as the report has them

    @property
    def source(self) -> str:
        """How what follows from them is labelled: measured it is not."""
        return f"projected from rates in {self.report}" if self.report else "projected"


def rates(card: Card, folder: Path | None = None) -> Rates:
    """Of the newest report of this very card, or of its data sheet."""
    for path, parts in reports(card, folder or BENCHMARKS):
        ceilings = parts.get("ceilings", {})
        if {"gemm_tflops", "copy_gb_per_s"} <= ceilings.keys():
            steps = parts.get("step", {}).get("records", [])
            return Rates(1e12 * ceilings["gemm_tflops"], 1e9 * ceilings["copy_gb_per_s"], path.name, tuple(steps))
    return Rates(1e12 * card.peak_tflops * card.gemm_share, 1e9 * card.bandwidth_gb_per_s * COPY_SHARE)


def reports(card, folder):
    """(path, parts) of the reports of a card, the newest first."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        report = json.loads(path.read_text())
        if report.get("what") != "scripts.gpu_report" or report.get("smoke"):
            continue
        if card.device in report["parts"].get("machine", {}).get("device", ""):
            found.append((report.get("date", ""), path, report["parts"]))
    return [(path, parts) for _, path, parts in sorted(found, key=lambda r: r[0], reverse=True)]


# ---- how long a step takes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One optimizer step, in the mean."""

    tokens: float  # that are computed, a shared prefix once a micro-batch
    loss_rows: float  # that carry loss
    pairs: float  # of a query and a key that it sees, of all queries
    query_pairs: float  # of those, whose queries carry loss: all that the last layer asks for
    micro_batches: int


def gemm_flops(c: ModelConfig, work: Work, recompute: str) -> float:
    """Of the matrix products of a step: 6 a token and weight of a full layer, 8 with recompute="block". Of the last
    layer all but k and v, and the head, count rows with loss alone."""
    t, u = work.tokens, work.loss_rows
    asking, answering = layer_weights(c)
    layers = (c.n_layers - 1) * t * (asking + answering) + u * asking + t * answering
    return (8 if recompute == "block" else 6) * layers + 6 * u * c.dim * c.vocab_size


def layer_weights(c):
    """Weights of a layer that queries, their outputs and the feed-forward go through, and those of keys and values."""
    return 2 * c.dim * c.n_heads * c.head_dim + 3 * c.dim * c.hidden_dim, 2 * c.dim * c.n_kv_heads * c.head_dim


@dataclass(frozen=True)
class Traffic:
    """What each of several cards sends in a step, in bytes of one collective: (of a block, of the weights outside).

    A micro-batch gathers every group before its forward and every block but the last, which stays, again before its
    backward, and reduces all gradients; the last one of a step sums them over the replicas too.
    """

    layers: int
    gather: tuple[int, int]
    reduce: tuple[int, int]
    sum: tuple[int, int]
    bytes_per_s: float  # of gathers and reductions
    sum_bytes_per_s: float
    apart: bool  # sums take other links than gathers and reductions, beside which they go

    def of_step(self, micro_batches: int) -> dict[str, int]:
        """Bytes by kind of collective."""
        gather, reduce, sums = (self.layers * block + rest for block, rest in (self.gather, self.reduce, self.sum))
        again = (self.layers - 1) * self.gather[0]
        each = {"gather_forward": gather, "gather_backward": again, "reduce": reduce}
        return {kind: micro_batches * n for kind, n in each.items()} | {"sum": sums}

    def seconds(self, micro_batches: int) -> dict[str, float]:
        """Of the same, alone on their links."""
        sent = self.of_step(micro_batches)
        rate = {"sum": self.sum_bytes_per_s}
        return {kind: n / rate.get(kind, self.bytes_per_s) for kind, n in sent.items()}

    def in_backward(self, summed: bool) -> list[float]:
        """Seconds beside each block's backward, of the first block first: the gather of the one before it, the
        reduction of the one after."""
        gather, reduce, sums = self.of_group(0, summed)
        last = self.layers - 1
        return [self.together(gather * (i > 0), reduce * (i < last), sums * (i < last)) for i in range(self.layers)]

    def of_group(self, i: int, summed: bool) -> tuple[float, float, float]:
        """Seconds of a block's gather, reduction and sum (i 0), or of those of the weights outside (1)."""
        sums = self.sum[i] / self.sum_bytes_per_s if summed else 0.0
        return self.gather[i] / self.bytes_per_s, self.reduce[i] / self.bytes_per_s, sums

    def together(self, gather, reduce, sums):
        return max(gather + reduce, sums) if self.apart else gather + reduce + sums

    def late(self, micro_batches: int, forward_s: float, backward_s: float) -> dict[str, float]:
        """Seconds of a step that computing waits, by why; forward_s, backward_s: of a block in one micro-batch.

        begin     of forward: the weights outside of blocks and a block, which nothing hides
        forward   L - 1 gathers, each of them longer than the block before it takes
        backward  what is beside a block longer than that takes
        end       reductions and sums of the first block and of the weights outside, after all computing
        """
        (gather, _, _), (others, _, _) = self.of_group(0, False), self.of_group(1, False)
        waits = {
            "begin": micro_batches * (gather + others),
            "forward": micro_batches * (self.layers - 1) * max(0.0, gather - forward_s), "backward": 0.0, "end": 0.0,
        }  # fmt: skip
        for summed, times in ((False, micro_batches - 1), (True, 1)):
            _, block, block_sum = self.of_group(0, summed)
            _, rest, rest_sum = self.of_group(1, summed)
            waits["backward"] += times * sum(max(0.0, beside - backward_s) for beside in self.in_backward(summed))
            waits["end"] += times * (block + self.together(0.0, rest, block_sum) + rest_sum)
        return waits


def block_seconds(c: ModelConfig, work: Work, recompute: str, computing_s: float) -> tuple[float, float]:
    """Of the forward and the backward of one block in one micro-batch, in the mean, of a step's computing: the blocks'
    share of its matrix products, a third of which is forward, or a quarter with recompute="block"."""
    flops = gemm_flops(c, work, recompute)
    share = 1 - 6 * work.loss_rows * c.dim * c.vocab_size / flops
    each = computing_s * share / (c.n_layers * work.micro_batches)
    forward = each / (4 if recompute == "block" else 3)
    return forward, each - forward


def update_bytes(parameters: int, masters: int, moments: int, master: str) -> int:
    """Bytes that AdamW moves, of tensors of so many: all in and out, but gradients in alone, and weights that have an
    fp32 master beside them out alone."""
    return parameters * (2 if master == "fp32" and masters else 3) + 2 * (masters + moments)


def step_seconds(
    c: ModelConfig,
    card: Card,
    speed: Rates,
    work: Work,
    *,
    size: int,
    recompute: str,
    update_bytes: float,
    offload_bytes: float = 0.0,
    traffic: Traffic | None = None,
) -> dict[str, float]:
    """Seconds of one step by what bounds them; "total" is their sum. size: bytes of a number.

        gemm       gemm_flops, but never less than the weights' own traffic: read twice a micro-batch, their gradients
                   read and written once
        attention  4 H Dh a pair forward, 14 backward (two passes, seven products)
        memory     bytes that norms, RoPE, SwiGLU, attention, the loss and the embedding move
        update     bytes that the gradient norm and AdamW move
        offload    the optimizer's state over PCIe, both ways at once; nothing else hides it
        host       what launching takes longer than all of the above but offload
        communication  what blocks under way do not hide of it: Traffic.late()

    update_bytes: of the gradient norm and AdamW. offload_bytes: of the state that crosses PCIe, one way.
    traffic: between several cards.
    """
    t, u = work.tokens, work.loss_rows
    heads, kv_heads, full = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_layers - 1
    again = 1 if recompute == "block" else 0
    weights = c.n_layers * sum(layer_weights(c)) + c.dim * c.vocab_size
    gemm_bytes = (4 + again) * weights * size * work.micro_batches
    pairs = full * (work.pairs + MASKED_KEYS * t) + work.query_pairs + MASKED_KEYS * u
    attention_flops = (18 + 4 * again) * pairs * heads
    rows = full * t + u
    moved = size * (
        rows * (1 + again) * (4 * c.dim + 3 * c.hidden_dim + 4 * (heads + kv_heads))  # forward
        + rows * (10 * c.dim + 6 * c.hidden_dim + 8 * (heads + kv_heads))  # backward
        + 2 * u * c.vocab_size + 4 * t * c.dim  # logits; the embedding
        + 3 * c.vocab_size * c.dim * work.micro_batches  # the embedding's gradient: zeroed, and added
    )  # fmt: skip
    kernels_per_s = KERNEL_SHARE * speed.copy_bytes_per_s
    seconds = {
        "gemm": max(gemm_flops(c, work, recompute) / speed.gemm_flops_per_s, gemm_bytes / speed.copy_bytes_per_s),
        "attention": attention_flops / (ATTENTION_SHARE * speed.gemm_flops_per_s),
        "memory": moved / kernels_per_s,
        "update": update_bytes / kernels_per_s,
    }
    launching = work.micro_batches * (c.n_layers + 2) * LAUNCHES * LAUNCH_S
    seconds["host"] = max(0.0, launching - sum(seconds.values()))
    blocks = block_seconds(c, work, recompute, sum(seconds.values()) - seconds["update"])
    seconds["communication"] = sum(traffic.late(work.micro_batches, *blocks).values()) if traffic else 0.0
    seconds["offload"] = offload_bytes / (1e9 * card.pcie_gb_per_s)
    return seconds | {"total": sum(seconds.values())}

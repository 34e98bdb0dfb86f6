"""How long a training step takes on a GPU: matrix products, memory traffic, launches, and communication between GPUs.

step_seconds() adds up what bounds each part of a step. Traffic says what each of several GPUs sends in a step, and how
long the others' computing does not hide it. No run on several GPUs was measured.
"""

from dataclasses import dataclass

from engine.model.adapter import MAPS, AdapterConfig, list_updates
from engine.model.config import ModelConfig
from engine.planning.cards import MACHINE_GPUS, Card, Rates, is_within_machines
from engine.planning.setting import Setting
from engine.planning.weights import (
    StateBytes,
    count_trained,
    layer_updates,
    packed_weights,
    whole_bytes,
)

KERNEL_SHARE = 0.9  # of the copy rate: what kernels bound by memory are built to reach
ATTENTION_SHARE = 0.4  # of the GEMM rate: FlashAttention-2's 294 TFLOP/s of 750 on an H100
MASKED_KEYS = 100  # that a query multiplies and does not see: at Alpaca's 82 seen keys 45% of the work is useful
UPDATE_INSTRUCTIONS = {"fp32": 45.0, "bf16": 66.8, "8bit": 80.6}  # of AdamW, a parameter: benchmarks/static.json
LAUNCH_S = 8e-6  # the host's time for one launch under autograd
LAUNCHES = 45  # of a layer, forward and backward
UPDATED_LAUNCHES = 3, 3  # more for each matrix that has an update, no dW among them, and for each update
COMPUTING = ("gemm", "attention", "memory", "dequantise", "host")  # the parts of a step that hide communication


@dataclass(frozen=True)
class Work:
    """The work of a mean optimizer step on one GPU."""

    tokens: float  # that are computed; a shared prefix counts once a micro-batch
    loss_rows: float  # tokens whose next token has a loss
    pairs: float  # of a query and a key that it sees
    query_pairs: float  # pairs whose query has a loss: the last layer computes no others
    micro_batches: int


# ---- computing ------------------------------------------------------------------------------------------------------


def flops_per_token(c: ModelConfig, adapter: AdapterConfig | None = None) -> int:
    """Return the operations a token that MFU counts: 6 a parameter, 4 a frozen one, whose gradient nobody computes."""
    trained = count_trained(c, adapter)
    return 6 * trained if adapter is None else 4 * c.n_parameters + 6 * trained


def gemm_flops(c: ModelConfig, work: Work, recompute: str, adapter: AdapterConfig | None = None) -> float:
    """Return the floating point operations of a step's matrix products.

    A full layer takes 6 a token and weight, or 8 with recompute="block". The head, and the last layer except for k and
    v, compute only the rows with a loss. Under an adapter a frozen matrix takes 4, or 2 where backward ends in it or
    above it, and an update 6 a token and number of A and B.
    """
    t, u, again = work.tokens, work.loss_rows, 2 if recompute == "block" else 0
    sides = count_layer_weights(c)
    head = (6 if adapter is None or "lm_head" in adapter.saved else 4) * u * c.dim * c.vocab_size
    if adapter is None:
        return (6 + again) * ((c.n_layers - 1) * t * sum(sides) + u * sides[0] + t * sides[1]) + head
    layers, flops, is_end = layer_updates(c, adapter), float(head), []
    for i, layer in enumerate(layers):
        rows = t if i < c.n_layers - 1 else u
        is_end.append(layers[i - 1].first == len(MAPS) if i else "embed_tokens" not in adapter.saved)
        sizes = (
            t * sides[1] + rows * c.dim * c.n_heads * c.head_dim, rows * c.dim * c.n_heads * c.head_dim,
            2 * rows * c.dim * c.hidden_dim, rows * c.dim * c.hidden_dim,
        )  # fmt: skip
        flops += 2 * sum(sizes)
        if layer.first < len(MAPS):  # where backward ends, the matrix's input gets no gradient
            flops += again * sum(sizes) + 2 * sum(sizes[layer.first + is_end[i] :])
    for update in list_updates(c, adapter):
        last = update.layer == c.n_layers - 1
        of_a = u if last and update.parameter != "wqkv" else t
        of_b = u if last and not update.path.endswith(("k_proj", "v_proj")) else t
        first = layers[update.layer].first == list(MAPS).index(update.parameter)
        ends = first and is_end[update.layer]
        flops += update.rank * ((6 + again - 2 * ends) * of_a * update.columns + (6 + again) * of_b * update.rows)
    return flops


def count_layer_weights(c: ModelConfig) -> tuple[int, int]:
    """Return a layer's number of weights in the query, output and feed-forward matrices, and in those of k and v."""
    return (
        2 * c.dim * c.n_heads * c.head_dim + 3 * c.dim * c.hidden_dim,
        2 * c.dim * c.n_kv_heads * c.head_dim,
    )


def block_seconds(c: ModelConfig, work: Work, setting: Setting, computing_s: float) -> tuple[float, float]:
    """Return the mean seconds of one block's forward and of its backward in one micro-batch.

    computing_s is a step's time for computing. The blocks get their share of the step's matrix products. A third of a
    block's time is forward, or a quarter with recompute="block"; under an adapter half, or a third.
    """
    flops = gemm_flops(c, work, setting.recompute, setting.adapter)
    share = 1 - (6 if setting.adapter is None else 4) * work.loss_rows * c.dim * c.vocab_size / flops
    each = computing_s * share / (c.n_layers * work.micro_batches)
    forward = each / ((3 if setting.adapter is None else 2) + (setting.recompute == "block"))
    return forward, each - forward


def moved_by_updates(c: ModelConfig, setting: Setting) -> int:
    """Return the numbers a token that an adapter's updates move beside those of its frozen model.

    Forward reads a matrix's input for u, and reads and writes the columns of y of each update. Backward reads these
    columns' gradient twice and the input once, and reads and writes the input's gradient.
    """
    updates = list_updates(c, setting.adapter) if setting.adapter else ()
    again = setting.recompute == "block"
    inputs = sum({(update.layer, update.parameter): update.columns for update in updates}.values())
    return (4 + again) * inputs + (4 + 2 * again) * sum(update.rows for update in updates)


def bytes_of_dequantising(c: ModelConfig, setting: Setting) -> int:
    """Return the bytes that dequantising every matrix in 4 bits once reads and writes."""
    packed = packed_weights(c, setting.adapter)
    return packed.n_bytes + packed.numbers * setting.number_bytes


def launches_of_adapter(c: ModelConfig, setting: Setting) -> int:
    """Return the launches of a micro-batch beyond those of a step that trains all weights."""
    updates = list_updates(c, setting.adapter) if setting.adapter else ()
    matrices = {(update.layer, update.parameter) for update in updates}
    of_matrix, of_update = UPDATED_LAUNCHES
    return of_matrix * len(matrices) + of_update * len(updates) + 2 * setting.packed * c.n_layers * len(MAPS)


# ---- updates --------------------------------------------------------------------------------------------------------


def bytes_of_update(state: StateBytes, master: str) -> int:
    """Return the bytes that AdamW reads and writes to update weights with this state.

    Gradients are only read. Weights with an fp32 master beside them are only written. The rest is read and written.
    """
    passes = 2 if master == "fp32" and state.master else 3
    return state.trained * passes + 2 * (state.master + state.states)


def host_update_bytes(state: StateBytes, setting: Setting) -> int:
    """Return the bytes that an update of offloaded states on the CPU moves in the host's memory.

    Beside AdamW's own, weights are read on their way to the GPU, and gradients written if they come only then.
    """
    return bytes_of_update(state, setting.master) + (1 if setting.gradients_leave else 2) * state.trained


def host_update_seconds(card: Card, state: StateBytes, setting: Setting) -> float:
    """Return the seconds of AdamW on the CPU: the slower of the host's memory, and the bus that takes weights up.

    All GPUs of a machine share its memory.
    """
    memory_s = host_update_bytes(state, setting) * min(setting.n_cards, MACHINE_GPUS) / (1e9 * card.host_gb_per_s)
    return max(memory_s, state.trained / (1e9 * card.pcie_gb_per_s))


def crossing_bytes(state: StateBytes, setting: Setting) -> int:
    """Return the bytes that cross the bus in each direction: offloaded states once a step, or each time gradients do.

    Gradients that leave in backward do so in each micro-batch, and their sums come back for all but the first.
    """
    if not setting.offload:
        return 0
    return state.trained if setting.on_cpu else state.master + state.states


def update_seconds(card: Card, speed: Rates, state: StateBytes, setting: Setting) -> float:
    """Return the seconds of the gradient norm, which reads all gradients, and of AdamW.

    AdamW takes as long as its memory traffic or as its instructions, whichever takes longer. On the CPU it takes
    host_update_seconds().
    """
    kernels_per_s = KERNEL_SHARE * speed.copy_bytes_per_s
    if setting.offload and setting.on_cpu:
        return state.trained / kernels_per_s + host_update_seconds(card, state, setting)
    instructions = UPDATE_INSTRUCTIONS[setting.states] * state.trained / setting.number_bytes
    moved_s = bytes_of_update(state, setting.master) / kernels_per_s
    return state.trained / kernels_per_s + max(moved_s, instructions / card.instructions_per_s)


def step_seconds(
    c: ModelConfig,
    card: Card,
    speed: Rates,
    work: Work,
    setting: Setting,
    *,
    update_s: float,
    offload_bytes: float = 0.0,
    traffic: "Traffic | None" = None,
) -> dict[str, float]:
    """Return the seconds of one step by what bounds them; "total" is their sum.

    gemm       gemm_flops, but never less than the weights' own traffic: they are read twice a micro-batch, and
               their gradients, unless the weights are frozen, are read and written once
    attention  4 H Dh operations a pair in forward, 14 in backward (two passes, seven products)
    memory     the bytes that norms, RoPE, SwiGLU, attention, the loss and the embedding move, and an adapter's updates
    dequantise the bytes of matrices in 4 bits, read and written in the dtype, twice a micro-batch
    update     update_s: see update_seconds
    offload    offload_bytes, those of crossing_bytes(), over PCIe; what leaves in backward is hidden by as much as the
               layers' backward takes
    host       the time by which launching exceeds all computing
    communication  the part of `traffic` between several GPUs that computing does not hide: Traffic.not_hidden_seconds()
    """
    t, u, size = work.tokens, work.loss_rows, setting.number_bytes
    heads, kv_heads, full = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_layers - 1
    again, kept = int(setting.recompute == "block"), int(setting.recompute == "none")
    weights = c.n_layers * sum(count_layer_weights(c)) + c.dim * c.vocab_size
    gemm_bytes = ((4 if setting.adapter is None else 2) + again) * weights * size * work.micro_batches
    pairs = full * (work.pairs + MASKED_KEYS * t) + work.query_pairs + MASKED_KEYS * u
    attention_flops = (18 + 4 * again) * pairs * heads
    rows = full * t + u
    moved = size * (
        rows * (1 + again) * (8 * c.dim + 3 * c.hidden_dim + 4 * (heads + kv_heads))  # forward
        + rows * ((10 - 2 * kept) * c.dim + (6 - kept) * c.hidden_dim + 6 * (heads + kv_heads))  # backward
        + 2 * u * c.vocab_size + 4 * t * c.dim  # logits; the embedding
        + rows / c.n_layers * moved_by_updates(c, setting)
        + 3 * c.vocab_size * c.dim * work.micro_batches * setting.trains_embedding  # its gradient: zeroed, and added
    )  # fmt: skip
    flops = gemm_flops(c, work, setting.recompute, setting.adapter)
    kernels_per_s = KERNEL_SHARE * speed.copy_bytes_per_s
    seconds = {
        "gemm": max(flops / speed.gemm_flops_per_s, gemm_bytes / speed.copy_bytes_per_s),
        "attention": attention_flops / (ATTENTION_SHARE * speed.gemm_flops_per_s),
        "memory": moved / kernels_per_s,
        "dequantise": (2 + again) * work.micro_batches * bytes_of_dequantising(c, setting) / kernels_per_s,
        "update": update_s,
    }
    launching = work.micro_batches * ((c.n_layers + 2) * LAUNCHES + launches_of_adapter(c, setting)) * LAUNCH_S
    seconds["host"] = max(0.0, launching - sum(seconds.values()))
    blocks = block_seconds(c, work, setting, sum(seconds.values()) - seconds["update"])
    seconds["communication"] = sum(traffic.not_hidden_seconds(work.micro_batches, *blocks).values()) if traffic else 0.0
    crossing_s = offload_bytes / (1e9 * card.pcie_gb_per_s)
    if setting.gradients_leave:
        crossing_s = work.micro_batches * max(0.0, crossing_s - c.n_layers * blocks[1])
    seconds["offload"] = crossing_s
    return seconds | {"total": sum(seconds.values())}


# ---- communication --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """The bytes that each of several GPUs sends in a step.

    A group is a block, or all weights outside of blocks. gather, reduce and sum hold the bytes of one collective:
    (of a block, of the weights outside). A micro-batch gathers each group before its forward. It gathers every block
    except the last again before its backward, and reduces all gradients. The last micro-batch of a step also sums the
    gradients over the replicas.
    """

    layers: int
    gather: tuple[int, int]
    reduce: tuple[int, int]
    sum: tuple[int, int]
    bytes_per_s: float  # of gathers and reductions
    sum_bytes_per_s: float
    apart: bool  # sums use other links than gathers and reductions, so that both proceed at once

    def step_bytes(self, micro_batches: int) -> dict[str, int]:
        """Return the bytes of a step by kind of collective."""
        gather, reduce, sums = (self.layers * block + rest for block, rest in (self.gather, self.reduce, self.sum))
        again = (self.layers - 1) * self.gather[0]
        each = {"gather_forward": gather, "gather_backward": again, "reduce": reduce}
        return {kind: micro_batches * n for kind, n in each.items()} | {"sum": sums}

    def seconds(self, micro_batches: int) -> dict[str, float]:
        """Return the seconds of a step by kind of collective, each as if nothing else used its links."""
        sent = self.step_bytes(micro_batches)
        return {
            kind: n / (self.sum_bytes_per_s if kind == "sum" else self.bytes_per_s) for kind, n in sent.items()
        }  # fmt: skip

    def backward_seconds(self, summed: bool) -> list[float]:
        """Return the seconds of communication during each block's backward, the first block's first.

        Meanwhile the block before is gathered and the gradients of the block after are reduced, and, if `summed`,
        summed over the replicas.
        """
        gather, reduce, sums = self.group_seconds(0, summed)
        last = self.layers - 1
        return [
            self.concurrent_seconds(gather * (i > 0), reduce * (i < last), sums * (i < last))
            for i in range(self.layers)
        ]

    def group_seconds(self, i: int, summed: bool) -> tuple[float, float, float]:
        """Return the seconds of one gather, reduction and sum, of a block (i = 0) or of the weights outside (i = 1)."""
        sums = self.sum[i] / self.sum_bytes_per_s if summed else 0.0
        return self.gather[i] / self.bytes_per_s, self.reduce[i] / self.bytes_per_s, sums

    def concurrent_seconds(self, gather: float, reduce: float, sums: float) -> float:
        """Return the seconds until a gather, a reduction and a sum that begin together are all done."""
        return max(gather + reduce, sums) if self.apart else gather + reduce + sums

    def not_hidden_seconds(self, micro_batches: int, forward_s: float, backward_s: float) -> dict[str, float]:
        """Return the seconds of a step in which computing waits for communication, by where it waits.

            begin     the gathers of the weights outside of blocks and of the first block, which nothing hides
            forward   L - 1 gathers, by as much as each takes longer than the block before it
            backward  the communication during a block's backward, by as much as it takes longer than that
            end       reductions and sums of the first block and of the weights outside, after all computing

        forward_s and backward_s are those of one block in one micro-batch.
        """
        (gather, _, _), (others, _, _) = self.group_seconds(0, False), self.group_seconds(1, False)
        waits = {
            "begin": micro_batches * (gather + others),
            "forward": micro_batches * (self.layers - 1) * max(0.0, gather - forward_s), "backward": 0.0, "end": 0.0,
        }  # fmt: skip
        for summed, times in ((False, micro_batches - 1), (True, 1)):
            _, block, block_sum = self.group_seconds(0, summed)
            _, rest, rest_sum = self.group_seconds(1, summed)
            waits["backward"] += times * sum(max(0.0, beside - backward_s) for beside in self.backward_seconds(summed))
            waits["end"] += times * (block + self.concurrent_seconds(0.0, rest, block_sum) + rest_sum)
        return waits


def step_traffic(c: ModelConfig, card: Card, setting: Setting) -> Traffic:
    """Return the bytes that each GPU sends when it trains the model with others.

    An all-gather sends (S - 1) / S of the weights. A reduce-scatter sends (S - 1) / S of the gradients and an
    all-reduce 2 (R - 1) / R of a shard's, both in fp32.
    """
    shards, replicas, wide = setting.shards, setting.replicas, 4 // setting.number_bytes
    whole = whole_bytes(c, setting.dtype, shards, setting.adapter)
    gradients = whole.trained_block, whole.trained_others
    gather = whole.block * (shards - 1) // shards, whole.others * (shards - 1) // shards
    reduce = [wide * (n * (shards - 1) // shards) for n in gradients]
    sums = [2 * (replicas - 1) * wide * n // shards // replicas for n in gradients]
    return Traffic(
        c.n_layers, gather, (reduce[0], reduce[1]), (sums[0], sums[1]),
        card.bus_bytes_per_s(shards, replicas), card.sum_bytes_per_s(shards, replicas),
        apart=is_within_machines(shards, replicas) and shards * replicas > MACHINE_GPUS,
    )  # fmt: skip

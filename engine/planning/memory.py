"""The bytes of a training step on one GPU, which trains alone or with others.

A micro-batch has T tokens. L of its targets have a loss, and U distinct rows predict them. At the worst moment of a
step a GPU holds:

    weights, gradients     the size of each parameter's dtype, twice: gradients are added to in place. Under an adapter
                           only what it trains has gradients, masters and states; see engine.planning.weights
    master, states         the tensors of kernels.adamw_state; with offload they are in the host's memory. Where the
                           CPU updates them, gradients go there too while backward goes on: leaving_bytes()
    activations            exactly what autograd keeps for backward: activation_bytes()
    temporaries            what the worst moment needs besides: worst_moments()
    overhead               CUDA's context and libraries, and what the allocator cannot use: assumed

With S shards the first two lines are those of a shard: the largest shard of a parameter (n, ...) has ceil(n / S) rows.
Activations and temporaries are those of the GPU's own micro-batch. engine.distributed makes a group of each block, and
one of the embedding, norm and head. When most of them are whole on the GPU, it also holds:

    gathered      the weights E of the embedding and the head, from a step's begin to its end; the weights of two
                  neighbouring blocks B, the one being computed and the next, which is fetched ahead; the gradients E'
                  of E until the end; and a block's B' with the fp32 that is reduced:
                                                                       E + E' + 2 B + B' + F B', F = 4 / dtype's size
                  or, at the end, E's gradients with the fp32 of them: E + E' + F E'
                  or, in forward, one block and what it and the block before were gathered into: E + 3 B
                  or, as forward begins and no activations are there, the same of E and the first block: 2 E + 2 B

B is a block's size with the padding of S equal shards; E' and B' are E and B, or what an adapter trains of them. R
replicas of S shards sum their gradients once a step. Until then each keeps fp32 sums of its shard's gradients, and
FSDP2 keeps what it sends, in fp32 too, until backward has ended: 4 bytes a parameter beside its gradient in bf16. With
S = 1 nothing has to be gathered, but FSDP2 copies the weights of E and of the block being computed. Of a gradient to be
summed it has an fp32 copy, that copy divided by 1, and the sum of earlier micro-batches:

    gathered, S = 1    E + E' + max(2 B + F B', 3 F B'), or at the end 3 F E'

Figures of several GPUs are projected: no run on several was measured.
"""

from collections import Counter
from dataclasses import dataclass, replace

from engine.base.host_memory import SLOTS
from engine.model.adapter import MAPS
from engine.model.config import ModelConfig
from engine.planning.setting import Setting
from engine.planning.weights import (
    LayerUpdates,
    copy_bytes,
    layer_updates,
    packed_weights,
    state_bytes,
    whole_bytes,
)
from kernels.ops.linear_cross_entropy import PAD, most_rows

CONTEXT_BYTES = 640 << 20  # CUDA's context, cuBLAS with its workspace, the kernels' code: 0.5 to 0.6 GiB on an H100
NCCL_BYTES = 512 << 20  # buffers of NCCL's channels on each of several GPUs: assumed
SLACK = 0.03  # of all tensors' bytes: what the allocator loses by rounding up and by gaps
PLAN_BYTES = 64  # a token: the attention plans of all layers but the last, and of the last


@dataclass(frozen=True)
class BatchShape:
    """The size of the largest micro-batch."""

    tokens: int  # T, as computed
    loss_rows: int  # L, the targets with a loss
    one_micro_batch: bool = False  # no step has a second one: gradients appear as activations are freed
    shared_rows: int = 0  # targets whose row predicts another target too

    @property
    def query_rows(self) -> int:
        """Return U, the number of distinct rows that predict targets."""
        return self.loss_rows - self.shared_rows


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at the worst moment of a step."""

    weights: int
    master: int
    states: int
    gradients: int
    gathered: int  # whole weights of other GPUs' shards, and gradients for them; 0 on one GPU
    activations: int
    head: int  # temporaries while the loss is computed: logits, and their rows
    backward: int  # temporaries while backward is in its worst layer
    overhead: int
    host: int  # of the host's memory, for this GPU
    trained: int = 0  # of the weights
    host_copy: int = 0  # of the host's memory while a state is saved, for a GPU whose shards are in the checkpoint

    @property
    def temporaries(self) -> int:
        """Return the larger of the head's and backward's temporaries, which never exist at the same time."""
        return max(self.head, self.backward)

    @property
    def total(self) -> int:
        """Return the bytes of the GPU's memory."""
        state = self.weights + self.master + self.states + self.gradients
        return state + self.gathered + self.activations + self.temporaries + self.overhead


# ---- several GPUs ---------------------------------------------------------------------------------------------------


def gathered_bytes(c: ModelConfig, setting: Setting, later: int) -> int:
    """Return the most that one of several GPUs holds of whole weights and gradients: see the top of the file.

    later: the bytes of activations and temporaries, which are not there yet as forward begins.
    """
    if setting.n_cards == 1:
        return 0
    whole = whole_bytes(c, setting.dtype, setting.shards, setting.adapter)
    wide, outside = 4 // setting.number_bytes, whole.others + whole.trained_others  # F, E + E'
    if setting.shards == 1:
        of_block = max(2 * whole.block + wide * whole.trained_block, 3 * wide * whole.trained_block)
        return max(outside + of_block, 3 * wide * whole.trained_others)
    of_block = 2 * whole.block + (1 + wide) * whole.trained_block
    backward = outside + max(of_block, wide * whole.trained_others)
    return max(backward, whole.others + 3 * whole.block, 2 * (whole.others + whole.block) - later)


def sums_bytes(gradient_bytes: int, setting: Setting) -> int:
    """Return the bytes of the fp32 sums that one of several replicas keeps beside 16-bit gradients."""
    if setting.replicas == 1 or setting.number_bytes == 4:
        return 0
    return gradient_bytes * 4 // setting.number_bytes


# ---- activations ----------------------------------------------------------------------------------------------------


def layer_bytes(
    c: ModelConfig, setting: Setting, batch: BatchShape, last: bool, updates: LayerUpdates | None = None
) -> int:
    """Return what one layer keeps for backward.

        x, residual, q k v, attention's output, gate and up        2 D + (H + 2 K) Dh + H Dh + 2 F numbers a token
        two norms' rstd, logsumexp of each head                    2 + H fp32
        recompute="none" also the norms' outputs and SwiGLU's      2 D + F
        an adapter also u of each matrix                           the ranks of its updates

    The last layer keeps x, its norm, k and v, and the first u, of all tokens, and the rest of U rows with their places
    (int64). With recompute="block" a layer keeps only x, and the last one the places. Under an adapter the layer that
    backward ends in keeps nothing of what comes before its first update, and the layers below it nothing.
    """
    t, size, updates = batch.tokens, setting.number_bytes, updates or LayerUpdates()
    rows, places = (batch.query_rows, 8 * batch.query_rows) if last else (t, 0)
    if updates.first == len(MAPS):
        return 0
    if setting.recompute == "block":
        return t * c.dim * size + places
    heads, keeps = c.n_heads * c.head_dim, setting.recompute == "none"
    parts = (  # what is kept from the input of each of MAPS on
        t * ((1 + keeps) * c.dim + 2 * c.n_kv_heads * c.head_dim) * size + 4 * t
        + rows * (heads * size + 4 * c.n_heads) + places,
        rows * heads * size,
        rows * ((1 + keeps) * c.dim * size + 4),
        rows * (2 + keeps) * c.hidden_dim * size,
    )  # fmt: skip
    return sum(parts[updates.first :]) + updates.u_numbers(rows, t) * size


def activation_bytes(c: ModelConfig, setting: Setting, batch: BatchShape) -> int:
    """Return what autograd keeps of a micro-batch between forward and backward, without attention's plans.

    Besides the layers it keeps the tokens (int64) for the embedding's gradient, the tables of cos and sin (T, Dh/2) in
    fp32, the final norm's input (U, D) and rstd, the loss's dx (L, D), and, where a row has several targets, the row of
    each target (int64). Where nothing but the head is trained it keeps nothing.
    """
    t, loss_rows, u, size = batch.tokens, batch.loss_rows, batch.query_rows, setting.number_bytes
    *below, last = layer_updates(c, setting.adapter)
    if last.first == len(MAPS):
        return 0
    layers = layer_bytes(c, setting, batch, True, last)
    layers += sum(n * layer_bytes(c, setting, batch, False, updates) for updates, n in Counter(below).items())
    head = u * (c.dim * size + 4) + loss_rows * c.dim * size + (8 * loss_rows if u != loss_rows else 0)
    tokens = 8 * t if setting.trains_embedding else 0
    tables = 4 * t * c.head_dim if last.first == 0 else 0
    return layers + head + tokens + tables


# ---- the worst moments ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Bytes at the moments of a step that can be the worst."""

    head: int  # beside activations, while the loss is computed
    backward: int  # beside activations, in the worst layer
    first_layer: int  # with what is still kept, in the first layer, where backward ends
    embedding: int  # with what is still kept, at the embedding


def padded_vocab(c: ModelConfig) -> int:
    """Return the number of columns of the logits that linear_cross_entropy makes."""
    return -(-c.vocab_size // PAD) * PAD


def layer_moment(c: ModelConfig, setting: Setting, batch: BatchShape, last: bool, updates: LayerUpdates) -> int:
    """Return what one layer's backward needs beside what is kept when it begins.

    Backward frees what it has used, so a moment needs what it makes less what is gone by then. A layer makes (numbers a
    token), beside the gradient dy (T, D) of the residual stream, which always exists:

        swiglu_linear    dy, dh (h is written over it, gate's and up's gradients over gate and up)     D + F
        norm_linear      dy, dh, dx, the norm's output; gate and up still exist                      4 D
        attention        dy, do, dq dk dv, delta (fp32, H), parts of dk, dv (fp32, about K Dh bytes a token);
                         gate, up and the residual are gone                                  D + 2 H Dh + 2 K Dh
        norm_linear      dy, dq dk dv, dh, dx, the norm's output; only x is left             4 D + (H + 2 K) Dh

    The last layer makes these for its U rows, but dk, dv, dh, dx, the norm's output and the residual's gradient for all
    tokens. It is gone whole before another layer's backward. With recompute="block" what a layer keeps is made again,
    with h and the layer's output (T, F + D) beside dy, before its backward begins.

    An adapter makes u's gradient. Dropout of h makes two copies and a mask of bytes, of what is added to dh three. A
    matrix in 4 bits exists whole while it is multiplied by: in backward beside dy and the product, in forward beside
    the product, which is kept, the norm's output and input, and in the last layer the residual.
    """
    t, size, d, f = batch.tokens, setting.number_bytes, c.dim, c.hidden_dim
    rows, ranks, matrices = batch.query_rows if last else t, updates.ranks, matrix_bytes(c, setting)
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    is_recomputed, keeps = setting.recompute == "block", setting.recompute == "none"
    drops = bool(setting.adapter and setting.adapter.dropout)

    def dropping(numbers: int, copies: int) -> int:
        """Return the bytes that dropout of so many numbers makes: copies of them and a mask."""
        return numbers * (copies * size + 1) if drops else 0

    recomputed = 0
    if is_recomputed:
        recomputed = layer_bytes(c, replace(setting, recompute="cheap"), batch, last, updates)
        recomputed -= layer_bytes(c, setting, batch, last, updates)
    mlp = max(
        rows * (d + f) * size + max(dropping(rows * f, 3), matrices["w2"]),
        rows * 4 * d * size + dropping(rows * d, 2), rows * 2 * d * size + matrices["w13"],
    ) + rows * max(ranks) * size  # fmt: skip
    freed = rows * (d + 2 * f + sum(ranks[2:])) * size
    parts = 4 * c.n_heads * rows + kv_heads * t
    attention = rows * (d + 2 * heads) * size + t * 2 * kv_heads * size + parts - freed
    attention = max(attention, rows * (d + heads) * size + matrices["wo"] - freed)
    freed += (rows * (2 * heads + ranks[1]) + t * 2 * kv_heads) * size
    qkv = rows * (heads + (2 * d if last else 0)) * size + t * (2 * d + 2 * kv_heads + ranks[0]) * size
    qkv += max(t * d * 2 * size + dropping(t * d, 2), matrices["wqkv"]) - freed
    forward = rows * (2 * d + f) * size + max(dropping(rows * f, 2), matrices["w2"]) if is_recomputed else 0
    if setting.packed:
        made = (2 + last + is_recomputed) * d - keeps * (d + f) - sum(ranks[2:])
        forward = max(forward, rows * made * size + matrices["w13"])
    return recomputed + max(mlp, attention, qkv, forward)


def worst_moments(c: ModelConfig, setting: Setting, batch: BatchShape) -> Moments:
    """Return the bytes at the moments of a step that can be the worst.

    The head needs normed rows (L, D), one chunk of logits (as linear_cross_entropy makes them, or more) and losses.
    At the end the embedding's gradient (V, D) is made whole beside dy, and then added.
    """
    t, loss_rows, u, size, d = batch.tokens, batch.loss_rows, batch.query_rows, setting.number_bytes, c.dim
    *below, of_last = layer_updates(c, setting.adapter)
    ranks = zip(*(updates.ranks for updates in below or [of_last]), strict=True)
    most = LayerUpdates(tuple(map(max, ranks)))  # of any layer but the last
    logits = min(loss_rows, most_rows(c.vocab_size, size, setting.trains_head)) * padded_vocab(c) * size
    last, other = (layer_moment(c, setting, batch, is_last, of_last if is_last else most) for is_last in (True, False))
    freed = loss_rows * d * size + u * (d * size + 4)  # the loss's dx and the final norm
    moments = [last - freed] if of_last.first < len(MAPS) else []
    if below and below[-1].first < len(MAPS):
        moments.append(other - freed - layer_bytes(c, setting, batch, True, of_last))
    only, of_first = not below, (below or [of_last])[0]
    first = layer_bytes(c, setting, batch, only, of_first) + (last if only else other) + t * (8 + 4 * c.head_dim)
    return Moments(loss_rows * (d * size + 4) + logits, max(0, *moments), first, (t + c.vocab_size) * d * size)


def matrix_bytes(c: ModelConfig, setting: Setting) -> dict[str, int]:
    """Return the bytes of each of a layer's matrices as it is multiplied by, where it is in 4 bits; else 0."""
    sizes = packed_weights(c, setting.adapter).of_layer
    return {name: n * setting.number_bytes for name, n in zip(MAPS, sizes, strict=True)}


def gradients_at_once(c: ModelConfig, loss_rows: int, size: int, in_backward: bool) -> int:
    """Return the bytes of gradients beside the activations in a step of one micro-batch.

    They are the head's, which the loss makes, and those of the first layer that backward meets. With an optimizer in
    backward autograd hands gradients over. The head's is kept from the loss on (in fp32 after several chunks) and
    copied in its backward. Later two gradients of other matrices exist at a time.
    """
    head, largest = c.vocab_size * c.dim, max(c.vocab_size, 2 * c.hidden_dim) * c.dim
    if not in_backward:
        return (head + c.dim * (3 * c.hidden_dim + 2 * (c.n_heads + c.n_kv_heads) * c.head_dim)) * size
    made = head * (size if loss_rows <= most_rows(c.vocab_size, size, True) else 4)
    return max(made + head * size, (2 * largest + head * c.tied) * size)


def leaving_bytes(c: ModelConfig, setting: Setting, one_micro_batch: bool) -> int:
    """Return the most bytes of gradients at one time that leave for the host's memory while backward goes on.

    They leave by groups: the head and the final norm, each layer, the embedding. In a step of one micro-batch one group
    is made while the one before it leaves. Otherwise the sums of a third one arrive, and when a micro-batch begins, the
    embedding's leave while the head's and the last layer's arrive. A tied head's stay until the last micro-batch.
    """
    whole = whole_bytes(c, setting.dtype, 1)
    block, others = whole.block, whole.others
    embedding = c.vocab_size * c.dim * setting.number_bytes
    if c.tied:
        return embedding + (2 if one_micro_batch else 3) * block
    head = others - embedding
    if one_micro_batch:
        return block + max(head, block, embedding)
    return max(embedding + head + block, 2 * block + max(head, block, embedding))


# ---- the sum --------------------------------------------------------------------------------------------------------


def memory(c: ModelConfig, setting: Setting, batch: BatchShape) -> Memory:
    """Return the bytes of a training step on one GPU whose largest micro-batch is `batch`.

    With offload, master and states are in the host's memory. They pass through SLOTS pieces of the GPU's memory, each
    as large as the states of the largest tensor; or the CPU updates them, and gradients and weights are there too.
    Where no step has a second micro-batch, gradients appear as activations are freed, and an optimizer in backward
    frees each of them at once. Raises ValueError for an optimizer in backward on several GPUs.
    """
    if setting.in_backward and setting.n_cards > 1:
        raise ValueError(f"memory: in_backward with {setting.n_cards} cards, wanted one")
    size, several = setting.number_bytes, setting.n_cards > 1
    state, kept = state_bytes(c, setting), activation_bytes(c, setting, batch)
    master, states, host = state.master, state.states, 0
    if setting.offload:
        master, states, host = 0, SLOTS * state.largest, state.master + state.states
        if setting.on_cpu:
            states, host = 0, host + 2 * state.weights
    # Besides: positions and plans, targets and their weights; tokens, if autograd does not keep them.
    others = batch.tokens * (8 + PLAN_BYTES) + 12 * batch.loss_rows
    activations = kept + others + (0 if setting.trains_embedding else 8 * batch.tokens)
    moments = worst_moments(c, setting, batch)
    backward = moments.backward
    if several:  # whole gradients are among what is gathered, the embedding's too
        gradients = state.trained + sums_bytes(state.trained, setting)
    elif setting.adapter is not None:  # gradients of the adapter, which are small, and of what is trained whole
        gradients = state.trained
        backward = max(backward, moments.embedding - kept) if setting.trains_embedding else backward
    elif setting.gradients_leave:
        gradients = leaving_bytes(c, setting, batch.one_micro_batch)
        backward = max(backward, moments.embedding - kept)
    elif batch.one_micro_batch and not setting.in_backward:  # most activations are gone when most gradients exist
        others = state.weights - c.vocab_size * c.dim * size  # all but the embedding's, or the one it is added to
        latest = others + max(moments.first_layer, moments.embedding) + c.tied * c.vocab_size * c.dim * size
        gradients = gradients_at_once(c, batch.loss_rows, size, False)
        gradients = max(gradients, latest - kept - max(moments.head, backward))
    else:
        gradients = gradients_at_once(c, batch.loss_rows, size, True) if setting.in_backward else 0
        gradients += 0 if batch.one_micro_batch else state.weights  # autograd adds a new gradient to the old one
        backward = max(backward, moments.embedding - kept)
    later = activations + max(moments.head, backward)
    gathered = gathered_bytes(c, setting, later)
    tensors = state.weights + gradients + master + states + gathered + later
    libraries = CONTEXT_BYTES + (NCCL_BYTES if several else 0)
    return Memory(
        state.weights, master, states, gradients, gathered, activations, moments.head, backward,
        libraries + round(SLACK * tensors), host, state.trained, copy_bytes(c, setting) if setting.saves else 0,
    )  # fmt: skip

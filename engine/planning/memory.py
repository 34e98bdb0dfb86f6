"""Bytes of a training step on a card, alone or one of several, and what fits.

Of a micro-batch of T tokens, L of whose targets carry loss at U distinct rows, at the worst moment of a step:

    weights, gradients     the size of each parameter's dtype, twice: gradients are added to in place
    master, states         what kernels.adamw.adamw_state makes; on the host with offload
    activations            what is kept for backward, exactly: kept()
    temporaries            what the worst moment needs beside that: temporaries()
    overhead               CUDA's context and libraries, and what the allocator cannot use: assumed

On each of S cards, sharded as engine.distributed.world does, a block at a time and the embedding, norm and head together, the
first two lines are of shards: of a parameter (n, ...) the largest has ceil(n / S) rows. Activations and temporaries are
those of the card's own micro-batch, and beside them, at the moment at which most is whole:

    gathered      weights of the embedding and the head, E, from a step's begin to its end, and of two neighbouring
                  blocks, the one under way and the next, fetched ahead; gradients of E until the end, and a block's
                  with the fp32 that is reduced:                        2 E + 2 B + (B + F B), with F = 4 / dtype's size
                  or, at the end, E's alone with the fp32 of it:        2 E + F E

B is a block, of S shards. R replicas of S shards sum their gradients once a step. Until then each keeps fp32 sums of
its shard's, and FSDP2 keeps what it sends, fp32 too, until backward has ended: 4 bytes a parameter beside its gradient
in bf16. With S = 1 nothing is sent to gather, but FSDP2 copies: the weights of E and of the block under way; of its
gradients that are to be summed it has an fp32 copy, the same divided by 1, and the sum of earlier micro-batches':

    gathered, S = 1    2 E + max(2 B + F B, 3 F B), or at the end 3 F E

Projected: no run on several cards was measured.
"""

import functools
import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from engine.base.host_memory import COPY_ARENA_BYTES, SLOTS, HostMemory
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.planning.cards import MACHINE, Card, Traffic, cards_of, within_machines
from kernels.ops.adamw import adamw_state, states_of
from kernels.ops.linear_cross_entropy import LOGITS_BYTES, PAD, ROWS

CONTEXT_BYTES = 640 << 20  # CUDA's context, cuBLAS with its workspace, the kernels' code: 0.5 to 0.6 GiB on an H100
NCCL_BYTES = 512 << 20  # its channels' buffers on each of several cards: assumed
SLACK = 0.03  # of all tensors: what the allocator rounds up and cannot join
PLAN_BYTES = 64  # a token: attention's plans, of all layers but the last and of the last
MOST_TOKENS = 32768  # of a micro-batch that is chosen here: more gains nothing


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at the worst moment of a step."""

    weights: int
    master: int
    states: int
    gradients: int
    gathered: int  # what is whole of other cards' weights, and of gradients for them; 0 on one card
    activations: int
    head: int  # temporaries while the loss is made: logits, and their rows
    backward: int  # temporaries while backward is in its worst layer
    overhead: int
    host: int  # in the computer's memory, not on the card; for this card alone
    host_copy: int = 0  # there too, while a state is being saved: of a card whose shards a checkpoint holds

    @property
    def temporaries(self) -> int:
        """The head's or backward's: the two never meet."""
        return max(self.head, self.backward)

    @property
    def total(self) -> int:
        """On the card."""
        state = self.weights + self.master + self.states + self.gradients
        return state + self.gathered + self.activations + self.temporaries + self.overhead


def shard_of(p: torch.Tensor, cards: int) -> torch.Tensor:
    """An empty tensor like the largest of the shards of p (R, ...): (ceil(R / cards), ...)."""
    return p.new_empty(-(-len(p) // cards), *p.shape[1:])


@functools.cache
def state_bytes(c: ModelConfig, dtype: torch.dtype, master: str, states: str, cards: int = 1) -> tuple[int, ...]:
    """Bytes of the weights, of their masters, of AdamW's m and v, and of the most that one tensor has of the last two.

    Counted on the real model's largest shards and their real optimizer states, on torch's meta device.
    """
    parameters, masters, moments, largest = 0, 0, 0, 0
    for p in (shard_of(whole, cards) for whole in new_model(c, "meta", dtype).parameters()):
        kept = {name: t.nbytes for name, t in adamw_state(p, master, states_of(p, states)).tensors().items()}
        parameters += p.nbytes
        masters += kept.get("low", 0) + kept.get("master", 0)
        moments += sum(kept.values()) - kept.get("low", 0) - kept.get("master", 0)
        largest = max(largest, sum(kept.values()))
    return parameters, masters, moments, largest


@functools.cache
def copy_bytes(c: ModelConfig, dtype: torch.dtype, master: str, states: str, cards: int = 1) -> int:
    """Return the bytes of pinned memory into which a save copies a card's weights, masters and optimizer states."""
    shards = [shard_of(p, cards) for p in new_model(c, "meta", dtype).parameters()]
    kept = [t.nbytes for p in shards for t in adamw_state(p, master, states_of(p, states)).tensors().values()]
    memory = HostMemory(pinned=True, arena_bytes=COPY_ARENA_BYTES)
    for n_bytes in [*(p.nbytes for p in shards), *kept]:
        memory.place_piece(n_bytes)
    return sum(memory.sizes)


@functools.cache
def whole_bytes(c: ModelConfig, dtype: torch.dtype, cards: int) -> tuple[int, int]:
    """Bytes of a block's weights, and of those outside of blocks, gathered from so many shards."""
    model = new_model(c, "meta", dtype)
    groups = model.layers[0].parameters(), model.parameters(recurse=False)
    return tuple(sum(cards * shard_of(p, cards).nbytes for p in group) for group in groups)


def gathered_bytes(c: ModelConfig, dtype: torch.dtype, cards: int, replicas: int = 1) -> int:
    """The most that is whole on one of several cards: see the top of the file."""
    if cards * replicas == 1:
        return 0
    block, others = whole_bytes(c, dtype, cards)
    wide = 4 // dtype.itemsize
    if cards == 1:
        return max(2 * others + max(2 * block + wide * block, 3 * wide * block), 3 * wide * others)
    return 2 * others + max(3 * block + wide * block, wide * others)


def sums_bytes(parameters: int, dtype: torch.dtype, replicas: int) -> int:
    """What one of several replicas keeps in fp32 beside gradients of so many bytes; those of fp32 are the same."""
    return parameters * 4 // dtype.itemsize if replicas > 1 and dtype.itemsize < 4 else 0


def sent_bytes(c: ModelConfig, dtype: torch.dtype, cards: int) -> int:
    """What each card sends, and receives, for a micro-batch: (S - 1) / S of the padded weights in forward, again in
    backward of all blocks but the last, and of all gradients, in fp32. Recomputing a block gathers nothing more."""
    block, others = whole_bytes(c, dtype, cards)
    weights = (2 * c.n_layers - 1) * block + others
    return (weights + 4 // dtype.itemsize * (c.n_layers * block + others)) * (cards - 1) // cards


def summed_bytes(c: ModelConfig, dtype: torch.dtype, cards: int, replicas: int) -> int:
    """What each card sends, and receives, once a step: 2 (R - 1) / R of its shard's gradients, in fp32."""
    shard = state_bytes(c, dtype, "split", "fp32", cards)[0]
    return 2 * (replicas - 1) * shard * 4 // dtype.itemsize // replicas


def traffic(c: ModelConfig, card: Card, dtype: torch.dtype, cards: int, replicas: int) -> Traffic:
    """The same by collective, and the links that carry them."""
    wide = 4 // dtype.itemsize
    whole = whole_bytes(c, dtype, cards)
    sent = tuple(n * (cards - 1) // cards for n in whole)
    summed = tuple(2 * (replicas - 1) * wide * n // cards // replicas for n in whole)
    inside = within_machines(cards, replicas)
    return Traffic(
        c.n_layers, sent, tuple(wide * n for n in sent), summed,
        card.bus_bytes_per_s(cards, replicas), card.sum_bytes_per_s(cards, replicas),
        apart=inside and cards * replicas > MACHINE,
    )  # fmt: skip


def layer_bytes(c: ModelConfig, t: int, u: int, size: int, recompute: str, last: bool) -> int:
    """What one layer keeps for backward of t tokens, of which u carry loss. size: bytes of a number.

        x, residual, q k v, attention's output, gate and up        2 D + (H + 2 K) Dh + H Dh + 2 F numbers a token
        two norms' rstd, logsumexp of each head                    2 + H fp32
        recompute="none" also the norms' outputs and SwiGLU's      2 D + F

    The last layer has x, its norm, k and v of all tokens, the rest of the u rows, and their places (int64). With
    recompute="block" a layer keeps x alone (and the places).
    """
    rows = u if last else t
    places = 8 * u if last else 0
    if recompute == "block":
        return t * c.dim * size + places
    of_all = t * (c.dim + 2 * c.n_kv_heads * c.head_dim) * size + 4 * t
    of_rows = rows * (c.dim + 2 * c.n_heads * c.head_dim + 2 * c.hidden_dim) * size + 4 * rows * (1 + c.n_heads)
    if recompute == "none":
        of_all += t * c.dim * size
        of_rows += rows * (c.dim + c.hidden_dim) * size
    return of_all + of_rows + places


def kept(c: ModelConfig, tokens: int, loss_rows: int, query_rows: int, size: int, recompute: str) -> int:
    """What autograd keeps of a micro-batch between forward and backward, without attention's plans.

    Beside the layers: the tokens (int64), the tables of cos and sin (T, Dh/2) fp32, the final norm's input (U, D) and
    rstd, the loss's dx (L, D), and which row each target has (int64) where a row has several.
    """
    t, u = tokens, query_rows
    layers = (c.n_layers - 1) * layer_bytes(c, t, u, size, recompute, False)
    layers += layer_bytes(c, t, u, size, recompute, True)
    head = u * (c.dim * size + 4) + loss_rows * c.dim * size + (8 * loss_rows if u != loss_rows else 0)
    return layers + head + 8 * t + 4 * t * c.head_dim


def chunk_limit(c: ModelConfig, size: int) -> int:
    """The most rows of logits that linear_cross_entropy makes at once."""
    return max(1, LOGITS_BYTES // (-(-c.vocab_size // PAD) * PAD * size) // ROWS) * ROWS


def temporaries(c: ModelConfig, tokens: int, loss_rows: int, query_rows: int, size: int, recompute: str):
    """Bytes beside what kept() counts, at the worst moment of the head and of backward's layers; and those with what is
    still kept in the first layer, where backward ends, and at the embedding.

    The head: normed rows (L, D), one chunk of logits (as linear_cross_entropy cuts them, or more) and losses.

    Backward lets go of what it has used, so a moment is what it makes less what is gone by then. With dy (T, D), the
    gradient of the residual stream, always there, a layer makes (numbers a token):

        swiglu_linear    dy, dh (h is written over it, gate's and up's gradients over gate and up)     D + F
        norm_linear      dy, dh, dx, the norm's output; gate and up are still there                  4 D
        attention        dy, do, dq dk dv, delta (fp32, H), parts of dk, dv (fp32, about K Dh bytes a token);
                         gate, up and the residual are gone                                  D + 2 H Dh + 2 K Dh
        norm_linear      dy, dq dk dv, dh, dx, the norm's output; only x is left             4 D + (H + 2 K) Dh

    The last layer makes those of its u rows, but dk dv, dh, dx, the norm's output and the residual's gradient of all.
    Before another layer's backward the last layer is gone whole. With recompute="block" what a layer keeps comes into
    being again, with h and the layer's output (T, F + D) beside dy before its backward begins. At the end the
    embedding's gradient is made whole, (V, D), beside dy, and then added.
    """
    t, u, d, f = tokens, query_rows, c.dim, c.hidden_dim
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    logits = min(loss_rows, chunk_limit(c, size)) * (-(-c.vocab_size // PAD) * PAD) * size
    head = loss_rows * (d * size + 4) + logits

    def layer(rows, last):
        """Of one layer, beside what is kept when its backward begins."""
        again = 0
        if recompute == "block":
            again = layer_bytes(c, t, u, size, "cheap", last) - layer_bytes(c, t, u, size, "block", last)
        mlp = rows * max(d + f, 4 * d) * size
        gone = rows * (d + 2 * f) * size
        parts = 4 * c.n_heads * rows + kv_heads * t
        attention = rows * (d + 2 * heads) * size + t * 2 * kv_heads * size + parts - gone
        gone += (rows * 2 * heads + t * 2 * kv_heads) * size
        way_in = rows * (heads + (2 * d if last else 0)) * size + t * (4 * d + 2 * kv_heads) * size - gone
        forward = rows * (2 * d + f) * size if recompute == "block" else 0
        return again + max(mlp, attention, way_in, forward)

    gone = loss_rows * d * size + u * (d * size + 4)  # the loss's dx and the final norm
    moments = [layer(u, True) - gone]
    if c.n_layers > 1:
        moments.append(layer(t, False) - gone - layer_bytes(c, t, u, size, recompute, True))
    only = c.n_layers == 1
    first = layer_bytes(c, t, u, size, recompute, only) + layer(u if only else t, only) + t * (8 + 4 * c.head_dim)
    return head, max(0, *moments), first, (t + c.vocab_size) * d * size


def gradients_at_once(c: ModelConfig, loss_rows: int, size: int, in_backward: bool) -> int:
    """Bytes of gradients beside the activations in a step of one micro-batch: the head's, which the loss makes, and the
    first layer's that backward meets.

    An optimizer in backward has autograd hand gradients over: the head's is kept from the loss on (in fp32 after
    several chunks) and copied in its backward; then of other matrices two are there at a time.
    """
    head, largest = c.vocab_size * c.dim, max(c.vocab_size, 2 * c.hidden_dim) * c.dim
    if not in_backward:
        return (head + c.dim * (3 * c.hidden_dim + 2 * (c.n_heads + c.n_kv_heads) * c.head_dim)) * size
    made = head * (size if loss_rows <= chunk_limit(c, size) else 4)
    return max(made + head * size, (2 * largest + head * c.tied) * size)


def memory(
    c: ModelConfig, *, tokens: int, loss_rows: int, query_rows: int | None = None, dtype: torch.dtype = torch.bfloat16,
    master: str = "split", states: str = "fp32", recompute: str = "cheap", offload: bool = False,
    in_backward: bool = False, one_micro_batch: bool = False, cards: int = 1, replicas: int = 1, saves: bool = False,
) -> Memory:  # fmt: skip
    """Bytes of a training step on a card.

    tokens: T of the largest micro-batch, as computed. loss_rows: L of its targets. query_rows: U, the distinct rows
    that predict them; None is L. master, states, recompute, offload, in_backward: as FinetuneConfig's flags say. With
    offload master and states are on the host, but for those in SLOTS, each as large as the largest tensor's.
    one_micro_batch: no step has a second; then gradients come as activations go, and with in_backward go again at once.
    cards: over which a replica is sharded, which share everything but a micro-batch. replicas: of so many cards each.
    saves: states on the way, by a copy in the host's memory. Raises ValueError for several cards with in_backward.
    """
    if in_backward and cards * replicas > 1:
        raise ValueError(f"memory: in_backward with {cards * replicas} cards, wanted one")
    size = dtype.itemsize
    query_rows = loss_rows if query_rows is None else query_rows
    parameters, masters, moments, largest = state_bytes(c, dtype, master, states, cards)
    gathered = gathered_bytes(c, dtype, cards, replicas)
    host = masters + moments if offload else 0
    if offload:
        masters, moments = 0, SLOTS * largest
    kept_bytes = kept(c, tokens, loss_rows, query_rows, size, recompute)
    activations = kept_bytes + tokens * (8 + PLAN_BYTES) + 12 * loss_rows  # positions, plans; targets and their weights
    head, backward, first, end = temporaries(c, tokens, loss_rows, query_rows, size, recompute)
    if cards * replicas > 1:  # whole ones are among what is gathered, the embedding's too
        gradients = parameters + sums_bytes(parameters, dtype, replicas)
    elif one_micro_batch and not in_backward:  # most gradients are there when most activations are not
        others = parameters - c.vocab_size * c.dim * size  # all but the embedding's, or the one that it is added to
        latest = others + max(first, end) + c.tied * c.vocab_size * c.dim * size
        gradients = gradients_at_once(c, loss_rows, size, False)
        gradients = max(gradients, latest - kept_bytes - max(head, backward))
    else:
        gradients = gradients_at_once(c, loss_rows, size, True) if in_backward else 0
        gradients += 0 if one_micro_batch else parameters  # autograd adds a new one to the old
        backward = max(backward, end - kept_bytes)
    tensors = parameters + gradients + masters + moments + gathered + activations + max(head, backward)
    libraries = CONTEXT_BYTES + (NCCL_BYTES if cards * replicas > 1 else 0)
    return Memory(
        parameters, masters, moments, gradients, gathered, activations, head, backward,
        libraries + round(SLACK * tensors), host, copy_bytes(c, dtype, master, states, cards) if saves else 0,
    )  # fmt: skip


def largest_micro_batch(
    c: ModelConfig, room_bytes: int, *, loss_share: float = 1.0, most_tokens: int = MOST_TOKENS,
    step_tokens: int | None = None, **setting,
) -> int:  # fmt: skip
    """The most tokens of a micro-batch whose memory() is within room_bytes, up to most_tokens; 0 if none.

    loss_share: rows with loss a token. step_tokens: of the largest step, where it is known: a micro-batch that holds
    all of it needs fewer gradients. setting: of memory().
    """

    def fits(tokens, one=False):
        loss_rows = math.ceil(loss_share * tokens)
        return memory(c, tokens=tokens, loss_rows=loss_rows, one_micro_batch=one, **setting).total <= room_bytes

    if step_tokens and step_tokens <= most_tokens:
        if fits(step_tokens, True):
            return step_tokens
        most_tokens = step_tokens - 1
    low, high = 0, most_tokens + 1  # low fits or is 0, high does not or is over the limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def layout_that_fits(
    c: ModelConfig, room_bytes: int, n_cards: int, *, share_tokens: int, least_tokens: int,
    counts: Collection[int] | None = None, **setting,
) -> tuple[int, int]:  # fmt: skip
    """(replicas, tokens of a micro-batch): the fewest replicas where a card's share of a step is one micro-batch then:
    every layout sends as much, and the smaller a shard, the sooner it is updated; else the most replicas that need no
    more micro-batches.

    With n micro-batches a step a card sends n x 8 (S - 1) / S + 8 (R - 1) / (R S) bytes a parameter (docs/ranks.md).
    share_tokens: of a step, of one card. least_tokens: of the longest example. counts: shards into which a replica may
    be cut; None: any. setting: of largest_micro_batch(), but cards and replicas. Raises ValueError where n_cards are no
    multiple of any of counts.
    """
    allowed = [r for r in range(1, n_cards + 1) if n_cards % r == 0 and (counts is None or n_cards // r in counts)]
    if not allowed:
        raise ValueError(f"layout: {n_cards} cards, wanted a multiple of one of {', '.join(map(str, counts))} shards")

    def tokens(replicas):
        return largest_micro_batch(c, room_bytes, **setting | {"cards": n_cards // replicas, "replicas": replicas})

    fewest = allowed[0], tokens(allowed[0])
    if fewest[1] >= share_tokens or fewest[1] < least_tokens:
        return fewest
    wanted = max(math.ceil(share_tokens / math.ceil(share_tokens / fewest[1])), least_tokens)
    found = ((replicas, tokens(replicas)) for replicas in reversed(allowed))
    return next((layout for layout in found if layout[1] >= wanted), fewest)


def layout_name(cards: int, replicas: int) -> str:
    """How cards share a model, in words; cards: of a replica."""
    if replicas == 1:
        return f"sharded over {cards}"
    return f"{replicas} replicas" + f" of {cards} shards" * (cards > 1)


# What saves memory, the cheapest in speed and mathematics first: (setting of memory(), its value, flags).
SAVINGS = (
    ("states", "8bit", "--optimizer-states 8bit"),
    ("states", "bf16", "--optimizer-states bf16"),
    ("recompute", "cheap", "--recompute cheap"),
    ("recompute", "block", "--recompute block"),
    ("master", "stochastic", "--master-weights stochastic"),
    ("offload", True, "--offload-optimizer"),
    ("in_backward", True, "--optimizer-in-backward --grad-clip 0"),
)
DEFAULTS = {
    "dtype": torch.bfloat16, "master": "split", "states": "fp32", "recompute": "cheap", "offload": False,
    "in_backward": False, "cards": 1, "replicas": 1, "saves": False,
}  # fmt: skip


def setting_of(config, dtype: torch.dtype) -> dict:
    """What memory() is to know of a FinetuneConfig's flags, whose run is one card's, or of an EstimateConfig's. With
    replicas chosen by what fits it is the setting of one, over all cards."""
    cards = cards_of(config)
    replicas = config.replicas or 1 if cards > 1 else 1
    return {
        "dtype": dtype, "master": config.master_weights, "states": config.optimizer_states,
        "recompute": config.recompute, "offload": config.offload_optimizer, "in_backward": config.optimizer_in_backward,
        "cards": cards // replicas, "replicas": replicas, "saves": config.save_every not in ("off", "end"),
    }  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A way to fit: flags that change the setting, the setting with them, and the micro-batch it leaves room for."""

    flags: tuple[str, ...]
    setting: dict
    tokens: int
    memory: Memory


def cheapest_that_fits(
    c: ModelConfig, room_bytes: int, *, tokens: int, least_tokens: int, step_tokens: int | None = None,
    most_tokens: int = MOST_TOKENS, loss_share: float = 1.0, **setting,
) -> list[Fit]:  # fmt: skip
    """The sets of changes that fit room_bytes, the cheapest first, none with a change that it could do without.

    tokens: of a micro-batch as wished, of which a fit may leave least_tokens, the cheapest change of all; then SAVINGS,
    each dearer than all before it together. Where there is room for more, up to most_tokens are taken. step_tokens: as
    largest_micro_batch's; without it the optimizer is not proposed to run in backward. setting: of memory().
    """
    setting = DEFAULTS | setting

    def used(tokens, setting):
        one = step_tokens is not None and tokens >= step_tokens
        return memory(c, tokens=tokens, loss_rows=math.ceil(loss_share * tokens), one_micro_batch=one, **setting)

    price = {saving: 2 << i for i, saving in enumerate(SAVINGS)}
    most = min(most_tokens, step_tokens or most_tokens)
    known = [s for s in SAVINGS if s[0] != "in_backward" or setting["cards"] * setting["replicas"] == 1]
    saving = [s for s in known if used(most, setting | {s[0]: s[1]}).total < used(most, setting).total]
    groups = [[s for s in saving if s[0] == name] for name in dict.fromkeys(name for name, *_ in saving)]
    found = []
    for picked in itertools.product(*([None, *group] for group in groups)):
        taken = [s for s in picked if s]
        changed = setting | {name: value for name, value, _ in taken}
        if changed["in_backward"] and changed["offload"]:
            continue
        fitting = largest_micro_batch(
            c, room_bytes, loss_share=loss_share, most_tokens=most_tokens, step_tokens=step_tokens, **changed
        )
        if fitting < (step_tokens if changed["in_backward"] and step_tokens else least_tokens):
            continue
        smaller = [f"--micro-batch-tokens {fitting}"] * (fitting < tokens)
        flags = (*smaller, *(text for *_, text in taken))
        names = {*(text for *_, text in taken), *(["smaller"] * len(smaller))}
        cost = sum(price[s] for s in taken) + len(smaller)
        found.append((cost, names, Fit(flags, changed, fitting, used(fitting, changed))))
    fits, kept_names = [], []
    for _, names, fit in sorted(found, key=lambda f: f[0]):
        if not any(earlier <= names for earlier in kept_names):
            fits.append(fit)
            kept_names.append(names)
    return fits


# ---- telling --------------------------------------------------------------------------------------------------------


def gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f}"


def memory_rows(used: Memory, room_bytes: int, tokens: int, **setting) -> list[tuple[str, str, str]]:
    """(kind, GB, what it is) of each kind and of their sum: the rows of a table. setting: of memory()."""
    setting = DEFAULTS | setting
    dtype = str(setting["dtype"]).removeprefix("torch.")
    of_master = {"split": "the 16 bits that bf16 lacks", "fp32": "in fp32", "stochastic": "none: rounded at random"}
    of_master = of_master[setting["master"]] if setting["dtype"] == torch.bfloat16 else "the weights themselves"
    on_host = f"; {gb(used.host)} GB of master and states on the host" if used.host else ""
    which = "the head's logits" if used.head >= used.backward else "a layer's backward"
    left = room_bytes - used.total
    verdict = f"fits, {gb(left)} left" if left >= 0 else f"does not fit, {gb(-left)} too much"
    a_token = used.activations / tokens
    a_token = f"{a_token / 1e6:.2f} MB" if a_token >= 1e6 else f"{a_token / 1e3:.1f} kB"
    cards, replicas = setting["cards"], setting["replicas"]
    gathered = "two blocks' weights; a block's and head's gradients"
    gathered = "copies of a block's and head's weights; their gradients" if cards == 1 else gathered
    of_gradients = f"{dtype}, and fp32 to be summed" if replicas > 1 and used.gradients > used.weights else dtype
    of_gradients += ", those there at once" if used.gradients < used.weights else ""
    return [
        ("weights", gb(used.weights), dtype + (f", 1/{cards} of them" if cards > 1 else "")),
        ("fp32 master", gb(used.master), of_master),
        ("optimizer states", gb(used.states), f"m and v, {setting['states']}{on_host}"),
        ("gradients", gb(used.gradients), of_gradients),
        *([("gathered", gb(used.gathered), gathered)] if used.gathered else []),
        ("activations", gb(used.activations), f"{tokens:,} tokens, {a_token} each"),
        ("temporaries", gb(used.temporaries), f"{which}: the larger of {gb(used.head)} and {gb(used.backward)}"),
        ("overhead", gb(used.overhead), "CUDA and its libraries, the allocator: assumed"),
        ("total", gb(used.total), f"of {gb(room_bytes)} ({room_bytes / 2**30:.2f} GiB): {verdict}"),
    ]

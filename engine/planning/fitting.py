"""What fits a GPU's memory: the largest micro-batch, the mesh of replicas and shards, and the cheapest savings."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from engine.model.adapter import AdapterConfig
from engine.model.config import ModelConfig
from engine.model.shard import first_row
from engine.planning.memory import BatchShape, Memory, memory
from engine.planning.setting import MOST_CARDS, Setting
from engine.planning.weights import Shape, trained_shapes
from kernels.ops.adamw import LEAST_8BIT
from kernels.ops.eight_bit import BLOCK

MOST_TOKENS = 32768  # of a micro-batch that is chosen here: more gains nothing
GOOD_TOKENS = 2048  # of a micro-batch; with fewer the GEMMs take as long as reading their weights


@dataclass(frozen=True)
class Limits:
    """What bounds a micro-batch besides memory."""

    most_tokens: int = MOST_TOKENS
    step_tokens: int | None = None  # of the largest step, if known: as one micro-batch it needs fewer gradients
    loss_share: float = 1.0  # rows with a loss per token

    def batch(self, tokens: int) -> BatchShape:
        """Return the size of a micro-batch with this number of tokens, which may be a whole step."""
        one_micro_batch = self.step_tokens is not None and tokens >= self.step_tokens
        return BatchShape(tokens, math.ceil(self.loss_share * tokens), one_micro_batch)


# ---- micro-batches --------------------------------------------------------------------------------------------------


def find_largest_micro_batch(c: ModelConfig, setting: Setting, available_bytes: int, limits: Limits) -> int:
    """Return the most tokens of a micro-batch that fits the available memory within the limits; 0 if none fits."""

    def fits(tokens: int) -> bool:
        return memory(c, setting, limits.batch(tokens)).total <= available_bytes

    most = limits.most_tokens
    if limits.step_tokens and limits.step_tokens <= most:
        if fits(limits.step_tokens):
            return limits.step_tokens
        most = limits.step_tokens - 1
    low, high = 0, most + 1  # low fits or is 0, high does not or is over the limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def resolve_recompute(
    c: ModelConfig, setting: Setting, available_bytes: int, limits: Limits, *, share_tokens: int, tokens: int
) -> tuple[Setting, int]:
    """Return the setting with what recompute="auto" stands for, and the tokens of its micro-batches.

    It is "none" if one GPU's part of a step, share_tokens, then needs no more micro-batches than with "cheap", whose
    micro-batches have `tokens`. A setting with another recompute is returned as it is.
    """
    if setting.recompute != "auto":
        return setting, tokens
    cheap, none = replace(setting, recompute="cheap"), replace(setting, recompute="none")
    fewer = min(tokens, find_largest_micro_batch(c, none, available_bytes, limits))
    if fewer and math.ceil(share_tokens / fewer) <= math.ceil(share_tokens / tokens):
        return none, fewer
    return cheap, tokens


# ---- optimizer states -----------------------------------------------------------------------------------------------


def resolve_states(
    c: ModelConfig,
    setting: Setting,
    available_bytes: int,
    limits: Limits,
    *,
    least_tokens: int,
    replicas: int | None,
    update_s: Callable[[Setting], float],
    host_bytes: float = math.inf,
) -> Setting:
    """Return the setting with the optimizer states that states="auto" stands for.

    They are fp32 where a micro-batch of GOOD_TOKENS, or of the most tokens allowed, fits beside them. Otherwise they
    are bf16 or 8 bits: what fits so, and of both what is updated in fewer seconds. Where no such micro-batch fits, one
    of least_tokens does; where nothing fits, they are fp32.

    Several GPUs keep as many replicas, or, with None, one over as many shards as the states allow. update_s returns the
    seconds of an update. host_bytes: of the host's memory for one GPU, where offloaded states must fit too. A setting
    with other states is returned as it is.
    """
    if setting.states != "auto":
        return setting
    ways = [replace(setting, states=states) for states in ("fp32", "bf16", "8bit")]
    ways[1:] = sorted(ways[1:], key=update_s)

    def count_tokens(way: Setting) -> int:
        counts = find_shard_counts(c, way.states, way.n_cards, way.adapter)
        if replicas and way.n_cards // replicas not in counts:
            return 0
        sharded = way.with_replicas(replicas or way.n_cards // max(counts))
        if memory(c, sharded, limits.batch(1)).host > host_bytes:
            return 0
        return find_largest_micro_batch(c, sharded, available_bytes, limits)

    tokens = [count_tokens(way) for way in ways]
    for wanted in (min(GOOD_TOKENS, limits.most_tokens), least_tokens):
        for way, fitting in zip(ways, tokens, strict=True):
            if fitting >= wanted:
                return way
    return ways[0]


# ---- meshes ---------------------------------------------------------------------------------------------------------


def find_uncut_counts(shapes: Iterable[Shape], most: int = MOST_CARDS) -> list[int]:
    """Return the numbers of shards, up to `most`, that cut no block of 8-bit states of these parameters."""

    def fits(shape: Shape, shards: int) -> bool:
        if len(shape) == 1:
            return True
        width = math.prod(shape[1:])
        cuts = {first_row(shape[0], shards, i) for i in range(1, shards)} - {shape[0]}
        return math.prod(shape) < LEAST_8BIT or not any(row * width % BLOCK for row in cuts)

    distinct = set(shapes)
    return [n for n in range(1, most + 1) if all(fits(shape, n) for shape in distinct)]


@functools.cache
def find_8bit_shard_counts(c: ModelConfig, most: int = MOST_CARDS, adapter: AdapterConfig | None = None) -> list[int]:
    """Return the numbers of shards, up to `most`, into which the model can be cut with 8-bit states."""
    return find_uncut_counts(trained_shapes(c, adapter), most)


def find_shard_counts(c: ModelConfig, states: str, n_cards: int, adapter: AdapterConfig | None = None) -> list[int]:
    """Return the numbers of shards that n_cards GPUs allow: divisors of n_cards that cut no block of 8-bit states."""
    divisors = [n for n in range(1, n_cards + 1) if n_cards % n == 0]
    if states != "8bit" or n_cards == 1:
        return divisors
    allowed = find_8bit_shard_counts(c, n_cards, adapter)
    return [n for n in divisors if n in allowed]


def find_mesh_that_fits(
    c: ModelConfig,
    setting: Setting,
    available_bytes: int,
    limits: Limits,
    *,
    share_tokens: int,
    least_tokens: int,
    counts: Collection[int] | None = None,
) -> tuple[Setting, int]:
    """Return the setting with the best replicas and shards for its GPUs, and the tokens of its micro-batches.

    share_tokens is one GPU's part of a step. If the fewest replicas can compute all of it as one micro-batch they are
    chosen: every mesh then sends equally many bytes, and the smallest shards are updated the soonest. Otherwise the
    most replicas are chosen that need no more micro-batches than the fewest do. With n micro-batches a step a GPU sends
    n x 8 (S - 1) / S + 8 (R - 1) / (R S) bytes a parameter (docs/ranks.md).

    least_tokens is the longest example. counts holds the numbers of shards that are allowed; None allows any. Raises
    ValueError if the number of GPUs is a multiple of none of them.
    """
    n = setting.n_cards
    allowed = [r for r in range(1, n + 1) if n % r == 0 and (counts is None or n // r in counts)]
    if not allowed:
        wanted = ", ".join(map(str, counts or ()))
        raise ValueError(f"mesh_that_fits: {n} cards, wanted a multiple of one of {wanted} shards")

    def with_tokens(replicas: int) -> tuple[Setting, int]:
        changed = setting.with_replicas(replicas)
        return changed, find_largest_micro_batch(c, changed, available_bytes, limits)

    fewest = with_tokens(allowed[0])
    if fewest[1] >= share_tokens or fewest[1] < least_tokens:
        return fewest
    wanted_tokens = max(math.ceil(share_tokens / math.ceil(share_tokens / fewest[1])), least_tokens)
    found = map(with_tokens, reversed(allowed))
    return next((mesh for mesh in found if mesh[1] >= wanted_tokens), fewest)


# ---- savings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saving:
    """A change of a setting that saves memory."""

    field: str  # of Setting
    value: str | bool
    flags: str


SAVINGS = (  # the cheapest in speed and mathematics first
    Saving("states", "8bit", "--optimizer-states 8bit"),
    Saving("states", "bf16", "--optimizer-states bf16"),
    Saving("recompute", "cheap", "--recompute cheap"),
    Saving("recompute", "block", "--recompute block"),
    Saving("master", "stochastic", "--master-weights stochastic"),
    Saving("offload", True, "--offload-optimizer"),
    Saving("in_backward", True, "--optimizer-in-backward --grad-clip 0"),
)


@dataclass(frozen=True)
class Fit:
    """A way to fit: the flags that change the setting, the changed setting, and the micro-batch that then fits."""

    flags: tuple[str, ...]
    setting: Setting
    tokens: int
    memory: Memory


def apply_savings(setting: Setting, savings: Iterable[Saving]) -> Setting:
    """Return the setting with these changes."""
    changes: dict = {saving.field: saving.value for saving in savings}
    return replace(setting, **changes)


def find_allowed_savings(setting: Setting) -> list[Saving]:
    """Return the changes of a setting that a run would take, also those that save memory beside others alone.

    --optimizer-in-backward is for one GPU only. --offload-optimizer is not for adapters, whose states are small.
    """
    refused = set()
    if setting.n_cards > 1:
        refused.add("in_backward")
    if setting.adapter is not None:
        refused.add("offload")
    return [s for s in SAVINGS if s.field not in refused and getattr(setting, s.field) != s.value]


def find_cheapest_fits(
    c: ModelConfig, setting: Setting, available_bytes: int, limits: Limits, *, tokens: int, least_tokens: int
) -> list[Fit]:
    """Return the sets of changes that fit the available memory, the cheapest first, none with a needless change.

    Micro-batches of `tokens` are wanted. The cheapest change is to have fewer tokens, but at least least_tokens. Each
    of SAVINGS costs more than all before it together. Where memory is left, a micro-batch grows to what the limits
    allow.
    Without limits.step_tokens --optimizer-in-backward is not proposed.
    """
    step_tokens = limits.step_tokens
    price = {saving: 2 << i for i, saving in enumerate(SAVINGS)}
    allowed = find_allowed_savings(setting)
    groups = [[s for s in allowed if s.field == name] for name in dict.fromkeys(s.field for s in allowed)]
    found: list[tuple[int, set[str], Fit]] = []
    for picked in itertools.product(*([None, *group] for group in groups)):
        taken = [saving for saving in picked if saving]
        changed = apply_savings(setting, taken)
        if changed.in_backward and changed.offload:
            continue
        fitting = find_largest_micro_batch(c, changed, available_bytes, limits)
        if fitting < (step_tokens if changed.in_backward and step_tokens else least_tokens):
            continue
        flags, cost = [saving.flags for saving in taken], sum(price[saving] for saving in taken)
        names = set(flags)
        if fitting < tokens:
            flags.insert(0, f"--micro-batch-tokens {fitting}")
            names.add("smaller")
            cost += 1
        found.append((cost, names, Fit(tuple(flags), changed, fitting, memory(c, changed, limits.batch(fitting)))))
    return drop_needless(found)


def drop_needless(found: list[tuple[int, set[str], Fit]]) -> list[Fit]:
    """Return the fits by their cost, without those whose changes include all changes of a cheaper one."""
    fits: list[Fit] = []
    kept: list[set[str]] = []
    for _, names, fit in sorted(found, key=lambda f: f[0]):
        if not any(earlier <= names for earlier in kept):
            fits.append(fit)
            kept.append(names)
    return fits


def find_least_bytes(c: ModelConfig, setting: Setting, tokens: int) -> int:
    """Return the fewest bytes that any setting takes with steps of one micro-batch of `tokens`, which all have a loss.

    All state is in the host's memory, but an adapter's. Only a model of few bytes takes less with states on the GPU.
    """
    least = replace(setting, states="8bit", recompute="block", master="stochastic", in_backward=False)
    least = replace(least, offload=setting.adapter is None)
    return memory(c, least, BatchShape(tokens, tokens, one_micro_batch=True)).total


def find_least_bytes_of_adapters(c: ModelConfig, setting: Setting, tokens: int) -> dict[str, int]:
    """Return what find_least_bytes() returns with each kind of --adapter, of the default rank, in place of none."""
    kinds = {"lora": AdapterConfig(), "qlora": AdapterConfig(nf4_base=True)}
    return {name: find_least_bytes(c, replace(setting, adapter=adapter), tokens) for name, adapter in kinds.items()}

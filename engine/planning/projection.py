"""How long a run takes and what it costs: a setting's micro-batches, bytes, seconds and dollars, and what else fits."""

from dataclasses import dataclass, replace

from engine.base.errors import UsageError
from engine.data.batches import count_steps_per_epoch
from engine.model.config import ModelConfig
from engine.planning.cards import GIB, Card, Rates, find_rates
from engine.planning.fitting import (
    GOOD_TOKENS,
    MOST_TOKENS,
    Limits,
    find_8bit_shard_counts,
    find_cheapest_fits,
    find_largest_micro_batch,
    find_mesh_that_fits,
    resolve_recompute,
    resolve_states,
)
from engine.planning.memory import Memory, memory
from engine.planning.setting import Recipe, Setting
from engine.planning.step_time import (
    COMPUTING,
    Traffic,
    Work,
    block_seconds,
    crossing_bytes,
    flops_per_token,
    step_seconds,
    step_traffic,
    update_seconds,
)
from engine.planning.weights import state_bytes
from engine.planning.workload import Cut, Mix, cut_into_micro_batches


@dataclass(frozen=True)
class Projection:
    """Speed and cost of a whole fine-tune."""

    work: Work  # of a step on each GPU
    seconds: dict[str, float]  # of a step, by what bounds it
    block_s: tuple[float, float]  # of a block's forward and backward in a micro-batch
    traffic: Traffic  # that each GPU sends
    tokens_per_s: float  # logical, of all GPUs
    mfu: float  # flops_per_token() of computed tokens / peak
    steps: int
    total_s: float
    dollars: float | None

    @property
    def communication_bytes(self) -> int:
        """Return the bytes that each GPU sends in a step."""
        return sum(self.traffic.step_bytes(self.work.micro_batches).values())

    @property
    def communication_s(self) -> float:
        """Return the seconds of a step's communication. seconds["communication"] is the part that is not hidden."""
        return sum(self.traffic.seconds(self.work.micro_batches).values())

    @property
    def not_hidden_seconds(self) -> dict[str, float]:
        """Return the seconds of a step that computing waits for communication, by where it waits."""
        return self.traffic.not_hidden_seconds(self.work.micro_batches, *self.block_s)


@dataclass(frozen=True)
class Outcome:
    """The micro-batches, bytes, speed and cost of a run in one setting."""

    setting: Setting
    cut: Cut
    memory: Memory
    projection: Projection
    flags: tuple[str, ...] = ()  # that change the run's own setting into this one


@dataclass(frozen=True)
class Estimate:
    """Everything that engine.estimate prints of a run."""

    recipe: Recipe
    model: ModelConfig
    card: Card
    rates: Rates
    mix: Mix
    available_bytes: int  # on one GPU
    outcome: Outcome
    alternatives: tuple[Outcome, ...]  # that fit where the run's own setting does not

    @property
    def fits(self) -> bool:
        """Return whether the run's own setting fits the GPU's memory."""
        return self.outcome.memory.total <= self.available_bytes


def project(
    c: ModelConfig, card: Card, speed: Rates, mix: Mix, cut: Cut, recipe: Recipe, setting: Setting
) -> Projection:
    """Return the speed and cost of a run whose steps are cut into these micro-batches, at the GPU's rates."""
    cards, state = setting.n_cards, state_bytes(c, setting)
    tokens = min(mix.logical, mix.own + mix.prefix * cut.micro_batches)
    work = Work(tokens, mix.loss_rows, mix.pairs, mix.query_pairs, cut.micro_batches)
    sent = step_traffic(c, card, setting)
    seconds = step_seconds(
        c, card, speed, work, setting,
        update_s=update_seconds(card, speed, state, setting),
        offload_bytes=crossing_bytes(state, setting), traffic=sent,
    )  # fmt: skip
    blocks = block_seconds(c, work, setting, sum(seconds[kind] for kind in COMPUTING))
    per_step = min(recipe.global_batch_size, mix.examples)
    steps = recipe.epochs * count_steps_per_epoch(mix.examples, recipe.global_batch_size)
    steps = min(steps, recipe.max_steps or steps)
    total_s = seconds["total"] * min(steps, recipe.epochs * mix.examples / per_step)  # an epoch's last step is smaller
    rate = cards * mix.logical / seconds["total"]
    dollars = None if card.price_per_hour is None else total_s / 3600 * cards * card.price_per_hour
    mfu = flops_per_token(c, setting.adapter) * tokens / seconds["total"] / (1e12 * card.peak_tflops)
    return Projection(work, seconds, blocks, sent, rate, mfu, steps, total_s, dollars)


def choose_mesh(
    c: ModelConfig, setting: Setting, recipe: Recipe, available_bytes: int, limits: Limits, share_tokens: int
) -> Setting:
    """Return the setting with the replicas that --replicas asks for, or those that find_mesh_that_fits() chooses.

    Raises UsageError where shards would cut blocks of 8-bit states.
    """
    n = recipe.n_cards
    counts = find_8bit_shard_counts(c, adapter=setting.adapter) if setting.states == "8bit" and n > 1 else None
    if n > 1 and recipe.replicas is None:
        least = min(recipe.max_length, limits.most_tokens)
        return find_mesh_that_fits(
            c, setting, available_bytes, limits, share_tokens=share_tokens, least_tokens=least, counts=counts
        )[0]
    if counts and setting.shards not in counts:
        wanted = " or ".join(str(n // count) for count in reversed(counts) if n % count == 0)
        raise UsageError(
            f"--optimizer-states 8bit over {setting.shards} shards would cut a block of 256 elements; wanted "
            f"--replicas {wanted}, or other states"
        )
    return setting


def estimate_run(c: ModelConfig, card: Card, mix: Mix, recipe: Recipe, setting: Setting) -> Estimate:
    """Return the memory, time and cost of a run. If it does not fit, also return those of the settings that fit.

    Where the recipe asks for no number of replicas, find_mesh_that_fits() chooses one.
    """
    available_bytes, speed = int(card.memory_gib * GIB), find_rates(card)
    whole = cut_into_micro_batches(mix, 2**40, recipe.micro_batch_size).largest  # in as few micro-batches as possible
    step_tokens = whole.tokens if whole.one_micro_batch else None
    most = min(recipe.micro_batch_tokens or MOST_TOKENS, step_tokens or MOST_TOKENS)
    limits = Limits(most, step_tokens, mix.loss_share)
    setting = resolve_states(
        c, setting, available_bytes, limits, least_tokens=min(recipe.max_length, most), replicas=recipe.replicas,
        update_s=lambda way: update_seconds(card, speed, state_bytes(c, way), way),
    )  # fmt: skip
    setting = choose_mesh(c, setting, recipe, available_bytes, limits, whole.tokens)

    def outcome(most_tokens: int, setting: Setting, flags: tuple[str, ...] = ()) -> Outcome:
        cut = cut_into_micro_batches(mix, most_tokens, recipe.micro_batch_size)
        projection = project(c, card, speed, mix, cut, recipe, setting)
        return Outcome(setting, cut, memory(c, setting, cut.largest), projection, flags)

    fitting = find_largest_micro_batch(c, setting, available_bytes, limits)
    setting, fitting = resolve_recompute(c, setting, available_bytes, limits, share_tokens=whole.tokens, tokens=fitting)
    found = outcome(recipe.micro_batch_tokens or max(fitting, recipe.max_length), setting)  # what fits, or the least
    estimate = Estimate(recipe, c, card, speed, mix, available_bytes, found, ())
    if estimate.fits:
        return estimate
    wish = min(most, recipe.micro_batch_tokens or GOOD_TOKENS)
    ways = find_cheapest_fits(c, setting, available_bytes, limits, tokens=wish, least_tokens=recipe.max_length)
    if recipe.n_cards > 1:
        counts = find_8bit_shard_counts(c, adapter=setting.adapter)
        ways = [way for way in ways if way.setting.states != "8bit" or way.setting.shards in counts]
    return replace(estimate, alternatives=tuple(outcome(way.tokens, way.setting, way.flags) for way in ways))

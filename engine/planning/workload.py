"""What a run trains on, in numbers: the tokens of a step, and how a step is cut into micro-batches.

The numbers come from a tokenised dataset, or from the lengths of 9,229 of Alpaca's rows.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.base.errors import UsageError
from engine.data.batches import permute_examples
from engine.data.dataset import Dataset
from engine.data.packing import find_shared_prefixes
from engine.planning.memory import BatchShape
from engine.planning.setting import Recipe
from kernels.measure.alpaca import ALPACA_ROWS, alpaca_lengths

SAMPLED_STEPS = 32  # of a dataset


@dataclass(frozen=True)
class Mix:
    """A dataset in numbers. They are those of a mean step, except for `largest`, and of one GPU's share of a step."""

    what: str  # in words
    examples: int
    per_step: int  # examples
    logical: float  # tokens that the examples hold
    own: float  # tokens that no other example shares
    prefix: float  # shared tokens, each counted once; every micro-batch computes them
    loss_rows: float  # tokens whose next token has a loss
    pairs: float  # of a query and a key that it sees
    query_pairs: float  # pairs whose query has a loss
    largest: float  # own tokens of the largest step

    @property
    def loss_share(self) -> float:
        """Return the rows with a loss per computed token, of a step that is one micro-batch."""
        return min(1.0, self.loss_rows / (self.own + self.prefix))


def step_numbers(
    lengths: np.ndarray, loss: np.ndarray, groups: Sequence[tuple[int, Sequence[int] | np.ndarray]]
) -> np.ndarray:
    """Return (logical, own, prefix, loss rows, pairs, query pairs) of the examples of a step, as Mix names them.

    lengths and loss (N,) count the tokens of each example and those with a loss, which are its last ones. groups holds
    (n_shared, examples), the examples that share their first n_shared tokens. An example's query i (from 0) sees i + 1
    keys, wherever they stand in the micro-batch.
    """
    shared = np.zeros(len(lengths))
    for n, members in groups:
        shared[members] = n
    prefixes = np.array([float(n) for n, _ in groups])
    pairs = lengths * (lengths + 1) / 2 - shared * (shared + 1) / 2
    # The sum of i over the positions i that have a loss, an example's last ones: row i - 1 predicts position i.
    query_pairs = loss * (2 * lengths - loss - 1) / 2
    own = (lengths - shared).sum()
    return np.array([
        lengths.sum(), own, prefixes.sum(), min(loss.sum(), own + prefixes.sum()),
        pairs.sum() + (prefixes * (prefixes + 1) / 2).sum(), query_pairs.sum(),
    ])  # fmt: skip


def examples_per_card(recipe: Recipe, n_examples: int) -> int:
    """Return the examples of a step that one GPU trains on. Raises UsageError where a GPU would have none."""
    cards = recipe.n_cards
    if cards > max(1, n_examples):
        raise UsageError(f"{n_examples} examples are too few for --gpus {cards}; pass {max(1, n_examples)} or fewer")
    return -(-min(recipe.global_batch_size, n_examples) // cards)


def mean_mix(what: str, n_examples: int, steps: np.ndarray, recipe: Recipe) -> Mix:
    """Return the Mix of a dataset from step_numbers() of some of its steps, (steps, 6)."""
    logical, own, prefix, loss_rows, pairs, query_pairs = map(float, steps.mean(0))
    return Mix(
        what, n_examples, examples_per_card(recipe, n_examples), logical, own, prefix, loss_rows, pairs, query_pairs,
        largest=float(steps[:, 1].max()),
    )  # fmt: skip


def alpaca_order(max_length: int, train_on_prompt: bool, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each Alpaca row's tokens and loss tokens, and the order of an epoch of the rows that have loss tokens."""
    found = alpaca_lengths()
    lengths = np.minimum(found.prompt + found.response, max_length).astype(float)
    loss = lengths - (1 if train_on_prompt else np.minimum(found.prompt, lengths))
    order = permute_examples(len(lengths), seed, 0)
    return lengths, loss, order[loss[order] > 0]


@functools.cache
def alpaca_steps(max_length: int, train_on_prompt: bool, seed: int, share_prefix: bool, size: int) -> np.ndarray:
    """Return step_numbers() of all steps of `size` examples that Alpaca's rows give, (steps, 6). Read-only."""
    found, steps = alpaca_lengths(), []
    lengths, loss, order = alpaca_order(max_length, train_on_prompt, seed)
    for first in range(0, len(order) - size + 1, size):
        step = order[first : first + size]
        templates = [(n, np.flatnonzero(found.has_input[step] == kind)) for kind, n in enumerate(found.shared_prefix)]
        groups = [(min(n, max_length), g) for n, g in templates if len(g) > 1 and share_prefix]
        steps.append(step_numbers(lengths[step], loss[step], groups))
    numbers = np.array(steps)
    numbers.flags.writeable = False
    return numbers


def alpaca_mix(recipe: Recipe, rows: int = ALPACA_ROWS, what: str = "") -> Mix:
    """Return the Mix of Alpaca, or of another dataset with this number of rows and Alpaca's lengths."""
    lengths, _, order = alpaca_order(recipe.max_length, recipe.train_on_prompt, recipe.seed)
    if not len(order):
        raise UsageError(f"--max-length {recipe.max_length} leaves no row a token of its response")
    size = examples_per_card(recipe, len(order))
    steps = alpaca_steps(recipe.max_length, recipe.train_on_prompt, recipe.seed, recipe.share_prefix, size)
    scale = min(1, rows / recipe.n_cards / size)  # under 1 where a step holds more rows than there are
    kept_rows = round(rows * len(order) / len(lengths))
    return mean_mix(what or f"Alpaca, {kept_rows:,} rows", kept_rows, steps * scale, recipe)


def dataset_mix(train: Dataset, recipe: Recipe) -> Mix:
    """Return the Mix of a tokenised dataset, from the first steps of an epoch."""
    n, size = len(train), examples_per_card(recipe, len(train))
    order, steps = permute_examples(n, recipe.seed, 0), []
    for first in range(0, n - size + 1, size)[: SAMPLED_STEPS * recipe.n_cards]:
        step = order[first : first + size]
        lengths = train.lengths()[step].astype(float)
        loss = train.loss_tokens()[step].astype(float)
        groups = find_shared_prefixes([train.tokens_of(i) for i in step]) if recipe.share_prefix else []
        steps.append(step_numbers(lengths, loss, groups))
    return mean_mix(f"{n:,} examples of --data", n, np.array(steps), recipe)


# ---- micro-batches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How a mean step is cut into micro-batches."""

    micro_batches: int
    largest: BatchShape  # of all micro-batches


def cut_into_micro_batches(mix: Mix, most_tokens: int, most_examples: int | None = None) -> Cut:
    """Return the cut of a step into the fewest micro-batches that keep to both limits.

    Their tokens are evened out. Each micro-batch holds every shared prefix.
    """
    prefix = min(mix.prefix, most_tokens / 2)
    by_examples = math.ceil(mix.per_step / (most_examples or mix.per_step))
    n, n_largest = (max(by_examples, math.ceil(own / (most_tokens - prefix))) for own in (mix.own, mix.largest))
    spare = 1.02 if n_largest > 1 else 1.0  # what best-fit cannot even out
    tokens = min(most_tokens, math.ceil(spare * (mix.largest / n_largest + prefix)))
    return Cut(n, BatchShape(tokens, math.ceil(tokens * mix.loss_share), one_micro_batch=n_largest == 1))

"""What is trained on, in numbers: the tokens of a step, those that are computed, those with loss, and how micro-batches
cut it. Of a real file under a tokenizer, or of Alpaca by the lengths of 9,229 of its rows."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.base.errors import CriaError, UsageError
from engine.data import dataset as data
from engine.data.batches import permute_examples
from engine.data.prefixes import find_shared_prefixes
from engine.data.rows import read_rows
from engine.model.config import ModelConfig
from engine.planning.cards import cards_of
from engine.text.tokenizer import find_tokenizer
from kernels.measure.alpaca import ALPACA_ROWS, alpaca_lengths

ROOT = Path(__file__).parents[2]
SEED_TASKS = ROOT / "data_gen" / "seed_tasks.jsonl"
SAMPLED_STEPS = 32  # of a file's


@dataclass(frozen=True)
class Mix:
    """A dataset in numbers: a mean step's, but for `largest`. Of several cards, what one of them has of a step."""

    what: str
    examples: int
    per_step: int  # examples
    logical: float  # tokens that the examples hold
    own: float  # that no example shares
    prefix: float  # shared ones, each once: what every micro-batch holds again
    loss_rows: float
    pairs: float  # of a query and a key that it sees
    query_pairs: float  # of these, of queries with loss
    largest: float  # own tokens of the largest step

    @property
    def loss_share(self) -> float:
        """Rows with loss a computed token, of a whole step."""
        return min(1.0, self.loss_rows / (self.own + self.prefix))


def step_of(lengths, loss, groups):
    """(logical, own, prefix, loss rows, pairs, query pairs) of the examples of a step.

    lengths, loss: (N,) tokens, and those with loss, which are the last ones. groups: [(n_shared, [example, ...])]. An
    example's query i (from 0) sees i + 1 keys, wherever they stand.
    """
    shared = np.zeros(len(lengths))
    for n, members in groups:
        shared[members] = n
    prefixes = np.array([n for n, _ in groups if n] or [0.0])
    pairs = lengths * (lengths + 1) / 2 - shared * (shared + 1) / 2
    asking = loss * (2 * lengths - loss - 1) / 2  # sum of i over the loss last positions: row i - 1 predicts position i
    own = (lengths - shared).sum()
    return np.array([
        lengths.sum(), own, prefixes.sum(), min(loss.sum(), own + prefixes.sum()),
        pairs.sum() + (prefixes * (prefixes + 1) / 2).sum(), asking.sum(),
    ])  # fmt: skip


def share_of(config, n_examples: int) -> int:
    """Examples of a step on each card, of a dataset of so many. Raises UsageError where a card would have none."""
    cards = cards_of(config)
    if cards > max(1, n_examples):
        raise UsageError(f"{n_examples} examples are too few for --gpus {cards}; pass {max(1, n_examples)} or fewer")
    return -(-min(config.global_batch_size, n_examples) // cards)


def mix_of(what, n_examples, steps, config):
    means = (float(x) for x in np.mean(steps, axis=0))
    return Mix(what, n_examples, share_of(config, n_examples), *means, largest=float(max(s[1] for s in steps)))


def alpaca_mix(config, rows: int = ALPACA_ROWS, what: str = "") -> Mix:
    """Alpaca's, or another dataset's of so many rows, by the lengths of 9,229 of Alpaca's."""
    alpaca = alpaca_lengths()
    lengths = np.minimum(alpaca.prompt + alpaca.response, config.max_length).astype(float)
    loss = lengths - (1 if config.train_on_prompt else np.minimum(alpaca.prompt, lengths))
    order = permute_examples(len(lengths), config.seed, 0)
    order = order[loss[order] > 0]
    if not len(order):
        raise UsageError(f"--max-length {config.max_length} leaves no row a token of its response")
    steps, size = [], share_of(config, len(order))
    for first in range(0, len(order) - size + 1, size):
        step = order[first : first + size]
        groups = [(n, np.flatnonzero(alpaca.has_input[step] == kind)) for kind, n in enumerate(alpaca.shared_prefix)]
        groups = [(min(n, config.max_length), g) for n, g in groups if len(g) > 1 and config.share_prefix]
        steps.append(step_of(lengths[step], loss[step], groups))
    steps = np.array(steps) * min(1, rows / cards_of(config) / size)  # fewer rows than a step holds
    kept_rows = round(rows * len(order) / len(lengths))
    return mix_of(what or f"Alpaca, {kept_rows:,} rows", kept_rows, steps, config)


def file_mix(config, c: ModelConfig, path) -> Mix:
    """Of the files in --data: under the model's tokenizer, or with Alpaca's lengths where none is at hand."""
    paths = [SEED_TASKS if name == "seed-tasks" else Path(name) for name in config.data]
    rows, _ = read_rows(paths, config.skip_bad_rows)
    try:
        tokenizer = find_tokenizer(c, config.tokenizer, path)
    except CriaError as error:
        if config.tokenizer:
            raise
        return alpaca_mix(
            config, len(rows), f"{len(rows):,} rows, of Alpaca's lengths for want of a tokenizer ({error})"
        )
    return dataset_mix(
        data.tokenize(rows, tokenizer, config.prompt_style, config.max_length, config.train_on_prompt), config
    )


def dataset_mix(train: data.Dataset, config) -> Mix:
    """Of tokenised examples, by the first steps of an epoch."""
    n, size = len(train), share_of(config, len(train))
    order, steps = permute_examples(n, config.seed, 0), []
    for first in range(0, n - size + 1, size)[: SAMPLED_STEPS * cards_of(config)]:
        step = order[first : first + size]
        lengths = train.lengths()[step].astype(float)
        loss = train.loss_tokens()[step].astype(float)
        groups = find_shared_prefixes([train.tokens_of(i) for i in step]) if config.share_prefix else []
        steps.append(step_of(lengths, loss, groups))
    return mix_of(f"{n:,} examples of --data", n, steps, config)


# ---- micro-batches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a mean step is cut, and the largest micro-batch."""

    micro_batches: int
    tokens: int  # of the largest micro-batch
    loss_rows: int  # of it
    one_micro_batch: bool  # no step has a second


def cut(mix: Mix, budget: int, most_examples: int | None = None) -> Plan:
    """Micro-batches of at most budget tokens and most_examples, as few as do, evened out. Each holds every prefix."""
    prefix = min(mix.prefix, budget / 2)
    by_examples = math.ceil(mix.per_step / (most_examples or mix.per_step))
    n, n_largest = (max(by_examples, math.ceil(own / (budget - prefix))) for own in (mix.own, mix.largest))
    spare = 1.02 if n_largest > 1 else 1.0  # what best-fit cannot even out
    tokens = min(budget, math.ceil(spare * (mix.largest / n_largest + prefix)))
    return Plan(n, tokens, math.ceil(tokens * mix.loss_share), n_largest == 1)

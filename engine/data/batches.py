"""The micro-batches of each step of a run.

The order of examples depends only on seed and epoch. So step N of a resumed run has the same examples, and no state of
a sampler is saved. Packing divides the examples of a step and never moves one to another step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.dataset import Dataset
from engine.data.packing import Packing, make_micro_batches


def permute_examples(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the order of n examples in an epoch, counted from 0. It depends on nothing but the arguments."""
    return np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)


def count_steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Return how many steps take each of n examples once. The last step may have fewer than global_batch_size."""
    return -(-n // global_batch_size)


@dataclass(frozen=True)
class Order:
    """The order in which the steps of a run take their examples."""

    n_examples: int
    global_batch_size: int
    seed: int
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return count_steps_per_epoch(self.n_examples, self.global_batch_size)

    def examples_of(self, step: int) -> np.ndarray:
        """Return the examples of a step, counted from 1."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        first = index * self.global_batch_size
        return permute_examples(self.n_examples, self.seed, epoch, self.shuffle)[first : first + self.global_batch_size]


@dataclass(frozen=True)
class StepBatch:
    """One step: the micro-batches of this rank, and the numbers of the global batch, which all ranks share."""

    micro_batches: Sequence[Any]  # MicroBatch, then DeviceMicroBatch once it is copied
    examples: np.ndarray  # (N,) numbers of the global batch's examples, in order
    n_tokens: int  # of the global batch: the sum of its examples' lengths
    n_loss_tokens: int  # of the global batch
    n_computed_tokens: int  # of this rank's micro-batches: shared prefixes once, padding included


class Batches:
    """One rank's micro-batches of every step. They are weighted so that the losses of all ranks add up to the step's.

    packing may be replaced during a run, and then holds for the steps made after that. mean_of_means: a step's loss is
    the mean of the micro-batches' means, as in the trainer of transformers in 2023, not the mean over the loss tokens
    of the global batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        packing: Packing,
        mean_of_means: bool = False,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.dataset, self.order, self.packing = dataset, order, packing
        self.mean_of_means, self.ranks, self.rank = mean_of_means, ranks, rank

    def make_step(self, step: int) -> StepBatch:
        """Make the micro-batches of a step, counted from 1."""
        numbers = self.order.examples_of(step)
        examples = self.dataset.get_examples(numbers)
        n_loss_tokens = sum(int(example.is_target.sum()) for example in examples)
        micro_batches = make_micro_batches(
            examples, self.packing, scale=None if self.mean_of_means else 1 / n_loss_tokens,
            mean_of_means=self.mean_of_means, ranks=self.ranks, rank=self.rank,
        )  # fmt: skip
        n_tokens = sum(len(example.tokens) for example in examples)
        n_computed_tokens = sum(len(batch.tokens) for batch in micro_batches)
        return StepBatch(micro_batches, numbers, n_tokens, n_loss_tokens, n_computed_tokens)

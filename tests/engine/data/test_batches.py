"""The micro-batches of a step: what their loss is divided by, and what is counted."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.data.batches import Batches
from engine.data.packing import Packing
from tests.helpers.datasets import dataset

ROWS = [[*range(10, 20), 20], [10, 11, 12, 13]]


@pytest.mark.parametrize("mean_of_means", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_micro_batch_is_divided_as_the_norm_says(mean_of_means, rank):
    """Of two micro-batches, one a rank, the larger on the first."""
    examples, order = dataset(ROWS), SimpleNamespace(examples_of=lambda step: np.arange(2) if step == 3 else [])
    made = Batches(examples, order, Packing(11), mean_of_means, ranks=2, rank=rank).make_step(3)
    of_each = [int(example.is_target.sum()) for example in examples.get_examples(np.arange(2))]
    assert (made.n_tokens, made.n_loss_tokens, made.examples.tolist()) == (15, sum(of_each), [0, 1])
    (batch,) = made.micro_batches
    assert made.n_computed_tokens == len(batch.tokens) == len(ROWS[rank]) and of_each[0] > of_each[1]
    assert float(batch.weights.sum()) == pytest.approx(1 / 2 if mean_of_means else of_each[rank] / sum(of_each))

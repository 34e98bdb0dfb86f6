"""Small datasets of ids, for tests of packing, steps and memory, and a packed micro-batch of random ones."""

import numpy as np
import torch

from engine.data.dataset import Dataset
from engine.model.batch import MicroBatch

# Of packed_micro_batch(): a prefix with three documents behind it, one of one token, and an empty one.
DOCUMENTS = [[0, 9, 0, 0], [9, 24, 0, 9], [24, 25, 0, 9], [25, 58, 0, 0], [58, 58, 0, 0], [60, 70, 0, 0]]


def dataset(rows, targets=None):
    """Rows of ids; all but the first are targets unless said."""
    targets = targets or [[False] + [True] * (len(row) - 1) for row in rows]
    ends = np.cumsum([len(row) for row in rows])
    return Dataset(
        np.concatenate(rows).astype(np.int32), np.concatenate(targets).astype(bool), ends - [len(row) for row in rows],
        ends, tuple(map(str, range(len(rows)))), {},
    )  # fmt: skip


def packed_micro_batch(n=70, vocab_size=301):
    """Return a micro-batch of random tokens in DOCUMENTS, half of which are targets, some of them of one row."""
    documents = torch.tensor(DOCUMENTS, dtype=torch.int32)
    positions = torch.zeros(n, dtype=torch.int64)
    for start, end, prefix_start, prefix_end in DOCUMENTS:
        positions[start:end] = torch.arange(end - start) + prefix_end - prefix_start
    loss_rows = torch.cat([torch.arange(start + (end - start) // 2, end) for start, end, *_ in DOCUMENTS])
    loss_rows = torch.cat((loss_rows, loss_rows[3:5], loss_rows[4:5])).sort().values  # some predict several targets
    return MicroBatch(
        tokens=torch.randint(vocab_size, (n,)), positions=positions, documents=documents, loss_rows=loss_rows,
        targets=torch.randint(vocab_size, loss_rows.shape), weights=torch.rand(loss_rows.shape),
    )  # fmt: skip

"""Small datasets of ids, for tests of packing, steps and memory."""

import numpy as np

from engine.data.dataset import Dataset


def dataset(rows, targets=None):
    """Rows of ids; all but the first are targets unless said."""
    targets = targets or [[False] + [True] * (len(row) - 1) for row in rows]
    ends = np.cumsum([len(row) for row in rows])
    return Dataset(
        np.concatenate(rows).astype(np.int32), np.concatenate(targets).astype(bool), ends - [len(row) for row in rows],
        ends, tuple(map(str, range(len(rows)))), {},
    )  # fmt: skip

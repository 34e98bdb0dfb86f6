"""Rows for measurements: random tokens with the lengths and the shared prefixes of Alpaca's rows."""

import numpy as np

from engine.data.dataset import Dataset
from engine.text.templates import Row
from kernels.measure.alpaca import alpaca_lengths


def row_as_dict(row: Row) -> dict:
    """Return a row's three fields of Alpaca as a dictionary."""
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


def random_alpaca_rows(
    drawn: np.ndarray, vocab_size: int, max_length: int, generator: np.random.Generator, stems: list[np.ndarray]
) -> Dataset:
    """Return one row of random ids for each drawn index into alpaca_lengths, cut at max_length tokens.

    A row begins with its template's stem, which rows share. The tokens of the response are targets.
    """
    alpaca = alpaca_lengths()
    tokens, is_target = [], []
    for i in drawn:
        stem, n = stems[alpaca.has_input[i]], min(max_length, alpaca.prompt[i] + alpaca.response[i])
        tokens.append(np.concatenate([stem, generator.integers(3, vocab_size, n - len(stem))]))
        is_target.append(np.arange(n) >= alpaca.prompt[i])
    ends = np.cumsum([len(row) for row in tokens])
    begins = ends - [len(row) for row in tokens]
    flat = np.concatenate(tokens).astype(np.int32), np.concatenate(is_target)
    return Dataset(*flat, begins, ends, [str(i) for i in drawn], {})

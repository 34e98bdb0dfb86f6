"""The lengths of Alpaca's rows, which benchmarks and estimates use in place of the dataset itself.

alpaca_lengths.json holds the lengths of 9,229 of the 52,002 rows in LLaMA tokens, under Stanford's two templates.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

LENGTHS = Path(__file__).with_name("alpaca_lengths.json")
ALPACA_ROWS = 52_002  # of the whole dataset


@dataclass(frozen=True)
class AlpacaLengths:
    """Lengths in tokens, one entry a row. The arrays are read-only, because every caller shares them."""

    prompt: np.ndarray  # (N,) int64, with BOS
    response: np.ndarray  # (N,) int64, with EOS
    has_input: np.ndarray  # (N,) int64, 0 or 1: which template the row uses
    shared_prefix: tuple[int, int]  # tokens that all rows of a template begin with, indexed by has_input

    def __len__(self) -> int:
        return len(self.prompt)


@cache
def alpaca_lengths() -> AlpacaLengths:
    """Return the lengths in alpaca_lengths.json, which is read once a process."""
    table = json.loads(LENGTHS.read_text())
    prompt, response, has_input = (
        np.array(list(table[name]), np.int64) for name in ("prompt", "response", "has_input")
    )
    for column in (prompt, response, has_input):
        column.flags.writeable = False
    shared_prefix = table["shared_prefix"]["no_input"], table["shared_prefix"]["input"]
    return AlpacaLengths(prompt, response, has_input, shared_prefix)

"""Packed documents for benchmarks of attention: rows of Alpaca's lengths, and documents of equal length.

A document is (start, end, prefix start, prefix end), as kernels.attention takes it.
"""

import math
import random
from typing import NamedTuple

from kernels.measure.alpaca import alpaca_lengths

MAX_LENGTH = 512  # tokens the recipe cuts a row at

Document = tuple[int, int, int, int]


class Row(NamedTuple):
    """The lengths in tokens of one row."""

    prompt: int
    response: int
    prefix: int  # leading tokens of the prompt that all rows of its template share


def draw_alpaca_rows(n_tokens: int, seed: int = 0) -> list[Row]:
    """Return random rows of Alpaca that hold n_tokens tokens together; the last one is cut."""
    alpaca, rng, rows, total = alpaca_lengths(), random.Random(seed), [], 0
    while total < n_tokens:
        i = rng.randrange(len(alpaca))
        prompt = min(int(alpaca.prompt[i]), MAX_LENGTH, n_tokens - total)
        response = min(int(alpaca.response[i]), MAX_LENGTH - prompt, n_tokens - total - prompt)
        rows.append(Row(prompt, response, min(alpaca.shared_prefix[alpaca.has_input[i]], prompt)))
        total += prompt + response
    return rows


def pack_whole(rows: list[Row]) -> tuple[list[Document], int]:
    """Return the rows as documents back to back, and their number of tokens."""
    documents: list[Document] = []
    start = 0
    for row in rows:
        documents.append((start, start + row.prompt + row.response, 0, 0))
        start = documents[-1][1]
    return documents, start


def pack_with_shared_prefixes(rows: list[Row]) -> tuple[list[Document], int]:
    """Return each prefix once and what each row has beyond it, and the number of tokens, a multiple of 64."""
    bounds: dict[int, tuple[int, int]] = {}
    documents: list[Document] = []
    start = 0
    for prefix in sorted({row.prefix for row in rows}):
        bounds[prefix] = (start, start + prefix)
        documents.append((start, start + prefix, 0, 0))
        start += prefix
    for row in rows:
        length = row.prompt + row.response
        if length > row.prefix:
            documents.append((start, start + length - row.prefix, *bounds[row.prefix]))
            start = documents[-1][1]
    return documents, math.ceil(start / 64) * 64


def pack_equal(length: int, n_tokens: int) -> tuple[list[Document], int]:
    """Return as many documents of one length as fit into n_tokens, and their number of tokens."""
    documents = [(start, start + length, 0, 0) for start in range(0, n_tokens - length + 1, length)]
    return documents, documents[-1][1]

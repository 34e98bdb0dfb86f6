"""Packed documents of Alpaca's lengths."""

import numpy as np
import pytest

from kernels.measure import documents as documents_module
from kernels.measure.alpaca import AlpacaLengths
from kernels.measure.documents import Row, draw_alpaca_rows, pack_equal, pack_whole, pack_with_shared_prefixes


def test_the_length_mix():
    rows = draw_alpaca_rows(8192)
    lengths = [prompt + response for prompt, response, _ in rows]
    assert sum(lengths) == 8192 and max(lengths) <= 512 and len(rows) > 40
    documents, n_rows = pack_whole(rows)
    assert n_rows == 8192 and [end - start for start, end, *_ in documents] == lengths
    documents, n_rows = pack_with_shared_prefixes(rows)
    own = [d for d in documents if d[3] > d[2]]
    assert [e - s + pe - ps for s, e, ps, pe in own] == [
        n for n, (*_, prefix) in zip(lengths, rows, strict=True) if n > prefix
    ]
    assert documents[:2] == [(0, 29, 0, 0), (29, 68, 0, 0)] and n_rows % 64 == 0
    assert 8192 * 0.7 < n_rows < 8192 * 0.8  # a quarter of the tokens is shared


def test_rows_are_cut_at_the_recipes_length_and_where_the_tokens_end(monkeypatch):
    """A prompt first, then what of its answer fits; a prefix is no longer than its prompt."""
    columns = (np.array([values]) for values in (600, 50, 1))
    monkeypatch.setattr(documents_module, "alpaca_lengths", lambda: AlpacaLengths(*columns, (29, 39)))
    assert draw_alpaca_rows(1034) == [Row(512, 0, 39), Row(512, 0, 39), Row(10, 0, 10)]
    columns = (np.array([values]) for values in (500, 50, 0))
    assert draw_alpaca_rows(1017) == [Row(500, 12, 29), Row(500, 5, 29)]


def test_a_seed_draws_its_rows():
    assert draw_alpaca_rows(700) == draw_alpaca_rows(700, seed=0) != draw_alpaca_rows(700, seed=6)
    assert len({row.prefix for row in draw_alpaca_rows(3000)}) == 2


def test_documents_by_hand():
    rows = [Row(5, 4, 3), Row(3, 0, 3), Row(6, 2, 6), Row(4, 1, 3)]
    assert pack_whole(rows) == ([(0, 9, 0, 0), (9, 12, 0, 0), (12, 20, 0, 0), (20, 25, 0, 0)], 25)
    shared = [(0, 3, 0, 0), (3, 9, 0, 0), (9, 15, 0, 3), (15, 17, 3, 9), (17, 19, 0, 3)]
    assert pack_with_shared_prefixes(rows) == (shared, 64)
    assert pack_with_shared_prefixes([Row(64, 0, 64)]) == ([(0, 64, 0, 0)], 64)


@pytest.mark.parametrize(("n", "ends"), [(16, [4, 8, 12, 16]), (19, [4, 8, 12, 16]), (4, [4])])
def test_documents_of_equal_length_fill_the_rows(n, ends):
    assert pack_equal(4, n) == ([(end - 4, end, 0, 0) for end in ends], ends[-1])

"""Rows for measurements: Alpaca's lengths, its templates' stems, its fields."""

import numpy as np

from engine.text.templates import Row
from kernels.measure.alpaca import alpaca_lengths
from scripts.base.rows import random_alpaca_rows, row_as_dict


def test_rows_of_random_tokens_begin_with_their_template_and_are_targets_from_the_response_on():
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [generator.integers(3, 100, n) for n in alpaca.shared_prefix]
    drawn = [np.flatnonzero(alpaca.has_input == kind)[0] for kind in (0, 1)]
    rows = random_alpaca_rows(np.array(drawn), 100, 400, generator, stems)
    for example, i in enumerate(drawn):
        stem, n = stems[alpaca.has_input[i]], min(400, alpaca.prompt[i] + alpaca.response[i])
        assert rows.tokens_of(example)[: len(stem)].tolist() == stem.tolist() and len(rows.tokens_of(example)) == n
        assert np.flatnonzero(rows.is_target_of(example)).tolist() == list(range(alpaca.prompt[i], n))


def test_a_row_keeps_each_of_its_three_fields():
    row = Row("", None, instruction="a", input="b", output="c")
    assert row_as_dict(row) == {"instruction": "a", "input": "b", "output": "c"}


def test_rows_lie_one_behind_the_other():
    """Ids are of the vocabulary without its first three; a row names the one of Alpaca's that it is like."""
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [np.full(n, 7) for n in alpaca.shared_prefix]
    rows = random_alpaca_rows(np.arange(40), 11, 200, generator, stems)
    n = np.minimum(200, alpaca.prompt[:40] + alpaca.response[:40])
    assert rows.ends.tolist() == np.cumsum(n).tolist() and rows.begins.tolist() == [0, *np.cumsum(n)[:-1]]
    assert list(rows.sources) == [str(i) for i in range(40)] and rows.counts == {}
    assert rows.tokens.dtype == np.int32 and len(rows.tokens) == len(rows.is_target) == n.sum()
    free = np.concatenate([rows.tokens_of(i)[alpaca.shared_prefix[alpaca.has_input[i]] :] for i in range(40)])
    assert set(free) == set(range(3, 11))

"""From a step's examples to packed micro-batches that share prefixes."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import packing
from engine.data import Dataset


def dataset(rows, targets=None):
    """Rows of ids; all but the first are targets unless said."""
    targets = targets or [[False] + [True] * (len(row) - 1) for row in rows]
    ends = np.cumsum([len(row) for row in rows])
    return Dataset(
        np.concatenate(rows).astype(np.int32), np.concatenate(targets).astype(bool), ends - [len(row) for row in rows],
        ends, tuple(map(str, range(len(rows)))), {},
    )  # fmt: skip


def arrays(rows):
    return [np.array(row, np.int32) for row in rows]


@st.composite
def families(draw):
    """Rows that begin with one of a few stems, which begin with one another."""
    stems = [[]]
    for _ in range(draw(st.integers(1, 4))):
        stems.append(draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 2), max_size=4)))
    tails = st.lists(st.integers(0, 2), min_size=1, max_size=4)
    return [draw(st.sampled_from(stems)) + draw(tails) for _ in range(draw(st.integers(1, 7)))]


def best_saving(rows):
    """By trying every partition of the rows into groups."""

    def partitions(left):
        if not left:
            yield []
            return
        first, *rest = left
        for n in range(len(rest) + 1):
            for others in itertools.combinations(rest, n):
                for tail in partitions([r for r in rest if r not in others]):
                    yield [[first, *others], *tail]

    def common(group):
        return min(packing.common_length(rows[group[0]], rows[i]) for i in group)

    return max(sum(common(g) * (len(g) - 1) for g in p) for p in partitions(list(range(len(rows)))))


@given(families())
@settings(deadline=None, max_examples=150)
def test_no_grouping_saves_more(rows):
    rows = arrays(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LEAST_SHARED", 1)
        groups = packing.shared_prefixes(rows)
    assert sorted(i for _, group in groups for i in group) == list(range(len(rows)))
    for n_shared, group in groups:
        assert all((rows[i][:n_shared] == rows[group[0]][:n_shared]).all() for i in group)
        assert n_shared == 0 or len(group) > 1
    assert packing.saved(groups) == best_saving(rows)


def test_two_templates_and_a_repeated_question():
    plain, with_input = list(range(100, 130)), list(range(200, 240))
    rows = [[*plain, i, 5] for i in range(6)] + [[*with_input, i] for i in range(5)] + [[7, 8, 9]]
    rows += [[*plain, 0, *range(50)]] * 2
    groups = packing.shared_prefixes(arrays(rows))
    assert sorted((n, len(g)) for n, g in groups) == [(0, 1), (30, 6), (40, 5), (81, 2)]


def test_a_short_prefix_is_not_worth_sharing():
    rows = arrays([[1, *range(10 * i, 10 * i + 9)] for i in range(2, 6)])
    assert packing.shared_prefixes(rows) == [(0, [i]) for i in range(4)]


def test_a_chain_of_prefixes_needs_no_recursion():
    rows = arrays([list(range(1, n)) for n in range(2, 1500)])
    assert sum(len(group) for _, group in packing.shared_prefixes(rows)) == len(rows)


# ---- which rows go together -----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(50, 200), st.none() | st.integers(1, 8),
    st.booleans(), st.booleans(), st.sampled_from((1, 8)),
)  # fmt: skip
@settings(deadline=None)
def test_each_example_is_in_one_micro_batch_within_the_limits(lengths, max_tokens, max_examples, pack, share, align):
    rows = [[i + 1000 if j > 20 else j for j in range(n)] for i, n in enumerate(lengths)]
    max_tokens += 56 % align
    groups = packing.shared_prefixes(arrays(rows)) if share else [(0, [i]) for i in range(len(rows))]
    runs = (packing.pack if pack else packing.in_order)(groups, lengths, max_tokens, max_examples)
    found = np.concatenate(runs).tolist()
    assert sorted(found) == list(range(len(rows))) and (pack or found == sorted(found))
    batches = packing.micro_batches(
        dataset(rows), np.arange(len(rows)), max(max_tokens, 64), max_examples, pack, share, align
    )
    assert sum(int(b.weights.sum()) if b.weights is not None else len(b.targets) for b in batches) == sum(
        lengths
    ) - len(lengths)
    for run, b in zip(runs, batches, strict=False):
        assert len(b.tokens) <= max(max_tokens, 64) and len(b.tokens) % align == 0
        assert len(run) <= (max_examples or len(run))


def test_packing_fills_what_order_leaves_open_and_evens_it_out():
    lengths = [60, 60, 40, 40, 60, 40]
    groups = [(0, [i]) for i in range(6)]
    in_order = packing.in_order(groups, lengths, 100, None)
    packed = packing.pack(groups, lengths, 100, None)
    assert len(in_order) == 4 and [sum(lengths[i] for i in run) for run in packed] == [100, 100, 100]
    packed = packing.pack(groups, [10] * 6, 50, None)
    assert [len(run) for run in packed] == [3, 3]


# ---- laying out -----------------------------------------------------------------------------------------------------


def test_documents_back_to_back_in_their_order():
    rows = [[5, 6, 7], [8, 9]]
    batch = packing.collate(dataset(rows, [[False, False, True], [False, True]]), np.array([1, 0]))
    assert batch.documents.tolist() == [[0, 2, 0, 0], [2, 5, 0, 0]]
    assert batch.tokens.tolist() == [8, 9, 5, 6, 7] and batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.loss_rows.tolist() == [0, 3] and batch.targets.tolist() == [9, 7] and batch.weights is None


def test_a_prefix_stands_once_and_its_documents_go_on_from_it():
    stem = list(range(10, 20))
    rows = [[*stem, 1, 2], [3, 4], [*stem, 5], stem]
    batch = packing.collate(dataset(rows), np.arange(4), share_prefix=True, align=8)
    assert batch.tokens.tolist() == [*stem, 1, 2, 5, 3, 4, 0]
    assert batch.positions.tolist() == [*range(10), 10, 11, 10, 0, 1, 0]
    assert batch.documents.tolist() == [[0, 10, 0, 0], [10, 12, 0, 10], [12, 13, 0, 10], [13, 15, 0, 0]]
    # Three rows weigh the prefix's own targets; its last row predicts how each of two goes on.
    assert batch.loss_rows.tolist() == [*range(9), 9, 9, 10, 13]
    assert batch.targets.tolist() == [*range(11, 20), 1, 5, 2, 4]
    assert batch.weights.tolist() == [3.0] * 9 + [1.0] * 4


def test_weights_carry_the_scale_and_the_mean_of_means():
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    data = dataset(rows)
    (one,) = packing.micro_batches(data, np.arange(3), 100, scale=0.25)
    assert one.weights.tolist() == [0.25] * 6
    batches = packing.micro_batches(data, np.arange(3), 5, packing=False, mean_of_means=True)
    assert [b.weights.tolist() for b in batches] == [pytest.approx([1 / 6] * 3), pytest.approx([1 / 6] * 3)]


def test_the_alpaca_length_mix_at_the_sizes_of_the_7b_plan():
    """Computed over logical tokens with sharing, and the tail's padding, of 128-row steps."""
    figures = json.loads((ROOT / "benchmarks" / "alpaca_lengths.json").read_text())
    generator = np.random.default_rng(0)
    stems = [generator.integers(3, 32000, figures["shared_prefix"][kind]).tolist() for kind in ("no_input", "input")]
    logical = computed = used = 0
    for _ in range(5):
        rows = []
        for i in generator.integers(len(figures["prompt"]), size=128):
            stem = stems[int(figures["has_input"][i])]
            n = min(512, figures["prompt"][i] + figures["response"][i])
            rows.append(stem + generator.integers(3, 32000, n - len(stem)).tolist())
        batches = packing.micro_batches(dataset(rows), np.arange(128), 8320, align=64)
        assert len(batches) == 2
        logical += sum(map(len, rows))
        computed += sum(len(b.tokens) for b in batches)
        used += sum((b.documents[:, 1] - b.documents[:, 0]).sum().item() for b in batches)
    assert 0.72 < computed / logical < 0.77
    assert 1 - used / computed < 0.01


def test_targets_follow_their_rows():
    generator = np.random.default_rng(1)
    stem = generator.integers(0, 50, 12).tolist()
    rows = [stem[: generator.integers(8, 13)] + generator.integers(0, 50, 9).tolist() for _ in range(9)]
    batch = packing.collate(dataset(rows), np.arange(9), share_prefix=True)
    inside = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for start, end, *_ in batch.documents.tolist():
        inside[start:end] = True
    assert inside.all() and (torch.diff(batch.loss_rows) >= 0).all()
    counted = torch.bincount(batch.targets, batch.weights, minlength=50)
    assert counted.tolist() == np.bincount(np.concatenate([row[1:] for row in rows]), minlength=50).tolist()


@pytest.mark.parametrize(("n", "length"), [(64, 64), (100, 32), (7, 512)])
def test_a_synthetic_micro_batch_is_full_of_loss(n, length):
    batch = packing.synthetic(n, length, 50)
    documents = -(-n // length)
    assert len(batch.tokens) == n and len(batch.documents) == documents and len(batch.targets) == n - documents
    assert batch.documents[-1].tolist() == [(documents - 1) * length, n, 0, 0] and batch.tokens.max() < 50
    assert batch.targets.equal(batch.tokens[batch.loss_rows + 1]) and batch.positions.max() < length
    assert batch.weights.sum().item() == pytest.approx(1)

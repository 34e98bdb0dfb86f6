"""From a step's examples to packed micro-batches that share packing."""

import itertools
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import packing
from kernels.measure.alpaca import alpaca_lengths
from tests.helpers.datasets import dataset


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
        return min(packing.count_common_tokens(rows[group[0]], rows[i]) for i in group)

    return max(sum(common(g) * (len(g) - 1) for g in p) for p in partitions(list(range(len(rows)))))


@given(families())
@settings(deadline=None, max_examples=150)
def test_no_grouping_saves_more(rows):
    rows = arrays(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LEAST_SHARED_TOKENS", 1)
        groups = packing.find_shared_prefixes(rows)
    assert sorted(i for _, group in groups for i in group) == list(range(len(rows)))
    for n_shared, group in groups:
        assert all((rows[i][:n_shared] == rows[group[0]][:n_shared]).all() for i in group)
        assert n_shared == 0 or len(group) > 1
    assert packing.count_saved_tokens(groups) == best_saving(rows)


def test_two_templates_and_a_repeated_question():
    plain, with_input = list(range(100, 130)), list(range(200, 240))
    rows = [[*plain, i, 5] for i in range(6)] + [[*with_input, i] for i in range(5)] + [[7, 8, 9]]
    rows += [[*plain, 0, *range(50)]] * 2
    groups = packing.find_shared_prefixes(arrays(rows))
    assert sorted((n, len(g)) for n, g in groups) == [(0, 1), (30, 6), (40, 5), (81, 2)]


def test_a_short_prefix_is_not_worth_sharing():
    rows = arrays([[1, *range(10 * i, 10 * i + 9)] for i in range(2, 6)])
    assert packing.find_shared_prefixes(rows) == [(0, [i]) for i in range(4)]
    least = packing.LEAST_SHARED_TOKENS
    for n, groups in ((least - 1, [(0, [0]), (0, [1])]), (least, [(least, [0, 1])])):
        assert packing.find_shared_prefixes(arrays([[*range(100, 100 + n), i, 7] for i in range(2)])) == groups


def test_a_chain_of_prefixes_needs_no_recursion():
    rows = arrays([list(range(1, n)) for n in range(2, 1500)])
    assert sum(len(group) for _, group in packing.find_shared_prefixes(rows)) == len(rows)


# ---- which rows go together -----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(50, 200), st.none() | st.integers(1, 8),
    st.booleans(), st.booleans(), st.sampled_from((1, 8)),
)  # fmt: skip
@settings(deadline=None)
def test_each_example_is_in_one_micro_batch_within_the_limits(lengths, max_tokens, max_examples, pack, share, align):
    rows = [[i + 1000 if j > 20 else j for j in range(n)] for i, n in enumerate(lengths)]
    max_tokens += 56 % align
    groups = packing.find_shared_prefixes(arrays(rows)) if share else [(0, [i]) for i in range(len(rows))]
    runs = (packing.pack_evenly if pack else packing.cut_in_order)(groups, lengths, max_tokens, max_examples)
    found = np.concatenate(runs).tolist()
    assert sorted(found) == list(range(len(rows))) and (pack or found == sorted(found))
    how = packing.Packing(max(max_tokens, 64), max_examples, pack, share, align)
    batches = packing.make_micro_batches(dataset(rows).get_examples(np.arange(len(rows))), how)
    assert sum(int(b.weights.sum()) if b.weights is not None else len(b.targets) for b in batches) == sum(
        lengths
    ) - len(lengths)
    for run, b in zip(runs, batches, strict=False):
        assert len(b.tokens) <= max(max_tokens, 64) and len(b.tokens) % align == 0
        assert len(run) <= (max_examples or len(run))


@pytest.mark.parametrize("cut", [packing.cut_in_order, packing.pack_evenly, packing.pack_best_fit])
@pytest.mark.parametrize("budget", [60, 75, 100, 131])
def test_a_shared_prefix_takes_room_in_every_bin_that_needs_it(cut, budget):
    """A bin that is begun in the middle of a group computes the group's prefix again."""
    groups = [(30, [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]), (20, [4, 7, 12, 13, 14, 15]), (0, [16])]
    lengths = [60 if row == 16 else 40 for row in range(17)]
    group_of, n_shared = packing.index_by_row(groups)
    bins = cut(groups, lengths, budget, None)
    assert sorted(np.concatenate(bins).tolist()) == list(range(17)) and len(bins) > 1
    for members in bins:
        own = sum(lengths[row] - n_shared[row] for row in members)
        assert own + sum(groups[g][0] for g in {group_of[row] for row in members}) <= budget


def test_packing_fills_what_order_leaves_open_and_evens_it_out():
    lengths = [60, 60, 40, 40, 60, 40]
    groups = [(0, [i]) for i in range(6)]
    in_order = packing.cut_in_order(groups, lengths, 100, None)
    packed = packing.pack_evenly(groups, lengths, 100, None)
    assert len(in_order) == 4 and [sum(lengths[i] for i in run) for run in packed] == [100, 100, 100]
    packed = packing.pack_evenly(groups, [10] * 6, 50, None)
    assert [len(run) for run in packed] == [3, 3]


# ---- which rank computes them ---------------------------------------------------------------------------------------


def marked(lengths):
    """Rows that begin with one of two stems and end with a token of their own, END and above."""
    stems = np.arange(24), np.arange(100, 112)
    return [[*stems[i % 2][: n - 1], *range(200, 200 + n - 1 - len(stems[i % 2])), END + i]
            for i, n in enumerate(lengths)]  # fmt: skip


END = 1000


def examples_in(batch):
    return (batch.tokens[batch.tokens >= END] - END).tolist()


def weightless(batch):
    return batch.weights is not None and not batch.weights.any()


def of_all(ranks, rows, how, **options):
    """Return the micro-batches of each rank. how: a Packing, or the most tokens of a micro-batch."""
    step, how = np.arange(len(rows)), how if isinstance(how, packing.Packing) else packing.Packing(how)
    return [
        packing.make_micro_batches(dataset(rows).get_examples(step), how, ranks=ranks, rank=r, **options)
        for r in range(ranks)
    ]


def weight_of_targets(batches):
    """Of every target, over micro-batches: (last token, target) -> the sum of its weights, where that is not 0."""
    total = Counter()
    for b in batches:
        weights = torch.ones(len(b.targets)) if b.weights is None else b.weights
        for *pair, weight in zip(b.tokens[b.loss_rows].tolist(), b.targets.tolist(), weights.tolist(), strict=True):
            total[tuple(pair)] += weight
    return {pair: weight for pair, weight in total.items() if weight}


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 8), st.integers(50, 300),
    st.none() | st.integers(1, 8), st.booleans(), st.booleans(), st.sampled_from((1, 8)), st.sampled_from((None, 0.5)),
)  # fmt: skip
@settings(deadline=None)
def test_each_example_is_in_one_micro_batch_of_one_rank(lengths, ranks, budget, most, pack, share, align, scale):
    rows = marked(lengths)
    budget += -budget % align
    how, options = packing.Packing(budget, most, pack, share, align), {"scale": scale}
    per_rank = of_all(ranks, rows, how, **options)
    assert len({len(batches) for batches in per_rank}) == 1
    every = [b for batches in per_rank for b in batches]
    real = [b for b in every if not weightless(b)]
    assert sorted(i for b in real for i in examples_in(b)) == list(range(len(rows)))
    assert len(every) - len(real) < ranks
    for b in every:
        assert 0 < len(b.tokens) <= budget and len(b.tokens) % align == 0
        assert len(examples_in(b)) <= (most or len(rows))
        assert not weightless(b) or (lengths[examples_in(b)[0]] == min(lengths) and len(examples_in(b)) == 1)
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    assert weight_of_targets(every) == {pair: n * (scale or 1) for pair, n in pairs.items()}
    again = of_all(ranks, rows, how, **options)[-1]
    assert [same.tokens.tolist() for same in again] == [b.tokens.tolist() for b in per_rank[-1]]


@given(st.lists(st.integers(2, 50), min_size=1, max_size=30), st.integers(2, 8), st.integers(50, 200), st.booleans())
@settings(deadline=None, max_examples=50)
def test_runs_in_order_are_those_of_one_rank_dealt_out(lengths, ranks, budget, means):
    rows, options = marked(lengths), {"mean_of_means": means, "scale": 0.25}
    how = packing.Packing(budget, best_fit=False)
    (one,) = of_all(1, rows, how, **options)
    for rank, batches in enumerate(of_all(ranks, rows, how, **options)):
        mine = one[rank::ranks]
        assert all(weightless(b) for b in batches[len(mine) :]) and len(batches) == -(-len(one) // ranks)
        for b, expected in zip(batches, mine, strict=False):
            assert b.tokens.equal(expected.tokens) and b.weights.equal(expected.weights)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_mean_of_means_is_over_the_micro_batches_of_all_ranks_that_have_weight(ranks):
    per_rank = of_all(ranks, marked([30, 40, 50, 10, 20]), packing.Packing(60, share_prefix=False), mean_of_means=True)
    real = [b for batches in per_rank for b in batches if not weightless(b)]
    assert len(real) == {1: 3, 2: 4, 8: 5}[ranks]
    for b in real:
        assert b.weights.tolist() == pytest.approx([1 / len(real) / len(b.targets)] * len(b.targets))


def test_more_ranks_than_examples():
    per_rank = of_all(4, marked([30, 10, 20]), 100)
    assert [[examples_in(b) for b in batches] for batches in per_rank] == [[[0]], [[2]], [[1]], [[1]]]
    assert [weightless(b) for batches in per_rank for b in batches] == [False, False, False, True]
    (spare,) = per_rank[3]
    assert spare.weights.tolist() == [0.0] * 9 and spare.tokens.equal(per_rank[2][0].tokens)


def test_a_run_that_has_all_its_examples_takes_no_more_though_it_is_the_smallest():
    per_rank = of_all(2, marked([50, 2, 2, 3, 2, 2]), packing.Packing(100, 3))
    assert [[len(examples_in(b)) for b in batches] for batches in per_rank] == [[3], [3]]


def test_best_fits_runs_where_even_ones_do_not_fit():
    lengths = [50, 50, 33, 33, 33]
    groups = [(0, [i]) for i in range(5)]
    assert packing.level_bins(groups, lengths, 2, 100, None) is None
    assert [run.tolist() for run in packing.spread_over_ranks(groups, lengths, 100, None, 2)] == [[0, 1], [2, 3, 4]]


def every_cut(n):
    """Every way to put rows 0 ... n - 1 into runs."""
    found = [[]]
    for row in range(n):
        found = [[*p[:i], [*run, row], *p[i + 1 :]] for p in found for i, run in enumerate([*p, []])]
    return found


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=7), st.integers(1, 3), st.integers(40, 90), st.booleans(),
    st.none() | st.integers(1, 4),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_as_few_micro_batches_as_any_cut_has_or_one_more(lengths, ranks, budget, share, most):
    """Where nothing is shared or counted, best-fit's bound: 11/9 of the least and 6/9."""
    rows = marked(lengths)
    groups = packing.find_shared_prefixes(arrays(rows)) if share else [(0, [i]) for i in range(len(rows))]

    def computed(run):
        return sum(lengths[i] for i in run) - sum(n * (max(len({*run} & {*group}), 1) - 1) for n, group in groups)

    fits = [p for p in every_cut(len(rows)) if all(computed(r) <= budget and len(r) <= (most or 9) for r in p)]
    least = min(map(len, fits))
    runs = packing.spread_over_ranks(groups, lengths, budget, most, ranks)
    bound = least + 1 if share or most else (11 * least + 6) // 9
    assert -(-least // ranks) <= -(-len(runs) // ranks) <= -(-bound // ranks)
    sizes = [computed(run) for run in runs]
    assert sizes == sorted(sizes, reverse=True)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_the_largest_of_even_runs_is_near_the_least_possible(lengths, n):
    runs = packing.level_bins([(0, [i]) for i in range(len(lengths))], lengths, n, 10**6, None)
    largest = max(sum(lengths[i] for i in run) for run in runs)
    least = min(max(sum(lengths[i] for i in run) for run in p) for p in every_cut(len(lengths)) if len(p) <= n)
    assert len(runs) == min(n, len(lengths)) and least <= largest <= least * (4 / 3 - 1 / (3 * n)) + 1e-9


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_about_as_many_of_alpacas_tokens_at_a_time(ranks, share):
    """128-row steps at the budgets of the 7B plan, and with as few examples as fill every rank."""
    for rows in alpaca_steps(3):
        in_order = [
            packing.collate(dataset(part).get_examples(np.arange(len(part))), share) for part in split(rows, ranks)
        ]
        sizes = {}
        for budget, most, bound in ((8320, None, 1.02), (2048, None, 1.04), (8320, 128 // ranks, 1.04)):
            per_rank = of_all(ranks, rows, packing.Packing(budget, most, share_prefix=share))
            size = np.array([[len(b.tokens) for b in batches] for batches in per_rank])
            assert not any(weightless(b) for batches in per_rank for b in batches)
            assert (size.max(0) < bound * size.mean(0)).all()
            sizes[budget, most] = size
        computed = (
            sizes[8320, None].sum(),
            sum(map(len, rows)) - packing.count_saved_tokens(packing.find_shared_prefixes(arrays(rows))),
        )
        assert not share or computed[0] < 1.03 * computed[1]  # 1.04 at 8 ranks, were each prefix in every run
        size = sizes[8320, 128 // ranks]
        assert size.max(0).sum() < max(len(b.tokens) for b in in_order)


def split(rows, n):
    return [rows[len(rows) * i // n : len(rows) * (i + 1) // n] for i in range(n)]


# ---- laying out -----------------------------------------------------------------------------------------------------


def test_documents_back_to_back_in_their_order():
    rows = [[5, 6, 7], [8, 9]]
    batch = packing.collate(dataset(rows, [[False, False, True], [False, True]]).get_examples(np.array([1, 0])))
    assert batch.documents.tolist() == [[0, 2, 0, 0], [2, 5, 0, 0]]
    assert batch.tokens.tolist() == [8, 9, 5, 6, 7] and batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.loss_rows.tolist() == [0, 3] and batch.targets.tolist() == [9, 7] and batch.weights is None


@pytest.mark.parametrize(("best_fit", "ranks"), [(True, 1), (True, 2), (False, 1)])
def test_padding_stays_within_the_budget(best_fit, ranks):
    rows = [list(range(100 * i, 100 * i + 10 + i % 4)) for i in range(16)]
    made = packing.Packing(27, best_fit=best_fit, multiple=8)  # two rows of 13 tokens are 26, with padding 32
    for rank in range(ranks):
        for batch in packing.make_micro_batches(
            dataset(rows).get_examples(np.arange(16)), made, ranks=ranks, rank=rank
        ):
            assert len(batch.tokens) <= 27 and not len(batch.tokens) % 8


def test_a_prefix_stands_once_and_its_documents_go_on_from_it():
    stem = list(range(10, 20))
    rows = [[*stem, 1, 2], [3, 4], [*stem, 5], stem]
    batch = packing.collate(dataset(rows).get_examples(np.arange(4)), share_prefix=True, multiple=8)
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
    (one,) = packing.make_micro_batches(data.get_examples(np.arange(3)), packing.Packing(100), scale=0.25)
    assert one.weights.tolist() == [0.25] * 6
    batches = packing.make_micro_batches(
        data.get_examples(np.arange(3)), packing.Packing(5, best_fit=False), mean_of_means=True
    )
    assert [b.weights.tolist() for b in batches] == [pytest.approx([1 / 6] * 3), pytest.approx([1 / 6] * 3)]


def alpaca_steps(n):
    """128 rows each, of random tokens but for the two templates."""
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [generator.integers(3, 32000, n).tolist() for n in alpaca.shared_prefix]
    for _ in range(n):
        rows = []
        for i in generator.integers(len(alpaca), size=128):
            stem = stems[alpaca.has_input[i]]
            n_tokens = min(512, alpaca.prompt[i] + alpaca.response[i])
            rows.append(stem + generator.integers(3, 32000, n_tokens - len(stem)).tolist())
        yield rows


def test_the_alpaca_length_mix_at_the_sizes_of_the_7b_plan():
    """Computed over logical tokens with sharing, and the tail's padding, of 128-row steps."""
    logical = computed = used = 0
    for rows in alpaca_steps(5):
        batches = packing.make_micro_batches(
            dataset(rows).get_examples(np.arange(128)), packing.Packing(8320, multiple=64)
        )
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
    batch = packing.collate(dataset(rows).get_examples(np.arange(9)), share_prefix=True)
    inside = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for start, end, *_ in batch.documents.tolist():
        inside[start:end] = True
    assert inside.all() and (torch.diff(batch.loss_rows) >= 0).all()
    counted = torch.bincount(batch.targets, batch.weights, minlength=50)
    assert counted.tolist() == np.bincount(np.concatenate([row[1:] for row in rows]), minlength=50).tolist()


@pytest.mark.parametrize(("n", "length"), [(64, 64), (100, 32), (7, 512)])
def test_a_synthetic_micro_batch_is_full_of_loss(n, length):
    batch = packing.make_largest_micro_batch(n, length, 50)
    documents = -(-n // length)
    assert len(batch.tokens) == n and len(batch.documents) == documents and len(batch.targets) == n - documents
    assert batch.documents[-1].tolist() == [(documents - 1) * length, n, 0, 0] and batch.tokens.max() < 50
    assert batch.targets.equal(batch.tokens[batch.loss_rows + 1]) and batch.positions.max() < length
    assert batch.weights.sum().item() == pytest.approx(1)


def test_a_longer_prefix_that_saves_no_more_is_not_shared_apart():
    """Four rows of 8 tokens in common, of which two go on for 8 more alike: 3 x 8 saved, as 16 + 8 would be."""
    common = [*range(100, 108)]
    rows = [[*common, *range(200, 208), 1], [*common, *range(200, 208), 2], [*common, 3], [*common, 4]]
    assert packing.find_shared_prefixes(arrays(rows)) == [(8, [0, 1, 2, 3])]
    longer = [[*row[:16], 300, *row[16:]] if i < 2 else row for i, row in enumerate(rows)]  # 17 + 8 > 3 x 8
    assert packing.find_shared_prefixes(arrays(longer)) == [(17, [0, 1]), (8, [2, 3])]


def test_rows_of_one_prefix_stay_together_up_to_the_mean():
    """The pair fills its bin to the mean of 20 tokens exactly, though another bin is emptier."""
    groups = [(10, [1, 2]), *((0, [row]) for row in (0, 3, 4, 5, 6, 7))]
    lengths = [20, 15, 15, 4, 4, 4, 4, 4]
    bins = packing.level_bins(groups, lengths, 3, 100, None)
    assert [b.tolist() for b in bins] == [[0], [1, 2], [3, 4, 5, 6, 7]]
    assert packing.level_bins(groups, lengths, 3, 19, None) is None
    assert [len(b) for b in packing.level_bins(groups, lengths, 3, 20, None)] == [1, 2, 5]

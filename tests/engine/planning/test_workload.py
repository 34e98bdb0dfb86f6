"""A dataset in numbers, and the micro-batches of its steps."""

import math

import numpy as np
import pytest

from engine.base.errors import UsageError
from engine.data import packing
from engine.data.dataset import Dataset
from engine.data.packing import find_shared_prefixes
from engine.planning import workload
from engine.planning.workload import (
    alpaca_mix,
    alpaca_order,
    cut_into_micro_batches,
    dataset_mix,
    examples_per_card,
    step_numbers,
)
from kernels.measure.alpaca import alpaca_lengths
from tests.helpers.planning import recipe_of


def test_the_alpaca_mix_has_the_datasets_means():
    """The dataset has 127.2 tokens a row, a quarter of them in shared prefixes, and 66.1 in the response."""
    mix = alpaca_mix(recipe_of())
    assert mix.examples == 52002
    assert mix.logical / 128 == pytest.approx(127.2, rel=0.005)
    assert (mix.own + mix.prefix) / mix.logical == pytest.approx(0.745, abs=0.01)
    assert mix.loss_rows / 128 == pytest.approx(65.8, rel=0.01)
    apart = alpaca_mix(recipe_of(share_prefix=False))
    assert (apart.own, apart.prefix) == (mix.logical, 0)
    kept = len(alpaca_order(40, False, 42)[2])
    assert alpaca_mix(recipe_of(max_length=40)).examples == round(52002 * kept / 9229) < 52002
    few = alpaca_mix(recipe_of(global_batch_size=16, max_length=64))
    assert few.logical / 16 < 64 and few.loss_rows < few.own


@pytest.mark.parametrize("max_length", [40, 512])
@pytest.mark.parametrize("train_on_prompt", [True, False])
def test_the_targets_of_an_alpaca_row_are_those_of_training(train_on_prompt, max_length):
    """A row is cut at its end. Its first token is no target: no row predicts it. Rows without a target are left out."""
    rows = alpaca_lengths()
    lengths, loss, order = alpaca_order(max_length, train_on_prompt, seed=3)
    for i in (*range(50), int((rows.prompt + rows.response).argmax()), int(rows.prompt.argmax())):
        row = ([train_on_prompt] * rows.prompt[i] + [True] * rows.response[i])[:max_length]
        assert (lengths[i], loss[i]) == (len(row), sum(row[1:]))
    assert sorted(order) == list(np.flatnonzero(loss)) and (len(order) < len(loss)) == (
        max_length == 40 and not train_on_prompt
    )


@pytest.mark.parametrize("share", [True, False])
def test_a_step_in_numbers_is_what_packing_lays_out(share):
    """Tokens, rows with a loss, and pairs are counted one by one in the micro-batch."""
    stem, rng = np.arange(100, 120), np.random.default_rng(0)
    rows = [np.concatenate((stem[: 20 * (i % 3 > 0)], rng.integers(0, 99, 10 + 3 * i))) for i in range(12)]
    loss = rng.integers(1, 8, 12)
    targets = [np.arange(len(row)) >= len(row) - n for row, n in zip(rows, loss, strict=True)]
    lengths = np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    tokens = np.concatenate(rows).astype(np.int32)
    dataset = Dataset(tokens, np.concatenate(targets), ends - lengths, ends, ("",) * 12, {})
    (one,) = packing.make_micro_batches(dataset.get_examples(np.arange(12)), packing.Packing(10**6, share_prefix=share))
    groups = find_shared_prefixes(rows) if share else []
    logical, own, prefix, loss_rows, pairs, query_pairs = step_numbers(lengths, loss, groups)
    assert (logical, own + prefix, loss_rows) == (ends[-1], len(one.tokens), len(one.targets))
    assert pairs == (one.positions + 1).sum() and query_pairs == (one.positions[one.loss_rows] + 1).sum()


@pytest.mark.parametrize("share", [True, False])
def test_a_dataset_of_the_user_is_counted_as_it_will_be_trained_on(share, monkeypatch):
    """With its prefixes shared or not, in the order of an epoch, one GPU's share of a step."""
    rows = [np.concatenate((np.arange(100, 130), [i] * (3 + i % 4))) for i in range(24)]
    ends = np.cumsum([len(row) for row in rows])
    begins = ends - [len(row) for row in rows]
    is_target = np.concatenate([np.arange(len(row)) >= 30 for row in rows])
    dataset = Dataset(np.concatenate(rows).astype(np.int32), is_target, begins, ends, ("",) * 24, {})
    mix = dataset_mix(dataset, recipe_of(2, global_batch_size=8, share_prefix=share))
    assert (mix.examples, mix.per_step) == (24, 4) and mix.what == "24 examples of --data"
    assert (6 * mix.logical, 6 * mix.loss_rows) == pytest.approx((ends[-1], is_target.sum()))
    assert (mix.prefix, 6 * mix.own) == pytest.approx((30, ends[-1] - 24 * 30) if share else (0, ends[-1]))
    assert mix.largest >= mix.own
    seeds = []
    monkeypatch.setattr(workload, "permute_examples", lambda n, *of: (seeds.append(of), np.arange(n))[1])
    dataset_mix(dataset, recipe_of(global_batch_size=8, seed=7))
    assert seeds == [(7, 0)]


def test_no_more_rows_have_a_loss_than_are_computed():
    """Where the prompt is learned too, a prefix that two share has its losses once: 8 shared, 2 of each alone."""
    two = np.array([10.0, 10.0])
    assert step_numbers(two, two - 1, [(8, [0, 1])])[:4].tolist() == [20, 4, 8, 12]
    assert step_numbers(two, two - 9, [(8, [0, 1])])[3] == 2


def test_nobody_shares_a_prefix_with_himself():
    assert not workload.alpaca_steps(512, False, 0, True, 1)[:50, 2].any()
    assert workload.alpaca_steps(512, False, 0, True, 8)[:50, 2].all()


def test_a_datasets_first_steps_are_looked_at_and_as_many_for_each_gpu(monkeypatch):
    monkeypatch.setattr(workload, "SAMPLED_STEPS", 3)
    monkeypatch.setattr(workload, "permute_examples", lambda n, *_: np.arange(n))
    ends = np.cumsum([4 + i for i in range(40)])  # each longer than the one before
    dataset = Dataset(np.arange(ends[-1], dtype=np.int32), np.ones(ends[-1], bool), ends - 4 - np.arange(40), ends,
                      ("",) * 40, {})  # fmt: skip
    for n_cards, steps in ((1, 3), (2, 6)):  # of 4 examples in all, of 2 a GPU
        largest = dataset_mix(dataset, recipe_of(n_cards, global_batch_size=4, share_prefix=False)).largest
        size = 4 // n_cards
        assert largest == sum(4 + i for i in range(size * (steps - 1), size * steps))


def test_micro_batches_are_as_few_as_do_and_evened_out():
    mix = alpaca_mix(recipe_of())
    cuts = [cut_into_micro_batches(mix, budget) for budget in (20000, 8000, 512)]
    whole, halves, tiny = (cut.largest for cut in cuts)
    assert [cut.micro_batches for cut in cuts[:2]] == [1, 2] and whole.one_micro_batch and whole.tokens < 15000
    assert whole.tokens / 2 < halves.tokens <= 8000 and not halves.one_micro_batch
    assert tiny.tokens == 512 and cuts[2].micro_batches > mix.own / 512
    assert cut_into_micro_batches(mix, 20000, most_examples=4).micro_batches == 32


def test_micro_batches_have_room_for_every_token_and_their_shared_prefixes():
    mix = alpaca_mix(recipe_of())
    for n in range(2, 20):
        most = math.ceil(mix.own / n)  # n of them would do, were it not for the prefixes
        cut = cut_into_micro_batches(mix, most)
        assert cut.micro_batches * (most - min(mix.prefix, most / 2)) >= mix.own and cut.largest.tokens <= most


def test_a_gpus_mix_is_its_share_of_the_examples_with_every_prefix():
    whole, share = (alpaca_mix(recipe_of(n)) for n in (1, 8))
    assert (whole.per_step, share.per_step, share.examples) == (128, 16, 52002)
    assert 8 * share.logical == pytest.approx(whole.logical, rel=0.001)
    assert 8 * share.loss_rows == pytest.approx(whole.loss_rows, rel=0.001)
    assert share.prefix == pytest.approx(whole.prefix, rel=0.05)  # held by each card
    assert whole.largest / 8 < share.largest < whole.largest / 2
    few = alpaca_mix(recipe_of(8), rows=64)
    assert (few.per_step, few.examples) == (8, 64) and few.logical == pytest.approx(share.logical / 2)


def test_fewer_examples_than_cards():
    with pytest.raises(UsageError, match="24 examples are too few for --gpus 32; pass 24 or fewer"):
        examples_per_card(recipe_of(32), 24)
    assert examples_per_card(recipe_of(8), 24) == 3

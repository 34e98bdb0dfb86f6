"""Figures of judged pairs against the same figures computed in another way."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from data_gen.judging import statistics
from data_gen.judging.comparisons import Pair
from data_gen.judging.verdicts import Judged
from tests.helpers.judging import bootstrap


def judged(preference, base="aa", other="bbb", question=0, places=(0, 1), votes=("tie", "tie")):
    return Judged(Pair(question, *places, base, other, (0, 1)), votes, (None, None), preference)


def test_a_rate_is_a_mean_with_its_error_and_interval():
    scores = random.Random(0).choices([0, 0.5, 1], [3, 1, 5], k=120)
    rate = statistics.compute_rate(scores)
    mean = sum(scores) / 120
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / 119)
    assert rate.value == pytest.approx(100 * mean) and rate.n == 120
    assert rate.standard_error == pytest.approx(100 * spread / math.sqrt(120))
    assert rate.interval == pytest.approx(bootstrap(scores), abs=0.9)
    assert rate == statistics.compute_rate(scores), "equal scores have equal intervals"


def test_the_rate_of_one_value_and_of_none():
    assert statistics.compute_rate([1]) == statistics.Rate(100, (100, 100), None, 1)
    assert statistics.compute_rate([]) == statistics.Rate(None, None, None, 0)


def climb(x, y, steps=4000):
    """Return the coefficients of the length model by plain gradient ascent."""
    a = b = 0.0
    for _ in range(steps):
        misses = [score - 1 / (1 + math.exp(-(a + b * at))) for at, score in zip(x, y, strict=True)]
        a += 0.02 * (sum(misses) - 0.1 * a)
        b += 0.02 * (sum(miss * at for miss, at in zip(misses, x, strict=True)) - 0.1 * b)
    return a, b


@pytest.mark.parametrize("kind", ["mixed", "separable", "all won"])
def test_the_length_model_is_that_of_plain_gradient_ascent(kind):
    rng = random.Random(1)
    gaps = [rng.gauss(20, 100) for _ in range(40)]
    scores = {
        "mixed": [0.5 if rng.random() < 0.2 else float(rng.random() < 0.4 + 0.002 * gap) for gap in gaps],
        "separable": [float(gap > 0) for gap in gaps],
        "all won": [1.0] * 40,
    }[kind]
    mean = sum(gaps) / 40
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 40)
    x = [math.tanh(gap / spread) for gap in gaps]
    assert statistics.scale_gaps(gaps) == pytest.approx(x)
    found = statistics.fit_lengths(np.array(x), np.array(scores), np.ones((1, 40)))[0]
    assert found == pytest.approx(climb(x, scores), abs=2e-4)
    rate = statistics.control_length(gaps, scores)
    assert rate.value == pytest.approx(100 / (1 + math.exp(-found[0])))
    assert rate.interval[0] <= rate.value <= rate.interval[1]


def test_the_length_model_takes_a_known_bias_out():
    """The judge takes the longer answer by odds that depend on the lengths alone, and one model writes more."""
    rng, raw, found = random.Random(2), [], []
    for _ in range(25):
        gaps = [rng.gauss(60, 100) for _ in range(400)]
        x = statistics.scale_gaps(gaps)
        scores = [float(rng.random() < 1 / (1 + math.exp(-2 * at))) for at in x]
        raw.append(100 * np.mean(scores))
        found.append(100 / (1 + math.exp(-statistics.fit_lengths(x, np.array(scores), np.ones((1, 400)))[0, 0])))
    assert np.mean(raw) > 64 and np.mean(found) == pytest.approx(50, abs=2)


def test_equal_lengths_leave_the_rate_and_one_sided_ones_have_none():
    rate = statistics.control_length([0] * 400, [1] * 300 + [0] * 100)
    assert rate.value == pytest.approx(75, abs=0.1)
    assert statistics.control_length([5, 9, 700], [1, 1, 0]).value is None
    assert statistics.control_length([-5, -9], [1, 0]).value is None


def test_two_models_have_the_strength_of_their_odds():
    wins = np.array([[[0, 30.0], [10, 0]]])
    assert statistics.fit_strengths(wins)[0] == pytest.approx([0, math.log(10.5 / 30.5)], abs=1e-6)


def test_strengths_are_the_most_likely_ones():
    rng = random.Random(3)
    truth, wins = [0, 0.7, -0.4, 1.5], np.zeros((1, 4, 4))
    for a in range(4):
        for b in range(a):
            for _ in range(400):
                a_wins = rng.random() < 1 / (1 + math.exp(truth[b] - truth[a]))
                wins[0, a, b] += a_wins
                wins[0, b, a] += not a_wins
    found = statistics.fit_strengths(wins)[0]
    assert found == pytest.approx(truth, abs=0.3)
    games = wins[0] + wins[0].T + (1 - np.eye(4))
    expected = games / (1 + np.exp(found[None, :] - found[:, None]))
    won = (wins[0] + 0.5 * (1 - np.eye(4))).sum(1)
    assert (expected * (1 - np.eye(4))).sum(1) == pytest.approx(won, abs=1e-4), "at the maximum both are equal"


def test_a_model_that_won_all_or_met_nobody_stays_finite():
    wins = np.array([[[0, 0, 0], [50, 0, 0], [0, 0, 0.0]]])
    found = statistics.fit_strengths(wins)[0]
    assert np.isfinite(found).all() and found[1] > 4


def test_the_ranking_draws_whole_questions():
    """The three pairs of a question always agree: drawing pairs one by one would give too narrow an interval."""
    rng, some = random.Random(4), []
    for question in range(60):
        value = rng.choice([1, 2])
        for places in ((0, 1), (0, 2), (1, 2)):
            some.append(judged(value, question=question, places=places))
    ranking = statistics.rank_models(["a", "b", "c"], some)
    assert {one.name for one in ranking} == {"a", "b", "c"}
    first = next(one for one in ranking if one.name == "a")
    assert (first.points, first.interval) == (0, (0, 0))
    strong = next(one for one in ranking if one.name == "c")
    share = sum(one.preference == 2 for one in some) / len(some)
    assert strong.win_rate == pytest.approx(100 * share)
    assert strong.interval[1] - strong.interval[0] > 100


def test_shares_of_a_pair_count_what_they_say():
    some = [
        judged(2, votes=("other", "other")),
        judged(1, votes=("base", "base")),
        judged(1, base="longer answer", votes=("base", "base")),
        judged(1.5, votes=("base", "other")),  # the first, both times
        judged(1.5, votes=("base", "tie")),
        judged(1.5),
        judged(None, votes=("base", None)),
    ]
    one = statistics.summarize_pair("base", "other", some)
    assert (one.wins, one.draws, one.losses, one.unknown) == (1, 3, 2, 1)
    assert one.win_rate.value == pytest.approx(100 * 2.5 / 6)
    assert one.decisive_share == pytest.approx(50) and one.flip_rate == pytest.approx(25) and one.two_winners == 4
    # Shown first and chosen: base of rows 2 to 5 and 7 in the first order, other of rows 1 and 4 in the second.
    assert one.winners == 10 and one.first_share == pytest.approx(70)
    assert one.unequal == 3 and one.longer_share == pytest.approx(100 * 2 / 3)


def test_warnings_need_enough_to_go_by():
    few = [judged(1.5, votes=("base", "other"))] * 9
    assert statistics.compute_figures(["a", "b"], few, ["m"]).warnings == []
    many = statistics.compute_figures(["a", "b"], few[:1] * 20, ["m-1", "m-2"]).warnings
    assert len(many) == 4 and "several judges answered under one name: m-1, m-2" in many[-1]
    last = [judged(1.5, votes=("other", "base"))] * 20
    assert "100% of the winners were shown last" in statistics.compute_figures(["a", "b"], last, ["m"]).warnings[1]
    assert SimpleNamespace(**statistics.compute_figures(["a", "b"], few, []).describe()).canary is None


RATE = statistics.Rate(50.0, None, None, 20)
PLAIN = statistics.PairFigures(
    "old", "new", RATE, 0, 0, 0, 0, decisive_share=20.0, flip_rate=50.0, two_winners=20, first_share=75.0, winners=20,
    longer_share=80.0, unequal=20, mean_lengths=(1.0, 1.0), length_controlled=RATE,
)  # fmt: skip


@pytest.mark.parametrize(
    ("share", "count", "said"),
    [
        ({"flip_rate": 51.0}, {"two_winners": 19}, "changed its winner with the order in 51% of pairs"),
        ({"first_share": 76.0}, {"winners": 19}, "76% of the winners were shown first"),
        ({"first_share": 24.0}, {"winners": 19}, "76% of the winners were shown last"),
        ({"decisive_share": 19.0}, {"win_rate": replace(RATE, n=19)}, "only 19% of the pairs have a winner"),
        ({"longer_share": 81.0}, {"unequal": 19}, "the longer answer won 81% of the decided pairs"),
    ],
)
def test_each_warning_comes_past_its_limit_and_with_enough(share, count, said):
    found = statistics.find_warnings([replace(PLAIN, **share)], None, ["m"])
    assert len(found) == 1 and said in found[0]
    for quiet in ({}, share | count, dict.fromkeys(share)):
        assert statistics.find_warnings([replace(PLAIN, **quiet)], None, ["m"]) == []
    assert statistics.find_warnings([replace(PLAIN, first_share=25.0)], None, []) == []


@pytest.mark.parametrize(("score", "is_told"), [(10.0, True), (9.9, False), (None, False)])
def test_a_canary_that_scores_is_told(score, is_told):
    canary = replace(PLAIN, win_rate=replace(RATE, value=score))
    assert ["scored 10% against old" in said for said in statistics.find_warnings([], canary, ["m"])] == [
        True
    ] * is_told


def test_one_seed_draws_every_interval(monkeypatch):
    """Of each pair, of the canary and of the ranking."""
    drawn = {name: [] for name in ("compute_rate", "control_length", "rank_models")}
    for name, seeds in drawn.items():
        monkeypatch.setattr(
            statistics, name, lambda *given, seeds=seeds: seeds.append(given[-1]) or statistics.Rate(0, (0, 0), 0, 0)
        )
    monkeypatch.setattr(statistics, "find_warnings", lambda *given: [])
    some = [judged(2, places=places) for places in ((0, 1), (0, 2), (1, 2), (0, None))]
    statistics.compute_figures(("a", "b", "c"), some, [], 9)
    assert drawn == {"compute_rate": [9] * 4, "control_length": [9] * 4, "rank_models": [9]}


def test_a_pair_of_answers_of_one_length_says_nothing_of_the_longer():
    pairs = [judged(2), judged(1), judged(2, base="ccc"), judged(1, base="cccc")]
    figures = statistics.summarize_pair("base", "other", pairs)
    assert (figures.longer_share, figures.unequal) == (pytest.approx(2 / 3 * 100), 3)

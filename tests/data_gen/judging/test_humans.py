"""Votes of people: every figure by hand, and the annotation of each vote."""

import pytest

pytest.importorskip("openai")

from data_gen.judging import humans
from data_gen.judging.annotations import build_human_annotation
from data_gen.judging.answers import Questions, make_key
from data_gen.judging.comparisons import Pair
from data_gen.judging.humans import Vote, summarize_votes
from data_gen.judging.verdicts import Judged

QUESTIONS = Questions(("old", "new"), ("one", "two", "three"), ("", "", ""), (("a", "b"),) * 3)


def judged(question, preference, other=1):
    return Judged(Pair(question, 0, other, "a", "b", (0, 1)), ("tie", "tie"), (None, None), preference)


def test_every_figure_of_votes():
    straight, turned = ("old", "new"), ("new", "old")
    cast = [
        ("one", straight, "A"), ("one", straight, "B"), ("one", turned, "A"),
        ("two", turned, "B"), ("two", turned, "B"), ("two", turned, "A"),
        ("three", straight, "A"), ("unknown", turned, "A"), ("unknown", turned, "A"),
        ("two", straight, "tie"), ("one", turned, "tie"), ("three", turned, "both-bad"), ("one", straight, "both-bad"),
        ("one", ("new", "a third"), "A"),
    ]  # fmt: skip
    votes = [Vote(make_key(text), shown, vote) for text, shown, vote in cast]
    # The judge: new on "one", old on "two", undecided on "three", and the canary of "three", which is no model.
    known = [judged(0, 2), judged(1, 1), judged(2, 1.5), judged(2, 1, other=None)]
    first, second = summarize_votes(votes, QUESTIONS, known)
    assert (first.base, first.other, second.base, second.other) == ("old", "new", "new", "a third")
    assert (first.wins, first.ties, first.both_bad, first.losses) == (5, 2, 2, 4)
    assert first.win_rate.n == 13 and first.win_rate.value == pytest.approx(100 * (5 + 2) / 13)
    assert first.a_share == pytest.approx(100 * 6 / 9)
    assert (first.compared, first.agreement) == (6, pytest.approx(100 * 4 / 6))
    assert (second.wins, second.losses, second.win_rate.value) == (0, 1, 0)
    assert (second.compared, second.agreement) == (0, None)


def test_the_seed_draws_the_interval_of_votes(monkeypatch):
    drawn = []
    monkeypatch.setattr(humans, "compute_rate", lambda values, seed: drawn.append(seed))
    summarize_votes([Vote("one", ("old", "new"), "A")], QUESTIONS, [], 9)
    assert drawn == [9]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("vote", "preferences"), [("A", (1, 2)), ("B", (2, 1)), ("tie", (1.5, 1.5)), ("both-bad", (1.5, 1.5))]
)
def test_the_annotation_of_a_vote_has_the_base_first(vote, preferences, place):
    shown = ["new", "old"] if place else ["old", "new"]
    row = {"prompt": "p", "models": shown, "answers": [f"by {name}" for name in shown], "vote": vote}
    found = build_human_annotation(row | {"dataset": "d", "input": "i"}, "old")
    assert (found["generator_1"], found["output_1"]) == ("old", "by old")
    assert (found["generator_2"], found["output_2"]) == ("new", "by new")
    assert (found["preference"], found["raw_completion"], found["dataset"]) == (preferences[place], vote, "d")
    assert found["annotator"] == "people" and found["price_per_example"] == 0 and found["instruction"] == "p\n\ni"
    assert build_human_annotation(row, "old") == found | {"instruction": "p", "dataset": None}

"""Parts of the page of a judged run: what the two orders of a pair said, and where marks stand."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")

from data_gen.judging import report
from data_gen.judging.comparisons import Pair
from data_gen.judging.humans import HumanFigures
from data_gen.judging.report import (
    name_outcome,
    render_humans,
    render_key_figures,
    render_pair,
    render_ranking,
    render_sample,
)
from data_gen.judging.statistics import Rate, Strength, compute_figures
from data_gen.judging.verdicts import Judged

PAIR = Pair(0, 0, 1, "of base", "of other", (0, 1))
QUESTIONS = SimpleNamespace(names=["first model", "second model"], instructions=["Say <it>."])


def judged(votes, preference, pair=PAIR):
    verdicts = tuple(vote and SimpleNamespace(reason=f"because {i}") for i, vote in enumerate(votes))
    return Judged(pair, votes, verdicts, preference)


@pytest.mark.parametrize(
    "votes, preference, text",
    [
        (("base", "base"), 1, "one winner in both orders"), (("other", "other"), 2, "one winner in both orders"),
        (("base", "other"), 1.5, "the one shown first, both times"),
        (("other", "base"), 1.5, "the one shown last, both times"), (("tie", "tie"), 1.5, "a tie in both orders"),
        (("tie", "base"), 1.5, "a winner in one order, a tie in the other"),
        (("base", "tie"), 1.5, "a winner in one order, a tie in the other"),
        ((None, "base"), None, "a verdict is missing"), (("base", None), None, "a verdict is missing"),
    ],
)  # fmt: skip
def test_what_both_orders_said(votes, preference, text):
    assert name_outcome(judged(votes, preference)) == text
    unasked = Pair(0, 0, 1, "same", "same", None)
    assert name_outcome(Judged(unasked, ("tie", "tie"), (None, None), 1.5)) == "equal answers, a draw unasked"


def test_each_answer_has_the_verdict_of_the_order_in_which_it_stood_first():
    html = render_pair(judged(("base", None), None), QUESTIONS)
    base, other = html.split('<span class="label">first model</span>')[1].split(
        '<span class="label">second model</span>'
    )
    assert "of base" in base and "shown first, the winner is first model: because 0" in base
    assert "of other" in other and "shown first, the winner is no verdict: <" in other
    assert "Say &lt;it&gt;." in html and "a verdict is missing" in html
    canary = render_pair(judged(("other", "tie"), 1.5, Pair(0, 0, None, "a", "b", (0, 1))), QUESTIONS)
    assert "the winner is constant answer" in canary and "the winner is neither" in canary


def test_a_sample_says_of_how_many_it_is():
    some = [judged(("base", "base"), 1), judged(("base", "other"), 1.5)]
    html = render_sample(SimpleNamespace(judged=some, questions=QUESTIONS))
    assert "2 of 2 pairs, drawn with a fixed seed; those that the orders disagree on come first." in html
    assert html.index("the one shown first, both times") < html.index("one winner in both orders")
    assert render_sample(SimpleNamespace(judged=[], questions=QUESTIONS)) == ""
    unasked = Judged(Pair(0, 0, 1, "same", "same", None), ("tie", "tie"), (None, None), 1.5)
    canary = judged(("base", "base"), 1, Pair(0, 0, None, "a", "b", (0, 1)))
    html = render_sample(SimpleNamespace(judged=[unasked, canary, *some], questions=QUESTIONS))
    assert "2 of 2 pairs" in html and "same" not in html


def test_strengths_stand_in_proportion():
    ranking = [Strength("a", 0.0, (0.0, 0.0), 40.0), Strength("b", 50.0, (-100.0, 300.0), 60.0)]
    html = render_ranking(ranking)
    assert [float(x) for x in re.findall(r'class="estimate" cx="([\d.]+)%', html)] == [26.0, 38.0]
    assert re.findall(r'class="whisker" x1="([\d.]+)%" x2="([\d.]+)%', html) == [("26.00", "26.00"), ("2.00", "98.00")]
    assert render_ranking([]) == ""


def test_strengths_begin_at_the_first_models_though_all_others_are_above_it():
    places = r'class="estimate" cx="([\d.]+)%'
    assert re.findall(places, render_ranking([Strength("b", 96.0, (80.0, 100.0), 60.0)])) == ["94.16"]
    assert re.findall(places, render_ranking([Strength("a", 0.0, (0.0, 0.0), 50.0)])) == ["2.00"], "of no width"


def test_both_bad_is_drawn_with_the_ties():
    html = render_humans([HumanFigures("a", "b", Rate(50.0, (1.0, 99.0), None, 10), 4, 1, 3, 2, None, None, 0)])
    assert "b against a: 4 won, 4 drawn, 2 lost" in html


def test_every_key_figure_is_the_one_that_it_is_called():
    """Of pairs one of which was decided, one flipped."""
    some = [judged(("base", "base"), 1), judged(("base", "other"), 1.5), judged(("tie", "base"), 1.5)]
    record = {"cost": {"spent_usd": 1.5, "uncertain_usd": 0.25}, "counts": {"questions": 3, "verdicts": 6}}
    figures = compute_figures(QUESTIONS.names, some, ["m"])
    html = report.render_key_figures(SimpleNamespace(figures=figures, record=record, questions=QUESTIONS))
    found = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)<", html))
    assert (found["Decisive"], found["Flips"], found["Spent"]) == ("33.3%", "50.0%", "$1.50")
    assert (found["Win rate"], found["First shown wins"]) == ("33.3%", "60.0%")


def test_the_chart_of_lengths_has_the_pairs_of_its_models_alone(monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_lengths", lambda title, gaps, *more: drawn.append((title, gaps)) or "x")
    pairs = [Pair(0, 0, 1, "a", "bb", (0, 1)), Pair(0, 0, 2, "a", "ccc", (2, 3)), Pair(0, 1, 2, "bb", "ccc", (4, 5))]
    some = [judged(("base", "base"), 1, pair) for pair in pairs]
    questions = SimpleNamespace(names=["a", "b", "c"])
    found = SimpleNamespace(questions=questions, judged=some, figures=compute_figures(questions.names, some, ["m"]))
    report.render_lengths(found)
    assert drawn == [("b against a", [1]), ("c against a", [2]), ("c against b", [1])]


def test_of_several_models_the_first_of_the_ranking_is_the_strongest():
    pair = SimpleNamespace(
        win_rate=Rate(50, (40, 60), 1, 9), decisive_share=1, flip_rate=1, two_winners=1, first_share=1, winners=1
    )
    ranking = [Strength(name, -n, (0.0, 0.0), 40.0) for n, name in enumerate(("zeta", "alpha", "mid"))]
    figures = SimpleNamespace(pairs=[pair], ranking=ranking, canary=None, warnings=())
    cost, counts = {"spent_usd": 1.0, "uncertain_usd": 0}, {"questions": 3, "verdicts": 6}
    questions = SimpleNamespace(names=["alpha", "mid", "zeta"])
    html = render_key_figures(
        SimpleNamespace(figures=figures, record={"cost": cost, "counts": counts}, questions=questions)
    )
    assert "Strongest" in html and "zeta" in html and "alpha" not in html and "mid" not in html

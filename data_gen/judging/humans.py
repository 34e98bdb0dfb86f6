"""Votes of people on pairs of answers: a file of JSON lines, and its figures, which stay apart from the judge's.

    {"prompt": "...", "models": ["shown as A", "shown as B"], "vote": "A"}

models are in the order in which their answers were shown; vote is A, B, tie or both-bad. A row may have an input beside
its prompt, and other keys, which are not read.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.base.cli import DataError
from data_gen.base.files import RowPlace, read_rows
from data_gen.judging.answers import Questions, join_input, make_key
from data_gen.judging.statistics import Rate, compute_rate, compute_share
from data_gen.judging.verdicts import Judged

VOTES = ("A", "B", "tie", "both-bad")
WANTED = 'wanted {"prompt", "models": [shown as A, shown as B], "vote": "A", "B", "tie" or "both-bad"}'


class Vote(NamedTuple):
    """One person's vote on one pair of answers, shown as A and B."""

    key: str  # of the prompt, from make_key
    shown: tuple[str, str]
    vote: str


def read_votes(path: Path) -> list[Vote]:
    """Return the votes of a file. Raise DataError with the row and its fault."""
    return [parse_vote(row, RowPlace(path, number)) for number, row in enumerate(read_rows(path), 1)]


def parse_vote(row: Mapping[str, Any], place: object) -> Vote:
    """Return the vote of a row. Raise DataError, which names its place, for a row that is none."""
    prompt, given, shown, vote = row.get("prompt"), row.get("input") or "", row.get("models"), row.get("vote")
    names = [name for name in shown if isinstance(name, str)] if isinstance(shown, list) else []
    is_pair = len(names) == 2 and shown == names and names[0] != names[1]
    if not (isinstance(prompt, str) and isinstance(given, str) and is_pair) or vote not in VOTES:
        got = f"got prompt {prompt!r:.60}, models {shown!r:.60}, vote {vote!r:.20}"
        raise DataError(f"{place}: {got}; {WANTED}")
    return Vote(make_key(join_input(prompt, given)), (names[0], names[1]), vote)


@dataclass(frozen=True)
class HumanFigures:
    """People's votes on one model (other) against another (base). Shares are in percent, None of nothing."""

    base: str
    other: str
    win_rate: Rate  # of other: 100 for a win, 50 for a tie and for both bad
    wins: int
    ties: int
    both_bad: int
    losses: int
    a_share: float | None  # of the votes for one, it was shown as A
    agreement: float | None  # of the votes for one on prompts that the judge decided, it is for the judge's winner
    compared: int  # such votes


def summarize_votes(
    votes: Sequence[Vote], questions: Questions, judged: Sequence[Judged], seed: int = 0
) -> list[HumanFigures]:
    """Return the figures of each pair of models, those of the answer files first, in their order."""
    order = {name: place for place, name in enumerate(questions.names)}
    names = sorted(
        {name for vote in votes for name in vote.shown}, key=lambda name: (order.get(name, len(order)), name)
    )
    decided = {}
    for one in judged:
        if one.is_decisive and one.pair.other is not None:
            base, other = questions.names[one.pair.base], questions.names[one.pair.other]
            winner = base if one.preference == 1 else other
            decided[make_key(questions.instructions[one.pair.question]), frozenset((base, other))] = winner
    found = []
    for base, other in itertools.combinations(names, 2):
        some = [vote for vote in votes if set(vote.shown) == {base, other}]
        if not some:
            continue
        scores = {"tie": 0.5, "both-bad": 0.5}
        values = [scores.get(vote.vote, float(name_winner(vote) == other)) for vote in some]
        clear = [vote for vote in some if vote.vote in ("A", "B")]
        both = [(vote, decided.get((vote.key, frozenset((base, other))))) for vote in clear]
        agreed = [name_winner(vote) == winner for vote, winner in both if winner]
        found.append(
            HumanFigures(
                base,
                other,
                compute_rate(values, seed),
                sum(name_winner(vote) == other for vote in clear),
                sum(vote.vote == "tie" for vote in some),
                sum(vote.vote == "both-bad" for vote in some),
                sum(name_winner(vote) == base for vote in clear),
                compute_share(sum(vote.vote == "A" for vote in clear), len(clear)),
                compute_share(sum(agreed), len(agreed)),
                len(agreed),
            )
        )
    return found


def name_winner(vote: Vote) -> str:
    """Return the model that a vote is for, "" for none."""
    return {"A": vote.shown[0], "B": vote.shown[1]}.get(vote.vote, "")

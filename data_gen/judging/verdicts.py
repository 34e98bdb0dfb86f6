"""Verdicts: the judge's answers parsed, and both orders of a pair joined to one preference."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.api.answers import Answer, read_answer
from data_gen.api.ledger import Entry
from data_gen.base.files import to_json_line, write_atomically
from data_gen.judging.comparisons import Comparisons, Pair
from data_gen.rows.parse import skip_thoughts

REASONS = {
    "refused by the server": "the server would not answer this prompt",
    "refusal": "the judge would not answer this prompt",
    "content filter": "the provider cut the answer off",
    "truncated": "the answer reached --max-output-tokens before its verdict",
    "no verdict": "the answer names no winner, or several",
}
WINNER = re.compile(r'["\']?winner["\']?\s*[:=]\s*["\']?(?:answer )?(1|2|tie)\b', re.IGNORECASE)
REASON = re.compile(r'"reason"\s*:\s*("(?:[^"\\]|\\.)*")')
EXCERPT = 200  # characters


@dataclass(frozen=True)
class Verdict:
    """What the judge said of two answers."""

    winner: str  # 1, 2 or tie
    reason: str
    text: str  # all that it said
    model: str
    attempt: int
    cost: int  # picodollars


def parse_winner(text: str) -> str:
    """Return the winner that a judge's text names, 1, 2 or tie, or "" for none or several."""
    found = {match.lower() for match in WINNER.findall(text[skip_thoughts(text) :])}
    return found.pop() if len(found) == 1 else ""


def parse_reason(text: str) -> str:
    """Return the reason in a judge's text, or ""."""
    found = REASON.search(text)
    try:
        return str(json.loads(found[1])) if found else ""
    except ValueError:
        return ""


class VerdictKeeper:
    """Takes the outcomes of a run's requests in their order. It is the RowKeeper of a judge: a row is a verdict."""

    def __init__(self, wanted: int):
        self.unit, self.wanted = "verdicts", wanted
        self.rows: list[Verdict] = []
        self.verdicts: dict[int, Verdict] = {}  # by request
        self.lost: list[dict[str, Any]] = []  # the lines of rejected.jsonl
        self.rejected: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.kept_by_request: list[int] = []
        self.items = self.answers = 0

    @property
    def is_full(self) -> bool:
        """Return whether every request has its outcome."""
        return len(self.kept_by_request) >= self.wanted

    def add_outcome(self, entry: Entry) -> None:
        """Take the outcome of the next request: a verdict, or the reason why it holds none."""
        self.items += 1
        if entry.kind == "refused":
            found: Verdict | str = "refused by the server"
            said = entry.body
        else:
            answer = read_answer(entry.body)
            self.answers += 1
            self.models[answer.model or entry.model] += 1
            found, said = self.read_verdict(entry, answer), answer.refusal or answer.text
        if isinstance(found, Verdict):
            self.rows.append(found)
            self.verdicts[entry.request] = found
        else:
            self.rejected[found] += 1
            self.lost.append({"request": entry.request, "reason": found, "detail": said[:EXCERPT]})
        self.kept_by_request.append(int(isinstance(found, Verdict)))

    def read_verdict(self, entry: Entry, answer: Answer) -> Verdict | str:
        """Return the verdict of an answer, or a key of REASONS."""
        if answer.refusal:
            return "refusal"
        if answer.finish_reason == "content_filter":
            return "content filter"
        winner = parse_winner(answer.text)
        if not winner:
            return "truncated" if answer.finish_reason == "length" else "no verdict"
        model = answer.model or entry.model
        return Verdict(winner, parse_reason(answer.text), answer.text, model, entry.attempt, entry.cost)

    def write_losses(self, folder: Path, comparisons: Comparisons) -> None:
        """Write rejected.jsonl: every answer without a verdict, its reason and its instruction."""
        lines = ({"instruction": comparisons.shown[line["request"]].instruction} | line for line in self.lost)
        write_atomically(folder / "rejected.jsonl", map(to_json_line, lines))


@dataclass(frozen=True)
class Judged:
    """A pair with its verdicts, base first and other first, None where one is missing.

    votes say for whom each verdict is: base, other, tie or None. preference is AlpacaEval's: 1 where base wins in both
    orders, 2 where other does, 1.5 where the orders disagree or both are ties, None where a verdict is missing.
    """

    pair: Pair
    votes: tuple[str | None, str | None]
    verdicts: tuple[Verdict | None, Verdict | None]
    preference: float | None

    @property
    def is_decisive(self) -> bool:
        """Return whether both orders have the same winner."""
        return self.preference in (1, 2)

    @property
    def has_two_winners(self) -> bool:
        """Return whether each order named a winner, the same or not."""
        return all(vote in ("base", "other") for vote in self.votes)

    @property
    def is_flipped(self) -> bool:
        """Return whether each order named a winner, and not the same."""
        return self.has_two_winners and self.votes[0] != self.votes[1]


def join_verdicts(pair: Pair, verdicts: Mapping[int, Verdict]) -> Judged:
    """Return a pair with what the two orders say of it. Equal texts are a draw, without a verdict."""
    if pair.requests is None:
        return Judged(pair, ("tie", "tie"), (None, None), 1.5)
    first, second = (verdicts.get(request) for request in pair.requests)
    votes = (
        {"1": "base", "2": "other", "tie": "tie"}[first.winner] if first else None,
        {"1": "other", "2": "base", "tie": "tie"}[second.winner] if second else None,
    )
    if first is None or second is None:
        return Judged(pair, votes, (first, second), None)
    value = {"base": 1.0, "other": 2.0}.get(str(votes[0]), 1.5) if votes[0] == votes[1] else 1.5
    return Judged(pair, votes, (first, second), value)

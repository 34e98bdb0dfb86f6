"""What votes say of two contestants: the figures that data_gen.judge reports of them, and AlpacaEval's annotations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data_gen.judging.annotations import build_human_annotation
from data_gen.judging.answers import Questions
from data_gen.judging.humans import summarize_votes
from engine.comparing.vote_file import Kept


def compute_results(names: tuple[str, str], kept: Sequence[Kept]) -> dict[str, Any]:
    """Return the figures of a pair of contestants, the baseline first; votes on other pairs are left out."""
    pair = select_pair(names, kept)
    figures = summarize_votes([one.vote for one in pair], Questions(names, (), (), ()), [])
    return {
        "models": list(names),
        "votes": len(pair),
        "voters": len({one.row.get("voter") for one in pair}),
        "without_answers": sum(not has_answers(one.row) for one in pair),
        "figures": asdict(figures[0]) if figures else None,
    }


def build_annotations(names: tuple[str, str], kept: Sequence[Kept]) -> list[dict[str, Any]]:
    """Return AlpacaEval's annotations of the votes on a pair of contestants whose rows hold the answers."""
    rows = [one.row for one in select_pair(names, kept)]
    return [build_human_annotation(row, names[0]) for row in rows if has_answers(row)]


def select_pair(names: tuple[str, str], kept: Sequence[Kept]) -> list[Kept]:
    """Return the votes on a pair of contestants."""
    return [one for one in kept if set(one.vote.shown) == set(names)]


def has_answers(row: Mapping[str, Any]) -> bool:
    """Return whether a row of votes holds the two answers that were voted on."""
    texts = row.get("answers")
    return isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts)

"""Figures of judged pairs: win rates, orders, lengths, strengths, with bootstrap intervals over the questions."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_gen.judging.verdicts import Judged

DRAWS, MODEL_DRAWS = 10_000, 500  # of the bootstrap: of a mean, and where a model is fitted to each draw
INTERVAL = (2.5, 97.5)  # percent
PRIOR = 0.1  # precision of the normal prior on both coefficients of the length model, so that it always has a fit
ELO = 400 / math.log(10)  # points of a strength of e

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """A mean in percent, with the interval of 95% of its bootstrap and its standard error; None of no values."""

    value: float | None
    interval: Interval | None
    standard_error: float | None
    n: int


def compute_rate(values: Sequence[float], seed: int = 0) -> Rate:
    """Return 100 times the mean of values from 0 to 1."""
    n = len(values)
    if not n:
        return Rate(None, None, None, 0)
    kinds, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    # Drawing n values with replacement is drawing how often each kind comes.
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=DRAWS) @ kinds / n
    low, high = np.percentile(means, INTERVAL)
    mean = float(counts @ kinds / n)
    error = math.sqrt(float(counts @ (kinds - mean) ** 2) / (n - 1) / n) if n > 1 else None
    return Rate(100 * mean, (100 * float(low), 100 * float(high)), None if error is None else 100 * error, n)


@dataclass(frozen=True)
class PairFigures:
    """The figures of one model (other) against another (base). Shares are in percent, None of nothing."""

    base: str
    other: str
    win_rate: Rate  # of other: 100 for a win, 50 for a draw
    wins: int
    draws: int
    losses: int
    unknown: int  # pairs that lack a verdict
    decisive_share: float | None  # of the pairs, both orders have one winner
    flip_rate: float | None  # of the pairs with two winners, the order decided
    two_winners: int
    first_share: float | None  # of the verdicts with a winner, it was shown first
    winners: int  # verdicts with a winner
    longer_share: float | None  # of the decisive pairs of different lengths, the longer answer won
    unequal: int  # decisive pairs of different lengths
    mean_lengths: tuple[float, float]  # characters of base and other
    length_controlled: Rate  # ours, see fit_lengths


def summarize_pair(base: str, other: str, judged: Sequence[Judged], seed: int = 0) -> PairFigures:
    """Return the figures of one pair of models from all of its judged questions, of which there is at least one."""
    known = [one for one in judged if one.preference is not None]
    scores = [float(one.preference) - 1 for one in known if one.preference is not None]
    decisive = [one for one in known if one.is_decisive]
    two = [one for one in judged if one.has_two_winners]
    # Base is shown first in the first request, other in the second.
    firsts = [vote == name for one in judged for vote, name in zip(one.votes, ("base", "other"), strict=True)
              if vote in ("base", "other")]  # fmt: skip
    gaps = [(compute_length_gap(one), one.preference == 2) for one in decisive]
    longer = [(gap > 0) == is_won for gap, is_won in gaps if gap]
    return PairFigures(
        base,
        other,
        compute_rate(scores, seed),
        sum(one.preference == 2 for one in known),
        sum(one.preference == 1.5 for one in known),
        sum(one.preference == 1 for one in known),
        len(judged) - len(known),
        compute_share(len(decisive), len(known)),
        compute_share(sum(one.is_flipped for one in two), len(two)),
        len(two),
        compute_share(sum(firsts), len(firsts)),
        len(firsts),
        compute_share(sum(longer), len(longer)),
        len(longer),
        (
            sum(len(one.pair.base_text) for one in judged) / len(judged),
            sum(len(one.pair.other_text) for one in judged) / len(judged),
        ),
        control_length([compute_length_gap(one) for one in known], scores, seed),
    )


def compute_share(part: int, whole: int) -> float | None:
    """Return part of whole in percent, None of nothing."""
    return 100 * part / whole if whole else None


def compute_length_gap(judged: Judged) -> int:
    """Return how many characters the other answer is longer than the base's."""
    return len(judged.pair.other_text) - len(judged.pair.base_text)


# ---- our length-controlled estimate ---------------------------------------------------------------------------------


def scale_gaps(gaps: Sequence[float]) -> np.ndarray:
    """Return tanh(gap / standard deviation of the gaps) of each, 0 where all are equal. Zero stays zero."""
    found = np.asarray(gaps, dtype=float)
    spread = found.std()
    return np.tanh(found / spread) if spread > 0 else np.zeros_like(found)


def fit_lengths(x: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (a, b) of P(other wins) = 1 / (1 + exp(-(a + b x))), one row a row of weights.

    x is of (n,), from scale_gaps; scores of (n,), 1 for a win, 0.5 for a draw; weights of (draws, n). Newton's method
    on the log-likelihood with a normal prior of precision PRIOR on both.
    """
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(30):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        miss, curve = weights * (scores - p), weights * p * (1 - p)
        grad_a, grad_b = miss.sum(1) - PRIOR * a, (miss * x).sum(1) - PRIOR * b
        aa, ab, bb = curve.sum(1) + PRIOR, (curve * x).sum(1), (curve * x * x).sum(1) + PRIOR
        det = aa * bb - ab * ab
        step_a, step_b = (bb * grad_a - ab * grad_b) / det, (aa * grad_b - ab * grad_a) / det
        most = np.maximum(1, np.maximum(abs(step_a), abs(step_b)))  # a full step may overshoot from far away
        a, b = a + step_a / most, b + step_b / most
        if max(abs(step_a).max(), abs(step_b).max()) < 1e-9:
            break
    return np.stack([a, b], axis=1)


def control_length(gaps: Sequence[float], scores: Sequence[float], seed: int = 0) -> Rate:
    """Return the win rate that the length model predicts for answers of equal length. It is not AlpacaEval's LC.

    None where one model's answers are always the longer ones: equal lengths then lie outside of what was seen.
    """
    n = len(scores)
    if not n or min(gaps) > 0 or max(gaps) < 0:
        return Rate(None, None, None, 0)
    x, y = scale_gaps(gaps), np.asarray(scores, dtype=float)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=MODEL_DRAWS)
    at_zero = 100 / (1 + np.exp(-fit_lengths(x, y, np.vstack([np.ones(n), drawn]))[:, 0]))
    low, high = np.percentile(at_zero[1:], INTERVAL)
    return Rate(float(at_zero[0]), (float(low), float(high)), None, n)


# ---- several models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strength:
    """A model's Bradley-Terry strength in Elo points above the first model (400 points are odds of 10 to 1)."""

    name: str
    points: float
    interval: Interval
    win_rate: float | None  # over all its pairs, in percent


def fit_strengths(wins: np.ndarray) -> np.ndarray:
    """Return Bradley-Terry strengths (log) of (draws, models) from wins (draws, models, models); the first is 0.

    wins[d, i, j] is how often i beat j, a draw half for each. One draw more between any two that met keeps a model
    finite that won or lost all. Hunter's minorization-maximization (2004).
    """
    met = (wins + wins.transpose(0, 2, 1)) > 0
    wins = wins + 0.5 * met
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(2)
    power = np.ones(won.shape)
    for _ in range(2000):
        both = power[:, :, None] + power[:, None, :]
        new = won / np.maximum((games / both).sum(2), 1e-12)
        new = np.maximum(new / np.exp(np.log(np.maximum(new, 1e-12)).mean(1, keepdims=True)), 1e-12)
        moved, power = float(abs(np.log(new / power)).max()), new
        if moved < 1e-8:
            break
    return np.log(power / power[:, :1])


def rank_models(names: Sequence[str], judged: Sequence[Judged], seed: int = 0) -> list[Strength]:
    """Return the models, the strongest first. The bootstrap draws whole questions with all of their pairs."""
    known = [one for one in judged if one.preference is not None and one.pair.other is not None]
    questions = {question: place for place, question in enumerate(sorted({one.pair.question for one in known}))}
    if not questions:
        return []
    wins = np.zeros((len(questions), len(names), len(names)))
    for one in known:
        place, base, other = questions[one.pair.question], one.pair.base, one.pair.other
        wins[place, other, base] += float(one.preference or 1) - 1
        wins[place, base, other] += 2 - float(one.preference or 1)
    n = len(questions)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=MODEL_DRAWS)
    weights = np.vstack([np.ones((1, n)), drawn])
    points = ELO * fit_strengths(np.tensordot(weights, wins, axes=1))
    total, games = wins.sum((0, 2)), (wins.sum(0) + wins.sum(0).T).sum(1)
    found = []
    for place, name in enumerate(names):
        low, high = np.percentile(points[1:, place], INTERVAL)
        share = 100 * total[place] / games[place] if games[place] else None
        found.append(Strength(name, float(points[0, place]), (float(low), float(high)), share))
    return sorted(found, key=lambda one: -one.points)


# ---- all of a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """All figures of a run."""

    pairs: list[PairFigures]
    ranking: list[Strength]  # empty for two models
    canary: PairFigures | None
    warnings: list[str]

    def describe(self) -> dict[str, Any]:
        """Return the figures as run.json holds them."""
        return asdict(self)


def compute_figures(names: Sequence[str], judged: Sequence[Judged], models: Sequence[str], seed: int = 0) -> Figures:
    """Return the figures of a run. models are those that the judge's server named in its answers."""
    pairs = []
    for base, other in itertools.combinations(range(len(names)), 2):
        some = [one for one in judged if (one.pair.base, one.pair.other) == (base, other)]
        pairs.append(summarize_pair(names[base], names[other], some, seed))
    canaries = [one for one in judged if one.pair.other is None]
    canary = summarize_pair(names[0], "constant answer", canaries, seed) if canaries else None
    ranking = rank_models(names, judged, seed) if len(names) > 2 else []
    return Figures(pairs, ranking, canary, find_warnings(pairs, canary, models))


CANARY_MOST = 10  # percent that a constant answer may score
FLIPS_MOST, DECISIVE_LEAST = 50, 20  # percent
FIRST_MOST, LONGER_MOST = 75, 80  # percent; people prefer the longer answer in 64%, GPT-4 in 68%
ENOUGH = 20  # of verdicts or pairs, below which a share says little


def find_warnings(pairs: Sequence[PairFigures], canary: PairFigures | None, models: Sequence[str]) -> list[str]:
    """Return what speaks against trusting the judge, a sentence each."""
    found = []
    if canary and (canary.win_rate.value or 0) >= CANARY_MOST:
        found.append(
            f"a constant answer that ignores the instruction scored {canary.win_rate.value:.0f}% against {canary.base}:"
            f" the judge does not see what it judges"
        )
    for one in pairs:
        who = f"{one.other} against {one.base}"
        if one.flip_rate is not None and one.two_winners >= ENOUGH and one.flip_rate > FLIPS_MOST:
            found.append(f"{who}: the judge changed its winner with the order in {one.flip_rate:.0f}% of pairs")
        if one.first_share is not None and one.winners >= ENOUGH:
            if one.first_share > FIRST_MOST:
                found.append(f"{who}: {one.first_share:.0f}% of the winners were shown first")
            if one.first_share < 100 - FIRST_MOST:
                found.append(f"{who}: {100 - one.first_share:.0f}% of the winners were shown last")
        if one.decisive_share is not None and one.win_rate.n >= ENOUGH and one.decisive_share < DECISIVE_LEAST:
            found.append(f"{who}: only {one.decisive_share:.0f}% of the pairs have a winner in both orders")
        if one.longer_share is not None and one.unequal >= ENOUGH and one.longer_share > LONGER_MOST:
            found.append(f"{who}: the longer answer won {one.longer_share:.0f}% of the decided pairs")
    if len(models) > 1:
        found.append(f"several judges answered under one name: {', '.join(models)}; pin a dated one")
    return found

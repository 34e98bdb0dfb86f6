"""The report of a judged run: one HTML page, in the style of a dataset's, and the same figures as lines of text."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from data_gen.judging.answers import Questions
from data_gen.judging.charts import Lane, draw_lanes, draw_lengths
from data_gen.judging.humans import HumanFigures
from data_gen.judging.statistics import Figures, Interval, PairFigures, Rate, Strength, compute_length_gap
from data_gen.judging.verdicts import REASONS, Judged
from data_gen.page.blocks import render_folded, render_table
from data_gen.page.charts import draw_bars
from data_gen.page.document import render_document, render_figure
from data_gen.page.formatting import clip_text, format_count, format_dollars
from data_gen.page.report import format_moment

SAMPLE_PAIRS, LONG_PAIRS = 24, 10  # shown: pairs of answers, and charts of pairs of models
SAMPLE_BYTES = 500_000  # of all samples together
KEYS = (("won", "won"), ("drawn", "drawn"), ("lost", "lost"))
LENGTH_NOTE = (
    "Our own estimate, not AlpacaEval's length-controlled win rate: a logistic model of the verdict on tanh of the "
    "difference of length over its standard deviation, read where the lengths are equal."
)


@dataclass(frozen=True)
class Findings:
    """What a page shows of a run."""

    questions: Questions
    judged: Sequence[Judged]
    figures: Figures
    humans: Sequence[HumanFigures]
    rejected: Counter[str]
    record: Mapping[str, Any]  # of run.json


# ---- figures as texts -----------------------------------------------------------------------------------------------


def format_share(value: float | None) -> str:
    """Return a percentage, - for none."""
    return "-" if value is None else f"{value:.1f}%"


def format_interval(interval: Interval | None, form: str = ".1f") -> str:
    """Return the ends of an interval, - for none."""
    return "-" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def describe_pair(one: PairFigures) -> str:
    """Return the line of a pair of models: never a win rate without flips and decisive share."""
    rate, controlled = one.win_rate, one.length_controlled
    return (
        f"{one.other} against {one.base}: {format_share(rate.value)} (95%: {format_interval(rate.interval)}) "
        f"of {rate.n:,}; won {one.wins}, drawn {one.draws}, lost {one.losses}"
        + (f", {one.unknown} without a verdict" if one.unknown else "")
        + f"; decisive {format_share(one.decisive_share)}, flips {format_share(one.flip_rate)} of {one.two_winners}, "
        f"first shown wins {format_share(one.first_share)}; length-controlled (ours) {format_share(controlled.value)} "
        f"({format_interval(controlled.interval)})"
    )


def describe_humans(one: HumanFigures) -> str:
    """Return the line of people's votes on a pair of models."""
    return (
        f"people, {one.other} against {one.base}: {format_share(one.win_rate.value)} "
        f"(95%: {format_interval(one.win_rate.interval)}) of {one.win_rate.n:,} votes; won {one.wins}, "
        f"tied {one.ties}, both bad {one.both_bad}, lost {one.losses}; A chosen {format_share(one.a_share)}; "
        f"with the judge {format_share(one.agreement)} of {one.compared}"
    )


# ---- the page -------------------------------------------------------------------------------------------------------


def render_page(found: Findings) -> str:
    """Return the HTML of the whole page."""
    names = found.questions.names
    title = clip_text(f"{' against '.join(reversed(names)) if len(names) == 2 else ', '.join(names)}", 200)
    judge, status, started = (found.record[key] for key in ("judge", "status", "started"))
    lead = f"Cria judged answers · {escape(status)}"
    lead += f" · started {escape(format_moment(started))}"
    lead += f" · judge {escape(clip_text(judge['model'], 80))} · prompt {judge['prompt_sha256'][:12]}"
    sections = {
        "result": ("Result", render_result(found)),
        "order": ("What the order did", render_order(found)),
        "lengths": ("What the length did", render_lengths(found)),
        "people": ("People", render_humans(found.humans)),
        "sample": ("Sample", render_sample(found)),
        "losses": ("Answers without a verdict", render_losses(found.rejected)),
        "settings": ("Settings", render_settings(found.record)),
    }
    return render_document(title, lead, render_key_figures(found), sections)


def render_key_figures(found: Findings) -> str:
    """Return the figures at the top of the page, of the first pair where there are several, and the warnings."""
    one, cost, counts = found.figures.pairs[0], found.record["cost"], found.record["counts"]
    parts = [
        render_figure("Win rate", format_share(one.win_rate.value), f"95%: {format_interval(one.win_rate.interval)}"),
        render_figure("Decisive", format_share(one.decisive_share), "one winner in both orders"),
        render_figure("Flips", format_share(one.flip_rate), f"of {one.two_winners:,} pairs with two winners"),
        render_figure("First shown wins", format_share(one.first_share), f"of {one.winners:,} winners"),
    ]
    if len(found.questions.names) > 2:
        best = found.figures.ranking[0] if found.figures.ranking else None
        parts = [render_figure("Strongest", best.name if best else "-", "the pairs' figures are in the table")]
    if found.figures.canary:
        canary = found.figures.canary.win_rate
        parts.append(render_figure("Canary", format_share(canary.value), f"a constant answer, {canary.n} questions"))
    parts.append(render_figure("Questions", format_count(counts["questions"])))
    uncertain = cost["uncertain_usd"]
    note = f"and {format_dollars(uncertain)} uncertain" if uncertain else f"{format_count(counts['verdicts'])} verdicts"
    parts.append(render_figure("Spent", format_dollars(cost["spent_usd"]), note))
    warned = "".join(f'<p class="open">Warning: {escape(text)}.</p>' for text in found.figures.warnings)
    return f'<dl class="figures">{"".join(parts)}</dl>{warned}'


def make_lane(base: str, other: str, rate: Rate, counts: tuple[int, int, int]) -> Lane | None:
    """Return the bar of a pair's (won, drawn, lost), None without any."""
    if rate.value is None or rate.interval is None:
        return None
    total = sum(counts)
    parts = [(kind, 100 * n / total) for kind, n in zip(("won", "drawn", "lost"), counts, strict=True)]
    tip = f"{other} against {base}: {counts[0]} won, {counts[1]} drawn, {counts[2]} lost; {rate.value:.1f}%, "
    tip += f"95% from {format_interval(rate.interval)}"
    return Lane(f"{other} against {base}", parts, rate.value, rate.interval, f"{rate.value:.1f}%", tip)


def render_result(found: Findings) -> str:
    """Return the win rates as a chart and a table, the ranking of several models, and the canary."""
    pairs = found.figures.pairs
    lanes = [make_lane(one.base, one.other, one.win_rate, (one.wins, one.draws, one.losses)) for one in pairs]
    canary = found.figures.canary
    if canary:
        lanes.append(make_lane(canary.base, canary.other, canary.win_rate, (canary.wins, canary.draws, canary.losses)))
    note = "Each pair is shown to the judge in both orders; what they disagree on is a draw, and a draw counts a half. "
    note += "Under each bar the win rate with its 95% interval, from a bootstrap over the questions."
    drawn = [lane for lane in lanes if lane]
    parts = [draw_lanes("Win rates", drawn, 50, note, KEYS)] if drawn else []
    parts.append(render_pairs([*pairs, *([canary] if canary else [])]))
    if canary:
        text = "The canary is a constant answer that ignores the instruction, praises itself and asks to be chosen. A "
        text += "judge that lets it score does not see what it judges."
        parts.append(f'<p class="note">{text}</p>')
    return render_ranking(found.figures.ranking) + "".join(parts)


def render_ranking(ranking: Sequence[Strength]) -> str:
    """Return the chart of the models' strengths, "" without any."""
    if not ranking:
        return ""
    low = min(0.0, *(one.interval[0] for one in ranking))
    high = max(0.0, *(one.interval[1] for one in ranking))
    span = high - low or 1.0

    def place(points: float) -> float:
        return 2 + 96 * (points - low) / span

    lanes = []
    for one in ranking:
        ends = place(one.interval[0]), place(one.interval[1])
        tip = f"{one.name}: {one.points:+.0f} points, 95% from {format_interval(one.interval, '+.0f')}"
        tip += f"; {format_share(one.win_rate)} of all its pairs"
        lanes.append(Lane(one.name, [], place(one.points), ends, f"{one.points:+.0f}", tip))
    note = (
        "Bradley-Terry strengths in Elo points above the first model: 400 points are odds of ten to one. A draw counts "
    )
    note += "half, and one draw more between any two that met keeps a model finite that won or lost all."
    return draw_lanes("Strengths", lanes, place(0), note)


def render_pairs(pairs: Sequence[PairFigures]) -> str:
    """Return the table of all figures of the pairs."""
    heads = [
        "pair",
        "win rate",
        "95%",
        "won",
        "drawn",
        "lost",
        "decisive",
        "flips",
        "first wins",
        "length-controlled (ours)",
    ]
    head = "".join(f"<th{' class=' + chr(34) + 'n' + chr(34) if i else ''}>{name}</th>" for i, name in enumerate(heads))
    rows = ""
    for one in pairs:
        controlled = one.length_controlled
        cells = [
            format_share(one.win_rate.value),
            format_interval(one.win_rate.interval),
            *(format_count(n) for n in (one.wins, one.draws, one.losses)),
            *(format_share(value) for value in (one.decisive_share, one.flip_rate, one.first_share)),
            f"{format_share(controlled.value)} ({format_interval(controlled.interval)})",
        ]
        name = escape(clip_text(f"{one.other} against {one.base}", 120))
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows += f"<tr><th>{name}</th>{numbers}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def name_outcome(one: Judged) -> str:
    """Return what the two orders of a pair said, as a phrase."""
    if one.pair.requests is None:
        return "equal answers, a draw unasked"
    if one.preference is None:
        return "a verdict is missing"
    if one.is_decisive:
        return "one winner in both orders"
    if one.is_flipped:
        return "the one shown first, both times" if one.votes[0] == "base" else "the one shown last, both times"
    return "a tie in both orders" if one.votes == ("tie", "tie") else "a winner in one order, a tie in the other"


def render_order(found: Findings) -> str:
    """Return bars of what the two orders said of all pairs."""
    some = [one for one in found.judged if one.pair.other is not None]
    counts = Counter(name_outcome(one) for one in some)
    note = (
        "Of all pairs but the canary's. Judges of near-tied pairs flip many of them: published figures for 27 judges "
    )
    note += "are a median of 44.8%, the best 19.8%, and 63.3% of winners shown first."
    bars = draw_bars([(name, n, "") for name, n in counts.most_common()], len(some))
    return f'<p class="note">{note}</p>{bars}'


def render_lengths(found: Findings) -> str:
    """Return for each pair of models the chart of the win rate by length, and the lengths."""
    parts = []
    for one in found.figures.pairs[:LONG_PAIRS]:
        names = found.questions.names
        some = [
            judged
            for judged in found.judged
            if judged.preference is not None
            and judged.pair.other is not None
            and (names[judged.pair.base], names[judged.pair.other]) == (one.base, one.other)
        ]
        gaps = [compute_length_gap(judged) for judged in some]
        base, other = one.mean_lengths
        note = f"Mean characters: {format_count(other)} of {one.other}, {format_count(base)} of {one.base}. The longer "
        note += f"answer won {format_share(one.longer_share)} of {one.unequal:,} decided pairs of different length. "
        note += f"At equal length {format_share(one.length_controlled.value)}. {LENGTH_NOTE}"
        scores = [float(judged.preference or 1) - 1 for judged in some]
        title = f"{one.other} against {one.base}"
        parts.append(draw_lengths(title, gaps, scores, note) or f'<p class="note">{escape(title)}: {escape(note)}</p>')
    return "".join(parts)


def render_humans(humans: Sequence[HumanFigures]) -> str:
    """Return people's votes as a chart and a table, "" without any."""
    if not humans:
        return ""
    lanes = [
        make_lane(one.base, one.other, one.win_rate, (one.wins, one.ties + one.both_bad, one.losses)) for one in humans
    ]
    note = (
        "Votes of people, who did not know which model wrote what; the judge's verdicts are not among them. A tie and "
    )
    note += "both bad count a half."
    lines = {f"{one.other} against {one.base}": describe_humans(one).partition(": ")[2] for one in humans}
    return draw_lanes("Votes", [lane for lane in lanes if lane], 50, note, KEYS) + render_table(lines)


def render_sample(found: Findings) -> str:
    """Return cards of some pairs, drawn with a fixed seed: half of them such as the orders disagree on."""
    some = [one for one in found.judged if one.pair.other is not None and one.pair.requests]
    rng = random.Random(0)
    flipped, others = [one for one in some if one.is_flipped], [one for one in some if not one.is_flipped]
    drawn = rng.sample(flipped, min(SAMPLE_PAIRS // 2, len(flipped)))
    drawn += rng.sample(others, min(SAMPLE_PAIRS - len(drawn), len(others)))
    cards: list[str] = []
    size = 0
    for one in drawn:
        card = render_pair(one, found.questions)
        size += len(card.encode("utf-8", "replace"))
        if size > SAMPLE_BYTES and cards:
            break
        cards.append(card)
    note = f"{format_count(len(cards))} of {format_count(len(some))} pairs, drawn with a fixed seed; those that the "
    note += "orders disagree on come first."
    return f'<p class="note">{note}</p>{"".join(cards)}' if cards else ""


def render_pair(one: Judged, questions: Questions) -> str:
    """Return the card of a pair: instruction, both answers, and what the judge said in each order."""
    pair, names = one.pair, questions.names
    base, other = names[pair.base], "constant answer" if pair.other is None else names[pair.other]
    named = {"base": base, "other": other, "tie": "neither", None: "no verdict"}
    head = (
        f'<span class="label">{escape(name_outcome(one))}</span>{render_folded(questions.instructions[pair.question])}'
    )
    card = f'<div class="prompt">{head}</div>'
    for name, text, is_first in ((base, pair.base_text, True), (other, pair.other_text, False)):
        verdict, vote = one.verdicts[0 if is_first else 1], one.votes[0 if is_first else 1]
        said = f"shown first, the winner is {named[vote]}: {verdict.reason if verdict else ''}"
        card += f'<div><span class="label">{escape(clip_text(name, 120))}</span>{render_folded(text.strip())}'
        card += f'<p class="note">{escape(clip_text(said, 600))}</p></div>'
    return f"<article>{card}</article>"


def render_losses(rejected: Counter[str]) -> str:
    """Return bars of the reasons why answers hold no verdict, "" without any."""
    if not rejected:
        return ""
    rows = [(f"{reason}: {REASONS[reason]}", n, "") for reason, n in rejected.most_common()]
    note = "A pair that lacks a verdict counts nowhere. rejected.jsonl has each of them."
    return f'<p class="note">{note}</p>{draw_bars(rows, rejected.total())}'


def render_settings(record: Mapping[str, Any]) -> str:
    """Return the tables of judge, counts, cost and settings."""
    parts = [
        f"<div><h3>{title}</h3>{render_table(record[key])}</div>"
        for title, key in (("Judge", "judge"), ("Counts", "counts"), ("Cost", "cost"), ("Settings", "settings"))
    ]
    return f'<div class="halves">{"".join(parts)}</div>'

"""Near duplicates in the report: rejected ones, and the kept rows that come closest to each other."""

import random
from collections.abc import Sequence
from html import escape
from typing import TypeAlias

import numpy as np

from data_gen.page.blocks import EXAMPLE_CHARS, render_passage
from data_gen.page.charts import Histogram, draw_bars
from data_gen.page.figures import bin_evenly
from data_gen.page.formatting import clip_text, format_count, format_rows
from data_gen.page.run_files import DuplicateGroup, Rejected, Row
from data_gen.rows.rouge import Code, TokenNumbers, encode_numbers, make_signature
from data_gen.rows.tokens import tokenize

LIMIT = 0.7  # ROUGE-L at which an instruction is a duplicate
NEAREST_ROWS = 1500  # of a sample at most; each is compared with all rows
FIRST_COMPARED = 64  # of the rows that may be nearest; what they are like bounds the rest
ROUNDING = 1e-6
PAIRS_SHOWN, IMITATED_SHOWN = 12, 10  # shown at most

Pair: TypeAlias = tuple[float, int, int]  # similarity, row, row

# ---- figures --------------------------------------------------------------------------------------------------------


def encode_tokens(token_lists: Sequence[list[str]]) -> list[Code]:
    """Return token lists as codes that rapidfuzz compares. Equal tokens have equal numbers in all of them."""
    numbers = TokenNumbers()
    return [encode_numbers([numbers[token] for token in tokens]) for tokens in token_lists]


def find_nearest_rows(token_lists: Sequence[list[str]], most: int = NEAREST_ROWS) -> tuple[list[float], list[Pair]]:
    """Compare a sample of rows with all rows by ROUGE-L F = 2 LCS / (m + n), the Indel similarity of token strings.

    Return the similarity of each sampled row to the nearest other row, and the pairs under LIMIT, closest first, with
    each row in at most one pair.
    """
    known = [i for i, tokens in enumerate(token_lists) if tokens]
    texts = Texts([token_lists[i] for i in known])
    sample = sorted(random.Random(0).sample(range(len(known)), min(most, len(known)))) if len(known) > 1 else []
    best: list[float] = []
    pairs: set[Pair] = set()
    for row in sample:
        nearest, near_miss, other = texts.find_nearest(row)
        best.append(nearest)
        if near_miss > 0:
            a, b = sorted((known[row], known[other]))
            pairs.add((near_miss, a, b))
    chosen: list[Pair] = []
    used: set[int] = set()
    for score, a, b in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:])):
        if used.isdisjoint((a, b)):
            used |= {a, b}
            chosen.append((score, a, b))
    return best, chosen


class Texts:
    """Token lists, and for each pair of them a bound that leaves few pairs to compare.

    A bit that one signature alone has is a token of that text alone, so F <= 1 - (different bits) / (m + n).
    """

    def __init__(self, token_lists: Sequence[list[str]]):
        numbers = TokenNumbers()
        values = [[numbers[token] for token in tokens] for tokens in token_lists]
        self.codes = [encode_numbers(row) for row in values]
        self.lengths = np.array([len(row) for row in values])
        self.signatures = np.array([make_signature(row) for row in values], np.uint64)

    def find_nearest(self, row: int) -> tuple[float, float, int]:
        """Return the similarity of a row to the nearest other one, and to the nearest under LIMIT, and which that is.

        Of several the first; -1 where there is none.
        """
        different = np.bitwise_count(self.signatures ^ self.signatures[row])
        bounds = 1 - different / (self.lengths + self.lengths[row])
        bounds[row] = -1  # not itself
        first = min(FIRST_COMPARED, len(bounds))
        _, found, _ = self._compare(row, np.argpartition(bounds, -first)[-first:])
        return self._compare(row, np.flatnonzero(bounds >= max(found, 0) - ROUNDING))

    def _compare(self, row: int, others: np.ndarray) -> tuple[float, float, int]:
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        texts = [self.codes[i] for i in others.tolist()]
        scores = process.cdist([self.codes[row]], texts, scorer=Indel.normalized_similarity, dtype=np.float32)[0]
        nearest = float(scores.max())
        scores[scores > LIMIT - ROUNDING] = -1  # a fraction of under 10,000 tokens that is not 0.7 is further off
        place = int(scores.argmax())
        return nearest, float(scores[place]), int(others[place])


def split_by_common(text: str, other: str) -> list[tuple[str, bool]]:
    """Return a text as [(piece, whether it belongs to its longest common subsequence with the other text)]."""
    from rapidfuzz.distance import LCSseq

    tokens, lowered = tokenize(text), text.lower()
    a, b = encode_tokens([tokens, tokenize(other)])
    shared = {i for op in LCSseq.opcodes(a, b) if op.tag == "equal" for i in range(op.src_start, op.src_end)}
    pieces: list[tuple[str, bool]] = []
    done = place = 0
    for i, token in enumerate(tokens if len(lowered) == len(text) else ()):
        found = lowered.find(token, place)
        if found < 0:
            continue
        place = found + len(token)
        if i in shared:
            pieces += [(text[done:found], False), (text[found:place], True)]
            done = place
    return [piece for piece in [*pieces, (text[done:], False)] if piece[0]]


# ---- the section ----------------------------------------------------------------------------------------------------


def render_similarity(rows: Sequence[Row], tokens: Sequence[list[str]], rejected: Rejected | None) -> str:
    """Return the section about rejected duplicates and the closest rows that were kept."""
    best, pairs = find_nearest_rows(tokens)
    left = render_duplicates(rejected.similarities if rejected else []) + render_nearest(best)
    right = render_most_imitated(rejected.duplicate_groups if rejected else {})
    halves = "".join(f"<div>{part}</div>" for part in (left, right) if part)
    return f'<div class="halves">{halves}</div>{render_closest(rows, pairs)}' if halves else ""


def render_duplicates(similarities: Sequence[float]) -> str:
    """Return a histogram of the similarities for which rows were rejected, or "" if there are none."""
    if not similarities:
        return ""
    low = LIMIT if min(similarities) >= LIMIT - 1e-6 else 0
    note = f"{format_rows(len(similarities))} rejected as duplicates, by ROUGE-L to the instruction each resembles."
    bins = bin_evenly(similarities, low, 1, 0.02 if low else 0.05)
    return Histogram("Rejected duplicates", bins, "similarity", note=note, format_bin=format_range).draw()


def render_most_imitated(duplicate_groups: dict[str, DuplicateGroup]) -> str:
    """Return bars of the instructions with the most duplicates, or "" if there are none."""
    ranked = sorted(duplicate_groups.items(), key=lambda item: (-item[1].n, item[0]))[:IMITATED_SHOWN]
    rows = []
    for kept, (n, examples) in ranked:
        likes = "".join(
            f'<div><span class="label">{like}</span>{render_passage(clip_text(text, EXAMPLE_CHARS))}</div>'
            for like, text in examples
        )
        rows.append((clip_text(kept, 140), n, f'<div class="list"><article>{likes}</article></div>'))
    note = '<p class="note">Instructions and the number of duplicates that each attracted; the first few unfold.</p>'
    return f"<h3>Most imitated</h3>{note}{draw_bars(rows, 0, 'tall')}" if rows else ""


def format_range(first: float, end: float) -> str:
    """Return a bin of similarities as 0.70-0.75, with an en dash."""
    return f"{first:.2f}\u2013{end:.2f}"


def render_nearest(best: Sequence[float]) -> str:
    """Return a histogram of the similarity of sampled rows to the nearest other row, or "" without rows."""
    if not best:
        return ""
    over = sum(score > LIMIT - 1e-6 for score in best)
    sample = format_rows(len(best))
    note = f"ROUGE-L of kept instructions to the nearest other one, for a sample of {sample} against all."
    if over:
        note += f" {format_count(over)} of them {'is' if over == 1 else 'are'} at or over the limit of {LIMIT}."
    bins, limit = bin_evenly(best, 0, 1, 0.05), (LIMIT, f"limit {LIMIT}")
    title = "Nearest other instruction"
    return Histogram(title, bins, "similarity", note=note, limit=limit, format_bin=format_range).draw()


def render_closest(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Return cards of the closest pairs under the limit, with the words in common marked, or "" without pairs."""
    cards = []
    for score, a, b in pairs[:PAIRS_SHOWN]:
        one, two = clip_text(rows[a].instruction, EXAMPLE_CHARS), clip_text(rows[b].instruction, EXAMPLE_CHARS)
        sides = "".join(
            f'<div><span class="label">row {format_count(index + 1)}</span>'
            f'<div class="text">{mark_common(text, other)}</div></div>'
            for index, text, other in ((a, one, two), (b, two, one))
        )
        cards.append(f'<article class="pair"><div class="score">{score:.3f}</div>{sides}</article>')
    note = "Near misses in the same sample, each row once. Marked are the words in common, in order."
    head = f'<h3 class="apart">Closest pairs under the limit</h3><p class="note">{note}</p>'
    return f"{head}{''.join(cards)}" if cards else ""


def mark_common(text: str, other: str) -> str:
    """Return the HTML of a text with the words that it shares with another, in order, marked."""
    pieces = split_by_common(text, other)
    return "".join(f"<mark>{escape(piece)}</mark>" if is_common else escape(piece) for piece, is_common in pieces)

"""Near misses: the closest pairs under the limit, and the words that they share."""

import re

import pytest

pytest.importorskip("rapidfuzz")
from rapidfuzz.distance import LCSseq

from data_gen.page import similarity
from data_gen.page.run_files import Rejected, Row
from data_gen.page.similarity import find_nearest_rows, split_by_common
from data_gen.rows.tokens import tokenize
from tests.helpers.report_page import EVIL, body_lines, make, report


def test_near_misses_are_the_closest_pairs_under_the_limit(tmp_path):
    rows = make(120)[0][:120]
    page = report(tmp_path, rows)
    codes = [tokenize(row["instruction"]) for row in rows]
    like = {
        (i, j): 2 * LCSseq.similarity(codes[i], codes[j]) / (len(codes[i]) + len(codes[j]))
        for i in range(120)
        for j in range(i)
    }
    best = [max(score for pair, score in like.items() if i in pair) for i in range(120)]
    bins = page.chart("Nearest other instruction")
    assert sum(n for _, n in bins) == 120 and bins[-1][1] == sum(score > 0.95 - 1e-6 for score in best)
    over = sum(score > 0.7 - 1e-9 for score in best)
    assert f"a sample of 120 rows against all. {over} of them" in page.text and over > 1
    shown = re.findall(r'<div class="score">([\d.]+)</div>.*?>row (\d+)<.*?>row (\d+)<', page.source, re.DOTALL)
    scores = [float(score) for score, _, _ in shown]
    assert len(shown) == 12 and scores == sorted(scores, reverse=True) and all(score < 0.7 for score in scores)
    assert scores[0] == round(max(score for score in like.values() if score < 0.7 - 1e-9), 3)
    assert all(round(like[int(b) - 1, int(a) - 1], 3) == float(score) for score, a, b in shown)
    assert len({row for _, *pair in shown for row in pair}) == 24  # each row once


def test_no_more_pairs_are_shown_than_can_be_looked_at():
    rows = [Row(f"Name {n} things.", "", "", None, None, "") for n in range(30)]
    pairs = [(0.69 - n / 100, 2 * n, 2 * n + 1) for n in range(15)]
    assert similarity.render_closest(rows, pairs).count('class="score"') == 12
    assert similarity.render_closest(rows, pairs[:3]).count('class="score"') == 3


def test_a_tie_with_the_limit_is_over_it():
    tokens = [list("abcdefg123"), list("abcdefg456"), list("abcdexyz"), list("zzzzz")]
    best, pairs = find_nearest_rows(tokens)
    assert best[0] == pytest.approx(0.7) and all(score < 0.7 for score, _, _ in pairs)
    assert all({a, b} != {0, 1} for _, a, b in pairs)


def test_near_misses_do_not_depend_on_how_many_are_compared_first(monkeypatch):
    tokens = [tokenize(row["instruction"]) for row in make(300)[0][:300]] + [[], []]
    whole = find_nearest_rows(tokens)
    monkeypatch.setattr(similarity, "FIRST_COMPARED", 2)
    assert find_nearest_rows(tokens) == whole and len(whole[0]) == 300
    few, pairs = find_nearest_rows(tokens, most=20)
    assert len(few) == 20 and set(few) <= set(whole[0]) and find_nearest_rows(tokens, most=20) == (few, pairs)
    assert all(score > 0 for score, _, _ in pairs)
    assert (
        find_nearest_rows([])
        == find_nearest_rows([[]])
        == find_nearest_rows([["a"]])
        == find_nearest_rows([["a"], []])
        == ([], [])
    )


def test_words_in_common_are_marked():
    one, two = "Write a Story, about the SEA; quickly.", "Now write about a story: the sea"
    pieces = split_by_common(one, two)
    assert "".join(text for text, _ in pieces) == one
    assert [text for text, same in pieces if same] in (
        ["Write", "a", "Story", "the", "SEA"],
        ["Write", "about", "the", "SEA"],
    )
    for text in ("İstanbul'da bir gün", "", "日本 の 話", EVIL, "a" * 50):
        assert "".join(piece for piece, _ in split_by_common(text, "bir a b の")) == text


def test_pairs_are_of_the_files_rows_though_some_hold_no_words():
    texts = [
        "",
        "Name three large red birds",
        "!",
        "Name four large red birds",
        "Say it",
        "",
        "Name three old red birds",
    ]
    best, pairs = find_nearest_rows([tokenize(text) for text in texts])
    assert best == pytest.approx([0.8, 0.8, 0, 0.8], abs=1e-6)
    assert pairs == [(pytest.approx(0.6), 3, 6)]  # 0.8 is over the limit, and "Say it" shares nothing
    best, pairs = find_nearest_rows([tokenize(text) for text in ["", "Name a red bird", "", "Draw a red hen now"]])
    assert best == pytest.approx([4 / 9, 4 / 9]) and pairs == [(pytest.approx(4 / 9), 1, 3)]


def test_what_is_shown_of_similarities_is_kept_whole(snapshot):
    rows = [
        Row(text, "", "x", None, None, "") for text in ("Name a red bird", "Draw a red hen now", "Draw a blue hen now")
    ]
    rejected = Rejected()
    for score, kept in ((0.7, "Name a red bird"), (0.95, "Name a red bird"), (1.0, "Draw it")):
        rejected.add({"reason": "duplicate", "duplicate_of": kept, "similarity": score, "instruction": "Like <it>"})
    parts = [similarity.render_similarity(rows, [tokenize(row.instruction) for row in rows], rejected)]
    parts += [similarity.render_duplicates([0.7 - 5e-7, 0.9]), similarity.render_duplicates([0.4, 0.9])]
    parts += [similarity.render_nearest([0.7, 0.2]), similarity.render_nearest([0.7, 0.71, 1.0])]
    assert body_lines("\n".join(parts)) == snapshot

"""Exact ROUGE-L de-duplication, against comparing all pairs."""

import json
import random
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.own_rows import alpaca_rows
from tests.helpers.run import ROOT

pytest.importorskip("rapidfuzz")
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from data_gen.rows import rouge
from data_gen.rows.rouge import Deduplicator, rouge_l
from data_gen.rows.tokens import tokenize

# ---- the references -------------------------------------------------------------------------------------------------


def lcs_table(a, b):
    """Return the length of the longest common subsequence by the textbook's table."""
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def all_pairs(tokens, lcs):
    """Return what add returns for each list of tokens, by comparison with every kept list. lcs(i, j) takes indices."""
    kept, answers = [], []
    for i, a in enumerate(tokens):
        similar = []
        for index, j in enumerate(kept):
            length, total = lcs(i, j), len(a) + len(tokens[j])
            if 20 * length >= 7 * total:
                similar.append((-Fraction(2 * length, total) if total else -1, index))
        answers.append(min(similar)[1] if similar else None)
        if not similar:
            kept.append(i)
    return answers


def by_table(texts):
    tokens = [tokenize(text) for text in texts]
    return all_pairs(tokens, lambda i, j: lcs_table(tokens[i], tokens[j]))


def by_matrix(texts):
    """Return what add returns for each text, by rapidfuzz's LCS of lists of numbers: faster than by_table."""
    tokens, numbers = [tokenize(text) for text in texts], {}
    lists = [[numbers.setdefault(token, len(numbers)) for token in row] for row in tokens]
    lcs = process.cdist(lists, lists, scorer=LCSseq.similarity, dtype=np.int32).tolist()
    return all_pairs(tokens, lambda i, j: lcs[i][j])


def streamed(texts):
    deduplicator, answers = Deduplicator(), []
    for text in texts:
        found, n = deduplicator.find(text), len(deduplicator)
        answers.append(deduplicator.add(text))
        assert found == answers[-1], "find says something else than add"
        assert len(deduplicator) == n + (found is None), "find kept a text, or add did not"
    assert deduplicator.texts == [text for text, found in zip(texts, answers, strict=True) if found is None]
    return answers


@pytest.fixture
def rebuilds(monkeypatch):
    """Return a function that sets FIRST_REBUILD and GROWTH."""

    def set_them(first, growth=2):
        monkeypatch.setattr(rouge, "FIRST_REBUILD", first)
        monkeypatch.setattr(rouge, "GROWTH", growth)

    return set_them


# ---- decisions ------------------------------------------------------------------------------------------------------


@st.composite
def streams(draw, alphabet, joiner=" ", longest=14):
    """Draw texts of a few tokens, many of them edits of earlier ones, so that many F are about 0.7."""
    token = st.sampled_from(alphabet)
    rows = []
    for _ in range(draw(st.integers(1, 25))):
        if rows and draw(st.booleans()):
            row = list(draw(st.sampled_from(rows)))
            for _ in range(draw(st.integers(0, 5))):
                at = draw(st.integers(0, len(row)))
                row[at : at + draw(st.integers(0, 2))] = draw(st.lists(token, max_size=2))
        else:
            row = draw(st.lists(token, max_size=longest))
        rows.append(row)
    return [joiner.join(row) for row in rows]


ALPHABETS = {
    "two": ("ab", " "),
    "four": ("abcd", " "),
    "thirty": ([f"w{i}" for i in range(30)], " "),
    "chinese": ("你好世界人工智能机器学习的是", ""),
    "japanese": ("日本語のカタカナとひらがな", ""),
    "thai": ("กขคงจเแาำี่้", ""),
    "hindi": (["नमस्ते", "दुनिया", "हिन्दी", "भाषा", "कि", "की", "का", "में"], " "),
    "emoji": (["👍", "👍🏽", "❤️", "👩‍💻", "🇫🇷", "🇩🇪", "🎉", "±"], ""),
    "mixed": (["hello", "世", "界", "🎉", "Straße", "naïve", "नमस्ते", "42", "-", "_"], " "),
}


@pytest.mark.parametrize("name", ALPHABETS)
def test_decisions_on_tiny_alphabets(name, rebuilds):
    rebuilds(3)

    @given(streams(*ALPHABETS[name]))
    @settings(deadline=None, max_examples=60, derandomize=True)
    def check(texts):
        assert streamed(texts) == by_table(texts)

    check()


@given(st.lists(st.sampled_from(["", " ", "...", "a", "A", "b", "a a", "a b", "你", "—", "🎉", "🎉 a"]), max_size=12))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_nothing_and_one_token(texts):
    assert streamed(texts) == by_table(texts)


def test_empty_texts_are_duplicates_of_each_other_alone():
    assert streamed(["a", "", "?!", "b", "—"]) == [None, None, 1, None, 1]
    assert rouge_l("", "?!") == 1 and rouge_l("", "a") == 0


def sentence(prefix, n):
    return [f"{prefix}{i}" for i in range(n)]


def test_exact_ties_and_one_below():
    same = sentence("s", 7)
    kept = same + sentence("a", 3)
    assert streamed([" ".join(kept), " ".join(same + sentence("b", 3))]) == [None, 0]  # 14 of 20
    assert streamed([" ".join(kept), " ".join(same[1:] + sentence("b", 4))]) == [None, None]
    assert streamed([" ".join(kept), " ".join(same + sentence("b", 4))]) == [None, None]  # 14 of 21
    long = sentence("s", 700)  # one token in 2,000 below the tie
    assert streamed([" ".join(long + sentence("a", 300)), " ".join(long + sentence("b", 300))]) == [None, 0]
    assert streamed([" ".join(long + sentence("a", 300)), " ".join(long + sentence("b", 301))]) == [None, None]


@pytest.mark.parametrize("posted_by", ["add", "rebuild"])
def test_every_pair_of_lengths_at_the_threshold_and_below(posted_by, rebuilds):
    """Two texts share their most frequent tokens, so the index finds them at the last place where it may look."""
    for m, n in product(range(1, 23), repeat=2):
        least = -(-7 * (m + n) // 20)
        for n_shared in {least, least - 1}:
            if not 1 <= n_shared <= min(m, n):
                continue
            same = sentence("s", n_shared)
            rebuilds(n_shared + (posted_by == "rebuild"), 100)
            deduplicator = Deduplicator()
            for token in same:  # no duplicates, and each makes a token of `same` more frequent
                assert deduplicator.add(" ".join([token, *sentence(f"f{token}x", 49)])) is None
            assert deduplicator.add(" ".join(same + sentence("a", m - n_shared))) is None
            found = deduplicator.add(" ".join(sentence("b", n - n_shared) + same))
            assert found == (n_shared if n_shared == least else None), (m, n, n_shared)


def test_the_most_similar_and_of_equals_the_first():
    words = sentence("w", 10)
    low, high = words[:7] + sentence("a", 3), words[1:] + sentence("b", 5)  # F 0.7 and 0.75, of each other 0.5
    short = words[:6]  # F 12/16, as 18/24 of high
    texts = {name: " ".join(row) for name, row in (("low", low), ("high", high), ("short", short))}
    query = " ".join(words)
    assert streamed([texts["low"], texts["high"], query]) == [None, None, 1]
    assert streamed([texts["high"], texts["low"], query]) == [None, None, 0]
    assert streamed([texts["high"], texts["short"], query]) == [None, None, 0]
    assert streamed([texts["short"], texts["high"], query]) == [None, None, 0]
    equal = [" ".join(words[:7] + sentence("c", 3)), " ".join(words[3:] + sentence("d", 3))]
    assert streamed([*equal, query]) == streamed([*equal[::-1], query]) == [None, None, 0]


def test_order_of_tokens_matters():
    words = sentence("w", 10)
    assert streamed([" ".join(words), " ".join(words[::-1])]) == [None, None]
    assert streamed([" ".join(words), " ".join(words[3:] + words[:3])]) == [None, 0]
    assert streamed([" ".join(words), " ".join(words[4:] + words[:4])]) == [None, None]


def test_repeats_count(rebuilds):
    rebuilds(2)
    texts = ["a " * n for n in range(1, 60)] + ["a b " * n for n in range(1, 20)] + ["b a b " * n for n in range(1, 20)]
    random.Random(0).shuffle(texts)
    assert streamed(texts) == by_table(texts)


# ---- real texts -----------------------------------------------------------------------------------------------------


def mutated(texts, n, generator):
    """Return n edits of texts: halves of two joined, words replaced, repeated or left out."""
    rows = [text.split() for text in texts]
    words = [word for row in rows for word in row]
    made = []
    for _ in range(n):
        a, b = generator.choice(rows), generator.choice(rows)
        row = list(a) if generator.random() < 0.7 else a[: len(a) // 2] + b[len(b) // 2 :]
        rate = generator.uniform(0, 0.6)
        for at in range(len(row) - 1, -1, -1):
            if generator.random() < rate:
                row[at : at + 1] = generator.choice(([], [generator.choice(words)], [row[at], row[at]]))
        made.append(" ".join(row))
    return made


@pytest.fixture(scope="module")
def seed_instructions():
    lines = (ROOT / "data_gen" / "seed_tasks.jsonl").read_text().splitlines()
    return [json.loads(line)["instruction"] for line in lines]


def test_a_stream_of_edits_that_crosses_rebuilds(seed_instructions, monkeypatch):
    compared, extract_one = 0, process.extractOne

    def counted(code, found, **options):
        nonlocal compared
        compared += len(found)
        return extract_one(code, found, **options)

    texts = mutated(seed_instructions[:60], 2400, random.Random(1))
    expected = by_matrix(texts)
    assert streamed(texts) == expected
    kept = expected.count(None)
    assert kept > 1.2 * rouge.FIRST_REBUILD * rouge.GROWTH and len(texts) - kept > 500, "too few to tell"

    monkeypatch.setattr(process, "extractOne", counted)
    assert list(map(Deduplicator().add, texts)) == expected
    share = compared / (len(texts) * kept)
    assert 0.001 < share < 0.0039, share  # 0.38%; 1.4% with signatures of 8 bits
    compared = 0
    monkeypatch.setattr(rouge, "make_signature", lambda values: 0)
    assert list(map(Deduplicator().add, texts)) == expected
    share = compared / (len(texts) * kept)  # 1.4%; 2% without one of the bounds or with new tokens last, 26% with ranks
    assert 0.005 < share < 0.018, share  # by falling frequency


@pytest.mark.parametrize("first, growth", [(1, 2), (2, 3), (7, 2)])
def test_when_it_rebuilds_changes_nothing(first, growth, rebuilds, seed_instructions):
    texts = mutated(seed_instructions[:12], 250, random.Random(first))
    rebuilds(first, growth)
    assert streamed(texts) == by_matrix(texts)


@pytest.mark.parametrize("fields", [("instruction",), ("output",), ("instruction", "input", "output")])
def test_many_rows_are_decided_as_by_all_pairs(fields, rebuilds):
    rebuilds(100)
    rows = alpaca_rows()
    texts = [" ".join(row[field] for field in fields) for row in rows]
    answers = streamed(texts)
    assert len(answers) == 999 and answers == by_matrix(texts)
    assert any(found is not None for found in answers) or fields != ("instruction",)


def test_long_texts_near_the_threshold(rebuilds):
    """The rows have hundreds of tokens, most of them repeated."""
    rebuilds(20)
    generator = random.Random(2)
    words = [f"w{int(generator.paretovariate(0.6)) % 400}" for _ in range(3000)]
    bases = [" ".join(words[at : at + generator.randrange(150, 400)]) for at in range(0, 2000, 250)]
    texts = mutated(bases, 300, generator)
    answers = streamed(texts)
    assert answers == by_matrix(texts)
    assert 50 < answers.count(None) < 290


@pytest.mark.parametrize("end", [0xD7F0, 0x10FFF0])
def test_more_tokens_than_characters(end, rebuilds, seed_instructions):
    """Token numbers skip the surrogates and go beyond the last character."""
    rebuilds(50, 100)
    texts = mutated(seed_instructions[:20], 200, random.Random(3))
    deduplicator = Deduplicator()
    first = [deduplicator.add(text) for text in texts[:10]]
    deduplicator._numbers.end = end
    assert first + [deduplicator.add(text) for text in texts[10:]] == by_matrix(texts)
    assert deduplicator._numbers.end > (0xE000 if end < 0xE000 else 0x110000)
    strings = [code for code in deduplicator._codes if isinstance(code, str)]
    "".join(strings).encode()  # raises for a surrogate
    assert len(strings) > 10 and (end < 0xE000) == (len(strings) == len(deduplicator))


# ---- similarities ---------------------------------------------------------------------------------------------------


def test_emoji_are_told_apart():
    assert streamed(["👍👍🏽🎉", "😀😃😄", "😀😃😄", "👍👍🏽🎉🎉"]) == [None, None, 1, 0]


def test_rouge_l_is_symmetric_and_exact():
    assert rouge_l("a b c d", "a c d e f") == rouge_l("a c d e f", "a b c d") == 6 / 9
    assert rouge_l("Hello, world", "hello world!") == 1

"""Tokens: rouge_score's for ASCII, words of letters and marks for any other script, and emoji whole."""
# ruff: noqa: RUF001 (texts of many scripts are the point)

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.rows.tokens import MARKS, classify_character, cut_marks, tokenize


def rouge_score_tokens(text):
    """Return the tokens of rouge_score.tokenize.tokenize without a stemmer."""
    text = re.sub(r"[^a-z0-9]+", " ", text.lower())
    return [token for token in re.split(r"\s+", text) if re.match(r"^[a-z0-9]+$", token)]


@given(st.text(st.characters(max_codepoint=127)))
@settings(max_examples=300, derandomize=True)
def test_ascii_tokens_are_those_of_rouge_score(text):
    assert tokenize(text) == rouge_score_tokens(text)


@given(st.text(st.characters(max_codepoint=127)))
@settings(max_examples=200, derandomize=True)
def test_a_character_beyond_ascii_changes_no_other_token(text):
    assert tokenize(text + " é") == [*tokenize(text), "é"]
    assert tokenize(text + " —") == tokenize(text)


TOKENS = {
    "snake_case isn't 3.14": "snake case isn t 3 14",
    "Don’t stop—NOW": "don t stop now",
    "Café CAFE\u0301 STRASSE Straße": "café café strasse strasse",
    "ＦＵＬＬ width ①": "full width 1",
    "नमस्ते दुनिया, कि की": "नमस्ते दुनिया कि की",
    "தமிழ் மொழி": "தமிழ் மொழி",
    "Привет, МИР": "привет мир",
    "안녕 세계": "안녕 세계",
    "مي\u200cخواهم": "ميخواهم",
    "क्\u200dष co\u00adop": "क्ष coop",
    "你好, abc世界123": "你 好 abc 世 界 123",
    "日本の「カタカナ」": "日 本 の カ タ カ ナ",
    "ﾊﾟﾝ": "パ ン",
    "ดี่ไป ๑๒": "ดี่ ไ ป ๑๒",
    "မြန်မာ ខ្មែរ བོད": "မြ န် မာ ខ្ មែ រ བོ ད",
    "👍👍🏽 🎉!": "👍 👍🏽 🎉",
    "❤️❤": "❤ ❤",
    "👩‍💻👩🏽‍💻": "👩‍💻 👩🏽‍💻",
    "🇫🇷🇩🇪🇫": "🇫🇷 🇩🇪 🇫",
    "🏴\U000e0067\U000e0062\U000e007f🏴": "🏴\U000e0067\U000e0062\U000e007f 🏴",
    "x² ± €5 →": "x2 ± 5 →",
    "\U0001faff\ue000 \ud800": "\U0001faff \ue000",  # unknown to this Unicode, private, half a pair
    "é_é": "é é",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_of_many_scripts(text):
    assert tokenize(text) == TOKENS[text].split(" ")


@given(st.text())
@settings(max_examples=300, derandomize=True)
def test_tokens_of_any_text(text):
    tokens = tokenize(text)
    assert all(tokens)
    assert tokenize(" ".join(tokens)) == tokens  # normal forms stay as they are


UNSPACED = [
    0x0E01, 0x0EC0, 0x0F40, 0x1000, 0x1780, 0x1950, 0x1980, 0x1A20, 0x1B05, 0x3042, 0x30A2, 0x3105, 0x31A0, 0x31F0,
    0x3400, 0x4DB5, 0x4E00, 0x9FEF, 0xA984, 0xA9E0, 0xAA60, 0xAA80, 0xF900, 0xFAD9, 0x17000, 0x18B00, 0x1B000, 0x1B170,
    0x20000, 0x2A6D6, 0x30000,
]  # fmt: skip


@pytest.mark.parametrize("code", UNSPACED, ids=hex)
def test_a_letter_of_a_script_without_spaces_is_a_token(code):
    assert len(tokenize(chr(code) * 2)) == 2


@pytest.mark.parametrize("code", [0x0D05, 0x10D0, 0x1820, 0x1C00, 0xAC00, 0xD7A3, 0xAAE0, 0xFB13], ids=hex)
def test_letters_of_other_scripts_make_words(code):
    assert len(tokenize(chr(code) * 2)) == 1


@pytest.mark.parametrize("n", [MARKS, MARKS + 1, 3 * MARKS])
def test_of_many_marks_the_first_are_kept_and_what_is_around_them(n):
    marks = "\u0301" * min(n, MARKS)
    assert cut_marks("ab" + "\u0301" * n + "cd" + "\u0301" * n + "ef") == f"ab{marks}cd{marks}ef"


@pytest.mark.parametrize(
    "first, last, letter, around",
    [
        (0x1F1E6, 0x1F1FF, "f", "s"),
        (0x1F3FB, 0x1F3FF, "t", "s"),
        (0xE0020, 0xE007F, "t", "-s"),
        (0x200D, 0x200D, "j", "-"),
    ],
)
def test_the_ends_of_the_ranges_of_emoji(first, last, letter, around):
    assert {classify_character(chr(code)) for code in range(first, last + 1)} == {letter}
    assert {classify_character(chr(first - 1)), classify_character(chr(last + 1))} <= set(around)

"""Exact ROUGE-L de-duplication of a stream of texts.

    python -m data_gen.dedup rows.json --out kept.json --rejected dropped.jsonl

ROUGE-L F of token lists of lengths m and n is 2 LCS / (m + n), LCS their longest common subsequence (Lin 2004,
aclanthology.org/W04-1013). Two texts are duplicates iff F >= 0.7, decided in integers: 20 LCS >= 7 (m + n).

All pairs would take hours, so an index finds the few that can be duplicates (prefix filter with positions: Bayardo et
al. 2007, doi.org/10.1145/1242572.1242591; Xiao et al. 2011, doi.org/10.1145/2000824.2000825), and only they are
compared. Let the tokens of every text stand in one order, rarest first, the r-th repeat of a token a token of its own.
If two texts share `need` tokens, and p and q are the places of the first that they share, then need <= m - p and
need <= n - q. With need >= LCS >= 7 (m + n) / 20 that is

    7 n <= 13 m - 20 p    and    7 m <= 13 n - 20 q,

of which each text knows its right side in advance: its reach at that place. A text is found under the tokens at which
its reach is not less than 7 times the shortest length that could match; they are its about 6/13 rarest.
"""

import re
import sys
import time
import unicodedata
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from data_gen.cli import DataError, Failure, Parser, UsageError, json_line, read_rows, run, write_whole

# ---- tokens ---------------------------------------------------------------------------------------------------------

ASCII_WORD = re.compile(r"[a-z0-9]+")
ZWJ = "\u200d"  # joins emoji into one, and letters of Indic scripts
# Characters that change no meaning: soft hyphen, non-joiner, direction marks, variation selectors, byte order mark.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u200c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
# First and last code points of blocks whose scripts put no space between words (unicode.org/Public/UNIDATA/Blocks.txt).
UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # Han radicals and punctuation, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),  # Han
    (0xA980, 0xA9FF),  # Javanese, Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0x16FE0, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B2FF),  # Kana, Nushu
    (0x20000, 0x3FFFF),  # Han
)
STARTS = [first for first, _ in UNSPACED]


def kind_of(char: str) -> str:
    """One letter that says what part of a token a character can be: w of a word, u unspaced, m mark, s symbol,
    f half a flag, t what only modifies a symbol, j joiner, - none."""
    code, category = ord(char), unicodedata.category(char)
    if char == ZWJ:
        return "j"
    if 0x1F1E6 <= code <= 0x1F1FF:
        return "f"
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:  # skin tones; the tags of flags
        return "t"
    if category[0] == "M":
        return "m"
    if category[0] == "L" or category == "Nl":
        at = bisect_right(STARTS, code) - 1
        return "u" if at >= 0 and code <= UNSPACED[at][1] else "w"
    if category[0] == "N":
        return "w"
    # What this Python's Unicode does not know yet, or is private, is better a token of its own than nothing.
    return "s" if category in ("So", "Cn", "Co") or (category == "Sm" and code > 127) else "-"


class Kinds(dict):
    """For str.translate: code point -> kind, worked out once each."""

    def __missing__(self, code):
        self[code] = kind = kind_of(chr(code))
        return kind


KINDS = Kinds()
TOKEN = re.compile("w[wmj]*|u[mj]*|ff?|[st][mt]*(?:js[mt]*)*")  # over kinds


def tokenize(text: str) -> list[str]:
    """The tokens that ROUGE-L compares. Linear in the text's length.

    ASCII: rouge_score's (github.com/google-research/google-research/blob/master/rouge_score/tokenize.py) without its
    stemmer: lower-case runs of a-z and 0-9. Else, of the text in NFKC and casefolded: a run of letters, numbers and
    marks; in scripts without spaces each letter with its marks; a symbol, such as an emoji with all that modifies it.
    """
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold())
    tokens = [text[match.start() : match.end()] for match in TOKEN.finditer(text.translate(KINDS))]
    if ZWJ in text:
        tokens = [token.replace(ZWJ, "") if unicodedata.category(token[0]) != "So" else token for token in tokens]
    return tokens


# ---- the rule -------------------------------------------------------------------------------------------------------


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F = 2 LCS / (m + n) of two texts; 1 for two without tokens. O(m n / 64)."""
    return 1 - Indel.normalized_distance(tokenize(a), tokenize(b))


def is_duplicate(lcs: int, m: int, n: int) -> bool:
    """F >= 0.7 without rounding: in floats 1 - 6 / 20 is over 0.7 and 2 * 7 / 20 is not."""
    return 20 * lcs >= 7 * (m + n)


class Numbers(dict):
    """Tokens and their repeats -> numbers from 0, in order of appearance. Surrogates are left out."""

    def __init__(self):
        super().__init__()
        self.end = 0  # the next number

    def __missing__(self, key):
        self[key] = number = self.end
        self.end = 0xE000 if number == 0xD7FF else number + 1
        return number


class Deduplicator:
    """Keeps texts no two of which are duplicates: 20 LCS < 7 (m + n).

    deduplicator = Deduplicator()
    kept = [text for text in texts if deduplicator.add(text) is None]
    """

    def __init__(self):
        self.texts = []  # kept ones

    def __len__(self):
        return len(self.texts)

"""Tokens of a text in any script, as ROUGE-L compares them."""

import re
import unicodedata
from bisect import bisect_right
from functools import lru_cache

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
UNSPACED_STARTS = [first for first, _ in UNSPACED]


def classify_character(char: str) -> str:
    """Return one letter for the part of a token that a character can be.

    w: part of a word; u: a letter of a script without spaces; m: mark; s: symbol; f: half a flag; t: modifier of a
    symbol; j: joiner; -: no part.
    """
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
        block = bisect_right(UNSPACED_STARTS, code) - 1
        return "u" if block >= 0 and code <= UNSPACED[block][1] else "w"
    if category[0] == "N":
        return "w"
    # A character that this Python's Unicode does not know yet, or a private one, becomes a token of its own.
    return "s" if category in ("So", "Cn", "Co") or (category == "Sm" and code > 127) else "-"


class CharacterClasses(dict[int, str]):
    """Code point -> its letter of classify_character, computed at first use. A table for str.translate."""

    def __missing__(self, code: int) -> str:
        self[code] = letter = classify_character(chr(code))
        return letter


CLASSES = CharacterClasses()
MARKS = 30  # of one letter that are read, as in Unicode's stream-safe format: normalizing a run takes its square
FLOOD = re.compile(f"(?<=m{{{MARKS}}})m+")  # over the letters of classify_character
TOKEN = re.compile("w[wmj]*|u[mj]*|ff?|[st][mt]*(?:js[mt]*)*")  # over the letters of classify_character


def tokenize(text: str) -> list[str]:
    """Return the tokens that ROUGE-L compares. The time is linear in the text's length.

    The tokens of an ASCII text are its lower-case runs of a-z and 0-9, as in rouge_score without its stemmer
    (github.com/google-research/google-research/blob/master/rouge_score/tokenize.py). Any other text is normalized to
    NFKC and casefolded; a token is then a run of letters, numbers and marks, one letter with its marks in a script
    without spaces, or a symbol, such as an emoji with its modifiers.
    """
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    text = cut_marks(INVISIBLE.sub("", text))
    text = cut_marks(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))
    tokens = [text[match.start() : match.end()] for match in TOKEN.finditer(text.translate(CLASSES))]
    if ZWJ in text:
        tokens = [token if CLASSES[ord(token[0])] == "s" else token.replace(ZWJ, "") for token in tokens]
    return tokens


@lru_cache(maxsize=4)
def tokenize_again(text: str) -> tuple[str, ...]:
    """Return what tokenize() returns, at once for one of the last texts: a task's instruction is read five times."""
    return tuple(tokenize(text))


def cut_marks(text: str) -> str:
    """Return the text without the marks beyond the first MARKS of a run."""
    letters = text.translate(CLASSES)
    if "m" * (MARKS + 1) not in letters:
        return text
    parts, end = [], 0
    for flood in FLOOD.finditer(letters):
        parts.append(text[end : flood.start()])
        end = flood.end()
    return "".join([*parts, text[end:]])

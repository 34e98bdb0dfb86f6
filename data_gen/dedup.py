"""Exact ROUGE-L de-duplication of a stream of texts.

    python -m data_gen.dedup rows.json --out kept.json --rejected dropped.jsonl

ROUGE-L F of token lists of lengths m and n is 2 LCS / (m + n), LCS their longest common subsequence (Lin 2004,
aclanthology.org/W04-1013). Two texts are duplicates iff F >= 0.7, decided in integers: 20 LCS >= 7 (m + n).

An index finds the few pairs that can be duplicates, and only they are compared (prefix filter with positions: Bayardo
et al. 2007, doi.org/10.1145/1242572.1242591; Xiao et al. 2011, doi.org/10.1145/2000824.2000825). Let the tokens of
every text stand in one order, rarest first. If p and q are the first places of the first token that two texts share,
they share at most m - p and n - q tokens. Duplicates share 7 (m + n) / 20 or more, so

    7 n <= 13 m - 20 p    and    7 m <= 13 n - 20 q,

of which each text knows its right side in advance: its reach at that place. A text is found under the tokens at which
its reach is not less than 7 times the shortest length that could match: about the 46% (6/13) that are its rarest.
"""

import re
import sys
import time
import unicodedata
from array import array
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from data_gen.base.cli import DataError, Failure, Parser, UsageError, json_line, read_rows, run, write_whole

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
        tokens = [token if KINDS[ord(token[0])] == "s" else token.replace(ZWJ, "") for token in tokens]
    return tokens


# ---- the rule -------------------------------------------------------------------------------------------------------


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F = 2 LCS / (m + n) of two texts; 1 for two without tokens. O(m n / 64)."""
    numbers = Numbers()
    a, b = ([numbers[token] for token in tokenize(text)] for text in (a, b))
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a or b else 1.0


def is_duplicate(lcs: int, m: int, n: int) -> bool:
    """F >= 0.7 without rounding: floats get ties such as 7 of 10 and 10 right or wrong by the formula's form."""
    return 20 * lcs >= 7 * (m + n)


class Numbers(dict):
    """Tokens -> numbers from 0, in order of appearance. Surrogates are left out."""

    def __init__(self):
        super().__init__()
        self.end = 0  # the next number

    def __missing__(self, key):
        self[key] = number = self.end
        self.end = 0xE000 if number == 0xD7FF else number + 1
        return number


# ---- the index ------------------------------------------------------------------------------------------------------

LOW = 0.7 - 1e-9  # so that no rounding costs a tie; the integers decide
BITS = 32  # of a posting are the text's index, those above are its reach
FIRST_REBUILD, GROWTH = 256, 4  # texts kept at the first rebuild, and how many times as many at the next


def reaches_of(m: int) -> range:
    """13 m - 20 p at the places p = 0, 1, ... whose tokens a text of length m is found under."""
    shortest = -(-7 * m // 13)
    return range(13 * m, 7 * shortest - 1, -20)


def coded(values):
    """Numbers as a string of as many characters, which compare fastest; past the last character (1.1 million distinct
    tokens) as a tuple, which rapidfuzz compares with strings by the same numbers."""
    try:
        return "".join(map(chr, values))
    except ValueError:
        return tuple(values)


def decoded(code):
    return list(map(ord, code)) if isinstance(code, str) else list(code)


class Deduplicator:
    """Keeps texts no two of which are duplicates: 20 LCS < 7 (m + n).

        deduplicator = Deduplicator()
        kept = [text for text in texts if deduplicator.add(text) is None]

    Decisions and indices are those of comparing with every kept text. O(m log m) a text and O(m n / 64) a
    candidate, of which there are some 50 at 52,000 kept; benchmarks/dedup.json has the time of 63,000 instructions.
    """

    def __init__(self):
        self.texts = []  # kept ones
        self._codes = []  # their tokens' numbers
        self._lengths = np.empty(64, np.int64)  # their 7 n, with room to grow
        self._index_of = {}  # code -> index
        self._numbers = Numbers()
        self._ranks = []  # number -> rank, the rarest first; below 0 for tokens newer than the last rebuild
        self._postings = {}  # rank -> array of reach << BITS | index: the texts found under it
        self._rebuild_at = FIRST_REBUILD

    def __len__(self):
        return len(self.texts)

    def add(self, text: str) -> int | None:
        """Keeps text and returns None; or, where it is a duplicate, returns the index in the order of keeping of the
        kept text with the largest F, the first such."""
        code, places = self._prepared(text)
        found = self._find(code, places)
        if found is None:
            self._keep(text, code, places)
        return found

    def find(self, text: str) -> int | None:
        """What add would return, without keeping the text."""
        return self._find(*self._prepared(text))

    def _prepared(self, text):
        numbers, ranks = self._numbers, self._ranks
        values = [numbers[token] for token in tokenize(text)]
        ranks += range(-1 - len(ranks), -1 - numbers.end, -1)
        return coded(values), self._places(values)

    def _places(self, values):
        """The ranks that a text is found under, each with the reach at its first place."""
        ranks = self._ranks
        ordered = sorted([ranks[value] for value in values])
        reaches = reaches_of(len(values))
        return dict(zip(ordered[len(reaches) - 1 :: -1], reaches[::-1], strict=False))  # of repeats the first stays

    def _find(self, code, places):
        if code in self._index_of:
            return self._index_of[code]
        postings = self._postings
        shared = [(postings[rank], reach) for rank, reach in places.items() if rank in postings]
        if not shared:
            return None
        lists, reaches = zip(*shared, strict=True)
        postings = np.frombuffer(b"".join(lists), np.int64)
        near = postings >= 7 * len(code) << BITS
        found = postings[near] & (1 << BITS) - 1
        reaches = np.array(reaches).repeat([len(posting) for posting in lists])[near]
        found = sorted(set(found[self._lengths[found] <= reaches].tolist()))
        codes = self._codes
        best = process.extractOne(  # the first of the most similar; equal fractions are equal floats
            code, [codes[i] for i in found], scorer=Indel.normalized_similarity, processor=None, score_cutoff=LOW
        )
        if best is None or not is_duplicate(LCSseq.similarity(code, best[0]), len(code), len(best[0])):
            return None
        return found[best[2]]

    def _keep(self, text, code, places):
        index = len(self.texts)
        self.texts.append(text)
        self._codes.append(code)
        self._index_of[code] = index
        if index == len(self._lengths):
            self._lengths = np.concatenate((self._lengths, np.empty_like(self._lengths)))
        self._lengths[index] = 7 * len(code)
        if len(self.texts) == self._rebuild_at:
            self._rebuild_at *= GROWTH
            self._rebuild()
        else:
            self._post(index, places)

    def _post(self, index, places):
        for rank, reach in places.items():
            posting = self._postings.get(rank)
            if posting is None:
                posting = self._postings[rank] = array("q")
            posting.append(reach << BITS | index)

    def _rebuild(self):
        """Ranks the numbers by how many tokens of kept texts have them, and posts all kept texts again."""
        texts = [decoded(code) for code in self._codes]
        counts = Counter()
        for values in texts:
            counts.update(values)
        by_count = sorted(range(len(self._ranks)), key=lambda number: (counts[number], -number))
        for rank, number in enumerate(by_count):
            self._ranks[number] = rank
        self._postings = {}
        for index, values in enumerate(texts):
            self._post(index, self._places(values))


# ---- the command ----------------------------------------------------------------------------------------------------

SUFFIXES = (".json", ".jsonl")
TELL_EVERY_S = 10  # where no terminal shows a bar


def main(argv: list[str]) -> None:
    parser = Parser("dedup", "Keeps the first of rows whose ROUGE-L F is 0.7 or more, exactly.")
    parser.add_argument("file", help="Alpaca JSON (a list) or JSONL")
    parser.add_argument("--out", required=True, help="where the kept rows go: .json or .jsonl")
    parser.add_argument("--field", default="instruction", help="the text that is compared")
    parser.add_argument("--rejected", help="JSONL of the dropped rows, what they duplicate and how similar they are")
    args = parser.parse_args(argv)
    check_paths(args)
    rows = read_rows(args.file)
    texts = [text_of(row, args.field, f"{args.file}, row {number}") for number, row in enumerate(rows, 1)]

    began, deduplicator, kept, dropped = time.monotonic(), Deduplicator(), [], []
    for at, text in enumerate(told(texts)):
        found = deduplicator.add(text)
        if found is None:
            kept.append(at)
        else:
            dropped.append((at, kept[found]))
    seconds = time.monotonic() - began

    lines = [json_line(rows[at]) for at in kept]
    if args.out.endswith(".json"):
        lines = ["[\n", ",\n".join(line.rstrip("\n") for line in lines), "\n]\n"]
    write(args.out, lines)
    if args.rejected:
        write(args.rejected, (json_line(rejection(rows, texts, *pair)) for pair in dropped))
    print(f"{len(rows):,} rows, {len(kept):,} kept, {len(dropped):,} dropped in {seconds:.1f} s: {args.out}")


def check_paths(args):
    problems = []
    if Path(args.out).suffix not in SUFFIXES:
        problems.append(f"--out {args.out}: the suffix says the format; wanted {' or '.join(SUFFIXES)}")
    for name, path in (("--out", args.out), ("--rejected", args.rejected)):
        if path and not Path(path).absolute().parent.is_dir():
            problems.append(f"{name} {path}: there is no such folder")
    if args.rejected and Path(args.rejected).absolute() in (Path(args.out).absolute(), Path(args.file).absolute()):
        problems.append(f"--rejected {args.rejected} is a file of its own, not FILE or --out")
    if problems:
        raise UsageError("; ".join(problems))


def text_of(row, field, where):
    if field not in row:
        raise DataError(f"{where}: no {field!r} among {', '.join(map(repr, row)) or 'no keys'}; --field names another")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field!r} is of type {type(row[field]).__name__}, wanted a string")
    return row[field]


def rejection(rows, texts, at, first):
    """A dropped row and what it duplicates, with their places in the file from 1."""
    return {
        "row": at + 1,
        "duplicates_row": first + 1,
        "similarity": rouge_l(texts[at], texts[first]),
        "duplicates": texts[first],
        "dropped": rows[at],
    }


def told(texts):
    """The texts; how far they are is told on stderr, by a bar on a terminal and else by a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(texts, "comparing", console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for at, text in enumerate(texts):
        if time.monotonic() - last >= TELL_EVERY_S:
            last = time.monotonic()
            print(f"{at:,} of {len(texts):,} rows compared", file=sys.stderr, flush=True)
        yield text


def write(path, lines):
    try:
        write_whole(path, lines)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error}") from error


if __name__ == "__main__":
    run(main)

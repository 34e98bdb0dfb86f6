"""Exact ROUGE-L de-duplication of a stream of texts: the rule, and an index of the kept texts.

ROUGE-L F of token lists of lengths m and n is 2 LCS / (m + n), where LCS is the length of their longest common
subsequence (Lin 2004, aclanthology.org/W04-1013). Two texts are duplicates iff F >= 0.7, decided in integers:
20 LCS >= 7 (m + n).

The index finds the few pairs that can be duplicates, and only those are compared (prefix filter with positions:
Bayardo et al. 2007, doi.org/10.1145/1242572.1242591; Xiao et al. 2011, doi.org/10.1145/2000824.2000825). Sort the
tokens of every text by one global order, rarest first. If p and q are the first places of the first token that two
texts share, they share at most m - p and n - q tokens. Duplicates share 7 (m + n) / 20 or more, so

    7 n <= 13 m - 20 p    and    7 m <= 13 n - 20 q,

Each right side depends on one text only and is called the reach of that text at that place. The index lists a text
under the tokens at which its reach is at least 7 times the shortest length that could match: about its 46% (6/13)
rarest tokens.

Of the texts that are found so, most are dropped by their signatures (a bitmap filter: Sandes et al. 2020,
doi.org/10.1109/TKDE.2018.2889695), 64 bits of which each token sets one. A bit of one text alone is a token of that
text alone, and duplicates have at most m + n - 2 LCS <= 3 (m + n) / 10 such tokens.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from data_gen.rows.tokens import tokenize, tokenize_again

Code: TypeAlias = str | tuple[int, ...]  # the token numbers of a text

# ---- the rule -------------------------------------------------------------------------------------------------------


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F = 2 LCS / (m + n) of two texts of m and n tokens, 1 if both have none. Takes O(m n / 64)."""
    from rapidfuzz.distance import LCSseq

    numbers = TokenNumbers()
    left, right = ([numbers[token] for token in tokenize(text)] for text in (a, b))
    return 2 * LCSseq.similarity(left, right) / (len(left) + len(right)) if left or right else 1.0


def is_duplicate(lcs: int, m: int, n: int) -> bool:
    """Return whether F >= 0.7 for an LCS of two texts of m and n tokens.

    Integers decide: in floats a tie, such as 7 of 10 and 10, depends on how the formula is written.
    """
    return 20 * lcs >= 7 * (m + n)


class TokenNumbers(dict[str, int]):
    """Token -> number from 0, in order of appearance. The code points of surrogates are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.end = 0  # the next number

    def __missing__(self, key: str) -> int:
        self[key] = number = self.end
        self.end = 0xE000 if number == 0xD7FF else number + 1
        return number


# ---- the index ------------------------------------------------------------------------------------------------------

SCORE_CUTOFF = 0.7 - 1e-9  # below 0.7, so that rounding loses no tie; is_duplicate decides
BITS = 32  # the low bits of a posting hold the text's index, the others its reach
FIRST_REBUILD, GROWTH = 256, 4  # texts kept at the first rebuild; factor to each later one


def compute_reaches(m: int) -> range:
    """Return 13 m - 20 p for the places p = 0, 1, ... at which a text of m tokens is posted."""
    shortest = -(-7 * m // 13)
    return range(13 * m, 7 * shortest - 1, -20)


def encode_numbers(values: Sequence[int]) -> Code:
    """Return token numbers as a string of one character each, which rapidfuzz compares fastest.

    Past the last character (1.1 million distinct tokens) return a tuple: rapidfuzz compares its numbers with the code
    points of strings.
    """
    try:
        return "".join(map(chr, values))
    except ValueError:
        return tuple(values)


def decode_numbers(code: Code) -> list[int]:
    """Return the token numbers of a string or tuple that encode_numbers made."""
    return list(map(ord, code)) if isinstance(code, str) else list(code)


def make_signature(values: Sequence[int]) -> int:
    """Return 64 bits, of which bit v mod 64 is set for each token number v."""
    signature = 0
    for value in values:
        signature |= 1 << (value & 63)
    return signature


class Deduplicator:
    """Keeps texts of which no two are duplicates: 20 LCS < 7 (m + n) for each pair.

        deduplicator = Deduplicator()
        kept = [text for text in texts if deduplicator.add(text) is None]

    Decisions and indices equal those of a comparison with every kept text. A text takes O(m log m), each candidate
    O(m n / 64). At 52,000 kept texts that repeat each other's beginnings there are 12 candidates, 305 without
    signatures. benchmarks/dedup.json times 63,000 instructions.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []  # the kept ones
        self._codes: list[Code] = []  # token numbers of each kept text
        self._lengths = np.empty(64, np.int32)  # n of each kept text, with room to grow
        self._signatures = np.empty(64, np.uint64)  # of each kept text, with the same room
        self._index_of: dict[Code, int] = {}
        self._numbers = TokenNumbers()
        self._ranks: list[int] = []  # number -> rank, the rarest first; below 0 for tokens since the last rebuild
        self._postings: dict[int, array] = {}  # rank -> reach << BITS | index of each text posted under it
        self._rebuild_at = FIRST_REBUILD

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> int | None:
        """Keep a text and return None. For a duplicate, return the index of the kept text with the largest F; of
        several with an equal F, the first."""
        code, places, signature = self._prepare(text)
        found = self._find(code, places, signature)
        if found is None:
            self._keep(text, code, places, signature)
        return found

    def find(self, text: str) -> int | None:
        """Return what add(text) would return, and keep nothing."""
        return self._find(*self._prepare(text))

    def _prepare(self, text: str) -> tuple[Code, dict[int, int], int]:
        numbers, ranks = self._numbers, self._ranks
        values = [numbers[token] for token in tokenize_again(text)]
        ranks += range(-1 - len(ranks), -1 - numbers.end, -1)
        return encode_numbers(values), self._compute_places(values), make_signature(values)

    def _compute_places(self, values: Sequence[int]) -> dict[int, int]:
        """Return {rank: reach at its first place} for the ranks under which a text is posted and looked up."""
        ranks = self._ranks
        ordered = sorted([ranks[value] for value in values])
        reaches = compute_reaches(len(values))
        # From the last place to the first, so that of a repeated token the first place wins.
        return dict(zip(ordered[len(reaches) - 1 :: -1], reaches[::-1], strict=False))

    def _find(self, code: Code, places: dict[int, int], signature: int) -> int | None:
        if code in self._index_of:
            return self._index_of[code]
        postings = self._postings
        shared = [(postings[rank], reach) for rank, reach in places.items() if rank in postings]
        if not shared:
            return None
        lists, reaches = zip(*shared, strict=True)
        joined = np.frombuffer(b"".join(lists), np.int64)
        indices = joined & (1 << BITS) - 1
        lengths = self._lengths.take(indices)
        longest = np.array([reach // 7 for reach in reaches], np.int32).repeat([len(posting) for posting in lists])
        unshared = np.bitwise_count(self._signatures.take(indices) ^ np.uint64(signature))
        is_candidate = (joined >= 7 * len(code) << BITS) & (lengths <= longest)
        is_candidate &= np.multiply(unshared, 10, dtype=np.int32) <= 3 * lengths + 3 * len(code)
        found = sorted(set(indices[is_candidate].tolist()))
        if not found:
            return None
        from rapidfuzz import process
        from rapidfuzz.distance import Indel, LCSseq

        codes = self._codes
        # Returns the first of the most similar; equal fractions are equal floats.
        best = process.extractOne(
            code,
            [codes[i] for i in found],
            scorer=Indel.normalized_similarity,
            processor=None,
            score_cutoff=SCORE_CUTOFF,
        )
        if best is None or not is_duplicate(LCSseq.similarity(code, best[0]), len(code), len(best[0])):
            return None
        return found[best[2]]

    def _keep(self, text: str, code: Code, places: dict[int, int], signature: int) -> None:
        index = len(self.texts)
        self.texts.append(text)
        self._codes.append(code)
        self._index_of[code] = index
        if index == len(self._lengths):
            self._lengths = np.concatenate((self._lengths, np.empty_like(self._lengths)))
            self._signatures = np.concatenate((self._signatures, np.empty_like(self._signatures)))
        self._lengths[index] = len(code)
        self._signatures[index] = signature
        if len(self.texts) == self._rebuild_at:
            self._rebuild_at *= GROWTH
            self._rebuild()
        else:
            self._post(index, places)

    def _post(self, index: int, places: dict[int, int]) -> None:
        for rank, reach in places.items():
            posting = self._postings.get(rank)
            if posting is None:
                posting = self._postings[rank] = array("q")
            posting.append(reach << BITS | index)

    def _rebuild(self) -> None:
        """Rank the token numbers by their frequency in the kept texts and post all kept texts again."""
        texts = [decode_numbers(code) for code in self._codes]
        counts: Counter[int] = Counter()
        for values in texts:
            counts.update(values)
        by_count = sorted(range(len(self._ranks)), key=lambda number: (counts[number], -number))
        for rank, number in enumerate(by_count):
            self._ranks[number] = rank
        self._postings = {}
        for index, values in enumerate(texts):
            self._post(index, self._compute_places(values))

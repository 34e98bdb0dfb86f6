"""Tokenised rows and their loss mask, in flat arrays.

A Table holds every row of some files. A Dataset is a choice of them that a run trains on or evaluates: those rows with
a loss token, called examples.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from engine.base.errors import DataError
from engine.data.values import Place
from engine.text.parts import Special, Text
from engine.text.templates import Row, find_special_id, render_row
from engine.text.tokenizer import Tokenizer

BLOCK = 1024  # rows tokenised at a time
T = TypeVar("T")


class Example(NamedTuple):
    """One tokenised row that has a loss token."""

    tokens: np.ndarray  # (n,) int32
    is_target: np.ndarray  # (n,) bool: predicting this token carries loss; never the first token


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples, each a slice of flat arrays that several datasets may share."""

    tokens: np.ndarray  # (total,) int32
    is_target: np.ndarray  # (total,) bool: predicting this token carries loss
    begins: np.ndarray  # (N,) int64: example i is tokens[begins[i]:ends[i]]
    ends: np.ndarray  # (N,) int64
    sources: Sequence[str]  # (N,) the place of each, for messages
    counts: dict[str, int]  # rows, examples, truncated, dropped, empty, tokens, loss_tokens
    n_loss: np.ndarray | None = None  # (N,) int64 targets of each; None: __post_init__ counts them

    def __post_init__(self) -> None:
        if self.n_loss is None:
            n_loss = [np.count_nonzero(self.is_target_of(i)) for i in range(len(self))]
            object.__setattr__(self, "n_loss", np.array(n_loss, np.int64))

    def __len__(self) -> int:
        return len(self.begins)

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example, (N,) int64."""
        return self.ends - self.begins

    def loss_tokens(self) -> np.ndarray:
        """Return the number of targets of each example, (N,) int64."""
        assert self.n_loss is not None
        return self.n_loss

    def tokens_of(self, example: int) -> np.ndarray:
        """Return the tokens of an example, (n,) int32, a view."""
        return self.tokens[self.begins[example] : self.ends[example]]

    def is_target_of(self, example: int) -> np.ndarray:
        """Return which tokens of an example are targets, (n,) bool, a view."""
        return self.is_target[self.begins[example] : self.ends[example]]

    def get_examples(self, numbers: Sequence[int] | np.ndarray) -> list[Example]:
        """Return the examples of these numbers, as views."""
        spans = [slice(self.begins[i], self.ends[i]) for i in numbers]
        return [Example(self.tokens[span], self.is_target[span]) for span in spans]

    def sha256(self) -> str:
        """Return a digest of all examples' tokens, targets and lengths, wherever in the arrays they lie."""
        digest = hashlib.sha256()
        gaps = np.flatnonzero(self.begins[1:] != self.ends[:-1]) + 1  # examples that do not begin where the last ends
        runs = list(zip(self.begins[[0, *gaps]], self.ends[[*(gaps - 1), -1]], strict=True))
        for array in (self.tokens, self.is_target):
            for begin, end in runs:
                digest.update(np.ascontiguousarray(array[begin:end]).data)
        digest.update(np.concatenate(([0], np.cumsum(self.lengths()))).data)
        return digest.hexdigest()


def count_shared(train: Dataset, held_out: Dataset) -> int:
    """Return how many held-out examples are among the training examples, token for token."""
    held = Counter(held_out.tokens_of(i).tobytes() for i in range(len(held_out)))
    alike = np.flatnonzero(np.isin(train.lengths(), held_out.lengths())).tolist()
    shared = {train.tokens_of(i).tobytes() for i in alike}.intersection(held)
    return sum(n for text, n in held.items() if text in shared)


class Sources(Sequence[str]):
    """The place of each row, as a Place. It is made only when an element is read."""

    def __init__(self, paths: Sequence[str], rows: np.ndarray):
        self.paths, self.rows = paths, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Place:  # type: ignore[override]  # no slices
        row = self.rows[i]
        return Place(self.paths[row["file"]], *(int(row[part]) for part in PLACE))


PLACE = ("number", "line", "column")  # as in Place
# The dtype of Table.rows. file and PLACE say where the row was read, n_loss how many targets it has,
# empty whether an answer is blank.
ROW = np.dtype([
    ("n_tokens", "<i4"), ("n_loss", "<i4"), ("file", "<i4"), *((part, "<i8") for part in PLACE),
    ("truncated", "?"), ("empty", "?"),
])  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Every row of some files, tokenised and truncated at max_length. A row without a loss token has no tokens here."""

    tokens: np.ndarray  # (total,) int32
    is_target: np.ndarray  # (total,) bool
    rows: np.ndarray  # (R,) ROW
    paths: tuple[str, ...]  # rows["file"] is an index into them
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: Sequence[int] | None = None) -> Dataset:
        """Return the examples among the rows of these numbers (from 0), in this order. None: among all rows.

        Rows without a loss token are counted and left out. Raise DataError when no example is left.
        """
        ends = np.cumsum(self.rows["n_tokens"], dtype=np.int64)
        chosen = np.arange(len(self)) if numbers is None else np.array(numbers, np.int64)
        rows = self.rows[chosen]
        kept = rows["n_tokens"] > 0
        counts = {
            "rows": len(rows),
            "examples": int(kept.sum()),
            "truncated": int(rows["truncated"].sum()),
            "dropped": int((~kept).sum()),
            "empty": int((rows["empty"] & kept).sum()),
            "tokens": int(rows["n_tokens"].sum(dtype=np.int64)),
            "loss_tokens": int(rows["n_loss"].sum(dtype=np.int64)),
        }
        if not counts["examples"]:
            raise DataError(
                f"no example is left of {len(rows)} rows: {counts['dropped']} had no response token within "
                f"--max-length {self.max_length}; give rows with an output, or a larger --max-length"
            )
        ends, rows = ends[chosen[kept]], rows[kept]
        sources = Sources(self.paths, rows)
        begins, n_loss = ends - rows["n_tokens"], rows["n_loss"].astype(np.int64)
        return Dataset(self.tokens, self.is_target, begins, ends, sources, counts, n_loss)


def has_empty_answer(row: Row) -> bool:
    """Return whether an answer of a row that is learned says nothing, so that the model learns to end at once."""
    if row.messages is None:
        return not row.output.strip()
    return any(
        role == "assistant" and not text.strip() and i not in row.unlearned and not row.more.get(i)
        for i, (role, text) in enumerate(row.messages)
    )


def encode_block(rows: Sequence[Row], tokenizer: Tokenizer, style: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise rows. Return (ids of all rows back to back, which of them are targets, number of ids of each row).

    Each distinct text is tokenised once. The ids without loss are as many as the prompt alone has, as in Stanford's
    train.py: where a token spans the boundary, it carries none.
    """
    parts = [render_row(row, style, tokenizer) for row in rows]
    ends = (
        (end, part.follows_special) for row in parts for part in row if isinstance(part, Text) for end in part.ends()
    )
    texts = list(dict.fromkeys(ends))
    encoded = tokenizer.encode_batch([text for text, _ in texts], [follows for _, follows in texts])
    ids_of = dict(zip(texts, encoded, strict=True))
    ids: list[int] = []
    lengths = []
    run_lengths: list[int] = []  # lengths of runs of tokens: without loss, with loss, without, ...
    for row in parts:
        before = len(ids)
        for part in row:
            if isinstance(part, Special):
                ids.append(find_special_id(tokenizer, part.name, style))
                run_lengths += (not part.loss, part.loss)
            else:
                new = ids_of[part.whole(), part.follows_special]
                ids += new
                run_lengths += count_by_turns([len(ids_of[end, part.follows_special]) for end in part.ends()])
        lengths.append(len(ids) - before)
    is_target = np.repeat(np.arange(len(run_lengths)) % 2 == 1, run_lengths)
    return np.fromiter(ids, np.int32, len(ids)), is_target, np.array(lengths)


def count_by_turns(n_ids: Sequence[int]) -> list[int]:
    """Return how many ids are without loss, with loss, without, ..., an even number, from how many end with each.

    The whole text may have fewer ids than its beginning.
    """
    ends = [0, *accumulate((min(n, n_ids[-1]) for n in n_ids), max)]
    counts = [end - before for before, end in pairwise(ends)]
    return counts + [0] * (len(counts) % 2)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    style: str = "alpaca",
    max_length: int = 512,
    train_on_prompt: bool = False,
    track: Callable[[range], Iterator[int]] = iter,
) -> Table:
    """Tokenise rows into a Table, each truncated at max_length tokens.

    track: wraps the loop over blocks of rows, to show progress. Raise DataError when the tokenizer lacks a token of the
    style, and for an answer without loss under train_on_prompt.
    """
    tokens, targets, table = [], [], np.zeros(len(rows), ROW)
    paths: dict[str, int] = {}
    for first in track(range(0, len(rows), BLOCK)):
        block, out = rows[first : first + BLOCK], table[first : first + BLOCK]
        if train_on_prompt and (without := next((row for row in block if row.unlearned), None)):
            raise DataError(
                f"{without.source}: has an answer that carries no loss (weight 0, or within a prompt), and "
                "--train-on-prompt gives loss to all; leave one of them out"
            )
        ids, is_target, lengths = encode_block(block, tokenizer, style)
        starts = np.cumsum(lengths) - lengths
        is_target |= train_on_prompt
        is_target[starts] = False  # nothing comes before it to predict it from
        keep = np.arange(len(ids)) - np.repeat(starts, lengths) < max_length
        out["n_loss"] = np.add.reduceat(is_target & keep, starts, dtype=np.int64)
        out["n_tokens"] = np.where(out["n_loss"] > 0, np.minimum(lengths, max_length), 0)
        out["truncated"] = lengths > max_length
        out["empty"] = [has_empty_answer(row) for row in block]
        keep &= np.repeat(out["n_loss"] > 0, lengths)
        tokens.append(ids[keep])
        targets.append(is_target[keep])
        places = [row.source if isinstance(row.source, Place) else Place(row.source) for row in block]
        out["file"] = [paths.setdefault(place.path, len(paths)) for place in places]
        for part in PLACE:
            out[part] = [getattr(place, part) for place in places]
    return Table(np.concatenate(tokens), np.concatenate(targets), table, tuple(paths), max_length)


def hold_out(rows: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split rows into (kept, held out), in file order. The seed chooses round(fraction * n) to hold out, at least 1."""
    n_held = max(1, round(fraction * len(rows)))
    held = set(np.random.default_rng((seed, 2**32)).permutation(len(rows))[:n_held].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]

"""Decontamination: finding generated tasks that give away the prompts of an evaluation.

A task matches an evaluation prompt iff one of these holds for their tokens:
- They are equal but for case, punctuation and blanks.
- ROUGE-L F >= 0.7, in integers 20 LCS >= 7 (m + n). The rule also decides which tasks are duplicates of each other.
- They share a run of N_GRAM = 13 tokens, as in GPT-3's decontamination (Brown et al. 2020, arxiv.org/abs/2005.14165,
  appendix C). In scripts without spaces a token is a character, which makes the rule stricter.

The first two rules compare instruction and input with the prompt. The third also looks at the output, which may quote
the prompt.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from data_gen.base.cli import DataError
from data_gen.base.files import RowPlace, read_rows
from data_gen.rows.rouge import Deduplicator
from data_gen.rows.tokens import tokenize

Key: TypeAlias = str | tuple[str, ...]

N_GRAM = 13
FORMS = '{"instruction", "input"?}, {"instruction", "instances": [{"input"}]}, {"prompt"}, {"turns"} or {"messages"}'


class Decontaminator:
    """An index of the prompts of evaluation files: .txt with one a line, else JSON or JSONL with rows of FORMS.

    Raise DataError, with file and row, for a file that cannot be read or has no prompts, or a row of another form.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.prompts: list[str] = []
        self._exact: dict[Key, str] = {}  # key -> prompt
        self._runs: dict[int, int] = {}  # hash of a run of tokens -> index of the prompt
        # Each prompt lies in the first layer in which it is no duplicate, so that every prompt can be found.
        self._layers: list[Deduplicator] = []
        for path in map(Path, paths):
            n_before = len(self.prompts)
            for prompt in read_prompts(path):
                self._add(prompt)
            if len(self.prompts) == n_before:
                raise DataError(f"{path}: got no prompts, wanted at least one; leave the file out")

    def _add(self, prompt: str) -> None:
        tokens = tokenize(prompt)
        key = make_key(prompt, tokens)
        if not key:
            return
        self.prompts.append(prompt)
        if key in self._exact:
            return
        self._exact[key] = prompt
        for run in iterate_runs(tokens):
            self._runs.setdefault(hash(run), len(self.prompts) - 1)
        if tokens and all(layer.add(prompt) is not None for layer in self._layers):
            self._layers.append(Deduplicator())
            self._layers[-1].add(prompt)

    def find_match(self, item: dict[str, str]) -> str | None:
        """Return the evaluation prompt that a task gives away, or None."""
        asked = join_texts(item["instruction"], item["input"])
        tokens = tokenize(asked)
        exact = self._exact.get(make_key(asked, tokens))
        if exact is not None:
            return exact
        for layer in self._layers:
            index = layer.find(asked)
            if index is not None:
                return layer.texts[index]
        for run in iterate_runs(tokens + tokenize(item["output"])):
            found = self._runs.get(hash(run))
            if found is not None and run in iterate_runs(tokenize(self.prompts[found])):
                return self.prompts[found]
        return None


def iterate_runs(tokens: list[str]) -> Iterator[tuple[str, ...]]:
    """Return an iterator over the runs of N_GRAM tokens."""
    return zip(*(tokens[i:] for i in range(N_GRAM)), strict=False)


def make_key(text: str, tokens: list[str]) -> Key:
    """Return a key that is equal for equal texts: the tokens, or the text itself if it has none."""
    return tuple(tokens) or " ".join(text.split())


def join_texts(*parts: str) -> str:
    """Return the parts that are not blank, one a line."""
    return "\n".join(part for part in parts if part.strip())


def read_prompts(path: Path) -> Iterator[str]:
    """Yield the prompts of a file. Raise DataError for a file that cannot be read or a row of another form."""
    if path.suffix.lower() == ".txt":
        try:
            yield from map(str.strip, path.read_text(encoding="utf-8-sig").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return
    for number, row in enumerate(read_rows(path), 1):
        try:
            yield from parse_prompts(row)
        except (KeyError, TypeError, AttributeError):
            keys = ", ".join(row) or "none"
            raise DataError(f"{RowPlace(path, number)}: got the keys {keys}, wanted {FORMS}") from None


def parse_prompts(row: dict[str, Any]) -> list[str]:
    """Return the prompts of a row. Raise KeyError, TypeError or AttributeError for a row of another form."""
    if "instruction" in row:
        instances = row["instances"] if row.get("instances") else [row]
        return [join_texts(row["instruction"], instance.get("input") or "") for instance in instances]
    for key in ("prompt", "turns"):  # MT-bench has a list of turns; each may be asked alone
        if key in row:
            return [join_texts(turn) for turn in (row[key] if isinstance(row[key], list) else [row[key]])]
    said = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return [join_texts(*said)]

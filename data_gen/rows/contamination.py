"""Generated tasks that give away the prompts of an evaluation.

A task matches an evaluation prompt iff one of these holds, over the tokens of data_gen.dedup:
- both are equal, but for case, punctuation and blanks;
- ROUGE-L F >= 0.7, in integers 20 LCS >= 7 (m + n): the rule by which tasks are duplicates of each other;
- they share a run of N_GRAM = 13 tokens, as in GPT-3's decontamination (Brown et al. 2020, arxiv.org/abs/2005.14165,
  appendix C). In scripts without spaces a token is a character, so there the rule is stricter.

The first two compare instruction and input with the prompt; the third also the output, where an answer may quote it.
"""

from pathlib import Path

from data_gen.base.cli import DataError, read_rows
from data_gen.dedup import Deduplicator, tokenize

N_GRAM = 13
FORMS = '{"instruction", "input"?}, {"instruction", "instances": [{"input"}]}, {"prompt"} or {"messages"}'


class Decontaminator:
    """Knows the prompts of evaluation files: .txt, one a line; else JSON or JSONL of rows of FORMS.

    Raises DataError, with file and row, for a file that cannot be read, a row of no such form, or no prompt in a file.
    """

    def __init__(self, paths):
        self.prompts, self._exact, self._runs = [], {}, {}  # texts; tokens -> text; hash of a run of tokens -> index
        self._layers = []  # each prompt is in the first in which it is no duplicate: all are found in the end
        for path in map(Path, paths):
            n_before = len(self.prompts)
            for prompt in prompts_of(path):
                self._add(prompt)
            if len(self.prompts) == n_before:
                raise DataError(f"{path}: got no prompts, wanted at least one; leave the file out")

    def _add(self, prompt):
        tokens = tokenize(prompt)
        key = key_of(prompt, tokens)
        if not key:
            return
        self.prompts.append(prompt)
        if key in self._exact:
            return
        self._exact[key] = prompt
        for run in runs_of(tokens):
            self._runs.setdefault(hash(run), len(self.prompts) - 1)
        if tokens and all(layer.add(prompt) is not None for layer in self._layers):
            self._layers.append(Deduplicator())
            self._layers[-1].add(prompt)

    def match(self, item: dict) -> str | None:
        """The evaluation prompt that the task gives away, or None."""
        asked = joined(item["instruction"], item["input"])
        tokens = tokenize(asked)
        exact = self._exact.get(key_of(asked, tokens))
        if exact is not None:
            return exact
        for layer in self._layers:
            found = layer.find(asked)
            if found is not None:
                return layer.texts[found]
        for run in runs_of(tokens + tokenize(item["output"])):
            found = self._runs.get(hash(run))
            if found is not None and run in runs_of(tokenize(self.prompts[found])):
                return self.prompts[found]
        return None


def runs_of(tokens):
    """The runs of N_GRAM tokens."""
    return zip(*(tokens[i:] for i in range(N_GRAM)), strict=False)


def key_of(text, tokens):
    """What equal texts have in common. A text without any token is compared as it stands."""
    return tuple(tokens) or " ".join(text.split())


def joined(*parts):
    return "\n".join(part for part in parts if part.strip())


def prompts_of(path):
    """Yields the prompts of a file."""
    if path.suffix.lower() == ".txt":
        try:
            yield from map(str.strip, path.read_text(encoding="utf-8-sig").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return
    for number, row in enumerate(read_rows(path), 1):
        try:
            yield from prompts_of_row(row)
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path}, row {number}: got the keys {', '.join(row) or 'none'}, wanted {FORMS}") from None


def prompts_of_row(row):
    """The prompts of a row, or KeyError, TypeError or AttributeError for a row of no form."""
    if "instruction" in row:
        instances = row["instances"] if row.get("instances") else [row]
        return [joined(row["instruction"], instance.get("input") or "") for instance in instances]
    if "prompt" in row:
        return [joined(row["prompt"])]
    said = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return [joined(*said)]

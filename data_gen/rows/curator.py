"""Curation: from answers, in the order of their requests, to the rows of a dataset and a reason for every loss.

Answers are parsed, repaired, filtered and de-duplicated. The rows depend on the answers and their order alone, never
on the time of their arrival: a ledger always gives the same bytes.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_gen.api.answers import Answer, read_answer
from data_gen.api.ledger import Entry
from data_gen.api.prices import PICO
from data_gen.base.files import FIELDS, to_json_line, write_atomically
from data_gen.rows.contamination import Decontaminator
from data_gen.rows.defects import find_defect
from data_gen.rows.parse import parse_answer
from data_gen.rows.repairs import repair_item
from data_gen.rows.rouge import Deduplicator, rouge_l

REASONS = {  # besides parse.KINDS and defects.REASONS
    "refused by the server": "the server would not answer this prompt",
    "refusal": "the model would not answer this prompt",
    "content filter": "the provider cut the answer off",
    "reasoning alone": "the model used its tokens up before an answer: more --max-output-tokens, or less reasoning",
    "evaluation prompt": "matches a prompt of --decontaminate",
    "duplicate": "ROUGE-L of 0.7 or more with a row that was kept",
    "duplicate of a seed task": "ROUGE-L of 0.7 or more with a seed task",
}


class Curator:
    """Turns answers into rows, one by one, until as many are kept as wanted.

    seeds are seed tasks, [{"instruction", ...}], that no row may duplicate.
    """

    def __init__(
        self,
        wanted: int,
        seeds: Sequence[dict[str, str]] = (),
        language: str = "en",
        decontaminator: Decontaminator | None = None,
    ):
        self.wanted, self.language, self.decontaminator = wanted, language, decontaminator
        self.unit = "rows"
        self.index = Deduplicator()
        self.known = [seed["instruction"] for seed in seeds if self.index.add(seed["instruction"]) is None]
        self.n_seeds = len(self.known)
        self.rows: list[dict[str, Any]] = []  # each with its provenance
        self.lost: list[dict[str, Any]] = []  # the lines of rejected.jsonl
        self.items = self.answers = self.refused = 0
        self.repaired: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.kept_by_request: list[int] = []
        self.last_request = -1  # the last whose outcome was used

    @property
    def is_full(self) -> bool:
        """Return whether as many rows are kept as wanted."""
        return len(self.rows) >= self.wanted

    def add_outcome(self, entry: Entry) -> None:
        """Curate the outcome of the next request. Do nothing once full. Requests without an outcome may be left out."""
        if self.is_full:
            return
        self.last_request = entry.request
        before = len(self.rows)
        if entry.kind == "refused":
            self.refused += 1
            self.record_rejection(entry, None, "refused by the server", entry.body[:200], {})
        else:
            self.add_answer(entry, read_answer(entry.body))
        kept = self.rows[before:]
        for row in kept:
            row["provenance"]["usd"] = round(entry.cost / PICO / len(kept), 12)
        self.kept_by_request.append(len(kept))

    def add_answer(self, entry: Entry, answer: Answer) -> None:
        """Curate the tasks of one answer, and record its problems."""
        self.answers += 1
        self.models[answer.model or entry.model] += 1
        items, problems = parse_answer(answer.text, answer.finish_reason == "length")
        if answer.refusal or answer.finish_reason == "content_filter":
            reason = "refusal" if answer.refusal else "content filter"
            self.record_rejection(entry, None, reason, answer.refusal[:200], {})
            problems = [problem for problem in problems if problem[0] != "no items"]
        if answer.is_reasoning_alone and not items:
            self.record_rejection(entry, None, "reasoning alone", problems[0][1] if problems else "", {})
            problems = [problem for problem in problems if problem[0] != "no items"]
        for reason, seen in problems:
            self.record_rejection(entry, None, reason, seen, {})
        self.items += len(items) + sum(reason != "no items" for reason, _ in problems)
        for number, item in enumerate(items):
            if self.is_full:
                return
            self.add_item(entry, answer, number, item)

    def add_item(self, entry: Entry, answer: Answer, number: int, item: dict[str, str]) -> None:
        """Keep the item of this number in an answer, or record why it is rejected."""
        item, repairs = repair_item(item)
        self.repaired.update(repairs)
        found = find_defect(item, self.language)
        if found is None and self.decontaminator:
            match = self.decontaminator.find_match(item)
            found = ("evaluation prompt", match) if match is not None else None
        if found is not None:
            self.record_rejection(entry, number, *found, item)
            return
        twin = self.index.add(item["instruction"])
        if twin is not None:
            reason = "duplicate of a seed task" if twin < self.n_seeds else "duplicate"
            like = round(rouge_l(item["instruction"], self.known[twin]), 4)
            self.record_rejection(entry, number, reason, "", item, duplicate_of=self.known[twin], similarity=like)
            return
        self.known.append(item["instruction"])
        source: dict[str, Any] = {"request": entry.request, "item": number, "model": answer.model or entry.model}
        source |= {"prompt_sha256": entry.body_sha256, "response_id": answer.id}
        self.rows.append(item | {"provenance": source})

    def record_rejection(
        self,
        entry: Entry,
        number: int | None,
        reason: str,
        detail: str,
        item: dict[str, str],
        **more: Any,
    ) -> None:
        """Count a rejection and add its line to rejected.jsonl. number is None for a problem of a whole answer."""
        self.rejected[reason] += 1
        self.lost.append({"request": entry.request, "item": number, "reason": reason, "detail": detail} | item | more)

    def summarize(self) -> dict[str, Any]:
        """Return the counts of requests, answers, items, rows, repairs and rejections, as run.json holds them."""
        return {
            "requests": self.answers + self.refused,
            "answers": self.answers,
            "failed_requests": self.refused,
            "items": self.items,
            "kept": len(self.rows),
            "repaired": dict(self.repaired.most_common()),
            "rejected": dict(self.rejected.most_common()),
        }

    def write_files(self, folder: Path) -> None:
        """Write dataset.json (Alpaca), dataset.jsonl (with provenance), chat.jsonl and rejected.jsonl, each whole."""
        plain = [{name: row[name] for name in FIELDS} for row in self.rows]
        lines = (to_json_line(row).rstrip("\n") for row in plain)
        write_atomically(folder / "dataset.json", ["[\n", ",\n".join(lines), "\n]\n"] if plain else ["[]\n"])
        write_atomically(folder / "dataset.jsonl", map(to_json_line, self.rows))
        write_atomically(folder / "chat.jsonl", (to_json_line({"messages": row_to_messages(row)}) for row in plain))
        write_atomically(folder / "rejected.jsonl", map(to_json_line, self.lost))


def row_to_messages(row: dict[str, str]) -> list[dict[str, str]]:
    """Return a row as a chat of one turn: instruction and input, then the output."""
    asked = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]

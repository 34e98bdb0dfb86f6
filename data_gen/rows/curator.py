"""Answers, in the order of their requests -> the dataset: parsed, tidied, filtered, de-duplicated, losses explained.

What is kept depends on the answers and their order alone, never on when they came: a ledger gives the same bytes.
"""

from collections import Counter

from data_gen.api.client import read_answer
from data_gen.api.prices import PICO
from data_gen.base.cli import json_line, write_whole
from data_gen.dedup import Deduplicator, rouge_l
from data_gen.rows.defects import defect, tidy
from data_gen.rows.parse import parse

REASONS = {  # those of answers and of the stream; parse.KINDS and filters.REASONS have the others
    "refused by the server": "the server would not answer this prompt",
    "refusal": "the model would not answer this prompt",
    "content filter": "the provider cut the answer off",
    "evaluation prompt": "matches a prompt of --decontaminate",
    "duplicate": "ROUGE-L of 0.7 or more with a row that was kept",
    "duplicate of a seed task": "ROUGE-L of 0.7 or more with a seed task",
}


class Curator:
    """Takes answers one by one and keeps rows until there are as many as wanted.

    seeds: [{"instruction", ...}], which no row may duplicate. decontaminator: has match(item) -> str | None.
    """

    def __init__(self, wanted: int, seeds=(), language="en", decontaminator=None):
        self.wanted, self.language, self.decontaminator = wanted, language, decontaminator
        self.index = Deduplicator()
        self.known = [seed["instruction"] for seed in seeds if self.index.add(seed["instruction"]) is None]
        self.n_seeds = len(self.known)
        self.rows, self.lost = [], []  # provenance on each row; lines of rejected.jsonl
        self.items = self.answers = self.refused = 0
        self.repaired, self.rejected, self.models = Counter(), Counter(), Counter()
        self.kept_by_request = []

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.wanted

    def take(self, entry):
        """The outcome of the next request, a ledger.Entry. Does nothing once full."""
        if self.full:
            return
        before = len(self.rows)
        if entry.kind == "refused":
            self.refused += 1
            self.reject(entry, None, "refused by the server", entry.body[:200], {})
        else:
            self.take_answer(entry, read_answer(entry.body))
        kept = self.rows[before:]
        for row in kept:
            row["provenance"]["usd"] = round(entry.cost / PICO / len(kept), 12)
        self.kept_by_request.append(len(kept))

    def take_answer(self, entry, answer):
        self.answers += 1
        self.models[answer.model or entry.model] += 1
        items, problems = parse(answer.text, answer.finish_reason == "length")
        if answer.refusal or answer.finish_reason == "content_filter":
            reason = "refusal" if answer.refusal else "content filter"
            self.reject(entry, None, reason, answer.refusal[:200], {})
            problems = [problem for problem in problems if problem[0] != "no items"]
        for reason, seen in problems:
            self.reject(entry, None, reason, seen, {})
        self.items += len(items) + sum(reason != "no items" for reason, _ in problems)
        for number, item in enumerate(items):
            if self.full:
                return
            self.take_item(entry, answer, number, item)

    def take_item(self, entry, answer, number, item):
        item, repairs = tidy(item)
        self.repaired.update(repairs)
        found = defect(item, self.language)
        if found is None and self.decontaminator:
            match = self.decontaminator.match(item)
            found = ("evaluation prompt", match) if match is not None else None
        if found is not None:
            return self.reject(entry, number, *found, item)
        twin = self.index.add(item["instruction"])
        if twin is not None:
            reason = "duplicate of a seed task" if twin < self.n_seeds else "duplicate"
            like = round(rouge_l(item["instruction"], self.known[twin]), 4)
            return self.reject(entry, number, reason, "", item, duplicate_of=self.known[twin], similarity=like)
        self.known.append(item["instruction"])
        source = {"request": entry.request, "item": number, "model": answer.model or entry.model}
        source |= {"prompt_sha256": entry.body_sha256, "response_id": answer.id}
        self.rows.append(item | {"provenance": source})

    def reject(self, entry, number, reason, detail, item, **more):
        self.rejected[reason] += 1
        self.lost.append({"request": entry.request, "item": number, "reason": reason, "detail": detail} | item | more)

    def counts(self) -> dict:
        return {
            "requests": self.answers + self.refused,
            "answers": self.answers,
            "failed_requests": self.refused,
            "items": self.items,
            "kept": len(self.rows),
            "repaired": dict(self.repaired.most_common()),
            "rejected": dict(self.rejected.most_common()),
        }

    def write(self, folder):
        """dataset.json (Alpaca), dataset.jsonl (with provenance), chat.jsonl, rejected.jsonl; each is written whole."""
        plain = [{name: row[name] for name in ("instruction", "input", "output")} for row in self.rows]
        lines = (json_line(row).rstrip("\n") for row in plain)
        write_whole(folder / "dataset.json", ["[\n", ",\n".join(lines), "\n]\n"] if plain else ["[]\n"])
        write_whole(folder / "dataset.jsonl", map(json_line, self.rows))
        write_whole(folder / "chat.jsonl", (json_line({"messages": messages(row)}) for row in plain))
        write_whole(folder / "rejected.jsonl", map(json_line, self.lost))


def messages(row) -> list:
    """The row as a chat of one turn: instruction and input, then the output."""
    asked = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]

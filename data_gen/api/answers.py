"""Answers: what the body of a completion says, and what a 200 without one means."""

import re
from dataclasses import dataclass, field
from typing import Any

from data_gen.api.bill import Bill, read_bill
from data_gen.api.errors import classify_error, find_error, read_json
from data_gen.api.prices import Price

THOUGHTS = ("reasoning", "reasoning_content", "reasoning_text", "reasoning_details", "thinking", "thoughts")
OPEN_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """The content of a completion: its text, why it ended, its id and model, and the bill."""

    text: str
    finish_reason: str
    refusal: str
    id: str
    model: str
    bill: Bill = field(default_factory=Bill)
    has_thoughts: bool = False  # reasoning stands beside the text, or was billed

    @property
    def is_reasoning_alone(self) -> bool:
        """Return whether the model's reasoning took all of its tokens, so that nothing of an answer was written."""
        if self.refusal or self.finish_reason == "content_filter":
            return False
        opened = OPEN_THOUGHT.match(self.text)
        return (
            f"</{opened[1]}>" not in self.text[opened.end() :]
            if opened
            else self.has_thoughts and not self.text.strip()
        )


def read_answer(body: str) -> Answer:
    """Return the first choice of a completion. is_completion() must hold for the body."""
    found = read_json(body)
    choice = found["choices"][0]
    message, bill = choice["message"], read_bill(found)
    content, has_thoughts = message.get("content"), any(message.get(name) for name in THOUGHTS)
    if isinstance(content, list):  # parts, as some servers send them
        parts = [part for part in content if isinstance(part, dict)]
        has_thoughts = has_thoughts or any(part.get(name) for part in parts for name in THOUGHTS)
        content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    return Answer(
        content if isinstance(content, str) else "",
        str(choice.get("finish_reason") or ""),
        str(message.get("refusal") or ""),
        str(found.get("id") or ""),
        str(found.get("model") or ""),
        bill,
        has_thoughts or bill.thoughts > 0,
    )


def is_completion(found: Any) -> bool:
    """Return whether a parsed body is a completion with a message."""
    try:
        return isinstance(found["choices"][0]["message"], dict)
    except (KeyError, IndexError, TypeError):
        return False


def judge_success(text: str) -> tuple[str, int]:
    """Return the kind of a Reply with status 200, and the status that it stands for.

    An error inside of it is that error. An answer that broke off with an error and tells no bill may have been billed.
    """
    found = read_json(text)
    status = find_error(found)
    if status is None:
        return ("answer" if is_completion(found) else "lost"), 200
    if is_completion(found) and read_answer(text).text.strip() and not read_bill(found).is_whole:
        return "lost", status
    return classify_error(status, text), status


def bill_outcome(
    kind: str, body: str, price: Price, most: int, is_last: bool = False
) -> tuple[str, tuple[int | None, int | None], int]:
    """Return (kind, usage, cost) of a reply for the ledger. most is what the attempt can cost, is_last gives it up.

    An answer without usage costs the most that it can, an error what it tells. What has no answer, and tells its bill,
    is no longer in doubt.
    """
    if kind == "answer":
        bill = read_answer(body).bill
        return kind, bill.tokens, bill.compute_cost(price, most)
    found = read_json(body)
    bill = read_bill(found) if isinstance(found, dict) else Bill()
    cost = bill.compute_cost(price)
    if kind == "lost" and not bill.is_whole:
        return ("refused", (None, None), max(cost, most)) if is_last else (kind, (None, None), 0)
    done = kind == "refused" or (is_last and kind in ("failed", "lost", "odd"))
    return ("refused" if done else "failed"), bill.tokens, cost

"""What a run's answers show of its server, each told once: hidden tokens, an ignored format, reasoning alone."""

from collections.abc import Callable, Mapping
from typing import Any

from data_gen.api.answers import Answer
from data_gen.api.dialect import keeps_format
from data_gen.api.prices import format_usd

# Answers of reasoning alone, in a row, that end a run: before its first answer with a text, and later.
THINKING_AT_START, THINKING_LATER = 3, 20
CUT_SHORT = ("content_filter", "length")  # reasons to end that leave no whole answer


class Observations:
    """Looks at every answer of a run. say prints a line."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.told: set[str] = set()
        self.has_text = False  # an answer had one
        self.thinking = 0  # answers of reasoning alone, in a row

    def tell_once(self, topic: str, text: str) -> None:
        """Print a line, unless one about this topic has been printed."""
        if topic not in self.told:
            self.told.add(topic)
            self.say(text)

    def look_at_bill(self, answer: Answer, cost: int, token_cost: int) -> None:
        """Tell of tokens beyond completion_tokens, of dollars that the server names, and of a bill that is missing."""
        bill = answer.bill
        if not bill.is_whole:
            most = format_usd(cost, 6)
            self.tell_once("none", f"the server tells no usage; each answer counts at the most it can cost, {most}")
        if bill.hidden:
            more = f"{bill.hidden:,} tokens more than completion_tokens"
            self.tell_once("hidden", f"the usage of an answer tells {more}; they are counted as billed")
        if bill.is_whole and cost > token_cost:
            own, ours = format_usd(cost, 6), format_usd(token_cost, 6)
            self.tell_once("dollars", f"the server names {own} for an answer of {ours} by its tokens; the more counts")

    def look_at_format(self, answer: Answer, format: Mapping[str, Any] | None) -> None:
        """Tell of a server that takes a response_format and does not keep to it."""
        text = answer.text.rpartition("</think>")[2]
        if not format or not text.strip() or answer.refusal or answer.finish_reason in CUT_SHORT:
            return
        if not keeps_format(text, format):
            kind = str(format.get("type")) + (" with a schema" if "schema" in format else "")
            what = f"the server takes {kind} and does not keep to it"
            self.tell_once("format", f"{what}; tasks are read from whatever text it writes")

    def count_thinking(self, answer: Answer, max_output_tokens: int) -> str:
        """Return why the run must end after this answer: too many in a row are reasoning alone. "" if it need not."""
        self.thinking = self.thinking + 1 if answer.is_reasoning_alone else 0
        self.has_text = self.has_text or (bool(answer.text.strip()) and not self.thinking)
        if self.thinking < (THINKING_LATER if self.has_text else THINKING_AT_START):
            return ""
        return (
            f"the last {self.thinking} answers are reasoning alone, no text, and are paid for: --max-output-tokens "
            f"{max_output_tokens} did not suffice; pass more, or have less reasoning by --extra, as in "
            """--extra '{"reasoning_effort": "low"}'"""
        )

"""The bill of an answer: the most that any field of its usage can mean.

Servers count a model's reasoning within completion_tokens (OpenAI), beside it, so that total_tokens alone tells of it
(Gemini, Grok), or in fields of their own (thoughtsTokenCount, reasoning_tokens). Some name dollars (OpenRouter's cost).
Where the fields leave open whether a part lies inside of its whole, it is taken to lie outside.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from data_gen.api.prices import MAX_USD, PICO, Price

MAX_TOKENS = 10**9  # largest credible count
PLACES = ("usage", "usageMetadata", "usage_metadata")  # of a body; x_groq holds another usage
TOTALS = ("total_tokens", "total_token_count")
INPUTS = ("prompt_tokens", "input_tokens", "prompt_token_count", "input_token_count", "prompt_eval_count")
OUTPUTS = (
    "completion_tokens", "output_tokens", "candidates_token_count", "completion_token_count", "output_token_count",
    "eval_count",
)  # fmt: skip
THOUGHTS = re.compile("reasoning|thought|thinking")
INPUT_PARTS = re.compile("cache|tool_use_prompt|(?:prompt|input)_?.*details")
OUTPUT_PARTS = re.compile("(?:completion|output|candidates|response)_?.*details")
VISIBLE_PARTS = ("text_tokens", "accepted_prediction_tokens")  # of an output: what can be seen
COST_PARTS = re.compile("input|prompt|output|completion|request|cache|search|citation|reasoning")
TICKS = Decimal(10) ** -10  # of a dollar, in which Grok counts
MAX_FIELDS = 1000  # of a usage that are read


@dataclass(frozen=True)
class Bill:
    """The tokens and dollars that an answer's usage tells, hidden ones included."""

    input: int = 0
    output: int = 0
    hidden: int = 0  # of output: what completion_tokens leave out
    thoughts: int = 0  # tokens of reasoning that a field names
    dollars: int = 0  # picodollars that the server itself names
    is_whole: bool = False  # both counts are told

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        """Return (input, output) tokens as the ledger has them, (None, None) if a count is missing."""
        return (self.input, self.output) if self.is_whole else (None, None)

    def compute_cost(self, price: Price, most: int = 0) -> int:
        """Return picodollars. A bill without both counts costs at least most."""
        cost = price.compute_cost(self.input, self.output - self.hidden) + self.hidden * max(price.input, price.output)
        return max(cost, self.dollars, 0 if self.is_whole else most)


def read_bill(body: Mapping[str, Any]) -> Bill:
    """Return the bill in the body of a completion, or of an error."""
    groq = body.get("x_groq")
    usages = [body.get(name) for name in PLACES] + [groq.get("usage") if isinstance(groq, dict) else None]
    bills = [read_usage(usage) for usage in usages if isinstance(usage, dict)]
    own = {name: body[name] for name in ("cost", "total_cost") if name in body}
    best = max(bills, key=lambda bill: (bill.is_whole, bill.input + bill.output), default=Bill())
    dollars = max(find_dollars(own), *(bill.dollars for bill in bills), best.dollars)
    return Bill(best.input, best.output, best.hidden, best.thoughts, dollars, best.is_whole)


def read_usage(usage: Mapping[str, Any]) -> Bill:
    """Return the bill of one usage object."""
    counts: dict[str, int] = {}
    parts: dict[str, dict[str, int]] = {"input": {}, "output": {}}
    thoughts = 0
    for parent, name, value in walk_fields(usage):
        n = read_count(value)
        if n is None or "cost" in name or "cost" in parent:
            continue
        if not parent and name in TOTALS + INPUTS + OUTPUTS:
            counts[name] = n
            continue
        if THOUGHTS.search(name):
            thoughts = max(thoughts, n)
        where = find_side(parent, name)
        if where and name not in VISIBLE_PARTS:
            parts[where][name] = max(n, parts[where].get(name, 0))
    prompt, completion, total = (find_most(counts, names) for names in (INPUTS, OUTPUTS, TOTALS))
    seen, written = prompt or 0, completion or 0
    read = seen + count_outside(parts["input"], seen, total is not None)
    hidden = count_outside(parts["output"], written, total is not None)
    hidden = max(hidden, (total or 0) - written - read)
    is_whole = prompt is not None and completion is not None
    return Bill(read, written + hidden, hidden, thoughts, find_dollars(usage), is_whole)


def find_side(parent: str, name: str) -> str:
    """Return "input" or "output" for a field that tells a part of it, "" for any other."""
    if OUTPUT_PARTS.search(parent) or THOUGHTS.search(name):
        return "output"
    return "input" if INPUT_PARTS.search(parent or name) else ""


def count_outside(parts: Mapping[str, int], whole: int, is_explained: bool) -> int:
    """Return the tokens of parts that their whole does not hold, or may not hold where no total explains it."""
    n = sum(parts.values())
    return n if n > whole or not is_explained else 0


def walk_fields(usage: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (parent's name or "", name, value) of the fields and of those one level deeper, in snake case."""
    left = MAX_FIELDS
    for key, value in usage.items():
        inner = value.items() if isinstance(value, dict) else ()
        for parent, name, found in [("", key, value), *((key, name, found) for name, found in inner)][:left]:
            left -= 1
            yield to_snake_case(parent), to_snake_case(name), found


def to_snake_case(name: str) -> str:
    """Return promptTokenCount as prompt_token_count."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name[:100]).lower()


def find_most(counts: Mapping[str, int], names: tuple[str, ...]) -> int | None:
    """Return the largest of the counts under these names, None without any."""
    return max((counts[name] for name in names if name in counts), default=None)


def read_count(value: Any) -> int | None:
    """Return a whole number of tokens, None for anything else and for what is not credible."""
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def find_dollars(usage: Mapping[str, Any]) -> int:
    """Return the picodollars that a usage names, rounded up, 0 for none."""
    groups: dict[str, dict[str, Decimal]] = {}
    for parent, name, value in walk_fields(usage):
        unit = TICKS if name.endswith("ticks") else Decimal(1)
        amount = read_dollars(value, unit) if "cost" in name or "cost" in parent else None
        if amount is not None:
            groups.setdefault(parent, {})[name] = amount
    most = Decimal(0)
    for found in groups.values():
        wholes = [amount for name, amount in found.items() if not COST_PARTS.search(name) or "upstream" in name]
        most = max(most, *wholes) if wholes else max(most, sum(found.values(), Decimal(0)))
    if usage.get("is_byok") is True:  # cost is a fee, and the provider bills the rest to a key of the user's own
        fee = groups.get("", {}).get("cost", Decimal(0))
        most = max(most, fee + groups.get("cost_details", {}).get("upstream_inference_cost", Decimal(0)))
    return math.ceil(most * PICO)


def read_dollars(value: Any, unit: Decimal) -> Decimal | None:
    """Return a credible amount of dollars, given in a unit, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 40:
        return None
    try:
        amount = Decimal(str(value)) * unit
    except InvalidOperation:
        return None
    return amount if amount.is_finite() and 0 <= amount <= MAX_USD and amount.adjusted() > -40 else None

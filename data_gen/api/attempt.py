"""Attempts at requests: requests ready to send, the outcomes of sending them, and who takes these."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_gen.api.client import Reply
from data_gen.api.dialect import Dialect, Sampling
from data_gen.api.ledger import Entry, Usage
from data_gen.api.prices import Price
from data_gen.api.prompt import hash_text


@dataclass(frozen=True)
class PreparedRequest:
    """A request ready to send."""

    body: dict[str, Any]
    body_sha256: str
    max_cost: int  # picodollars that one attempt can cost


class MessageSource(Protocol):
    """What a run asks: the messages of each request, numbered from 0."""

    @property
    def n_tasks(self) -> int:
        """Return the rows that an answer is expected to give."""

    @property
    def n_requests(self) -> int | None:
        """Return the number of requests that there are, None if they never end."""

    @property
    def formats(self) -> Mapping[str, Any]:
        """Return the response_format of each Dialect.format."""

    def build_messages(self, number: int) -> list[dict[str, str]]:
        """Return the chat messages of the request with this number."""

    def compute_fingerprint(self) -> dict[str, Any]:
        """Return the settings that decide the prompts. Equal ones give equal prompts."""


@dataclass(frozen=True)
class RequestBuilder:
    """Builds the requests to one model at one price."""

    prompter: MessageSource
    sampling: Sampling
    price: Price

    def prepare(self, number: int, dialect: Dialect) -> PreparedRequest:
        """Build the request of this number. Its max_cost counts each byte of the body as a token: no text has more."""
        body = self.sampling.build_body(self.prompter.build_messages(number), dialect, self.prompter.formats)
        text = json.dumps(body, ensure_ascii=False)
        n_bytes = len(text.encode("utf-8", "surrogatepass"))
        max_cost = self.price.compute_cost(n_bytes, self.sampling.max_output_tokens)
        return PreparedRequest(body, hash_text(json.dumps(body["messages"])), max_cost)

    def get_format(self, dialect: Dialect) -> Mapping[str, Any] | None:
        """Return the response_format that a request in this dialect has."""
        return self.sampling.extra.get("response_format") or self.prompter.formats[dialect.format]


@dataclass(frozen=True)
class Limits:
    """How long and how often a run tries."""

    patience_s: float = 900  # without any answer
    max_attempts: int = 8  # failures of one request
    poll_s: float = 30  # between two looks at a batch
    batch_tokens: int | None = None  # enqueued at most, None if unknown


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt, once it is on the disk."""

    attempt: int
    prepared: PreparedRequest
    dialect: Dialect
    reply: Reply
    kind: str  # as data_gen.api.ledger defines it
    usage: Usage
    cost: int


@dataclass(order=True)
class Job:
    """A request that is not done."""

    number: int
    tries: int = field(default=0, compare=False)
    failures: int = field(default=0, compare=False)  # tries but for those that met a rate limit
    strikes: int = field(default=0, compare=False)  # failures while others got through
    answers_seen: int = field(default=0, compare=False)


class RowKeeper(Protocol):
    """The part of a Curator that a run uses."""

    unit: str
    wanted: int
    rows: list[Any]
    kept_by_request: list[int]
    rejected: Counter[str]
    items: int
    answers: int

    @property
    def is_full(self) -> bool:
        """Return whether as many rows are kept as wanted."""

    def add_outcome(self, entry: Entry) -> None:
        """Take the outcome of the next request."""

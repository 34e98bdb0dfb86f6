"""The Batch API: files of requests at half the price, with answers within a day.

Each step is recorded on disk: the attempts of a batch and its name before the batch is sent, then its id, then its
answers. The server keeps the name as metadata. If the process dies, the next one looks for the name at the server, so
that no batch is sent twice. If it is unknown there, the batch was never begun and its requests are planned anew.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from data_gen.api.answers import bill_outcome, judge_success
from data_gen.api.attempt import PreparedRequest, RequestBuilder
from data_gen.api.collector import FRUITLESS_AT_START, RECENT_REQUESTS, Collector
from data_gen.api.errors import classify_error, extract_message
from data_gen.api.ledger import DONE, Entry, Statement
from data_gen.api.prices import Price
from data_gen.api.retries import Calls, Halted
from data_gen.base.files import to_json_line

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # of one input file
ENDED = ("completed", "failed", "expired", "cancelled")
TOKEN_LIMIT = "token_limit_exceeded"
BYTES_A_TOKEN = 4  # of a prompt, only for the limit on enqueued tokens
ANSWERS_PER_COMMIT = 500  # answers in one transaction
CHECK_SIGNALS_EVERY = 100  # requests built (25 ms) between two checks for a signal
MAX_FRUITLESS_ROUNDS = 3  # rounds without an answer that end a run
FIRST_SHARE = 0.7  # of tasks assumed to be kept, at first: too few requests cost a round, too many cost money


@dataclass(frozen=True)
class Sent:
    """An attempt in a batch, without an outcome yet."""

    number: int  # of the request
    body_sha256: str
    model: str
    max_cost: int  # picodollars that it can cost


@dataclass
class Batch:
    """A batch that has not ended."""

    name: str
    tokens: int  # of its prompts
    price: Price  # at which it was planned
    sent: dict[int, Sent]  # by attempt
    id: str = ""  # at the server, once created
    shown: tuple[str, int] | None = None  # the state that was last printed


Line: TypeAlias = tuple[int, str, int | None, str]  # one outcome in a batch's file: attempt, kind, status, body


async def run_batches(collector: Collector, builder: RequestBuilder) -> None:
    """Run rounds of batches until the dataset is full, the cap is reached or stop() was called."""
    batches = Batches(collector, builder)
    with contextlib.suppress(Halted):
        await batches.recover()
        await batches.run_rounds()
        if collector.curator.is_full:
            await batches.cancel_open()
    if collector.fatal and not collector.curator.is_full:
        collector.status = "failed"
        raise collector.fatal


async def end_batches(collector: Collector, builder: RequestBuilder) -> None:
    """Cancel the batches of an earlier run with --batch and read their answers. Direct requests can do the rest."""
    batches = Batches(collector, builder)
    with contextlib.suppress(Halted):
        await batches.recover()
        while batches.open:
            await batches.cancel_open()
            if collector.curator.is_full or collector.stopping or collector.fatal:
                return
            await batches.calls.pause(collector.limits.poll_s if batches.open else 0)


def build_line(attempt: int, prepared: PreparedRequest) -> bytes:
    """Return the line of an attempt in the file of a batch."""
    asked = {"custom_id": str(attempt), "method": "POST", "url": "/v1/chat/completions", "body": prepared.body}
    return json.dumps(asked).encode() + b"\n"


def parse_line(line: bytes | str, clean_body: Callable[[str], str] = str) -> Line | None:
    """Return the outcome in a line of an output or error file, or None for a line that is no outcome of ours."""
    try:
        found = json.loads(line)
        attempt, response = int(str(found["custom_id"])), found.get("response") or {}
        status, body = response.get("status_code"), response.get("body") or found.get("error")
        text = clean_body(to_json_line(body).rstrip("\n"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    status = status if isinstance(status, int) and 100 <= status < 600 else None
    if status == 200:
        kind, status = judge_success(text)
    else:
        kind = classify_error(status or 500, text)
    return attempt, "refused" if kind == "unsupported" else kind, status, text


class Batches:
    """Submits queued requests in batches, checks the batches at the server and reads their answers."""

    def __init__(self, collector: Collector, builder: RequestBuilder):
        self.collector, self.builder = collector, builder
        self.ledger, self.budget, self.client = collector.ledger, collector.budget, collector.client
        self.api = collector.client.api
        self.calls = Calls(collector)
        self.queue: deque[int] = deque()  # requests
        self.open: dict[str, Batch] = {}  # by name
        self.token_limit = collector.limits.batch_tokens
        self.is_cancelling = False

    async def recover(self) -> None:
        """Take over the batches of an earlier process."""
        for name, id, tokens, price_in, price_out in self.ledger.read_open_batches():
            sent = {row[0]: Sent(*row[1:]) for row in self.ledger.read_unanswered(name)}
            most = sum(one.max_cost for one in sent.values())
            self.budget.uncertain -= most
            self.budget.reserved += most
            self.open[name] = Batch(name, tokens, Price(price_in, price_out), sent, id or "")
        for batch in [batch for batch in self.open.values() if not batch.id]:
            found = await self.calls.make_call(functools.partial(self.find_batch, batch))
            if found:
                await self.record_created(batch, found.id)
            else:
                await self.close_batch(batch, "never begun")

    async def run_rounds(self) -> None:
        """Plan, submit and check batches until the run ends."""
        collector, fruitless, answers = self.collector, 0, -1
        while not (collector.curator.is_full or collector.stopping or collector.fatal):
            if not self.queue and not self.open:
                fruitless = fruitless + 1 if len(collector.done) == answers else 0
                if fruitless == MAX_FRUITLESS_ROUNDS:
                    collector.end_run(
                        f"{fruitless} rounds of batches gave no answer (--max-attempts leaves requests out)"
                    )
                    return
                answers = len(collector.done)
                self.queue.extend(self.plan_round())
            while self.queue and await self.submit_batch():
                pass
            for batch in list(self.open.values()):
                await self.check_batch(batch)
            collector.progress.show_state(collector)
            if self.open and not collector.curator.is_full:
                await self.calls.pause(collector.limits.poll_s)

    async def cancel_open(self) -> None:
        """Read the batches that have ended and cancel the others. A later run reads the answers billed until then."""
        self.is_cancelling = True
        for batch in list(self.open.values()):
            await self.check_batch(batch)
            if batch.name in self.open:
                await self.calls.make_call(functools.partial(self.cancel_batch, batch))

    async def cancel_batch(self, batch: Batch) -> None:
        """Cancel a batch, unless it has ended meanwhile."""
        with contextlib.suppress(self.client.openai.ConflictError):
            await self.api.batches.cancel(batch.id)

    # ---- planning ------------------------------------------------------------------------------------------------

    def plan_round(self) -> list[int]:
        """Return the requests of a round: the missing ones, and as many new ones as should fill the dataset."""
        collector, curator = self.collector, self.collector.curator
        holes = [number for number in range(collector.highest + 1) if number not in collector.done]
        n_curated, rows_per_request = len(curator.kept_by_request), collector.estimate_yield()
        if n_curated < FRUITLESS_AT_START:
            rows_per_request = max(rows_per_request, FIRST_SHARE * self.builder.prompter.n_tasks)
        missing = curator.wanted - len(curator.rows) - (len(collector.ready) + len(holes)) * rows_per_request
        new = max(0, math.ceil(missing / rows_per_request))
        if n_curated > RECENT_REQUESTS:
            new = math.ceil(1.05 * new)  # the yield is well known, and one more round would take hours
        if not curator.rows:
            new = min(new, FRUITLESS_AT_START)  # no answer has given a row yet: risk little money
        first = collector.highest + 1
        return holes + list(range(first, first + max(new, not holes)))

    async def submit_batch(self) -> bool:
        """Record and start one batch of queued requests, as large as the limits and the budget allow.

        Return False if the limits or the budget allow no request now.
        """
        tokens_left = math.inf
        if self.token_limit is not None:
            tokens_left = self.token_limit - sum(batch.tokens for batch in self.open.values())
        name, n_bytes, n_tokens = f"cria-{uuid.uuid4().hex}", 0, 0
        sent: dict[int, Sent] = {}
        lines: list[bytes] = []
        intents: list[Statement] = []
        while self.queue and len(sent) < MAX_REQUESTS:
            prepared = self.builder.prepare(self.queue[0], self.collector.dialect)
            line = build_line(self.ledger.next_attempt, prepared)
            tokens = len(line) // BYTES_A_TOKEN
            is_too_much = n_bytes + len(line) > MAX_BYTES or n_tokens + tokens > tokens_left
            if is_too_much and (sent or self.open):  # a single request is sent anyway: the server decides
                break
            if not self.budget.reserve(prepared.max_cost):
                self.queue.clear()
                if not sent and not self.open:
                    self.collector.stop_at_cap(prepared)
                break
            about = Sent(self.queue.popleft(), prepared.body_sha256, prepared.body["model"], prepared.max_cost)
            attempt, intent = self.ledger.prepare_intent(
                about.number, about.body_sha256, about.model, about.max_cost, name
            )
            sent[attempt] = about
            lines.append(line)
            intents.append(intent)
            n_bytes, n_tokens = n_bytes + len(line), n_tokens + tokens
            if len(sent) % CHECK_SIGNALS_EVERY == 0:
                await self.calls.pause(0)
        if not sent:
            return False
        price = self.builder.price
        batch = self.open[name] = Batch(name, n_tokens, price, sent)
        await self.ledger.write(self.ledger.prepare_batch(name, n_tokens, price.input, price.output), *intents)
        await self.create_batch(batch, b"".join(lines))
        return True

    # ---- at the server -------------------------------------------------------------------------------------------

    async def create_batch(self, batch: Batch, data: bytes) -> None:
        """Upload the file of a batch and start the batch."""
        upload = (f"{batch.name}.jsonl", data)
        file = await self.calls.make_call(lambda: self.api.files.create(file=upload, purpose="batch"))
        tries = itertools.count()

        async def start() -> Any:
            # After a lost reply the batch may have been started.
            found = await self.find_batch(batch) if next(tries) else None
            return found or await self.api.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"cria_batch": batch.name},
            )

        await self.record_created(batch, (await self.calls.make_call(start)).id)

    async def record_created(self, batch: Batch, id: str) -> None:
        """Record the id of a batch at the server."""
        await self.ledger.write(self.ledger.prepare_batch_event(batch.name, "created", id))
        batch.id = id
        self.collector.progress.print_line(f"batch {id}: {len(batch.sent):,} requests")

    async def find_batch(self, batch: Batch) -> Any:
        """Return the server's batch of this name, or None."""
        async for other in self.api.batches.list(limit=100):
            if (other.metadata or {}).get("cria_batch") == batch.name:
                return other
        return None

    async def check_batch(self, batch: Batch) -> None:
        """Ask for the state of a batch, and read the files of one that has ended."""
        state = await self.calls.make_call(lambda: self.api.batches.retrieve(batch.id))
        counts = state.request_counts
        total, completed = (counts.total, counts.completed) if counts else (0, 0)
        shown = state.status, 10 * completed // max(1, total)
        if shown != batch.shown:
            batch.shown = shown
            share = f", {completed:,} of {total:,}" if total else ""
            self.collector.progress.print_line(f"batch {batch.id}: {state.status}{share}")
        if state.status not in ENDED:
            return
        files = [file for file in (state.output_file_id, state.error_file_id) if file]
        answered = sum([await self.read_file(batch, file) for file in files])
        left = [one.number for one in batch.sent.values()]
        # The server counts more answers than its files hold: the missing ones may have been billed.
        await self.close_batch(batch, state.status, "lost" if completed > answered else "failed")
        if state.status == "failed" and not self.is_cancelling:
            self.queue.extendleft(reversed(left))
            self.handle_rejection(batch, len(left), (state.errors.data if state.errors else None) or [])

    async def close_batch(self, batch: Batch, why: str, kind: str = "failed") -> None:
        """Record the end of a batch. kind becomes the outcome of its requests without one, which can be sent again."""
        left: list[Line] = [(attempt, kind, None, why) for attempt in batch.sent]
        await self.record_outcomes(batch, left, self.ledger.prepare_batch_event(batch.name, "ended", why))
        del self.open[batch.name]

    def handle_rejection(self, batch: Batch, n_requests: int, errors: list[Any]) -> None:
        """End the run after a rejected batch. If the limit on enqueued tokens was the reason, make smaller batches."""
        if any(error.code == TOKEN_LIMIT for error in errors) and (self.open or n_requests != 1):
            self.token_limit = (batch.tokens + sum(other.tokens for other in self.open.values())) // 2
            limit = f"{self.token_limit:,} at once from now on"
            self.collector.progress.print_line(f"the server's limit on enqueued tokens: {limit}")
            return
        said = "; ".join(str(error.message) for error in errors[:3]) or "no reason"
        self.collector.end_run(f"the server did not take batch {batch.id}: {said}")

    # ---- reading answers -----------------------------------------------------------------------------------------

    async def read_file(self, batch: Batch, file: str) -> int:
        """Record the lines of an output or error file and return the number of answers in it."""

        async def read_content() -> bytes:
            data = (await self.api.files.content(file)).content
            if b'"custom_id"' not in data:
                raise ValueError(f"file {file} holds no line of a batch")  # a proxy's page
            return data

        lines, answered = io.BytesIO(await self.calls.make_call(read_content)), 0
        while group := list(itertools.islice(lines, ANSWERS_PER_COMMIT)):
            found = [line for text in group if (line := parse_line(text, self.client.cleaner.clean_body))]
            answered += sum(status == 200 for _, _, status, _ in found)
            await self.record_outcomes(batch, found)
        return answered

    async def record_outcomes(self, batch: Batch, outcomes: Iterable[Line], *more: Statement) -> None:
        """Write outcomes of attempts that have none yet, and more statements, to disk. Then tell the collector."""
        statements, recorded = list(more), []
        for attempt, kind, status, body in outcomes:
            sent = batch.sent.pop(attempt, None)
            if sent is None:
                continue
            if kind == "fatal":
                self.collector.end_run(f"the server said {status or 'an error'} in a batch: {extract_message(body)}")
                kind = "failed"
            tries = self.ledger.count_failures(sent.number) + 1 if kind in ("failed", "lost") and status else 0
            is_last = tries >= self.collector.limits.max_attempts
            kind, usage, cost = bill_outcome(kind, body, batch.price, sent.max_cost, is_last)
            statements.append(self.ledger.prepare_outcome(attempt, kind, status, body, usage, cost))
            recorded.append((sent, usage, Entry(sent.number, attempt, kind, body, sent.body_sha256, sent.model, cost)))
        await self.ledger.write(*statements)
        for sent, usage, entry in recorded:
            if entry.kind == "lost":
                self.budget.count_lost(sent.max_cost)
            else:
                self.budget.settle(sent.max_cost, entry.cost)
                self.collector.check_bill(sent.number, usage, entry.cost)
            if entry.kind == "answer":
                format = self.builder.get_format(self.collector.dialect)
                self.collector.observe_answer(entry.body, format, batch.price, entry.cost)
            if entry.kind in DONE:
                self.collector.settle_request(entry)

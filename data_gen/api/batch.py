"""The Batch API: files of requests, half the price, answers within a day.

Every step is on the disk before it is taken: the attempts of a batch and its name, then its id, then its answers. A
batch that was created when the process died is found again by its name, its metadata at the server: none is sent twice.
One that is not there was never begun, and its requests are planned anew.
"""

import contextlib
import io
import itertools
import json
import math
import uuid
from collections import deque
from dataclasses import dataclass

from data_gen.api.client import is_completion, kind_of, message_of, read_answer
from data_gen.api.collector import HOPELESS_FIRST, RECENT
from data_gen.api.ledger import DONE, Entry
from data_gen.api.prices import Price
from data_gen.api.retries import Calls, Halted
from data_gen.base.cli import json_line

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of one input file
ENDED = ("completed", "failed", "expired", "cancelled")
TOKEN_LIMIT = "token_limit_exceeded"
BYTES_A_TOKEN = 4  # of a prompt, for the limit on enqueued tokens alone
GROUP = 500  # answers a transaction
BREATH = 100  # requests drawn, 25 ms, between two looks at signals
MOST_FRUITLESS = 3
FIRST_SHARE = 0.7  # of tasks are kept, until more is known: too few requests cost a round, too many cost money


@dataclass(frozen=True)
class Sent:
    """An attempt without an outcome."""

    number: int
    body_sha256: str
    model: str
    most: int


@dataclass
class Batch:
    """A batch that has not ended: its name, its prompts' tokens, the price it was planned at, its id once created."""

    name: str
    tokens: int
    price: Price
    sent: dict  # {attempt: Sent}
    id: str | None = None
    told: tuple = ()


async def run_batches(collector, options, ask, price):
    """Rounds of batches until the dataset is full, the cap is reached or stop() was called. ask, price: of batches."""
    batches = Batches(collector, options, ask, price)
    with contextlib.suppress(Halted):
        await batches.recover()
        await batches.rounds()
        if collector.curator.full:
            await batches.leave()
    if collector.fatal and not collector.curator.full:
        collector.status = "failed"
        raise collector.fatal


async def end_batches(collector, options, ask, price):
    """Cancels what an earlier run with --batch left and takes what it gave: the rest can then be asked for directly."""
    batches = Batches(collector, options, ask, price)
    with contextlib.suppress(Halted):
        await batches.recover()
        while batches.open:
            await batches.leave()
            if collector.curator.full or collector.stopping or collector.fatal:
                return
            await batches.calls.pause(options.poll if batches.open else 0)


def line_of(attempt, ask) -> bytes:
    asked = {"custom_id": str(attempt), "method": "POST", "url": "/v1/chat/completions", "body": ask.body}
    return json.dumps(asked).encode() + b"\n"


def read_line(line, clean=str):
    """(attempt, kind, status, body) of a line of an output or error file, or None where it is none of ours."""
    try:
        found = json.loads(line)
        attempt, response = int(str(found["custom_id"])), found.get("response") or {}
        status, body = response.get("status_code"), response.get("body") or found.get("error")
        text = clean(json_line(body).rstrip("\n"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    status = status if isinstance(status, int) and 100 <= status < 600 else None
    if status == 200:
        return attempt, "answer" if is_completion(text) else "lost", status, text
    kind = kind_of(status or 500, text)
    return attempt, "refused" if kind == "unsupported" else kind, status, text


class Batches:
    """What is queued, what is at the server, and what comes back."""

    def __init__(self, collector, options, ask, price):
        self.collector, self.options, self.ask, self.price = collector, options, ask, price
        self.ledger, self.budget, self.client = collector.ledger, collector.budget, collector.client
        self.api, self.say = collector.client.api, collector.progress.say
        self.calls = Calls(collector, options)
        self.queue, self.open, self.token_limit, self.is_leaving = deque(), {}, options.batch_tokens, False

    async def recover(self):
        """Takes up the batches that an earlier process left."""
        for name, id, tokens, price_in, price_out in self.ledger.unended_batches():
            sent = {attempt: Sent(*about) for attempt, *about in self.ledger.unanswered(name)}
            most = sum(one.most for one in sent.values())
            self.budget.uncertain -= most
            self.budget.reserved += most
            self.open[name] = Batch(name, tokens, Price(price_in, price_out), sent, id)
        for batch in [batch for batch in self.open.values() if batch.id is None]:
            found = await self.calls.make(lambda b=batch: self.find(b))
            await (self.created(batch, found.id) if found else self.close(batch, "never begun"))

    async def rounds(self):
        collector, fruitless, answers = self.collector, 0, -1
        while not (collector.curator.full or collector.stopping or collector.fatal):
            if not self.queue and not self.open:
                fruitless = fruitless + 1 if len(collector.done) == answers else 0
                if fruitless == MOST_FRUITLESS:
                    collector.end(f"{fruitless} rounds of batches gave no answer (--max-attempts leaves requests out)")
                    return
                answers = len(collector.done)
                self.queue.extend(self.next_round())
            while self.queue and await self.submit():
                pass
            for batch in list(self.open.values()):
                await self.look(batch)
            collector.progress.show(collector)
            if self.open and not collector.curator.full:
                await self.calls.pause(self.options.poll)

    async def leave(self):
        """Takes what has ended and cancels the rest: what that did until now is billed, and taken by a later run."""

        async def cancel(batch):
            with contextlib.suppress(self.client.openai.ConflictError):  # it has ended meanwhile
                await self.api.batches.cancel(batch.id)

        self.is_leaving = True
        for batch in list(self.open.values()):
            await self.look(batch)
            if batch.name in self.open:
                await self.calls.make(lambda b=batch: cancel(b))

    # ---- planning ------------------------------------------------------------------------------------------------

    def next_round(self) -> list[int]:
        """Numbers of requests: those that are missing among the answered, and as many new ones as should do."""
        collector, curator = self.collector, self.collector.curator
        holes = [number for number in range(collector.highest + 1) if number not in collector.done]
        known, each = len(curator.kept_by_request), collector.expected_yield()
        if known < HOPELESS_FIRST:
            each = max(each, FIRST_SHARE * self.options.tasks_per_request)
        missing = curator.wanted - len(curator.rows) - (len(collector.ready) + len(holes)) * each
        new = max(0, math.ceil(missing / each))
        if known > RECENT:
            new = math.ceil(1.05 * new)  # a yield that is known, and a round that takes hours
        if not curator.rows:
            new = min(new, HOPELESS_FIRST)  # nothing shows yet that the model's answers are of any use
        first = collector.highest + 1
        return holes + list(range(first, first + max(new, not holes)))

    async def submit(self) -> bool:
        """One batch of what is queued, as large as the limits and the budget allow: on the disk, then at the server.
        False where there is no room now."""
        room = math.inf if self.token_limit is None else self.token_limit - sum(b.tokens for b in self.open.values())
        name, sent, lines, intents, n_bytes, n_tokens = f"cria-{uuid.uuid4().hex}", {}, [], [], 0, 0
        while self.queue and len(sent) < MOST_REQUESTS:
            ask = self.ask(self.queue[0], self.collector.dialect)
            line = line_of(self.ledger.next_attempt, ask)
            tokens = len(line) // BYTES_A_TOKEN
            is_too_much = n_bytes + len(line) > MOST_BYTES or n_tokens + tokens > room
            if is_too_much and (sent or self.open):  # one alone is the server's to judge
                break
            if not self.budget.reserve(ask.most):
                self.queue.clear()
                if not sent and not self.open:
                    self.collector.check_cap(ask)
                break
            about = Sent(self.queue.popleft(), ask.body_sha256, ask.body["model"], ask.most)
            attempt, intent = self.ledger.intent(about.number, about.body_sha256, about.model, about.most, name)
            sent[attempt] = about
            lines.append(line)
            intents.append(intent)
            n_bytes, n_tokens = n_bytes + len(line), n_tokens + tokens
            if len(sent) % BREATH == 0:
                await self.calls.pause(0)
        if not sent:
            return False
        batch = self.open[name] = Batch(name, n_tokens, self.price, sent)
        await self.ledger.write(self.ledger.plan(name, n_tokens, self.price.input, self.price.output), *intents)
        await self.create(batch, b"".join(lines))
        return True

    # ---- at the server -------------------------------------------------------------------------------------------

    async def create(self, batch, data):
        """Uploads the batch's file and starts it."""
        file = await self.calls.make(lambda: self.api.files.create(file=(f"{batch.name}.jsonl", data), purpose="batch"))
        tries = itertools.count()

        async def start():
            found = await self.find(batch) if next(tries) else None  # a reply that is lost: it may have been started
            return found or await self.api.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"cria_batch": batch.name},
            )

        await self.created(batch, (await self.calls.make(start)).id)

    async def created(self, batch, id):
        await self.ledger.write(self.ledger.event(batch.name, "created", id))
        batch.id = id
        self.say(f"batch {id}: {len(batch.sent):,} requests")

    async def find(self, batch):
        """The batch of this name at the server, or None."""
        async for other in self.api.batches.list(limit=100):
            if (other.metadata or {}).get("cria_batch") == batch.name:
                return other
        return None

    async def look(self, batch):
        """Asks how a batch does; takes what an ended one gave."""
        state = await self.calls.make(lambda: self.api.batches.retrieve(batch.id))
        total, completed = (
            (state.request_counts.total, state.request_counts.completed) if state.request_counts else (0, 0)
        )
        told = state.status, 10 * completed // max(1, total)
        if told != batch.told:
            batch.told = told
            self.say(f"batch {batch.id}: {state.status}" + (f", {completed:,} of {total:,}" if total else ""))
        if state.status not in ENDED:
            return
        files = [file for file in (state.output_file_id, state.error_file_id) if file]
        answered = sum([await self.take_file(batch, file) for file in files])
        left = [one.number for one in batch.sent.values()]
        # Answers that were made and cannot be had may have been billed.
        await self.close(batch, state.status, "lost" if completed > answered else "failed")
        if state.status == "failed" and not self.is_leaving:
            self.queue.extendleft(reversed(left))
            self.turned_away(batch, len(left), (state.errors.data if state.errors else None) or [])

    async def close(self, batch, why, kind="failed"):
        """A batch is over; its requests that have no outcome can be sent again."""
        left = [(attempt, kind, None, why) for attempt in batch.sent]
        await self.take(batch, left, self.ledger.event(batch.name, "ended", why))
        del self.open[batch.name]

    def turned_away(self, batch, n_requests, errors):
        """A batch was not let in: smaller ones from now on, where the limit on enqueued tokens was the reason."""
        if any(error.code == TOKEN_LIMIT for error in errors) and (self.open or n_requests != 1):
            self.token_limit = (batch.tokens + sum(other.tokens for other in self.open.values())) // 2
            self.say(f"the server's limit on enqueued tokens: {self.token_limit:,} at once from now on")
            return
        said = "; ".join(str(error.message) for error in errors[:3]) or "no reason"
        self.collector.end(f"the server did not take batch {batch.id}: {said}")

    # ---- coming back ---------------------------------------------------------------------------------------------

    async def take_file(self, batch, file) -> int:
        """The lines of an output or error file, some hundred a transaction. The number of answers in it."""

        async def content():
            data = (await self.api.files.content(file)).content
            if b'"custom_id"' not in data:
                raise ValueError(f"file {file} holds no line of a batch")  # a proxy's page
            return data

        lines, answered = io.BytesIO(await self.calls.make(content)), 0
        while group := list(itertools.islice(lines, GROUP)):
            found = [line for text in group if (line := read_line(text, self.client.clean))]
            answered += sum(status == 200 for _, _, status, _ in found)
            await self.take(batch, found)
        return answered

    async def take(self, batch, outcomes, *statements):
        """Records outcomes of attempts that have none yet, with the statements, then hands them on."""
        statements, taken = list(statements), []
        for attempt, kind, status, body in outcomes:
            sent = batch.sent.pop(attempt, None)
            if sent is None:
                continue
            if kind == "fatal":
                self.collector.end(f"the server said {status or 'an error'} in a batch: {message_of(body)}")
                kind = "failed"
            usage, cost = None, 0
            if kind == "answer":
                usage = read_answer(body).usage
                cost = batch.price.cost(*usage) if usage else sent.most
            elif kind != "refused" and status and self.ledger.failures(sent.number) + 1 >= self.options.max_attempts:
                kind, cost = "refused", sent.most if kind == "lost" else 0
            statements.append(self.ledger.outcome(attempt, kind, status, body, usage or (None, None), cost))
            taken.append((sent, usage, Entry(sent.number, attempt, kind, body, sent.body_sha256, sent.model, cost)))
        await self.ledger.write(*statements)
        for sent, usage, entry in taken:
            if entry.kind == "lost":
                self.budget.lose(sent.most)
            else:
                self.budget.settle(sent.most, entry.cost)
                self.collector.check_bill(sent.number, usage or (None, None))
            if entry.kind in DONE:
                self.collector.settle(entry)

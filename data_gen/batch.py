"""The Batch API: files of requests, half the price, answers within a day.

Every step is on the disk before it is taken: the attempts of a batch and its name, then its id, then its answers. A
batch that was created when the process died is found again by its name, its metadata at the server: none is sent twice.
"""

import asyncio
import io
import json
import math
import time
import uuid
from dataclasses import dataclass, replace

from data_gen.cli import Failure
from data_gen.client import is_completion, kind_of, message_of, read_answer
from data_gen.collect import RECENT
from data_gen.ledger import DONE, Entry

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of one input file
ENDED = ("completed", "failed", "expired", "cancelled")
TOKEN_LIMIT = "token_limit_exceeded"
BYTES_A_TOKEN = 4  # of a prompt, for the limit on enqueued tokens alone
GROUP = 500  # answers a transaction
MOST_FRUITLESS = 3
LIST_PAGES = 50  # of batches at the server, newest first, to look for one of ours


@dataclass
class Batch:
    """A batch that has not ended: its name, its id once created, {attempt: (request, Ask)} without an outcome."""

    name: str
    id: str | None
    asks: dict
    told: str = ""

    @property
    def tokens(self) -> int:
        return sum(size_of(ask) // BYTES_A_TOKEN for _, ask in self.asks.values())


async def run_batches(collector, options, ask, price):
    """Rounds of batches until the dataset is full, the cap is reached or stop() was called. ask, price: of batches."""
    await Batches(collector, options, ask, price).run()
    if collector.fatal:
        collector.status = "failed"
        raise collector.fatal


def size_of(ask) -> int:
    return len(json.dumps(ask.body)) + 100


def line_of(attempt, ask) -> str:
    asked = {"custom_id": str(attempt), "method": "POST", "url": "/v1/chat/completions", "body": ask.body}
    return json.dumps(asked) + "\n"


class Batches:
    """What is queued, what is at the server, and what comes back."""

    def __init__(self, collector, options, ask, price):
        self.collector, self.options, self.ask, self.price = collector, options, ask, price
        self.ledger, self.budget, self.api = collector.ledger, collector.budget, collector.client.api
        self.queue, self.token_limit = [], options.batch_tokens
        self.fruitless = 0  # rounds without an answer, in a row
        self.open = {batch.name: batch for batch in self.unended()}
        run_id = self.ledger.settings().get("run_id")
        if run_id is None:
            run_id = uuid.uuid4().hex
            self.ledger.set(run_id=run_id)
        self.run_id = run_id

    async def run(self):
        collector = self.collector
        for batch in list(self.open.values()):
            if batch.id is None:
                await self.create(batch, await self.find(batch))
        answers = -1
        while not (collector.curator.full or collector.stopping or collector.fatal):
            if not self.queue and not self.open:
                self.fruitless = self.fruitless + 1 if len(collector.done) == answers else 0
                answers, self.queue = len(collector.done), self.next_round()
            if self.fruitless > MOST_FRUITLESS:
                collector.end(f"{MOST_FRUITLESS} rounds of batches gave no answer")
            while self.queue and not (collector.stopping or collector.fatal) and self.has_room():
                await self.submit()
            await self.pause(self.options.poll)
            for batch in list(self.open.values()):
                await self.look(batch)
            collector.progress.show(collector)
        if collector.curator.full:
            for batch in self.open.values():  # what they did until now is billed, and is there for a larger --rows
                await self.call(lambda b=batch: self.api.batches.cancel(b.id))

    async def pause(self, seconds):
        """Sleeps, but for a stop."""
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until and not self.collector.stopping:
            await asyncio.sleep(min(0.5, max(0.0, until - time.monotonic())))

    # ---- planning ------------------------------------------------------------------------------------------------

    def next_round(self) -> list[int]:
        """Numbers of requests: those that are missing among the answered, and as many new ones as should do."""
        collector, curator = self.collector, self.collector.curator
        holes = [number for number in range(collector.highest + 1) if number not in collector.done]
        coming = len(collector.ready) + len(holes)
        missing = curator.wanted - len(curator.rows) - coming * collector.expected_yield()
        new = max(0, math.ceil(missing / collector.expected_yield()))
        if curator.kept_by_request[RECENT:]:
            new = math.ceil(1.05 * new)  # a yield that is known, and a round that takes hours
        first = collector.highest + 1
        return holes + list(range(first, first + max(new, not holes)))

    def has_room(self) -> bool:
        return not self.open or self.token_limit is None or self.enqueued() < self.token_limit

    def enqueued(self) -> int:
        return sum(batch.tokens for batch in self.open.values())

    async def submit(self):
        """One batch of what is queued, as large as the limits and the budget allow: on the disk, then at the server."""
        room = None if self.token_limit is None else max(0, self.token_limit - self.enqueued()) * BYTES_A_TOKEN
        name = f"{self.run_id}-{self.ledger.next_attempt}"
        asks, statements, n_bytes = {}, [("INSERT INTO batch VALUES (?, ?)", (name, time.time()))], 0
        while self.queue and len(asks) < MOST_REQUESTS:
            ask = self.ask(self.queue[0], self.collector.dialect)
            n_bytes += size_of(ask)
            if asks and (n_bytes > MOST_BYTES or (room is not None and n_bytes > room)):
                break
            if not self.budget.reserve(ask.most):
                self.queue.clear()
                if not asks and not self.open:
                    self.collector.check_cap(ask)
                break
            number = self.queue.pop(0)
            attempt, intent = self.ledger.intent(number, ask.body_sha256, ask.body["model"], ask.most, name)
            asks[attempt] = number, ask
            statements.append(intent)
        if asks:
            await self.ledger.write(*statements)
            self.open[name] = Batch(name, None, asks)
            await self.create(self.open[name], None)

    # ---- at the server -------------------------------------------------------------------------------------------

    async def create(self, batch, found):
        """Uploads the batch's file and starts it; found: the id of the one that an earlier process started."""
        since, tries = time.monotonic(), 0
        while found is None:
            data = "".join(line_of(attempt, ask) for attempt, (_, ask) in batch.asks.items()).encode()
            named = (f"{batch.name}.jsonl", io.BytesIO(data))
            file = await self.call(lambda named=named: self.api.files.create(file=named, purpose="batch"))
            try:
                made = await self.api.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"cria_batch": batch.name},
                )
                found = made.id
            except self.collector.client.openai.APIError as error:
                tries += 1
                await self.again(error, tries, since)
                found = await self.find(batch)  # it may have been started all the same
        batch.id = found
        await self.ledger.write(self.event(batch, "created", found))
        self.collector.progress.say(f"batch {found}: {len(batch.asks):,} requests")

    async def find(self, batch) -> str | None:
        """The id of the batch of this name at the server."""
        after = None
        for _ in range(LIST_PAGES):
            page = await self.call(lambda a=after: self.api.batches.list(limit=100, **({"after": a} if a else {})))
            for other in page.data:
                if (other.metadata or {}).get("cria_batch") == batch.name:
                    return other.id
            if not page.has_more or not page.data:
                return None
            after = page.data[-1].id
        return None

    async def look(self, batch):
        """Asks how a batch does; takes what an ended one gave."""
        state = await self.call(lambda: self.api.batches.retrieve(batch.id))
        counts = state.request_counts
        told = f"batch {batch.id}: {state.status}" + (f", {counts.completed:,} of {counts.total:,}" if counts else "")
        if told != batch.told:
            batch.told = told
            self.collector.progress.say(told)
        if state.status not in ENDED:
            return
        for file in (state.output_file_id, state.error_file_id):
            if file:
                await self.take_file(batch, file)
        tokens, left = batch.tokens, [number for number, _ in batch.asks.values()]
        await self.take(batch, [(attempt, "failed", None, state.status) for attempt in batch.asks])
        await self.ledger.write(self.event(batch, "ended", state.status))
        del self.open[batch.name]
        if state.status == "failed":
            self.queue[:0] = left
            self.turned_away(batch, tokens, (state.errors.data if state.errors else None) or [])

    def turned_away(self, batch, tokens, errors):
        """A batch was not let in: smaller ones from now on, where the limit on enqueued tokens was the reason."""
        if any(error.code == TOKEN_LIMIT for error in errors) and (self.open or tokens > 2 * self.least_tokens()):
            self.token_limit = max(self.least_tokens(), (tokens + self.enqueued()) // 2)
            self.collector.progress.say(f"the server's limit: batches of {self.token_limit:,} tokens from now on")
            return
        said = "; ".join(str(error.message) for error in errors[:3]) or "no reason"
        self.collector.end(f"the server did not take batch {batch.id}: {said}")

    def least_tokens(self) -> int:
        return size_of(self.ask(0, self.collector.dialect)) // BYTES_A_TOKEN + 1

    # ---- coming back ---------------------------------------------------------------------------------------------

    async def take_file(self, batch, file):
        """The lines of an output or error file, some hundred a transaction."""
        content = (await self.call(lambda: self.api.files.content(file))).text
        lines = [line for line in content.split("\n") if line.strip()]
        for first in range(0, len(lines), GROUP):
            await self.take(batch, [found for line in lines[first : first + GROUP] if (found := self.read_line(line))])

    def read_line(self, line):
        """(attempt, kind, status, body) of a line, or None where it is none of ours."""
        try:
            found = json.loads(line)
            attempt, response = int(found["custom_id"]), found.get("response") or {}
            status, body = response.get("status_code"), response.get("body") or found.get("error")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        text = self.collector.client.clean(json.dumps(body, ensure_ascii=False))
        if status == 200:
            return attempt, "answer" if is_completion(text) else "lost", status, text
        kind = kind_of(status, text) if status else "failed"
        if kind == "fatal":
            self.collector.end(f"the server said {status} in a batch: {message_of(text)}")
        return attempt, {"unsupported": "refused", "fatal": "failed"}.get(kind, kind), status, text

    async def take(self, batch, outcomes):
        """Records outcomes of attempts that have none yet, then hands them on."""
        statements, entries = [], []
        for attempt, kind, status, body in outcomes:
            if attempt not in batch.asks:
                continue
            number, ask = batch.asks.pop(attempt)
            if kind == "failed" and status and self.ledger.failures(number) + 1 >= self.options.max_attempts:
                kind = "refused"
            usage = read_answer(body).usage if kind == "answer" else None
            cost = (self.price.cost(*usage) if usage else ask.most) if kind == "answer" else 0
            statements.append(self.ledger.outcome(attempt, kind, status, body, usage or (None, None), cost))
            entries.append((Entry(number, attempt, kind, body, ask.body_sha256, ask.body["model"], cost), ask))
        await self.ledger.write(*statements)
        for entry, ask in entries:
            if entry.kind == "lost":
                self.budget.lose(ask.most)
            else:
                self.budget.settle(ask.most, entry.cost)
            if entry.kind in DONE:
                self.collector.settle(entry)

    def event(self, batch, event, value):
        values = (batch.name, time.time(), event, value)
        return "INSERT INTO batch_event (name, at, event, value) VALUES (?, ?, ?, ?)", values

    def unended(self):
        """The batches that an earlier process left, with the attempts that have no outcome, set aside in the budget.

        Bodies are drawn again. Where settings were changed meanwhile, hashes tell, and what was not sent yet is not sent.
        """
        for name, id in self.ledger.unended_batches():
            asks, changed = {}, False
            for attempt, number, body_sha256, reserved in self.ledger.unanswered(name):
                ask = self.ask(number, self.collector.dialect)
                changed |= ask.body_sha256 != body_sha256
                asks[attempt] = number, replace(ask, body_sha256=body_sha256, most=reserved)
                self.budget.uncertain -= reserved
                self.budget.reserved += reserved
            if changed and id is None:
                raise Failure(f"batch {name} was planned with other settings; give those once more, then change them")
            yield Batch(name, id, asks)

    # ---- calls ---------------------------------------------------------------------------------------------------

    async def call(self, make):
        """await make(), again after what passes. Raises Failure after --patience or on what does not pass."""
        since, tries = time.monotonic(), 0
        while True:
            try:
                return await make()
            except self.collector.client.openai.APIError as error:
                tries += 1
                await self.again(error, tries, since)

    async def again(self, error, tries, since=None):
        """Waits after a failure that may pass; raises Failure for another."""
        client = self.collector.client
        response = getattr(error, "response", None)
        text = client.clean(response.text if response is not None else str(error))
        if response is not None and kind_of(response.status_code, text) != "failed":
            raise Failure(
                f"the server said {response.status_code}: {message_of(text)}; the same command goes on from here"
            )
        if since is not None and time.monotonic() - since > self.options.patience:
            raise Failure(f"no answer for {self.options.patience:g} s (--patience): {message_of(text)}")
        await asyncio.sleep(self.collector.rate.backoff(tries))

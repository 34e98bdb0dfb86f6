"""Requests out, answers in: the loop that keeps as many in flight as the server bears and the budget allows."""

import asyncio
import heapq
import json
import time
from dataclasses import asdict, dataclass, field, replace

from data_gen.api.client import Dialect, Reply, message_of, read_answer
from data_gen.api.ledger import Entry
from data_gen.api.prices import usd
from data_gen.api.prompt import sha256
from data_gen.base.cli import Failure

LOOKAHEAD = 10_000  # requests beyond the oldest that has no answer
RECENT = 200  # requests whose yield foretells that of the next
HOPELESS_FIRST, HOPELESS = 20, 400  # requests without a kept row, at the start and later, after which to stop
REFUSED_IN_A_ROW = 20
HOPEFUL_TRIES = 3  # failures after which a request is no longer reckoned with
ODD_STRIKES = 2  # of a request that the server does not understand, though it does others
GRACE_S = 60  # for what is in flight when the run ends


@dataclass(order=True)
class Job:
    """A request that is not done."""

    number: int
    tries: int = field(default=0, compare=False)
    strikes: int = field(default=0, compare=False)  # failures while others got through
    answers_seen: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Ask:
    """One attempt made ready: the body, its hash, what it can cost at most."""

    body: dict
    body_sha256: str
    most: int


class Collector:
    """One run's state between the ledger, the server and the curator.

    ask(number, dialect) -> Ask. An answer is on the disk before it is looked at; outcomes go to the curator in the
    order of their requests, however they come. run() raises Failure where the server will not answer.
    """

    def __init__(self, ledger, curator, client, rate, budget, price, ask, options, progress):
        self.ledger, self.curator, self.client, self.rate = ledger, curator, client, rate
        self.budget, self.price, self.ask, self.options, self.progress = budget, price, ask, options, progress
        self.ready, self.folded, self.done = {}, 0, set()
        self.tasks, self.retries, self.next_number = {}, [], 0
        self.highest = -1  # request that is done
        self.refused_in_a_row, self.stopping, self.blocked, self.fatal, self.status = 0, False, False, None, "running"
        self.last_failure, self.tried = "", set()
        known = ledger.settings().get("dialect")
        self.dialect, self.probed = Dialect(**known) if known else client.dialect, bool(known)
        for entry in progress.reading(ledger.done(), ledger.totals().answers, curator):
            self.fold(entry)
        self.replayed = len(curator.kept_by_request)

    # ---- the loop ------------------------------------------------------------------------------------------------

    async def run(self, until=lambda: False):
        """Until the dataset is full, the budget is used up or stop() was called; or until() holds."""
        self.rate.last_answer = self.rate.clock()  # what was done before this is not the server's silence
        while not (self.curator.full or self.stopping or self.fatal or until()):
            self.start()
            if not self.stopping:
                await self.wait()
        await self.finish()

    def start(self):
        """Starts what may start."""
        self.blocked = False
        while self.rate.may_start() and (self.probed or not self.tasks):
            job = self.next_job()
            if job is None:
                return
            ask = self.ask(job.number, self.dialect)
            if not self.budget.reserve(ask.most):
                heapq.heappush(self.retries, (0.0, job))
                self.blocked = True
                self.check_cap(ask)
                return
            self.rate.started()
            self.tasks[asyncio.create_task(self.attempt(job, ask))] = job

    def check_cap(self, ask):
        """No room for one more: wait for what is in flight, or end."""
        if not self.tasks:
            self.status, self.stopping = "cap reached", True
            self.progress.say(
                f"stopped at the cap: {usd(self.budget.spent)} spent, at most {usd(self.budget.uncertain)} more for "
                f"answers that were lost, and the next request can cost {usd(ask.most, 6)}; "
                f"a larger --max-usd goes on from here"
            )

    def next_job(self) -> Job | None:
        """A failed request whose time has come, or a new one where those on their way will not fill the dataset."""
        if self.retries and self.retries[0][0] <= self.rate.clock():
            return heapq.heappop(self.retries)[1]
        while self.next_number in self.done:
            self.next_number += 1
        is_hole = self.next_number < self.highest  # later ones are answered: those wait for it
        is_wanted = self.next_number < self.folded + LOOKAHEAD and self.wants_more()
        if not (is_hole or is_wanted or self.is_in_doubt()):
            return None
        self.next_number += 1
        return Job(self.next_number - 1, answers_seen=self.rate.answers)

    def wants_more(self) -> bool:
        jobs = *self.tasks.values(), *(job for _, job in self.retries)
        coming = sum(job.tries < HOPEFUL_TRIES for job in jobs) + len(self.ready)
        return len(self.curator.rows) + coming * self.expected_yield() < self.curator.wanted

    def is_in_doubt(self) -> bool:
        """Whether all that is left are failing requests: one more tells whether it is theirs or the server's fault."""
        seen = [job.answers_seen for _, job in self.retries if job.tries >= HOPEFUL_TRIES]
        return not self.tasks and self.rate.answers in seen

    def expected_yield(self) -> float:
        """Rows that a request will give, by those of late."""
        recent = self.curator.kept_by_request[-RECENT:]
        return max(0.05, sum(recent) / len(recent)) if recent else self.options.tasks_per_request

    async def wait(self):
        """For an answer, or until something may start."""
        pause = 1.0  # at most: stop() and the progress are looked at
        if not self.blocked and self.rate.has_room() and (self.probed or not self.tasks):
            pause = self.rate.ready_in() or (self.retries[0][0] - self.rate.clock() if self.retries else pause)
        pause = min(max(pause, 0.002), 1.0)
        if self.tasks:
            done, _ = await asyncio.wait(self.tasks, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            self.collect(done)
        else:
            await asyncio.sleep(pause)
        self.progress.show(self)
        if self.rate.silent_s() > self.options.patience:
            wait = f"; the next try was to be in {self.rate.ready_in():.0f} s" if self.rate.ready_in() > 5 else ""
            last = self.last_failure or "none"
            self.end(f"no answer for {self.options.patience:g} s (--patience); the last failure: {last}{wait}")

    async def finish(self):
        """Lets what is in flight end, since it is paid for, and raises what ended the run."""
        deadline = time.monotonic() + GRACE_S
        while self.tasks and time.monotonic() < deadline:
            done, _ = await asyncio.wait(self.tasks, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            self.collect(done)
            self.progress.show(self)
        for task in self.tasks:
            task.cancel()
        await self.ledger.flush()  # an answer of the last moment
        if self.fatal and not self.curator.full:
            self.status = "failed"
            raise self.fatal

    def collect(self, done):
        for task in done:
            job = self.tasks.pop(task)
            try:
                self.handle(job, *task.result())
            except Failure as failure:  # of the ledger; the disk may take the others that are in flight
                self.fatal = self.fatal or failure

    def stop(self):
        """Starts nothing more; what is in flight is waited for."""
        self.stopping, self.status = True, "stopped"

    def end(self, why):
        self.fatal = self.fatal or Failure(f"{why}; all answers are kept, the same command goes on from here")

    # ---- one attempt ---------------------------------------------------------------------------------------------

    async def attempt(self, job, ask):
        """Intent to the disk, the request, its outcome to the disk."""
        number, intent = self.ledger.intent(job.number, ask.body_sha256, ask.body["model"], ask.most)
        dialect = self.dialect
        await self.ledger.write(intent)
        reply = await self.client.ask(ask.body)
        if not self.probed and reply.kind == "failed" and dialect.without(reply.body):
            reply = replace(reply, kind="unsupported")  # older llama.cpp: a 500 for a response_format
        if reply.kind == "unsupported" and self.probed and (self.rate.answers or not dialect.without(reply.body)):
            reply = replace(reply, kind="odd")  # others were understood
        kind, usage, cost = self.judge(job, ask, dialect, reply)
        await self.ledger.write(self.ledger.outcome(number, kind, reply.status, reply.body, usage, cost))
        return number, ask, dialect, reply, kind, usage, cost

    def judge(self, job, ask, dialect, reply: Reply):
        """(kind, usage, cost) as the ledger knows them. An answer without usage counts as the most it can have cost."""
        if reply.kind == "answer":
            usage = read_answer(reply.body).usage
            return "answer", usage or (None, None), self.price.cost(*usage) if usage else ask.most
        most = self.options.max_attempts if reply.kind != "odd" else min(ODD_STRIKES, self.options.max_attempts)
        if reply.kind in ("failed", "lost", "odd") and not is_limit(reply) and self.strikes(job) >= most:
            return "refused", (None, None), ask.most if reply.kind == "lost" else 0
        return reply.kind if reply.kind in ("lost", "refused") else "failed", (None, None), 0

    def strikes(self, job) -> int:
        """Failures of a request while others got through, one that came just now included."""
        return job.strikes + (self.rate.answers > job.answers_seen)

    def handle(self, job, attempt, ask, dialect, reply, kind, usage, cost):
        """What an outcome changes, once it is on the disk."""
        if kind == "lost":
            self.budget.lose(ask.most)
        else:
            self.budget.settle(ask.most, cost)
            self.check_bill(job.number, usage)
        if kind in ("answer", "refused"):
            self.settle(Entry(job.number, attempt, kind, reply.body, ask.body_sha256, ask.body["model"], cost))
        if kind == "answer":
            self.refused_in_a_row = 0
            self.learn(dialect)
            self.rate.answered(reply.started_at, (usage[1] or len(reply.body) // 4), reply.headers)
        elif kind == "refused" and reply.kind in ("failed", "lost"):
            self.rate.failed(reply.started_at, **reply.pressure())
        elif kind == "refused":
            self.refuse(reply)
        elif reply.kind == "fatal":
            self.rate.left()
            self.end(f"the server said {reply.status}: {message_of(reply.body)}")
        elif reply.kind == "unsupported":
            self.step_down(job, dialect, reply)
        elif reply.kind == "odd":
            self.refuse(reply)
            self.retry(job, reply)
        else:
            self.rate.failed(reply.started_at, **reply.pressure())
            self.retry(job, reply)

    def check_bill(self, number, usage):
        """Ends a capped run once a bill passed what was set aside for it."""
        if self.budget.overrun and self.budget.cap is not None:
            self.end(
                f"the server billed {usage[0]} + {usage[1]} tokens, more than request {number} can use with "
                f"{self.options.max_output_tokens} of output, so --max-usd cannot be kept"
            )

    def learn(self, dialect):
        """The first answer: the dialect is understood, and need not be found out again."""
        if not self.probed:
            self.probed, self.dialect = True, dialect
            self.ledger.set(dialect=asdict(dialect))
            self.progress.say(f"the server understands {dialect.format}, {dialect.limit}")

    def refuse(self, reply):
        self.rate.left()
        self.refused_in_a_row += 1
        if self.refused_in_a_row >= REFUSED_IN_A_ROW:
            self.end(f"the server refused {REFUSED_IN_A_ROW} prompts in a row: {message_of(reply.body)}")

    def step_down(self, job, dialect, reply):
        """Asks again without what the server does not know."""
        self.rate.left()
        self.probed = False
        self.tried.add(dialect)
        poorer = next((d for d in (dialect.without(reply.body), dialect.poorer()) if d and d not in self.tried), None)
        if poorer is None:
            self.end(f"the server said {reply.status}: {message_of(reply.body)}")
        else:
            self.dialect = poorer
            heapq.heappush(self.retries, (0.0, job))

    def retry(self, job, reply):
        """Later again."""
        said = f"{reply.status or 'no status'}, {message_of(reply.body)}"
        if not (self.last_failure or self.rate.answers):
            self.progress.say(f"no answer yet ({said}); trying again for {self.options.patience:g} s (--patience)")
        self.last_failure = said
        job.tries += 1
        if not is_limit(reply):
            job.strikes, job.answers_seen = self.strikes(job), self.rate.answers
        heapq.heappush(self.retries, (self.rate.clock() + self.rate.backoff(job.tries), job))

    # ---- in order ------------------------------------------------------------------------------------------------

    def settle(self, entry):
        """A request is done. Ends a run whose answers are of no use."""
        self.fold(entry)
        kept = self.curator.kept_by_request[self.replayed :]
        is_first = not self.curator.rows and len(kept) >= HOPELESS_FIRST
        if not self.curator.full and (is_first or len(kept) >= HOPELESS) and not any(kept[-HOPELESS:]):
            most = ", ".join(f"{reason} {n}" for reason, n in self.curator.rejected.most_common(3))
            n = min(len(kept), HOPELESS)
            self.end(f"the last {n} answers held nothing new that can be kept ({most}; see rejected.jsonl)")

    def fold(self, entry):
        """The curator gets it when all before it are done."""
        self.done.add(entry.request)
        self.highest = max(self.highest, entry.request)
        self.ready[entry.request] = entry
        while self.folded in self.ready:
            self.curator.take(self.ready.pop(self.folded))
            self.folded += 1


def is_limit(reply) -> bool:
    """A failure that is no fault of the request."""
    return reply.kind == "failed" and reply.status == 429


def make_ask(prompter, sampling, price):
    """ask(number, dialect) -> Ask. No tokenizer makes more tokens of a body than it has bytes."""

    def ask(number, dialect):
        body = sampling.body(prompter.messages(number), dialect)
        text = json.dumps(body, ensure_ascii=False)
        most = price.cost(len(text.encode("utf-8", "surrogatepass")), sampling.max_output_tokens)
        return Ask(body, sha256(json.dumps(body["messages"])), most)

    return ask

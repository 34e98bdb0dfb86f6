"""The loop that sends requests, as many at a time as rate limits and budget allow, and passes on outcomes in order."""

import asyncio
import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from data_gen.api.answers import bill_outcome, read_answer
from data_gen.api.attempt import Job, Limits, Outcome, PreparedRequest, RequestBuilder, RowKeeper
from data_gen.api.client import TICK_S, Client, Reply
from data_gen.api.dialect import Dialect
from data_gen.api.errors import extract_message
from data_gen.api.ledger import DONE, Entry, Ledger, Usage
from data_gen.api.observations import Observations
from data_gen.api.prices import Budget, Price, format_usd
from data_gen.api.progress import Progress
from data_gen.api.rate import Rate
from data_gen.base.cli import Failure

LOOKAHEAD = 10_000  # requests beyond the oldest that has no answer
RECENT_REQUESTS = 200  # the latest requests, whose mean yield predicts the yield of the next
# A run ends after this many requests in a row without a kept row: before its first row, and later.
FRUITLESS_AT_START, FRUITLESS_LATER = 20, 400
REFUSED_IN_A_ROW = 20  # refused requests that end a run
HOPEFUL_TRIES = 3  # failures after which a request is expected to give no rows
ODD_STRIKES = 2  # failures of kind odd (see Reply) after which a request counts as refused
GRACE_S = 60  # for requests in flight when the run ends


class Collector:
    """The state of one run, between the ledger, the server and the curator.

    An answer is on the disk before it is parsed. Outcomes go to the curator in the order of their requests, whatever
    the order of their arrival. run() raises Failure if the server will not answer.
    """

    def __init__(
        self,
        ledger: Ledger,
        curator: RowKeeper,
        client: Client,
        rate: Rate,
        budget: Budget,
        builder: RequestBuilder,
        limits: Limits,
        progress: Progress,
    ):
        self.ledger, self.curator, self.client, self.rate = ledger, curator, client, rate
        self.budget, self.builder, self.limits, self.progress = budget, builder, limits, progress
        self.observations = Observations(progress.print_line)
        self.done: set[int] = set()  # numbers of requests
        self.highest = -1  # of done
        self.ready: dict[int, Entry] = {}  # outcomes that wait for those of earlier requests
        self.next_for_curator = 0  # the request whose outcome the curator takes next
        self.tasks: dict[asyncio.Task[Outcome], Job] = {}
        self.retries: list[tuple[float, Job]] = []  # a heap of (time, job)
        self.next_number = 0
        self.refused_in_a_row = 0
        self.stopping = False
        self.blocked = False  # by the cap, until a request in flight ends
        self.fatal: Failure | None = None
        self.status = "running"
        self.last_failure = ""
        self.tried: set[Dialect] = set()  # dialects that the server did not understand
        known = ledger.read_settings().get("dialect")
        self.dialect, self.is_dialect_known = Dialect(**known) if known else client.dialect, bool(known)
        for entry in progress.show_reading(ledger.read_outcomes(), ledger.compute_totals().answers, curator):
            self.pass_to_curator(entry)
        self.replayed = len(curator.kept_by_request)  # requests of an earlier run

    # ---- the loop ------------------------------------------------------------------------------------------------

    async def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run until the dataset is full, the budget is used up, stop() was called, or until() holds."""
        self.rate.last_answer = self.rate.clock()  # time before the run is no silence of the server
        while not (self.curator.is_full or self.stopping or self.fatal or until()):
            self.start_requests()
            if not self.stopping:
                await self.wait()
        await self.finish()

    def start_requests(self) -> None:
        """Start as many requests as rate and budget allow."""
        self.blocked = False
        while self.rate.can_start() and (self.is_dialect_known or not self.tasks):
            job = self.choose_job()
            if job is None:
                return
            prepared = self.builder.prepare(job.number, self.dialect)
            if not self.budget.reserve(prepared.max_cost):
                heapq.heappush(self.retries, (0.0, job))
                self.blocked = True
                self.stop_at_cap(prepared)
                return
            self.rate.record_start()
            self.tasks[asyncio.create_task(self.make_attempt(job, prepared))] = job

    def stop_at_cap(self, prepared: PreparedRequest) -> None:
        """End the run if the cap has no place for this request and no request in flight could free some by its end."""
        if not self.tasks:
            self.status, self.stopping = "cap reached", True
            self.progress.print_line(
                f"stopped at the cap: {format_usd(self.budget.spent)} spent, at most "
                f"{format_usd(self.budget.uncertain)} more for answers that were lost, and the next request can cost "
                f"{format_usd(prepared.max_cost, 6)}; a larger --max-usd goes on from here"
            )

    def choose_job(self) -> Job | None:
        """Return a failed request whose time has come, or a new one if those in flight will not fill the dataset."""
        if self.retries and self.retries[0][0] <= self.rate.clock():
            return heapq.heappop(self.retries)[1]
        while self.next_number in self.done:
            self.next_number += 1
        if self.has_started_all():
            return None
        is_hole = self.next_number < self.highest  # later requests are done and wait for this one
        is_wanted = self.next_number < self.next_for_curator + LOOKAHEAD and self.wants_more()
        if not (is_hole or is_wanted or self.is_in_doubt()):
            return None
        self.next_number += 1
        return Job(self.next_number - 1, answers_seen=self.rate.answers)

    def has_started_all(self) -> bool:
        """Return whether no request is left that was not started, where their number is limited."""
        n = self.builder.prompter.n_requests
        return n is not None and self.next_number >= n

    def wants_more(self) -> bool:
        """Return whether the requests in flight and those waiting for a retry are expected to give too few rows."""
        jobs = *self.tasks.values(), *(job for _, job in self.retries)
        coming = sum(job.tries < HOPEFUL_TRIES for job in jobs) + len(self.ready)
        return len(self.curator.rows) + coming * self.estimate_yield() < self.curator.wanted

    def is_in_doubt(self) -> bool:
        """Return whether only failing requests are left. A new one then shows whether the server is at fault."""
        seen = [job.answers_seen for _, job in self.retries if job.tries >= HOPEFUL_TRIES]
        return not self.tasks and self.rate.answers in seen

    def have_failed_often(self) -> bool:
        """Return whether every request that waits for a retry has failed --max-attempts times."""
        return all(job.failures >= self.limits.max_attempts for _, job in self.retries)

    def estimate_yield(self) -> float:
        """Return the rows that a request is expected to give: the mean of the latest ones."""
        recent = self.curator.kept_by_request[-RECENT_REQUESTS:]
        return max(0.05, sum(recent) / len(recent)) if recent else self.builder.prompter.n_tasks

    async def wait(self) -> None:
        """Wait for an answer, or until a request may start. End the run after --patience without an answer."""
        began, pause = self.rate.clock(), 1.0  # at most, to see stop() and show progress
        if not self.blocked and self.rate.is_below_limit() and (self.is_dialect_known or not self.tasks):
            pause = self.rate.wait_s() or (self.retries[0][0] - self.rate.clock() if self.retries else pause)
        pause = min(max(pause, 0.002), 1.0)
        if self.tasks:
            done, _ = await asyncio.wait(self.tasks, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            self.handle_done(done)
        else:
            await asyncio.sleep(pause)
        self.progress.show_state(self)
        self.rate.excuse_silence(self.rate.clock() - began - pause)  # while this process did not run
        if self.rate.silence_s() > self.limits.patience_s:
            wait = f"; the next try was to be in {self.rate.wait_s():.0f} s" if self.rate.wait_s() > 5 else ""
            last = self.last_failure or "none"
            self.end_run(f"no answer for {self.limits.patience_s:g} s (--patience); the last failure: {last}{wait}")
        if self.has_started_all() and self.retries and not self.tasks and self.have_failed_often():
            n, most = len(self.retries), self.limits.max_attempts
            self.end_run(f"the last {n} requests failed {most} times each; the last failure: {self.last_failure}")

    async def finish(self) -> None:
        """Wait for the requests in flight, which are paid for. Raise the Failure that ended the run."""
        left = GRACE_S / TICK_S  # looks without an answer: a process that did not run has not waited
        while self.tasks and left > 0:
            done, _ = await asyncio.wait(self.tasks, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            left -= not done
            self.handle_done(done)
            self.progress.show_state(self)
        for task in self.tasks:
            task.cancel()
        await self.ledger.flush()  # answers of cancelled tasks
        if self.fatal and not self.curator.is_full:
            self.status = "failed"
            raise self.fatal

    def handle_done(self, done: Iterable[asyncio.Task[Outcome]]) -> None:
        """Handle the outcomes of finished tasks."""
        for task in done:
            job = self.tasks.pop(task)
            try:
                self.handle_outcome(job, task.result())
            except Failure as failure:  # of the ledger; the disk may still take the outcomes of others
                self.fatal = self.fatal or failure

    def stop(self) -> None:
        """Start no more requests and wait for those in flight."""
        self.stopping, self.status = True, "stopped"

    def end_run(self, why: str) -> None:
        """End the run with a failure, unless one has ended it already."""
        self.fatal = self.fatal or Failure(f"{why}; all answers are kept, the same command goes on from here")

    # ---- one attempt ---------------------------------------------------------------------------------------------

    async def make_attempt(self, job: Job, prepared: PreparedRequest) -> Outcome:
        """Write the intent to the disk, send the request, and write the outcome to the disk."""
        number, intent = self.ledger.prepare_intent(
            job.number, prepared.body_sha256, prepared.body["model"], prepared.max_cost
        )
        dialect = self.dialect
        await self.ledger.write(intent)
        reply = await self.client.send(prepared.body)
        if not self.is_dialect_known and reply.kind == "failed" and dialect.drop_refused(reply.body):
            reply = replace(reply, kind="unsupported")  # older llama.cpp sends a 500 for a response_format
        if (
            reply.kind == "unsupported"
            and self.is_dialect_known
            and (self.rate.answers or not dialect.drop_refused(reply.body))
        ):
            reply = replace(reply, kind="odd")  # the server understood other requests
        kind, usage, cost = self.judge_reply(job, prepared, reply)
        await self.ledger.write(self.ledger.prepare_outcome(number, kind, reply.status, reply.body, usage, cost))
        return Outcome(number, prepared, dialect, reply, kind, usage, cost)

    def judge_reply(self, job: Job, prepared: PreparedRequest, reply: Reply) -> tuple[str, Usage, int]:
        """Return (kind, usage, cost) for the ledger."""
        most = self.limits.max_attempts if reply.kind != "odd" else min(ODD_STRIKES, self.limits.max_attempts)
        is_last = not reply.is_rate_limit and self.count_strikes(job, reply) >= most
        return bill_outcome(reply.kind, reply.body, self.builder.price, prepared.max_cost, is_last)

    def count_strikes(self, job: Job, reply: Reply) -> int:
        """Return the failures of a request while others got through, including the failure that came just now.

        Where no other is left to get through, a server that does not understand the request counts as well.
        """
        is_alone = reply.kind == "odd" and self.has_started_all()
        return job.strikes + (self.rate.answers > job.answers_seen or is_alone)

    def handle_outcome(self, job: Job, outcome: Outcome) -> None:
        """Update budget, rate, curator and retries after an outcome, which is on the disk."""
        prepared, reply, kind, usage = outcome.prepared, outcome.reply, outcome.kind, outcome.usage
        if kind == "lost":
            self.budget.count_lost(prepared.max_cost)
        else:
            self.budget.settle(prepared.max_cost, outcome.cost)
            self.check_bill(job.number, usage, outcome.cost)
        if kind in DONE:
            model = prepared.body["model"]
            self.settle_request(
                Entry(job.number, outcome.attempt, kind, reply.body, prepared.body_sha256, model, outcome.cost)
            )
        if kind == "answer":
            self.refused_in_a_row = 0
            self.learn_dialect(outcome.dialect)
            self.observe_answer(reply.body, prepared.body.get("response_format"), self.builder.price, outcome.cost)
            self.rate.record_answer(reply.started_at, usage[1] or len(reply.body) // 4, reply.headers)
        elif kind == "refused" and reply.kind in ("failed", "lost"):
            self.rate.record_failure(reply.started_at, **reply.describe_load())
        elif kind == "refused":
            self.record_refusal(reply)
        elif reply.kind == "fatal":
            self.rate.release()
            self.end_run(f"the server said {reply.status}: {extract_message(reply.body)}{reply.hint}")
        elif reply.kind == "unsupported":
            self.lower_dialect(job, outcome.dialect, reply)
        elif reply.kind == "odd":
            self.record_refusal(reply)
            self.schedule_retry(job, reply)
        else:
            self.rate.record_failure(reply.started_at, **reply.describe_load())
            self.schedule_retry(job, reply)

    def check_bill(self, number: int, usage: Usage, cost: int) -> None:
        """End a capped run once a bill exceeds the amount set aside for it."""
        if self.budget.overrun and self.budget.cap is not None:
            billed = f"{format_usd(cost, 6)} ({usage[0]} + {usage[1]} tokens)"
            self.end_run(
                f"the server billed {billed}, more than request {number} can use with "
                f"{self.builder.sampling.max_output_tokens} of output, so --max-usd cannot be kept"
            )

    def observe_answer(self, body: str, format: Mapping[str, Any] | None, price: Price, cost: int) -> None:
        """Tell what an answer shows of the server, and end a run whose answers are reasoning alone."""
        answer, observations = read_answer(body), self.observations
        observations.look_at_bill(answer, cost, replace(answer.bill, dollars=0).compute_cost(price))
        observations.look_at_format(answer, format)
        if why := observations.count_thinking(answer, self.builder.sampling.max_output_tokens):
            self.end_run(why)

    def learn_dialect(self, dialect: Dialect) -> None:
        """Record the dialect of the first answer, so that no run has to find it out again."""
        if not self.is_dialect_known:
            self.is_dialect_known, self.dialect = True, dialect
            self.ledger.write_settings(dialect=asdict(dialect))
            self.progress.print_line(f"the server takes {dialect.format}, {dialect.limit}")

    def record_refusal(self, reply: Reply) -> None:
        """Count a refused prompt, and end the run after too many in a row."""
        self.rate.release()
        self.refused_in_a_row += 1
        if self.refused_in_a_row >= REFUSED_IN_A_ROW:
            self.end_run(f"the server refused {REFUSED_IN_A_ROW} prompts in a row: {extract_message(reply.body)}")

    def lower_dialect(self, job: Job, dialect: Dialect, reply: Reply) -> None:
        """Ask again in a dialect without the part that the server does not know. End the run if none is left."""
        self.rate.release()
        self.is_dialect_known = False
        self.tried.add(dialect)
        candidates = (dialect.drop_refused(reply.body), dialect.lower_format())
        lower = next((candidate for candidate in candidates if candidate and candidate not in self.tried), None)
        if lower is None:
            self.end_run(f"the server said {reply.status}: {extract_message(reply.body)}")
        else:
            self.dialect = lower
            heapq.heappush(self.retries, (0.0, job))

    def schedule_retry(self, job: Job, reply: Reply) -> None:
        """Let a failed request wait for its next try."""
        said = f"{reply.status or 'no status'}, {extract_message(reply.body)}"
        if not (self.last_failure or self.rate.answers):
            patience = f"{self.limits.patience_s:g} s (--patience)"
            self.progress.print_line(f"no answer yet ({said}); trying again for {patience}")
        self.last_failure = said
        job.tries += 1
        if not reply.is_rate_limit:
            job.failures += 1
            job.strikes, job.answers_seen = self.count_strikes(job, reply), self.rate.answers
        heapq.heappush(self.retries, (self.rate.clock() + self.rate.draw_backoff_s(job.tries), job))

    # ---- outcomes, in the order of their requests ----------------------------------------------------------------

    def settle_request(self, entry: Entry) -> None:
        """Pass on the outcome of a request that is done, and end a run whose answers give no rows."""
        self.pass_to_curator(entry)
        kept = self.curator.kept_by_request[self.replayed :]
        is_first = not self.curator.rows and len(kept) >= FRUITLESS_AT_START
        if not self.curator.is_full and (is_first or len(kept) >= FRUITLESS_LATER) and not any(kept[-FRUITLESS_LATER:]):
            most = ", ".join(f"{reason} {n}" for reason, n in self.curator.rejected.most_common(3))
            n = min(len(kept), FRUITLESS_LATER)
            self.end_run(f"the last {n} answers held nothing new that can be kept ({most}; see rejected.jsonl)")

    def pass_to_curator(self, entry: Entry) -> None:
        """Give an outcome to the curator as soon as all earlier requests are done."""
        self.done.add(entry.request)
        self.highest = max(self.highest, entry.request)
        self.ready[entry.request] = entry
        while self.next_for_curator in self.ready:
            self.curator.add_outcome(self.ready.pop(self.next_for_curator))
            self.next_for_curator += 1

    def take_rest(self) -> None:
        """Give the curator what lies behind missing outcomes, and what was recorded after the end of the run."""
        for entry in self.ledger.read_outcomes():
            if entry.request >= self.next_for_curator:
                self.curator.add_outcome(entry)

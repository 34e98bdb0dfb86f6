"""The collecting loop against a server that is a function: caps hold, order is kept, failures are sorted out."""

import asyncio
import contextlib
import json
import random
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen.api import collector as collect
from data_gen.api import rate
from data_gen.api.attempt import Limits, PreparedRequest
from data_gen.api.client import Reply
from data_gen.api.collector import Collector
from data_gen.api.dialect import Dialect
from data_gen.api.ledger import Ledger
from data_gen.api.prices import Budget, Price
from data_gen.base.cli import Failure

ONE = Price(1, 1)
USELESS = json.dumps({"choices": [{"message": {"content": "nothing"}}]})


class Progress:
    """Remembers the printed lines."""

    def __init__(self):
        self.said = []

    def print_line(self, text):
        self.said.append(text)

    def show_state(self, collector):
        pass

    def show_reading(self, entries, total, curator):
        return entries


class Curator:
    """Keeps one row of each answer, in the order of their arrival."""

    def __init__(self, wanted):
        self.wanted, self.rows, self.kept_by_request, self.entries = wanted, [], [], []
        self.rejected = Counter({"no items": 20})

    @property
    def is_full(self):
        return len(self.rows) >= self.wanted

    def add_outcome(self, entry):
        self.entries.append(entry)
        kept = entry.kind == "answer" and entry.body != USELESS
        self.rows += [entry.request] if kept else []
        self.kept_by_request.append(int(kept))


def completion(usage=(10, 10), finish="stop"):
    told = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True)) if usage else None
    return json.dumps({"choices": [{"message": {"content": "{}"}, "finish_reason": finish}], "usage": told})


class Server:
    """Calls reply(number, times asked, body) for a Reply, after a random number of turns of the loop."""

    dialect = Dialect()

    def __init__(self, reply, seed=0):
        self.reply, self.rng, self.asked, self.in_flight, self.most = reply, random.Random(seed), [], 0, 0

    async def send(self, body):
        self.in_flight += 1
        started_at = time.monotonic()
        self.most = max(self.most, self.in_flight)
        self.asked.append(body["number"])
        for _ in range(self.rng.randrange(8)):
            await asyncio.sleep(0)
        self.in_flight -= 1
        found = self.reply(body["number"], self.asked.count(body["number"]), body)
        return replace(found, started_at=started_at)


class OneTask:
    """A RequestBuilder whose requests ask for one task and cost a fixed amount at most."""

    def __init__(self, price, most, n_requests=None):
        self.prompter = SimpleNamespace(n_tasks=1, n_requests=n_requests)
        self.price, self.most, self.sampling = price, most, SimpleNamespace(max_output_tokens=most)

    def prepare(self, number, dialect):
        return PreparedRequest({"model": "m", "number": number, "dialect": dialect}, "-", self.most)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return make(reply, wanted, ...), which makes a Collector on a new ledger, or on the last with again=True."""
    monkeypatch.setattr(rate, "FIRST_LIMIT", 64)
    opened, count = [], iter(range(10**6))

    def build(reply, wanted, cap=None, price=ONE, most=50, seed=0, again=False, concurrency=64, **options):
        folder = opened[-1][0] if again else tmp_path / str(next(count))
        if again:
            opened[-1][1].close()
        ledger = Ledger(folder)
        ledger.db.execute("PRAGMA synchronous=OFF")  # these tests kill nothing
        opened.append((folder, ledger))
        defaults = {"max_attempts": 4}
        totals = ledger.compute_totals()
        return Collector(
            ledger, Curator(wanted), Server(reply, seed), rate.Rate(concurrency, 1e-4),
            Budget(cap, totals.spent, totals.uncertain), OneTask(price, most), Limits(**defaults | options), Progress(),
        )  # fmt: skip

    yield build
    for _, ledger in opened:
        ledger.close()


def run(collector):
    asyncio.run(collector.run())
    return collector


def answer(number, times, body):
    return Reply("answer", 200, completion())


def failing(kinds):
    """Return a reply function that fails with each of these kinds in turn, then answers."""

    def reply(number, times, body):
        if times <= len(kinds):
            kind, status = kinds[times - 1]
            return Reply(kind, status, "{}", overloaded=status == 503)
        return answer(number, times, body)

    return reply


def test_outcomes_are_taken_in_the_order_of_their_requests_however_they_come(make):
    for seed in range(5):
        collector = run(make(answer, 200, seed=seed))
        assert collector.client.most > 20, "nothing was in flight together"
        assert [entry.request for entry in collector.curator.entries][:200] == list(range(200))


def test_each_step_is_on_the_disk_before_the_next(make):
    """The intent before the request, the answer before the curator has it: another process would find them there."""
    collector, wrong = make(failing([("failed", 500)]), 60), []
    send, add_outcome = collector.client.send, collector.curator.add_outcome

    def count(table, number):
        sql = {"sent": "SELECT count(*) FROM sent WHERE request = ?"}
        sql["received"] = (
            "SELECT count(*) FROM received JOIN sent USING (attempt) WHERE request = ? AND kind = 'answer'"
        )
        with contextlib.closing(sqlite3.connect(f"file:{collector.ledger.path}?mode=ro", uri=True)) as db:
            return db.execute(sql[table], (number,)).fetchone()[0]

    async def checked(body):
        number, before = body["number"], collector.client.asked.count(body["number"])
        wrong.extend(["sent"] * (count("sent", number) != before + 1))
        return await send(body)

    def take(entry):
        wrong.extend(["received"] * (count("received", entry.request) != 1))
        add_outcome(entry)

    collector.client.send, collector.curator.add_outcome = checked, take
    run(collector)
    assert len(collector.client.asked) >= 120 and not wrong


def test_nothing_is_asked_that_the_dataset_does_not_need(make):
    collector = run(make(answer, 10))
    assert sorted(collector.client.asked) == list(range(10))


@pytest.mark.parametrize("kinds", [[("failed", 500)] * 3, [("failed", 429)] * 3, [("lost", None)] * 3])
def test_a_failure_is_tried_again_and_leaves_no_hole(make, kinds):
    collector = run(make(failing(kinds), 50))
    assert collector.curator.rows[:50] == list(range(50))
    assert max(collector.client.asked.count(n) for n in range(50)) == 4


def test_only_lost_answers_are_counted_as_perhaps_paid(make):
    def reply(number, times, body):
        if times == 1 and number % 3 == 0:
            return Reply("lost" if number % 2 else "failed", None, "")
        return answer(number, times, body)

    collector = run(make(reply, 60))
    totals = collector.ledger.compute_totals()
    lost = sum(n % 6 == 3 for n in set(collector.client.asked))
    assert totals.uncertain == collector.budget.uncertain == 50 * lost > 0
    assert totals.spent == collector.budget.spent == 20 * totals.answers
    assert collector.budget.reserved == 0


def test_an_answer_without_usage_costs_the_most_that_it_can_have(make):
    collector = run(make(lambda *_: Reply("answer", 200, completion(usage=None)), 5))
    assert collector.ledger.compute_totals().spent == 5 * 50


@pytest.mark.parametrize("usage, tokens", [((10, 7), 7), (None, len(completion(usage=None)) // 4)])
def test_a_servers_speed_is_that_of_the_tokens_that_it_wrote(make, usage, tokens):
    """Without usage, a token is taken to be four characters of the answer."""
    collector = run(make(lambda *_: Reply("answer", 200, completion(usage)), 1))
    assert collector.rate.window.tokens == tokens


def test_one_that_always_fails_is_left_out_while_others_get_through(make):
    def reply(number, times, body):
        return Reply("failed", 500, "broken") if number == 7 else answer(number, times, body)

    collector = run(make(reply, 300))
    assert [entry.kind for entry in collector.curator.entries if entry.request == 7] == ["refused"]
    assert collector.client.asked.count(7) <= 12
    again = make(reply, 300, again=True)
    assert run(again).client.asked == [], "what was given up was asked again"


@pytest.mark.parametrize("bad, reply", [(17, ("failed", 500)), (0, ("failed", 500)), (17, ("lost", None))])
def test_one_that_always_fails_is_left_out_when_nothing_else_is_needed(make, bad, reply):
    """One more request shows whether the request or the server is at fault."""
    kind, status = reply
    collector = run(make(lambda n, t, b: Reply(kind, status, "") if n == bad else answer(n, t, b), 20, patience_s=5))
    assert [entry.request for entry in collector.curator.entries if entry.kind == "refused"] == [bad]
    assert len(set(collector.client.asked)) <= 20 + 8
    totals, lost = collector.ledger.compute_totals(), collector.client.asked.count(bad) if kind == "lost" else 0
    assert totals.spent + totals.uncertain == 20 * totals.answers + 50 * lost == collector.budget.committed


def thinking(number, times, body):
    choice = {"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}
    usage = {"prompt_tokens": 10, "completion_tokens": 10}
    return Reply("answer", 200, json.dumps({"choices": [choice], "usage": usage}))


def test_answers_of_reasoning_alone_end_the_run_before_the_money_is_gone(make):
    collector = make(thinking, 10**6)
    with pytest.raises(
        Failure, match=r"last \d answers are reasoning alone.*--max-output-tokens 50 .*reasoning_effort"
    ):
        run(collector)
    assert len(collector.client.asked) <= 3 + 64
    slow = make(thinking, 10**6, concurrency=1)
    with pytest.raises(Failure, match="last 3 answers are reasoning alone"):
        run(slow)
    assert slow.client.asked == [0, 1, 2]


def test_some_answers_of_reasoning_alone_are_borne(make):
    def some(number, times, body):
        return thinking(number, times, body) if number % 4 == 3 else answer(number, times, body)

    assert run(make(some, 200)).curator.is_full
    late = make(lambda n, t, b: answer(n, t, b) if n < 9 else thinking(n, t, b), 10**6, concurrency=1)
    with pytest.raises(Failure, match="last 20 answers are reasoning alone"):
        run(late)
    assert late.client.asked == list(range(9 + 20))


FORMAT = {"type": "json_object", "schema": {"type": "object", "required": ["tasks"]}}


@pytest.mark.parametrize("texts, said", [
    (["Sure!", "Sure!", '{"tasks": 1}'], 1), (['{"tasks": 1}'] * 3, 0), (['{"tasks": 1}', "Sure!"], 1), (["", " "], 0),
])  # fmt: skip
def test_a_server_that_takes_a_format_and_ignores_it_is_told_once(make, texts, said):
    def reply(number, times, body):
        message = {"content": texts[number % len(texts)]}
        usage = {"prompt_tokens": 10, "completion_tokens": 10}
        choice = {"message": message, "finish_reason": "stop"}
        return Reply("answer", 200, json.dumps({"choices": [choice], "usage": usage}))

    collector = make(reply, 30)
    prepare = collector.builder.prepare

    def with_format(number, dialect):
        prepared = prepare(number, dialect)
        return replace(prepared, body=prepared.body | {"response_format": FORMAT})

    collector.builder.prepare = with_format
    lines = [line for line in run(collector).progress.said if "does not keep to it" in line]
    assert len(lines) == said and all("json_object with a schema" in line for line in lines)


@pytest.mark.parametrize("usage, said", [
    ({"total_tokens": 45}, "25 tokens more than completion_tokens; they are counted"),
    ({"cost": 0.5}, "the server names $0.500000 for an answer of"), ({"completion_tokens": None}, "tells no usage"),
])  # fmt: skip
def test_a_bill_that_is_not_what_it_seems_is_told_once(make, usage, said):
    told = {"prompt_tokens": 10, "completion_tokens": 10} | usage
    choice = {"message": {"content": "{}"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": told})
    collector = run(make(lambda *_: Reply("answer", 200, body), 20))
    assert sum(said in line for line in collector.progress.said) == 1


def test_time_in_which_the_process_did_not_run_is_not_the_servers_silence(make):
    """A machine that is asleep or too busy for a while has heard nothing, and the server is not at fault."""

    def reply(number, times, body):
        return Reply("failed", 500, "no") if number == 0 and times < 4 else answer(number, times, body)

    collector, stood_still = make(reply, 5, patience_s=30), [0.0]
    send = collector.client.send
    collector.rate.clock = lambda: time.monotonic() + stood_still[0]

    async def held_up(body):
        stood_still[0] += 1000  # seconds on the clock, while nothing of the process runs
        return await send(body)

    collector.client.send = held_up
    assert run(collector).curator.is_full


def test_answers_that_have_come_are_on_the_disk_when_a_run_gives_up_the_rest(make, monkeypatch):
    """Also those that wait for a commit under way, whose attempts are cancelled."""
    monkeypatch.setattr(collect, "GRACE_S", 0)
    collector, came = make(answer, 10**6, concurrency=8), []
    send, commit, released = collector.client.send, collector.ledger.commit, threading.Event()

    async def counted(body):
        reply = await send(body)
        came.append(body["number"])
        return reply

    def held_up(statements):
        if came:
            released.wait()
        commit(statements)

    async def give_up():
        collector.is_dialect_known = True
        collector.start_requests()
        while len(came) < 8 or not collector.ledger.pending:
            await asyncio.sleep(0)
        collector.stop()
        threading.Timer(0.02, released.set).start()
        await collector.finish()

    collector.client.send, collector.ledger.commit = counted, held_up
    asyncio.run(give_up())
    assert [entry.request for entry in collector.ledger.read_outcomes()] == list(range(8)) == sorted(came)


def test_what_lies_behind_a_missing_answer_is_given_to_the_curator_in_the_end(make):
    collector = make(lambda n, t, b: Reply("failed", 500, "no") if n == 2 else answer(n, t, b), 10**6, cap=50 * 40)
    collector.limits = replace(collector.limits, max_attempts=10**6)
    assert run(collector).status == "cap reached" and collector.curator.rows == [0, 1]
    collector.take_rest()
    assert collector.curator.rows == sorted(collector.done) and len(collector.done) > 20
    assert collector.ledger.list_missing()[0] == 2


class Votes(Curator):
    """Is full once every request has its outcome, with a row or without."""

    @property
    def is_full(self):
        return len(self.kept_by_request) >= self.wanted


def make_limited(make, reply, n, **more):
    """Return a collector of n requests, of which there are no more."""
    collector = make(reply, n, **more)
    collector.curator, collector.builder = Votes(n), OneTask(ONE, 50, n)
    return collector


@pytest.mark.parametrize("bad", [0, 4, 9])
def test_where_requests_are_limited_no_other_is_made_up(make, bad):
    collector = make_limited(make, lambda n, t, b: Reply("refused", 403, "no") if n == bad else answer(n, t, b), 10)
    assert sorted(run(collector).client.asked) == list(range(10))
    assert [entry.request for entry in collector.curator.entries if entry.kind == "refused"] == [bad]


def test_where_requests_are_limited_one_that_the_server_does_not_understand_is_left_out_at_the_end_too(make):
    collector = make_limited(
        make, lambda n, t, b: Reply("unsupported", 400, "too long") if n == 9 else answer(n, t, b), 10, patience_s=10**6
    )
    assert [entry.request for entry in run(collector).curator.entries if entry.kind == "refused"] == [9]
    assert collector.client.asked.count(9) <= 3


def test_where_requests_are_limited_failures_of_the_last_ones_end_the_run_and_give_up_nothing(make):
    def reply(n, t, b):
        return Reply("failed", 500, "broken") if n == 9 else answer(n, t, b)

    collector = make_limited(make, reply, 10, patience_s=10**6, concurrency=1)
    with pytest.raises(Failure, match="last 1 requests failed 4 times each; the last failure: 500, broken; all answer"):
        run(collector)
    assert collector.done == set(range(9)) and collector.client.asked.count(9) == 4


def test_one_that_fails_behind_a_full_lookahead_is_left_out(make, monkeypatch):
    monkeypatch.setattr(collect, "LOOKAHEAD", 10)
    collector = make(lambda n, t, b: Reply("failed", 500, "") if n == 2 else answer(n, t, b), 100, patience_s=5)
    assert len(run(collector).curator.rows) >= 100


def test_a_limit_is_no_fault_of_the_request_that_meets_it(make):
    def reply(number, times, body):
        if number % 5 == 3 and times <= 12:
            return Reply("failed", 429, "slow down", overloaded=False)
        return answer(number, times, body)

    assert run(make(reply, 60)).curator.rows[:60] == list(range(60))


def test_an_outage_gives_up_no_request(make, monkeypatch):
    """While nothing gets through, the server is at fault, not the request."""
    monkeypatch.setattr(rate, "FIRST_COOL_DOWN_S", 1)
    calls = iter(range(10**6))

    def reply(number, times, body):
        if 30 <= next(calls) < 430:
            return Reply("failed", 503, "down", overloaded=True)
        return answer(number, times, body)

    collector = run(make(reply, 100, max_attempts=3))
    assert collector.curator.rows[:100] == list(range(100))


def test_a_server_that_never_answers_ends_the_run(make):
    collector = make(lambda *_: Reply("failed", 500, "no", overloaded=False), 5, patience_s=0.3)
    with pytest.raises(Failure, match=r"no answer for 0.3 s .*500, no"):
        run(collector)
    assert len(collector.client.asked) < 60, "it was hammered"


@pytest.mark.parametrize("status", [401, 404, 429])
def test_what_no_retry_can_mend_ends_the_run_at_once(make, status):
    def reply(number, times, body):
        if number < 10:
            return answer(number, times, body)
        return Reply("fatal", status, json.dumps({"error": {"message": "no such thing", "code": "x"}}))

    collector = make(reply, 1000, concurrency=4)
    with pytest.raises(Failure, match=f"{status}: no such thing"):
        run(collector)
    assert len(collector.client.asked) < 30
    assert make(answer, 1000, again=True).next_for_curator >= 10, "what came before was lost"


def test_a_reply_that_ends_the_run_leaves_its_place(make):
    """The summary of a run would else tell of a request that is still in flight."""
    collector = make(lambda *_: Reply("fatal", 401, "{}"), 5, concurrency=1)
    with pytest.raises(Failure, match="401"):
        run(collector)
    assert len(collector.client.asked) == 1 and collector.rate.in_flight == 0


def test_prompts_that_are_refused_are_holes_and_twenty_in_a_row_end_the_run(make):
    def some(number, times, body):
        return Reply("refused", 400, "policy") if number % 2 else answer(number, times, body)

    collector = run(make(some, 40))
    assert [entry.kind for entry in collector.curator.entries[:4]] == ["answer", "refused", "answer", "refused"]
    with pytest.raises(Failure, match="refused 20 prompts in a row: policy"):
        run(make(lambda n, t, b: answer(n, t, b) if n == 0 else Reply("refused", 400, "policy"), 100, concurrency=1))


def test_the_dialect_is_found_once_by_one_request_at_a_time(make):
    def reply(number, times, body):
        dialect = body["dialect"]
        if dialect.format != "text":
            return Reply("unsupported", 400, "response_format of this type is not supported")
        if dialect.limit != "max_tokens":
            return Reply("unsupported", 400, "Unsupported parameter: 'max_completion_tokens'")
        return answer(number, times, body)

    collector = run(make(reply, 100))
    assert collector.client.asked[:5] == [0, 0, 0, 0, 0] and len(collector.client.asked) == 104
    assert collector.dialect == Dialect("text", "max_tokens")
    again = run(make(reply, 200, again=True))
    assert len(again.client.asked) == 100, "it was found out twice"


def test_a_server_that_understands_nothing_ends_the_run(make):
    collector = make(
        lambda *_: Reply("unsupported", 400, "max_tokens and max_completion_tokens and response_format"), 9
    )
    with pytest.raises(Failure, match="the server said 400"):
        run(collector)
    assert len(collector.client.asked) < 10


def test_a_bad_request_among_good_ones_is_that_requests_alone(make):
    def reply(number, times, body):
        return Reply("unsupported", 400, "odd") if number == 5 else answer(number, times, body)

    assert [e.kind for e in run(make(reply, 50)).curator.entries if e.request == 5] == ["refused"]


@pytest.mark.parametrize("probed", [True, False])
def test_a_server_that_turns_odd_leaves_no_holes(make, probed):
    """A server restarted with other settings may refuse everything. Refused requests are asked again later."""
    run(make(answer, 30 if probed else 1, concurrency=1))
    collector = make(lambda *_: Reply("unsupported", 400, "odd"), 60, again=True)
    collector.rate.answers = int(probed)
    with pytest.raises(Failure, match="refused 20 prompts in a row: odd"):
        run(collector)
    assert len(collector.client.asked) <= 20 + 64
    assert run(make(answer, 60, again=True)).curator.rows[:60] == list(range(60))


def test_answers_that_hold_nothing_end_the_run_early(make):
    collector = make(lambda *_: Reply("answer", 200, USELESS), 100)
    with pytest.raises(Failure, match=r"last \d\d answers held nothing new that can be kept \(no items 20"):
        run(collector)
    assert 20 <= len(collector.client.asked) <= 20 + 2 * 64


def test_useless_answers_after_good_ones_are_borne_longer_and_a_run_that_they_ended_goes_on(make, monkeypatch):
    monkeypatch.setattr(collect, "FRUITLESS_LATER", 40)
    collector = make(lambda n, t, b: answer(n, t, b) if n < 9 else Reply("answer", 200, USELESS), 100, concurrency=1)
    with pytest.raises(Failure, match="last 40 answers held nothing"):
        run(collector)
    assert collector.client.asked == list(range(9 + 40))
    again = run(make(answer, 100, again=True))
    assert len(again.curator.rows) >= 100, "what an earlier server wrote ended a run for good"


@pytest.mark.parametrize("wanted", [12, 8])  # 8: what is answered would do, but for the holes
def test_holes_of_a_run_that_was_killed_are_asked_first(make, wanted):
    collector = make(answer, 100)
    for number in range(12):  # answered all but 3 and 7, which were in flight
        _, intent = collector.ledger.prepare_intent(number, "-", "m", 50)
        done = collector.ledger.prepare_outcome(number + 1, "answer", 200, completion(), (10, 10), 20)
        collector.ledger.commit([intent] if number in (3, 7) else [intent, done])
    collector.ledger.write_settings(dialect={"format": "text", "limit": "max_tokens", "temperature": True})
    again = make(answer, wanted, again=True, patience_s=5)
    assert again.budget.uncertain == 100, "what was in flight may have been billed"
    assert sorted(run(again).client.asked) == [3, 7]
    assert again.curator.rows[:wanted] == list(range(wanted))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_cap_is_never_passed_by_a_cent(make, data):
    """The server's bills, for lost answers too, stay within the cap with 64 requests in flight, over two runs."""
    draw = data.draw
    price = Price(draw(st.integers(0, 10**7)), draw(st.integers(1, 10**8)))
    most_in, most_out = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    most = price.compute_cost(most_in, most_out)
    cap = draw(st.integers(0, 200)) * most // 3 + draw(st.integers(0, most))
    rng = random.Random(draw(st.integers(0, 2**32)))
    share = {name: draw(st.floats(0, 0.3)) for name in ("failed", "lost", "no usage")}
    billed = []

    def reply(number, times, body):
        luck, usage = rng.random(), (rng.randint(0, most_in), rng.randint(0, most_out))
        if luck < share["failed"]:
            return Reply("failed", rng.choice([429, 500, 503]), "", overloaded=True)
        billed.append(price.compute_cost(*usage))
        if luck < share["failed"] + share["lost"]:
            return Reply("lost", None, "")
        return Reply("answer", 200, completion(None if rng.random() < share["no usage"] else usage))

    collector = make(reply, 10**6, cap=cap, price=price, most=most, seed=draw(st.integers(0, 99)))
    most_in_flight = 0
    for _ in range(2):
        collector.rate.limit = 64.0
        asyncio.run(collector.run())
        assert collector.status == "cap reached"
        assert sum(billed) <= collector.budget.committed <= cap
        assert cap - collector.budget.committed < most, "it stopped early"
        most_in_flight = max(most_in_flight, collector.client.most)
        collector = make(reply, 10**6, cap=cap, price=price, most=most, again=True)
    if cap >= 64 * most and not share["failed"]:
        assert most_in_flight > 8


def test_a_request_that_the_cap_held_back_is_asked_when_there_is_room_again(make):
    collector = run(make(answer, 10**6, cap=50 * 9 + 20 * 60, seed=3))  # 50 at most, 20 as it turns out
    assert collector.status == "cap reached" and len(collector.done) > 30
    assert collector.next_for_curator == len(collector.done), "one was left out"


def test_a_server_that_bills_more_than_was_asked_ends_a_capped_run(make):
    collector = make(lambda *_: Reply("answer", 200, completion((100, 100))), 50, cap=10**6)
    with pytest.raises(Failure, match=r"billed \$0.000001 \(100 \+ 100 tokens\), more than request 0 can use"):
        run(collector)
    assert run(make(lambda *_: Reply("answer", 200, completion((100, 100))), 50)).curator.is_full, (
        "without a cap it goes on"
    )


def test_a_failure_after_the_last_row_is_none(make):
    collector = make(answer, 5)
    add_outcome = collector.curator.add_outcome

    def last(entry):
        add_outcome(entry)
        if collector.curator.is_full:
            collector.end_run("the server said 401")

    collector.curator.add_outcome = last
    assert run(collector).curator.is_full


def test_stop_waits_for_what_is_in_flight(make):
    collector = make(answer, 10**6)

    async def stop_soon():
        task = asyncio.create_task(collector.run())
        while len(collector.curator.rows) < 100:
            await asyncio.sleep(0)
        in_flight = set(collector.tasks)
        collector.stop()
        await task
        return in_flight

    assert asyncio.run(stop_soon()), "nothing was in flight"
    assert collector.status == "stopped" and not collector.tasks
    assert len(collector.done) == len(set(collector.client.asked)), "an answer was thrown away"


def test_an_answer_that_is_being_written_when_the_grace_is_over_is_written(make, monkeypatch):
    monkeypatch.setattr(collect, "GRACE_S", 0)
    collector = make(answer, 10**6)
    commit, send, answered = collector.ledger.commit, collector.client.send, []

    def slow(statements):
        time.sleep(0.01)
        commit(statements)

    async def noted(body):
        reply = await send(body)
        answered.append(body["number"])
        if len(answered) == 50:
            collector.stop()
        return reply

    collector.ledger.commit, collector.client.send = slow, noted
    run(collector)
    assert {entry.request for entry in collector.ledger.read_outcomes()} == set(answered)


def test_a_disk_that_fails_once_costs_no_other_answer(make):
    collector = make(answer, 10**6)
    commit, send, answered, failed = collector.ledger.commit, collector.client.send, [], []

    def full(statements):
        if len(answered) > 40 and not failed:
            failed.extend(statements)
            raise Failure("no space")
        commit(statements)

    async def noted(body):
        reply = await send(body)
        answered.append(body["number"])
        return reply

    collector.ledger.commit, collector.client.send = full, noted
    with pytest.raises(Failure, match="no space"):
        run(collector)
    assert len(answered) - len(list(collector.ledger.read_outcomes())) <= len(failed)


def test_the_first_failure_of_a_run_is_the_one_that_is_told(make):
    """What fails while a run ends is mostly a consequence."""
    collector = make(answer, 5)

    async def fail(why):
        raise Failure(why)

    async def end():
        for why in ("no space", "the file is gone"):
            task = asyncio.create_task(fail(why))
            collector.tasks[task] = collect.Job(0)
            await asyncio.wait([task])
            collector.handle_done([task])
        collector.end_run("the server said 401")
        await collector.finish()

    with pytest.raises(Failure, match=r"^no space$"):
        asyncio.run(end())
    assert not collector.tasks


def test_what_took_time_before_the_run_is_not_the_servers_silence(make):
    collector = make(failing([("failed", 500)]), 5)
    collector.rate.last_answer -= 10**6
    assert run(collector).curator.is_full


def test_the_first_failure_is_told_at_once(make):
    said = run(make(failing([("failed", 500)] * 2), 5)).progress.said
    assert [text for text in said if "no answer yet (500, {}); trying again for 900 s" in text] == said[:1]


def test_nothing_spins_while_one_request_finds_out_the_dialect(make):
    collector = make(answer, 5)
    collector.retries, collector.handle_done = [(0.0, collect.Job(3))], lambda done: None

    async def loop():
        collector.tasks[asyncio.create_task(asyncio.sleep(0.2))] = collect.Job(0)
        rounds = 0
        while not all(task.done() for task in collector.tasks):
            collector.start_requests()
            await asyncio.wait_for(collector.wait(), 5)
            rounds += 1
        return rounds

    assert asyncio.run(loop()) <= 2


def test_a_request_that_hangs_does_not_hold_up_the_others(make, monkeypatch):
    """Rows wait for their order, but up to LOOKAHEAD further requests are asked."""
    monkeypatch.setattr(collect, "LOOKAHEAD", 40)
    collector = make(answer, 60)
    send = collector.client.send

    async def hang(body):
        while body["number"] == 2 and len(collector.ready) < 37:
            await asyncio.sleep(0.001)
        return await send(body)

    collector.client.send = hang
    assert run(collector).curator.rows == list(range(60))

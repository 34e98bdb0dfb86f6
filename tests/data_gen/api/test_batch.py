"""data_gen.generate --batch: the dataset of ordinary requests at half the price, through kills, faults and delays."""

import asyncio
import itertools
import json
import os
import random
import signal
import sqlite3
import time
import traceback
from collections import deque
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen import generate as command
from data_gen.api import batch as module
from data_gen.api import retries as calls
from data_gen.api.attempt import RequestBuilder
from data_gen.api.batch import Batches, parse_line
from data_gen.api.ledger import Ledger
from data_gen.api.prices import Price
from data_gen.api.retries import Calls
from data_gen.base.cli import Failure, run_for_exit_code
from tests.helpers.forks import Started
from tests.helpers.openai_server import Reply, Server, request_key
from tests.helpers.run import environment

ANSWERS = {"truncated": 0.1, "malformed": 0.08, "refusal": 0.06, "content_policy_400": 0.08, "prose": 0.1}
LINES = {"429": 0.1, "500": 0.1, "503": 0.05, "hang": 0.1}  # of lines in a batch; "hang" is its request_timeout
ROWS, ITEMS = 100, 4
IN, OUT = 100_000, 400_000  # picodollars a token: 0.1 and 0.4 dollars a million
LIMIT = 8000  # tokens enqueued: seven or eight requests


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-5f3a9c1e77d04b21")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def serve(faults=ANSWERS, **options):
    return Server(seed=3, items=ITEMS, faults=faults, **options)


def flags(server, out, *more):
    words = ("--base-url", server.base_url, "--out", out, "--model", "m", "--price-in", "0.1", "--price-out", "0.4")
    words += ("--rows", ROWS, "--tasks-per-request", ITEMS, "--max-output-tokens", 800, "--backoff", "0.01", "--quiet")
    return [str(word) for word in (*words, *more)]


def ordinary(server, out, *more):
    return run_for_exit_code(command.main, flags(server, out, *more))


def batched(server, out, *more):
    return ordinary(server, out, "--batch", "--poll", "0.01", *more)


def child(do):
    """Return the id of a fork that ends with the exit code do() returns. A fork saves the second of imports."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = do()
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return pid


def exit_of(pid):
    deadline = time.monotonic() + 90
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    return os.waitstatus_to_exitcode(found[1])


def until(holds, pid=None):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        assert pid is None or os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before that"
        time.sleep(0.003)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of a run without batches and without faults."""
    out = tmp_path_factory.mktemp("plain") / "out"
    os.environ["OPENAI_API_KEY"] = "sk-test-5f3a9c1e77d04b21"
    with serve() as server:
        assert ordinary(server, out) == 0
    return out


def same(out, plain):
    return all((out / name).read_bytes() == (plain / name).read_bytes() for name in ("dataset.json", "chat.jsonl"))


def query(out, sql):
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        return db.execute(sql).fetchall()


def cost(entries, price=(IN, OUT)):
    """Return the picodollars billed for entries of the server's log, with batches at half the price."""
    part = [(entry["prompt_tokens"] * price[0] + entry["completion_tokens"] * price[1], entry) for entry in entries]
    return sum(full // 2 if entry["via"] == "batch" else full for full, entry in part if entry["billed"])


def told(out):
    return json.loads((out / "run.json").read_text())


def spent(out):
    return query(out, "SELECT coalesce(sum(cost), 0) FROM received")[0][0]


def uncertain(out):
    sql = "SELECT coalesce(sum(reserved), 0) FROM sent LEFT JOIN received USING (attempt)"
    return query(out, f"{sql} WHERE kind IS NULL OR kind = 'lost'")[0][0]


def batches_of(server):
    """Return [(id, status, keys of its requests)] of the batches, in the order of their making."""

    def read():
        return [
            (id, batch.value["status"], [request_key(json.loads(line)["body"]["messages"]) for line in lines])
            for id, batch in server.batches.items()
            for lines in [batch.file.data.splitlines()]
        ]

    return server.within(read)


def check_nothing_twice(server):
    """Check that a request is billed once, and enters a second batch only after the first ended without its answer."""
    outcomes = {(entry.get("batch"), entry["key"]): entry for entry in server.log if entry["via"] == "batch"}
    latest = {}
    for id, status, keys in batches_of(server):
        assert len(set(keys)) == len(keys)
        for key in keys:
            if key in latest:
                before, state = latest[key]
                assert state == "failed" or not outcomes[before, key]["billed"], "an answer was asked for again"
            latest[key] = id, status
    billed = [entry["key"] for entry in server.log if entry["billed"]]
    assert len(billed) == len(set(billed))


def check_money(server, out, **price):
    """Check that the ledger's sum equals the server's bill to the picodollar."""
    assert spent(out) == cost(server.log, **price) and uncertain(out) == 0


def with_lines(server, change):
    """Replace the n-th line of all batches by change(n, key), unless that is None."""
    inner, count = server.line_result, itertools.count()

    def line_result(batch, line, too_late):
        changed = None if too_late else change(next(count), request_key(line["body"]["messages"]))
        if changed is None:
            return inner(batch, line, too_late)
        result, entry = inner(batch, line, "changed")
        return result | changed, entry

    server.line_result = line_result


def response(status, **body):
    return {"response": {"status_code": status, "request_id": "r", "body": body}, "error": None}


# ---- the same dataset ------------------------------------------------------------------------------------------------


def test_the_first_request_finds_out_what_the_server_understands_and_two_or_three_batches_do(plain, tmp_path):
    with serve() as server:
        assert batched(server, tmp_path) == 0
        assert [entry["via"] for entry in server.log].count("chat") == 1
        batches, n_needed = batches_of(server), told(plain)["counts"]["requests"]
        check_nothing_twice(server)
        check_money(server, tmp_path)
        assert 2 <= len(batches) <= 4 and len(server.log) <= 1.3 * n_needed
    assert same(tmp_path, plain)
    strip = [
        [{k: v for k, v in json.loads(line).items() if k != "provenance"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "rejected.jsonl", plain / "rejected.jsonl")
    ]
    assert strip[0] == strip[1]
    cost_told, row = told(tmp_path)["cost"], json.loads((tmp_path / "dataset.jsonl").read_text().splitlines()[-1])
    assert cost_told["batch"] and cost_told["spent_usd"] == spent(tmp_path) / 1e12
    assert 0 < row["provenance"]["usd"] < 0.0005


@pytest.mark.parametrize(
    "options, more",
    [
        ({"batch_fates": ["expired"] * 3, "batch_done_share": 0.3}, ()),
        ({"batch_fates": ["expired"] * 2, "batch_done_share": 0.0}, ()),
        ({"faults": ANSWERS | LINES, "batch_fates": [None, "expired"], "batch_polls": 1}, ()),
        ({"batch_token_limit": LIMIT}, ("--batch-tokens", LIMIT)),
        ({"batch_token_limit": 1500}, ("--batch-tokens", 1)),
    ],
)
def test_partial_results_errors_and_limits_change_nothing(plain, tmp_path, options, more):
    with serve(**options) as server:
        assert batched(server, tmp_path, *more) == 0
        batches = batches_of(server)
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain)
    assert "failed" not in [status for _, status, _ in batches]
    if more:
        assert max(len(keys) for *_, keys in batches) == (1 if more[1] == 1 else 8)


@pytest.mark.parametrize(
    "name, most, option", [("MAX_REQUESTS", 7, "batch_max_lines"), ("MAX_BYTES", 31_000, "batch_max_bytes")]
)
def test_files_are_split_at_the_limits(plain, tmp_path, monkeypatch, name, most, option):
    monkeypatch.setattr(module, name, most)
    with serve(**{option: most}) as server:
        assert batched(server, tmp_path) == 0
        batches = batches_of(server)
        largest = server.within(lambda: max(len(batch.file.data) for batch in server.batches.values()))
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain) and {status for _, status, _ in batches} <= {"completed", "cancelling"}
    assert max(len(keys) for *_, keys in batches) in (7, 8)
    assert name == "MAX_REQUESTS" or 25_000 < largest <= most


def test_limits_are_those_of_the_api():
    assert (module.MAX_REQUESTS, module.MAX_BYTES) == (50_000, 200_000_000)


# ---- money -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", ["0.0004", "0.0011", "0.004"])
def test_the_cap_is_never_passed_and_a_larger_one_goes_on(plain, tmp_path, capsys, cap):
    with serve(faults=ANSWERS | {"500": 0.2}, batch_fates=[None, "expired", None, "expired"]) as server:
        for _ in range(2):  # a cap is of the ledger, not of a run
            assert batched(server, tmp_path, "--max-usd", cap) == 1
            assert cost(server.log) <= float(cap) * 1e12
        (most,) = query(tmp_path, "SELECT max(reserved) FROM sent WHERE batch IS NOT NULL")[0]
        assert float(cap) * 1e12 - cost(server.log) < (most or 1e9) * 1.2, "it stopped early"
        assert "--max-usd goes on from here" in capsys.readouterr().err
        assert told(tmp_path)["status"] == "cap reached"
        check_money(server, tmp_path)
        assert batched(server, tmp_path, "--max-usd", "1") == 0
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain)


def test_a_round_is_cut_to_what_the_cap_allows(tmp_path):
    with serve(batch_polls=10**6) as server:
        pid = child(lambda: batched(server, tmp_path, "--max-usd", "0.004"))
        until(lambda: any(batch.polls for batch in server.within(lambda: list(server.batches.values()))), pid)
        os.kill(pid, signal.SIGTERM)
        assert exit_of(pid) == 143
        batches = batches_of(server)
    reserved, most = query(tmp_path, "SELECT sum(reserved), max(reserved) FROM sent WHERE batch IS NOT NULL")[0]
    assert len(batches) == 1 and 4e9 - 1.2 * most < reserved + spent(tmp_path) <= 4e9


def test_an_answer_without_usage_counts_as_the_most_it_can_have_cost(tmp_path):
    with serve(faults={"no_usage": 0.3}) as server:
        assert batched(server, tmp_path) == 0
        billed = cost(server.log)
    unknown = query(
        tmp_path, "SELECT sum(cost), sum(reserved) FROM received JOIN sent USING (attempt) WHERE input_tokens IS NULL"
    )
    assert unknown[0][0] == unknown[0][1] > 0 and billed < spent(tmp_path)


def test_a_server_that_bills_more_than_was_asked_ends_a_capped_run(tmp_path, capsys):
    def answer(key, body):
        server.configure(ignores=["max_tokens"])  # after the first
        return "word " * 4000

    with Server(answer=answer) as server:
        assert batched(server, tmp_path, "--max-usd", "1") == 1
    assert "more than request" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0, 0.5])
def test_answers_that_were_made_and_cannot_be_had_count_as_perhaps_billed(tmp_path, share):
    with serve(batch_polls=0) as server:
        inner = server.finish

        async def finish(batch, status):
            await inner(batch, status)
            if len(server.batches) == 1:
                file = server.files[batch.value["output_file_id"]]
                file.data = file.data[: int(share * len(file.data))]
                batch.value["output_file_id"] = batch.value["output_file_id"] if share else None

        server.finish = finish
        assert batched(server, tmp_path) == 0
        (first, *_), log = batches_of(server)[0], server.log
        bills = [cost([entry for entry in log if (entry.get("batch") == first) == own]) for own in (True, False)]
    assert bills[1] <= spent(tmp_path) <= sum(bills) <= spent(tmp_path) + uncertain(tmp_path)
    assert bills[0] > 0 and (spent(tmp_path) > bills[1]) == (share > 0)


@pytest.mark.parametrize("is_full", [False, True])
def test_an_error_that_ends_a_run_is_none_where_the_dataset_is_full(is_full, monkeypatch):
    called = []

    class Rounds:
        def __getattr__(self, name):
            async def note():
                called.append(name)

            return note

    monkeypatch.setattr(module, "Batches", lambda *_: Rounds())
    collector = SimpleNamespace(fatal=Failure("no money"), status="done", curator=SimpleNamespace(is_full=is_full))
    if is_full:
        asyncio.run(module.run_batches(collector, None))
    else:
        with pytest.raises(Failure, match="no money"):
            asyncio.run(module.run_batches(collector, None))
    assert collector.status == ("done" if is_full else "failed")
    assert called == ["recover", "run_rounds", *["cancel_open"] * is_full]


# ---- kills -----------------------------------------------------------------------------------------------------------


def dying_at(n, do):
    """Call do() and kill the process at its n-th moment: after a commit to the disk, or after a call."""
    count = itertools.count(1)

    def moment():
        if next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    commit, wait_unless_halted = Ledger.commit, Calls.wait_unless_halted

    def commit_or_die(self, statements):
        commit(self, statements)
        moment()

    async def call_or_die(self, made):
        found = await wait_unless_halted(self, made)
        moment()
        return found

    Ledger.commit, Calls.wait_unless_halted = commit_or_die, call_or_die
    return do()


def check_after_kills(server, out, plain):
    assert same(out, plain)
    bill = cost(server.log)
    assert spent(out) <= bill <= spent(out) + uncertain(out)
    if uncertain(out) == 0:
        check_nothing_twice(server)
        check_money(server, out)
    assert [entry["via"] for entry in server.log].count("chat") <= 2, "no more than the first is asked directly"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the folder of a run of 14 rows without batches."""
    out = tmp_path_factory.mktemp("small") / "out"
    os.environ["OPENAI_API_KEY"] = "sk-test-5f3a9c1e77d04b21"
    with serve() as server:
        assert ordinary(server, out, "--rows", 14) == 0
    return out


def test_killed_at_any_moment_it_is_the_same_dataset_and_nothing_is_paid_for_twice(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_REQUESTS", 3)
    monkeypatch.setattr(module, "ANSWERS_PER_COMMIT", 2)
    monkeypatch.setattr(command, "write_report", lambda rows, page: page)  # it takes a third of the time
    for n in itertools.count(1):
        out = tmp_path / str(n)
        with serve(batch_polls=1, batch_fates=["expired"]) as server:
            do = lambda: batched(server, out, "--rows", 14)  # noqa: E731, B023
            code = exit_of(child(lambda: dying_at(n, do)))  # noqa: B023
            if code == 0:
                break
            assert code == -signal.SIGKILL
            assert do() == 0
            check_after_kills(server, out, small)
    assert n > 20, "there were hardly any moments to die at"


def test_killed_again_and_again(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_REQUESTS", 9)
    monkeypatch.setattr(module, "ANSWERS_PER_COMMIT", 3)
    rng = random.Random(1)
    with serve(faults=ANSWERS | LINES, batch_polls=2, batch_fates=[None, "expired", "token_limit_exceeded"]) as server:
        codes = [
            exit_of(child(lambda: dying_at(rng.randrange(4, 13), lambda: batched(server, tmp_path)))) for _ in range(12)
        ]
        assert codes.count(-signal.SIGKILL) >= 5
        assert batched(server, tmp_path) == 0
        check_after_kills(server, tmp_path, plain)
        check_nothing_twice(server)


def test_a_batch_that_was_not_let_in_when_the_process_died_is_no_failure(plain, tmp_path, monkeypatch):
    """The outcomes and the end of a batch are one commit. Half of them would look like a batch without requests."""
    with serve(batch_fates=["token_limit_exceeded"]) as server:
        for n in range(5, 13):
            code = exit_of(child(lambda: dying_at(n, lambda: batched(server, tmp_path))))  # noqa: B023
            assert code in (0, -signal.SIGKILL)
        assert batched(server, tmp_path) == 0
    assert same(tmp_path, plain)


# ---- batches that the server does not take ---------------------------------------------------------------------------


def test_batches_become_smaller_until_the_server_takes_them(plain, tmp_path, capsys):
    with serve(batch_token_limit=LIMIT) as server:
        assert batched(server, tmp_path) == 0
        states = [status for _, status, _ in batches_of(server)]
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert 1 <= states.count("failed") <= 8 and states.count("completed") >= 3
    assert "the server's limit on enqueued tokens" in capsys.readouterr().err
    assert same(tmp_path, plain)


@pytest.mark.parametrize("most", [1, 3])
def test_many_batches_at_once_are_turned_away(plain, tmp_path, monkeypatch, most):
    """This holds for a single request too: it may fit once other batches have ended."""
    monkeypatch.setattr(module, "MAX_REQUESTS", most)
    with serve(batch_token_limit=LIMIT) as server:
        assert batched(server, tmp_path) == 0
        states = [status for _, status, _ in batches_of(server)]
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert "failed" in states and same(tmp_path, plain)


def test_a_limit_below_one_request_ends_it_with_the_servers_words(tmp_path, capsys):
    with serve(batch_token_limit=300) as server:
        assert batched(server, tmp_path) == 1
        assert len(batches_of(server)) < 12
    assert "Enqueued token limit reached" in capsys.readouterr().err


def test_another_reason_ends_it_with_the_servers_words(plain, tmp_path, capsys):
    with serve(batch_fates=["billing_hard_limit_reached"]) as server:
        assert batched(server, tmp_path) == 1
        said = capsys.readouterr().err
        assert "The batch was not begun: billing_hard_limit_reached" in said and "the same command goes on" in said
        assert len(batches_of(server)) == 1 and told(tmp_path)["status"] == "failed"
        assert batched(server, tmp_path) == 0
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain)


# ---- lines that are errors -------------------------------------------------------------------------------------------


def test_a_request_that_always_fails_is_left_out(tmp_path):
    with serve(faults={}) as server:
        bad = []

        def change(n, key):
            bad.extend([key] if n == 2 else [])
            return response(500, error={"message": "The server had an error"}) if key in bad else None

        with_lines(server, change)
        assert batched(server, tmp_path, "--max-attempts", 2) == 0
        assert [key for *_, keys in batches_of(server) for key in keys].count(bad[0]) == 2
        check_nothing_twice(server)
    assert told(tmp_path)["counts"]["rejected"]["refused by the server"] == 1


def test_three_rounds_without_an_answer_end_it(plain, tmp_path, capsys):
    with serve() as server:
        inner = server.line_result
        with_lines(server, lambda n, key: response(503, error={"message": "Overloaded"}))
        assert batched(server, tmp_path) == 1
        first = batches_of(server)
        assert len(first) == 3 and first[0][2] == first[1][2] == first[2][2]
        assert "3 rounds of batches gave no answer" in capsys.readouterr().err
        server.line_result = inner
        assert batched(server, tmp_path) == 0
    assert same(tmp_path, plain)


@pytest.mark.parametrize(
    "line",
    [
        response(429, error={"message": "You exceeded your current quota", "code": "insufficient_quota"}),
        {"response": None, "error": {"code": "insufficient_quota", "message": "You exceeded your current quota"}},
        response(401, error={"message": "You exceeded your current quota", "code": "invalid_api_key"}),
    ],
)
def test_a_line_that_no_retry_mends_ends_it_and_the_others_are_kept(plain, tmp_path, capsys, line):
    with serve() as server:
        inner = server.line_result
        with_lines(server, lambda n, key: line if n == 6 else None)
        assert batched(server, tmp_path) == 1
        said = capsys.readouterr().err
        assert "in a batch: You exceeded your current quota" in said and len(batches_of(server)) == 1
        check_money(server, tmp_path)
        assert len(query(tmp_path, "SELECT * FROM received WHERE kind = 'answer'")) > 10
        server.line_result = inner
        assert batched(server, tmp_path) == 0
        check_nothing_twice(server)
    assert same(tmp_path, plain)


def test_a_line_without_a_completion_is_perhaps_billed_asked_again_and_left_out_in_the_end(tmp_path):
    with serve(faults={}) as server:
        with_lines(server, lambda n, key: response(200, choices=[]) if n in (3, 4) else None)
        assert batched(server, tmp_path / "again") == 0
        assert len(query(tmp_path / "again", "SELECT * FROM received WHERE kind = 'lost' AND status = 200")) == 2
        assert "refused by the server" not in told(tmp_path / "again")["counts"]["rejected"]
    with serve(faults={}) as server:
        with_lines(server, lambda n, key: response(200, choices=[]) if n in (3, 4) else None)
        assert batched(server, tmp_path / "once", "--max-attempts", 1) == 0
        out = tmp_path / "once"
    assert told(out)["counts"]["rejected"]["refused by the server"] == 2
    kinds = query(
        out, "SELECT kind, cost = reserved FROM received JOIN sent USING (attempt) WHERE body LIKE '{\"choices\": []}'"
    )
    assert kinds == [("refused", 1)] * 2


COMPLETION = {"choices": [{"message": {"content": "é 日本"}}], "usage": None}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\n", b"garbage", b'{"custom_id": "7"', b"null", b"[]", b'"7"', b"{}", b"\xff\xfe", b"[" * 100_000,
        b'{"custom_id": null}', b'{"custom_id": "request-7"}', b'{"custom_id": Infinity}', b'{"custom_id": []}',
        b'{"custom_id": "7", "response": [1]}', b'{"custom_id": "7", "response": "no"}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours(line):
    assert parse_line(line) is None


@pytest.mark.parametrize(
    "line, kind, status",
    [
        (response(200, **COMPLETION), "answer", 200),
        (response(200, **COMPLETION) | {"error": {"code": "odd"}}, "answer", 200),
        (response(200, choices=[]), "lost", 200),
        (response(200), "lost", 200),
        (response(429, error={"message": "slow down"}), "failed", 429),
        (response(500) | {"error": {"code": "server_error"}}, "failed", 500),
        (response(400, error={"code": "content_policy_violation"}), "refused", 400),
        (response(400, error={"message": "odd"}), "refused", 400),
        (response(404, error={"code": "model_not_found"}), "fatal", 404),
        (response(429, error={"code": "insufficient_quota"}), "fatal", 429),
        (response("200", **COMPLETION), "failed", None),
        (response(10**30), "failed", None),
        (response(True), "failed", None),
        ({"response": None, "error": {"code": "batch_expired"}}, "failed", None),
        ({"response": None, "error": {"code": "insufficient_quota"}}, "fatal", None),
        ({"response": None, "error": None}, "failed", None),
        ({}, "failed", None),
    ],
)
def test_what_a_line_means(line, kind, status):
    attempt, *found, body = parse_line(json.dumps({"custom_id": "7"} | line).encode())
    assert (attempt, found) == (7, [kind, status])
    json.loads(body)


def test_bodies_of_lines_are_kept_as_they_are_but_for_the_key():
    line = json.dumps({"custom_id": "1"} | response(200, choices=[{"message": {"content": "é \ud83d sk-1"}}])).encode()
    *_, body = parse_line(line, lambda text: text.replace("sk-1", "[key]"))
    assert json.loads(body)["choices"][0]["message"]["content"] == "é \ud83d [key]"
    body.encode()  # what a ledger can hold: a replay sees the same
    *_, body = parse_line(json.dumps({"custom_id": "1"} | response(200, **COMPLETION)).encode())
    assert "é 日本" in body


def test_odd_lines_among_good_ones(plain, tmp_path):
    with serve() as server:
        inner = server.keep_file

        def keep_file(data, filename, purpose):
            if purpose == "batch_output" and "output" in filename:
                lines = data.splitlines(keepends=True)
                odd = [b"garbage\n", b'{"custom_id": "999999", "response": null}\n', b"\n", lines[0], lines[0]]
                data = b"".join([*odd, *lines, *odd, lines[0].rstrip(b"\n")])
            return inner(data, filename, purpose)

        server.keep_file = keep_file
        assert batched(server, tmp_path) == 0
        check_money(server, tmp_path)
    assert same(tmp_path, plain)


# ---- faults of files and batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults, more",
    [
        ({"429_ms": 0.3, "500": 0.3, "503": 0.2}, ()),
        ({"reset": 0.3, "502_html": 0.3, "eof_body": 0.3}, ()),
        ({"lost": 1.0}, ()),
        ({"reset_body": 1.0}, ()),
        ({"hang": 0.4}, ("--timeout", 0.5)),
    ],
)
def test_faults_of_the_api_change_nothing(plain, tmp_path, faults, more):
    with serve(api_faults=faults, retry_after_ms=5, max_faults_per_request=2) as server:
        assert batched(server, tmp_path, *more) == 0
        seen = server.stats()["api"]
        assert len(batches_of(server)) == len(query(tmp_path, "SELECT * FROM batch"))
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain)
    assert sum(seen.values()) > 5 + 5 * len(query(tmp_path, "SELECT * FROM batch")), "no fault came"
    if "lost" in faults:
        assert seen["POST /v1/batches"] == len(query(tmp_path, "SELECT * FROM batch")), "one was created twice"


def test_a_reply_that_is_lost_is_looked_for_on_every_page(plain, tmp_path):
    with serve(api_faults={"lost": 1.0}, max_faults_per_request=1) as server:
        inner = server.page
        server.page = lambda values, query, limit, most: inner(values, query | {"limit": "1"}, limit, most)
        server.batch_inner = server.post_batches

        async def crowded(request):
            reply = await server.batch_inner(request)
            for n in range(3):  # others' batches, and newer ones
                other = SimpleNamespace(**vars(server.batches[reply.body["id"]]))
                other.value = other.value | {
                    "id": f"batch_{n}_{len(server.batches)}",
                    "metadata": [None, {}, {"a": "b"}][n],
                }
                server.batches[other.value["id"]] = other
            return reply

        server.post_batches = crowded
        assert batched(server, tmp_path, "--rows", 20) == 0
        assert server.stats()["api"]["POST /v1/batches"] == len(query(tmp_path, "SELECT * FROM batch"))


def test_a_server_that_asks_to_wait_is_waited_for(tmp_path, monkeypatch):
    pauses, pause = [], Calls.pause

    async def counted(self, seconds):
        pauses.append(seconds)
        await pause(self, min(seconds, 0.01))

    monkeypatch.setattr(Calls, "pause", counted)
    with serve(api_faults={"429": 1.0}, retry_after_s=7, max_faults_per_request=1) as server:
        assert batched(server, tmp_path, "--rows", 10) == 0
    assert 7 in pauses


@pytest.mark.parametrize("fault", ["500", "reset", "502_html"])
def test_patience_ends_it_and_the_same_command_goes_on(plain, tmp_path, capsys, fault):
    with serve(api_faults={fault: 1.0}, max_faults_per_request=10**9) as server:
        assert batched(server, tmp_path, "--timeout", 0.2, "--patience", 0.3) == 1
        said = capsys.readouterr().err
        assert "no answer for 0.3 s (--patience)" in said and "the same command goes on" in said
        assert sum(server.stats()["api"].values()) < 80, "it was hammered"
        server.within(lambda: server.configure(api_faults={}))
        assert batched(server, tmp_path) == 0
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain)


@pytest.mark.parametrize("page", [(b"<html>Please log in</html>", "text/html"), (b'{"id": "ba', "application/json")])
def test_a_proxys_page_is_no_answer(plain, tmp_path, page):
    with serve() as server:
        inner, seen = server.resource, set()

        async def resource(request):
            if (request.method, request.path) not in seen:
                seen.add((request.method, request.path))
                return Reply(200, page[0], type=page[1])
            return await inner(request)

        server.resource = resource
        assert batched(server, tmp_path) == 0
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert same(tmp_path, plain)


def test_a_server_without_batches_is_told_at_once(tmp_path, capsys):
    with serve() as server:

        async def no_files(request):
            return Reply(404, {"error": "Not Found"})

        server.post_files = no_files
        assert batched(server, tmp_path) == 1
    assert "the server said 404: Not Found" in capsys.readouterr().err


# ---- signals, other rows, other settings -----------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    """Return (server, folder) of a run that a signal ended while its batches were in progress."""
    with serve(batch_polls=10**6) as server:
        pid = child(lambda: batched(server, tmp_path))
        until(lambda: [status for _, status, _ in batches_of(server)] == ["in_progress"] or poke(server), pid)
        os.kill(pid, signal.SIGTERM)
        assert exit_of(pid) == 143
        server.within(lambda: server.configure(batch_polls=2))
        yield server, tmp_path


def poke(server):
    """Return whether batches are in progress that the run has looked at."""

    def begin():
        for batch in server.batches.values():
            if batch.polls and batch.value["status"] == "validating":
                batch.polls = server.options.batch_polls // 3 + 1
        return False

    return server.within(begin)


def test_a_signal_leaves_batches_at_work_and_the_same_command_takes_them(plain, opened, monkeypatch):
    server, out = opened
    assert told(out)["status"] == "stopped" and [status for _, status, _ in batches_of(server)] == ["in_progress"]
    reserved = uncertain(out)
    seen, rounds = [], Batches.run_rounds

    async def watched(self):
        seen.append((self.budget.uncertain, self.budget.reserved))
        await rounds(self)

    monkeypatch.setattr(Batches, "run_rounds", watched)
    assert batched(server, out) == 0
    assert seen == [(0, reserved)] and reserved > 0, "what is at the server is set aside, and not lost"
    assert "GET /v1/batches" not in server.stats()["api"], "a batch whose id is known was looked for"
    check_nothing_twice(server)
    check_money(server, out)
    assert same(out, plain)


def test_a_signal_reaches_a_process_of_its_own(tmp_path):
    with serve(batch_polls=10**6) as server:
        code = "from data_gen.base.cli import run_command\nfrom data_gen.generate import main\nrun_command(main)"
        process = Started(code, *flags(server, tmp_path, "--batch", "--poll", "500"), env=environment())
        until(lambda: any(batch.polls for batch in server.batches.values()) or process.poll() is not None)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on" in said


def test_a_signal_is_heard_while_the_server_hangs_or_is_down(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "GRACE_S", 0.2)
    for fault in ("hang", "503"):
        out = tmp_path / fault
        with serve(api_faults={fault: 1.0}, max_faults_per_request=10**9, hang_s=10**4) as server:
            pid = child(lambda: batched(server, out, "--backoff", 30))  # noqa: B023
            until(lambda: server.stats()["api"].get("POST /v1/files"), pid)
            time.sleep(0.3)
            os.kill(pid, signal.SIGTERM)
            assert exit_of(pid) == 143
            server.within(lambda: server.configure(api_faults={}))
            assert batched(server, out) == 0
            check_money(server, out)
        assert same(out, plain)


def test_batches_that_are_not_needed_any_more_are_cancelled_and_what_they_did_is_taken_later(plain, opened):
    server, out = opened
    server.within(lambda: server.configure(batch_polls=10**6))
    assert batched(server, out, "--rows", 2) == 0, "the first answer is enough"
    assert [status for _, status, _ in batches_of(server)] == ["cancelling"]
    server.within(lambda: server.configure(batch_polls=2))
    assert batched(server, out) == 0
    assert batches_of(server)[0][1] == "cancelled" and any(
        e.get("batch") == batches_of(server)[0][0] and e["billed"] for e in server.log
    )
    check_nothing_twice(server)
    check_money(server, out)
    assert same(out, plain)


def test_a_cancel_that_comes_too_late_is_no_failure(opened):
    server, out = opened
    server.within(lambda: server.configure(batch_polls=10**6))
    inner = server.post_cancel

    async def late(request, batch):
        server.enter(batch, "finalizing")
        await server.finish(batch, "completed")
        return await inner(request, batch)

    server.post_cancel = late
    assert batched(server, out, "--rows", 2, "--patience", 2, "--timeout", 1) == 0
    assert batched(server, out, "--rows", 2) == 0
    check_money(server, out)


def test_without_batch_what_batches_left_is_taken_first(plain, opened):
    server, out = opened
    server.within(lambda: server.configure(batch_polls=10**6))
    assert ordinary(server, out, "--poll", "0.01") == 0
    assert [status for _, status, _ in batches_of(server)] == ["cancelled"]
    check_nothing_twice(server)
    check_money(server, out)
    assert same(out, plain)


def test_what_is_left_of_batches_may_have_failed(plain, opened):
    server, out = opened

    def fail():
        for batch in server.batches.values():
            batch.value |= {
                "status": "failed",
                "errors": {"object": "list", "data": [{"code": "odd", "message": "Odd."}]},
            }

    server.within(fail)
    assert ordinary(server, out, "--poll", "0.01") == 0
    check_money(server, out)
    assert same(out, plain)


def test_other_settings_are_refused_or_allowed_and_an_open_batch_keeps_its_price(opened, capsys):
    server, out = opened
    assert batched(server, out, "--model", "other") == 2
    assert "model was 'm', is 'other'" in capsys.readouterr().err
    more = ("--model", "other", "--seed", 1, "--price-in", "0.3", "--price-out", "0.9", "--allow-changed")
    assert batched(server, out, *more) == 0
    first = batches_of(server)[0]
    old = [entry for entry in server.log if entry["via"] == "chat" or entry["batch"] == first[0]]
    new = [entry for entry in server.log if entry not in old]
    assert spent(out) == cost(old) + cost(new, (300_000, 900_000)) and new
    answered = query(out, "SELECT request FROM received JOIN sent USING (attempt) WHERE kind = 'answer'")
    assert len(set(answered)) == len(answered)
    models = query(out, "SELECT DISTINCT model, batch IS NULL, body_sha256 IS NULL FROM sent ORDER BY model")
    assert models == [("m", 0, 0), ("m", 1, 0), ("other", 0, 0)] or models == [
        ("m", 1, 0),
        ("m", 0, 0),
        ("other", 0, 0),
    ]


def test_a_batch_that_was_never_begun_is_planned_anew_with_other_settings(tmp_path):
    with serve(api_faults={"500": 1.0}, max_faults_per_request=10**9) as server:
        assert batched(server, tmp_path, "--timeout", 0.1, "--patience", 0.2) == 1
        assert query(tmp_path, "SELECT count(*) FROM batch") == [(1,)] and not batches_of(server)
        server.within(lambda: server.configure(api_faults={}))
        assert batched(server, tmp_path, "--seed", 1, "--model", "other", "--allow-changed") == 0
        check_nothing_twice(server)
        check_money(server, tmp_path)
    assert query(tmp_path, "SELECT value FROM batch_event WHERE event = 'ended'")[0] == ("never begun",)


# ---- planning --------------------------------------------------------------------------------------------------------


def planner(wanted, kept=(), done=None, ready=0, rows=None):
    """Return Batches whose collector has kept these numbers of rows of its requests."""
    done = set(range(len(kept))) if done is None else done
    curator = SimpleNamespace(
        wanted=wanted, rows=range(sum(kept) if rows is None else rows), kept_by_request=list(kept)
    )
    recent = kept[-200:]
    found = Batches.__new__(Batches)
    found.builder = SimpleNamespace(prompter=SimpleNamespace(n_tasks=20))
    found.collector = SimpleNamespace(
        curator=curator, done=done, highest=max(done), ready=range(ready),
        estimate_yield=lambda: max(0.05, sum(recent) / len(recent)),
    )  # fmt: skip
    return found


@pytest.mark.parametrize(
    "about, wanted",
    [
        (dict(wanted=1000, kept=[14]), range(1, 72)),  # 986 / 14
        (dict(wanted=1000, kept=[20]), range(1, 50)),  # 980 / 20
        (dict(wanted=1000, kept=[2]), range(1, 73)),  # one poor answer says little: 998 / 14
        (dict(wanted=52_000, kept=[0]), range(1, 21)),  # nothing is known to be of any use
        (dict(wanted=1000, kept=[10] * 50), range(50, 100)),
        (dict(wanted=5000, kept=[10] * 201), range(201, 201 + 314)),  # 1.05 times 299
        (dict(wanted=1000, kept=[10] * 50, done={*range(50), 55}, ready=1), [50, 51, 52, 53, 54, *range(56, 100)]),
        (dict(wanted=520, kept=[10] * 50, done={*range(50), 55}, ready=1), [50, 51, 52, 53, 54]),
        (dict(wanted=520, kept=[10] * 50, ready=9), [50]),  # a round is never empty
    ],
)
def test_a_round_is_what_is_missing(about, wanted):
    assert planner(**about).plan_round() == list(wanted)


def test_a_round_draws_each_prompt_once(tmp_path, monkeypatch):
    """The work for 5,000 requests in batches of a few hundred is linear."""
    drawn = []
    prepare = RequestBuilder.prepare

    def counted(builder, number, dialect):
        drawn.append(number)
        return prepare(builder, number, dialect)

    monkeypatch.setattr(RequestBuilder, "prepare", counted)
    monkeypatch.setattr(module, "MAX_REQUESTS", 10)
    with serve(faults={}) as server:
        assert batched(server, tmp_path, "--batch-tokens", 25_000) == 0
        batches = batches_of(server)
    assert len(drawn) <= 1 + sum(len(keys) for *_, keys in batches) + 12 * len(batches)


@pytest.mark.parametrize(
    "output, errors, completed, kind",
    [
        ((200, 200), (500,), 2, "failed"), ((200,), (500,), 2, "lost"), ((200,), (500, 429), 1, "failed"),
        ((), (500,), 0, "failed"), ((), (500,), 1, "lost"), ((200,), None, 1, "failed"), (None, (500,), 1, "lost"),
        ((200,) * 1200, None, 1200, "failed"), ((200,) * 1200, None, 1201, "lost"),
        ((200, 200), (500, 200), 3, "failed"), ((200, 200), (500, 200), 4, "lost"),
    ],
)  # fmt: skip
def test_what_no_file_holds_is_lost_where_the_server_counts_more_answers(monkeypatch, output, errors, completed, kind):
    """Other requests without an answer cost nothing."""
    files, closed = {"out": output, "err": errors}, []

    async def call(function):
        return await function()

    async def retrieve(id):
        counts = SimpleNamespace(total=2000, completed=completed)
        names = (name if files[name] is not None else None for name in files)
        return SimpleNamespace(
            status="expired", request_counts=counts, errors=None, output_file_id=next(names), error_file_id=next(names)
        )

    async def content(name):
        lines = [json.dumps({"custom_id": str(i)} | response(status)) for i, status in enumerate(files[name])]
        return SimpleNamespace(content="\n".join([*lines, '{"custom_id": null}']).encode())

    async def ignore(*_):
        pass

    async def close(batch, why, kind):
        closed.append((why, kind))

    batches = object.__new__(Batches)
    batches.calls = SimpleNamespace(make_call=call)
    batches.client = SimpleNamespace(cleaner=SimpleNamespace(clean_body=str))
    batches.api = SimpleNamespace(batches=SimpleNamespace(retrieve=retrieve), files=SimpleNamespace(content=content))
    batches.collector = SimpleNamespace(progress=SimpleNamespace(print_line=lambda line: None))
    monkeypatch.setattr(batches, "record_outcomes", ignore)
    monkeypatch.setattr(batches, "close_batch", close)
    asyncio.run(batches.check_batch(module.Batch("b", 0, None, {}, "id")))
    assert closed == [("expired", kind)]


def test_batches_that_are_cancelled_and_fail_are_no_failure_of_the_run(monkeypatch):
    """Their requests are not needed any more: none is queued again, and nothing is told as rejected."""
    done = []

    async def retrieve(id):
        return SimpleNamespace(
            status="failed", request_counts=None, errors=None, output_file_id=None, error_file_id=None
        )

    async def close(batch, *why):
        del batches.open[batch.name]

    async def call(function):
        return await function()

    api = SimpleNamespace(batches=SimpleNamespace(retrieve=retrieve))
    progress, limits = SimpleNamespace(print_line=lambda line: None), SimpleNamespace(batch_tokens=None)
    client = SimpleNamespace(api=api)
    monkeypatch.setattr(module, "Calls", lambda collector: SimpleNamespace(make_call=call))
    batches = Batches(SimpleNamespace(ledger=None, budget=None, client=client, limits=limits, progress=progress), None)
    batches.close_batch, batches.handle_rejection = close, lambda *given: done.append("rejected")
    for cancels in (False, True):
        sent = {attempt: module.Sent(number, "", "m", 5) for attempt, number in ((1, 7), (2, 8), (3, 10))}
        batch = batches.open["b"] = module.Batch("b", 0, None, sent, "id")
        batches.queue = deque([20, 21])
        asyncio.run(batches.cancel_open() if cancels else batches.check_batch(batch))
        again = [] if cancels else [7, 8, 10]  # before those that were not sent yet
        assert not batches.open and list(batches.queue) == [*again, 20, 21] and done == ["rejected"]


def test_a_smaller_limit_on_tokens_is_half_of_all_that_was_enqueued():
    """By the rejected batch and those at work. A single request is too large only where nothing else is at work."""
    batches, said, ended = object.__new__(Batches), [], []
    batches.collector = SimpleNamespace(progress=SimpleNamespace(print_line=said.append), end_run=ended.append)
    full = [SimpleNamespace(code="other", message="x"), SimpleNamespace(code=module.TOKEN_LIMIT, message="full")]
    for others, n_requests, limit in ([600, 301], 5, 700), ([600], 1, 550), ([], 2, 250):
        batches.open = {str(n): module.Batch(str(n), n, None, {}, "id") for n in others}
        batches.handle_rejection(module.Batch("b", 500, None, {}, "id"), n_requests, full)
        assert batches.token_limit == limit and f"{limit:,} at once" in said[-1] and not ended
    batches.handle_rejection(module.Batch("b", 500, None, {}, "id"), 1, full)
    assert ended == ["the server did not take batch id: x; full"] and batches.token_limit == 250


def test_an_answer_of_a_batch_is_looked_at_as_any_other():
    """By what notices that a model only thinks, or ignores the format that it was asked for."""
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    seen, body = [], json.dumps({"choices": [{"message": {"content": "{}"}}], "usage": usage})

    async def write(*statements):
        pass

    def ignore(*given):
        pass

    ledger = SimpleNamespace(count_failures=lambda number: 0, prepare_outcome=ignore, write=write)
    batches = object.__new__(Batches)
    batches.ledger, batches.budget = ledger, SimpleNamespace(settle=ignore, count_lost=ignore)
    batches.builder = SimpleNamespace(get_format=lambda dialect: f"the format of {dialect}")
    batches.collector = SimpleNamespace(
        limits=SimpleNamespace(max_attempts=3), check_bill=ignore, settle_request=ignore, dialect="d",
        observe_answer=lambda *given: seen.append(given),
    )  # fmt: skip
    price = Price(1, 2)
    batch = module.Batch("b", 0, price, {n: module.Sent(n, "", "m", 50) for n in (1, 2)}, "id")
    asyncio.run(batches.record_outcomes(batch, [(1, "answer", 200, body), (2, "failed", 500, "{}")]))
    assert seen == [(body, "the format of d", price, 3 * 1 + 4 * 2)]

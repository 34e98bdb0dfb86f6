"""The ledger: everything recorded before a kill is whole after it, and a torn write is no commit."""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import astuple
from pathlib import Path

import pytest

from data_gen.api.ledger import ERROR_CHARS, LEDGER_NAME, Entry, Ledger
from data_gen.base.cli import DataError, Failure, UsageError
from tests.helpers.run import ROOT


def add(ledger, request, kind=None, status=200, body="{}", usage=(None, None), cost=0, most=100, batch=None):
    """Add an attempt and, unless kind is None, its outcome."""
    attempt, intent = ledger.prepare_intent(request, f"hash {request}", "m", most, batch)
    ledger.commit([intent])
    if kind:
        ledger.commit([ledger.prepare_outcome(attempt, kind, status, body, usage, cost)])
    return attempt


def rows(folder, table="received"):
    db = sqlite3.connect(Path(folder) / LEDGER_NAME)
    found = db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
    db.close()
    return found


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(tmp_path / "out")
    yield found
    found.close()


# ---- kills -----------------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
from data_gen.api.ledger import Ledger

async def main():
    ledger = Ledger(sys.argv[1])
    async def one(request):
        number, intent = ledger.prepare_intent(request, f"hash {request}", "m", 7)
        await ledger.write(intent)
        print("sent", number, request, flush=True)
        body = f"{request}:" + "x" * (request * 7919 % 60_000)
        await ledger.write(ledger.prepare_outcome(number, "answer", 200, body, (request, 2), request))
        print("received", number, request, flush=True)
    request = ledger.next_attempt * 1000
    while True:
        await asyncio.gather(*(one(request + i) for i in range(8)))
        request += 8

asyncio.run(main())
"""


def test_what_was_committed_before_a_kill_is_there_after_it(tmp_path):
    rng, told_sent, told_received = random.Random(0), {}, {}
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines, n = [], rng.randrange(1, 80)
        while len(lines) < n:
            lines.append(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines()
        assert child.returncode == -signal.SIGKILL
        for line in lines:
            if len(words := line.split()) == 3:
                (told_sent if words[0] == "sent" else told_received)[int(words[1])] = int(words[2])
        ledger = Ledger(tmp_path)
        sent = {attempt: request for attempt, request, *_ in ledger.db.execute("SELECT attempt, request FROM sent")}
        assert told_sent.items() <= sent.items() and ledger.next_attempt == max(sent) + 1
        found = {entry.attempt: entry for entry in ledger.read_outcomes()}
        assert told_received.keys() <= found.keys()
        for entry in found.values():
            assert entry.body == f"{entry.request}:" + "x" * (entry.request * 7919 % 60_000)
            assert entry.body_sha256 == f"hash {entry.request}" and entry.cost == entry.request
        totals = ledger.compute_totals()
        assert totals.attempts == len(sent) and totals.uncertain == 7 * (len(sent) - len(found))
        ledger.close()
    assert len(told_received) > 50 and len(found) > len(told_received) // 2


@pytest.fixture
def torn(tmp_path):
    """Return a ledger's files as a dead process leaves them, with 40 commits in the write-ahead log."""
    folder = tmp_path / "whole"
    ledger = Ledger(folder)
    for i in range(20):
        add(ledger, i, "answer", body=f"{i} " * (i * 37), cost=i)
    shutil.copytree(folder, tmp_path / "dead")
    ledger.close()
    (tmp_path / "dead" / f"{LEDGER_NAME}-shm").unlink(missing_ok=True)
    return tmp_path / "dead"


def opened(dead, folder, wal):
    """Return (attempts, answers) of a ledger with these bytes as its log, and check that it is whole and has no gap."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dead, folder)
    (folder / f"{LEDGER_NAME}-wal").write_bytes(wal)
    ledger = Ledger(folder)
    found = list(ledger.read_outcomes())
    assert [(e.request, e.body, e.cost) for e in found] == [(i, f"{i} " * (i * 37), i) for i in range(len(found))]
    attempts = ledger.compute_totals().attempts
    assert attempts - len(found) in (0, 1), "an outcome is never there without its intent, nor a later intent"
    assert ledger.next_attempt == attempts + 1
    add(ledger, 99, "answer", body="after")  # it goes on
    assert list(ledger.read_outcomes())[-1].body == "after"
    ledger.close()
    return attempts + len(found)


def test_a_log_that_was_cut_anywhere_opens_to_the_first_of_its_commits(torn, tmp_path):
    wal = (torn / f"{LEDGER_NAME}-wal").read_bytes()
    assert opened(torn, tmp_path / "copy", wal) == 40
    rng, before = random.Random(1), 0
    for cut in sorted([0, 31, 32, len(wal) - 1, *(rng.randrange(len(wal)) for _ in range(20))]):
        commits = opened(torn, tmp_path / "copy", wal[:cut])
        assert commits >= before
        before = commits
    assert before == 39


def test_garbage_in_the_logs_tail_ends_it_there(torn, tmp_path):
    wal, rng = (torn / f"{LEDGER_NAME}-wal").read_bytes(), random.Random(2)
    for _ in range(10):
        at = rng.randrange(len(wal))
        whole = opened(torn, tmp_path / "copy", wal[:at])
        assert opened(torn, tmp_path / "copy", wal[:at] + rng.randbytes(len(wal) - at)) == whole
        assert opened(torn, tmp_path / "copy", wal[:at] + bytes([wal[at] ^ 1]) + wal[at + 1 :]) >= whole


def test_a_commit_is_synced(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ledger.db.execute("PRAGMA synchronous").fetchone() == (2,)
    ledger.close()


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path, ledger):
    imports = "from data_gen.base.cli import run_command; from data_gen.api.ledger import Ledger"
    text = f"{imports}; run_command(lambda argv: Ledger(argv[0]))"
    folder = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", text, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: another process is at work in")
    assert UsageError.exit_code == 2
    for create in (True, False):
        with pytest.raises(UsageError, match="another process"):
            Ledger(folder, create)
    add(ledger, 1)
    ledger.close()
    done = subprocess.run([sys.executable, "-c", text, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000, b"{}\n"])
def test_a_file_that_is_no_database(tmp_path, content):
    (tmp_path / LEDGER_NAME).write_bytes(content)
    for _ in range(2):  # the lock is free again
        with pytest.raises(DataError, match="is not a ledger"):
            Ledger(tmp_path)
    assert (tmp_path / LEDGER_NAME).read_bytes() == content and DataError.exit_code == 3


@pytest.mark.parametrize("change", ["ALTER TABLE batch DROP COLUMN price_in", "CREATE TABLE later (x)"])
def test_a_ledger_of_another_version(tmp_path, change):
    Ledger(tmp_path).close()
    Ledger(tmp_path).close()
    db = sqlite3.connect(tmp_path / LEDGER_NAME)
    db.execute("ANALYZE")
    db.close()
    Ledger(tmp_path).close()
    db = sqlite3.connect(tmp_path / LEDGER_NAME)
    db.execute(change)
    db.close()
    with pytest.raises(DataError, match="another version"):
        Ledger(tmp_path)


def test_a_database_of_something_else_or_a_folder(tmp_path):
    db = sqlite3.connect(tmp_path / LEDGER_NAME)
    db.execute("CREATE TABLE sent (x)")
    db.close()
    (tmp_path / "b" / LEDGER_NAME).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "b"):
        with pytest.raises(DataError, match="is not a ledger"):
            Ledger(folder)


def test_where_none_is_or_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not there"):
        Ledger(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="is not there"):
        Ledger(tmp_path / "file", create=False)
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UsageError, match="cannot be made"):
            Ledger(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    Ledger(tmp_path / "out").close()
    (tmp_path / "out" / ".lock").unlink()
    (tmp_path / "out").chmod(0o500)
    for create in (True, False):
        with pytest.raises(UsageError, match="cannot be written"):
            Ledger(tmp_path / "out", create)


def test_it_goes_on_where_it_was(tmp_path):
    ledger = Ledger(tmp_path / "a" / "b")
    ledger.write_settings(dialect={"x": [1, None, "é"]}, run_id="r")
    ledger.write_settings(run_id="s")
    assert [add(ledger, 5), add(ledger, 6)] == [1, 2]
    ledger.close()
    ledger = Ledger(tmp_path / "a" / "b", create=False)
    assert ledger.read_settings() == {"dialect": {"x": [1, None, "é"]}, "run_id": "s"} and add(ledger, 7) == 3
    ledger.close()


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_sums_over_every_kind(ledger):
    assert astuple(ledger.compute_totals()) == (0, 0, 0, 0, 0, 0)
    add(ledger, 0, "answer", usage=(10, 20), cost=33, most=1000)
    add(ledger, 1, "answer", cost=70, most=70)  # that told no usage
    add(ledger, 2, "lost", None, most=500)
    add(ledger, 2, "failed", 429, most=600)
    add(ledger, 2, most=40)  # in flight
    add(ledger, 3, "refused", 400, most=700)
    add(ledger, 4, "refused", None, cost=9, most=9)  # lost too often
    add(ledger, 5, "lost", 200, most=1)
    totals = ledger.compute_totals()
    assert (totals.attempts, totals.answers, totals.spent, totals.uncertain) == (8, 2, 33 + 70 + 9, 500 + 40 + 1)
    assert (totals.input_tokens, totals.output_tokens) == (10, 20)


def test_outcomes_come_in_the_order_of_requests_and_the_done_ones_alone(ledger):
    add(ledger, 3, "answer", body="three", cost=5)
    add(ledger, 1, "lost", None)
    add(ledger, 0, "refused", 400, body="zero")
    add(ledger, 1, "failed", 500)
    add(ledger, 1, "answer", body="one")
    add(ledger, 7)
    found = list(ledger.read_outcomes())
    assert [(e.request, e.attempt, e.kind, e.body) for e in found] == [
        (0, 3, "refused", "zero"), (1, 5, "answer", "one"), (3, 1, "answer", "three"),
    ]  # fmt: skip
    assert found[2] == Entry(3, 1, "answer", "three", "hash 3", "m", 5)
    assert len({entry.request for entry in found}) == len(found)


def test_failures_are_what_the_server_sent_instead_of_an_answer(ledger):
    for kind, status in (
        ("failed", 429),
        ("failed", 500),
        ("failed", None),
        ("lost", None),
        ("lost", 200),
        ("answer", 200),
    ):
        add(ledger, 1, kind, status)
    add(ledger, 2, "failed", 500)
    assert [ledger.count_failures(request) for request in (1, 2, 3)] == [3, 1, 0]


def test_batches(ledger):
    def event(name, event, value=None):
        ledger.commit([ledger.prepare_batch_event(name, event, value)])

    for tokens, name in enumerate(("z", "planned", "created", "ended")):
        ledger.commit([ledger.prepare_batch(name, tokens, 7, 8)])
    event("created", "created", "id 1")
    event("created", "looked", "in_progress")
    event("ended", "created", "id 2")
    event("ended", "ended", "completed")
    assert ledger.read_open_batches() == [
        ("z", None, 0, 7, 8),
        ("planned", None, 1, 7, 8),
        ("created", "id 1", 2, 7, 8),
    ]
    first, second = (add(ledger, request, batch="created", most=10 + request) for request in (8, 4))
    add(ledger, 5, "answer", batch="created")
    add(ledger, 6)
    add(ledger, 7, batch="ended")
    assert ledger.read_unanswered("created") == [
        (first, 8, "hash 8", "m", 18),
        (second, 4, "hash 4", "m", 14),
    ]
    assert ledger.read_unanswered("planned") == []
    with pytest.raises(Failure):  # of no batch
        event("nobody", "created")


BODIES = {
    "NUL": "a\0b\0",
    "10 MB": "é" * 5_000_000,
    "astral": "\U0001f600\u2028\r\n",
    "empty": "",
    "quotes": "'; DROP TABLE sent; --",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_comes_back_as_it_was(tmp_path, body):
    ledger = Ledger(tmp_path)
    add(ledger, 1, "answer", body=body)
    add(ledger, 2, "refused", body=body)
    ledger.close()
    ledger = Ledger(tmp_path)
    assert [entry.body for entry in ledger.read_outcomes()] == [body, body]
    ledger.close()


def test_a_lone_surrogate_becomes_a_question_mark(ledger):
    add(ledger, 1, "answer", body="a\ud800b")
    assert next(ledger.read_outcomes()).body == "a?b"


def test_the_body_of_a_failed_attempt_is_cut(tmp_path, ledger):
    add(ledger, 1, "failed", 502, body="x" * 10**6)
    add(ledger, 1, "lost", None, body=None)
    assert [len(row[4]) for row in rows(tmp_path / "out")] == [ERROR_CHARS, 0]


# ---- writing ---------------------------------------------------------------------------------------------------------


def counted(ledger, statement="COMMIT"):
    """Return a list that gets an entry for each transaction."""
    seen = []
    ledger.db.set_trace_callback(lambda sql: seen.append(sql) if sql == statement else None)
    return seen


def test_what_waits_while_one_commit_is_syncing_shares_the_next(tmp_path, ledger):
    async def main():
        commits = counted(ledger)
        done = []

        async def one(request):
            attempt, intent = ledger.prepare_intent(request, "h", "m", 1)
            await ledger.write(intent, ledger.prepare_outcome(attempt, "answer", 200, "{}"))
            done.append(request)
            assert len(rows(tmp_path / "out")) >= len(done), "it is on the disk when write() returns"

        await asyncio.gather(*(one(i) for i in range(50)))
        assert 1 <= len(commits) <= 3
        for i in range(50, 55):
            await one(i)
        assert 6 <= len(commits) <= 8 and len(done) == 55

    asyncio.run(main())
    assert ledger.compute_totals().answers == 55 and ledger.writer is None


def test_writes_of_different_moments_share_a_commit_too(ledger, monkeypatch):
    synced, commit = threading.Event(), ledger.commit
    monkeypatch.setattr(ledger, "commit", lambda statements: (synced.wait(10), commit(statements)))

    async def main():
        commits, tasks = counted(ledger), []
        for i in range(10):
            tasks.append(asyncio.create_task(ledger.write(ledger.prepare_intent(i, "h", "m", 1)[1])))
            await asyncio.sleep(0.005)
        assert not any(task.done() for task in tasks)
        synced.set()
        await asyncio.gather(*tasks)
        assert len(commits) == 2

    asyncio.run(main())
    assert ledger.compute_totals().attempts == 10


def test_a_write_is_whole_or_not_at_all(tmp_path, ledger):
    attempt, intent = ledger.prepare_intent(1, "h", "m", 1)
    with pytest.raises(Failure, match="could not be written"):
        ledger.commit([intent, intent])
    assert rows(tmp_path / "out", "sent") == []
    with pytest.raises(Failure):  # of no attempt
        ledger.commit([ledger.prepare_outcome(attempt, "answer", 200, "{}")])
    ledger.commit([intent])
    assert len(rows(tmp_path / "out", "sent")) == 1


@pytest.mark.parametrize("values, error", [((2**70,), OverflowError), (("\ud800",), UnicodeEncodeError)])
def test_an_error_that_is_not_of_the_database_leaves_no_transaction_open(ledger, values, error):
    with pytest.raises(error):
        ledger.commit([("setting", ("a", "1")), ("setting", ("b", *values))])
    assert not ledger.db.in_transaction and ledger.read_settings() == {}
    ledger.write_settings(c=1)
    assert ledger.read_settings() == {"c": 1}


def test_a_full_disk_is_told_to_everyone_who_waits_and_the_ledger_goes_on(tmp_path, ledger):
    async def main():
        add(ledger, 0, "answer", body="before")
        pages = ledger.db.execute("PRAGMA page_count").fetchone()[0]
        ledger.db.execute(f"PRAGMA max_page_count = {pages + 10}")
        attempts = [add(ledger, i) for i in range(1, 9)]
        writes = [ledger.write(ledger.prepare_outcome(attempt, "answer", 200, "x" * 200_000)) for attempt in attempts]
        errors = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(error) for error in errors] == [Failure] * 8
        assert all("full" in str(error) and "free some space" in str(error) for error in errors)
        assert [entry.body for entry in ledger.read_outcomes()] == ["before"] and not ledger.db.in_transaction
        await ledger.write(ledger.prepare_outcome(attempts[0], "answer", 200, "small"))
        ledger.db.execute("PRAGMA max_page_count = 1000000")
        await asyncio.gather(
            *(ledger.write(ledger.prepare_outcome(a, "answer", 200, "x" * 200_000)) for a in attempts[1:])
        )

    asyncio.run(main())
    assert ledger.compute_totals().answers == 9 and ledger.compute_totals().uncertain == 0


FULL = """
import resource, signal, sys
from data_gen.base.cli import Failure
from data_gen.api.ledger import Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(sys.argv[1])
number, intent = ledger.prepare_intent(0, "h", "m", 1)
ledger.commit([intent])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
written = 0
for request in range(1, 100):
    number, intent = ledger.prepare_intent(request, "h", "m", 1)
    try:
        ledger.commit([intent, ledger.prepare_outcome(number, "answer", 200, "x" * 20_000)])
        written += 1
    except Failure as error:
        print(error)
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
number, intent = ledger.prepare_intent(1000, "h", "m", 1)
ledger.commit([intent, ledger.prepare_outcome(number, "answer", 200, "after")])
print(written)
"""


def test_a_file_that_may_not_grow_any_more(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, written = done.stdout.splitlines()
    assert "could not be written" in error and 2 < int(written) < 20
    ledger = Ledger(tmp_path)
    bodies = [entry.body for entry in ledger.read_outcomes()]
    assert bodies == ["x" * 20_000] * int(written) + ["after"]
    ledger.close()


def test_threads_that_commit_at_once_disturb_nobody(ledger):
    """Half of the threads fail, and each rolls back only its own transaction."""
    failed, wrong = [], []

    def work(thread):
        for i in range(40):
            name = f"{thread}.{i}"
            put = ("batch", (name, 0.0, 1, 1, 1))
            try:
                ledger.commit([put, put] if i % 2 else [put, ("setting", (name, "2"))])
            except Failure as error:
                failed.append(name)
                wrong.extend([str(error)] * ("UNIQUE" not in str(error)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and len(failed) == 80
    assert ledger.read_settings() == {f"{n}.{i}": 2 for n in range(4) for i in range(0, 40, 2)}


def test_a_commit_beside_a_write(ledger):
    async def main():
        writes = [asyncio.create_task(ledger.write(ledger.prepare_intent(i, "h", "m", 1)[1])) for i in range(20)]
        await asyncio.sleep(0)
        for i in range(10):
            ledger.write_settings(**{f"s{i}": i})
            await asyncio.sleep(0)
        await asyncio.gather(*writes)

    asyncio.run(main())
    assert ledger.compute_totals().attempts == 20 and len(ledger.read_settings()) == 10


def test_one_who_stops_waiting_takes_nothing_from_the_others(ledger):
    async def main():
        tasks = [asyncio.create_task(ledger.write(ledger.prepare_intent(i, "h", "m", 1)[1])) for i in range(6)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(value) for value in found].count(asyncio.CancelledError) == 1

    asyncio.run(main())
    assert ledger.compute_totals().attempts == 6


def test_settings_are_json(tmp_path, ledger):
    ledger.write_settings(a={"b": 1.5}, c=None)
    assert {name: json.loads(value) for name, value in rows(tmp_path / "out", "setting")} == {
        "a": {"b": 1.5},
        "c": None,
    }


def test_a_folder_that_is_read_only_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be written to; pass another folder"):
        Ledger(tmp_path / "out")

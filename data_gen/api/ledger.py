"""The write-ahead ledger: what was asked, before it is sent, and what came back, before anyone looks at it.

One SQLite database in WAL mode with synchronous=FULL: a commit is on the disk before it returns, a torn one is no
commit, whatever kills the process or the machine. Rows are added and never changed.

    setting   what shapes requests, told once
    sent      attempt -> request, hash of its body, the most that it can cost
    received  attempt -> kind, status, raw body, cost

A request is the number that its prompt is drawn from; an attempt is one try at it. kind is "answer" (the request is
done), "refused" (done too: the server will not answer this one), "failed" (nothing was billed) or "lost" (no whole
answer came, though one may have been billed). An attempt with no line in received was in flight when the process ended:
it counts as lost.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_gen.base.cli import DataError, Failure, UsageError

NAME = "ledger.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (
  attempt INTEGER PRIMARY KEY, request INTEGER NOT NULL, body_sha256 TEXT NOT NULL, model TEXT NOT NULL, batch TEXT,
  reserved INTEGER NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS received (
  attempt INTEGER PRIMARY KEY REFERENCES sent, at REAL NOT NULL, kind TEXT NOT NULL, status INTEGER, body TEXT,
  input_tokens INTEGER, output_tokens INTEGER, cost INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS sent_request ON sent (request);
CREATE TABLE IF NOT EXISTS batch (
  name TEXT PRIMARY KEY, at REAL NOT NULL, tokens INTEGER NOT NULL, price_in INTEGER NOT NULL,
  price_out INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS batch_event (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL REFERENCES batch, at REAL NOT NULL, event TEXT NOT NULL, value TEXT);
"""
DONE = ("answer", "refused")
ERROR_CHARS = 4000  # of the body of a failed attempt


@dataclass(frozen=True)
class Entry:
    """The outcome of a request that is done."""

    request: int
    attempt: int
    kind: str
    body: str
    body_sha256: str
    model: str
    cost: int  # picodollars


@dataclass(frozen=True)
class Totals:
    """Sums over the ledger. Money in picodollars."""

    attempts: int
    answers: int
    spent: int  # by the usage that answers told, or the most that they can have cost
    uncertain: int  # the most that lost attempts and those in flight can have cost
    input_tokens: int
    output_tokens: int


class Ledger:
    """An open ledger; one process at a time. create=False wants one that is there.

    Raises UsageError where another process holds it or none is there, DataError where the file is no ledger."""

    def __init__(self, folder, create=True):
        folder = Path(folder)
        self.path = folder / NAME
        if not create and not self.path.exists():
            raise UsageError(f"{self.path} is not there; wanted the folder of an earlier run")
        if create:
            make_folder(folder)
        try:
            self.lock = open(folder / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{folder} cannot be written to: {error}") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.close()
            raise UsageError(f"another process is at work in {folder}; wait for it or pass another --out") from error
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.execute("PRAGMA foreign_keys=ON")
            self.db.executescript(SCHEMA)
            with contextlib.closing(sqlite3.connect(":memory:")) as ours:
                ours.executescript(SCHEMA)
                if tables(self.db) != tables(ours):
                    raise sqlite3.DatabaseError("its tables are of another version")
            self.next_attempt = 1 + (self.db.execute("SELECT max(attempt) FROM sent").fetchone()[0] or 0)
        except sqlite3.DatabaseError as error:
            self.lock.close()
            raise DataError(f"{self.path} is not a ledger ({error}); move it away or pass another --out") from error
        self.turn, self.pending, self.writer = threading.Lock(), [], None

    def close(self):
        self.db.close()
        self.lock.close()

    # ---- reading -------------------------------------------------------------------------------------------------

    def settings(self) -> dict:
        return {name: json.loads(value) for name, value in self.db.execute("SELECT name, value FROM setting")}

    def done(self) -> Iterator[Entry]:
        """The outcomes of all requests that are done, by number."""
        rows = self.db.execute(
            "SELECT request, attempt, kind, body, body_sha256, model, cost FROM received JOIN sent USING (attempt)"
            " WHERE kind IN ('answer', 'refused') ORDER BY request, attempt"
        )
        return (Entry(*row) for row in rows)

    def totals(self) -> Totals:
        attempts, uncertain = self.db.execute(
            "SELECT count(*), coalesce(sum(reserved) FILTER (WHERE kind IS NULL OR kind = 'lost'), 0)"
            " FROM sent LEFT JOIN received USING (attempt)"
        ).fetchone()
        answers, spent, *tokens = self.db.execute(
            "SELECT count(*) FILTER (WHERE kind = 'answer'), coalesce(sum(cost), 0),"
            " coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM received"
        ).fetchone()
        return Totals(attempts, answers, spent, uncertain, *tokens)

    def failures(self, request) -> int:
        """Attempts of a request that the server answered, but not with a completion."""
        sql = (
            "SELECT count(*) FROM received JOIN sent USING (attempt)"
            " WHERE request = ? AND kind <> 'answer' AND status IS NOT NULL"
        )
        return self.db.execute(sql, (request,)).fetchone()[0]

    def unended_batches(self) -> list:
        """(name, id or None, prompt tokens, picodollars a token in and out) of the batches without an "ended" event, in
        the order of their making."""
        return self.db.execute(
            "SELECT name, (SELECT value FROM batch_event e WHERE e.name = b.name AND event = 'created'),"
            " tokens, price_in, price_out FROM batch b"
            " WHERE NOT EXISTS (SELECT 1 FROM batch_event e WHERE e.name = b.name AND event = 'ended') ORDER BY at"
        ).fetchall()

    def unanswered(self, batch) -> list:
        """(attempt, request, hash of its body, model, reserved) of a batch's attempts that have no outcome."""
        return self.db.execute(
            "SELECT attempt, request, body_sha256, model, reserved FROM sent WHERE batch = ?"
            " AND attempt NOT IN (SELECT attempt FROM received) ORDER BY attempt",
            (batch,),
        ).fetchall()

    # ---- writing -------------------------------------------------------------------------------------------------

    def commit(self, statements):
        """Several (sql, values) as one synced transaction. Raises Failure where the disk will not take it."""
        with self.turn:  # to the end of the roll-back, which would else end another thread's transaction
            try:
                self.db.execute("BEGIN IMMEDIATE")
                for sql, values in statements:
                    self.db.execute(sql, values)
                self.db.execute("COMMIT")
            except BaseException as error:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                if not isinstance(error, sqlite3.Error):
                    raise
                raise Failure(
                    f"{self.path} could not be written: {error}; what it holds is whole, free some space"
                ) from error

    def set(self, **settings):
        put = "INSERT OR REPLACE INTO setting VALUES (?, ?)"
        self.commit([(put, (name, json.dumps(value))) for name, value in settings.items()])

    def intent(self, request, body_sha256, model, reserved, batch=None):
        """A new attempt's number, and the statement that records it."""
        attempt, self.next_attempt = self.next_attempt, self.next_attempt + 1
        values = (attempt, request, body_sha256, model, batch, reserved, time.time())
        return attempt, ("INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def outcome(self, attempt, kind, status, body, usage=(None, None), cost=0):
        """The statement that records what came back."""
        body = body if kind in DONE else (body or "")[:ERROR_CHARS]
        values = (attempt, time.time(), kind, status, storable(body), *usage, cost)
        return "INSERT INTO received VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values

    def plan(self, batch, tokens, price_in, price_out):
        """The statement that records a batch before it is sent. Prices in picodollars a token."""
        return "INSERT INTO batch VALUES (?, ?, ?, ?, ?)", (batch, time.time(), tokens, price_in, price_out)

    def event(self, batch, event, value):
        """The statement that records what became of a batch: "created" with its id, "ended" with its status."""
        values = (batch, time.time(), event, value)
        return "INSERT INTO batch_event (name, at, event, value) VALUES (?, ?, ?, ?)", values

    async def write(self, *statements):
        """Returns when they are on the disk. What comes while one commit is syncing shares the next."""
        done = asyncio.get_running_loop().create_future()
        self.pending.append((statements, done))
        if self.writer is None:
            self.writer = asyncio.get_running_loop().create_task(self._drain())
        await done

    async def flush(self):
        """Returns when all that was given to write() is on the disk, or could not be written."""
        while self.writer:
            await self.writer

    async def _drain(self):
        while self.pending:
            group, self.pending = self.pending, []
            try:
                await asyncio.to_thread(self.commit, [s for statements, _ in group for s in statements])
            except BaseException as error:
                for _, done in group:
                    if not done.done():
                        done.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            else:
                for _, done in group:
                    if not done.done():
                        done.set_result(None)
        self.writer = None


def tables(db) -> set:
    return set(db.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out {folder} cannot be written to; pass another folder")


def storable(text):
    """SQLite's text is UTF-8: a lone surrogate becomes a question mark."""
    return None if text is None else text.encode("utf-8", "replace").decode()

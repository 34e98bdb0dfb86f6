"""The write-ahead ledger: every request before it is sent, and every answer before it is parsed.

The ledger is one SQLite database in WAL mode with synchronous=FULL. A commit is on the disk before it returns, and a
torn one is no commit, whatever kills the process or the machine. Rows are added and never changed.

    setting   settings that decide the requests
    sent      attempt -> request, hash of its body, the most that it can cost
    received  attempt -> kind, status, raw body, cost

A request is the number from which its prompt is drawn; an attempt is one try at it. kind is "answer" (the request is
done), "refused" (also done: the server will not answer it), "failed" (nothing was billed) or "lost" (no whole answer
came, but one may have been billed). An attempt without a line in received was in flight when the process ended, and
counts as lost.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from data_gen.base.cli import DataError, Failure, UsageError

Statement: TypeAlias = tuple[str, tuple[Any, ...]]  # SQL and its values
Usage: TypeAlias = tuple[int | None, int | None]  # input and output tokens

LEDGER_NAME = "ledger.sqlite"
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
DONE = ("answer", "refused")  # kinds after which a request is done
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
    spent: int  # by the usage in the answers; an answer without it counts as the most that it can cost
    uncertain: int  # the most that attempts lost or in flight can have cost
    input_tokens: int
    output_tokens: int


class Ledger:
    """An open ledger, held by one process at a time. With create=False it must exist.

    Raise UsageError if another process holds it or it does not exist, DataError if the file is no ledger.
    """

    def __init__(self, folder: str | Path, create: bool = True):
        folder = Path(folder)
        self.path = folder / LEDGER_NAME
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
                if read_schema(self.db) != read_schema(ours):
                    raise sqlite3.DatabaseError("its tables are of another version")
            self.next_attempt = 1 + (self.db.execute("SELECT max(attempt) FROM sent").fetchone()[0] or 0)
        except sqlite3.DatabaseError as error:
            self.lock.close()
            raise DataError(f"{self.path} is not a ledger ({error}); move it away or pass another --out") from error
        self.commit_lock = threading.Lock()
        self.pending: list[tuple[tuple[Statement, ...], asyncio.Future[None]]] = []
        self.writer: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close the database and let another process have it."""
        self.db.close()
        self.lock.close()

    # ---- reading -------------------------------------------------------------------------------------------------

    def read_settings(self) -> dict[str, Any]:
        """Return the settings that were written."""
        return {name: json.loads(value) for name, value in self.db.execute("SELECT name, value FROM setting")}

    def read_outcomes(self) -> Iterator[Entry]:
        """Return the outcomes of all requests that are done, in the order of their numbers."""
        rows = self.db.execute(
            "SELECT request, attempt, kind, body, body_sha256, model, cost FROM received JOIN sent USING (attempt)"
            " WHERE kind IN ('answer', 'refused') ORDER BY request, attempt"
        )
        return (Entry(*row) for row in rows)

    def compute_totals(self) -> Totals:
        """Return the sums over the ledger."""
        attempts, uncertain = self.db.execute(
            "SELECT count(*), coalesce(sum(reserved) FILTER (WHERE kind IS NULL OR kind = 'lost'), 0)"
            " FROM sent LEFT JOIN received USING (attempt)"
        ).fetchone()
        answers, spent, *tokens = self.db.execute(
            "SELECT count(*) FILTER (WHERE kind = 'answer'), coalesce(sum(cost), 0),"
            " coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM received"
        ).fetchone()
        return Totals(attempts, answers, spent, uncertain, *tokens)

    def count_failures(self, request: int) -> int:
        """Return the number of attempts of a request that the server answered without a completion."""
        sql = (
            "SELECT count(*) FROM received JOIN sent USING (attempt)"
            " WHERE request = ? AND kind <> 'answer' AND status IS NOT NULL"
        )
        return self.db.execute(sql, (request,)).fetchone()[0]

    def read_open_batches(self) -> list[tuple[str, str | None, int, int, int]]:
        """Return the batches without an "ended" event, in the order of their making.

        Each is (name, id or None, prompt tokens, picodollars per input token, picodollars per output token).
        """
        return self.db.execute(
            "SELECT name, (SELECT value FROM batch_event e WHERE e.name = b.name AND event = 'created'),"
            " tokens, price_in, price_out FROM batch b"
            " WHERE NOT EXISTS (SELECT 1 FROM batch_event e WHERE e.name = b.name AND event = 'ended') ORDER BY at"
        ).fetchall()

    def read_unanswered(self, batch: str) -> list[tuple[int, int, str, str, int]]:
        """Return (attempt, request, hash of its body, model, reserved) of a batch's attempts without an outcome."""
        return self.db.execute(
            "SELECT attempt, request, body_sha256, model, reserved FROM sent WHERE batch = ?"
            " AND attempt NOT IN (SELECT attempt FROM received) ORDER BY attempt",
            (batch,),
        ).fetchall()

    # ---- writing -------------------------------------------------------------------------------------------------

    def commit(self, statements: Iterable[Statement]) -> None:
        """Commit statements as one synced transaction. Raise Failure if the disk will not take it."""
        with self.commit_lock:  # held during the roll-back too, or it could end another thread's transaction
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

    def write_settings(self, **settings: Any) -> None:
        """Write settings as JSON, each in place of an earlier one."""
        insert = "INSERT OR REPLACE INTO setting VALUES (?, ?)"
        self.commit([(insert, (name, json.dumps(value))) for name, value in settings.items()])

    def prepare_intent(
        self, request: int, body_sha256: str, model: str, reserved: int, batch: str | None = None
    ) -> tuple[int, Statement]:
        """Return a new attempt's number, and the statement that records it."""
        attempt, self.next_attempt = self.next_attempt, self.next_attempt + 1
        values = (attempt, request, body_sha256, model, batch, reserved, time.time())
        return attempt, ("INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def prepare_outcome(
        self,
        attempt: int,
        kind: str,
        status: int | None,
        body: str | None,
        usage: Usage = (None, None),
        cost: int = 0,
    ) -> Statement:
        """Return the statement that records the outcome of an attempt."""
        body = body if kind in DONE else (body or "")[:ERROR_CHARS]
        values = (attempt, time.time(), kind, status, make_storable(body), *usage, cost)
        return "INSERT INTO received VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values

    def prepare_batch(self, batch: str, tokens: int, price_in: int, price_out: int) -> Statement:
        """Return the statement that records a batch before it is sent. Prices are picodollars per token."""
        return "INSERT INTO batch VALUES (?, ?, ?, ?, ?)", (batch, time.time(), tokens, price_in, price_out)

    def prepare_batch_event(self, batch: str, event: str, value: str) -> Statement:
        """Return the statement that records an event of a batch: "created" with its id, "ended" with its status."""
        values = (batch, time.time(), event, value)
        return "INSERT INTO batch_event (name, at, event, value) VALUES (?, ?, ?, ?)", values

    async def write(self, *statements: Statement) -> None:
        """Return when the statements are on the disk. Calls during a commit share the next one."""
        done = asyncio.get_running_loop().create_future()
        self.pending.append((statements, done))
        if self.writer is None:
            self.writer = asyncio.get_running_loop().create_task(self._drain())
        await done

    async def flush(self) -> None:
        """Return when everything given to write() is on the disk or has failed."""
        while self.writer:
            await self.writer

    async def _drain(self) -> None:
        """Commit what is pending until nothing is."""
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


def read_schema(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return (name, sql) of the tables and indices of a database."""
    return set(db.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))


def make_folder(folder: Path) -> None:
    """Make the folder of --out. Raise UsageError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out {folder} cannot be written to; pass another folder")


def make_storable(text: str | None) -> str | None:
    """Return a text as SQLite can hold it, in UTF-8: a question mark replaces a lone surrogate."""
    return None if text is None else text.encode("utf-8", "replace").decode()

"""The write-ahead ledger: every request before it is sent, and every answer before it is parsed.

The ledger is one SQLite database in WAL mode with synchronous=FULL. A commit is on the disk before it returns, and a
torn one is no commit, whatever kills the process or the machine. Rows are added and never changed.

    setting   settings that decide the requests
    sent      attempt -> request, hash of its body, the most that it can cost
    received  attempt -> kind, status, raw body, cost
    seal      a hash of each row of the others, checked when a ledger is opened

A request is the number from which its prompt is drawn; an attempt is one try at it. kind is "answer" (the request is
done), "refused" (also done: the server will not answer it), "failed" (it cost what its body told, mostly nothing) or
"lost" (no whole answer came, but one may have been billed). An attempt without a line in received was in flight when
the process ended, and counts as lost.
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

from data_gen.api.seals import INSERT as INSERT_SEAL
from data_gen.api.seals import check_seals, make_seal, seal_all
from data_gen.base.cli import DataError, Failure, UsageError

Statement: TypeAlias = tuple[str, tuple[Any, ...]]  # a table and the values of a new row
Usage: TypeAlias = tuple[int | None, int | None]  # input and output tokens

LEDGER_NAME = "ledger.sqlite"
# What reading a damaged file raises: sqlite3 itself falls over an error's text that quotes bytes that are no UTF-8.
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
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
CREATE TABLE IF NOT EXISTS seal (place TEXT PRIMARY KEY, hash BLOB NOT NULL) WITHOUT ROWID;
"""
INSERTS = {
    "setting": "INSERT OR REPLACE INTO setting VALUES (?, ?)",
    "sent": "INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?, ?)",
    "received": "INSERT INTO received VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    "batch": "INSERT INTO batch VALUES (?, ?, ?, ?, ?)",
    "batch_event": "INSERT INTO batch_event (name, at, event, value) VALUES (?, ?, ?, ?)",
}
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

    Raise UsageError if another process holds it or it does not exist, DataError if the file is no ledger or a row of it
    is damaged.
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
            prepare_tables(self.db)
        except DAMAGE as error:
            self.lock.close()
            raise DataError(f"{self.path} is not a ledger ({error}); move it away or pass another --out") from error
        try:
            has_seals = self.db.execute("SELECT count(*) FROM seal").fetchone() != (0,)
            check_seals(self.db) if has_seals else seal_all(self.db)  # one from before there were seals has none
            self.next_attempt = 1 + (self.db.execute("SELECT max(attempt) FROM sent").fetchone()[0] or 0)
        except DAMAGE as error:
            self.db.close()
            self.lock.close()
            raise self.make_damage_error(error) from error
        self.commit_lock = threading.Lock()
        self.pending: list[tuple[tuple[Statement, ...], asyncio.Future[None]]] = []
        self.writer: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close the database and let another process have it."""
        self.db.close()
        self.lock.close()

    def make_damage_error(self, error: Exception) -> DataError:
        """Return the error for a ledger whose content is damaged."""
        return DataError(f"{self.path} is damaged: {error}; put back a copy of it, or pass another --out")

    # ---- reading -------------------------------------------------------------------------------------------------

    def query(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query. Raise DataError where the file cannot be read."""
        try:
            yield from self.db.execute(sql, values)
        except DAMAGE as error:
            raise self.make_damage_error(error) from error

    def read_settings(self) -> dict[str, Any]:
        """Return the settings that were written."""
        return {name: json.loads(value) for name, value in self.query("SELECT name, value FROM setting")}

    def read_outcomes(self) -> Iterator[Entry]:
        """Return the outcomes of all requests that are done, in the order of their numbers."""
        rows = self.query(
            "SELECT request, attempt, kind, body, body_sha256, model, cost FROM received JOIN sent USING (attempt)"
            " WHERE kind IN ('answer', 'refused') ORDER BY request, attempt"
        )
        return (Entry(*row) for row in rows)

    def list_missing(self, last: int | None = None) -> list[int]:
        """Return the requests without an outcome up to this one, by default up to the last that was sent."""
        sql = f"SELECT request FROM received JOIN sent USING (attempt) WHERE kind IN {DONE}"
        done = {request for (request,) in self.query(sql)}
        if last is None:
            last = next(self.query("SELECT coalesce(max(request), -1) FROM sent"))[0]
        return [number for number in range(last + 1) if number not in done]

    def compute_totals(self) -> Totals:
        """Return the sums over the ledger."""
        ((attempts, uncertain),) = self.query(
            "SELECT count(*), coalesce(sum(reserved) FILTER (WHERE kind IS NULL OR kind = 'lost'), 0)"
            " FROM sent LEFT JOIN received USING (attempt)"
        )
        ((answers, spent, *tokens),) = self.query(
            "SELECT count(*) FILTER (WHERE kind = 'answer'), coalesce(sum(cost), 0),"
            " coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM received"
        )
        return Totals(attempts, answers, spent, uncertain, *tokens)

    def count_failures(self, request: int) -> int:
        """Return the number of attempts of a request that the server answered without a completion."""
        sql = (
            "SELECT count(*) FROM received JOIN sent USING (attempt)"
            " WHERE request = ? AND kind <> 'answer' AND status IS NOT NULL"
        )
        return next(self.query(sql, request))[0]

    def read_open_batches(self) -> list[tuple[str, str | None, int, int, int]]:
        """Return the batches without an "ended" event, in the order of their making.

        Each is (name, id or None, prompt tokens, picodollars per input token, picodollars per output token).
        """
        rows = self.query(
            "SELECT name, (SELECT value FROM batch_event e WHERE e.name = b.name AND event = 'created'),"
            " tokens, price_in, price_out FROM batch b"
            " WHERE NOT EXISTS (SELECT 1 FROM batch_event e WHERE e.name = b.name AND event = 'ended') ORDER BY at"
        )
        return [(name, id, tokens, price_in, price_out) for name, id, tokens, price_in, price_out in rows]

    def read_unanswered(self, batch: str) -> list[tuple[int, int, str, str, int]]:
        """Return (attempt, request, hash of its body, model, reserved) of a batch's attempts without an outcome."""
        rows = self.query(
            "SELECT attempt, request, body_sha256, model, reserved FROM sent WHERE batch = ?"
            " AND attempt NOT IN (SELECT attempt FROM received) ORDER BY attempt",
            batch,
        )
        return [(attempt, request, sha256, model, most) for attempt, request, sha256, model, most in rows]

    # ---- writing -------------------------------------------------------------------------------------------------

    def commit(self, statements: Iterable[Statement]) -> None:
        """Commit statements as one synced transaction. Raise Failure if the disk will not take it."""
        with self.commit_lock:  # held during the roll-back too, or it could end another thread's transaction
            try:
                self.db.execute("BEGIN IMMEDIATE")
                for table, values in statements:
                    added = self.db.execute(INSERTS[table], values)
                    row = (added.lastrowid, *values) if table == "batch_event" else values
                    self.db.execute(INSERT_SEAL, make_seal(table, row))
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
        self.commit([("setting", (name, json.dumps(value))) for name, value in settings.items()])

    def prepare_intent(
        self, request: int, body_sha256: str, model: str, reserved: int, batch: str | None = None
    ) -> tuple[int, Statement]:
        """Return a new attempt's number, and the statement that records it."""
        attempt, self.next_attempt = self.next_attempt, self.next_attempt + 1
        values = (attempt, request, body_sha256, model, batch, reserved, time.time())
        return attempt, ("sent", values)

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
        return "received", values

    def prepare_batch(self, batch: str, tokens: int, price_in: int, price_out: int) -> Statement:
        """Return the statement that records a batch before it is sent. Prices are picodollars per token."""
        return "batch", (batch, time.time(), tokens, price_in, price_out)

    def prepare_batch_event(self, batch: str, event: str, value: str) -> Statement:
        """Return the statement that records an event of a batch: "created" with its id, "ended" with its status."""
        return "batch_event", (batch, time.time(), event, value)

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


def prepare_tables(db: sqlite3.Connection) -> None:
    """Set a database up as a ledger. Raise DatabaseError if it has other tables."""
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    with contextlib.closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(SCHEMA)
        known = read_schema(ours)
    db.executescript(SCHEMA)
    if read_schema(db) != known:
        raise sqlite3.DatabaseError("its tables are of another version")


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

"""Seals: a hash of every row of a ledger in a table of its own, so that no damaged or lost row goes unseen.

SQLite has no checksums of the pages of a database. A row and its seal lie in different pages, written by one commit.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import Any

from data_gen.api.answers import is_completion
from data_gen.api.errors import read_json

KINDS = ("answer", "refused", "failed", "lost")  # of an outcome, as data_gen.api.ledger defines them
PARTS = {  # of each table: the name of its key, and what a row is
    "setting": ("setting", "its value"),
    "sent": ("attempt", "its request"),
    "received": ("attempt", "its answer"),
    "batch": ("batch", "its record"),
    "batch_event": ("batch event", "its record"),
}
INSERT = "INSERT OR REPLACE INTO seal VALUES (?, ?)"
SHOWN = 5  # of the damaged rows that are named


def make_seal(table: str, values: tuple[Any, ...]) -> tuple[str, bytes]:
    """Return the row of seal for a row of another table, whose first value is its key."""
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        data = value if isinstance(value, bytes) else (value if isinstance(value, str) else repr(value)).encode()
        found.update(b"%s%d:" % (b"t" if isinstance(value, str | bytes) else b"n", len(data)))
        found.update(data)
    return f"{table} {to_text(values[0])}", found.digest()


def to_text(key: Any) -> str:
    """Return the key of a row as text."""
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


def read_all(db: sqlite3.Connection) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield (table, row) of all rows that have seals, with texts as bytes, which any damage leaves readable."""
    db.text_factory = bytes
    try:
        for table in PARTS:
            for row in db.execute(f"SELECT * FROM {table}"):
                yield table, row
    finally:
        db.text_factory = str


def seal_all(db: sqlite3.Connection) -> None:
    """Seal every row of a ledger from before there were seals. Raise DatabaseError for one that cannot be right."""
    check_pages(db)
    rows = list(read_all(db))
    sent = {row[0] for table, row in rows if table == "sent"}
    problems = [describe(table, row[0], "is damaged") for table, row in rows if not is_plausible(table, row, sent)]
    raise_problems(problems)
    db.execute("BEGIN IMMEDIATE")
    db.executemany(INSERT, [make_seal(table, row) for table, row in rows])
    db.execute("COMMIT")


def is_plausible(table: str, row: tuple[Any, ...], sent: set[Any]) -> bool:
    """Return whether a row without a seal can be as it was written. sent are the attempts of requests."""
    if table == "setting":
        return read_json(to_text(row[1])) is not None
    if table == "sent":
        attempt, request, *_, reserved, _ = row
        return all(type(n) is int and n >= 0 for n in (attempt, request, reserved))
    if table == "received":
        attempt, _, kind, _, body, _, _, cost = row
        if attempt not in sent or to_text(kind) not in KINDS or type(cost) is not int or cost < 0:
            return False
        return to_text(kind) != "answer" or is_completion(read_json(to_text(body)))
    return True


def check_seals(db: sqlite3.Connection) -> None:
    """Raise DatabaseError, which names them, if rows are not as they were written, are gone, or have no seal."""
    check_pages(db)
    seals, problems = dict(db.execute("SELECT place, hash FROM seal")), []
    for table, row in read_all(db):
        place, seal = make_seal(table, row)
        if seals.pop(place, None) != seal:
            problems.append(describe(table, row[0], "is not as it was written"))
    for place in seals:
        table, _, key = place.partition(" ")
        problems.append(describe(table, key, "is gone"))
    raise_problems(problems)


def check_pages(db: sqlite3.Connection) -> None:
    """Raise DatabaseError if SQLite finds pages of the file damaged."""
    found = [str(line) for (line,) in db.execute("PRAGMA integrity_check(3)")]
    if found != ["ok"]:
        raise sqlite3.DatabaseError("; ".join(" ".join(line.split()) for line in found))


def describe(table: str, key: Any, what: str) -> str:
    """Return a sentence about a row."""
    name, part = PARTS.get(table, (table, "its record"))
    return f"{name} {to_text(key)[:80]}: {part} {what}"


def raise_problems(problems: list[str]) -> None:
    """Raise DatabaseError with the first of the problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise sqlite3.DatabaseError("; ".join(problems[:SHOWN]) + more)

"""Damage to a ledger is named and never passed over; ledgers from before there were seals are read."""

import hashlib
import random
import re
import shutil
import sqlite3

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen import generate as module
from data_gen.api.ledger import LEDGER_NAME, Ledger
from data_gen.api.seals import make_seal
from data_gen.base.cli import DataError, run_for_exit_code
from tests.helpers.openai_server import Server

OUTPUTS = ("dataset.json", "dataset.jsonl", "chat.jsonl", "rejected.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run of 60 rows with failures, refusals and odd answers."""
    out, faults = tmp_path_factory.mktemp("run") / "out", {"500": 0.1, "content_policy_400": 0.1, "truncated": 0.2}
    with pytest.MonkeyPatch.context() as patch, Server(seed=3, items=5, faults=faults) as server:
        patch.setenv("OPENAI_API_KEY", "none")
        words = ["--base-url", server.base_url, "--model", "m", "--price-in", "1", "--price-out", "1", "--quiet"]
        more = ["--backoff", "0.01", "--rows", "60", "--tasks-per-request", "5", "--out", str(out)]
        assert run_for_exit_code(module.main, words + more) == 0
    return out


def replay(folder):
    """Return the exit code of a replay."""
    return run_for_exit_code(module.main, ["--out", str(folder), "--rows", "60", "--replay", "--quiet"])


def change(folder, *statements):
    """Change a ledger by SQL that knows nothing of seals."""
    db = sqlite3.connect(folder / LEDGER_NAME)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


@pytest.fixture
def copy(run, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(run / LEDGER_NAME, folder)
    return folder


def test_every_bit_flip_is_found_or_changes_nothing(run, tmp_path, capsys):
    whole, rng, codes = (run / LEDGER_NAME).read_bytes(), random.Random(7), []
    folder = tmp_path / "flipped"
    folder.mkdir()
    assert len(whole) > 50_000
    # Spread over the file; and the header with the first pages, where one bit decides about all.
    places = [*range(0, len(whole), len(whole) // 90), *(rng.randrange(9000) for _ in range(40))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        for path in folder.iterdir():
            path.unlink()
        (folder / LEDGER_NAME).write_bytes(damaged)
        code, said = replay(folder), capsys.readouterr().err
        codes.append(code)
        if code == 0:
            for name in OUTPUTS:
                assert (folder / name).read_bytes() == (run / name).read_bytes(), f"byte {place}: {name} differs"
        else:
            assert code == 3 and "error:" in said and LEDGER_NAME in said and "Traceback" not in said, (place, said)
    assert codes.count(3) > 40


ANSWER, ROW = "UPDATE received SET {} WHERE attempt = 3", "at, kind, status, body, input_tokens, output_tokens, cost"
DAMAGE = {  # SQL, and what is said
    "an answer": (ANSWER.format("body = replace(body, 'e', 'a')"), "attempt 3: its answer is not as"),
    "an answer that is no JSON": (ANSWER.format("body = 'x'"), "attempt 3: its answer is not as"),
    "text that is none": (ANSWER.format("body = CAST(x'ff' AS TEXT)"), "attempt 3: its answer"),
    "a kind": (ANSWER.format("kind = 'answes'"), "attempt 3: its answer is not as"),
    "money": (ANSWER.format("cost = cost + 1"), "attempt 3: its answer is not as"),
    "another attempt": (ANSWER.format("attempt = 99"), "attempt 3: its answer is gone"),
    "a lost answer": ("DELETE FROM received WHERE attempt = 3", "attempt 3: its answer is gone"),
    "another request": ("UPDATE sent SET request = 99 WHERE attempt = 3", "attempt 3: its request is not as"),
    "a lost request": ("DELETE FROM sent WHERE attempt = 3", "attempt 3: its request is gone"),
    "nobody's answer": (f"INSERT INTO received SELECT 99, {ROW} FROM received LIMIT 1", "attempt 99: its answer"),
    "a seal": ("UPDATE seal SET hash = x'00' WHERE place = 'received 3'", "attempt 3: its answer is not as"),
    "a setting": ("UPDATE setting SET value = '{' WHERE name = 'dialect'", "setting dialect: its value is not as"),
    "a new setting": ("INSERT INTO setting VALUES ('dialekt', '{}')", "setting dialekt: its value is not as"),
}  # fmt: skip


@pytest.mark.parametrize("sql, said", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_row_is_named(copy, capsys, sql, said):
    change(copy, sql)
    for _ in range(2):  # and the lock is free again
        assert replay(copy) == 3
        told = capsys.readouterr().err
        assert said in told and "is damaged" in told and "put back a copy" in told
        assert not (copy / "dataset.json").exists()


@pytest.mark.parametrize("text", [b"CREATE TABLE", b"received", b"attempt", b"request"])
def test_a_schema_that_is_no_utf8_is_damage(copy, capsys, text):
    """The text of sqlite's own error holds the damaged bytes then, which sqlite3 cannot decode."""
    whole = (copy / LEDGER_NAME).read_bytes()
    places = [found.start() for found in re.finditer(text, whole)][:8]
    for place in places:
        (copy / LEDGER_NAME).write_bytes(whole[: place + 1] + b"\xe5" + whole[place + 2 :])
        assert replay(copy) == 3
        told = capsys.readouterr().err
        assert told.startswith("error: ") and LEDGER_NAME in told and "Traceback" not in told


def test_a_damaged_index_is_found(copy, capsys):
    """Its pages hold no row, but rows are read by it."""
    db = sqlite3.connect(copy / LEDGER_NAME)
    ((page,),) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sent_request'")
    ((size,),) = db.execute("PRAGMA page_size")
    db.close()
    data = bytearray((copy / LEDGER_NAME).read_bytes())
    data[page * size - 1] ^= 1  # the number of an attempt
    (copy / LEDGER_NAME).write_bytes(data)
    assert replay(copy) == 3 and "sent_request" in capsys.readouterr().err


def test_many_damaged_rows_are_counted(copy, capsys):
    change(copy, "UPDATE received SET cost = 1")
    assert replay(copy) == 3
    assert "attempt 1: its answer" in (told := capsys.readouterr().err) and "attempt 9" not in told and " more;" in told


def forget_seals(folder):
    """Make a ledger one from before there were seals."""
    change(folder, "DROP TABLE seal")


def test_a_ledger_without_seals_is_read_and_sealed(run, copy, capsys):
    forget_seals(copy)
    assert replay(copy) == 0
    for name in OUTPUTS:
        assert (copy / name).read_bytes() == (run / name).read_bytes()
    change(copy, DAMAGE["an answer"][0])
    assert replay(copy) == 3 and "attempt 3: its answer is not as it was written" in capsys.readouterr().err


@pytest.mark.parametrize("sql, said", [
    (DAMAGE["an answer that is no JSON"][0], "attempt 3: its answer is damaged"),
    (DAMAGE["text that is none"][0], "attempt 3: its answer is damaged"),
    (DAMAGE["a kind"][0], "attempt 3: its answer is damaged"),
    (DAMAGE["a lost request"][0], "attempt 3: its answer is damaged"),
    (DAMAGE["a setting"][0], "setting dialect: its value is damaged"),
    ("UPDATE sent SET reserved = -1 WHERE attempt = 3", "attempt 3: its request is damaged"),
    ("UPDATE received SET cost = 'x' WHERE attempt = 3", "attempt 3: its answer is damaged"),
    ("UPDATE received SET cost = -1 WHERE attempt = 3", "attempt 3: its answer is damaged"),
])  # fmt: skip
def test_what_cannot_be_right_in_a_ledger_without_seals_is_named(copy, capsys, sql, said):
    change(copy, sql)
    forget_seals(copy)
    for _ in range(2):
        assert replay(copy) == 3
        assert said in capsys.readouterr().err


def test_a_process_that_died_between_making_seals_and_writing_them_costs_nothing(run, copy):
    change(copy, "DELETE FROM seal")
    assert replay(copy) == 0
    assert (copy / "dataset.json").read_bytes() == (run / "dataset.json").read_bytes()


def test_batches_and_their_events_are_sealed(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.commit([ledger.prepare_batch("b", 5, 7, 8), ledger.prepare_batch_event("b", "created", "id")])
    ledger.commit([ledger.prepare_batch_event("b", "ended", "completed")])
    ledger.close()
    Ledger(tmp_path).close()
    for sql, said in (
        ("UPDATE batch SET price_in = 6", "batch b: its record is not as"),
        ("UPDATE batch_event SET value = 'ie' WHERE id = 1", "batch event 1: its record is not as"),
        ("DELETE FROM batch_event WHERE id = 2", "batch event 2: its record is gone"),
    ):
        damaged = tmp_path / sql[-3:].strip()
        damaged.mkdir(exist_ok=True)
        shutil.copy(tmp_path / LEDGER_NAME, damaged)
        change(damaged, sql)
        with pytest.raises(DataError, match=said):
            Ledger(damaged)


def test_a_seal_is_what_it_was_in_ledgers_that_are_there():
    """BLAKE2b of 8 bytes over each value's kind, length and bytes, by hand."""
    written = b"n1:7" + b"t5:caf\xc3\xa9" + b"t3:\x00ab" + b"n4:None"
    wanted = hashlib.blake2b(written, digest_size=8).digest()
    assert make_seal("sent", (7, "caf\xe9", b"\x00ab", None)) == ("sent 7", wanted) and len(wanted) == 8

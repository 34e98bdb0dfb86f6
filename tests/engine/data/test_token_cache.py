"""Tokens cached on disk: what makes another entry, and what may happen to one."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.data import dataset as data
from engine.data import rows, token_cache
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import load_tokenizer
from engine.training import datasets
from engine.training.config import FinetuneConfig
from tests.helpers.forks import Started
from tests.helpers.run import environment, finetune
from tests.helpers.small_model import small_model

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


@pytest.fixture(scope="module")
def smol(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path):
    """Two files of 20 rows. The first has two bad ones too; in both a long question leaves its answer cut away."""
    made = [{"instruction": f"Say {i}.", "input": "in" * (i % 2), "output": "x " * i, "id": i + 1} for i in range(20)]
    made[3]["output"] = "long " * 99
    made[4]["instruction"] = "hidden " * 99
    broken = [*made[:10], {"instruction": 7}, {"output": ""}, *made[10:]]
    (tmp_path / "a.json").write_text(json.dumps(broken))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row | {"output": "b"}) for row in made))
    return [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]


def read(files, cache, tokenizer, said=None, **options):
    """The tables that a run gets, and whether from the cache."""
    options = {"skip_bad_rows": True, "max_length": 64, **options}
    config = FinetuneConfig(model="tiny", random_init=True, data=tuple(files), token_cache=str(cache), **options)
    tables, is_cached = datasets.read_tables(config, tokenizer, print if said is None else said.append)
    return *tables, is_cached


def entries(cache):
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def same(a, b):
    (table, skipped, unread), (other, other_skipped, other_unread) = a, b
    for one, two in ((table.select(), other.select()), (table.select([5, 7, 9]), other.select([5, 7, 9]))):
        for name in ("tokens", "is_target", "begins", "ends", "n_loss"):
            x, y = getattr(one, name), getattr(two, name)
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name
        assert tuple(one.sources) == tuple(two.sources) and one.counts == two.counts
        assert one.sha256() == two.sha256()
    assert [(bad.source, bad.reason) for bad in skipped] == [(bad.source, bad.reason) for bad in other_skipped]
    assert unread == other_unread == {"id": 40}


# ---- hits -----------------------------------------------------------------------------------------------------------


def test_the_second_start_neither_parses_nor_tokenises(files, cache, smol, monkeypatch):
    first, was_cached = read(files, cache, smol)
    assert not was_cached
    for module, name in (
        (rows, "parse_row"),
        (datasets, "read_rows"),
        (datasets, "encode_rows"),
        (type(smol), "encode_batch"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"called {name}"))
    second, is_cached = read(files, cache, smol)
    assert is_cached
    same(first, second)
    counts = second[0].select().counts
    assert (counts["rows"], counts["truncated"], counts["dropped"], len(second[1])) == (40, 7, 2, 2)
    assert isinstance(second[0].tokens.base, np.memmap) and not second[0].tokens.flags.writeable


def test_a_cached_dataset_is_the_one_without_a_cache(files, cache, smol):
    read(files, cache, smol)
    cached, (plain, _) = read(files, cache, smol)[0], read(files, "off", smol)
    same(plain, cached)
    assert len(entries(cache)) == 1


def test_rows_held_out_of_an_entry_are_those_of_hold_out(files, cache, smol):
    read(files, cache, smol)
    (table, *_), _ = read(files, cache, smol)
    parsed, _ = rows.read_rows([Path(file) for file in files], skip_bad_rows=True)
    wanted = data.hold_out(parsed, 0.3, 5)
    for numbers, part in zip(data.hold_out(range(len(table)), 0.3, 5), wanted, strict=True):
        got, want = table.select(numbers), data.encode_rows(part, smol, max_length=64).select()
        assert got.counts == want.counts and tuple(got.sources) == tuple(want.sources)
        assert got.sha256() == want.sha256()
        assert got.loss_tokens().tolist() == [want.is_target_of(i).sum() for i in range(len(want))]


def test_messages_name_the_files_of_this_run(files, cache, smol, tmp_path):
    read(files, cache, smol)
    moved = []
    for file in files:
        moved.append(shutil.copy(file, tmp_path / f"other-{Path(file).name}:3"))  # a colon in a name is no line
    (table, skipped, _), is_cached = read(moved, cache, smol)
    assert is_cached
    sources = table.select().sources
    text = Path(moved[0]).read_text()  # a list on one line
    columns = [text.index(start) + 1 for start in ('{"instruction": 7}', '{"output": ""}')]
    assert sources[0] == f"{moved[0]}:1:2" and sources[-1] == f"{moved[1]}:20"
    assert [bad.source for bad in skipped] == [f"{moved[0]}:1:{column}" for column in columns]


def test_a_run_says_that_its_data_was_cached_and_trains_on_the_same(rows_file, tmp_path):
    args = ["--model", small_model(), "--data", rows_file, "--max-steps", 1, "--global-batch-size", 4,
            "--eval-fraction", 0.2, "--token-cache", tmp_path / "cache"]  # fmt: skip
    first, second = (finetune(*args, "--out", tmp_path / name).stdout for name in "ab")
    line = next(line for line in first.splitlines() if line.startswith("data: "))
    assert line.replace("data:", "data (cached):") in second.splitlines()
    facts = [json.loads((tmp_path / name / "run.json").read_text())["facts"] for name in "ab"]
    assert facts[0] == facts[1]


# ---- what makes another entry ---------------------------------------------------------------------------------------


def append(path, text):
    Path(path).write_text(Path(path).read_text() + text)


class Other(Tokenizer):
    """A tokenizer that differs in one thing."""

    def __init__(self, tokenizer, **changes):
        self.__dict__ = tokenizer.__dict__ | changes
        self.encode_batch = tokenizer.encode_batch


MISSES = {
    "bytes of a file": lambda files, smol, patch: append(files[0], " "),
    "order of the files": lambda files, smol, patch: files.reverse(),
    "one file fewer": lambda files, smol, patch: files.pop(),
    "prompt style": lambda files, smol, patch: {"prompt_style": "chatml"},
    "max_length": lambda files, smol, patch: {"max_length": 63},
    "train_on_prompt": lambda files, smol, patch: {"train_on_prompt": True},
    "skip_bad_rows": lambda files, smol, patch: {"skip_bad_rows": False},
    "format": lambda files, smol, patch: patch.setattr(token_cache, "FORMAT", 0),
    "tokenizers": lambda files, smol, patch: patch.setattr(token_cache.tokenizers, "__version__", "0"),
    "sentencepiece": lambda files, smol, patch: patch.setattr(token_cache.sentencepiece, "__version__", "0"),
    "code": lambda files, smol, patch: patch.setattr(token_cache, "CODE", token_cache.CODE[1:]),
    "tokenizer's files": lambda files, smol, patch: Other(smol, files=smol.files | {"tokenizer.json": b""}),
    "eos": lambda files, smol, patch: Other(smol, eos_id=smol.eos_id + 1),
    "bos": lambda files, smol, patch: Other(smol, add_bos=not smol.add_bos),
    "specials": lambda files, smol, patch: Other(smol, special_ids=smol.special_ids | {"<|new|>": 5}),
    "pre-tokenizer": lambda files, smol, patch: Other(smol, _encode=lambda texts, follow: [[1] for _ in texts]),
}


@pytest.mark.parametrize("what", MISSES)
def test_whatever_decides_the_tokens_makes_another_entry(what, files, cache, smol, monkeypatch):
    if what == "skip_bad_rows":
        files = files[1:]
    read(files, cache, smol)
    assert read(files, cache, smol)[-1] is True
    changed = MISSES[what](files, smol, monkeypatch)
    tokenizer = changed if isinstance(changed, Other) else smol
    options = changed if isinstance(changed, dict) else {}
    assert read(files, cache, tokenizer, **options)[-1] is False
    assert read(files, cache, tokenizer, **options)[-1] is True and len(entries(cache)) == 2


def test_what_does_not_decide_them_does_not(files, cache, smol):
    read(files, cache, smol)
    assert read(files, cache, smol, seed=7, epochs=1, eval_fraction=0.2, global_batch_size=3)[-1] is True


def test_a_table_under_a_name_that_is_none_is_refused_though_its_bytes_are_cached(tmp_path, cache, smol):
    for name in ("rows.csv", "rows.txt"):
        (tmp_path / name).write_text("instruction,output\na,b\n")
    assert len(read([tmp_path / "rows.csv"], cache, smol)[0][0]) == 1 and len(entries(cache)) == 1
    with pytest.raises(DataError, match=r"rows.txt: got the byte b'i'"):
        read([tmp_path / "rows.txt"], cache, smol)


def test_evaluation_data_has_an_entry_of_its_own(files, cache, smol):
    read(files[:1], cache, smol, eval_data=tuple(files[1:]))
    train, held, is_cached = read(files[:1], cache, smol, eval_data=tuple(files[1:]))
    assert is_cached and len(entries(cache)) == 2 and len(train[0]) == len(held[0]) == 20


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('[{"instruction": 1}]', {"skip_bad_rows": False}, "bad.json:1: instruction: got a number"),
        ('[{"instruction": 1}]', {}, "no row is left"),
        ("[{}", {"skip_bad_rows": False}, "bad.json:1"),
        (json.dumps([CHAT]), {}, "bad.json:1: the row holds chat messages"),
        (json.dumps([{"instruction": "hidden " * 99, "output": "x"}]), {}, "no example is left of 1 rows"),
    ],
)
def test_bad_data_is_refused_each_time_and_never_kept(content, options, message, tmp_path, cache, smol):
    (tmp_path / "bad.json").write_text(content)
    for _ in range(2):
        with pytest.raises(DataError) as error:
            read([tmp_path / "bad.json"], cache, smol, **options)[0][0].select()
        assert message in str(error.value)
    assert not cache.exists() or not entries(cache)


def test_a_file_rewritten_while_it_is_read_is_not_kept(files, cache, smol, monkeypatch):
    real = datasets.read_rows

    def rewriting(*args, **options):
        found = real(*args, **options)
        append(files[0], " ")
        return found

    monkeypatch.setattr(datasets, "read_rows", rewriting)
    read(files, cache, smol)
    assert not cache.exists()


# ---- what may happen to one -----------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.npy", "is_target.npy", "rows.npy", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text('{"a":' + "[" * 100_000),
    ],
)
def test_a_damaged_entry_is_noticed_and_made_again(name, damage, files, cache, smol):
    first, _ = read(files, cache, smol)
    if name == "manifest.json" and damage is flip:
        damage = lambda path: path.write_text(path.read_text().replace("tokens", "tokans"))  # noqa: E731
    damage(entries(cache)[0] / name)
    said = []
    again, was_cached = read(files, cache, smol, said)
    assert not was_cached and len(said) == 1 and "damaged; the data is tokenised again" in said[0]
    same(first, again)
    third, is_cached = read(files, cache, smol, said)
    assert is_cached and len(said) == 1
    same(first, third)


@pytest.mark.parametrize("kind", ["file", "read-only", "full", "no rename"])
def test_a_cache_that_cannot_be_written_costs_a_note(kind, files, cache, smol, monkeypatch):
    if kind == "file":
        cache.write_text("not a folder")
    elif kind == "full":
        monkeypatch.setattr(token_cache, "sync_file", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
    elif kind == "no rename":
        monkeypatch.setattr(token_cache.os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    else:
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    said = []
    found, was_cached = read(files, cache, smol, said)
    assert not was_cached and len(found[0]) == 40
    assert len(said) == 1 and said[0].startswith(f"note: the tokens are not cached in {cache} (")
    assert not cache.is_dir() or not list(cache.iterdir())


def test_off_keeps_nothing_and_auto_is_the_users_cache(files, smol, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    read(files, "off", smol)
    assert not (tmp_path / "xdg").exists() and not Path("off").exists()
    read(files, "auto", smol)
    assert len(entries(tmp_path / "xdg" / "cria" / "tokens")) == 1
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert token_cache.find_cache("off") is None is token_cache.find_cache("")
    assert token_cache.find_cache("x/off") == Path("x/off")
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert token_cache.find_cache("auto") == tmp_path / "home" / ".cache" / "cria" / "tokens"


def test_the_newest_used_entries_stay(files, cache, smol, monkeypatch):
    monkeypatch.setattr(token_cache, "MAX_ENTRIES", 3)
    paths, now = [Path(file) for file in files], time.time()
    for name, age in {"mine": 10**9, ".tmp-new": 0, ".tmp-old": token_cache.STALE_SECONDS + 60}.items():
        (cache / name).mkdir(parents=True)  # "mine" is not named as an entry: it is not ours
        os.utime(cache / name, (now - age,) * 2)

    def entry(max_length):
        return cache / token_cache.compute_key(paths, smol, "alpaca", max_length, False, True)

    def left():
        assert [path.name for path in sorted(cache.iterdir()) if len(path.name) < 10] == [".tmp-new", "mine"]
        return [n for n in range(60, 66) if entry(n).is_dir()]

    for n in (60, 61, 62):
        read(files, cache, smol, max_length=n)
        os.utime(entry(n), (now - 300 + n,) * 2)
    (mapped, *_), is_cached = read(files, cache, smol, max_length=60)  # used again: no longer the oldest
    assert is_cached
    read(files, cache, smol, max_length=63)
    assert left() == [60, 62, 63]
    os.utime(entry(60), (now - 300,) * 2)
    monkeypatch.setattr(token_cache, "MAX_BYTES", 1)
    read(files, cache, smol, max_length=64)
    assert left() == [64]
    assert mapped.select().sha256() == read(files, "off", smol, max_length=60)[0][0].select().sha256()


# ---- several processes ----------------------------------------------------------------------------------------------

PROCESS = """
import os, signal, sys, time
from pathlib import Path
from engine.training import datasets
from engine.data import token_cache
from engine.training.config import FinetuneConfig
from engine.text.tokenizer_files import load_tokenizer
model, cache, kill_at, wait_for, *files = sys.argv[1:]
calls = 0
def counted(name):
    real = getattr(os, name)
    def call(*args):
        global calls
        calls += 1
        if calls == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(os, name, call)
for name in ("fsync", "rename"):
    counted(name)
tokenizer = load_tokenizer(model)
config = FinetuneConfig(
    model="tiny", random_init=True, data=tuple(files), token_cache=cache, skip_bad_rows=True, max_length=64
)
if wait_for != "-":
    write = token_cache.write_files
    def waiting(*args):
        write(*args)
        Path(f"{wait_for}-{os.getpid()}").touch()
        deadline = time.time() + 60  # the other one may have failed
        while len(list(Path(wait_for).parent.glob(Path(wait_for).name + "-*"))) < 2 and time.time() < deadline:
            time.sleep(0.001)
    token_cache.write_files = waiting
[(table, skipped, _)], is_cached = datasets.read_tables(config, tokenizer, print)
print(is_cached, table.select().sha256(), calls)
"""


@pytest.fixture(scope="module")
def small():
    """Return a tokenizer that a process of its own reads in a moment."""
    return load_tokenizer(small_model())


def start(cache, files, kill_at=0, wait_for="-"):
    return Started(PROCESS, small_model(), cache, kill_at, wait_for, *files, env=environment())


def test_two_processes_that_write_the_same_entry_both_succeed(files, cache, small, tmp_path):
    both = [start(cache, files, wait_for=tmp_path / "written") for _ in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    wanted = read(files, "off", small)[0][0].select().sha256()
    for out, _ in said:
        (line,) = out.splitlines()  # no note
        assert line.split()[:2] == ["False", wanted]
    assert [path.name for path in cache.iterdir()] == [path.name for path in entries(cache)]
    again, is_cached = read(files, cache, small)
    assert is_cached and again[0].select().sha256() == wanted


def test_kill_9_at_any_write_leaves_an_entry_or_none(files, cache, small, monkeypatch):
    wanted = read(files, "off", small)[0][0].select().sha256()
    for kill_at in range(1, 9):
        shutil.rmtree(cache, ignore_errors=True)
        process = start(cache, files, kill_at)
        _, err = process.communicate(timeout=100)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        left = [path for path in cache.iterdir() if path.name.startswith(".tmp-")]
        assert len(left) + len(entries(cache)) == 1
        said = []
        found, is_cached = read(files, cache, small, said)
        assert is_cached == (not left) and not said and found[0].select().sha256() == wanted
        assert all(path.exists() for path in left)  # it may still be written
        old = time.time() - 2 * token_cache.STALE_SECONDS
        for path in left:
            os.utime(path, (old, old))
        read(files, cache, small, max_length=63)
        assert not any(path.exists() for path in left) and len(entries(cache)) == 2
    assert kill_at == 8, "three arrays, the manifest, its folder, the rename, the folder around it"

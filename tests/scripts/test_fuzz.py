"""Damaged files of every kind: refused or read as before, never wrongly, never another error."""

import re
import sys
from collections import Counter

import pytest
import torch

import scripts.fuzz
from scripts.fuzz import READERS, Reader, Tally, fuzz
from tests.helpers.clocks import Clock


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_or_harmless(name, tmp_path):
    tally = fuzz(READERS[name], tmp_path, seed=1, more=lambda n: n < 80)
    assert tally.faults == []
    assert tally.counts["tried"] == 80 and tally.slowest < 60


def test_what_the_fuzz_finds(tmp_path):
    """A reader that believes its file, and one that falls over it."""
    make = lambda folder: (folder / "a.json").write_text('{"a": [1, 2]}') and None  # noqa: E731
    tally = fuzz(
        Reader(make, lambda folder: (folder / "a.json").read_bytes(), ("a.json",)), tmp_path, 0, lambda n: n < 20
    )
    assert tally.counts["wrong"] == 20 and "read otherwise" in tally.faults[0]
    tally = fuzz(
        Reader(make, lambda folder: 1 // len((folder / "a.json").read_text()[-1:])), tmp_path, 0, lambda n: n < 60
    )
    assert tally.counts["error"] and any("ZeroDivisionError" in fault for fault in tally.faults)


@pytest.mark.parametrize("bad", [None, *range(3)])
@pytest.mark.parametrize("kind", ["fault", "slow"])
def test_one_reader_that_is_not_sound_makes_the_exit_code(kind, bad, monkeypatch, capsys):
    """Whichever of them it is."""
    tallies = iter([
        Tally(Counter(tried=9), 99.0 if i == bad and kind == "slow" else 0.1,
              ["x: broke"] if i == bad and kind == "fault" else [])
        for i in range(3)
    ])  # fmt: skip
    monkeypatch.setattr(scripts.fuzz, "READERS", dict.fromkeys("abc"))
    monkeypatch.setattr(scripts.fuzz, "fuzz", lambda *_: next(tallies))
    monkeypatch.setattr(sys, "argv", ["fuzz"])
    assert scripts.fuzz.main() == (bad is not None)
    assert ("x: broke" in capsys.readouterr().out) == (bad is not None and kind == "fault")


def test_the_table_of_readers(monkeypatch, call_main, capsys):
    """Each has its share of the seconds; ten different faults are told."""
    clock = Clock(monkeypatch, scripts.fuzz)
    faults = [f"fault {i % 12}" for i in range(24)]
    tallies = {"a": Tally(Counter(tried=9, refused=4, same=3, otherwise=2), 0.5, []),
               "bb": Tally(Counter(tried=12345, wrong=1, error=11), 1.2345, faults)}  # fmt: skip
    asked = []

    def fuzz(reader, folder, seed, more):
        asked.append((reader, seed, [more(0), clock.take(2.9) or more(1), clock.take(0.2) or more(2)]))
        return tallies[reader]

    monkeypatch.setattr(scripts.fuzz, "READERS", {"a": "a", "bb": "bb"})
    monkeypatch.setattr(scripts.fuzz, "fuzz", fuzz)
    assert call_main(scripts.fuzz, "--seconds", 6, "--seed", 7) == 1
    assert asked == [(name, 7, [True, True, False]) for name in ("a", "bb")]
    numbers = lambda *row: "".join(f"{cell:>11}" for cell in row)  # noqa: E731
    assert capsys.readouterr().out.splitlines() == [
        "reader          " + numbers("tried", "refused", "same", "otherwise", "wrong", "error", "slowest s"),
        "a               " + numbers(9, 4, 3, 2, 0, 0, "0.500"),
        "bb              " + numbers(12345, 0, 0, 0, 1, 11, "1.234"),
        *(f"  fault {i}" for i in range(10)),
    ]  # fmt: skip
    assert call_main(scripts.fuzz, "--reader", "a", "--limit", 0.5) == 0
    assert call_main(scripts.fuzz, "--reader", "a", "--limit", 0.4) == 1
    assert len(asked) == 4


def test_what_was_read_is_compared_part_by_part():
    one = torch.tensor([1.0, 2.0])
    same = [(1, 1), (one, one.clone()), ({"a": [one, 2]}, {"a": (one, 2)}), ([], ()), (None, None)]
    other = [
        (1, 2), (one, one + 1), (one, [1.0, 2.0]), ({"a": one}, {"b": one}), ({"a": one}, {"a": one + 1}),
        ([1], [1, 2]),
        ([one], [one + 1]), ({"a": 1, "b": 2}, {"a": 1}),
    ]  # fmt: skip
    assert all(scripts.fuzz.is_same(a, b) for a, b in same) and not any(scripts.fuzz.is_same(a, b) for a, b in other)


def test_files_are_as_before_after_each_input(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("kept")
    (tmp_path / "c").write_text("changed")
    originals = {path: path.read_bytes() for path in (tmp_path / "a" / "b", tmp_path / "c")}
    (tmp_path / "a" / "b").unlink()
    (tmp_path / "a").rmdir()
    (tmp_path / "c").write_text("damaged")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "new").touch()
    scripts.fuzz.restore(tmp_path, originals)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == originals


def test_pages_and_empty_files_are_not_damaged_and_one_seed_is_one_fuzz(tmp_path, monkeypatch):
    damaged = []

    def damage(raw, name, rng):
        damaged.append((name, raw, rng.random()))
        return "bit", raw + b"!"

    def make(folder):
        for name, text in (("a.json", "A"), ("b.html", "B"), ("c.json", ""), ("d.json", "D")):
            (folder / name).write_text(text)

    monkeypatch.setattr(scripts.fuzz, "damage", damage)
    read = lambda folder: (folder / "a.json").read_text()  # noqa: E731
    clock = Clock(monkeypatch, scripts.fuzz)
    slow = iter([0.0, 1.0, 5.0, *[2.0] * 99])
    found = []
    for seed in (3, 3, 4):
        damaged.clear()
        (tmp_path / str(len(found))).mkdir()
        reader = Reader(make, lambda folder: clock.take(next(slow)) or read(folder))
        tally = fuzz(reader, tmp_path / str(len(found)), seed, lambda n: n < 9)
        found.append(list(damaged))
        assert {name for name, *_ in damaged} == {"a.json", "d.json"} and all(
            raw in (b"A", b"D") for _, raw, _ in damaged
        )
        counts = Counter(name for name, *_ in damaged)
        assert tally.counts == {"tried": 9, "otherwise": counts["a.json"], "same": counts["d.json"]}
        assert tally.slowest == (5.0 if len(found) == 1 else 2.0)
    assert found[0] == found[1] != found[2]


def test_refusals_of_both_parts_of_the_project_count_and_errors_are_told(tmp_path):
    errors = iter([None, *scripts.fuzz.REFUSED, ValueError("x" * 300), ValueError("y")])

    def read(folder):
        error = next(errors)
        if error:
            raise error if isinstance(error, ValueError) else error("no")

    def make(folder):
        (folder / "a.bin").write_bytes(bytes(9))

    tally = fuzz(Reader(make, read), tmp_path, 0, lambda n: n < 6)
    assert tally.counts == {"tried": 6, "refused": 4, "error": 2}
    assert [fault.partition(", ")[0] for fault in tally.faults] == ["a.bin"] * 2
    assert tally.faults[0].endswith(f": ValueError: {'x' * 200}") and tally.faults[1].endswith(": ValueError: y")


SMALL = ("rows", "chats", "prompts", "state", "run", "tokenizer", "tokens", "ledger", "prices", "answers", "evaluation",
         "votes", "hf", "meta", "gguf", "gguf tokenizer", "shards")  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_what_is_damaged_and_what_is_read_of_it(name, tmp_path, snapshot):
    """The files, without those of random weights byte by byte, and what their reader finds where nothing is damaged."""
    reader = READERS[name]
    reader.make(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    found = reader.read(tmp_path)
    if name in ("hf", "meta", "gguf", "shards"):
        config, tensors = found
        found = [config, {key: [list(part.shape) for part in parts] for key, parts in sorted(tensors.items())}]
        assert len({part.sum().item() for parts in tensors.values() for part in parts}) > len(tensors) / 2
    if name == "run":
        found = found[0], len(found[1]) > 1000
    texts = [f"{path.relative_to(tmp_path)}" for path in files]
    said = "\n".join([*texts, repr(found)]).replace(str(tmp_path), "FOLDER")
    assert re.sub(r"'[0-9a-f]{64}'", "DIGEST", said) == snapshot


@pytest.mark.parametrize(("name", "proven"), [(n, r.proven) for n, r in READERS.items() if r.proven])
def test_files_under_a_checksum(name, proven):
    """In which every flipped bit must be seen."""
    assert proven == {
        "meta": ("consolidated.00.pth",), "state": ("state.safetensors",), "ledger": (scripts.fuzz.LEDGER_NAME,),
        "tokens": ("tokens.npy", "is_target.npy", "rows.npy"),
    }[name]  # fmt: skip


def test_flags_have_defaults(defaults_of):
    assert defaults_of(scripts.fuzz) == {"seconds": 60.0, "seed": 0, "reader": None, "limit": 20.0}

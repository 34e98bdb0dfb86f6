"""De-duplication beside all pairs: decisions, streams, turns and memory."""

import contextlib
import itertools
import json
import re
from types import SimpleNamespace

import pytest

from scripts.speed import dedup
from tests.helpers.calls import Calls
from tests.helpers.clocks import Clock, Ticks

ROWS = [{"instruction": f"Name {n} uses for a {thing}.", "input": "", "output": "x y"} for n, thing in
        itertools.product(("two", "three"), ("lamp", "chair", "paper clip"))]  # fmt: skip


def test_all_pairs_decide_as_the_index_does_over_several_blocks(monkeypatch):
    """At 0.7 exactly too, and of several duplicates the nearest, of equally near ones the first."""
    monkeypatch.setattr(dedup, "BLOCK", 8)
    texts = [*dedup.make_stream(ROWS, 60, 0), "", "", "a b c d e f g", "a b c d e f g h i j k l m"]
    texts += ["a b c d e f g x y z", "q b c d e f g x y z", "a b c d e f g x y w"]
    answers, _ = dedup.compare_all_pairs(texts)
    assert answers == dedup.deduplicate(texts) and 0 < answers.count(None) < len(texts)


def test_a_stream_is_of_its_seed_and_a_shorter_one_its_beginning():
    long = dedup.make_stream(ROWS, 30, 1)
    assert dedup.make_stream(ROWS, 10, 1) == long[:10] and dedup.make_stream(ROWS, 30, 2) != long


@pytest.mark.parametrize("other", [False, True])
def test_decisions_that_differ_are_no_measurement(other, monkeypatch):
    clock = Clock(monkeypatch, dedup)
    monkeypatch.setattr(dedup, "deduplicate", lambda texts: clock.take(2.0) or [None, 0])
    monkeypatch.setattr(dedup, "compare_all_pairs", lambda texts: ([None, None if other else 0], 6.0))
    if other:
        with pytest.raises(AssertionError, match="decide otherwise"):
            dedup.measure_in_turns(["a", "a"], 2)
    else:
        found = dedup.measure_in_turns(["a", "a"], 2)
        assert found["ratio"]["median"] == 3.0 and found["kept"] == 1 and found["cpu_s"]["median"] == 2.0


def test_the_whole_measurement(monkeypatch, tell, snapshot, tmp_path):
    """Streams as long as they are asked for, in a new process of each run, with clocks and memory of their own."""
    Ticks(monkeypatch, dedup)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    calls, kilobytes = Calls(), itertools.count(100, 7)
    in_new = calls.stand_in("new process", dedup.measure_stream)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(dedup, "measure_in_new_process", in_new)
    monkeypatch.setattr(dedup, "read_memory_bytes", calls.stand_in("memory", lambda name: next(kilobytes)))
    monkeypatch.setattr(dedup, "deduplicate", calls.stand_in("deduplicate", dedup.deduplicate))
    monkeypatch.setattr(dedup, "compare_all_pairs", calls.stand_in("all pairs", dedup.compare_all_pairs))
    flags = ("--n", 4, "--n-long", 9, "--rounds", 2, "--seed", 5, "--rows", tmp_path / "rows.json")
    assert tell(dedup, *flags) == snapshot
    assert calls.text() == snapshot(name="calls")


def test_a_process_of_its_own_measures_the_stream(monkeypatch):
    pool = contextlib.nullcontext(SimpleNamespace(apply=lambda function, args: (function, args)))
    how = []
    context = SimpleNamespace(Pool=lambda n: how.append(n) or pool)
    monkeypatch.setattr(dedup.multiprocessing, "get_context", lambda kind: how.append(kind) or context)
    assert dedup.measure_in_new_process(["a"]) == (dedup.measure_stream, (["a"],)) and how == ["spawn", 1]


def test_a_stream_is_of_whole_instructions_and_halves_with_other_words(monkeypatch):
    """Of the words of all three fields; with none replaced, of the instructions' own alone."""
    rows = [{"instruction": f"Take {n} {what}, now!", "input": "inner", "output": "outer"} for n, what in
            itertools.product(("one", "two"), ("lamp", "chair", "cup"))]  # fmt: skip
    known = set(re.findall(r"\w+", json.dumps([list(row.values()) for row in rows])))
    words = [re.findall(r"\w+", text) for text in dedup.make_stream(rows, 300, 0)]
    assert {word for text in words for word in text} >= known
    monkeypatch.setattr(dedup, "MAX_REPLACED", 0.0)
    texts = dedup.make_stream(rows, 300, 0)
    whole = {row["instruction"] for row in rows}
    assert 0.4 < sum(text in whole for text in texts) / 300 < 0.75 and whole <= set(texts)
    for text in texts:
        halves = [(a, b) for a in whole for b in whole for i in range(len(a) + 1)
                  if text[:i] == a[:i] and b.endswith(text[i:])]  # fmt: skip
        assert halves, text


def test_memory_is_read_in_bytes(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("VmPeak:\t  9 kB\nVmHWM:\t    7 kB\nVmRSS:\t    5 kB\n")
    asked = []
    monkeypatch.setattr(dedup, "Path", lambda path: asked.append(path) or tmp_path / "status")
    assert dedup.read_memory_bytes("VmRSS") == 5 * 1024 and dedup.read_memory_bytes("VmHWM") == 7 * 1024
    assert set(asked) == {"/proc/self/status"}


@pytest.mark.parametrize("threads", ["2", None])
def test_seconds_of_several_threads_are_refused(threads, monkeypatch, call_main, capsys):
    monkeypatch.setattr(dedup, "read_rows", lambda path: pytest.fail("it is measured"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert call_main(dedup, "--json", "x") == 2 and "OMP_NUM_THREADS=1" in capsys.readouterr().err


def test_flags_have_defaults(defaults_of, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert defaults_of(dedup, "--json", "x") == {
        "json": "x", "rows": str(dedup.SEED_TASKS), "n": 60_000, "n_long": 63_000, "rounds": 5, "seed": 0
    }  # fmt: skip

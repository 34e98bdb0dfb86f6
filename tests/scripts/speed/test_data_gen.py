"""A dataset from a server that fails: what a kill may cost, and what ends the measurement with an error."""

import json
import signal
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

from data_gen.api.ledger import Ledger
from scripts.speed import data_gen
from tests.helpers.calls import Calls
from tests.helpers.clocks import Clock, Ticks

OPTIONS = Namespace(rows=5, concurrency=3, latency_s=0.0, kills=2)


@pytest.mark.parametrize("code", [0, 1, 3, 137])
def test_a_run_that_does_not_end_well_is_no_measurement(code, monkeypatch):
    waited = []

    def wait4(pid, options):
        waited.append((pid, options))
        return pid, code << 8, SimpleNamespace(ru_utime=2.5, ru_stime=0.25, ru_maxrss=7)

    Ticks(monkeypatch, data_gen)
    monkeypatch.setattr(data_gen.os, "wait4", wait4)
    process = SimpleNamespace(pid=11)
    if code:
        with pytest.raises(SystemExit, match=f"data_gen.generate ended with {code}"):
            data_gen.wait_for(process)
    else:
        assert data_gen.wait_for(process) == {
            "wall_s": 16.25, "cpu_s": 2.75, "peak_memory_bytes": 7 * 1024
        }  # fmt: skip
    assert process.returncode == code and waited == [(11, 0)]


def test_the_server_ends_with_its_measurement_and_tells_its_log(tmp_path, monkeypatch):
    """Also when the measurement fails."""
    script = "import json, time; print(json.dumps({'base_url': 'http://it/v1'}), flush=True); time.sleep(9)"
    real, started = subprocess.Popen, []

    def start(command, **options):
        started.append(command)
        return real([sys.executable, "-c", script], **options)

    monkeypatch.setattr(data_gen.subprocess, "Popen", start)
    with pytest.raises(KeyError), data_gen.Server(tmp_path, 0.25, {"500": 0.01}) as server:
        assert server.base_url == "http://it/v1" and server.process.poll() is None
        assert server.read_log() == [] and server.count_requests() == 0
        server.log.write_text('{"billed": true}\n{"billed": false}\n')
        assert server.read_log() == [{"billed": True}, {"billed": False}] and server.count_requests() == 2
        raise KeyError
    assert server.process.returncode == -signal.SIGKILL
    flags = dict(zip(started[0][3::2], started[0][4::2], strict=True))
    assert json.loads(flags["--faults"]) == {"500": 0.01} and flags["--latency-s"] == "0.25"
    assert flags["--log"] == str(server.log) and flags["--port"] == "0"


def test_a_dataset_is_asked_of_the_server_with_the_options(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(data_gen.subprocess, "Popen", lambda command, **how: started.append((command, how)) or 7)
    server = SimpleNamespace(base_url="http://it/v1")
    assert data_gen.start_generate(server, tmp_path / "out", OPTIONS, "--retry-failed") == 7
    ((command, how),) = started
    assert command[1:3] == ["-m", "data_gen.generate"] and "--quiet" in command and command[-1] == "--retry-failed"
    for flag, value in {
        "--base-url": "http://it/v1", "--rows": "5", "--concurrency": "3", "--out": str(tmp_path / "out"),
        "--model": "fault-server", "--backoff": "0.2", "--price-in": "0.10", "--price-out": "0.40",
    }.items():  # fmt: skip
        assert command[command.index(flag) + 1] == value
    assert how["env"]["OMP_NUM_THREADS"] == "1" and how["env"]["OPENAI_API_KEY"] == "none"


@pytest.mark.parametrize("kind", ["answer", "refused", "failed"])
def test_what_is_recorded_is_what_must_not_be_sent_again(kind, tmp_path):
    assert data_gen.recorded_requests(tmp_path) == set()
    ledger = Ledger(tmp_path)
    ledger.write_settings(seed=0)
    attempt, intent = ledger.prepare_intent(7, "0" * 64, "m", 1000)
    ledger.commit([intent, ledger.prepare_outcome(attempt, kind, 200, "{}", (1, 1), 1)])
    ledger.close()
    assert data_gen.recorded_requests(tmp_path) == ({7} if kind != "failed" else set())


@pytest.mark.parametrize("again", [0, 1])
def test_a_request_that_was_recorded_and_comes_again_counts(again, monkeypatch, tmp_path):
    log = [{"key": "a"}, {"key": "b"}, {"billed": True}, {"key": "c"}, {"key": "b" if again else "d"}]
    server = SimpleNamespace(count_requests=lambda: next(counts), read_log=lambda: log)
    counts = iter([3] * 99)
    process = SimpleNamespace(poll=lambda: None, send_signal=lambda _: None, wait=lambda: None)
    monkeypatch.setattr(data_gen, "start_generate", lambda *_: process)
    monkeypatch.setattr(data_gen, "wait_for", lambda _: None)
    monkeypatch.setattr(data_gen, "recorded_requests", lambda out: {0, 1})
    monkeypatch.setattr(data_gen, "request_key", lambda number: "ab"[number])
    monkeypatch.setattr(data_gen, "Prompter", lambda _: SimpleNamespace(build_messages=lambda number: number))
    monkeypatch.setattr(data_gen, "read_run", lambda out: {"cost": {"spent_usd": 1}})
    monkeypatch.setattr(data_gen, "time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 1.0))
    found = data_gen.measure_killed_run(server, tmp_path, Namespace(kills=1), 2)
    assert found["recorded_and_sent_again"] == again and found["recorded_at_kills"] == [2]


def test_each_run_is_what_its_name_says(monkeypatch, tmp_path):
    started, faults = [], []

    class Server:
        def __init__(self, folder, latency_s, given):
            faults.append((folder.name, given))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    unbroken = lambda server, out, options, *more: started.append((out.parent.name, more)) or {  # noqa: E731
        "requests_at_the_server": 9}  # fmt: skip
    monkeypatch.setattr(data_gen, "Server", Server)
    monkeypatch.setattr(data_gen, "measure_unbroken_run", unbroken)
    monkeypatch.setattr(data_gen, "measure_killed_run", lambda server, out, options, n: started.append(("killed", n)))
    monkeypatch.setattr(data_gen, "measure_replay", lambda out, options: {"of": out.parent.name})
    runs, replay = data_gen.measure_runs(tmp_path, OPTIONS)
    assert started == [("unbroken", ()), ("killed", 9), ("batches", ("--batch", "--poll", "1"))]
    assert replay == {"of": "unbroken"} and runs.keys() == {"unbroken", "killed", "batches"}
    attempts = {name: data_gen.ATTEMPT_FAULTS.items() <= given.items() for name, given in faults}
    assert attempts == {"unbroken": True, "killed": True, "batches": False}
    assert all(data_gen.ANSWER_FAULTS.items() <= given.items() for _, given in faults)


@pytest.mark.parametrize(
    ("other", "again", "code"), [(False, 0, None), (True, 0, "the datasets differ"), (False, 1, "was sent again")]
)
def test_datasets_that_differ_and_requests_sent_again_are_told(other, again, code, monkeypatch, tmp_path, call_main):
    def measure(root, options):
        for name in ("unbroken", "killed", "batches"):
            (root / name / "out").mkdir(parents=True)
            (root / name / "out" / "dataset.json").write_text("b" if other and name == "batches" else "a")
        return {
            name: {"recorded_and_sent_again": again * (name == "killed")} for name in ("unbroken", "killed", "batches")
        }, {}

    monkeypatch.setattr(data_gen, "measure_runs", measure)
    ended = call_main(data_gen, "--json", tmp_path / "x", "--keep", tmp_path / "kept")
    assert ended is None if code is None else code in ended
    assert json.loads((tmp_path / "x").read_text())["identical"] == (not other)


RUN = {"counts": {"rows": 5}, "cost": {"spent_usd": 1.25}, "other": 1}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stand-ins for a server, its clients and the randomness of kills."""
    calls = Calls()
    Ticks(monkeypatch, data_gen)
    process = calls.thing("process", poll=None, send_signal=None, wait=None)
    started = calls.stand_in("Popen", process)
    monkeypatch.setattr(data_gen.subprocess, "Popen", lambda command, **how: started(command[1:], cwd=how["cwd"]))
    figures = {"wall_s": 3.0, "cpu_s": 2.0, "peak_memory_bytes": 1024}
    monkeypatch.setattr(data_gen, "wait_for", calls.stand_in("wait_for", figures))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps(RUN))
    return calls


def in_order(of, tmp_path):
    """Return the log of calls without folders."""
    return of.text().replace(str(tmp_path), "FOLDER").replace(str(data_gen.ROOT), "ROOT")


def test_an_unbroken_run_is_told_by_its_process_its_file_and_the_server(calls, tmp_path, snapshot):
    log = [{"billed": True}, {"billed": False}, {"key": "a"}, {"billed": True}]
    server = calls.thing("server", read_log=log)
    server.base_url = "http://it/v1"
    found = data_gen.measure_unbroken_run(server, tmp_path / "out", OPTIONS, "--batch")
    assert found == {
        "wall_s": 3.0, "cpu_s": 2.0, "peak_memory_bytes": 1024, "counts": RUN["counts"], "cost": RUN["cost"],
        "requests_billed": 2, "requests_at_the_server": 4,
    }  # fmt: skip
    assert in_order(calls, tmp_path) == snapshot


def test_kills_are_spread_over_the_requests_and_end_before_the_last_run(calls, tmp_path, monkeypatch, snapshot, capsys):
    """Each comes once its share of the requests has arrived, and a new one since the kill before."""
    counts = iter([*range(0, 60, 3), *[60] * 9])
    log = [{"key": "a"}, {"billed": True}, *[{"key": key} for key in "bcdbaa"]]
    server = calls.thing("server", count_requests=lambda: next(counts), read_log=log)
    server.base_url = "http://it/v1"
    recorded = iter([{0}, {0, 1}, {0, 1, 2}])
    monkeypatch.setattr(data_gen, "recorded_requests", calls.stand_in("recorded", lambda out: next(recorded)))
    monkeypatch.setattr(data_gen, "request_key", lambda number: "abc"[number])
    monkeypatch.setattr(data_gen, "Prompter", lambda _: SimpleNamespace(build_messages=lambda number: number))
    monkeypatch.setattr(data_gen, "random", SimpleNamespace(Random=lambda seed: SimpleNamespace(random=lambda: 0.5)))
    found = data_gen.measure_killed_run(server, tmp_path / "out", Namespace(rows=5, concurrency=3, kills=3), 40)
    text = json.dumps(found, indent=1) + "\n" + capsys.readouterr().out + in_order(calls, tmp_path)
    assert text + f"\nslept {data_gen.time.sleep.__self__}" == snapshot


def test_what_was_recorded_at_a_kill_and_comes_after_it_counts_for_each_kill(calls, tmp_path, monkeypatch):
    """From the number of requests that had arrived then, of those that have a key."""
    log = [{"key": key} for key in "abacab"]
    counts = iter([0, 2, 2, 2, 5, 5])  # before a kill, again, and when it is done
    server = calls.thing("server", count_requests=lambda: next(counts, 9), read_log=log)
    server.base_url = ""
    recorded = iter([{0, 1}, {2}])
    monkeypatch.setattr(data_gen, "recorded_requests", lambda out: next(recorded))
    monkeypatch.setattr(data_gen, "request_key", lambda number: "abc"[number])
    monkeypatch.setattr(data_gen, "Prompter", lambda _: SimpleNamespace(build_messages=lambda number: number))
    monkeypatch.setattr(data_gen, "random", SimpleNamespace(Random=lambda seed: SimpleNamespace(random=lambda: 0.0)))
    found = data_gen.measure_killed_run(server, tmp_path / "out", Namespace(rows=5, concurrency=3, kills=2), 0)
    assert found["recorded_at_kills"] == [2, 1] and found["recorded_and_sent_again"] == 2
    assert found["requests_at_the_server"] == 6 and found["cost"] == RUN["cost"]


def test_a_run_that_is_done_before_a_kill_needs_fewer(calls, tmp_path, monkeypatch):
    server = calls.thing("server", count_requests=0)
    server.base_url = ""
    monkeypatch.setattr(data_gen, "start_generate", lambda *_: SimpleNamespace(poll=lambda: 0))
    with pytest.raises(SystemExit, match="the run was done before kill 1; fewer --kills"):
        data_gen.measure_killed_run(server, tmp_path / "out", Namespace(kills=2), 40)


def test_a_replay_is_told_by_the_seconds_of_each_stage(monkeypatch, tmp_path):
    """Each is the time in its own functions, which are as before when it ends."""
    clock, told = Clock(monkeypatch, data_gen), []
    names = {"parse_answer": 1.0, "repair_item": 2.0, "find_defect": 4.0}
    for name, seconds in names.items():
        monkeypatch.setattr(data_gen.curate, name, lambda *args, seconds=seconds: clock.take(seconds) or args)
    plain = [getattr(data_gen.curate, name) for name in names]

    class Curator:
        def __init__(self, rows, tasks):
            told.append((rows, len(tasks)))
            self.index = SimpleNamespace(add=lambda text: clock.take(16.0))

        def add_outcome(self, entry):
            told.append(entry)
            assert [getattr(data_gen.curate, name)(entry) for name in names] == [(entry,)] * 3
            self.index.add("x")
            clock.take(32.0)

    def ledger(out, create):
        told.append((out, create))
        clock.take(8.0)
        return SimpleNamespace(read_outcomes=lambda: iter("ab"), close=lambda: told.append("closed"))

    monkeypatch.setattr(data_gen, "Ledger", ledger)
    monkeypatch.setattr(data_gen, "Curator", Curator)
    assert data_gen.measure_replay(tmp_path, OPTIONS) == {
        "parse": 2.0, "tidy and filters": 12.0, "de-duplication": 32.0, "all": 2 * (1 + 2 + 4 + 16 + 32) + 8.0
    }  # fmt: skip
    assert told == [(tmp_path, False), (5, len(data_gen.read_seed_tasks())), "a", "b", "closed"]
    assert [getattr(data_gen.curate, name) for name in names] == plain


def test_the_whole_measurement(monkeypatch, tell, tmp_path, snapshot):
    calls = Calls()

    class Server:
        label = "server"

        def __init__(self, *args):
            calls.stand_in("Server")(*args)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.stand_in("ended")()

    def unbroken(server, out, options, *more):
        (out).mkdir()
        (out / "dataset.json").write_text("rows")
        return {"requests_at_the_server": 9, "recorded_and_sent_again": 0}

    usage = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=who), RUSAGE_SELF=5)
    monkeypatch.setattr(data_gen, "resource", usage)
    monkeypatch.setattr(data_gen, "Server", Server)
    monkeypatch.setattr(data_gen, "measure_unbroken_run", calls.stand_in("unbroken", unbroken))
    monkeypatch.setattr(data_gen, "measure_killed_run", calls.stand_in("killed", unbroken))
    monkeypatch.setattr(data_gen, "measure_replay", calls.stand_in("replay", {"parse": 1.5, "all": 2.5}))
    flags = ("--rows", 7, "--kills", 2, "--concurrency", 3, "--latency-s", 0.25, "--keep", tmp_path / "kept")
    text = tell(data_gen, *flags) + "\n" + in_order(calls, tmp_path)
    assert text == snapshot and (tmp_path / "kept" / "batches" / "out" / "dataset.json").exists()


def test_by_default_there_are_as_many_rows_as_alpacas(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_gen", "--json", "x"])
    expected = {"json": "x", "rows": 52_000, "kills": 20, "concurrency": 64, "latency_s": 0.5, "keep": None}
    assert vars(data_gen.parse_arguments()) == expected

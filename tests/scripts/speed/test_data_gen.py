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

OPTIONS = Namespace(rows=5, concurrency=3, latency_s=0.0, kills=2)


@pytest.mark.parametrize("code", [0, 1, 3, 137])
def test_a_run_that_does_not_end_well_is_no_measurement(code):
    process = subprocess.Popen(["sh", "-c", f"exit {code}"])
    if code:
        with pytest.raises(SystemExit, match=f"ended with {code}"):
            data_gen.wait_for(process)
    else:
        assert data_gen.wait_for(process).keys() == {"wall_s", "cpu_s", "peak_memory_bytes"}


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

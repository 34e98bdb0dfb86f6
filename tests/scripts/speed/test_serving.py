"""Many requests at once: what is asked of each server, and what its answers, its time and its CPU seconds become."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.speed import serving
from scripts.speed.serving import Peer


def peer(name, **lists):
    return Peer(name, "http://127.0.0.1:1", None, **lists)


def test_every_ratio_is_over_the_other_server_round_by_round():
    ours = peer("cria", tokens_per_s=[6.0, 8.0], cpu_ms_a_token=[1.0, 2.0], first_token_s=[0.1], texts=["a", "b"])
    theirs = peer("it", tokens_per_s=[3.0, 2.0], cpu_ms_a_token=[4.0, 4.0], first_token_s=[0.5], texts=["a", "c"])
    found = serving.describe_peers([theirs, ours])
    assert found["it"]["ours_over_it"] == {"median": 3.0, "min": 2.0, "max": 4.0} and found["it"]["equal_answers"] == 1
    assert found["it"]["its_cpu_over_ours"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert found["cria"]["equal_answers"] == 2 and found["it"]["first_token_s"]["median"] == 0.5


def test_a_round_is_told_by_the_clock_and_by_the_servers_cpu(monkeypatch):
    now, cpu = iter([10.0, 14.0]), iter([1.0, 3.0])
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(Peer, "cpu_seconds", lambda _: next(cpu))
    asked = []

    async def ask_all(peer, prompts, n_tokens):
        asked.append((prompts, n_tokens))
        return [(0.5, "abcdef"), (1.5, "gh")]

    monkeypatch.setattr(serving, "ask_all", ask_all)
    one = peer("it")
    serving.measure_round(one, ["p", "q"], 7, SimpleNamespace(encode=list))
    assert asked == [(["p", "q"], 7)] and one.tokens_per_s == [2.0] and one.cpu_ms_a_token == [250.0]
    assert one.first_token_s == [1.0] and one.texts == ["abcdef", "gh"]


def test_the_first_token_is_the_first_text_of_a_stream(monkeypatch):
    now, given = iter([0.0, 1.0, 5.0, 9.0]), {}
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: next(now)))

    async def chunks():
        for text in ("", "a", "b"):
            yield SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))])
        yield SimpleNamespace(choices=[])

    async def create(**settings):
        given.update(settings)
        return chunks()

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    assert asyncio.run(serving.ask(client, "m", "Hi", 7)) == (1.0, "ab")
    assert given["max_tokens"] == 7 and given["temperature"] == 0 and given["stream"] and given["model"] == "m"


SPIN = "import time\nwhile time.process_time() < 0.06: pass\n"


def test_cpu_seconds_are_those_of_the_whole_session():
    """Of the server and of what it has started: their user and their system time, and nobody else's."""
    code = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {SPIN + 'time.sleep(99)'!r}])\n"
    process = subprocess.Popen([sys.executable, "-c", code + SPIN + "time.sleep(99)"], start_new_session=True)
    try:
        server, end = Peer("it", "", process), time.monotonic() + 60
        while server.cpu_seconds() < 0.1 and time.monotonic() < end:
            time.sleep(0.02)
        assert 0.1 <= server.cpu_seconds() < 5
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_system_time_counts(monkeypatch):
    fields = ["S", "1", "2", "77", *["0"] * 7, "300", "200", "0"]
    stat = SimpleNamespace(read_text=lambda: f"5 (a) b) {' '.join(fields)}")
    monkeypatch.setattr(serving, "Path", lambda _: SimpleNamespace(glob=lambda pattern: [stat]))
    ticks = os.sysconf("SC_CLK_TCK")
    for pid, seconds in ((77, 500 / ticks), (78, 0.0)):
        assert Peer("it", "", SimpleNamespace(pid=pid)).cpu_seconds() == seconds


def test_a_server_that_ends_is_told_at_once_with_its_log(tmp_path, monkeypatch):
    sleeps = itertools.count()

    def sleep(_):
        time.sleep(0.01)
        assert next(sleeps) < 3000, "it is waited for though it has ended"

    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    with pytest.raises(RuntimeError, match=r"it: .* does not serve:\nbroken"):  # noqa: SIM117
        with serving.start_server("it", "sh -c 'echo broken; exit 1'", tmp_path / "log"):
            pass


def test_the_processes_of_a_server_end_with_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "is_up", lambda url: (tmp_path / "up").exists())
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(0.01)))
    command = f"sh -c 'sleep 98 & echo $! > {tmp_path}/child; touch {tmp_path}/up; wait'"
    with serving.start_server("it", command, tmp_path / "log") as server:
        child = int((tmp_path / "child").read_text())
        os.kill(child, 0)
    assert server.process.returncode is not None
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the server's own process is still there")


def test_every_flag_reaches_the_servers_and_the_rounds(monkeypatch, tmp_path, call_main):
    started, rounds = {}, []
    tasks = [{"instruction": f"Name {i}.", "input": "" if i % 3 else "of these"} for i in range(8)]
    monkeypatch.setattr(serving, "read_seed_tasks", lambda: tasks)

    @contextmanager
    def start(name, command, log):
        started[name] = command
        yield peer(name)

    async def warm(peer, prompts, n):
        return []

    def measure(peer, prompts, n_tokens, tokenizer):
        rounds.append((peer.name, len(prompts), n_tokens))
        assert prompts == [task["instruction"] for task in tasks if not task["input"]]
        for figures in (peer.tokens_per_s, peer.cpu_ms_a_token, peer.first_token_s):
            figures.append(1.0)

    monkeypatch.setattr(serving, "start_server", start)
    monkeypatch.setattr(serving, "ask_all", warm)
    monkeypatch.setattr(serving, "measure_round", measure)
    monkeypatch.setattr(serving, "load_tokenizer", lambda path: None)
    flags = (
        "--model",
        "dir/mine",
        "--dtype",
        "fp32",
        "--requests",
        5,
        "--tokens",
        7,
        "--rounds",
        2,
        "--logs",
        tmp_path,
    )
    call_main(serving, *flags, "--peer", "it=serve --port {port} --x=y", "--json", tmp_path / "x")
    assert started["it"] == "serve --port {port} --x=y"
    for flag in ("--model dir/mine", "--dtype fp32", "--max-concurrency 5", "--port {port}"):
        assert flag in started["cria"]
    assert rounds == [("cria", 5, 7), ("it", 5, 7)] * 2
    found = json.loads((tmp_path / "x").read_text())
    assert found["dtype"] == "fp32" and found["model"] == "mine" and found["what"].startswith("5 requests")

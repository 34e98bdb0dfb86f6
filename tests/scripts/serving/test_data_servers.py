"""Datasets from real servers, whose ledgers are made here: what was sent again, what the usages cost, and the flags."""

import contextlib
import json
import signal
import socket
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_gen.api.ledger import Ledger
from scripts.serving import data_servers

OPTIONS = Namespace(max_usd=0.7, max_output_tokens=55, kill_after=3)


def record(ledger, request, tokens=(10, 20), finish="stop", text='{"a": 1}'):
    attempt, intent = ledger.prepare_intent(request, "0" * 64, "m", 1000)
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    body = {"choices": [{"message": {"content": text}, "finish_reason": finish}], "model": "m", "usage": usage}
    ledger.commit([intent, ledger.prepare_outcome(attempt, "answer", 200, json.dumps(body), tokens, 1)])


def test_each_server_is_started_with_its_model_port_and_length():
    models = {"llama.cpp": Path("m.gguf"), "llama-cpp-python": Path("p.gguf"), "transformers": Path("hf")}
    ours, theirs, hf = (data_servers.make_command(name, Path("bin"), models, 77) for name in models)
    assert ours[0] == "bin/python" and ours[1].endswith("llama_cpp_server.py")
    assert ours[2:] == ["m.gguf", "77", "1", str(data_servers.AT_ONCE), str(data_servers.LENGTH)]
    assert data_servers.AT_ONCE != data_servers.LENGTH
    assert theirs[:4] == ["bin/python", "-m", "llama_cpp.server", "--model"] and theirs[4] == "p.gguf"
    assert dict(zip(theirs[3::2], theirs[4::2], strict=True)) == {
        "--model": "p.gguf", "--host": "127.0.0.1", "--port": "77", "--n_ctx": str(data_servers.LENGTH),
        "--n_threads": "1",
    }  # fmt: skip
    assert hf == ["bin/transformers", "serve", "hf", "--host", "127.0.0.1", "--port", "77"]


def test_dollars_are_those_of_the_recorded_usages_at_their_own_price(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write_settings(seed=0, dialect={"format": "json_object"})
    for request, finish in enumerate(("stop", "stop", "length")):
        record(ledger, request, (1000, 10), finish)
    ledger.close()
    found = data_servers.describe_answers(tmp_path)
    assert found["usage_usd"] == pytest.approx(3 * (1000 * 0.1 + 10 * 0.4) / 1e6)
    assert found["whole"] == 2 and found["cut_by_the_limit"] == 1 and found["format"] == "json_object"
    assert data_servers.list_done(tmp_path) == {0, 1, 2} and len(data_servers.list_sent(tmp_path)) == 3


def test_a_port_is_one_that_any_user_may_take():
    ports = {data_servers.find_port() for _ in range(4)}
    assert min(ports) >= 1024
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.pop()))


def test_a_run_has_the_flags_that_are_asked_for(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(data_servers.subprocess, "Popen", lambda command, **_: started.append(command))
    data_servers.start_run("http://it/v1", "m", tmp_path, OPTIONS)
    given = dict(zip(started[0][3::2], started[0][4::2], strict=True))
    wanted = {"--base-url": "http://it/v1", "--model": "m", "--max-usd": "0.7", "--max-output-tokens": "55"}
    assert wanted.items() <= given.items() and given["--out"] == str(tmp_path)
    assert (given["--price-in"], given["--price-out"]) == data_servers.PRICES[1::2]


@pytest.mark.parametrize("again", [0, 1])
def test_the_kill_comes_with_answers_recorded_and_requests_in_flight(again, monkeypatch, tmp_path):
    """After --kill-after answers; a recorded request that is sent again counts, one that was in flight does not."""
    at, killed, runs = iter([{0}, {0, 1, 2, 3}, {0, 1, 2}]), [], []
    done, sent = [next(at)], [(i, i) for i in range(4)]  # too few; none in flight; three, and one in flight
    after = [*sent, (4, 3), (5, 1 if again else 4)]
    process = SimpleNamespace(
        poll=lambda: None, send_signal=killed.append, communicate=lambda: ("", None), returncode=0
    )  # fmt: skip
    list_done = lambda out: done[-1]  # noqa: E731
    list_sent = lambda out: after if len(runs) == 2 else sent  # noqa: E731
    start = lambda *_: runs.append(1) or process  # noqa: E731
    monkeypatch.setattr(data_servers, "list_done", list_done)
    monkeypatch.setattr(data_servers, "list_sent", list_sent)
    monkeypatch.setattr(data_servers, "start_run", start)
    monkeypatch.setattr(data_servers, "describe_answers", lambda out: {})
    monkeypatch.setattr(data_servers, "time", SimpleNamespace(sleep=lambda _: done.append(next(at))))
    (tmp_path / "run.json").write_text(json.dumps({"status": "cap", "counts": {}, "cost": {}}))
    found = data_servers.measure("url", "m", tmp_path, OPTIONS)
    assert killed == [signal.SIGKILL] and found["recorded_and_sent_again"] == again
    assert found["recorded_at_the_kill"] == 3 and found["in_flight_at_the_kill"] == 1


def test_a_server_is_there_when_it_answers_and_ends_with_the_measurement(monkeypatch, tmp_path):
    tries, ended = [], []

    def open_url(url, timeout):
        tries.append(url)
        if len(tries) < 3:
            raise ConnectionRefusedError
        return SimpleNamespace(read=lambda: b"")

    process = SimpleNamespace(poll=lambda: None, kill=lambda: ended.append("kill"), wait=lambda: ended.append("wait"))
    monkeypatch.setattr(data_servers.urllib.request, "urlopen", open_url)
    monkeypatch.setattr(data_servers.subprocess, "Popen", lambda *_, **__: process)
    monkeypatch.setattr(data_servers, "time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 1.0))
    with data_servers.start_server(["it"], 7, tmp_path / "log") as url:
        assert url == "http://127.0.0.1:7/v1" and len(tries) == 3 and not ended
    assert ended == ["kill", "wait"]


def test_one_server_alone_leaves_the_figures_of_the_others(monkeypatch, tmp_path, call_main):
    right = {"recorded_and_sent_again": 0, "usage_usd": 0.1, "cost": {"spent_usd": 0.1}}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"servers": {"transformers": right | {"version": "old"}}}))
    monkeypatch.setattr(data_servers, "export_models", lambda _: {name: Path(name) for name in data_servers.PACKAGES})
    monkeypatch.setattr(data_servers, "start_server", contextlib.contextmanager(lambda *_: iter(["u"])))
    versions = dict.fromkeys(data_servers.VERSIONED.values(), "new")
    monkeypatch.setattr(data_servers, "make_environment", lambda *_: (Path("bin"), versions))
    monkeypatch.setattr(data_servers, "measure", lambda *_: dict(right))
    assert call_main(data_servers, "--json", path, "--only", "llama.cpp") == 0
    found = json.loads(path.read_text())["servers"]
    assert {name: one["version"].split()[-1] for name, one in found.items()} == {
        "transformers": "old",
        "llama.cpp": "new",
    }

"""Measurements of servers end with 1 where anything is not as it must be. Servers and their clients are stand-ins."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.serving import crowd, data_servers, server

RIGHT = {client.__name__: sorted(may)[0] for client, _, may in crowd.KINDS}


@contextlib.contextmanager
def stand_in(*_):
    yield SimpleNamespace(url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("changed", "code"),
    [({}, 0), ({"take_answer": crowd.BUSY}, 0), ({"take_answer": "500"}, 1), ({"take_stream": "answer"}, 1),
     ({"come_from_elsewhere": "answer"}, 1), ({"never_finish": "ConnectionResetError"}, 1)],
)  # fmt: skip
def test_a_client_that_gets_what_its_kind_does_not_expect_is_told(changed, code, monkeypatch, capsys):
    async def watch(served, n, at_once, advance):
        got = [{"kind": kind, "got": what, "n": 1} for kind, what in (RIGHT | changed).items()]
        return {"got": got, "held": [{"resident_mb": 1.0, "threads": 2, "files": 3}] * 3}

    monkeypatch.setattr(crowd, "serve_model", stand_in)
    monkeypatch.setattr(crowd, "watch_crowd", watch)
    monkeypatch.setattr(sys, "argv", ["crowd"])
    assert crowd.main() == code and capsys.readouterr().out.count("WRONG") == code


@pytest.mark.parametrize(
    ("found", "code"),
    [({}, 0), ({"recorded_and_sent_again": 1}, 1), ({"usage_usd": 0.0021}, 1), ({"usage_usd": 0.0019}, 1)],
)
def test_a_request_that_is_sent_again_and_a_bill_of_other_usages_are_told(found, code, monkeypatch, tmp_path):
    """Of each server, also where the others are right."""
    right = {"recorded_and_sent_again": 0, "usage_usd": 0.002, "cost": {"spent_usd": 0.002}}
    of_last = list(data_servers.PACKAGES)[-1]
    folder = {name: Path(name) for name in data_servers.PACKAGES}
    monkeypatch.setattr(data_servers, "export_models", lambda _: folder)
    monkeypatch.setattr(data_servers, "start_server", stand_in)
    versions = dict.fromkeys(data_servers.VERSIONED.values(), "1.0")
    monkeypatch.setattr(data_servers, "make_environment", lambda *_: (Path("bin"), versions))
    measure = lambda url, model, out, options: right | (found if model == of_last else {})  # noqa: E731
    monkeypatch.setattr(data_servers, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["data_servers", "--json", str(tmp_path / "found.json")])
    assert data_servers.main() == code
    assert json.loads((tmp_path / "found.json").read_text())["servers"].keys() == data_servers.PACKAGES.keys()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("trap 'trap - TERM; kill -TERM $$' TERM", None), ("trap 'exit 0' TERM", "ended with 0"),
        ("trap 'echo broken >&2; exit 1' TERM", "ended with 1:\nbroken"), ("exit 1", "ended before it served"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_begin_or_does_not_end_by_sigterm_is_told(script, told, monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\n{script}\necho serving at http://127.0.0.1:1\nwhile :; do sleep 0.01; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(server, "sys", SimpleNamespace(executable=str(program)))
    refused = pytest.raises(RuntimeError, match=told) if told else contextlib.nullcontext()
    with refused, server.serve_model((), tmp_path / "log") as served:
        assert served.url == "http://127.0.0.1:1"


def test_a_server_that_ends_before_it_serves_is_waited_for(monkeypatch, tmp_path):
    """Else its log would not be whole."""
    calls = []

    def start(command, stdout, stderr, **how):
        process = SimpleNamespace(stdout=SimpleNamespace(readline=lambda: "no address"), pid=7)
        process.wait = lambda: calls.append((stderr.write("the reason") and stderr.flush()) or "wait")
        assert command[1:] == ["-u", "-m", "engine.serve", "--port", "0", "--model", "m"]
        return process

    monkeypatch.setattr(server.subprocess, "Popen", start)
    refused = pytest.raises(RuntimeError, match=r"engine\.serve ended before it served:\nthe reason")
    with refused, server.serve_model(("--model", "m"), tmp_path / "log"):
        pass
    assert calls == ["wait"]

"""A server that a measurement starts: how it begins and ends, and what its process holds."""

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.serving import server
from scripts.serving.server import Served, serve_model


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


def test_a_server_is_started_with_the_flags_and_the_environment_given(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/bash\necho "$MINE $@" > {tmp_path}/told\necho serving at http://127.0.0.1:1\n'
        "while :; do sleep 0.01; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with serve_model(("--model", "x"), tmp_path / "log", {"MINE": "yes"}) as served:
        assert served.pid > 0
    words = (tmp_path / "told").read_text().split()
    assert words[0] == "yes" and words[-2:] == ["--model", "x"] and "--port" in words


def test_what_a_process_holds_is_its_own():
    own = Served("", os.getpid())
    other = Served("", 1)
    assert own.n_threads() >= 1 and own.resident_mb() > other.resident_mb() > 0
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert own.resident_mb() < 0.9 * virtual and other.n_threads() == len(os.listdir("/proc/1/task"))


def test_megabytes_are_of_a_million_bytes(monkeypatch, tmp_path):
    (tmp_path / "statm").write_text("900 500 7 8\n")
    monkeypatch.setattr(server, "Path", lambda path: {"/proc/7/statm": tmp_path / "statm"}[path])
    monkeypatch.setattr(server.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}[name])
    assert Served("", 7).resident_mb() == 500 * 4096 / 1e6

"""Other people's clients: what one says, what it leaves when it fails, and what ends with 1."""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.serving import clients
from scripts.serving.server import Served, serve_model

RIGHT = {"feature": "plain", "right": True, "got": "x"}


@pytest.mark.parametrize("code", [0, 1, 3, -9])
def test_a_program_that_fails_is_told_after_what_it_has_said(code):
    end = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
    program = f"import json, os, sys; print(json.dumps({RIGHT}), flush=True); sys.stderr.write('broken'); {end}"
    told = clients.run_client("it", [sys.executable, "-Sc", program])
    assert told[0] == {"client": "it", **RIGHT} and len(told) == 1 + bool(code)
    assert not code or (not told[1]["right"] and (told[1]["got"] == "broken" or code < 0))


@pytest.mark.parametrize(("wrong", "code"), [((), 0), (("openai",), 1), (("web pages", "openai"), 1)])
def test_one_wrong_feature_makes_the_exit_code(wrong, code, monkeypatch, tmp_path, call_main):
    given = []

    @contextlib.contextmanager
    def serve(flags, log):
        given.append(flags)
        yield SimpleNamespace(url="http://127.0.0.1:1")

    def run(name, command):
        assert command[-1] == "http://127.0.0.1:1"
        return [{**RIGHT, "client": name}, {**RIGHT, "client": name, "right": name not in wrong}]

    versions = {"openai": "1", "langchain-openai": "2", "httpx": "3"}
    monkeypatch.setattr(clients, "make_environment", lambda *_: (tmp_path, versions))
    monkeypatch.setattr(clients.shutil, "which", lambda _: None)
    monkeypatch.setattr(clients, "serve_model", serve)
    monkeypatch.setattr(clients, "run_client", run)
    assert call_main(clients, "--model", "mine", "--json", tmp_path / "x") == code
    assert given[0][:2] == ("--model", "mine")
    found = json.loads((tmp_path / "x").read_text())
    assert found["versions"] == {"openai": "1", "langchain-openai": "2"} and len(found["lines"]) == 6


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

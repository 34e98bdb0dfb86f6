"""python -m engine.serve as a user runs it: from the first line to the signal that ends it."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from types import SimpleNamespace

import pytest

from data_gen.judging.humans import read_votes
from engine import serve
from engine.base.errors import UsageError, run_main
from engine.serve import ServeConfig, load_services, main
from engine.serving import listen
from engine.serving.guard import LOOPBACK, Access
from engine.serving.model_service import Limits
from tests.helpers.comparisons import read_round, send
from tests.helpers.forks import Started
from tests.helpers.run import ROOT, forked
from tests.helpers.small_model import small_model


def test_it_serves_until_a_signal(tmp_path):
    serve = subprocess.Popen(
        [sys.executable, "-m", "engine.serve", "--model", str(small_model()), "--port", "0", "--max-length", "100"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log: list[str] = []
    try:
        url = re.search(r"at (http://127\.0\.0\.1:\d+)$", serve.stdout.readline())[1]
        reader = threading.Thread(target=lambda: log.extend(serve.stderr))
        reader.start()
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()
        with urllib.request.urlopen(f"{url}/v1/chat/completions", body) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 3
        serve.send_signal(signal.SIGTERM)
        assert serve.wait() in (-signal.SIGTERM, 143)
    finally:
        serve.kill()
        serve.wait()
    reader.join()
    assert "Traceback" not in "".join(log) and any("POST /v1/chat/completions 200" in line for line in log)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "lets other machines in; name a key by --api-key-env"),
        (["--port", "70000"], "--port wants 0 to 65535"),
        (["--max-queue", "-1"], "--max-queue wants 0 or more"),
        (["--api-key-env", "NO_SUCH_VARIABLE_HERE"], "this environment variable is not set"),
        (["--compare-with", "a", "b", "c"], "--compare-with wants a model or two files of answers, got 3 names"),
        (["--compare-with", "a.json"], "--compare-with a.json is a file of answers; give two, or a model"),
        (["--prompts", "p.txt"], "--prompts goes with --compare-with MODEL"),
        (["--compare-with", "a.json", "b.json", "--prompts", "p.txt"], "--prompts goes with --compare-with MODEL"),
        (
            ["--model", "out/x", "--compare-with", "out/x/", "--votes", "{tmp}/v"],
            "out/x is named twice; name another model or adapter",
        ),
        (["--compare-with", "out/x", "--votes", "{tmp}/none/v"], "cannot be written"),
    ],
)
def test_what_cannot_be_served_is_told(capsys, tmp_path, words, told):
    try:
        code = run_main(main, [word.format(tmp=tmp_path) for word in words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_other_machines_want_a_key_and_ports_are_those_there_are(host):
    with pytest.raises(ValueError, match=f"--host {host} lets other machines in; name a key by --api-key-env"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, api_key_env="K", port=0).port == 0 and ServeConfig(port=65535).host in LOOPBACK
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="--port wants 0 to 65535"):
            ServeConfig(port=port)


def test_a_key_that_is_empty_is_none(monkeypatch):
    for value in ("", " ", "\n"):
        monkeypatch.setenv("A_KEY", value)
        with pytest.raises(UsageError, match="--api-key-env A_KEY: this environment variable is not set"):
            serve.read_key("A_KEY")
    monkeypatch.setenv("A_KEY", " k3y\n")
    assert (serve.read_key("A_KEY"), serve.read_key("")) == ("k3y", None)


@pytest.mark.parametrize(("asked", "found"), [(60, 60), (512, 512), (100_000, 512)])
def test_no_answer_goes_past_the_models_positions(asked, found):
    (service,) = load_services(ServeConfig(model=str(small_model()), device="cpu", max_length=asked, max_concurrency=1))
    assert service.limits.max_length == service.scheduler.max_length == found


def test_who_may_use_the_server_and_how_long_is_as_the_flags_say(monkeypatch):
    served = []
    monkeypatch.setattr(listen, "listen", lambda *what: served.append(what))
    monkeypatch.setattr(serve, "load_services", lambda config: [])
    monkeypatch.setenv("SOME_KEY", " k3y\n")
    words = ["--api-key-env", "SOME_KEY", "--max-body-bytes", "99", "--timeout", "2.5", "--port", "81"]
    for host, hosts in (("::1", LOOPBACK), ("0.0.0.0", ())):
        assert run_main(main, [*words, "--host", host]) == 0
        server, *where = served.pop()
        assert (server.access, where) == (Access(hosts, "k3y", 99, 2.5), [host, 81])


def test_what_is_asked_of_both_models_is_what_the_shorter_one_takes(tmp_path):
    compare = serve.prepare_comparison(ServeConfig(compare_with=("b",), votes=str(tmp_path / "v")))
    services = [SimpleNamespace(name=name, limits=Limits(max_length=n)) for name, n in (("a", 90), ("b", 60))]
    made = [compare(some, Access()) for some in (services, services[::-1])]
    assert [one.longest for one in made] == [60, 60] and [one.names for one in made] == [("a", "b"), ("b", "a")]
    made[0].votes.close()


def test_a_port_in_use_is_told(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert run_main(main, ["--model", str(small_model()), "--port", port, "--max-length", "50"]) == 1
    assert f"--port {port}: cannot be listened on" in capsys.readouterr().err


SERVE = "import sys; from engine import serve; from engine.base.errors import run_main\nsys.exit(run_main(serve.main))"


@contextlib.contextmanager
def serving(*words):
    """Run engine.serve, and yield (its process, its address)."""
    serve = Started(SERVE, "--port", "0", *words)
    try:
        yield serve, re.search(r" at (http://127\.0\.0\.1:\d+)\n", serve.read_until("\n"))[1]
    finally:
        serve.kill()
        serve.communicate()


def test_the_command_that_a_run_ends_with_opens_its_model(tmp_path, rows_file):
    words = ("--model", small_model(), "--data", rows_file, "--max-steps", 1, "--global-batch-size", 2)
    said = forked("finetune", *words, "--out", tmp_path / "a model").stdout.splitlines()[-1]
    told, _, command = said.partition(": ")
    assert told == "talk to it" and shlex.split(command)[1:3] == ["-m", "engine.serve"]
    with serving(*shlex.split(command)[3:], "--max-length", "50") as (_, url):
        assert [one["id"] for one in send(f"{url}/v1/models")[1]["data"]] == ["a model"]
        assert "<title>Cria</title>" in (page := send(url)[1]) and '<a href="/compare">' not in page


def post(url, **body):
    return send(url, json.dumps({"voter": "v1"} | body).encode())[1]


def test_votes_on_two_files_outlive_sigkill(tmp_path):
    files = [tmp_path / "davinci.json", tmp_path / "alpaca.json"]
    for file in files:
        file.write_text(json.dumps([{"instruction": f"Q{n}", "output": f"{file.stem} {n}"} for n in range(3)]))
    votes, told = tmp_path / "votes.jsonl", []
    for kept in (0, 2):  # the second server goes on where the first was killed
        with serving("--compare-with", *files, "--votes", votes) as (serve, url):
            page = send(url)[1]
            assert "Which answer is better?" in page and '<a href="/">' not in page  # no model was loaded
            listed = post(f"{url}/compare/questions")["questions"]
            assert [one["is_done"] for one in listed] == [True] * kept + [False] * (3 - kept)
            for one in listed[kept:][:2]:
                id, *shown = read_round(post(f"{url}/compare/ask", number=one["number"]))
                models = post(f"{url}/compare/vote", round=id, vote="A")["models"]
                assert [text.split()[0] for text in shown] == models
                told.append(models)
            serve.kill()
            serve.communicate()
        assert [list(vote.shown) for vote in read_votes(votes)] == told
    assert len(told) == 3


def test_two_models_are_compared_and_answer_by_their_names(tmp_path):
    (tmp_path / "other").symlink_to(small_model())
    (tmp_path / "prompts.txt").write_text("Name a fruit.\n")
    words = ("--model", small_model(), "--compare-with", tmp_path / "other", "--max-length", "60")
    with serving(*words, "--votes", tmp_path / "v.jsonl", "--prompts", tmp_path / "prompts.txt") as (_, url):
        names = [one["id"] for one in send(f"{url}/v1/models")[1]["data"]]
        assert names == [small_model().name, "other"]
        assert '<a href="/compare">' in send(url)[1] and '<a href="/">' in send(f"{url}/compare")[1]
        (one,) = post(f"{url}/compare/questions")["questions"]
        text = post(f"{url}/compare/ask", instruction=one["instruction"], max_tokens=5, temperature=0)
        id, a, b = read_round(text)
        assert a == b  # the same model twice
        assert sorted(post(f"{url}/compare/vote", round=id, vote="tie")["models"]) == sorted(names)


def test_without_a_comparison_its_page_says_how_to_begin_one(tmp_path):
    with serving("--model", small_model(), "--max-length", "50") as (_, url):
        status, text = send(f"{url}/compare")
    assert status == 404 and "start engine.serve with --compare-with" in text
    assert not (ROOT / "votes.jsonl").exists()

"""Datasets from real servers, whose ledgers are made here: what was sent again, what the usages cost, and the flags."""

import contextlib
import json
import re
import runpy
import signal
import socket
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from data_gen.api.ledger import Ledger
from scripts.serving import data_servers
from tests.helpers.calls import Calls

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


def test_a_run_is_started_with_all_its_flags(monkeypatch, tmp_path):
    calls = Calls()
    monkeypatch.setattr(data_servers.subprocess, "Popen", calls.stand_in("Popen", 7))
    assert data_servers.start_run("http://it/v1", "m", Path("out"), OPTIONS) == 7
    words = (
        "-m data_gen.generate --base-url http://it/v1 --model m --price-in 0.1 --price-out 0.4 --rows 1000 "
        "--max-usd 0.7 --tasks-per-request 3 --examples 1 --max-output-tokens 55 --concurrency 4 --timeout 900 "
        "--patience 1000 --out out"
    )
    command = [sys.executable, *words.split()]
    assert calls.lines == [f"Popen({command}, cwd={data_servers.ROOT!r}, stdout=-1, stderr=-2, text=True)"]


def test_models_are_written_as_each_server_reads_them(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(data_servers.subprocess, "run", calls.stand_in("run"))
    found = data_servers.export_models(Path("f"))
    gguf, hf = Path("f/model.gguf"), Path("f/model")
    assert found == {"llama.cpp": gguf, "transformers": hf, "llama-cpp-python": gguf}
    end = f"cwd={data_servers.ROOT!r}, check=True)"
    python = [sys.executable, "-m", "engine.export"]
    assert calls.lines == [
        f"run({[*python, '--layout', 'gguf', '--gguf-type', 'q8_0', '--out', 'f/model.gguf']}, {end}",
        f"run({[*python, '--out', 'f/model']}, {end}",
    ]  # fmt: skip


@pytest.mark.parametrize(("ended", "late"), [(1, False), (None, True)])
def test_a_server_that_never_comes_is_told_with_its_log(ended, late, monkeypatch, tmp_path):
    """It runs in the log's folder, without our path."""
    calls, moments = Calls(), iter([0.0, 600.0, 600.5] if late else [0.0] * 9)
    process = calls.thing("process", poll=ended, kill=None, wait=None)

    def start(command, stdout, **how):
        stdout.write("x" * 3000 + "why")
        how["env"] = {
            name: value for name, value in how["env"].items() if name in ("PYTHONPATH", "HF_HUB_OFFLINE", "A")
        }
        calls.lines.append(f"{command} {how}")
        return process

    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("A", "kept")
    monkeypatch.setattr(data_servers.subprocess, "Popen", start)
    monkeypatch.setattr(
        data_servers.urllib.request, "urlopen", lambda url, timeout: (_ for _ in ()).throw(TimeoutError)
    )
    times = SimpleNamespace(monotonic=lambda: next(moments), sleep=calls.stand_in("sleep"))
    monkeypatch.setattr(data_servers, "time", times)
    with pytest.raises(RuntimeError) as told, data_servers.start_server(["it", "x"], 7, tmp_path / "log"):
        pass
    assert str(told.value) == f"it does not serve:\n{'x' * 1997}why"
    env = {"A": "kept", "HF_HUB_OFFLINE": "1"}
    first, *rest = calls.lines
    assert first.startswith("['it', 'x'] {'stderr': -2, 'cwd': ") and all(
        f"'{k}': '{v}'" in first for k, v in env.items()
    )
    assert f"PosixPath('{tmp_path}')" in first and "PYTHONPATH" not in first
    polls = ["process.poll()", "sleep(0.5)", "process.poll()"] if late else ["process.poll()"]
    assert rest == [*polls, "process.kill()", "process.wait()"]


def test_a_ledger_that_is_not_there_yet_has_no_rows(tmp_path):
    assert data_servers.query(tmp_path, "SELECT 1") == []
    (tmp_path / "ledger.sqlite").touch()
    assert data_servers.query(tmp_path, "SELECT * FROM sent") == []
    assert data_servers.query(tmp_path, "SELECT 1, 2") == [(1, 2)]


def test_refusals_are_told_without_paths_and_answers_by_whether_they_keep_the_format(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write_settings(seed=0, dialect={"format": "json_object"})
    record(ledger, 0, (1000, 10), text="no JSON")
    record(ledger, 1, (10, 1000), text='{"tasks": []}')
    record(ledger, 2, (1, 1), "length")
    record(ledger, 5, (0, 0), "content_filter", text="no JSON")
    for request, said in ((3, f"broke in /home/me/a.py at /b {'x' * 400}"), (4, "again")):
        attempt, intent = ledger.prepare_intent(request, "0" * 64, "m", 1000)
        ledger.commit([intent, ledger.prepare_outcome(attempt, "failed", 400 + request, said, (0, 0), 1)])
    ledger.close()
    found = data_servers.describe_answers(tmp_path)
    kept = sum(
        data_servers.keeps_format(text, data_servers.FORMATS["json_object"]) for text in ("no JSON", '{"tasks": []}')
    )
    assert kept < 2 and found == {
        "format": "json_object", "usage_usd": pytest.approx((1011 * 0.1 + 1011 * 0.4) / 1e6), "cut_by_the_limit": 1,
        "whole": 3, "whole_in_the_format": kept,
        "refusals": [(403, f"broke in PATH at /b {'x' * 271}"), (404, "again")],
    }  # fmt: skip
    assert data_servers.list_done(tmp_path) == {0, 1, 2, 5}
    assert sorted(data_servers.list_sent(tmp_path)) == list(enumerate((0, 1, 2, 5, 3, 4), 1))


def test_lines_of_progress_and_of_paths_are_not_told():
    said = "1,000 of 2,000 rows · 3\nwritten to /x/dataset.json\nsaid 1 of 2 rows · 3\n/x/ledger.sqlite\nthe end\n"
    assert data_servers.drop_progress(said) == ["said 1 of 2 rows · 3", "the end"]


def test_a_run_that_ends_before_its_kill_is_told(monkeypatch, tmp_path):
    process = SimpleNamespace(poll=lambda: 0, stdout=SimpleNamespace(read=lambda: "what it said"))
    monkeypatch.setattr(data_servers, "start_run", lambda *_: process)
    monkeypatch.setattr(data_servers, "time", SimpleNamespace(sleep=lambda _: pytest.fail("it is waited for")))
    with pytest.raises(RuntimeError, match="the run ended before it was killed:\nwhat it said"):
        data_servers.measure("url", "m", tmp_path, OPTIONS)


def test_what_came_of_a_run_is_told_whole(monkeypatch, tmp_path):
    """Of both of its processes: what was told before the kill, and how the second ended."""
    calls, said = Calls(), iter([("9 of 9 rows · x\nfirst\n", None), ("second\n", None)])
    process = calls.thing("process", poll=None, send_signal=None, communicate=lambda: next(said))
    process.returncode = 5
    (tmp_path / "run.json").write_text('{"status": "cap", "counts": {"a": 1}, "cost": {"b": 2}, "more": 3}')
    for name, result in {
        "start_run": process, "list_done": {0, 1, 2}, "list_sent": [(1, 0), (2, 1), (3, 2), (4, 3)],
        "describe_answers": {"format": "f"},
    }.items():  # fmt: skip
        monkeypatch.setattr(data_servers, name, calls.stand_in(name, result))
    assert data_servers.measure("url", "m", tmp_path, OPTIONS) == {
        "told_before_the_kill": ["first"], "told_after": ["second"], "exit_code": 5, "status": "cap",
        "counts": {"a": 1}, "cost": {"b": 2}, "recorded_at_the_kill": 3, "in_flight_at_the_kill": 1,
        "recorded_and_sent_again": 0, "format": "f",
    }  # fmt: skip
    folder = f"({tmp_path!r})"
    run = f"start_run('url', 'm', {tmp_path!r}, {OPTIONS!r})"
    assert [line.replace(folder, "") for line in calls.lines] == [
        run, "list_done", "list_sent", "list_done", f"process.send_signal({signal.SIGKILL!r})", "process.communicate()",
        "list_done", "list_sent", run, "process.communicate()", "list_sent", "describe_answers",
    ]  # fmt: skip


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    calls = Calls()
    monkeypatch.setattr(data_servers.tempfile, "TemporaryDirectory", calls.folder)
    models = {name: Path(name) for name in data_servers.PACKAGES}
    versions = {package: f"of {package}" for package in data_servers.VERSIONED.values()}
    ports = iter([7, 8, 9])
    found = lambda url, model, out, options: {  # noqa: E731
        "recorded_and_sent_again": 0, "usage_usd": 0.25, "cost": {"spent_usd": 0.25}, "model": model
    }  # fmt: skip
    for name, result in {
        "export_models": models, "make_environment": (Path("bin"), versions), "find_port": lambda: next(ports),
        "make_command": "command", "start_server": contextlib.nullcontext("http://it"), "measure": found,
    }.items():  # fmt: skip
        monkeypatch.setattr(data_servers, name, calls.stand_in(name, result))
    text = tell(data_servers, "--max-usd", 0.5, "--max-output-tokens", 9, "--kill-after", 3, "--environments", "kept")
    log = re.sub(r"json='[^']*'", "json=FILE", calls.text())
    assert text + "\n" + log == snapshot


def test_llama_cpps_server_has_the_numbers_of_its_command(monkeypatch, capsys):
    made = []
    part = lambda: SimpleNamespace(n_threads=None)  # noqa: E731
    package = ModuleType("xllamacpp")
    package.CommonParams = lambda: SimpleNamespace(model=SimpleNamespace(), cpuparams=part(), cpuparams_batch=part())
    package.Server = lambda params: made.append(params) or SimpleNamespace(listening_address="http://it")
    monkeypatch.setitem(sys.modules, "xllamacpp", package)
    monkeypatch.setattr(signal, "pause", lambda: made.append("it waits"))
    monkeypatch.setattr(sys, "argv", ["llama_cpp_server.py", "a.gguf", "77", "2", "4", "256"])
    runpy.run_path(str(data_servers.ROOT / "scripts" / "serving" / "llama_cpp_server.py"))
    params, last = made
    assert last == "it waits" and capsys.readouterr().out == "http://it\n"
    assert (params.model.path, params.hostnames, params.port) == ("a.gguf", ["127.0.0.1"], 77)
    assert (params.n_parallel, params.n_ctx) == (4, 4 * 256)
    assert params.cpuparams.n_threads == params.cpuparams_batch.n_threads == 2


def test_flags_have_defaults(defaults_of):
    assert defaults_of(data_servers, "--json", "x") == {
        "json": "x", "environments": None, "only": None, "max_usd": 0.0025, "max_output_tokens": 200, "kill_after": 2
    }  # fmt: skip


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
    served = lambda *_: contextlib.nullcontext("http://127.0.0.1:1")  # noqa: E731
    monkeypatch.setattr(data_servers, "start_server", served)
    versions = dict.fromkeys(data_servers.VERSIONED.values(), "1.0")
    monkeypatch.setattr(data_servers, "make_environment", lambda *_: (Path("bin"), versions))
    measure = lambda url, model, out, options: right | (found if model == of_last else {})  # noqa: E731
    monkeypatch.setattr(data_servers, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["data_servers", "--json", str(tmp_path / "found.json")])
    assert data_servers.main() == code
    assert json.loads((tmp_path / "found.json").read_text())["servers"].keys() == data_servers.PACKAGES.keys()

"""Many requests at once: what is asked of each server, and what its answers, its time and its CPU seconds become."""

import asyncio
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.speed import serving
from scripts.speed.serving import Peer
from tests.helpers.calls import Calls
from tests.helpers.clocks import Ticks


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


def test_the_whole_measurement(monkeypatch, tell, snapshot, tmp_path, capsys):
    """What every server is started with and asked, the file, and the lines of both outputs."""
    Ticks(monkeypatch, serving)
    calls, cpu = Calls(), itertools.count(1)
    tasks = [{"instruction": f"Name {i}.", "input": "" if i % 3 else "of these"} for i in range(8)]
    monkeypatch.setattr(serving, "read_seed_tasks", lambda: tasks)
    monkeypatch.setattr(Peer, "cpu_seconds", lambda _: next(cpu) ** 2 / 64)
    monkeypatch.setattr(Peer, "label", property(lambda peer: peer.name), raising=False)

    @contextmanager
    def start(name, command, log):
        yield peer(name)
        calls.lines.append(f"{name} ends")

    async def answer(peer, prompts, n):
        return [(0.25 * i, f"{peer.name if i == 2 else ''} {prompt}") for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(serving, "start_server", calls.stand_in("start", start))
    monkeypatch.setattr(serving, "ask_all", calls.stand_in("ask", answer))
    tokenizer = SimpleNamespace(label="tokenizer", encode=str.split)
    monkeypatch.setattr(serving, "load_tokenizer", calls.stand_in("load_tokenizer", tokenizer))
    flags = ("--model", "dir/mine", "--dtype", "fp32", "--requests", 3, "--tokens", 7, "--rounds", 2)
    text = tell(
        serving, *flags, "--logs", tmp_path / "logs", "--peer", "it=serve --port {port} --x=y", "--peer", "the other=z"
    )
    assert text == snapshot and (tmp_path / "logs").is_dir()
    log = calls.text().replace(str(tmp_path), "FOLDER").replace(sys.executable, "PYTHON")
    assert log == snapshot(name="calls")


def test_rounds_are_told_while_they_are_measured(monkeypatch, capsys):
    Ticks(monkeypatch, serving)
    monkeypatch.setattr(Peer, "cpu_seconds", lambda _: serving.time.process_time())

    async def answer(peer, prompts, n):
        return [(0.5, "a b c")]

    monkeypatch.setattr(serving, "ask_all", answer)
    serving.measure_round(peer("it"), ["p"], 7, SimpleNamespace(encode=str.split))
    out, err = capsys.readouterr()
    assert not out and err == "it             3 tokens in 16.4 s, 166.67 CPU ms a token\n"


def test_all_prompts_are_asked_at_once_of_the_first_model(monkeypatch):
    made, waiting = [], []

    class Client:
        def __init__(self, **settings):
            made.append(settings)
            models = [SimpleNamespace(id="first"), SimpleNamespace(id="second")]

            async def list_models():
                return SimpleNamespace(data=models)

            self.models = SimpleNamespace(list=list_models)

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            made.append("closed")

    async def ask(client, model, prompt, n_tokens):
        waiting.append(prompt)
        await asyncio.sleep(0)
        assert len(waiting) == 3  # all have begun
        return model, prompt, n_tokens

    monkeypatch.setattr(serving.openai, "AsyncOpenAI", Client)
    monkeypatch.setattr(serving, "ask", ask)
    found = asyncio.run(serving.ask_all(Peer("it", "http://h:1", None), ["a", "b", "c"], 7))
    assert found == [("first", prompt, 7) for prompt in "abc"]
    assert made == [{"base_url": "http://h:1/v1", "api_key": "none", "timeout": 1800, "max_retries": 0}, "closed"]


@pytest.mark.parametrize(
    ("answer", "up"),
    [(b'{"data": [1]}', True), (b'{"data": []}', False), (b"{}", False), (b"no json", False),
     (ConnectionResetError(), False), (TimeoutError(), False), (urllib.error.URLError("refused"), False)],
)  # fmt: skip
def test_a_server_is_up_once_it_lists_a_model(answer, up, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append((url, timeout))
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(serving.urllib.request, "urlopen", urlopen)
    assert serving.is_up("http://h:1") is up and asked == [("http://h:1/v1/models", 10)]


def test_a_server_that_is_never_up_is_ended_with_its_last_words(monkeypatch, tmp_path):
    """Its command has a free port; what it wrote to both outputs is in its log."""
    calls, process = Calls(), SimpleNamespace(pid=77, poll=lambda: None, wait=lambda: None)
    moments = iter([0.0, 299.0, 300.0, 300.5])
    process.wait = calls.stand_in("wait")

    def start(words, stdout, stderr, start_new_session):
        assert stdout is stderr and start_new_session and words[:2] == ["serve", "--port"] and words[3] == "a b"
        assert int(words[2]) > 1023
        stdout.write("x" * 3000 + "last")
        return process

    monkeypatch.setattr(serving.subprocess, "Popen", start)
    monkeypatch.setattr(serving.os, "killpg", calls.stand_in("killpg"))
    monkeypatch.setattr(serving, "is_up", lambda url: calls.lines.append(re.sub(r"\d{4,}", "PORT", url)))
    times = SimpleNamespace(monotonic=lambda: next(moments), sleep=calls.stand_in("sleep"))
    monkeypatch.setattr(serving, "time", times)
    with pytest.raises(RuntimeError) as raised:  # noqa: SIM117
        with serving.start_server("it", "serve --port {port} 'a b'", tmp_path / "log"):
            pass
    assert re.fullmatch(r"it: serve --port \d+ 'a b' does not serve:\nx{1996}last", str(raised.value))
    url = "http://127.0.0.1:PORT"
    assert calls.lines == [
        url, "sleep(0.5)", url, "sleep(0.5)", url, f"killpg(77, {signal.SIGTERM!r})", "wait()"
    ]  # fmt: skip


def test_flags_have_defaults(defaults_of):
    assert defaults_of(serving, "--json", "x", "--model", "m") == {
        "json": "x", "model": "m", "dtype": "bf16", "peer": [], "requests": 32, "tokens": 48, "rounds": 3,
        "logs": Path("out/serving"),
    }  # fmt: skip

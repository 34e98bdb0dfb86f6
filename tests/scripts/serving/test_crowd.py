"""A crowd against a stand-in for the server: what each client sends, and how many come at once."""

import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from scripts.serving import crowd
from scripts.serving.crowd import KINDS, LARGEST, Door, send_crowd
from tests.helpers.calls import Calls


async def visit(client, answer):
    """Return what a client got of a server that answers with these bytes, and what it sent: head, body, how it left."""
    sent = []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        try:
            body = await asyncio.wait_for(reader.readexactly(length), 0.3)
            end = "whole"
        except asyncio.IncompleteReadError as error:
            body, end = error.partial, "gone"
        except ConnectionResetError:
            body, end = b"", "gone"
        except asyncio.TimeoutError:  # of its own class before Python 3.11
            body, end = b"", "waits"
        sent.append((head, body, end))
        writer.write(answer)
        if client in (crowd.vanish_in_a_stream, crowd.vanish_while_waiting):  # an answer that does not end by itself
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
    try:
        got = await asyncio.wait_for(client(Door(server.sockets[0].getsockname()[1]), random.Random(1)), 5)
        while not sent:
            await asyncio.sleep(0.01)
    finally:
        server.close()
    return got, sent[0]


def answer(status, body=b"{}"):
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    ("client", "reply", "got"),
    [
        (crowd.take_answer, answer(200, b'{"finish_reason": "stop"}'), "answer"),
        (crowd.take_answer, answer(200), "no answer"), (crowd.take_answer, answer(503), "503"),
        (crowd.take_stream, answer(200, b"data: [DONE]\n\n"), "stream"), (crowd.take_stream, answer(200), "200"),
        (crowd.take_stream, answer(500, b"data: [DONE]\n\n"), "500"),
        (crowd.send_too_much, answer(413), "413"), (crowd.send_no_json, answer(400), "400"),
        (crowd.ask_too_much, answer(400), "400"), (crowd.come_from_elsewhere, answer(403), "403"),
        (crowd.name_another_host, answer(421), "421"), (crowd.never_finish, answer(408), "408"),
        (crowd.vanish_in_a_body, b"", "left"), (crowd.vanish_while_waiting, b"", "left"),
        (crowd.vanish_in_a_stream, answer(200, b"data: 1\n\n"), "left"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_each_kind_sends_what_it_is_called_after(client, reply, got):
    found, (head, body, end) = asyncio.run(visit(client, reply))
    assert found == got
    wanted = {"never_finish": "waits", "vanish_in_a_body": "gone"}.get(client.__name__, "whole")
    assert end == wanted
    assert ("Origin: https://example.com" in head) == (client is crowd.come_from_elsewhere)
    assert ("Host: example.com" in head) == (client is crowd.name_another_host)
    assert (len(body) > LARGEST) == (client is crowd.send_too_much)
    if end == "whole" and client is not crowd.send_no_json:
        asked = json.loads(body)
        assert asked.get("stream", False) == (client in (crowd.take_stream, crowd.vanish_in_a_stream))
        assert (len(str(asked["messages"])) > 9000) == (client is crowd.ask_too_much)
    if client is crowd.send_no_json:
        with pytest.raises(ValueError):
            json.loads(body)


def stand_in_kinds(monkeypatch):
    """Return what the clients of three kinds do: who is there at the same time, and what they get."""
    there = SimpleNamespace(now=0, most=0)

    def client_of(name):
        async def client(door, draw):
            there.now += 1
            there.most = max(there.most, there.now)
            await asyncio.sleep(0)
            there.now -= 1
            if name == "third":
                raise ConnectionRefusedError
            return name

        client.__name__ = name
        return client

    kinds = tuple((client_of(name), weight, set()) for name, weight in (("first", 90), ("second", 10), ("third", 0)))
    monkeypatch.setattr(crowd, "KINDS", kinds)
    return there


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_connection_is_closed_when_its_answer_is_read(is_reset, monkeypatch):
    """Also where the server broke it off: a crowd of thousands would run out of files."""
    closed = []

    async def read():
        if is_reset:
            raise ConnectionResetError
        return answer(200, b"it")

    async def send(self, body, **how):
        return SimpleNamespace(read=read), SimpleNamespace(close=lambda: closed.append(body))

    monkeypatch.setattr(Door, "send", send)
    got = asyncio.run(Door(1).ask(b"{}"))
    assert closed == [b"{}"] and got == (("closed", b"") if is_reset else ("200", answer(200, b"it")))


@pytest.mark.parametrize("text", ["cria_waiting 3\n", "cria_waiting_s 4\n# cria_waiting 5\ncria_waiting 3\n", "x 1\n"])
def test_a_gauge_is_read_by_its_whole_name(text, monkeypatch):
    page = SimpleNamespace(read=text.encode)
    monkeypatch.setattr(crowd.urllib.request, "urlopen", lambda url, timeout: page if url == "it/metrics" else None)
    if text == "x 1\n":
        with pytest.raises(RuntimeError, match="/metrics has no cria_waiting"):
            crowd.read_gauge(SimpleNamespace(url="it"), "cria_waiting")
    else:
        assert crowd.read_gauge(SimpleNamespace(url="it"), "cria_waiting") == 3.0


def test_every_kind_comes_and_no_more_at_once_than_is_said(monkeypatch):
    there, came = stand_in_kinds(monkeypatch), []
    served = SimpleNamespace(url="http://127.0.0.1:1")
    found = asyncio.run(send_crowd(served, 50, 4, random.Random(0), lambda: came.append(1)))
    assert sum(found.values()) == len(came) == 50 and there.most == 4
    assert found["third", "ConnectionRefusedError"] == 1  # whose weight is 0: each comes once
    assert found["first", "first"] > found["second", "second"] > 0


@pytest.mark.parametrize("n", [10, 11])
def test_all_parts_of_a_crowd_are_told(n, monkeypatch):
    sent, held = [], iter("abc")

    async def send(served, part, at_once, draw, advance):
        sent.append((part, at_once))
        return Counter({("kind", "got"): part})

    async def describe(served):
        return next(held)

    monkeypatch.setattr(crowd, "send_crowd", send)
    monkeypatch.setattr(crowd, "describe", describe)
    found = asyncio.run(crowd.watch_crowd(None, n, 3, lambda: None))
    assert sum(part for part, _ in sent) == n + 6 == found["got"][0]["n"] and {at for _, at in sent} == {3}
    assert found["held"] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["cria_answers_running", "cria_answers_waiting"])
def test_the_server_is_described_when_no_answer_is_left(name, monkeypatch):
    left = iter([1.0, 1.0, 0.0])

    async def sleep(_):
        pass

    monkeypatch.setattr(crowd, "read_gauge", lambda served, asked: next(left) if asked == name else 0.0)
    monkeypatch.setattr(crowd.asyncio, "sleep", sleep)
    served = SimpleNamespace(pid="self", resident_mb=lambda: 1.0, n_threads=lambda: 2)
    found = asyncio.run(crowd.describe(served))
    assert found["threads"] == 2 and next(left, None) is None


def test_weights_and_expectations_are_of_each_client_once():
    assert len({client for client, _, _ in KINDS}) == len(KINDS) and all(may for _, _, may in KINDS)


class Line:
    """A connection that notes what is sent and how it is left."""

    def __init__(self, monkeypatch, answer=b""):
        self.calls = Calls()
        writer = self.calls.thing("writer", write=None, close=None)
        writer.transport = self.calls.thing("transport", abort=None)
        self.read_sizes = []

        async def read(n=-1):
            self.read_sizes.append(n)
            return answer

        async def connect(host, port):
            self.calls.lines.append(f"{host}:{port}")
            return SimpleNamespace(read=read), writer

        monkeypatch.setattr(crowd.asyncio, "open_connection", connect)


@pytest.mark.parametrize("client", [crowd.vanish_in_a_stream, crowd.vanish_while_waiting, crowd.vanish_in_a_body])
def test_who_vanishes_breaks_the_connection_off(client, monkeypatch):
    line, slept = Line(monkeypatch), []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(crowd.asyncio, "sleep", sleep)
    assert asyncio.run(client(Door(77), random.Random(3))) == "left"
    assert line.calls.lines[0] == "127.0.0.1:77" and line.calls.lines[2:] == ["transport.abort()"]
    draw = random.Random(3)
    body = crowd.chat(draw, **{} if client is crowd.vanish_in_a_body else {"max_tokens": 400})
    if client is crowd.vanish_in_a_stream:
        body = crowd.chat(draw := random.Random(3), stream=True, max_tokens=400)
        assert line.read_sizes == [draw.randint(1, 900)]
    if client is crowd.vanish_while_waiting:
        assert slept == [draw.random() / 4]
    sent = body[: len(body) // 2] if client is crowd.vanish_in_a_body else body
    assert line.calls.lines[1].endswith(f"Connection: close\\r\\n\\r\\n{sent.decode()}')")
    assert f"Content-Length: {len(body)}\\r" in line.calls.lines[1]


def test_a_request_is_one_of_http(monkeypatch):
    line = Line(monkeypatch)
    asyncio.run(Door(77).send(b"{}"))
    asyncio.run(Door(78).send(b"{}", length=9, host="a.b", more="X: y\r\n"))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\n{}Content-Type: application/json\r\n"
        "Content-Length: {}\r\nConnection: close\r\n\r\n{{}}"
    )
    sent = [head.format("127.0.0.1:77", "", 2).encode(), head.format("a.b", "X: y\r\n", 9).encode()]
    assert line.calls.lines == [
        "127.0.0.1:77", f"writer.write({sent[0]!r})", "127.0.0.1:78", f"writer.write({sent[1]!r})"
    ]  # fmt: skip


def test_questions_ask_for_a_few_tokens():
    bodies = [json.loads(crowd.chat(random.Random(seed), user="me")) for seed in range(200)]
    assert {body["max_tokens"] for body in bodies} == set(range(1, 9)) and bodies[0]["user"] == "me"
    asked = {body["messages"][0]["content"] for body in bodies}
    assert asked <= {f"Name {n} {what}." for n in range(2, 10) for what in ("fruits", "rivers", "colours", "tools")}
    assert len(asked) > 25 and {body["messages"][0]["role"] for body in bodies} == {"user"}


def test_what_the_server_holds_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(crowd, "read_gauge", lambda *_: 0.0)
    monkeypatch.setattr(crowd, "Path", lambda path: {"/proc/7/fd": tmp_path}[path])
    for name in "abc":
        (tmp_path / name).touch()
    served = SimpleNamespace(pid=7, resident_mb=lambda: 12.345, n_threads=lambda: 2)
    assert asyncio.run(crowd.describe(served)) == {"resident_mb": 12.3, "threads": 2, "files": 3}


def test_a_crowd_comes_in_three_parts_of_one_seed(monkeypatch):
    calls, draws = Calls(), set()

    async def send(served, n, at_once, draw, advance):
        calls.lines.append(f"send({served}, {n}, {at_once}, {advance})")
        draws.add(id(draw))
        return Counter({("b", "x"): n, ("a", "y"): 1})

    async def describe(served):
        calls.lines.append(f"describe({served})")
        return len(calls.lines)

    monkeypatch.setattr(crowd, "send_crowd", send)
    monkeypatch.setattr(crowd, "describe", describe)
    found = asyncio.run(crowd.watch_crowd("it", 11, 4, "advance"))
    assert calls.lines == [
        line for n in (8, 5, 6) for line in (f"send(it, {n}, 4, advance)", "describe(it)")
    ]  # fmt: skip
    assert len(draws) == 1 and found == {
        "got": [{"kind": "a", "got": "y", "n": 3}, {"kind": "b", "got": "x", "n": 19}], "held": [2, 4, 6]
    }  # fmt: skip


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    calls = Calls()
    monkeypatch.setattr(crowd.tempfile, "TemporaryDirectory", calls.folder)
    monkeypatch.setattr(crowd, "serve_model", calls.stand_in("serve", contextlib.nullcontext("served")))
    progress = calls.thing("progress", add_task="task", advance=None)
    monkeypatch.setattr(crowd, "Progress", lambda: contextlib.nullcontext(progress))

    async def watch(served, n, at_once, advance):
        calls.lines.append(f"watch({served}, {n}, {at_once})")
        advance()
        got = [("never_finish", "408", 3), ("take_answer", "503", 12), ("take_answer", "answer", 7)]
        held = [{"resident_mb": 100.25 + i, "threads": 2 + i, "files": 30 + i} for i in range(3)]
        return {"got": [dict(zip(("kind", "got", "n"), one, strict=True)) for one in got], "held": held}

    monkeypatch.setattr(crowd, "watch_crowd", watch)
    text = tell(crowd, "--requests", 20, "--at-once", 3, "--model", "mine")
    assert text + "\n" + calls.text() == snapshot


def test_kinds_and_what_they_may_get():
    """Weights are of a hundred."""
    assert [(client.__name__, weight, sorted(may)) for client, weight, may in KINDS] == [
        ("take_answer", 30, ["503", "answer"]), ("take_stream", 20, ["503", "stream"]),
        ("vanish_in_a_stream", 10, ["left"]), ("vanish_while_waiting", 10, ["left"]), ("vanish_in_a_body", 5, ["left"]),
        ("never_finish", 4, ["408"]), ("send_too_much", 5, ["413"]), ("send_no_json", 5, ["400"]),
        ("ask_too_much", 5, ["400"]), ("come_from_elsewhere", 3, ["403"]), ("name_another_host", 3, ["403", "421"]),
    ]  # fmt: skip


def test_flags_have_defaults(defaults_of):
    assert defaults_of(crowd) == {"model": "smollm2-135m", "requests": 1000, "at_once": 64, "json": None}


RIGHT = {client.__name__: sorted(may)[0] for client, _, may in KINDS}


@pytest.mark.parametrize(
    ("changed", "code"),
    [({}, 0), ({"take_answer": crowd.BUSY}, 0), ({"take_answer": "500"}, 1), ({"take_stream": "answer"}, 1),
     ({"come_from_elsewhere": "answer"}, 1), ({"never_finish": "ConnectionResetError"}, 1)],
)  # fmt: skip
def test_a_client_that_gets_what_its_kind_does_not_expect_is_told(changed, code, monkeypatch, capsys):
    async def watch(served, n, at_once, advance):
        got = [{"kind": kind, "got": what, "n": 1} for kind, what in (RIGHT | changed).items()]
        return {"got": got, "held": [{"resident_mb": 1.0, "threads": 2, "files": 3}] * 3}

    monkeypatch.setattr(crowd, "serve_model", lambda *_: contextlib.nullcontext("served"))
    monkeypatch.setattr(crowd, "watch_crowd", watch)
    monkeypatch.setattr(sys, "argv", ["crowd"])
    assert crowd.main() == code and capsys.readouterr().out.count("WRONG") == code

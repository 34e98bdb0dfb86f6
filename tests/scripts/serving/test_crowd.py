"""A crowd against a stand-in for the server: what each client sends, and how many come at once."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from scripts.serving import crowd
from scripts.serving.crowd import KINDS, LARGEST, Door, send_crowd


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

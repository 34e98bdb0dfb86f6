"""What is collected of a model's pieces, with a client that stays and one that leaves."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")

from engine.serving import app
from engine.serving.app import collect
from engine.serving.model_service import Piece
from engine.serving.openai_api import IGNORED, ApiError


def collected(pieces, leaves=False, n=2):
    """Return the choices, or the error, and whether the answers were closed."""
    closed = []

    async def come():
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece
        if leaves:
            await asyncio.sleep(60)

    async def receive():
        await asyncio.sleep(0 if leaves else 60)
        return {"type": "http.disconnect"}

    async def run():
        answering = SimpleNamespace(close=lambda: closed.append(True))
        try:
            return await collect(SimpleNamespace(receive=receive), answering, come(), n)
        except ApiError as error:
            return error

    return asyncio.run(run()), closed


def test_pieces_of_several_choices_are_put_together_and_silence_is_no_piece():
    pieces = [Piece(0, "a", 1), None, Piece(1, "x", 2), Piece(0, "b", 1, finish_reason="stop"), Piece(1, "y", 1)]
    (first, second), closed = collected([*pieces, Piece(1, "", 0, finish_reason="length")])
    assert (first.text, first.n_tokens, first.finish_reason) == ("ab", 2, "stop")
    assert (second.text, second.n_tokens, second.finish_reason) == ("xy", 3, "length") and closed == [True]


@pytest.mark.parametrize("error, status, text", [(KeyError("k"), 500, "the model failed: KeyError"),
                                                 (ApiError(400, "odd"), 400, "odd")])  # fmt: skip
def test_an_error_ends_all(error, status, text):
    found, closed = collected([Piece(0, "a", 1), Piece(1, error=error)])
    assert (found.status, str(found)) == (status, text) and closed == [True]


def test_a_client_that_leaves_ends_its_answers():
    found, closed = collected([None], leaves=True)
    assert found.status == 499 and closed == [True]


def test_the_time_of_the_first_token_and_their_number_are_noted(monkeypatch):
    clock = iter([100.0, 102.5, 109.0])
    monkeypatch.setattr(app, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    async def pieces(patience):
        for piece in (None, Piece(0, "", 0), Piece(0, "a", 2), Piece(0, "b", 3, finish_reason="stop")):
            yield piece

    async def run(notes):
        return [piece async for piece in app.watch(SimpleNamespace(pieces=pieces), notes)]

    notes = {}
    assert len(asyncio.run(run(notes))) == 4 and notes == {"first_token": 2.5, "tokens": 5}


def test_a_stream_keeps_its_client_waiting_and_counts_what_it_sent():
    token = {"token": "", "logprob": -1.0, "top_logprobs": []}
    pieces = [None, Piece(0, "a", 1), Piece(1, "", 1, [token]), None, Piece(0, "", 2), Piece(1, "b", 3)]
    pieces += [Piece(1, finish_reason="stop"), Piece(0, finish_reason="length")]

    async def come():
        for piece in pieces:
            yield piece

    async def run(include_usage):
        wanted = SimpleNamespace(n=2, include_usage=include_usage, sampling=SimpleNamespace(n_logprobs=0))
        answering, head = SimpleNamespace(prompt_tokens=5), {"id": "x"}
        stream = app.stream_events(answering, come(), app.ChatFormat(wanted), head, wanted)
        return [event async for event in stream]

    events = asyncio.run(run(True))
    assert events.count(": still here\n\n") == 2 and events[-1] == "data: [DONE]\n\n"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert chunks[-1]["usage"] == usage and chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    said = [(c["index"], c["delta"].get("content"), c["finish_reason"]) for chunk in chunks for c in chunk["choices"]]
    assert said[2:] == [(0, "a", None), (1, "", None), (1, "b", None), (1, None, "stop"), (0, None, "length")]
    assert chunks[3]["choices"][0]["logprobs"]["content"] == [token]
    plain = [json.loads(event[6:]) for event in asyncio.run(run(False)) if event.startswith("data: {")]
    assert len(plain) == len(chunks) - 1 and not any("usage" in chunk for chunk in plain)


def test_what_a_request_says_is_handed_on_to_the_template(monkeypatch):
    """And its answer names the model that answers, whatever the request calls it."""
    asked, heads = [], []
    monkeypatch.setattr(app, "encode_chat", lambda *args, **more: (asked.append((args, more)), [1, 2])[1])
    monkeypatch.setattr(app, "new_head", lambda *args: heads.append(args))
    calls = [{"type": "function", "function": {"name": "look"}}]
    chat = [{"role": "assistant", "tool_calls": calls}, {"role": "user", "content": "Hi"}]
    body = {"messages": chat, "input": "an input", "tools": [{"type": "function"}], "stream": True}

    async def read(request, access):
        return body

    monkeypatch.setattr(app, "read_json", read)
    answering = SimpleNamespace(prompt_tokens=2, pieces=None, close=lambda: None)
    service = SimpleNamespace(name="mine", tokenizer="its own", style="template", answer=lambda *_: answering)
    server, request = app.Server([service], "access"), SimpleNamespace(scope={"state": {}})
    answer = asyncio.run(server.chat(request))
    messages = [("assistant", ""), ("user", "Hi")]
    more = {"input": "an input", "tools": [{"type": "function"}], "more": {0: {"tool_calls": calls}}}
    assert asked == [((messages, "its own", "template"), more)] and heads == [("chat.completion", "mine")]
    assert request.scope["state"] == {"prompt_tokens": 2}
    assert answer.headers["Cache-Control"] == "no-cache" and answer.headers["Content-Type"].startswith("text/event-str")


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_description_is_of_what_every_model_takes(key):
    shapes = [SimpleNamespace(config=SimpleNamespace(vocab_size=size)) for size in (50, 30, 40)]
    server = SimpleNamespace(services={i: SimpleNamespace(model=m) for i, m in enumerate(shapes)},
                             access=SimpleNamespace(api_key=key))  # fmt: skip
    found = json.loads(asyncio.run(app.Server.describe(server, None)).body)
    assert ("security" in found) == (key is not None) and '"maximum": 29' in json.dumps(found)


@pytest.mark.parametrize(
    "alive, status, text", [((True, True), 200, "ok"), ((True, False), 503, "stopping"), ((), 200, "ok")]
)
def test_health_is_that_of_every_model(alive, status, text):
    services = {i: SimpleNamespace(is_alive=lambda one=one: one) for i, one in enumerate(alive)}
    found = asyncio.run(app.Server.health(SimpleNamespace(services=services), None))
    assert (found.status_code, found.body) == (status, f'{{"status":"{text}"}}'.encode())


def ask(method, path, comparison=()):
    """Ask a server without a model; return what Starlette answers, without the guard around it."""
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    server = app.Server((), SimpleNamespace(api_key=None), comparison)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Guard", lambda application, *others: application)
        application = server.application()
    assert isinstance(application, Starlette)
    return TestClient(application, raise_server_exceptions=False, follow_redirects=False).request(method, path)


def test_what_is_not_there_is_told_as_the_api_tells_it():
    found = ask("GET", "/v1/nothing")
    assert found.status_code == 404 and found.json()["error"]["message"] == "there is no /v1/nothing"
    found = ask("GET", "/v1/completions")
    assert found.status_code == 405 and found.json()["error"]["message"] == "GET is not for this path"
    assert found.headers["allow"] == "POST"
    found = ask("GET", "/compare")
    assert found.status_code == 404 and found.text == app.NO_COMPARISON
    found = ask("GET", "/")
    assert found.status_code == 307 and found.headers["location"] == "/compare"


def test_a_failure_of_the_server_tells_no_more_than_that(monkeypatch):
    monkeypatch.setattr(app.Server, "health", lambda *_: 1 / 0)
    found = ask("GET", "/health")
    assert found.status_code == 500 and found.json()["error"]["message"] == "the server failed; its log says how"


def test_the_description_says_what_kind_of_value_each_key_takes():
    services = {"m": SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=9)))}
    server = SimpleNamespace(services=services, access=SimpleNamespace(api_key=None))
    found = json.loads(asyncio.run(app.Server.describe(server, None)).body)
    bodies = [
        path["post"]["requestBody"]["content"]["application/json"]["schema"] for path in found["paths"].values()
        if "post" in path
    ]  # fmt: skip
    assert len(bodies) == 2
    kinds = {"type", "enum", "$ref", "const"}
    named = [(name, value) for body in bodies for name, value in body["properties"].items()]
    assert {n for n, v in named if not all(kinds & set(one) for one in v.get("anyOf", [v]))} == IGNORED


def test_the_place_of_a_token_counts_the_tokens_before_it_and_not_the_text_that_may_lag_behind():
    """As where a character's bytes come in two tokens, or a stop may have begun."""
    wanted = SimpleNamespace(sampling=SimpleNamespace(n_logprobs=1), echo=True)
    form = app.CompletionFormat(wanted, "Hi ")
    assert form.begin({}, 0)["choices"][0]["text"] == "Hi " and form.begin({}, 1)["choices"][0]["index"] == 1
    token = lambda text: {"token": text, "logprob": -1.0, "top_logprobs": []}  # noqa: E731
    places = [
        form.chunk({}, Piece(index, text, len(tokens), tokens=tuple(map(token, tokens))))["choices"][0]["logprobs"]
        for index, text, tokens in [(0, "a", ["ab", "c"]), (0, "bcd", ["d"]), (1, "x", ["x"]), (0, "e", ["e"])]
    ]
    assert [found["text_offset"] for found in places] == [[3, 5], [6], [3], [7]]
    assert form.chunk({}, Piece(0, "!", 0))["choices"][0]["logprobs"] is None

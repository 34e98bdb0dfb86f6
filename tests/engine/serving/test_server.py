"""engine.serve's application over a real socket: OpenAI's own client, broken requests, crowds and those who leave."""

import asyncio
import contextlib
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import openai
import pytest
import torch
import uvicorn

from engine.base.errors import DataError
from engine.inference.generation import generate
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.serving.app import Server
from engine.serving.guard import Access, read_body
from engine.serving.model_service import Limits, ModelService
from engine.serving.openai_api import ApiError
from engine.serving.prompts import encode_chat
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level

ASK = [{"role": "user", "content": "Name three fruits."}]
ASK_TEXT = [("user", "Name three fruits.")]
LIMITS = Limits(max_concurrency=4, max_queue=80, max_length=300)


def make_service(folder, style="chatml", limits=LIMITS):
    tokenizer = load_tokenizer(write_byte_level(folder, SPECIALS[style]))
    shape = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=tokenizer.vocab_size + 3,
        max_seq_len=512,
    )  # fmt: skip
    model = new_model(shape, "cpu", torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return ModelService("tiny", model, tokenizer, style, limits)


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, service, access):
        self.service, self.server = service, Server([service], access)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(128)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.application(), log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)
        service.start()
        self.thread.start()

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join()
        self.service.stop()
        self.socket.close()

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def send(self, path, body=None, headers=(), method=None):
        """Return (status, headers, body) of a raw request."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, dict(headers), method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    access = Access(max_body_bytes=20_000, timeout=1.0)
    running = Running(make_service(tmp_path_factory.mktemp("tokenizer")), access)
    yield running
    running.close()


def ask(client, **options):
    return client.chat.completions.create(
        model="tiny", messages=ASK, **({"max_tokens": 12, "temperature": 0} | options)
    )


def simple_answer(service, messages=ASK, n=12):
    """Return the answer of the simple path."""
    prompt = encode_chat([(m["role"], m["content"]) for m in messages], service.tokenizer, service.style)
    return service.tokenizer.decode(generate(service.model, [prompt], service.stop_ids, n)[0]), len(prompt)


# ---- OpenAI's client ------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_simple_path(running):
    text, n_prompt = simple_answer(running.service)
    answer = ask(running.client())
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (n_prompt, n_prompt + 12)
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_says_the_same(running):
    chunks = list(ask(running.client(), stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == simple_answer(running.service)[0]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None and chunk.choices for chunk in ask(running.client(), stream=True))


def test_n_choices_come_in_order_and_by_seed(running):
    settings = {"n": 3, "seed": 5, "temperature": 1.0}
    one, again = ask(running.client(), **settings), ask(running.client(), **settings)
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in one.choices]
    assert len(set(texts)) == 3 and texts == [choice.message.content for choice in again.choices]
    streamed = {i: "" for i in range(3)}
    introduced = []
    for chunk in ask(running.client(), stream=True, **settings):
        (choice,) = chunk.choices
        introduced += [choice.index] if choice.delta.role else []
        streamed[choice.index] += choice.delta.content or ""
    assert introduced == [0, 1, 2] and list(streamed.values()) == texts


def test_a_stop_string_ends_the_answer_before_it(running):
    whole = simple_answer(running.service, n=40)[0]
    stop = whole[5:8]
    for stream in (False, True):
        answer = ask(running.client(), max_tokens=40, stop=[stop, "never"], stream=stream)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        text = "".join(c.delta.content or "" for c in choices) if stream else choices[0].message.content
        assert text == whole[: whole.index(stop)] and choices[-1].finish_reason == "stop"


def test_logprobs(running):
    ask(running.client())  # now the prompt is in the cache, for all that follow: equal to the last bit
    answer = ask(running.client(), logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 12 and all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)  # greedy
    assert (
        b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == answer.choices[0].message.content
    )
    streamed = [c.choices[0] for c in ask(running.client(), logprobs=True, top_logprobs=3, stream=True)]
    assert [t for c in streamed if c.logprobs for t in c.logprobs.content] == tokens
    legacy = running.client().completions.create(
        model="tiny", prompt="One", max_tokens=4, logprobs=2, temperature=0, echo=True
    )
    found = legacy.choices[0].logprobs
    assert legacy.choices[0].text.startswith("One") and len(found.tokens) == 4 == len(found.text_offset)
    assert all(len(top) <= 2 for top in found.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_tokens_count_the_prompt_that_is_echoed(running, stream):
    made = running.client().completions.create(
        model="tiny", prompt="One", max_tokens=4, logprobs=1, temperature=0, echo=True, stream=stream
    )
    found = [c.choices[0].logprobs for c in (made if stream else [made]) if c.choices and c.choices[0].logprobs]
    tokens = [token for one in found for token in one.tokens]
    offsets = [offset for one in found for offset in one.text_offset]
    assert offsets == [len("One" + "".join(tokens[:i])) for i in range(4)]


def test_completions_of_a_text_and_of_ids(running):
    client, tokenizer = running.client(), running.service.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("One")]
    text = client.completions.create(model="tiny", prompt="One", max_tokens=6, temperature=0).choices[0].text
    assert text == client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0).choices[0].text
    assert text == tokenizer.decode(generate(running.service.model, [ids], running.service.stop_ids, 6)[0])
    last = running.service.model.config.vocab_size - 1
    for id, status in ((-1, 400), (0, 200), (last, 200), (last + 1, 400)):
        assert running.send("/v1/completions", {"prompt": [id], "max_tokens": 1})[0] == status


SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


def test_structured_answers(running):
    pytest.importorskip("llguidance")
    strict = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    for seed in range(3):
        answer = ask(running.client(), max_tokens=200, temperature=1.0, seed=seed, response_format=strict)
        if answer.choices[0].finish_reason == "stop":  # a random model may write digits until it is cut short
            found = json.loads(answer.choices[0].message.content)
            assert type(found["a"]) is int and found["b"] in "xy" and set(found) == {"a", "b"}
    regex = {"type": "regex", "pattern": "(yes|no), [a-c]{3}"}
    answer = ask(running.client(), extra_body={"response_format": regex}, temperature=1.0)
    assert re.fullmatch("(yes|no), [a-c]{3}", answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    answer = ask(running.client(), max_tokens=60, response_format={"type": "json_object"}, stop="}")
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_the_official_errors(running):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        running.client().chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="context_length_exceeded"):
        running.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 400}])
    assert [model.id for model in running.client().models.list()] == ["tiny"]
    assert running.client().models.retrieve("tiny").owned_by == "cria"


# ---- the alpaca style -----------------------------------------------------------------------------------------------


def test_llama2_wants_a_question(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path, SPECIALS["llama2"]))
    for chat in ([("system", "Be brief.")], [("assistant", "Hello."), ("user", "Hi")], [*ASK_TEXT, ("assistant", "x")]):
        with pytest.raises(DataError, match="message"):
            encode_chat(chat, tokenizer, "llama2")
    assert encode_chat([("system", "Be brief."), *ASK_TEXT], tokenizer, "llama2")


def test_alpaca_takes_an_input_and_a_chat(tmp_path):
    running = Running(make_service(tmp_path, "alpaca", Limits(2, 4, 500)), Access())
    try:
        answer = ask(running.client(), extra_body={"input": "Some text."})
        assert answer.usage.prompt_tokens > ask(running.client()).usage.prompt_tokens + 60
        chat = [*ASK, {"role": "assistant", "content": "Fig."}, {"role": "user", "content": "More?"}]
        want, n_prompt = simple_answer(running.service, chat)
        found = running.client().chat.completions.create(model="tiny", messages=chat, max_tokens=12, temperature=0)
        assert (found.choices[0].message.content, found.usage.prompt_tokens) == (want, n_prompt)
    finally:
        running.close()


# ---- who and what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not JSON"),
        (b"[" * 5000, None, "not JSON"),
        (b'"text"', None, "a JSON object"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "the role is 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]", "a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "image_url"),
        ({"messages": [*ASK, {"role": "assistant", "content": "Fig."}]}, "messages", "end with it"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "messages", "end with it"),
        ({"messages": ASK, "temprature": 1}, "temprature", "unknown parameter"),
        ({"messages": ASK, "temperature": 3}, "temperature", "0 to 2"),
        ({"messages": ASK, "temperature": "hot"}, "temperature", "a number"),
        ({"messages": ASK, "top_p": 0}, "top_p", "1e-06 to 1"),
        ({"messages": ASK, "n": 99}, "n", "1 to 16"),
        ({"messages": ASK, "n": True}, "n", "a whole number"),
        ({"messages": ASK, "max_tokens": 0}, "max_tokens", "1 or more"),
        ({"messages": ASK, "stop": [""]}, "stop", "not empty"),
        ({"messages": ASK, "stream_options": {"include_usage": True}}, "stream_options", "stream to be true"),
        ({"messages": ASK, "top_logprobs": 2}, "top_logprobs", "logprobs to be true"),
        ({"messages": ASK, "logit_bias": {"9999": 1}}, "logit_bias", "no token 9999"),
        ({"messages": ASK, "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"messages": ASK, "response_format": {"type": "xml"}}, "response_format", "wanted type text"),
        ({"messages": ASK, "response_format": {"type": "regex", "pattern": "("}}, "response_format", "regex"),
        ({"messages": ASK, "tools": [{"type": "function"}]}, "messages", "tools"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_refused_with_its_parameter(running, body, param, words):
    status, _, answer = running.send("/v1/chat/completions", body)
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and words in error["message"] and len(error["message"]) < 400


def test_sizes_paces_and_places(running):
    big = b'{"messages": "' + b"x" * 30_000 + b'"}'
    assert running.send("/v1/chat/completions", big)[0] == 413
    assert running.send("/v1/nothing")[0] == 404
    status, headers, _ = running.send("/v1/models", b"{}")
    assert status == 405 and "GET" in headers["Allow"]
    assert "/v1/completions" in json.loads(running.send("/openapi.json")[2])["paths"]
    with socket.create_connection(("127.0.0.1", running.socket.getsockname()[1])) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert b" 408 " in slow.recv(200)


@pytest.mark.parametrize(("n_bytes", "is_told"), [(9, True), (9, False), (10, True), (10, False)])
def test_the_largest_body_is_as_large_as_said(n_bytes, is_told):
    """Also where its length is not told beforehand, as in a chunked request."""

    async def stream():
        for _ in range(n_bytes):
            yield b"x"

    headers = {"content-length": str(n_bytes)} if is_told else {}
    reading = read_body(SimpleNamespace(headers=headers, stream=stream), Access(max_body_bytes=9))
    if n_bytes == 9:
        assert asyncio.run(reading) == b"x" * 9
    else:
        with pytest.raises(ApiError, match="the body is over 9 bytes") as raised:
            asyncio.run(reading)
        assert raised.value.status == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:8000"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ],
)
def test_foreign_pages_get_nothing(running, headers, status):
    assert running.send("/v1/models", headers=headers)[0] == status


def test_a_key_is_asked_for(tmp_path):
    running = Running(make_service(tmp_path), Access(hosts=(), api_key="secret"))
    try:
        assert running.send("/v1/models")[0] == 401 and running.send("/metrics")[0] == 401
        for words, status in (("Bearer wrong", 401), ("Basic secret", 401), ("bearer  secret", 200)):
            assert running.send("/v1/models", headers={"Authorization": words})[0] == status
        assert running.send("/v1/models", headers={"Authorization": "Bearer secret", "Host": "any.example"})[0] == 200
        assert running.send("/")[0] == 200 and running.send("/health")[0] == 200
    finally:
        running.close()


def test_the_page_may_load_nothing_from_elsewhere(running):
    status, headers, body = running.send("/")
    assert status == 200 and b"<!doctype html>" in body.lower()
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"


# ---- crowds ---------------------------------------------------------------------------------------------------------


async def stream_one(client, text, n=10):
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], max_tokens=n, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_64_streams_at_once_are_each_their_own(running):
    texts = [f"Question {i}?" for i in range(64)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream_one(client, text) for text in texts))

    found = asyncio.run(ask_all())
    some = [0, 17, 40, 63]
    assert [found[i] for i in some] == [
        simple_answer(running.service, [{"role": "user", "content": texts[i]}], 10)[0] for i in some
    ]
    load = running.service.load()
    assert load.running == load.waiting == 0 and load.kept_tokens > 0


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_again(tmp_path):
    running = Running(make_service(tmp_path, limits=Limits(1, 1, 300)), Access())
    try:
        status, headers, body = running.send("/v1/chat/completions", {"messages": ASK, "n": 3})
        assert status == 503 and headers["Retry-After"] == "1" and b"queue_full" in body
        status, _, body = running.send("/v1/chat/completions", {"messages": ASK, "n": 2, "max_tokens": 2})
        assert status == 200, body  # one that is written and one that waits
    finally:
        running.close()


def test_who_leaves_frees_the_place(running):
    rng, port = random.Random(0), running.socket.getsockname()[1]
    before = running.service.load().answer_tokens
    for i in range(60):
        body = json.dumps({"messages": ASK, "max_tokens": 250, "temperature": 1, "stream": i % 2 == 0}).encode()
        with socket.create_connection(("127.0.0.1", port)) as one:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            one.sendall(head.encode() + body[: rng.choice((len(body), len(body), 9))])
            if rng.random() < 0.5:
                one.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    one.recv(1)
    while running.service.load().running or running.service.load().waiting:
        time.sleep(0.02)
    assert running.service.load().answer_tokens - before < 60 * 250 / 2
    assert ask(running.client()).choices[0].message.content == simple_answer(running.service)[0]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_has_left(running, monkeypatch, stream):
    real = running.service.scheduler._decode

    def decode(going_on):  # no answer goes on by itself
        time.sleep(0.005)
        if any(one.request.cancelled for one in going_on):
            real(going_on)

    monkeypatch.setattr(running.service.scheduler, "_decode", decode)
    body = json.dumps({"messages": ASK, "max_tokens": 50, "temperature": 0, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.socket.getsockname()[1])) as one:
        one.sendall(head.encode() + body)
        while not running.service.load().running:
            time.sleep(0.01)
    end = time.monotonic() + 120
    while running.service.load().running and time.monotonic() < end:
        time.sleep(0.01)
    left = running.service.load().running
    running.service.scheduler._decode = real  # so that whatever is left ends before the next test
    assert not left


def test_metrics_count_without_contents(running, capfd):
    ask(running.client())
    assert running.send("/v1/made-up")[0] == 404
    text = running.send("/metrics")[2].decode()
    assert re.search(r'cria_requests_total\{path="other",status="404"\} [1-9]', text) and "made-up" not in text
    assert re.search(r'cria_requests_total\{path="/v1/chat/completions",status="200"\} [1-9]', text)
    for name in ("cria_answers_running", "cria_prompt_tokens_kept_total", "cria_first_token_seconds_count"):
        assert re.search(rf"^{name} \d", text, re.M), name
    log = capfd.readouterr().err
    assert re.search(r"POST /v1/chat/completions 200 \d+\.\d+ s \d+\+12 tokens", log) and "fruits" not in log


def test_a_model_that_fails_is_told_and_the_server_goes_on(running, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running.service.scheduler, "_draw", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the model failed: ZeroDivisionError"):
            ask(running.client())
        events = running.send("/v1/chat/completions", {"messages": ASK, "stream": True})[2].decode()
        assert '"error"' in events and "ZeroDivisionError" in events and "[DONE]" not in events
    assert ask(running.client()).choices[0].finish_reason == "length"


def test_shutting_down_tells_whoever_waits(tmp_path):
    """An answer that is cut off is an error, and never looks whole."""
    running = Running(make_service(tmp_path), Access())
    got = {}

    def read(stream):
        body = {"messages": ASK, "max_tokens": 280, "stream": stream, "temperature": 0}
        got[stream] = running.send("/v1/chat/completions", body)

    readers = [threading.Thread(target=read, args=(stream,)) for stream in (True, False)]
    has_begun, is_told, real = threading.Event(), threading.Event(), running.service.scheduler._decode

    def decode(*args):
        has_begun.set()
        assert is_told.wait(120)
        return real(*args)

    running.service.scheduler._decode = decode
    for reader in readers:
        reader.start()
    assert has_begun.wait(120)
    running.service.is_stopping = True
    is_told.set()
    for reader in readers:
        reader.join()
    assert got[False][0] == 503
    for _, _, told in got.values():
        assert b"shutting down" in told and b"[DONE]" not in told
    assert running.send("/health")[0] == 503
    assert running.send("/v1/chat/completions", {"messages": ASK})[0] == 503
    running.close()

"""All that the server says to a list of requests: status, headers, bodies, events, its log and its figures."""

import json
import re

import pytest
import torch
from starlette.testclient import TestClient

from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.serving.app import Server
from engine.serving.guard import Access
from engine.serving.model_service import Limits, ModelService
from engine.serving.openapi import describe_api
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level

ASK = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(**body):
    return "POST", CHAT, {"messages": ASK, "max_tokens": 4, "temperature": 0} | body


def text(**body):
    return "POST", TEXT, {"prompt": "ab", "max_tokens": 4, "temperature": 0} | body


STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' "
    "'unsafe-inline'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY",
}  # fmt: skip
REQUESTS = {
    "answers": [
        chat(), chat(model="second", n=2, seed=3, temperature=1.5), chat(max_completion_tokens=2, max_tokens=None),
        chat(logprobs=True, top_logprobs=2, max_tokens=2), chat(logit_bias={"65": 100}, stop=["bb", "aa"]),
        chat(messages=[{"role": "system", "content": "Be."}, *ASK, {"role": "assistant", "content": "A"}, *ASK]),
        chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                       *ASK]),
        text(), text(prompt=[65, 66.0, 67], echo=True, logprobs=1, max_tokens=2), text(prompt=["a"], best_of=1),
        text(max_tokens=None, logit_bias={"65": 100}),
        text(prompt="ab", repetition_penalty=2, logit_bias={"10": 90, "11": 89.5}),
    ],
    "streams": [
        chat(**STREAM), chat(stream=True, logprobs=True, max_tokens=2), chat(n=2, **STREAM, max_tokens=1),
        text(**STREAM), text(stream=True, echo=True, logprobs=0, max_tokens=2),
        chat(stream=True, logit_bias={"65": 100}, stop="bb"),
    ],
    "pages": [
        ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/v1/models/second"), ("GET", "/v1/models/none"),
        ("GET", "/compare"), ("GET", "/nothing"), ("GET", CHAT), ("POST", "/health"), ("HEAD", "/health"),
        ("GET", "/health", None, {"Host": "evil.example"}), ("GET", "/health", None, {"Origin": "http://evil.example"}),
        ("POST", CHAT, b"no"), ("POST", CHAT, b'{"messages": "' + b"x" * 3000 + b'"}'), ("POST", CHAT, ["no"]),
    ],
}  # fmt: skip
WRONG_SHARED = [
    {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": 2.1}, {"temperature": True}, {"top_p": 0}, {"n": 17},
    {"n": 0}, {"stop": [""]}, {"stop": ["x"] * 17}, {"stop": 3}, {"stream_options": {"include_usage": True}},
    {"seed": 2.5}, {"seed": 2**63}, {"presence_penalty": -2.5}, {"frequency_penalty": "1"}, {"top_k": -1},
    {"min_p": 1.1}, {"repetition_penalty": 0}, {"logit_bias": {"x": 1}}, {"logit_bias": {"1": None}},
    {"logit_bias": {"1": 101}}, {"logit_bias": {"100000": 1}}, {"model": "none"}, {"model": 3}, {"unknown": 1},
    {"response_format": {"type": "regexp"}}, {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"response_format": {"type": "text", "more": 1}}, {"max_tokens": 100000, "logit_bias": {"65": 100}},
]  # fmt: skip
REQUESTS["refusals of chats"] = [chat(**more) for more in WRONG_SHARED] + [
    chat(**more)
    for more in (
        {"messages": []}, {"messages": [{"role": "robot", "content": ""}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {"messages": ["Hi"]}, {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21}, {"tool_choice": "required"}, {"modalities": ["audio"]}, {"tools": [1]},
        {"max_completion_tokens": 0}, {"logprobs": 1}, {"messages": [{"role": "user", "content": "x" * 400}]},
        {"tools": [{"type": "function"}]},
    )
]  # fmt: skip
REQUESTS["refusals of texts"] = [
    text(**more)
    for more in (
        {"max_tokens": 0}, {"n": 17}, {"suffix": "x"}, {"best_of": 2}, {"prompt": None}, {"prompt": []},
        {"prompt": ["a", "b"]}, {"prompt": [1, "a"]}, {"prompt": [100000]}, {"prompt": [-1]}, {"logprobs": 21},
        {"logprobs": True}, {"echo": "yes"}, {"messages": []}, {"prompt": "x" * 400}, {"prompt": [[1], [2]]},
    )
]  # fmt: skip

KINDS = {"enum": ["ka"]}
REQUESTS["grammars"] = [
    chat(response_format=form, max_tokens=20, **more)
    for form, more in (
        ({"type": "regex", "pattern": "x7{3}"}, {}), ({"type": "regex", "pattern": "x7{3}"}, {"stream": True}),
        ({"type": "json_schema", "json_schema": {"schema": KINDS, "name": "n", "strict": True}}, {}),
        ({"type": "json_object", "schema": KINDS}, {"n": 2}),
        ({"type": "json_object", "schema": 3}, {}),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, {}),
        ({"type": "regex"}, {}), ("text", {}),
    )
]  # fmt: skip


def make_service(name, tokenizer, seed):
    """Return a service of a small model with weights of its own."""
    shape = ModelConfig(
        dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=tokenizer.vocab_size + 3,
        max_seq_len=512,
    )  # fmt: skip
    model = new_model(shape, "cpu", torch.float32)
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return ModelService(name, model, tokenizer, "chatml", Limits(max_concurrency=4, max_queue=80, max_length=300))


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    tokenizer = load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer"), SPECIALS["chatml"]))
    services = [make_service(name, tokenizer, seed) for seed, name in enumerate(("first", "second"))]
    for service in services:
        service.start()
    yield services
    for service in services:
        service.stop()


def describe_request(method, path, body=None, headers=None):
    """Return a request as a line, without what most say."""
    usual = {"messages": ASK, "max_tokens": 4, "temperature": 0}
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if value != usual.get(key, "none")}
    shown = "" if body is None else f" {str(body)[:150]}"
    return f"> {method} {path}{shown}{f' {headers}' if headers else ''}"


def describe_answer(response, with_headers):
    """Return status, headers and body of a response, without what is different each time."""
    headers = [
        f"{name}: {', '.join(sorted(value.split(', ')))}"
        for name, value in response.headers.items()
        if name not in ("content-length", *PAGE_HEADERS)
    ]
    assert {name: response.headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
    body = re.sub(r'"(id|created)":( ?)("(cmpl|chatcmpl)-[0-9a-f]{24}"|\d+)', r'"\1":\2"#\4"', response.text)
    body = re.sub(r"\n{2,}", "\n", body.strip().removeprefix('{"error":').removesuffix("}"))
    return "\n".join([str(response.status_code), *headers * with_headers, body])


@pytest.mark.parametrize("what", REQUESTS)
def test_what_is_answered(what, services, capsys, close_snapshot):
    if what == "grammars":
        pytest.importorskip("llguidance")
    app = Server(services, Access(max_body_bytes=3000, timeout=5.0)).application()
    client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
    answers = []
    for method, path, *rest in REQUESTS[what]:
        body, headers = [*rest, None, None][:2]
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        response = client.request(method, path, content=content, headers=headers, follow_redirects=False)
        answers += [describe_request(method, path, *rest), describe_answer(response, what == "pages")]
    assert "\n".join(answers) == close_snapshot
    log = re.sub(r"^\S+ \S+ (.*?) \d\.\d+ s", r"\1", capsys.readouterr().err, flags=re.MULTILINE)
    assert log == close_snapshot(name="log")


def test_what_the_figures_say_of_some_requests(services, snapshot):
    service = make_service("counted", services[0].tokenizer, 0)
    client = TestClient(Server([service], Access()).application(), base_url="http://localhost")
    service.start()
    try:
        for method, path, *rest in (chat(), chat(), text(), chat(n=0), ("GET", "/nothing"), ("GET", "/health")):
            client.request(method, path, json=rest[0] if rest else None)
        told = client.get("/metrics").text
    finally:
        service.stop()
    assert re.sub(r'(?m)(le="[\d.]+"} |_sum )[\d.]+$', r"\1#", told) == snapshot
    assert client.get("/health").status_code == 503 and client.get("/health").json() == {"status": "stopping"}


@pytest.mark.parametrize("name", ["chat", "completions", "others"])
def test_what_the_description_says(name, snapshot):
    described = describe_api(True, 300)
    paths = described["paths"]
    posts = {"chat": paths.pop("/v1/chat/completions"), "completions": paths.pop("/v1/completions")}
    told = posts.get(name, described)
    responses = told["post"]["responses"] if name in posts else {}
    for code in list(responses)[2:]:  # each holds the same object, which the first shows
        assert responses[code].pop("content") == responses["400"]["content"]
    assert re.sub(r"\n {12,}", " ", json.dumps(told, indent=2)) == snapshot


def test_without_a_key_none_is_described():
    assert describe_api(True, 300).keys() - describe_api(False, 300).keys() == {"components", "security"}


KEYED = [
    ("GET", "/health", None, {}),
    ("GET", "/v1/models", None, {}),
    ("GET", "/metrics", None, {}),
    ("GET", "/v1/models", None, {"Authorization": "Bearer no"}),
    ("OPTIONS", "/v1/models", None, {}),
    ("GET", "/v1/models", None, {"Authorization": "Bearer secret"}),
    ("GET", "/v1/models", None, {"Authorization": "bearer  secret "}),
    ("GET", "/v1/models", None, {"Authorization": "Basic secret"}),
    ("GET", "/v1/models", None, {"Authorization": "Bearer secret", "Host": "any.example"}),
    ("GET", "/v1/models", None, {"Authorization": "Bearer secret", "Host": "a.example", "Origin": "http://a.example"}),
    ("GET", "/v1/models", None, {"Authorization": "Bearer secret", "Host": "a.example", "Origin": "http://b.example"}),
]


def test_who_is_let_in_with_a_key():
    """Pages and health need none; any host may be named, and a page of another is refused all the same."""
    client = TestClient(Server([], Access((), "secret")).application(), base_url="http://127.0.0.1")
    statuses = [client.request(method, path, headers=headers).status_code for method, path, _, headers in KEYED]
    assert statuses == [200, 401, 401, 401, 405, 200, 200, 401, 200, 200, 403]

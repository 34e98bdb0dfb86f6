"""The fault-injecting server, asked by the real client: how each fault looks from outside, and that it repeats."""

import asyncio
import json
import time

import openai_server
import pytest
import task_pool
from openai_server import Server, request_key

openai = pytest.importorskip("openai")


def said(text):
    return [{"role": "user", "content": text}]


def client_of(server, **options):
    return openai.AsyncOpenAI(base_url=server.base_url, **{"api_key": "x", "max_retries": 0, "timeout": 5} | options)


async def ask(client, text="Write tasks as JSON.", **options):
    return await client.chat.completions.create(**{"model": "gpt-4o-mini", "messages": said(text)} | options)


def asked(server, *texts, client=None, **options):
    """The answers, or the exceptions, to one request after the other."""

    async def all_of_them():
        async with client_of(server, **client or {}) as connection:
            results = []
            for text in texts or ["Write tasks as JSON."]:
                try:
                    results.append(await ask(connection, text, **options))
                except Exception as error:
                    results.append(error)
            return results

    return asyncio.run(all_of_them())


def one(server, *texts, **options):
    return asked(server, *texts, **options)[-1]


def content(answer):
    return answer.choices[0].message.content


@pytest.fixture
def serve():
    """serve(**options): a server that ends with the test."""
    servers = []

    def start(**options):
        servers.append(Server(**options).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


# --- the pool


def test_pool_depends_on_seed_and_key_alone():
    first = task_pool.answer(3, "key", 20)
    task_pool.answer(4, "other", 7)
    assert task_pool.answer(3, "key", 20) == first and task_pool.answer(3, "key", 5) == first[:5]
    assert task_pool.answer(3, "yek", 20) != first != task_pool.answer(4, "key", 20)


def test_pool_looks_like_a_models_tasks():
    items = [item for i in range(500) for item in task_pool.answer(1, str(i), 20, defects=0)]
    assert all(item.keys() == {"instruction", "input", "output"} for item in items)
    words = sorted(len(item["instruction"].split()) for item in items)
    assert words[len(words) // 10] >= 8 and words[len(words) * 9 // 10] <= 24
    assert 0.35 < sum(bool(item["input"]) for item in items) / len(items) < 0.48
    assert not any("{" in item["instruction"] + item["output"] for item in items)
    lengths = sorted(len(item["output"].split()) for item in items)
    assert lengths[len(lengths) // 50] >= 8 and lengths[-1] <= 130
    assert 0.97 < len({item["instruction"] for item in items}) / len(items) < 0.999  # some exact repeats


def test_pool_defects_have_their_share_and_leave_the_others_alone():
    clean, spoilt = (
        [item for i in range(200) for item in task_pool.answer(1, str(i), 20, defects=d)] for d in (0, 0.1)
    )
    assert 0.08 < sum(a != b for a, b in zip(clean, spoilt, strict=True)) / len(clean) < 0.12
    assert any(item["input"] == "[attached image]" for item in spoilt) and any(not item["output"] for item in spoilt)


# --- answers


def test_an_answer_is_a_completion_with_twenty_tasks(serve):
    server = serve(seed=1)
    answer = one(server)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "gpt-4o-mini"
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.refusal is None
    tasks = json.loads(content(answer))["tasks"]
    key = request_key(said("Write tasks as JSON."))
    assert len(tasks) == 20 and tasks == task_pool.answer(1, key, 20)
    spent = answer.usage
    assert spent.total_tokens == spent.prompt_tokens + spent.completion_tokens
    assert spent.prompt_tokens_details.cached_tokens == 0
    assert abs(spent.completion_tokens - len(content(answer).encode()) / 4) <= 1
    assert server.stats()["keys"] == {key: {"seen": 1, "billed": 1, "whole": 1}}
    assert server.stats()["billed"]["completion_tokens"] == spent.completion_tokens


def test_the_same_request_has_the_same_answer_on_two_servers_in_any_order(serve):
    faults = {name: 0.02 for name in openai_server.ANSWER_FAULTS} | {"500": 0.2, "429": 0.1, "reset_body": 0.1}
    a, b, c = serve(seed=5, faults=faults), serve(seed=5, faults=faults), serve(seed=6, faults=faults)
    texts = [f"JSON {i}" for i in range(40)]

    def outcomes(server, texts):
        results = zip(texts, asked(server, *texts), strict=True)
        return {t: repr(r) if isinstance(r, Exception) else (r.choices, r.usage, r.id) for t, r in results}

    first = outcomes(a, texts)
    assert first == outcomes(b, texts[::-1]) != outcomes(c, texts)
    assert outcomes(a, texts) == outcomes(b, texts) != first  # the second attempts
    kinds = {entry["outcome"] for entry in a.log}
    assert {"answered", "500", "429", "reset_body"} < kinds


def test_an_answer_longer_than_its_limit_is_cut(serve):
    server = serve()
    for field in ("max_tokens", "max_completion_tokens"):
        answer = one(server, **{field: 100})
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 100
        assert 390 <= len(content(answer).encode()) <= 400
    assert one(server, max_completion_tokens=9999).choices[0].finish_reason == "stop"


def test_items_as_the_request_asks(serve):
    server = serve(items=0)
    schema = {"type": "array", "minItems": 3}
    form = {"type": "json_schema", "json_schema": {"name": "tasks", "schema": schema}}
    assert len(json.loads(content(one(server, response_format=form)))["tasks"]) == 3
    assert len(json.loads(content(one(server, "Give me 7 more tasks")))["tasks"]) == 7
    assert len(json.loads(content(one(serve(items=4))))["tasks"]) == 4


# --- faults of an attempt


@pytest.mark.parametrize(
    "fault, kind, status, code",
    [
        ("408", openai.APIStatusError, 408, None),
        ("409", openai.ConflictError, 409, "lock_timeout"),
        ("429", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("429_bare", openai.RateLimitError, 429, None),
        ("429_ms", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("500", openai.InternalServerError, 500, None),
        ("502_html", openai.InternalServerError, 502, None),
        ("503", openai.InternalServerError, 503, None),
        ("529", openai.InternalServerError, 529, None),
    ],
)
def test_status_faults(serve, fault, kind, status, code):
    server = serve(faults={fault: 1}, retry_after_s=2, retry_after_ms=70)
    error = one(server)
    assert type(error) is kind and (error.status_code, error.code) == (status, code)
    assert error.request_id.startswith("req_") and error.response.headers["openai-processing-ms"].isdigit()
    assert error.response.headers.get("retry-after") == ("2" if fault == "429" else None)
    assert error.response.headers.get("retry-after-ms") == ("70" if fault == "429_ms" else None)
    assert isinstance(error.body, str) == (fault == "502_html")
    (entry,) = server.log
    assert (entry["outcome"], entry["status"], entry["billed"]) == (fault, status, False)


@pytest.mark.parametrize("fault, billed", [("reset", False), ("reset_body", True), ("eof_body", True)])
def test_connection_faults(serve, fault, billed):
    server = serve(faults={fault: 1})
    error = one(server)
    assert type(error) is openai.APIConnectionError and error.body is None
    (entry,) = server.log
    assert (entry["outcome"], entry["billed"], entry["whole"]) == (fault, billed, False)
    assert list(server.stats()["keys"].values()) == [{"seen": 1, "billed": int(billed), "whole": 0}]


def test_hang_and_slow(serve):
    server = serve(faults={"hang": 1}, hang_s=0.2)
    assert type(one(server)) is openai.APIConnectionError  # closed without an answer
    server.configure(hang_s=30)
    started = time.monotonic()
    assert type(one(server, "b", client={"timeout": 0.2})) is openai.APITimeoutError
    server.configure(faults={"slow": 1}, slow_s=0.3)
    assert len(json.loads(content(one(server, "c")))["tasks"]) == 20 and time.monotonic() - started > 0.5
    server.configure(slow_s=30)
    assert type(one(server, "d", client={"timeout": 0.2})) is openai.APITimeoutError
    time.sleep(0.15)  # until the server sees that the client is gone
    assert server.log[-1]["billed"] and not server.log[-1]["whole"] and server.stats()["in_flight"] == 0


def test_a_200_that_is_no_completion(serve):
    assert type(one(serve(faults={"not_json_200": 1}))) is json.JSONDecodeError
    assert isinstance(one(serve(faults={"html_200": 1})), str)  # the client hands on any text that is not called JSON
    answer = one(serve(faults={"empty_choices": 1}))
    assert answer.choices == [] and answer.usage.completion_tokens == 0


def test_a_request_succeeds_after_a_bounded_number_of_faults(serve):
    server = serve(faults={"500": 0.5, "reset": 0.5}, max_faults_per_request=2)
    results = asked(server, *["same"] * 4)
    assert [isinstance(result, Exception) for result in results] == [True, True, False, False]
    assert [entry["attempt"] for entry in server.log] == [1, 2, 3, 4]


def test_faults_come_as_often_as_asked(serve):
    server = serve(faults={"500": 0.25, "truncated": 0.25}, items=1)
    asked(server, *map(str, range(300)))
    outcomes = server.stats()["outcomes"]
    assert 50 < outcomes["500"] < 100 and 35 < outcomes["truncated"] < 80  # 75 and 56 expected


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="418"):
        Server(faults={"418": 0.5})

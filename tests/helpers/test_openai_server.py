"""The fault-injecting server, asked by the real client: how each fault looks from outside, and that it repeats."""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.helpers import openai_server, task_pool
from tests.helpers.openai_server import Server, request_key
from tests.helpers.run import ROOT

openai = pytest.importorskip("openai")


def said(text):
    return [{"role": "user", "content": text}]


def client_of(server, **options):
    return openai.AsyncOpenAI(base_url=server.base_url, **{"api_key": "x", "max_retries": 0, "timeout": 5} | options)


async def ask(client, text="Write tasks as JSON.", **options):
    return await client.chat.completions.create(**{"model": "gpt-4o-mini", "messages": said(text)} | options)


def asked(server, *texts, client=None, **options):
    """Return the answers, or the exceptions, to one request after the other."""

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
    assert 9700 < len({item["instruction"] for item in items}) < 10_000  # some exact repeats


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


@pytest.mark.parametrize(
    "fault, billed, cause",
    [
        ("reset", False, "ReadError"),
        ("lost", True, "ReadError"),
        ("reset_body", True, "ReadError"),
        ("eof_body", True, "RemoteProtocolError"),
    ],
)
def test_connection_faults(serve, fault, billed, cause):
    server = serve(faults={fault: 1})
    error = one(server)
    assert type(error) is openai.APIConnectionError and error.body is None and type(error.__cause__).__name__ == cause
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


def test_a_drip_beats_the_time_out_of_a_read(serve):
    server = serve(faults={"drip": 1}, hang_s=0.6)
    started = time.monotonic()
    assert len(json.loads(content(one(server, client={"timeout": 0.3})))["tasks"]) == 20
    assert time.monotonic() - started > 0.6 and server.log[0]["whole"]


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


# --- faults of an answer


def test_answer_faults_stay_whatever_the_attempt(serve):
    for fault in openai_server.ANSWER_FAULTS:
        server = serve(faults={fault: 1})
        first, second = asked(server, "Write JSON.", "Write JSON.")
        if fault == "content_policy_400":
            assert type(first) is type(second) is openai.BadRequestError and first.code == "content_policy_violation"
        else:
            assert first.choices == second.choices and first.usage == second.usage
        assert [entry["outcome"] for entry in server.log] == [fault] * 2


def test_truncated(serve):
    for text in map(str, range(8)):
        answer = one(serve(faults={"truncated": 1}), text)
        whole = content(one(serve(), text))
        assert answer.choices[0].finish_reason == "length" and whole.startswith(content(answer))
        assert 0.25 < len(content(answer)) / len(whole) < 0.95
        assert answer.usage.completion_tokens < len(whole) / 4


def test_malformed_and_wrong_schema(serve):
    server, whole = serve(faults={"malformed": 1}), serve()
    for text in map(str, range(10)):
        broken, good = content(one(server, text)), content(one(whole, text))
        assert (
            broken != good and sum(json.dumps(x, ensure_ascii=False) in broken for x in json.loads(good)["tasks"]) > 7
        )
    server.configure(faults={"wrong_schema": 1})
    shapes = [json.loads(content(answer)) for answer in asked(server, *map(str, range(30)))]
    assert any(isinstance(shape, list) for shape in shapes) and any("examples" in shape for shape in shapes)


def test_refusal_content_filter_no_usage_prose(serve):
    answer = one(serve(faults={"refusal": 1}))
    assert content(answer) is None and "can't assist" in answer.choices[0].message.refusal
    assert one(serve(faults={"content_filter": 1})).choices[0].finish_reason == "content_filter"
    assert one(serve(faults={"no_usage": 1})).usage is None
    server = serve(faults={"prose": 1})
    for text in map(str, range(6)):
        words = content(one(server, text))
        assert json.loads(words[words.index('{"tasks"') : words.rindex("]}") + 2])["tasks"]
        assert not words.startswith("{")


# --- hard states


def test_a_wrong_key_an_unknown_model_no_quota(serve):
    server = serve(api_key="right", models=["a", "b"])
    error = one(server, model="a")
    assert type(error) is openai.AuthenticationError and (error.status_code, error.code) == (401, "invalid_api_key")
    right = {"api_key": "right"}
    error = one(server, model="c", client=right)
    assert type(error) is openai.NotFoundError and (error.status_code, error.code) == (404, "model_not_found")
    assert content(one(server, model="b", client=right))
    server.configure(quota_after=5)
    results = asked(server, *"1234", model="a", client=right)
    assert content(results[0]) and {type(error) for error in results[1:]} == {openai.RateLimitError}
    assert results[1].code == results[1].type == "insufficient_quota"
    assert list(server.stats()["outcomes"]) == ["bad_key", "model_not_found", "answered", "quota"]


def test_down_for_a_while(serve):
    server = serve(down_after=2, down_for_s=0.3)
    first, second, third = asked(server, *"123")
    assert content(first) and second.status_code == third.status_code == 503
    time.sleep(0.3)
    assert content(one(server, "2"))


def test_rate_limit_and_its_headers(serve):
    server = serve(rate_limit_rpm=600, rate_burst=3, rate_limit_tpm=60_000)
    results = asked(server, *"12345")
    limited = [error for error in results if isinstance(error, openai.RateLimitError)]
    assert 1 <= len(limited) <= 2 and limited[0].code == "rate_limit_exceeded"
    headers = limited[0].response.headers
    assert 0 < int(headers["retry-after-ms"]) <= 100 and headers["retry-after"] == "1"
    assert headers["x-ratelimit-limit-requests"] == "600" and headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-limit-tokens"] == "60000" and headers["x-ratelimit-reset-requests"].endswith("ms")
    assert openai_server.duration(360) == "6m0s" and openai_server.duration(1.5) == "1.5s"
    assert openai_server.duration(0.02) == "20ms"


def many(server, n, **options):
    async def at_once():
        async with client_of(server) as client:
            return await asyncio.gather(*[ask(client, str(i), **options) for i in range(n)], return_exceptions=True)

    return asyncio.run(at_once())


def test_concurrency_is_seen_limited_and_slows_down(serve):
    server = serve(latency_s=0.1)
    many(server, 8)
    assert server.stats()["max_concurrency"] == 8
    server.configure(max_concurrent=5)
    assert sum(isinstance(result, openai.RateLimitError) for result in many(server, 8)) == 3
    server.configure(latency_growth=1)
    started = time.monotonic()
    many(server, 5)
    assert time.monotonic() - started > 0.4


# --- capabilities


UNSUPPORTED = {
    "openai": lambda body: (body["code"], body["param"]) == ("unsupported_parameter", "max_tokens"),
    "vllm": lambda body: (body["type"], body["code"]) == ("BadRequestError", 400),
    "vllm_old": lambda body: (body["object"], body["code"]) == ("error", 400),
    "llama.cpp": lambda body: body.keys() == {"code", "message", "type"} and body["code"] == 400,
    "llama.cpp_old": lambda body: body["type"] == "invalid_request_error",
    "fastapi": lambda body: body["detail"][0]["loc"] == ["body", "max_tokens"],
    "plain": lambda body: isinstance(body, str) and "max_tokens" in body,
}


@pytest.mark.parametrize("dialect", openai_server.DIALECTS)
def test_an_unsupported_parameter(serve, dialect):
    error = one(serve(dialect=dialect, supports=["seed"]), max_tokens=9)
    assert type(error) is (openai.UnprocessableEntityError if dialect == "fastapi" else openai.BadRequestError)
    assert UNSUPPORTED[dialect](error.body)


def test_what_is_supported_and_what_is_ignored(serve):
    server = serve(supports=["max_completion_tokens", "json_object"])
    assert content(one(server, max_completion_tokens=50, temperature=1, response_format={"type": "json_object"}))
    error = one(server, temperature=0.7)
    assert (error.code, error.param) == ("unsupported_value", "temperature")
    form = {"type": "json_schema", "json_schema": {"name": "tasks", "schema": {}}}
    assert one(server, response_format=form).param == "response_format"
    server.configure(dialect="llama.cpp_old")
    assert type(one(server, response_format=form)) is openai.InternalServerError
    server.configure(supports=None, dialect="openai", ignores=["response_format", "max_completion_tokens"])
    answer = one(server, response_format=form, max_completion_tokens=9)
    assert answer.choices[0].finish_reason == "stop" and not content(answer).startswith("{")


def test_openais_own_conditions(serve):
    server = serve()
    assert one(server, "no such word", response_format={"type": "json_object"}).param == "messages"
    assert one(server, stream=True).param == "stream"
    inner = {"type": "object", "properties": {"a": {"type": "string"}}, "required": [], "additionalProperties": False}
    outer = {"type": "object", "properties": {"tasks": {"type": "array", "items": inner}}, "required": ["tasks"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": outer}}
    assert "'additionalProperties' is required" in str(one(server, response_format=form))
    outer["additionalProperties"] = False
    assert "'required' is required" in str(one(server, response_format=form))
    inner["required"] = ["a"]
    assert content(one(server, response_format=form))


def test_models_an_unknown_path_and_an_answer_of_ones_own(serve):
    server = serve(models=["m1", "m2"], answer=lambda key, body: body["messages"][0]["content"][::-1])

    async def calls():
        async with client_of(server) as client:
            models = [model.id async for model in client.models.list()]
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="m1", input="x")
            return models

    assert asyncio.run(calls()) == ["m1", "m2"]
    assert content(one(server, "abc", model="m1")) == "cba"


# --- batches


def lines_of(*texts, model="gpt-4o-mini", **body):
    return [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": said(text)} | body,
        }
        for i, text in enumerate(texts)
    ]


async def submit(client, lines, **options):
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(data), "batch", "in.jsonl")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", **options
    )


async def ended(client, batch):
    states = [batch.status]
    while states[-1] not in ("completed", "failed", "expired", "cancelled"):
        batch = await client.batches.retrieve(batch.id)
        states.append(batch.status)
        assert len(states) < 20
    return batch, states


async def read_lines(client, file_id):
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()] if file_id else []


def batch_run(server, lines, **options):
    """(batch, its states, output lines, error lines)"""

    async def run():
        async with client_of(server) as client:
            batch, states = await ended(client, await submit(client, lines, **options))
            return (
                batch,
                states,
                await read_lines(client, batch.output_file_id),
                await read_lines(client, batch.error_file_id),
            )

    return asyncio.run(run())


def test_a_batch_is_completed_and_says_what_the_chat_would(serve):
    server = serve(seed=2)
    texts = [f"JSON {i}" for i in range(30)]
    batch, states, output, errors = batch_run(server, lines_of(*texts), metadata={"run": "7"})
    assert states == ["validating", "in_progress", "finalizing", "completed"]
    assert batch.id.startswith("batch_") and batch.metadata == {"run": "7"} and errors == []
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (30, 30, 0)
    assert batch.error_file_id is None and batch.completed_at >= batch.in_progress_at >= batch.created_at
    ids = [line["custom_id"] for line in output]
    assert ids != [f"line-{i}" for i in range(30)] and set(ids) == {f"line-{i}" for i in range(30)}  # shuffled
    for line in output:
        assert line["id"].startswith("batch_req_") and line["error"] is None and line["response"]["status_code"] == 200
        body = openai.types.chat.ChatCompletion(**line["response"]["body"])
        assert content(body) == content(one(server, texts[int(line["custom_id"].removeprefix("line-"))]))
    assert batch.usage.output_tokens == sum(x["response"]["body"]["usage"]["completion_tokens"] for x in output)
    assert all(counts == {"seen": 2, "billed": 2, "whole": 2} for counts in server.stats()["keys"].values())


def test_lines_that_fail_and_a_batch_of_none_but_those(serve):
    server = serve(faults={"500": 0.3, "429": 0.2, "content_policy_400": 0.2, "hang": 0.1, "reset": 0.1})
    batch, _, output, errors = batch_run(server, lines_of(*map(str, range(60))))
    assert len(output) + len(errors) == 60 and batch.request_counts.failed == len(errors)
    statuses = {line["response"] and line["response"]["status_code"] for line in errors}
    assert statuses == {400, 429, 500, None}
    for line in errors:
        if line["response"]:
            assert line["response"]["body"]["error"]["message"] and line["error"] is None
        else:
            assert line["error"]["code"] == "request_timeout"
    server.configure(faults={"500": 1})
    batch, states, output, errors = batch_run(server, lines_of("a", "b"))
    assert states[-1] == "completed" and batch.output_file_id is None and len(errors) == 2


def test_an_expired_and_a_cancelled_batch_have_partial_results(serve):
    server = serve(batch_fates=["expired"], batch_done_share=0.5)
    batch, states, output, errors = batch_run(server, lines_of(*map(str, range(40))))
    assert states[-1] == "expired" and batch.expired_at and 8 < len(output) < 32 and len(output) + len(errors) == 40
    assert {(line["response"], line["error"]["code"]) for line in errors} == {(None, "batch_expired")}

    async def cancel():
        async with client_of(server) as client:
            batch = await submit(client, lines_of(*map(str, range(40))))
            await client.batches.retrieve(batch.id)
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            batch, _ = await ended(client, batch)
            with pytest.raises(openai.ConflictError):
                await client.batches.cancel(batch.id)
            return batch, await read_lines(client, batch.output_file_id), await read_lines(client, batch.error_file_id)

    batch, output, errors = asyncio.run(cancel())
    assert batch.status == "cancelled" and 8 < len(output) < 32 and len(output) + len(errors) == 40
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}


def test_batches_that_fail_at_validation(serve):
    server = serve(models=["gpt-4o-mini"], batch_max_lines=3, batch_fates=["billing_hard_limit_reached"])
    cases = {
        "billing_hard_limit_reached": lines_of("a"),
        "duplicate_custom_id": lines_of("a") + lines_of("b"),
        "too_many_tasks": lines_of(*"abcd"),
        "empty_file": [],
        "model_not_found": lines_of("a", model="other"),
        "invalid_url": [lines_of("a")[0] | {"url": "/v1/embeddings"}],
        "missing_required_parameter": [{"custom_id": "x"}],
        "invalid_json_line": ["no object"],
    }
    for code, lines in cases.items():
        batch, states, output, errors = batch_run(server, lines)
        assert states == ["validating", "failed"] and batch.failed_at and output == errors == []
        assert batch.errors.data[0].code == code
    assert server.log == []


def test_the_limit_of_enqueued_tokens_holds_for_unfinished_batches(serve):
    server = serve(batch_token_limit=100)

    async def run():
        async with client_of(server) as client:
            first, second = [await submit(client, lines_of("x" * 250)) for _ in range(2)]
            assert (await client.batches.retrieve(first.id)).status == "in_progress"
            second = await client.batches.retrieve(second.id)
            assert second.errors.data[0].code == "token_limit_exceeded"
            assert "Enqueued token limit reached for gpt-4o-mini" in second.errors.data[0].message
            await ended(client, first)
            third, _ = await ended(client, await submit(client, lines_of("x" * 250)))
            assert third.status == "completed"

    asyncio.run(run())


def test_lists_of_batches_and_files_are_paged_newest_first(serve):
    server = serve(batch_s=0)

    async def run():
        async with client_of(server) as client:
            made = [(await submit(client, lines_of(str(i)), metadata={"i": str(i)})).id for i in range(5)]
            page = await client.batches.list(limit=2)
            assert [batch.id for batch in page.data] == made[:2:-1] and page.has_more
            assert [batch.metadata["i"] async for batch in client.batches.list(limit=2)] == list("43210")
            last = await client.batches.list(limit=2, after=made[1])
            assert [batch.id for batch in last.data] == made[:1] and not last.has_more
            assert {batch.status for batch in page.data} == {"completed"}  # batch_s: by time, without a look
            files = [file.filename async for file in client.files.list(purpose="batch")]
            assert files == ["in.jsonl"] * 5
            await client.files.delete((await client.batches.retrieve(made[0])).input_file_id)
            there = {file.id async for file in client.files.list()}
            await submit(client, lines_of("x"))
            assert len({file.id async for file in client.files.list()} - there) == 1  # no id is given twice
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve("batch_none")

    asyncio.run(run())


def test_a_batch_whose_creation_was_not_heard_of_is_there(serve):
    server = serve(api_faults={"lost": 1}, max_faults_per_request=1)

    async def run():
        async with client_of(server) as client:
            with pytest.raises(openai.APIConnectionError):
                await submit(client, lines_of("a"))
            with pytest.raises(openai.APIConnectionError):
                await submit(client, lines_of("a"), metadata={"run": "1"})
            with pytest.raises(openai.APIConnectionError):
                await client.batches.list()
            assert [batch.metadata async for batch in client.batches.list()] == [{"run": "1"}]

    asyncio.run(run())
    assert server.stats()["api"] == {"POST /v1/files": 2, "POST /v1/batches": 1, "GET /v1/batches": 2}


# --- as a process


def process(*flags):
    command = [sys.executable, "-m", "tests.helpers.openai_server", *map(str, flags)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return running, json.loads(running.stdout.readline())


def fetched(told, query=""):
    return called(told, "/stats" + query)


def posted(told, changes):
    return called(told, "/config", json.dumps(changes).encode())


def called(told, path, data=None):
    with urllib.request.urlopen(told["base_url"].removesuffix("/v1") + path, data, timeout=5) as reply:
        return json.load(reply)


CLIENT = """
import asyncio, sys, openai
async def main():
    async with openai.AsyncOpenAI(base_url=sys.argv[1], api_key="x", max_retries=0) as client:
        await asyncio.gather(*[client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(i)}])
                               for i in range(20)])
asyncio.run(main())
"""


def test_a_process_outlives_a_killed_client_and_knows_what_was_not_delivered(tmp_path):
    log = tmp_path / "log.jsonl"
    running, told = process("--port", 0, "--seed", 4, "--latency-s", 30, "--log", log)
    try:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, told["base_url"]])
        while fetched(told)["in_flight"] < 20:
            time.sleep(0.05)
        client.kill()
        client.wait()
        while fetched(told)["in_flight"]:
            time.sleep(0.05)
        stats = fetched(told)
        assert stats["requests"] == stats["billed"]["requests"] == stats["max_concurrency"] == 20
        assert all(counts == {"seen": 1, "billed": 1, "whole": 0} for counts in stats["keys"].values())
        posted(told, {"latency_s": 0, "faults": {"500": 1}, "max_faults_per_request": 9})
        assert fetched(told, "?log=1")["log"][0]["outcome"] == "answered"
        assert len([json.loads(line) for line in log.read_text().splitlines()]) == 20
        posted(told, {"forget": True})
        assert fetched(told)["requests"] == 0
    finally:
        running.kill()
        running.wait()

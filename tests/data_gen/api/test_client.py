"""One attempt at a server: the meaning of its outcome, the server's dialect, and a key that is never stored."""

import asyncio
import contextlib
import itertools
import json
import socket
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.api import client as module
from data_gen.api.answers import Answer, is_completion, judge_success, read_answer
from data_gen.api.bill import Bill
from data_gen.api.client import Client, Reply, find_api_key, hide_secrets, wait_awake
from data_gen.api.dialect import FORMAT_NAMES, Dialect, Sampling, keeps_format
from data_gen.api.errors import BLOCKED, OUT_OF_MONEY, classify_error, extract_message, read_json
from data_gen.api.prompt import FORMATS, read_seed_tasks, read_topics
from data_gen.base.cli import UsageError

OPENAI = "https://api.openai.com/v1"
KEY = "sk-proj-abc123DEF456ghi789"
COMPLETION = {
    "id": "c1",
    "model": "m",
    "choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
}
ANSWER = json.dumps(COMPLETION)


def error(message, code=None, type="invalid_request_error", **more):
    return json.dumps({"error": {"message": message, "type": type, "param": None, "code": code} | more})


# ---- what an error means ---------------------------------------------------------------------------------------------

ERRORS = {
    "OpenAI: rate": (
        429,
        error(
            "Rate limit reached for gpt-4.1 on tokens per min (TPM): Limit 30000, Used 29000.",
            "rate_limit_exceeded",
            "tokens",
        ),
        "failed",
    ),
    "OpenAI: more than a minute's tokens": (
        429,
        error(
            "Request too large for gpt-4.1 on tokens per min (TPM): Limit 9000, Requested 9600. The input or output "
            "tokens must be reduced in order to run successfully.",
            "rate_limit_exceeded",
            "tokens",
        ),
        "unsupported",
    ),
    "OpenAI: quota": (
        429,
        error(
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
            "insufficient_quota",
        ),
        "fatal",
    ),
    "OpenAI: inactive": (
        429,
        error("Your account is not active.", "billing_not_active", "billing_not_active"),
        "fatal",
    ),
    "OpenAI: hard limit": (400, error("Billing hard limit has been reached", "billing_hard_limit_reached"), "fatal"),
    "OpenAI: key": (401, error("Incorrect API key provided: sk-pr***.", "invalid_api_key"), "fatal"),
    "OpenAI: country": (
        403,
        error(
            "Country, region, or territory not supported", "unsupported_country_region_territory", "request_forbidden"
        ),
        "fatal",
    ),
    "OpenAI: model": (
        404,
        error("The model `x` does not exist or you do not have access to it.", "model_not_found"),
        "fatal",
    ),
    "OpenAI: policy": (
        400,
        error("Your request was rejected as a result of our safety system.", "content_policy_violation"),
        "refused",
    ),
    "OpenAI: prompt": (
        400,
        error("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", "invalid_prompt"),
        "refused",
    ),
    "OpenAI: parameter": (
        400,
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            "unsupported_parameter",
        ),
        "unsupported",
    ),
    "OpenAI: length": (
        400,
        error("This model's maximum context length is 8192 tokens.", "context_length_exceeded"),
        "unsupported",
    ),
    "OpenAI: error": (
        500,
        error("The server had an error while processing your request.", None, "server_error"),
        "failed",
    ),
    "OpenAI: overloaded": (
        503,
        error("That model is currently overloaded with other requests.", None, "server_error"),
        "failed",
    ),
    "OpenAI: conflict": (409, error("The resource is locked."), "failed"),
    "time-out": (408, error("Request timed out."), "failed"),
    "too early": (425, "", "failed"),
    "Azure: filter": (
        400,
        error(
            "The response was filtered due to Azure OpenAI's content management policy.",
            "content_filter",
            innererror={"code": "ResponsibleAIPolicyViolation"},
        ),
        "refused",
    ),
    "Azure: deployment": (
        404,
        error("The API deployment for this resource does not exist.", "DeploymentNotFound"),
        "fatal",
    ),
    "Azure: rate": (
        429,
        error("Requests to the ChatCompletions_Create Operation have exceeded call rate limit.", "429"),
        "failed",
    ),
    "Azure: key": (401, error("Access denied due to invalid subscription key or wrong API endpoint.", "401"), "fatal"),
    "vLLM: model": (
        404,
        json.dumps(
            {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}
        ),
        "fatal",
    ),
    "vLLM: length": (
        400,
        json.dumps(
            {
                "object": "error",
                "message": "This model's maximum context length is 2048 tokens.",
                "type": "BadRequestError",
                "code": 400,
            }
        ),
        "unsupported",
    ),
    "llama.cpp: loading": (503, error("Loading model", 503, "unavailable_error"), "failed"),
    "llama.cpp: length": (
        400,
        error("the request exceeds the available context size", 400, "exceed_context_size_error"),
        "unsupported",
    ),
    "llama.cpp: grammar": (400, error("Failed to parse grammar", 400), "unsupported"),
    "Ollama: model": (404, error('model "x" not found, try pulling it first', None, "api_error"), "fatal"),
    "Ollama: busy": (
        503,
        json.dumps({"error": "server busy, please try again. maximum pending requests exceeded"}),
        "failed",
    ),
    "OpenRouter: money": (402, json.dumps({"error": {"code": 402, "message": "Insufficient credits"}}), "fatal"),
    "OpenRouter: moderation": (
        403,
        json.dumps(
            {
                "error": {
                    "code": 403,
                    "message": "Your chosen model requires moderation and your input was flagged",
                    "metadata": {"reasons": ["violence"]},
                }
            }
        ),
        "refused",
    ),
    "OpenRouter: provider": (502, json.dumps({"error": {"code": 502, "message": "Provider returned error"}}), "failed"),
    "DeepSeek: money": (402, error("Insufficient Balance", "invalid_request_error", "unknown_error"), "fatal"),
    "DeepSeek: key": (
        401,
        error("Authentication Fails (no such user)", "invalid_request_error", "authentication_error"),
        "fatal",
    ),
    "DeepSeek: parameter": (
        422,
        "Failed to deserialize the JSON body into the target type: response_format",
        "unsupported",
    ),
    "Anthropic: overloaded": (
        529,
        json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        "failed",
    ),
    "FastAPI": (
        422,
        json.dumps(
            {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "response_format"],
                        "msg": "Extra inputs are not permitted",
                        "input": {"type": "json_object"},
                    }
                ]
            }
        ),
        "unsupported",
    ),
    "a proxy": (502, "<html><body><h1>502 Bad Gateway</h1></body></html>", "failed"),
    "a proxy's time-out": (504, "", "failed"),
    "Cloudflare": (524, "error code: 524", "failed"),
    "an empty body": (400, "", "unsupported"),
    "method": (405, "Method Not Allowed", "unsupported"),
    "forbidden": (403, "Forbidden", "fatal"),
}


@pytest.mark.parametrize("status, body, kind", ERRORS.values(), ids=ERRORS)
def test_what_an_error_means(status, body, kind):
    assert classify_error(status, body) == kind == classify_error(status, body.upper())


def test_a_server_that_repeats_the_prompt_in_its_error_does_not_change_what_it_means():
    said = [*read_topics(), *(text for seed in read_seed_tasks() for text in seed.values())]
    body = json.dumps({"detail": "bad", "input": said}, ensure_ascii=False)
    assert classify_error(400, body) == "unsupported"
    assert not [word for word in BLOCKED + OUT_OF_MONEY if word in body.lower()]


def test_what_the_rate_is_told():
    assert Reply("failed", 429, "", {"retry-after": "3"}, 0.0, True).describe_load() == {
        "overloaded": True, "limited": True, "retry_after": 3.0,
    }  # fmt: skip
    assert Reply("failed", 500, "").describe_load() == {"overloaded": False, "limited": False, "retry_after": None}
    assert Reply("failed", 402, "").describe_load()["limited"], "money in flight is a limit too"


MESSAGES = {
    "OpenAI": (error("No."), "No."),
    "a text": ('{"error": "No."}', "No."),
    "vLLM": ('{"object": "error", "message": "No."}', "No."),
    "FastAPI": ('{"detail": "No."}', "No."),
    "FastAPI's list": ('{"detail": [{"msg": "No."}]}', "[{'msg': 'No.'}]"),
    "no message": ('{"error": {"code": 5}}', "{'code': 5}"),
    "null message": ('{"error": {"message": null, "code": 5}}', "{'message': None, 'code': 5}"),
    "neither": ('{"reason": "x"}', "{'reason': 'x'}"),
    "an empty object": ("{}", "{}"),
    "lines": (error("No.\n\n  Never.\t"), "No. Never."),
    "long": (error("x" * 1000), "x" * 300),
    "not JSON": ("<h1>\n502</h1>", "<h1> 502</h1>"),
    "a list": ('[{"error": "No."}]', "No."),
    "a list of texts": ('["No."]', '["No."]'),
    "in a choice": ('{"choices": [{"error": {"message": "No.", "code": 502}}]}', "No."),
    "null": ("null", "null"),
    "a number": ("5", "5"),
    "empty": (" \n", "an empty answer"),
    "blanks": ('{"error": {"message": " \\n"}}', '{"error": {"message": " \\n"}}'),
    "cut": ('{"error": {"mess', '{"error": {"mess'),
}


@pytest.mark.parametrize("body, message", MESSAGES.values(), ids=MESSAGES)
def test_the_sentence_in_an_errors_body(body, message):
    assert extract_message(body) == message


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "error", "detail", "usage", "text"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JUNK)
def test_junk_is_never_an_error(value):
    for found in (value, {"choices": [{"message": value}], "usage": value}, {"choices": [value]}, {"choices": value}):
        body = json.dumps(found)
        assert len(extract_message(body)) <= 300 and extract_message(body)
        assert judge_success(body)[0] in ("answer", "lost", "failed", "fatal", "refused", "unsupported")
        if is_completion(read_json(body)):
            answer = read_answer(body)
            assert all(isinstance(text, str) for text in (answer.text, answer.finish_reason, answer.refusal, answer.id))
            assert answer.bill.tokens == (None, None) or all(type(n) is int and n >= 0 for n in answer.bill.tokens)
            assert isinstance(answer.is_reasoning_alone, bool)


DEEP = [
    "[" * 100_000,
    '{"error":' * 100_000,
    '{"choices": [{"message": {"content": ' + "[" * 100_000,
    '{"choices":' * 1000,
]


@pytest.mark.parametrize("body", [*DEEP, "", "null", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', "1" * 5000,
                                  '{"choices": {"0": {"message": {}}}}', '{"choices": [{"message": "x"}]}',
                                  '{"choices": [{"message": null}]}', '{"choices": [null]}', error("x"),
                                  "data: {}\n\n", ANSWER[:-1]])  # fmt: skip
def test_what_is_no_completion(body):
    assert (
        not is_completion(read_json(body))
        and isinstance(extract_message(body), str)
        and len(extract_message(body)) <= 300
    )


# ---- what an answer says ---------------------------------------------------------------------------------------------


def answer(**changes):
    found = json.loads(ANSWER)
    choice = found["choices"][0]
    for name, value in changes.items():
        where = choice["message"] if name in ("content", "refusal") else choice if name == "finish_reason" else found
        if value is ...:
            where.pop(name)
        else:
            where[name] = value
    body = json.dumps(found)
    assert is_completion(found)
    return read_answer(body)


def test_a_usual_answer():
    assert answer() == Answer("hello", "stop", "", "c1", "m", Bill(5, 7, is_whole=True))


@pytest.mark.parametrize(
    "content, text",
    [
        (None, ""), (..., ""), ("", ""), (5, ""), ({"text": "x"}, ""), ([], ""), ("a\0\ud800", "a\0\ud800"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "text", "text": None}, {"type": "x"}, "c", None, {"text": {"value": "d"}}, {"text": "e"}], "e"),
    ],
)  # fmt: skip
def test_texts_of_answers(content, text):
    assert answer(content=content).text == text


def test_odd_and_missing_fields():
    found = answer(id=..., model=None, finish_reason=..., refusal="I cannot.")
    assert found == Answer("hello", "", "I cannot.", "", "", Bill(5, 7, is_whole=True))
    again = answer(id=5, finish_reason=None, model=["m"])
    assert again == Answer("hello", "", "", "5", "['m']", Bill(5, 7, is_whole=True))


# ---- what a server understands ---------------------------------------------------------------------------------------

DIALECTS = [Dialect(f, m, t) for f in FORMATS for m in ("max_completion_tokens", "max_tokens") for t in (True, False)]


def wants(dialect):
    """Return the names in a body that a server may refuse."""
    return {dialect.limit} | ({"temperature"} if dialect.temperature else set()) | ({dialect.format} - {"text"})


def walk(start, understood, refusal, least=()):
    """Return the dialects that the collector tries in turn until the server understands one."""
    tried, dialect = [], start
    while dialect is not None and not (wants(dialect) <= understood and set(least) <= wants(dialect)):
        tried.append(dialect)
        said = refusal(dialect)
        dialect = next((d for d in (dialect.drop_refused(said), dialect.lower_format()) if d and d not in tried), None)
        assert len(tried) <= len(DIALECTS)
    return dialect, tried


def subsets():
    for limits in (["max_tokens"], ["max_completion_tokens"], ["max_tokens", "max_completion_tokens"]):
        for n in range(4):
            for others in itertools.combinations(["temperature", "json_object", "json_schema"], n):
                yield {*limits, *others}


REFUSALS = {
    "OpenAI": lambda name: error(
        f"Unsupported parameter: '{name}' is not supported with this model.", "unsupported_parameter"
    ),
    "FastAPI": lambda name: json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", name]}]}),
    "capitals": lambda name: f"{name.upper()} IS UNKNOWN",
}


@pytest.mark.parametrize("say", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)], ids=["first", "last"])
def test_from_every_start_what_the_server_understands_is_found(say, order):
    for start in DIALECTS:
        for understood in subsets():

            def refusal(dialect, understood=understood):
                name = order(wants(dialect) - understood)[0]
                return say("response_format" if name.startswith("json") else name)

            found, tried = walk(start, understood, refusal)
            assert found is not None and wants(found) <= understood, (start, understood, tried)
            if start.temperature and "temperature" in understood:
                assert found.temperature, "nothing is given up that the server knows"
            if start.limit in understood:
                assert found.limit == start.limit
            if start.format in understood:
                assert found.format == start.format
            assert len(tried) <= 5


@given(st.sampled_from(DIALECTS), st.lists(st.sampled_from(
    ["temperature", "max_tokens", "max_completion_tokens", "response_format", "schema", "", "max_tokens temperature"]
), min_size=20, max_size=20))  # fmt: skip
def test_whatever_a_server_says_there_is_an_end(start, said):
    turn = iter(said)
    found, tried = walk(start, set(), lambda dialect: next(turn))
    assert found is None and tried[-1].format == "text" and len(set(tried)) == len(tried) <= len(DIALECTS)


def test_a_refusal_that_says_nothing_of_ours():
    start = Dialect()
    for said in ("", "no", "context length exceeded", "my_max_tokens_limit", "max_token"):
        assert start.drop_refused(said) is None
    both = "temperature, max_tokens and response_format are unknown"
    bare = Dialect("json_object", "max_tokens", False)
    assert bare.drop_refused(both) == Dialect("json_object", "max_completion_tokens", False)
    formats = [start.format]
    while start := start.lower_format():
        formats.append(start.format)
    assert tuple(formats) == FORMAT_NAMES == tuple(FORMATS)
    assert Dialect("text").drop_refused("response_format is unknown") is None


def test_a_name_that_is_a_part_of_another_is_not_that_one():
    said = error("'max_completion_tokens' is unknown")
    assert Dialect(limit="max_tokens").drop_refused(said) is None
    assert Dialect(limit="max_completion_tokens").drop_refused(said).limit == "max_tokens"
    assert Dialect(limit="max_tokens").drop_refused("max_tokens_to_sample is wanted") is None


def test_the_body_of_a_request():
    sampling = Sampling("m", 99, 0.5, {"reasoning_effort": "low", "temperature": 2})
    assert sampling.build_body([1], Dialect("text", "max_tokens", False)) == {
        "model": "m", "messages": [1], "max_tokens": 99, "reasoning_effort": "low", "temperature": 2,
    }  # fmt: skip
    assert sampling.build_body([], Dialect())["temperature"] == 2, "--extra wins"
    body = Sampling("m", 99, 0.5).build_body([], Dialect())
    assert body["max_completion_tokens"] == 99 and body["temperature"] == 0.5 and "max_tokens" not in body
    assert body["response_format"] == FORMATS["json_schema"]
    assert Sampling("m", 1, 0).build_body([], Dialect("json_object"))["response_format"] == {"type": "json_object"}
    assert "response_format" not in Sampling("m", 1, 0).build_body([], Dialect("text"))


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_that_of_the_environment():
    assert find_api_key(OPENAI, {"OPENAI_API_KEY": f" {KEY}\n"}) == KEY
    assert find_api_key("http://10.0.0.5/v1", {"MINE": "x", "OPENAI_API_KEY": KEY}, "MINE") == "x"


@pytest.mark.parametrize("environment", [{}, {"MINE": ""}, {"MINE": " \n"}, {"OPENAI_API_KEY": KEY}])
def test_no_key_is_an_error_of_usage_but_for_a_server_on_this_machine(environment):
    for url in (OPENAI, "http://10.0.0.5:8000/v1", "http://localhost.example.org/v1"):
        with pytest.raises(UsageError, match=r"no API key in \$MINE for http"):
            find_api_key(url, environment, "MINE")
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]", "0.0.0.0"):
        assert find_api_key(f"http://{host}:8000/v1", environment, "MINE") == ""


@pytest.mark.parametrize("key", ["sk-é", "sk-a b", "sk-a\nb", "sk-\x7f", "sk-“a”"])
def test_a_key_that_no_header_can_hold(key):
    with pytest.raises(UsageError, match=r"\$MINE holds") as caught:
        find_api_key(OPENAI, {"MINE": key}, "MINE")
    assert key not in str(caught.value)


# ---- over a real socket ----------------------------------------------------------------------------------------------

RESET = struct.pack("ii", 1, 0)


def response(body, status="200 OK", headers="", length=None):
    body = body.encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {length or len(body)}\r\n{headers}\r\n".encode() + body


async def asked(behave, key=KEY, timeout_s=5.0, body=None, times=1):
    """Return (replies, requests) of a client and of a server that calls behave(reader, writer) for each request."""
    openai = pytest.importorskip("openai")
    requests = []

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    int(line.split(":")[1]) for line in head.lower().split("\r\n") if line.startswith("content-length")
                )
                requests.append((head, json.loads(await reader.readexactly(length))))
                await behave(head, writer)
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", key, timeout_s)
    assert client.api.max_retries == 0 and openai
    replies = [await client.send(body or {"model": "m", "messages": [], "max_tokens": 3}) for _ in range(times)]
    await client.close()
    server.close()
    return replies, requests


def one(behave, **options):
    (reply,), requests = asyncio.run(asked(behave, **options))
    assert len(requests) == 1, "no request is repeated"
    return reply


def sends(data):
    async def behave(head, writer):
        writer.write(data)

    return behave


def test_an_answer():
    body = {"model": "m", "messages": [{"role": "user", "content": "é"}], "max_tokens": 3, "x": {"y": [1]}}
    (reply,), ((head, sent),) = asyncio.run(
        asked(sends(response(ANSWER, headers="X-Ratelimit-Limit-Requests: 5\r\n")), body=body)
    )
    assert (reply.kind, reply.status, reply.body, reply.overloaded) == ("answer", 200, ANSWER, False)
    assert reply.headers["x-ratelimit-limit-requests"] == "5" and reply.started_at > 0
    assert (
        sent == body
        and head.startswith("POST /v1/chat/completions ")
        and f"bearer {KEY}" in head.lower().replace(KEY.lower(), KEY)
    )


@pytest.mark.parametrize("status, kind, overloaded", [
    ("429 Too Many", "failed", True), ("503 Busy", "failed", True), ("408 Late", "failed", True),
    ("529 Over", "failed", True), ("504 Gateway", "lost", True), ("524 Cloudflare", "lost", True),
    ("500 Error", "failed", False), ("401 No", "fatal", False), ("400 Bad", "unsupported", False),
])  # fmt: skip
def test_an_error_status(status, kind, overloaded):
    reply = one(sends(response(error("No."), status, "Retry-After: 4\r\n")))
    assert (reply.kind, reply.status, reply.overloaded) == (kind, int(status[:3]), overloaded)
    assert reply.body == error("No.") and reply.describe_load()["retry_after"] == 4


@pytest.mark.parametrize("code, kind, limited, overloaded", [
    (429, "failed", True, True), (503, "failed", False, True), (500, "failed", False, False),
    (401, "fatal", False, False),
])  # fmt: skip
def test_an_error_inside_of_a_200_has_the_status_that_it_names(code, kind, limited, overloaded):
    reply = one(sends(response(json.dumps({"error": {"code": code, "message": "x"}}))))
    assert (reply.kind, reply.status, reply.is_rate_limit, reply.overloaded) == (kind, code, limited, overloaded)
    assert reply.describe_load() == {"overloaded": overloaded, "limited": limited, "retry_after": None}


@pytest.mark.parametrize("charset", ["hex", "iso-8859-1", "utf-16", "none"])
def test_an_answer_is_read_as_utf_8_whatever_its_header_says(charset):
    answer = ANSWER.replace('"content": "', '"content": "é', 1)
    reply = one(sends(response(answer, headers=f"Content-Type: application/json; charset={charset}\r\n")))
    assert (reply.kind, reply.body) == ("answer", answer)


@pytest.mark.parametrize("body", ["<html>", "", "{}", '{"choices": []}', "\u2028" * 10])
def test_a_200_that_holds_no_answer_may_have_been_billed(body):
    reply = one(sends(response(body)))
    assert (reply.kind, reply.status, reply.body) == ("lost", 200, body)


async def hang(head, writer):
    await asyncio.sleep(30)


async def drip(head, writer):
    writer.write(response(ANSWER)[:-100])
    for _ in range(100):
        await asyncio.sleep(0.1)
        writer.write(b" ")
        await writer.drain()


async def reset(head, writer):
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def reset_in_the_body(head, writer):
    writer.write(response(ANSWER, length=10_000))
    await writer.drain()
    await asyncio.sleep(0.05)
    await reset(head, writer)


async def end_in_the_body(head, writer):
    writer.write(response(ANSWER, length=10_000))
    writer.close()


LOST = {
    "hangs": (hang, True), "drips": (drip, True), "resets": (reset, False),
    "resets in the body": (reset_in_the_body, False),
    "ends in the body": (end_in_the_body, False), "no HTTP": (sends(b"hello\r\n\r\n"), False),
}  # fmt: skip


@pytest.mark.parametrize("behave, overloaded", LOST.values(), ids=LOST)
def test_what_may_have_been_billed_is_lost(behave, overloaded):
    reply = one(behave, timeout_s=0.3)
    assert (reply.kind, reply.status, reply.overloaded) == ("lost", None, overloaded)
    assert reply.body and reply.headers == {} and KEY not in reply.body


def test_an_answer_has_as_long_as_the_flag_says(monkeypatch):
    """And a second, in which a server that ends at the same time can say so."""
    waits = []

    async def wait(call, seconds):
        call.close()
        waits.append(seconds)
        raise asyncio.TimeoutError

    monkeypatch.setattr(module, "wait_awake", wait)
    reply = ask_at("http://127.0.0.1:9/v1", timeout_s=7)
    assert waits == [8] and reply.overloaded
    assert (reply.kind, reply.body) == ("lost", "TimeoutError: no whole answer in 7 s")


def ask_at(url, timeout_s=5.0):
    pytest.importorskip("openai")

    async def main():
        client = Client(url, KEY, timeout_s)
        try:
            return await client.send({"model": "m", "messages": []})
        finally:
            await client.close()

    return asyncio.run(main())


def test_a_closed_client_keeps_no_connection():
    pytest.importorskip("openai")

    async def main():
        client = Client("http://localhost:1/v1", KEY, 5.0)
        assert not client.api.is_closed()
        await client.close()
        return client.api.is_closed()

    assert asyncio.run(main())


def test_what_was_never_sent_was_not_billed():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reply = ask_at(f"http://127.0.0.1:{port}/v1")
    assert (reply.kind, reply.status, reply.overloaded) == ("failed", None, False) and "ConnectError" in reply.body
    assert ask_at("http://no-such-host.invalid/v1").kind == "failed"


def test_a_connection_that_never_comes_about_was_not_billed():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        others = [socket.socket() for _ in range(4)]
        for other in others:
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        reply = ask_at(f"http://127.0.0.1:{full.getsockname()[1]}/v1", timeout_s=0.4)
        for other in others:
            other.close()
    assert (reply.kind, reply.status, reply.overloaded) == ("failed", None, True) and "ConnectTimeout" in reply.body


def test_a_connection_is_used_again_and_a_failure_does_not_spoil_it():
    (first, second), requests = asyncio.run(asked(sends(response(ANSWER)), times=2))
    assert first.kind == second.kind == "answer" and len(requests) == 2 and second.started_at >= first.started_at


def test_what_a_server_refused_is_left_out_of_the_body():
    sampling = Sampling("m", 9, 0.5)
    for dialect in (Dialect(), Dialect(temperature=False), Dialect(limit="max_tokens", format=FORMAT_NAMES[-1])):
        body = sampling.build_body([], dialect)
        assert ("temperature" in body) == dialect.temperature and body[dialect.limit] == 9
        assert ("response_format" in body) == (FORMATS[dialect.format] is not None)
    assert Sampling("m", 9, 0.5, {"temperature": 1}).build_body([], Dialect(temperature=False))["temperature"] == 1


def test_a_text_is_one_of_those_that_a_schema_lists():
    schema = {
        "type": "json_schema",
        "schema": {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}},
    }
    assert keeps_format('{"a": "x"}', schema) and not keeps_format('{"a": "y"}', schema)


def test_secrets_of_the_address_are_hidden_as_the_key_is():
    client = Client("http://me:pa55word-of-mine@127.0.0.1:9/v1?sig=s3cret-signature&api-version=2026-01-01", KEY, 5.0)
    told = client.hide_key(f"pa55word-of-mine, s3cret-signature, {KEY}, 2026-01-01")
    assert told == "[key], [key], [key], 2026-01-01"


def test_the_key_is_not_kept_of_a_failed_connection(monkeypatch):
    openai = pytest.importorskip("openai")

    async def fail(call, seconds):
        call.close()
        raise openai.APIConnectionError(request=None) from OSError(f"a header was refused: Bearer {KEY}")

    monkeypatch.setattr(module, "wait_awake", fail)
    reply = ask_at("http://127.0.0.1:9/v1")
    assert (reply.kind, reply.body) == ("lost", "OSError: a header was refused: Bearer [key]")


@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized", "500 Error"])
def test_the_key_is_never_kept(status):
    async def echo(head, writer):
        told = next(line for line in head.split("\r\n") if line.lower().startswith("authorization"))
        assert KEY in told
        found = COMPLETION | {"id": told, "echo": head}
        writer.write(
            response(json.dumps(found), status, f"X-Echo: {told.split(': ')[1]}\r\nX-Ratelimit-Reset-Tokens: {KEY}\r\n")
        )

    reply = one(echo)
    assert KEY not in repr(reply) and KEY.lower() not in repr(reply).lower()
    assert "[key]" in reply.body and reply.headers == {"x-ratelimit-reset-tokens": "[key]"} and json.loads(reply.body)


@pytest.mark.parametrize("key", ["none", "EMPTY", "x", "", "sk-1", "anything"])
def test_a_word_that_stands_in_for_a_key_is_left_in_answers(key):
    body = json.dumps({"choices": [{"message": {"content": "none, EMPTY, x, sk-1, anything"}}]})
    assert one(sends(response(body)), key=key).body == body


def test_the_first_dialect_is_that_of_the_host():
    pytest.importorskip("openai")
    assert Client(OPENAI, KEY, 1).dialect == Dialect("json_schema", "max_completion_tokens", True)
    assert Client("http://localhost:1/v1", "", 1).dialect == Dialect("json_schema", "max_tokens", True)
    with pytest.raises(UsageError):
        Client("localhost:1/v1", "", 1)


# ---- answers of reasoning alone, formats that are ignored, marks before the JSON -------------------------------------

ALONE = {
    "reasoning_content": ({"content": None, "reasoning_content": "Let me think."}, {}),
    "reasoning": ({"content": "", "reasoning": "Let me think."}, {}),
    "details": ({"content": " \n", "reasoning_details": [{"text": "Let me think."}]}, {}),
    "parts": ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Let me think."}]}]}, {}),
    "usage alone": ({"content": None}, {"completion_tokens_details": {"reasoning_tokens": 7}}),
    "hidden usage": ({"content": ""}, {"total_tokens": 500, "reasoning_tokens": 488}),
    "a thought without an end": ({"content": "<think>Let me see {\"tasks\": ["}, {}),
    "a thought in capitals": ({"content": "\n<Thinking>Let me see"}, {}),
}  # fmt: skip


def think(message, usage, finish="length"):
    choice = {"message": message, "finish_reason": finish}
    return read_answer(json.dumps({"choices": [choice], "usage": COMPLETION["usage"] | usage}))


@pytest.mark.parametrize("message, usage", ALONE.values(), ids=ALONE)
def test_an_answer_of_reasoning_alone_is_known(message, usage):
    assert think(message, usage).is_reasoning_alone and think(message, usage, "stop").is_reasoning_alone
    assert not think(message, usage, "content_filter").is_reasoning_alone
    assert not think(message | {"refusal": "No."}, usage).is_reasoning_alone


@pytest.mark.parametrize("message", [
    {"content": "hello", "reasoning_content": "Let me think."}, {"content": ""}, {"content": None},
    {"content": "<think>Let me see.</think>hello"}, {"content": "hello <think>"},
    {"content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "hello"}]},
])  # fmt: skip
def test_an_answer_of_another_kind_is_not_of_reasoning_alone(message):
    assert not think(message, {}).is_reasoning_alone


TASKS = '{"tasks": [{"instruction": "a", "input": "", "output": "b"}]}'


@pytest.mark.parametrize("format, text, kept", [
    ("json_schema", TASKS, True), ("json_schema", f"\n\ufeff{TASKS}\n", True), ("json_schema", '{"tasks": []}', True),
    ("json_object+schema", TASKS, True), ("json_object", TASKS, True), ("json_object", "{}", True), ("text", "x", True),
    ("json_schema", f"```json\n{TASKS}\n```", False), ("json_schema", "Sure!", False), ("json_schema", "{}", False),
    ("json_schema", '{"tasks": {}}', False), ("json_schema", '{"tasks": [], "more": 1}', False),
    ("json_schema", '{"tasks": [{"instruction": "a", "input": "", "output": 5}]}', False),
    ("json_schema", '{"tasks": [{"instruction": "a", "output": "b"}]}', False), ("json_schema", "[" * 10_000, False),
    ("json_object+schema", '{"tasks": 5}', False), ("json_object", "[]", False), ("json_object", "5", False),
])  # fmt: skip
def test_whether_an_answer_keeps_to_its_format(format, text, kept):
    assert keeps_format(text, FORMATS[format]) is kept


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_before_the_json_is_no_part_of_it(encoding):
    text = ANSWER.replace("hello", "é")
    data = text.encode(encoding)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    reply = one(sends(head + data))
    assert (reply.kind, reply.body) == ("answer", text)


# ---- Azure, secrets of an address, a clock that stands still ---------------------------------------------------------


def test_azures_version_and_header_are_sent():
    async def main():
        async def serve(reader, writer):
            heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(response(ANSWER))
            await writer.drain()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}/openai/deployments/d?api-version=2026-06-01&x=a+b", KEY, 5)
        reply = await client.send({"model": "m", "messages": []})
        await client.close()
        server.close()
        return reply

    pytest.importorskip("openai")
    heads = []
    assert asyncio.run(main()).kind == "answer"
    line, *headers = heads[0].split("\r\n")
    assert line.split()[1] == "/openai/deployments/d/chat/completions?api-version=2026-06-01&x=a+b"
    assert f"api-key: {KEY}" in headers


@pytest.mark.parametrize("host, bearer, own", [
    ("mine.openai.azure.com", False, True), ("mine.services.ai.azure.com", False, True),
    ("x.azure-api.net", False, True), ("api.openai.com", True, False), ("azure.com.example.org", True, False),
])  # fmt: skip
def test_azure_takes_the_key_in_its_own_header_alone(host, bearer, own, monkeypatch):
    pytest.importorskip("openai")
    client, seen = Client(f"https://{host}/v1", KEY, 5), []

    async def handle(request):
        seen.append(request.headers)
        raise client.openai.APIConnectionError(request=request)

    monkeypatch.setattr(client.api._client._transport, "handle_async_request", handle)
    monkeypatch.setattr(client.api._client, "_mounts", {})
    assert asyncio.run(client.send({"model": "m", "messages": []})).kind == "lost"
    (headers,) = seen
    assert (headers.get("authorization") == f"Bearer {KEY}", headers.get("api-key") == KEY) == (bearer, own)


@pytest.mark.parametrize("address, shown", [
    ("https://x.org/v1?api-version=2026-06-01", "https://x.org/v1?api-version=2026-06-01"),
    ("https://mary:Tr0ub4dor@x.org/v1", "https://x.org/v1"),
    ("https://x.org/v1?key=AIza-0123456789&api-version=2", "https://x.org/v1?key=[key]&api-version=2"),
])  # fmt: skip
def test_an_address_is_shown_without_secrets(address, shown):
    assert hide_secrets(address) == shown


def test_a_404_from_an_address_without_a_version_says_what_may_be_missing():
    pytest.importorskip("openai")
    body = {"error": "Unexpected endpoint or method. (POST /chat/completions)"}
    for path, hinted in (("", True), ("/api", True), ("/v1", False), ("/api/v1beta/openai", False)):
        client = Client(f"http://localhost:1{path}", "", 1)
        reply = client.make_reply(*judge_success(json.dumps(body)), json.dumps(body), {}, 0.0)
        assert (reply.kind, reply.status) == ("fatal", 404) and ("/v1" in reply.hint) is hinted


def test_a_router_that_limits_the_money_in_flight_is_waited_for():
    pytest.importorskip("openai")
    client = Client("http://localhost:1/v1", "", 1)
    assert client.make_reply("fatal", 402, "{}", {}, 0.0).kind == "fatal"
    reply = client.make_reply("fatal", 402, "{}", {"retry-after": "3"}, 0.0)
    assert reply.kind == "failed" and reply.is_rate_limit and reply.describe_load()["retry_after"] == 3


def test_a_process_that_did_not_run_has_not_waited(monkeypatch):
    """The loop is held up for longer than the time-out, as on a machine that is asleep or too busy."""
    from data_gen.api import client

    monkeypatch.setattr(client, "TICK_S", 0.05)

    async def main():
        async def answer():
            for _ in range(5):
                await asyncio.sleep(0.02)
                time.sleep(0.2)
            return "answer"

        return await wait_awake(answer(), 0.5)

    assert asyncio.run(main()) == "answer"


def test_a_call_is_ended_with_who_waits_for_it():
    ended = []

    async def hang():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def main():
        waiting = asyncio.ensure_future(wait_awake(hang(), 60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert ended, "it went on without anybody"

    asyncio.run(main())


def test_a_call_that_takes_too_long_is_ended(monkeypatch):
    ended = []

    async def main():
        async def hang():
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(True)

        with pytest.raises(asyncio.TimeoutError):
            await wait_awake(hang(), 0.1)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert ended

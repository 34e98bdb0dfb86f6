"""Errors inside of a 200: each is the error that it names or that its words say, costs nothing, and is never lost."""

import json

import pytest

pytest.importorskip("openai")

from data_gen.api.answers import judge_success
from data_gen.api.client import Reply
from data_gen.api.errors import GAVE_UP, OVERLOADED, RETRIED, classify_error, extract_message, find_error

CHOICE = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}


def body(error, **more):
    return {"error": error} | more


INSIDE = {  # what a server sends with status 200: (body, the status it stands for, kind)
    "LM Studio, no /v1": (body("Unexpected endpoint or method. (POST /chat/completions)"), 404, "fatal"),
    "OpenRouter, money": (body({"message": "Insufficient credits", "code": 402}), 402, "fatal"),
    "OpenRouter, rate": (
        {"id": None, "choices": None, "usage": None, "error": {"message": "Provider returned error", "code": 429}},
        429, "failed",
    ),
    "OpenRouter, provider": (body({"message": "Provider returned error", "code": 502}), 502, "failed"),
    "OpenRouter, moderation": (
        body({"message": "Your chosen model requires moderation and your input was flagged", "code": 403}),
        403, "refused",
    ),
    "OpenRouter, the provider's words": (
        body({"message": "Provider returned error", "metadata": {"raw": "model x is temporarily rate limited"}}),
        429, "failed",
    ),
    "Gemini, a list": (
        [{"error": {"code": 429, "message": "Resource has been exhausted", "status": "RESOURCE_EXHAUSTED"}}],
        429, "failed",
    ),
    "Gemini, words": (body({"message": "no", "status": "RESOURCE_EXHAUSTED"}), 429, "failed"),
    "OpenAI, a code of words": (body({"message": "No.", "code": "insufficient_quota"}), 402, "fatal"),
    "OpenAI, key": (body({"message": "Incorrect API key provided", "code": "invalid_api_key"}), 401, "fatal"),
    "OpenAI, model": (body({"message": "The model `x` does not exist", "code": "model_not_found"}), 404, "fatal"),
    "OpenAI, policy": (body({"message": "x", "code": "content_policy_violation"}), 400, "refused"),
    "OpenAI, parameter": (
        body({"message": "Unsupported value: 'temperature'", "type": "invalid_request_error"}), 422, "unsupported",
    ),
    "response_format": (body("response_format is unknown to me"), 422, "unsupported"),
    "a code as text": (body({"message": "x", "code": "503"}), 503, "failed"),
    "a status of its own before that beside it": (body({"code": 429, "message": "x"}, status=500), 429, "failed"),
    "a status beside it": (body("x", status=401), 401, "fatal"),
    "statusCode": ({"message": "x", "statusCode": 402}, 402, "fatal"),
    "vLLM, old": ({"object": "error", "message": "no such model", "code": 40401}, 404, "fatal"),
    "FastAPI": ({"detail": "Not Found"}, 404, "fatal"),
    "FastAPI, a list": ({"detail": [{"msg": "Extra inputs are not permitted"}]}, 422, "unsupported"),
    "Cloudflare": ({"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]}, 401, "fatal"),
    "Zhipu": ({"code": 500, "msg": "404 NOT_FOUND", "success": False}, 500, "failed"),
    "Anthropic": ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 503, "failed"),
    "Ollama": (body("server busy, please try again"), 503, "failed"),
    "unknown words": (body("the model crashed"), 500, "failed"),
    "a proxy's limit": (body("504"), 500, "failed"),
    "a time-out's code": (body({"code": 504, "message": "x"}), 504, "failed"),
    "true": (body(True), 500, "failed"),
    "a number": (body(17), 500, "failed"),
    "in an empty choice": (
        {"choices": [{"error": {"code": 402, "message": "x"}, "message": {"content": ""}, "finish_reason": None}]},
        402, "fatal",
    ),
    "in a choice without a message": ({"choices": [{"error": {"code": 429, "message": "x"}}]}, 429, "failed"),
    "a finish_reason": ({"choices": [{"finish_reason": "error", "message": {"content": None}}]}, 500, "failed"),
    "a finish_reason and an error beside it": (
        {"choices": [{"finish_reason": "error", "message": {"content": ""}}], "error": {"code": 401}}, 401, "fatal",
    ),
    "beside an empty message": (
        {"choices": [CHOICE | {"message": {"content": ""}}], "error": {"code": 502, "message": "x"}}, 502, "failed",
    ),
    "beside no choices": ({"choices": [], "error": {"code": 502, "message": "x"}}, 502, "failed"),
}  # fmt: skip


@pytest.mark.parametrize("found, status, kind", INSIDE.values(), ids=INSIDE)
def test_an_error_inside_a_200_is_that_error(found, status, kind):
    assert find_error(found) == status and judge_success(json.dumps(found)) == (kind, status)


SAID = {  # words of servers that name no status, and the status they stand for
    400: "rejected as a result of our safety system",
    402: "Insufficient credits|Insufficient Balance|insufficient quota|Insufficient funds|You are out of credits"
    "|Payment Required|You exceeded your current quota|Check your billing details",
    429: "Rate limit reached|rate_limit_exceeded|RateLimitError|Too Many Requests|RESOURCE_EXHAUSTED"
    "|ThrottlingException|Please slow down",
    401: "Unauthorized|UNAUTHENTICATED|Incorrect API key|invalid_api_key|no apikey|Authentication Fails"
    "|no Authorization header|Invalid credentials|bad access token",
    503: "overloaded_error|Service Unavailable|Model at capacity|server busy|Loading model|Please try again",
    408: "Request timed out.|Gateway Timeout|408 Request Time-out|Deadline exceeded",
    404: "Unexpected endpoint|unknown endpoint|Wrong endpoint or method|Not Found|NOT_FOUND|no such model"
    "|no Route matched|The model `x` does not exist|Cannot POST /v1|Invalid URL|unknown url|unknown model"
    "|No models loaded",
    403: "Forbidden|Permission denied|not allowed to sample|Access denied",
    422: "invalid_request_error|Invalid request|Bad Request|INVALID_ARGUMENT|Unsupported value|is not supported"
    "|Unrecognized argument|Unknown parameter|response_format|max_tokens|temperature|maximum context length"
    "|Context size has been exceeded|Extra inputs|Invalid value",
}


@pytest.mark.parametrize(
    "status, said", [(status, said) for status, texts in SAID.items() for said in texts.split("|")]
)
def test_words_stand_for_a_status(status, said):
    assert find_error(body(said)) == status


@pytest.mark.parametrize("name", ["code", "status", "status_code", "statusCode", "http_code", "error_code"])
def test_fields_that_hold_a_status(name):
    assert find_error(body({"message": "x", name: 429})) == 429 and find_error(body("x", **{name: "503"})) == 503


@pytest.mark.parametrize("name", ["error", "errors", "detail", "message", "msg", "error_msg", "error_message"])
def test_fields_that_hold_an_error(name):
    assert find_error({name: "Not Found"}) == 404


CODES = {
    "fatal": "insufficient_quota billing_hard_limit_reached billing_not_active insufficient_funds",
    "refused": "content_policy_violation content_filter invalid_prompt moderation_blocked ResponsibleAIPolicyViolation",
}


@pytest.mark.parametrize("kind, code", [(kind, code) for kind, codes in CODES.items() for code in codes.split()])
def test_codes_decide_over_a_status(kind, code):
    said = body({"code": code})
    assert classify_error(400, json.dumps(said)) == kind and find_error(said) == (402 if kind == "fatal" else 400)


NONE = {
    "an answer": ({"choices": [CHOICE]}, "answer"),
    "an answer beside a null error": ({"choices": [CHOICE], "error": None}, "answer"),
    "an answer beside a warning": ({"choices": [CHOICE], "error": {"message": "slow", "code": 429}}, "answer"),
    "an answer about errors": (
        {"choices": [CHOICE | {"message": {"content": "rate limit, error 429, not found"}}]}, "answer",
    ),
    "an empty answer": ({"choices": [CHOICE | {"message": {"content": None}}]}, "answer"),
    "nothing": ({}, "lost"), "no choices": ({"choices": []}, "lost"), "a null choice": ({"choices": [None]}, "lost"),
    "another API's answer": ({"message": {"role": "assistant", "content": "hi"}, "done": True}, "lost"),
    "a text": ("error", "lost"), "a list of two": ([{"error": "x"}, {"error": "y"}], "lost"), "null": (None, "lost"),
}  # fmt: skip


@pytest.mark.parametrize("found, kind", NONE.values(), ids=NONE)
def test_what_is_no_error(found, kind):
    assert find_error(found) is None and judge_success(json.dumps(found)) == (kind, 200)


def test_an_answer_that_broke_off_may_have_been_billed_unless_it_tells_its_bill():
    choice = CHOICE | {"finish_reason": "error", "error": {"code": 502, "message": "gone"}}
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    assert judge_success(json.dumps({"choices": [choice]})) == ("lost", 502)
    assert judge_success(json.dumps({"choices": [choice], "usage": usage})) == ("failed", 502)
    assert extract_message(json.dumps({"choices": [choice]})) == "gone"


def test_words_of_a_prompt_that_comes_back_do_not_decide():
    said = {"choices": [{"finish_reason": "error", "message": {"content": ""}, "note": "rate limit"}]}
    assert find_error(said | {"prompt": "api key not found"}) == 500


def test_a_status_of_load_or_of_a_proxy_is_known_as_such():
    """After the first the rate falls; after the second a server may go on, and bill."""
    assert {408, 429, 503, 504, 524, 529} == OVERLOADED and {504, 524} == GAVE_UP
    for status in RETRIED | OVERLOADED:
        assert classify_error(status, "no") == "failed"


def test_a_request_that_no_minute_has_room_for_is_not_sent_again():
    said = json.dumps({"error": {"message": "Request too large for m on tokens per min (TPM): Limit 9, Requested 10"}})
    assert classify_error(429, said) == "unsupported" and classify_error(429, "Rate limit") == "failed"
    assert Reply("failed", 429, said).is_rate_limit and not Reply("unsupported", 429, said).is_rate_limit

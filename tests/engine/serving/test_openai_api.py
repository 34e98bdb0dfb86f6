"""What a body may say, and that /openapi.json describes just that."""

import pytest

from engine.serving import openai_api, openapi
from engine.serving.openai_api import ApiError, read_chat, read_completion

ASK = {"messages": [{"role": "user", "content": "Hi"}]}


def test_what_is_described_is_what_is_read():
    assert set(openapi.OF_CHAT) == openai_api.CHAT
    assert set(openapi.describe_completion(10)) == openai_api.COMPLETION
    described = openapi.describe_api(has_key=True, vocab_size=10)
    for path, schema in described["paths"].items():
        assert path.startswith(("/v1/", "/health", "/metrics")) and schema
    body = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == openai_api.CHAT | openai_api.IGNORED and not body["additionalProperties"]
    assert "security" in described and "security" not in openapi.describe_api(has_key=False, vocab_size=10)


def test_whole_numbers_may_be_written_with_a_point():
    """JSON has one kind of number, and 8.0 is what some languages write for 8."""
    wanted = read_chat(ASK | {"max_tokens": 8.0, "n": 2.0, "seed": 3.0, "top_k": 4.0})
    assert (wanted.max_tokens, wanted.n, wanted.sampling.seed, wanted.sampling.top_k) == (8, 2, 3, 4)
    assert type(wanted.max_tokens) is int and read_completion({"prompt": [1.0, 2]}).prompts == [[1, 2]]


def test_the_newer_name_of_the_limit_decides_unless_it_is_null():
    limits = ({"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5})
    for more in (*limits, {"max_completion_tokens": None, "max_tokens": 5}):
        assert read_chat(ASK | more).max_tokens == 5, more
    assert read_chat(ASK).max_tokens is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0, "max_completion_tokens": 9}, "max_tokens"),
        ({"max_completion_tokens": 0, "max_tokens": 9}, "max_completion_tokens"),
        ({"n": True}, "n"),
        ({"stop": False}, "stop"),
        ({"stop": 0}, "stop"),
        ({"logit_bias": {"0": False}}, "logit_bias.0"),
        ({"logit_bias": {"0": None}}, "logit_bias"),
        ({"tools": [None]}, "tools"),
        ({"tools": 1, "tool_choice": "none"}, "tools"),
        ({"logit_bias": {"0": "1"}}, "logit_bias.0"),
        ({"logit_bias": {" 1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"response_format": {"type": "text", "pattern": "a"}}, "pattern"),
        ({"response_format": {"type": "json_object", "schema": False}}, "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}}, "strict"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}}}, "other"),
        ({"response_format": {"type": ["text"]}}, "response_format"),
    ],
    ids=str,
)
def test_what_a_body_says_wrongly_is_named(more, param):
    with pytest.raises(ApiError) as refused:
        read_chat(ASK | more)
    assert refused.value.status == 400 and refused.value.param == param


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, False], [1.5], [["a"]], {"a": 1}, [1, "a"]], ids=str)
def test_a_prompt_is_a_text_or_ids(prompt):
    with pytest.raises(ApiError, match="prompt: wanted a text"):
        read_completion({"prompt": prompt})

"""What a body may say, and that /openapi.json describes just that."""

import math

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
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
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


NUMBERS = {  # what each is unless it is given (None: drawn), its least and its most
    "temperature": (1, 0, 2), "top_p": (1, 1e-6, 1), "min_p": (0, 0, 1), "frequency_penalty": (0, -2, 2),
    "presence_penalty": (0, -2, 2), "repetition_penalty": (1, 0.01, 10),
}  # fmt: skip
WHOLE = {"top_k": (0, 0, 2**31), "n": (1, 1, 16), "seed": (None, -(2**63), 2**63 - 1)}


@pytest.mark.parametrize("read, ask", [(read_chat, ASK), (read_completion, {"prompt": "a"})])
@pytest.mark.parametrize("name", [*NUMBERS, *WHOLE])
def test_the_ends_of_what_a_number_may_be(name, read, ask):
    default, least, most = (NUMBERS | WHOLE)[name]

    def found(body):
        wanted = read(body)
        return wanted.n if name == "n" else getattr(wanted.sampling, name)

    unsaid = {found(body) for body in (ask, ask | {name: None}) for _ in range(3)}
    assert unsaid == {default} if default is not None else len(unsaid) > 3, "a seed is another one each time"
    for value in (least, most):
        assert found(ask | {name: value}) == (value % 2**63 if name == "seed" else value)
    beyond = (
        (least - 1, most + 1) if name in WHOLE else (math.nextafter(least, -99), math.nextafter(most, 99), math.nan)
    )
    for value in (*beyond, True, "1", [1]):
        with pytest.raises(ApiError, match=rf"^{name} is .*wanted a (whole )?number of") as refused:
            read(ask | {name: value})
        assert refused.value.param == name


def test_the_ends_that_are_described_are_those_that_are_read():
    ends = {name: (least, most) for name, (_, least, most) in (NUMBERS | WHOLE).items()} | {"top_logprobs": (0, 20)}
    for name, (least, most) in ends.items():
        described, null = openapi.OF_CHAT[name]["anyOf"]
        assert (described["minimum"], described["maximum"]) == (least, most) and null == {"type": "null"}
        assert described["type"] == ("integer" if name in WHOLE or name == "top_logprobs" else "number")
    assert openapi.OF_CHAT["stop"]["anyOf"][1]["maxItems"] == 16


def test_the_ends_of_logprobs_and_stops():
    for n in (0, 20):
        assert read_chat(ASK | {"logprobs": True, "top_logprobs": n}).sampling.n_logprobs == n
        assert read_completion({"prompt": "a", "logprobs": n}).sampling.n_logprobs == n
    assert read_chat(ASK | {"logprobs": True}).sampling.n_logprobs == 0
    assert read_chat(ASK).sampling.n_logprobs is None is read_completion({"prompt": "a"}).sampling.n_logprobs
    for n in (-1, 21):
        with pytest.raises(ApiError, match="top_logprobs is"):
            read_chat(ASK | {"logprobs": True, "top_logprobs": n})
        with pytest.raises(ApiError, match=r"^logprobs is"):
            read_completion({"prompt": "a", "logprobs": n})
    for stop, stops in ((None, []), ("", []), ("a", ["a"]), (["a"] * 16, ["a"] * 16)):
        assert read_chat(ASK | {"stop": stop}).stops == stops
    for stop in (["a"] * 17, [""], [1], 5):
        with pytest.raises(ApiError, match="stop: wanted a text, or a list of at most 16"):
            read_chat(ASK | {"stop": stop})
    for bias in (-100, 100):
        assert read_chat(ASK | {"logit_bias": {"7": bias}}).sampling.bias == {7: bias}
    for bias in (-100.1, 100.1):
        with pytest.raises(ApiError, match=r"logit_bias\.7 is"):
            read_chat(ASK | {"logit_bias": {"7": bias}})


@pytest.mark.parametrize(
    "name",
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "parallel_tool_calls", "verbosity", "reasoning_effort"],
)  # fmt: skip
def test_what_has_no_effect_here_is_taken(name):
    assert read_chat(ASK | {name: "x", "seed": 1}) == read_chat(ASK | {"seed": 1})
    assert read_completion({"prompt": "a", name: "x", "seed": 1}) == read_completion({"prompt": "a", "seed": 1})


@pytest.mark.parametrize("body, limit", [({}, 16), ({"max_tokens": None}, None), ({"max_tokens": 1}, 1)])
def test_a_completion_has_16_tokens_unless_it_is_said(body, limit):
    assert read_completion({"prompt": "a"} | body).max_tokens == limit
    for echo in (True, False):
        assert read_completion({"prompt": "a", "echo": echo} | body).echo == echo


@pytest.mark.parametrize("more", [{}, {"best_of": None}, {"best_of": 1}, {"best_of": 2, "n": 2}, {"suffix": None}])
def test_best_of_n_is_n(more):
    assert read_completion({"prompt": "a"} | more).n == more.get("n", 1)
    for odd in ({"best_of": 3, "n": 2}, {"best_of": 2}, {"suffix": "x"}):
        with pytest.raises(ApiError, match=r"best_of: wanted as many as n|suffix: this model"):
            read_completion({"prompt": "a"} | odd)


def test_what_a_message_says_beside_its_text_is_kept():
    calls = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is there?"}]
    chat = [
        {"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts},
        {"role": "assistant", "tool_calls": calls, "content": None},
        {"role": "tool", "tool_call_id": "c1", "content": "A fig."}, {"role": "user", "content": "", "tool_calls": []},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "look"}}]
    wanted = read_chat({"messages": chat, "tools": tools, "input": "an input", "model": "m"})
    assert wanted.messages == [
        ("system", "Be kind."), ("user", "What is there?"), ("assistant", ""), ("tool", "A fig."), ("user", "")
    ]  # fmt: skip
    assert wanted.more == {2: {"tool_calls": calls}, 3: {"tool_call_id": "c1"}}
    assert (wanted.tools, wanted.input, wanted.model) == (tools, "an input", "m")
    for choice, found in (("auto", tools), (None, tools), ("none", [])):
        assert read_chat({"messages": chat, "tools": tools, "tool_choice": choice}).tools == found
    with pytest.raises(ApiError, match="tool_choice is 'required', wanted auto or none"):
        read_chat({"messages": chat, "tools": tools, "tool_choice": "required"})


@pytest.mark.parametrize("read, ask", [(read_chat, ASK), (read_completion, {"prompt": "a"})])
@pytest.mark.parametrize("stream, options, found", [
    (None, None, (False, False)), (True, None, (True, False)), (True, {"include_usage": True}, (True, True)),
    (True, {"include_usage": False}, (True, False)), (False, {}, (False, False)),
])  # fmt: skip
def test_usage_is_streamed_to_who_asks_for_it(read, ask, stream, options, found):
    wanted = read(ask | {"stream": stream, "stream_options": options})
    assert (wanted.stream, wanted.include_usage) == found


@pytest.mark.parametrize("status, kind", [(400, "invalid_request_error"), (404, "invalid_request_error"),
                                          (499, "invalid_request_error"), (500, "server_error"),
                                          (503, "server_error")])  # fmt: skip
def test_an_error_says_whose_fault_it_is(status, kind):
    told = {"message": "odd", "type": kind, "param": "p", "code": "c"}
    assert ApiError(status, "odd", "p", "c").body() == {"error": told}


def test_the_objects_that_are_sent_back_have_the_names_of_openai():
    heads = {kind: openai_api.new_head(kind, "m") for kind in ("chat.completion", "text_completion")}
    assert [head["id"].split("-")[0] for head in heads.values()] == ["chatcmpl", "cmpl"]
    assert all((head["object"], head["model"]) == (kind, "m") for kind, head in heads.items())
    tops = [{"token": "Fi", "logprob": -0.5}, {"token": "Da", "logprob": -2.0}]
    tokens = [{"token": "Fi", "logprob": -0.5, "top_logprobs": tops}, {"token": "gs!", "logprob": -1.0,
                                                                       "top_logprobs": []}]  # fmt: skip
    assert openai_api.legacy_logprobs(tokens, 7) == {
        "tokens": ["Fi", "gs!"], "token_logprobs": [-0.5, -1.0], "text_offset": [7, 9],
        "top_logprobs": [{"Fi": -0.5, "Da": -2.0}, {}],
    }  # fmt: skip
    choices = [openai_api.Choice("Figs!", "stop", 2, tokens), openai_api.Choice("Dates", "length", 5)]
    chat, text = (whole(heads["chat.completion"], choices, 9, True) for whole in (
        openai_api.whole_chat, openai_api.whole_completion
    ))  # fmt: skip
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
    assert chat["usage"] == text["usage"] == usage
    assert [c["message"]["content"] for c in chat["choices"]] == [c["text"] for c in text["choices"]]
    assert [(c["index"], c["finish_reason"]) for c in chat["choices"]] == [(0, "stop"), (1, "length")]
    assert chat["choices"][0]["logprobs"]["content"] == tokens


SCHEMA = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize("read, ask", [(read_chat, ASK), (read_completion, {"prompt": "a"})])
@pytest.mark.parametrize(
    "format, schema, regex",
    [
        (None, None, None), ({"type": "text"}, None, None), ({"type": "json_object"}, {"type": "object"}, None),
        ({"type": "json_object", "schema": SCHEMA}, SCHEMA, None), ({"type": "regex", "pattern": "a+"}, None, "a+"),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, SCHEMA, None),
    ],
)  # fmt: skip
def test_what_an_answer_is_to_follow(read, ask, format, schema, regex):
    wanted = read(ask | {"response_format": format})
    assert (wanted.schema, wanted.regex) == (schema, regex)

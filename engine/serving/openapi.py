"""The server's endpoints as an OpenAPI 3.1 description, which /openapi.json serves: for clients that are generated.

engine.serving.openai_api reads what this describes, and refuses what it does not: the keys are compared by a test.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.serving.openai_api import IGNORED, MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS, ROLES

Schema = dict[str, Any]


def _nullable(**schema: Any) -> Schema:
    """Return a schema that also takes null, which stands for the default."""
    return {"anyOf": [schema, {"type": "null"}]}


def _number(least: float, most: float, kind: str = "number") -> Schema:
    return _nullable(type=kind, minimum=least, maximum=most)


TEXT: Schema = {"type": "string"}
PROMPT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FORMAT: Schema = {
    "anyOf": [
        {
            "type": "object", "required": ["type"], "additionalProperties": False,
            "properties": {"type": {"const": "text"}},
        },
        {
            "type": "object", "required": ["type"], "additionalProperties": False,
            "properties": {"type": {"const": "json_object"}, "schema": _nullable(type="object")},
        },
        {
            "type": "object", "required": ["type", "json_schema"], "additionalProperties": False,
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object", "required": ["schema"],
                    "additionalProperties": False,
                    "properties": {
                        "schema": {"type": "object"}, "name": _nullable(type="string"),
                        "description": _nullable(type="string"), "strict": _nullable(type="boolean"),
                    },
                },
            },
        },
        {
            "type": "object", "required": ["type", "pattern"], "additionalProperties": False,
            "properties": {"type": {"const": "regex"}, "pattern": TEXT},
        },
        {"type": "null"},
    ]
}  # fmt: skip
SHARED: dict[str, Schema] = {
    "model": _nullable(type="string"),
    "max_tokens": _nullable(type="integer", minimum=1),
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "top_k": _number(0, 2**31, "integer"),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _nullable(
        type="object",
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    ),
    "n": _number(1, MOST_CHOICES, "integer"),
    "seed": _number(-(2**63), 2**63 - 1, "integer"),
    "stop": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MOST_STOPS},
            {"type": "null"},
        ]
    },
    "stream": _nullable(type="boolean"),
    "stream_options": _nullable(type="object", properties={"include_usage": {"type": "boolean"}}),
    "response_format": FORMAT,
}
PART: Schema = {
    "type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": TEXT},
}  # fmt: skip
CONTENT: Schema = {"anyOf": [TEXT, {"type": "array", "items": PART}]}
MESSAGE: Schema = {
    "type": "object", "required": ["role", "content"],
    "properties": {"role": {"enum": list(ROLES)}, "content": CONTENT},
}  # fmt: skip
OF_CHAT = {
    **SHARED,
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
    "max_completion_tokens": _nullable(type="integer", minimum=1),
    "logprobs": _nullable(type="boolean"),
    "top_logprobs": _number(0, MOST_LOGPROBS, "integer"),
    "tools": _nullable(type="array", items={"type": "object"}),
    "tool_choice": {"enum": ["auto", "none", None]},
    "modalities": {"enum": [["text"], None]},
    "input": _nullable(type="string"),
}
WANTS_STREAM: Schema = {
    "if": {"required": ["stream_options"], "properties": {"stream_options": {"type": "object", "minProperties": 1}}},
    "then": {"required": ["stream"], "properties": {"stream": {"const": True}}},
}
WANTS_LOGPROBS: Schema = {
    "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
    "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
}


def describe_completion(vocab_size: int) -> dict[str, Schema]:
    """Return what the body of /v1/completions may say. vocab_size: of the model, whose ids a prompt may be."""
    id = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    prompt = [PROMPT, {"type": "array", "items": id, "minItems": 1}]
    return {
        **SHARED,
        "prompt": {"anyOf": [*prompt, {"type": "array", "items": {"anyOf": prompt}, "minItems": 1, "maxItems": 1}]},
        "logprobs": _number(0, MOST_LOGPROBS, "integer"),
        "echo": _nullable(type="boolean"),
        "best_of": {"enum": [1, None]},
        "suffix": {"type": "null"},
    }


ERROR: Schema = {
    "type": "object", "required": ["error"],
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT, "type": TEXT, "param": _nullable(type="string"), "code": _nullable(type="string")
            },
        }
    },
}  # fmt: skip
EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"data": TEXT}}
USAGE: Schema = {
    "type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
}  # fmt: skip
MODEL: Schema = {
    "type": "object", "required": ["id", "object", "created", "owned_by", "max_model_len"],
    "properties": {
        "id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT,
        "prompt_style": TEXT,
    },
}  # fmt: skip


def _answer(kind: str, said: Mapping[str, Schema]) -> Schema:
    """Return the schema of a whole answer. said: what a choice holds beside its number and its end."""
    choice = {"index": COUNT, "finish_reason": {"enum": ["stop", "length"]}, **said}
    return {
        "type": "object", "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": TEXT, "object": {"const": kind}, "created": COUNT, "model": TEXT, "usage": USAGE,
            "choices": {
                "type": "array", "minItems": 1,
                "items": {"type": "object", "required": list(choice), "properties": choice},
            },
        },
    }  # fmt: skip


REPLY: Schema = {
    "type": "object", "required": ["role", "content"],
    "properties": {"role": {"const": "assistant"}, "content": TEXT},
}  # fmt: skip
WHOLE_CHAT = _answer("chat.completion", {"message": REPLY, "logprobs": _nullable(type="object")})
WHOLE_COMPLETION = _answer("text_completion", {"text": TEXT, "logprobs": _nullable(type="object")})
REFUSALS = {  # the statuses of every endpoint that a body or a load can bring about
    "400": "something in the body is wrong or unknown", "403": "a foreign Host or Origin", "404": "no such model",
    "408": "the body did not arrive in time", "413": "the body is too large", "501": "llguidance is not installed",
    "503": "too many answers are being written or waited for; see Retry-After",
}  # fmt: skip


def _respond(said: str, kind: str, schema: Schema) -> Schema:
    return {"description": said, "content": {kind: {"schema": schema}}}


def _get(said: str, schema: Schema, kind: str = "application/json") -> Schema:
    return {"get": {"summary": said, "responses": {"200": _respond(said, kind, schema)}}}


def _post(said: str, properties: Mapping[str, Schema], required: str, answer: Schema, also: Sequence[Schema]) -> Schema:
    body = {
        "type": "object", "required": [required], "additionalProperties": False,
        "properties": {**properties, **{name: {} for name in sorted(IGNORED)}}, "allOf": list(also),
    }  # fmt: skip
    right = _respond("the answer; of a stream, its events", "application/json", answer)
    right["content"]["text/event-stream"] = {"schema": EVENT}
    responses = {"200": right} | {code: _respond(why, "application/json", ERROR) for code, why in REFUSALS.items()}
    content = {"application/json": {"schema": body}}
    return {
        "post": {"summary": said, "requestBody": {"required": True, "content": content}, "responses": responses}
    }  # fmt: skip


def describe_api(has_key: bool, vocab_size: int) -> Schema:
    """Return the description. has_key: clients must send a key; vocab_size: number of token ids of every model."""
    completion = describe_completion(vocab_size)
    one_model = _get("one model", MODEL)
    one_model["get"]["responses"]["404"] = _respond("no such model", "application/json", ERROR)
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    one_model["get"]["parameters"] = [name]
    models = {
        "type": "object", "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
    }  # fmt: skip
    paths = {
        "/health": _get("whether requests are answered", {"type": "object", "required": ["status"]}),
        "/metrics": _get("counters in Prometheus's text format", TEXT, "text/plain"),
        "/v1/models": _get("the models", models),
        "/v1/models/{model}": one_model,
        "/v1/chat/completions": _post(
            "answer a conversation", OF_CHAT, "messages", WHOLE_CHAT, (WANTS_STREAM, WANTS_LOGPROBS)
        ),
        "/v1/completions": _post("go on with a text", completion, "prompt", WHOLE_COMPLETION, (WANTS_STREAM,)),
    }
    described: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Cria", "version": "1", "summary": "A language model by OpenAI's API"},
        "paths": paths,
    }
    if has_key:
        described |= {
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "security": [{"key": []}],
        }
    return described

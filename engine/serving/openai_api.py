"""OpenAI's requests and answers as plain data: what a body may say, and the objects that are sent back.

A body that says something unknown or impossible is refused with its parameter's name; nothing of it is passed over but
what has no effect here (user, metadata, store and the like).
"""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.inference.sampling import Sampling
from engine.text.templates import Message

# Without effect on an answer here: whose request it is, how it is stored, billed or routed.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity", "reasoning_effort",
}  # fmt: skip
SHARED = {
    "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "top_k", "min_p", "repetition_penalty", "response_format",
}  # fmt: skip
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "modalities", "input"}
COMPLETION = SHARED | {"prompt", "echo", "best_of", "suffix"}
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = {  # of response_format -> what it holds beside its type
    "text": (), "json_object": ("schema",), "json_schema": ("json_schema",), "regex": ("pattern",)
}  # fmt: skip
MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 16, 20, 16


class ApiError(Exception):
    """A request that is refused. The client gets OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wanted:
    """What a request asks for. seed None: another answer each time."""

    model: str
    sampling: Sampling  # of the first choice; the others' seeds count on
    max_tokens: int | None
    n: int
    stops: Sequence[str]
    stream: bool
    include_usage: bool
    schema: Mapping[str, Any] | None = None
    regex: str | None = None
    messages: Sequence[Message] = ()
    more: Mapping[int, dict[str, Any]] = field(default_factory=dict)  # of messages: tool_calls and the like
    tools: Sequence[Any] = ()
    input: str = ""
    prompts: Sequence[str | Sequence[int]] = ()  # of /v1/completions
    echo: bool = False


# ---- reading a body -------------------------------------------------------------------------------------------------


def read_chat(body: Any) -> Wanted:
    """Return what the body of /v1/chat/completions asks for. Raises ApiError."""
    body = _require_known(body, CHAT)
    messages, more = _read_messages(body.get("messages"))
    wants_logprobs = _read(body, "logprobs", bool, False)
    top = _read_number(body, "top_logprobs", 0, 0, MOST_LOGPROBS, integer=True)
    if top and not wants_logprobs:
        raise ApiError(400, "top_logprobs wants logprobs to be true", "top_logprobs")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise ApiError(400, f"tool_choice is {body['tool_choice']!r}, wanted auto or none", "tool_choice")
    if body.get("modalities") not in (None, ["text"]):
        raise ApiError(400, "modalities: this model writes text", "modalities")
    tools = _read(body, "tools", list, [])
    if not all(isinstance(tool, dict) for tool in tools):
        raise ApiError(400, "tools: wanted a list of objects", "tools")
    if body.get("tool_choice") == "none":
        tools = []
    schema, regex = _read_format(body.get("response_format"))
    longest = _read_length(body, "max_completion_tokens")
    return Wanted(
        **_read_shared(body, int(top) if wants_logprobs else None, longest), schema=schema, regex=regex,
        messages=messages, more=more, tools=tools, input=_read(body, "input", str, ""),
    )  # fmt: skip


def read_completion(body: Any) -> Wanted:
    """Return what the body of /v1/completions asks for. Raises ApiError."""
    body = _require_known(body, COMPLETION)
    if body.get("suffix") is not None:
        raise ApiError(400, "suffix: this model writes from left to right", "suffix")
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise ApiError(400, "best_of: wanted as many as n; ask for n answers and choose", "best_of")
    prompt = body.get("prompt")
    given = prompt if isinstance(prompt, list) and not _read_ids(prompt) else [prompt]
    prompts = [p for p in (p if isinstance(p, str) else _read_ids(p) for p in given) if p is not None]
    if not prompts or len(prompts) < len(given):
        raise ApiError(400, "prompt: wanted a text, a list of token ids, or a list of these", "prompt")
    logprobs = body.get("logprobs")
    wanted = None if logprobs is None else _read_number(body, "logprobs", 0, 0, MOST_LOGPROBS, integer=True)
    schema, regex = _read_format(body.get("response_format"))
    longest = None if "max_tokens" in body else 16  # as OpenAI's
    return Wanted(
        **_read_shared(body, None if wanted is None else int(wanted), longest), schema=schema,
        regex=regex, prompts=prompts, echo=_read(body, "echo", bool, False),
    )  # fmt: skip


def _require_known(body: Any, known: set[str], ignored: set[str] = IGNORED) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}, wanted a JSON object")
    unknown = sorted(set(body) - known - ignored)
    if unknown:
        raise ApiError(400, f"unknown parameter {unknown[0]!r}; leave it out", unknown[0], "unknown_parameter")
    return body


def _read(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ApiError(400, f"{name} is a {type(value).__name__}, wanted a {kind.__name__}", name)
    return value


def _read_number(
    body: Mapping[str, Any], name: str, default: float, least: float, most: float, integer: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        return default
    value = _as_int(value) if integer else value
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        kind = "a whole number" if integer else "a number"
        raise ApiError(400, f"{name} is {value!r}, wanted {kind} of {least:g} to {most:g}", name)
    return value


def _as_int(value: Any) -> Any:
    """Return a number like 8.0, which JSON does not tell from 8, as a whole number, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_ids(value: Any) -> list[int] | None:
    """Return a list of token ids, None if it is something else."""
    ids = [_as_int(id) for id in value] if isinstance(value, list) else []
    return ids if ids and all(type(id) is int for id in ids) else None


def _read_length(body: Mapping[str, Any], name: str) -> int | None:
    """Return how many tokens an answer may have at most by a field, None where it says nothing."""
    value = _as_int(body.get(name))
    if value is not None and (type(value) is not int or value < 1):
        raise ApiError(400, f"{name} is {value!r}, wanted a whole number of 1 or more", name)
    return value


def _read_shared(body: Mapping[str, Any], n_logprobs: int | None, longest: int | None) -> dict[str, Any]:
    """Return the fields of Wanted that both endpoints have. longest: of an answer, over max_tokens."""
    most = _read_length(body, "max_tokens")
    stops = body.get("stop")
    stops = [] if stops is None or stops == "" else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, f"stop: wanted a text, or a list of at most {MOST_STOPS} texts that are not empty", "stop")
    options = _read(body, "stream_options", dict, {})
    if options and not body.get("stream"):
        raise ApiError(400, "stream_options wants stream to be true", "stream_options")
    seed = _read_number(body, "seed", secrets.randbits(32), -(2**63), 2**63 - 1, integer=True)
    sampling = Sampling(
        repetition_penalty=_read_number(body, "repetition_penalty", 1, 0.01, 10),
        frequency_penalty=_read_number(body, "frequency_penalty", 0, -2, 2),
        presence_penalty=_read_number(body, "presence_penalty", 0, -2, 2),
        bias=_read_bias(body.get("logit_bias")),
        temperature=_read_number(body, "temperature", 1, 0, 2),
        top_k=int(_read_number(body, "top_k", 0, 0, 2**31, integer=True)),
        top_p=_read_number(body, "top_p", 1, 1e-6, 1),
        min_p=_read_number(body, "min_p", 0, 0, 1),
        seed=int(seed) % 2**63,
        n_logprobs=n_logprobs,
    )
    return {
        "model": _read(body, "model", str, ""), "sampling": sampling, "max_tokens": longest or most,
        "n": int(_read_number(body, "n", 1, 1, MOST_CHOICES, integer=True)), "stops": stops,
        "stream": _read(body, "stream", bool, False), "include_usage": bool(options.get("include_usage")),
    }  # fmt: skip


def _read_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(id.isascii() and id.isdecimal() and len(id) < 10 for id in value):
        raise ApiError(400, "logit_bias: wanted an object of token ids and numbers", "logit_bias")
    if None in value.values():
        raise ApiError(400, "logit_bias: a bias is null, wanted a number of -100 to 100", "logit_bias")
    return {int(id): _read_number({f"logit_bias.{id}": b}, f"logit_bias.{id}", 0, -100, 100) for id, b in value.items()}


def _read_format(value: Any) -> tuple[Mapping[str, Any] | None, str | None]:
    """Return the JSON schema and the regular expression that an answer is to follow, None where there is none."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in FORMATS:
        _require_known(value, {"type", *FORMATS[kind]}, ignored=set())
    if value is None or kind == "text":
        return None, None
    if kind == "json_object":
        return _read(value, "schema", dict, {"type": "object"}), None
    if kind == "json_schema" and isinstance(value.get("json_schema"), dict):
        told = _require_known(value["json_schema"], {"schema", "name", "description", "strict"}, ignored=set())
        for key, wanted in (("name", str), ("description", str), ("strict", bool)):
            _read(told, key, wanted, None)
        if isinstance(told.get("schema"), dict):
            return told["schema"], None
    if kind == "regex" and isinstance(value.get("pattern"), str):
        return None, value["pattern"]
    raise ApiError(
        400,
        "response_format: wanted type text, json_object, json_schema (with json_schema.schema) or regex (with pattern)",
        "response_format",
    )


def _read_messages(value: Any) -> tuple[list[Message], dict[int, dict[str, Any]]]:
    """Return the messages as (role, text), and what else each one says: calls of tools."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages: wanted a list of at least one message", "messages")
    messages: list[Message] = []
    more: dict[int, dict[str, Any]] = {}
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ApiError(400, f"{where}: the role is {role!r}, wanted one of {', '.join(ROLES)}", where)
        messages.append(("system" if role == "developer" else role, _read_content(message, where)))
        kept = {key: message[key] for key in ("tool_calls", "tool_call_id") if message.get(key)}
        if kept:
            more[i] = kept
    return messages, more


def _read_content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        wrong = next((part.get("type") for part in content if part.get("type") != "text"), None)
        if wrong is not None:
            raise ApiError(400, f"{where}: a part of type {wrong!r}, this model reads text", where)
        return "".join(str(part.get("text", "")) for part in content)
    raise ApiError(400, f"{where}: wanted a text as content", where)


# ---- answers --------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    finish_reason: str | None = None
    n_tokens: int = 0
    tokens: list[dict[str, Any]] = field(default_factory=list)  # chat's logprobs.content


def new_head(kind: str, model: str) -> dict[str, Any]:
    """Return the keys that all objects of one answer share. kind: "chat.completion" or "text_completion"."""
    prefix = "chatcmpl-" if kind.startswith("chat") else "cmpl-"
    return {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": model}


def count_usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    answered = sum(choice.n_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": answered, "total_tokens": prompt_tokens + answered,
    }  # fmt: skip


def whole_chat(
    head: Mapping[str, Any], choices: Sequence[Choice], prompt_tokens: int, logprobs: bool
) -> dict[str, Any]:
    """Return the answer of /v1/chat/completions."""
    return {
        **head,
        "choices": [
            {
                "index": i, "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": {"content": choice.tokens, "refusal": None} if logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(choices)
        ],
        "usage": count_usage(prompt_tokens, choices),
    }  # fmt: skip


def whole_completion(
    head: Mapping[str, Any], choices: Sequence[Choice], prompt_tokens: int, logprobs: bool, offset: int = 0
) -> dict[str, Any]:
    """Return the answer of /v1/completions. offset: characters of a text before the tokens, the echoed prompt."""
    return {
        **head,
        "choices": [
            {
                "index": i, "text": choice.text, "finish_reason": choice.finish_reason,
                "logprobs": legacy_logprobs(choice.tokens, offset) if logprobs else None,
            }
            for i, choice in enumerate(choices)
        ],
        "usage": count_usage(prompt_tokens, choices),
    }  # fmt: skip


def legacy_logprobs(tokens: Sequence[Mapping[str, Any]], offset: int = 0) -> dict[str, Any]:
    """Return logprobs as /v1/completions has them, of chat's. offset: of the first token's text in the whole."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }


def chat_chunk(
    head: Mapping[str, Any], index: int, delta: Mapping[str, Any], tokens: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """Return one piece of a streamed chat."""
    logprobs = {"content": tokens, "refusal": None} if tokens else None
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def completion_chunk(
    head: Mapping[str, Any], index: int, text: str, logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """Return one piece of a streamed completion."""
    return {**head, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}]}

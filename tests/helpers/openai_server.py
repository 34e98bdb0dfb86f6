"""An OpenAI-compatible server on loopback that answers from a pool of tasks and fails on purpose, repeatably.

    with Server(seed=1, faults={"429": 0.1, "reset_body": 0.05}) as server:       # a thread of this process
        client = openai.AsyncOpenAI(base_url=server.base_url, api_key="x", max_retries=0)
    python -m tests.helpers.openai_server --port 0 --seed 1 --faults '{"429": 0.1}'    # a process; prints {"port": ...}

The fields of Options are the flags (values are JSON) and what POST /config changes. A request is known by the sha256 of
its messages: its answer depends on (seed, that key) alone, and a fault on (seed, key, how often the key was seen), so
that a run can be repeated, and at most max_faults_per_request attempts fail. GET /stats tells what arrived, what was
answered, sent whole and billed; --log FILE appends a JSON line for each request. Formats: OpenAI's API reference.
"""

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter, defaultdict
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from tests.helpers import task_pool

# Faults of an attempt: a later attempt of the same request succeeds. name: (status, message, type, code).
STATUS_FAULTS = {
    "408": (408, "Request timed out.", "timeout", None),
    "409": (409, "The resource is locked by another request. Please try again.", "conflict_error", "lock_timeout"),
    "429": (429, "Rate limit reached on requests per min (RPM). Please try again.", "requests", "rate_limit_exceeded"),
    "429_bare": (429, "The engine is currently overloaded, please try again later.", "requests", None),
    "429_ms": (429, "Rate limit reached on tokens per min (TPM). Please try again.", "tokens", "rate_limit_exceeded"),
    "500": (500, "The server had an error while processing your request. Sorry about that!", "server_error", None),
    "503": (503, "That model is currently overloaded with other requests.", "server_error", None),
    "529": (529, "Overloaded", "overloaded_error", None),
}
BROKEN = ("502_html", "hang", "reset")  # no answer was made
BILLED = ("slow", "drip", "lost", "reset_body", "eof_body", "empty_choices")  # an answer was made and is paid for
GARBLED = ("not_json_200", "html_200")  # a proxy's 200; not billed
ATTEMPT_FAULTS = (*STATUS_FAULTS, *BROKEN, *BILLED, *GARBLED)
# Faults of an answer: the request is answered so whenever it is made.
ANSWER_FAULTS = (
    "truncated", "malformed", "refusal", "content_filter", "wrong_schema", "no_usage", "prose", "content_policy_400",
)  # fmt: skip
API_FAULTS = ("429", "429_bare", "429_ms", "500", "503", "502_html", "hang", "reset", "lost", "reset_body", "eof_body")
# How a reply that was made fails to arrive, or is long in coming.
WAYS = {"lost": "reset", "reset_body": "reset_body", "eof_body": "eof_body", "drip": "drip"}
DIALECTS = ("openai", "vllm", "vllm_old", "llama.cpp", "llama.cpp_old", "fastapi", "plain")
HTML = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><h1>502 Bad Gateway</h1></body>\r\n</html>\r\n"


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0
    items: int = 20  # tasks in an answer; 0: as many as the request's schema (minItems) or text ("8 tasks") asks
    defects: float = 0.1  # share of tasks that a filter should drop
    faults: dict = dataclasses.field(default_factory=dict)  # of chat requests and lines of batches: name -> probability
    api_faults: dict = dataclasses.field(default_factory=dict)  # of files and batches, by (method, path, count)
    max_faults_per_request: int = 3
    retry_after_s: float = 1
    retry_after_ms: float = 50
    hang_s: float = 60  # until the server closes; and how long a drip takes
    slow_s: float = 0.5
    latency_s: float = 0
    latency_growth: float = 0  # added share of the latency for each other request in flight: a local server
    # hard states
    api_key: str | None = None  # the one that is accepted
    models: list | None = None  # those there are; None: any
    quota_after: int | None = None  # the first chat request for which the money is gone
    down_after: int | None = None  # the first chat request that finds the server down ...
    down_for_s: float = 5  # ... for so long
    rate_limit_rpm: float | None = None
    rate_limit_tpm: float | None = None
    rate_burst: float | None = None  # requests at once; None: a minute's worth
    max_concurrent: int | None = None
    # capabilities
    dialect: str = "openai"
    supports: list | None = None  # parameters, json_schema and json_object; others are refused. None: all
    ignores: list = dataclasses.field(default_factory=list)  # parameters that are accepted without any effect
    # batches
    batch_polls: int = 3  # looks at a batch until it has ended
    batch_s: float | None = None  # seconds until it has ended; instead of batch_polls
    batch_fates: list = dataclasses.field(default_factory=list)  # of the first batches: "expired", an error code, None
    batch_done_share: float = 0.6  # share of lines done when a batch expires or is cancelled
    batch_shuffle: bool = True
    batch_max_lines: int = 50_000
    batch_max_bytes: int = 200_000_000
    batch_token_limit: int | None = None  # prompt tokens of all unfinished batches
    log: str | None = None

    def __post_init__(self):
        wrong = [name for name in self.faults if name not in ATTEMPT_FAULTS + ANSWER_FAULTS]
        wrong += [name for name in self.api_faults if name not in API_FAULTS]
        wrong += [] if self.dialect in DIALECTS else [self.dialect]
        if wrong:
            raise ValueError(f"openai_server: no fault or dialect is called {', '.join(wrong)}")


@dataclasses.dataclass
class Request:
    method: str
    path: str
    query: dict
    headers: dict
    body: bytes
    gone: object  # () -> whether the client hung up


@dataclasses.dataclass
class Reply:
    status: int = 200
    body: object = None  # bytes, or a value that is sent as JSON
    headers: dict = dataclasses.field(default_factory=dict)
    type: str = "application/json"
    way: str = "whole"  # or hang, reset, reset_body, eof_body, drip
    entry: dict | None = None  # the line of the log that tells of it
    sent: object = None  # called once the body has left whole


def request_key(messages):
    return hashlib.sha256(json.dumps(messages, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def name(*parts, letters=24):
    """Letters that depend on the parts alone."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:letters]


def chance(*parts):
    """Return a number in [0, 1) that depends on the parts alone."""
    return int(name(*parts, letters=13), 16) / 16**13


def drawn(faults, names, number):
    """Return the fault among the names in whose share of [0, 1) the number falls."""
    for fault in names:
        number -= faults.get(fault, 0)
        if number < 0:
            return fault
    return None


def reason(status):
    return "Overloaded" if status == 529 else HTTPStatus(status).phrase


def duration(seconds):
    """Parse a duration, as in x-ratelimit-reset-*: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, seconds = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{seconds:g}s" if minutes else f"{seconds:g}s"


# --- answers


def tasks_text(options, key, kind, n):
    """Return the model's text: the tasks as JSON, or what an answer fault makes of it."""
    items = task_pool.answer(options.seed, key, n, options.defects)
    pick = random.Random(name(options.seed, key, kind))
    if kind == "wrong_schema":
        return json.dumps(reshaped(items, pick), ensure_ascii=False)
    texts = [json.dumps(item, ensure_ascii=False) for item in items]
    if kind == "malformed":
        for i in range(len(texts)):
            if pick.random() < 0.3 or i == len(texts) // 2:
                texts[i] = garbled(texts[i], items[i], pick)
    text = '{"tasks": [' + ", ".join(texts) + "]}"
    if kind == "prose":
        text = pick.choice((
            f"Sure! Here are {n} diverse tasks:\n\n```json\n{text}\n```\n\nLet me know if you need more {{tasks}}!",
            f"```\n{text}\n```",
            f"<think>The user wants tasks such as {{this}}.</think>\n{text}",
        ))  # fmt: skip
    return text


def reshaped(items, pick):
    """Return the tasks in a shape that was not asked for."""
    renamed = [{"question": x["instruction"], "context": x["input"], "answer": x["output"]} for x in items]
    typed = [x | pick.choice(({"output": [x["output"]]}, {"input": None}, {"instruction": 7}, {})) for x in items]
    lacking = [{k: v for k, v in x.items() if k != pick.choice(("input", "output", "id"))} for x in items]
    more = [x | {"id": i, "category": "other"} for i, x in enumerate(items)]
    return pick.choice((
        {"examples": items}, items, {"tasks": renamed}, {"tasks": typed}, {"tasks": lacking}, {"tasks": more},
        {"tasks": {str(i): x for i, x in enumerate(items)}}, {"tasks": [json.dumps(x) for x in items]},
        {"tasks": []}, {},
    ))  # fmt: skip


def garbled(text, item, pick):
    """Return the text of one task, broken as models break it, or hard to digest."""
    return pick.choice((
        text[:-1],  # the bracket is missing
        text[:-1] + ",}",
        text.replace('"output": "', '"output": ', 1),
        text.replace('"input"', "input"),
        text.replace('", "', '" "', 1),
        "{'instruction': '" + item["instruction"] + "', 'input': '', 'output': 'x'}",
        text[:-2] + ' and "quoted" words"}',
        text[:-2] + "\n\twith a raw newline\"}",
        text[:-2] + '\\ud83d"}',  # half a surrogate pair
        text[:-2] + '\\u0000"}',
        text[:-2] + '\\x"}',
        "null", "NaN", '"a string"', "{}", "[]", "...",
    ))  # fmt: skip


def wanted(body, n):
    """Return how many tasks a request asks for."""
    text = json.dumps(body.get("response_format", {}))
    found = re.search(r'"(?:min|max)Items": (\d+)', text)
    found = found or re.search(r"(\d+) [\w ]*tasks", json.dumps(body["messages"]))
    return n or (int(found[1]) if found else 20)


def prompt_tokens(body):
    text = json.dumps([body["messages"], body.get("response_format")], ensure_ascii=False)
    return len(text.encode()) // 4 + 3


def answered(options, key, body, kind, custom=None):
    """Return the choice and the usage of a completion. custom: a function of (key, body) that writes the text."""
    limits = [body[x] for x in ("max_completion_tokens", "max_tokens") if body.get(x) is not None]
    limit, finish, refusal = min(limits, default=10**9), "stop", None
    if custom:
        text = custom(key, body)
    elif kind in ("refusal", "content_filter"):
        text = "I'm sorry, but I can't assist with that request." if kind == "refusal" else '{"tasks": ['
    else:
        text = tasks_text(options, key, kind, wanted(body, options.items))
    data = text.encode()
    tokens = len(data) // 4 + 1
    if kind == "truncated":
        limit = min(limit, int(tokens * (0.3 + 0.6 * chance(options.seed, key, "cut"))))
    if tokens > limit:
        text, tokens, finish = data[: 4 * limit].decode(errors="ignore"), limit, "length"
    if kind == "refusal":
        text, refusal = None, text
    if kind == "content_filter":
        finish = kind
    message = {"role": "assistant", "content": text, "refusal": refusal, "annotations": []}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}, usage(
        prompt_tokens(body), tokens
    )


def usage(prompt, completion):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
        },
    }  # fmt: skip


def completion(options, key, attempt, body, choices, spent):
    return {
        "id": "chatcmpl-" + name(options.seed, key, attempt, letters=29),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": choices,
        "usage": spent,
        "service_tier": "default",
        "system_fingerprint": "fp_" + name(body["model"], letters=10),
    }


# --- errors


def error_value(dialect, status, message, kind, param=None, code=None):
    """(status, body) of an error as a server of the dialect says it."""
    phrase = "".join(word.capitalize() for word in reason(status).split())
    if dialect == "vllm_old":
        return status, {"object": "error", "message": message, "type": phrase + "Error", "param": param, "code": status}
    if dialect == "vllm":
        return status, {"error": {"message": message, "type": phrase + "Error", "param": param, "code": status}}
    if dialect.startswith("llama.cpp"):
        if dialect == "llama.cpp_old" and param == "response_format":
            status, kind = 500, "server_error"
        return status, {"error": {"code": status, "message": message, "type": kind}}
    if dialect == "fastapi" and status == 400:
        return 422, {"detail": [{"type": "value_error", "loc": ["body", param], "msg": message, "input": None}]}
    if dialect == "fastapi":
        return status, {"detail": message}
    if dialect == "plain":
        return status, {"error": message}
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error(options, status, message, kind="invalid_request_error", param=None, code=None, **headers):
    status, body = error_value(options.dialect, status, message, kind, param, code)
    return Reply(status, body, {key.replace("_", "-"): value for key, value in headers.items()})


def unfit(options, body):
    """Return what is wrong with a chat request, as arguments of error(), or None."""
    for field in ("model", "messages"):
        if not body.get(field):
            said = f"Missing required parameter: '{field}'."
            return 400, said, "invalid_request_error", field, "missing_required_parameter"
    if options.models is not None and body["model"] not in options.models:
        text = f"The model `{body['model']}` does not exist or you do not have access to it."
        return 404, text, "invalid_request_error", None, "model_not_found"
    form, supported = body.get("response_format") or {}, options.supports
    kind = form.get("type", "text")
    if supported is not None and kind not in (*supported, "text"):
        said = f"Invalid parameter: 'response_format' of type '{kind}' is not supported with this model."
        if options.dialect.startswith("llama.cpp"):
            said = f'response_format type must be one of "text" or "json_object", but got: {kind}'
        return 400, said, "invalid_request_error", "response_format", None
    for field, value in body.items():
        if supported is None or field in ("model", "messages", "response_format", *supported) or value is None:
            continue
        if field in ("temperature", "top_p", "n"):
            if value == 1:
                continue
            said = f"Unsupported value: '{field}' does not support {value} with this model. Only the default (1) is."
            return 400, said, "invalid_request_error", field, "unsupported_value"
        said = f"Unsupported parameter: '{field}' is not supported with this model."
        said += " Use 'max_completion_tokens' instead." if field == "max_tokens" else ""
        return 400, said, "invalid_request_error", field, "unsupported_parameter"
    if body.get("stream"):
        said = "Unsupported value: 'stream' is not served here."
        return 400, said, "invalid_request_error", "stream", "unsupported_value"
    if kind == "json_object" and options.dialect == "openai" and "json" not in json.dumps(body["messages"]).lower():
        said = "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
        return 400, said, "invalid_request_error", "messages", None
    named = form.get("json_schema", {})
    if kind == "json_schema" and named.get("strict") and (said := loose(named.get("schema"))):
        said = f"Invalid schema for response_format '{named.get('name')}': {said}"
        return 400, said, "invalid_request_error", "response_format", None
    return None


def loose(schema, path=()):
    """Return why a schema is not strict, or None."""
    if not isinstance(schema, dict):
        return f"In context={path}, schema must have a 'type' key."
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            return f"In context={path}, 'additionalProperties' is required to be supplied and to be false."
        if set(schema.get("required", ())) != set(schema.get("properties", {})):
            return f"In context={path}, 'required' is required to be supplied and to be an array including every key."
    inner = [*schema.get("properties", {}).items(), *([("items", schema["items"])] if "items" in schema else [])]
    return next((said for field, part in inner if (said := loose(part, (*path, field)))), None)


class Bucket:
    """So many a minute, so many at once."""

    def __init__(self, per_minute, burst=None):
        self.rate, self.size = per_minute / 60, burst or per_minute
        self.level, self.at = self.size, time.monotonic()

    def take(self, amount):
        """Takes the amount and returns 0, or returns the seconds after which it will be there."""
        now = time.monotonic()
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.rate), now
        if self.level >= min(amount, self.size):
            self.level -= amount
            return 0
        return (amount - self.level) / self.rate

    def reset_s(self):
        return (self.size - self.level) / self.rate


# --- files and batches


@dataclasses.dataclass
class File:
    value: dict  # what the API shows of it
    data: bytes
    entries: list = dataclasses.field(default_factory=list)  # of the log, of the answers in it
    downloads: int = 0


@dataclasses.dataclass
class Batch:
    value: dict
    file: File
    fate: str | None
    born: float = dataclasses.field(default_factory=time.monotonic)
    polls: int = 0
    lines: list = dataclasses.field(default_factory=list)
    tokens: int = 0
    busy: object = dataclasses.field(default_factory=asyncio.Lock)


class Batches:
    """The part of Server that keeps files and batches. A batch moves on when it is looked at."""

    async def post_files(self, request):
        o, boundary = self.options, request.headers.get("content-type", "").partition("boundary=")[2].strip('"')
        fields, filename = {}, None
        for part in request.body.split(b"--" + boundary.encode())[1:-1] if boundary else ():
            head, _, data = part.partition(b"\r\n\r\n")
            head = head.decode()
            field = re.search(r'name="([^"]*)"', head)[1]
            fields[field] = data[:-2]
            filename = re.search(r'filename="([^"]*)"', head)[1] if field == "file" else filename
        for field in ("file", "purpose"):
            if field not in fields:
                said = f"Missing required parameter: '{field}'."
                return error(o, 400, said, param=field, code="missing_required_parameter")
        return Reply(200, self.keep_file(fields["file"], filename, fields["purpose"].decode()).value)

    def keep_file(self, data, filename, purpose):
        value = {
            "id": "file-" + name(self.options.seed, "file", self.tick(), letters=22),
            "object": "file", "bytes": len(data), "created_at": int(time.time()), "expires_at": None,
            "filename": filename, "purpose": purpose, "status": "processed", "status_details": None,
        }  # fmt: skip
        self.files[value["id"]] = File(value, data)
        return self.files[value["id"]]

    async def get_files(self, request):
        purpose = request.query.get("purpose")
        values = [file.value for file in self.files.values() if purpose in (None, file.value["purpose"])]
        return self.page(values, request.query, 10_000, 10_000)

    async def get_files_one(self, request, file):
        return Reply(200, file.value)

    async def delete_files_one(self, request, file):
        del self.files[file.value["id"]]
        return Reply(200, {"id": file.value["id"], "object": "file", "deleted": True})

    async def get_content(self, request, file):
        def sent():
            file.downloads += 1
            if file.downloads == 1:
                for entry in file.entries:
                    entry["whole"] = True
                    self.kept[entry["key"]]["whole"] += 1
                self.write_log({"via": "download", "arrived": time.time(), "file": file.value["id"]})

        return Reply(200, file.data, type="application/octet-stream", sent=sent)

    def page(self, values, query, limit, most):
        """Return a list, newest first."""
        values, after = values[::-1], query.get("after")
        limit = query.get("limit", str(limit))
        if not limit.isdigit() or not 1 <= int(limit) <= most:
            return error(self.options, 400, f"Invalid 'limit': wanted 1 to {most}, got {limit}.", param="limit")
        if after:
            ids = [value["id"] for value in values]
            if after not in ids:
                return error(self.options, 400, f"No object with the id {after}.", param="after")
            values = values[ids.index(after) + 1 :]
        data = values[: int(limit)]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        more = len(values) > len(data)
        return Reply(200, {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})

    async def post_batches(self, request):
        o = self.options
        try:
            body = json.loads(request.body)
        except ValueError:
            return error(o, 400, "We could not parse the JSON body of your request.")
        for field, allowed in (
            ("input_file_id", tuple(self.files)),
            ("endpoint", ("/v1/chat/completions",)),
            ("completion_window", ("24h",)),
        ):
            if body.get(field) not in allowed:
                return error(
                    o, 400, f"Invalid value for '{field}': {body.get(field)}.", param=field, code="invalid_value"
                )
        metadata = body.get("metadata") or {}
        if len(metadata) > 16 or any(
            len(k) > 64 or not isinstance(v, str) or len(v) > 512 for k, v in metadata.items()
        ):
            said = "Invalid 'metadata': wanted up to 16 pairs of a key of 64 and a text of 512 characters."
            return error(o, 400, said, param="metadata", code="invalid_value")
        number, now = len(self.batches), int(time.time())
        value = {
            "id": "batch_" + name(o.seed, "batch", number, letters=32),
            "object": "batch", "endpoint": body["endpoint"], "model": None, "errors": None,
            "input_file_id": body["input_file_id"], "completion_window": "24h", "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": now, "in_progress_at": None,
            "expires_at": now + 86400, "finalizing_at": None, "completed_at": None, "failed_at": None,
            "expired_at": None, "cancelling_at": None, "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0}, "usage": None, "metadata": metadata or None,
        }  # fmt: skip
        fate = o.batch_fates[number] if number < len(o.batch_fates) else None
        self.batches[value["id"]] = Batch(value, self.files[body["input_file_id"]], fate)
        return Reply(200, value)

    async def get_batches(self, request):
        for batch in self.batches.values():
            if self.options.batch_s is not None:
                await self.look(batch)
        return self.page([batch.value for batch in self.batches.values()], request.query, 20, 100)

    async def get_batches_one(self, request, batch):
        batch.polls += 1
        await self.look(batch)
        return Reply(200, batch.value)

    async def post_cancel(self, request, batch):
        status = batch.value["status"]
        if status not in ("validating", "in_progress", "finalizing", "cancelling"):
            return error(self.options, 409, f"Cannot cancel a batch with status '{status}'.")
        self.enter(batch, "cancelling")
        return Reply(200, batch.value)

    def enter(self, batch, status):
        batch.value |= {"status": status, f"{status}_at": int(time.time())}

    async def look(self, batch):
        """Moves a batch on as far as its looks or its age allow."""
        o = self.options
        share = batch.polls / max(1, o.batch_polls)
        if o.batch_s is not None:
            share = (time.monotonic() - batch.born) / max(o.batch_s, 1e-9)
        async with batch.busy:
            if batch.value["status"] == "validating" and share >= 1 / 3:
                if errors := self.invalid(batch):
                    batch.value["errors"] = {"object": "list", "data": errors}
                    return self.enter(batch, "failed")
                self.enter(batch, "in_progress")
                batch.value["request_counts"]["total"] = len(batch.lines)
            if batch.value["status"] == "in_progress" and share >= 2 / 3:
                if batch.fate != "expired":
                    self.enter(batch, "finalizing")
                elif share >= 1:
                    await self.finish(batch, "expired")
            if batch.value["status"] == "finalizing" and share >= 1:
                await self.finish(batch, "completed")
            if batch.value["status"] == "cancelling" and (
                time.time() > batch.value["cancelling_at"] + 1 or batch.polls
            ):
                await self.finish(batch, "cancelled")

    def invalid(self, batch):
        """Return the errors for which a batch is not begun; reads its lines."""
        o, data = self.options, batch.file.data

        def fault(code, message, line=None, param=None):
            return {"code": code, "line": line, "message": message, "param": param}

        if batch.fate not in (None, "expired"):
            return [fault(batch.fate, f"The batch was not begun: {batch.fate}.")]
        lines = [line for line in data.split(b"\n") if line.strip()]
        if not lines:
            return [fault("empty_file", "The input file is empty. Please ensure it contains a line for each request.")]
        if len(data) > o.batch_max_bytes:
            return [fault("file_too_large", f"The input file has {len(data)} bytes, of at most {o.batch_max_bytes}.")]
        if len(lines) > o.batch_max_lines:
            return [
                fault("too_many_tasks", f"The input file has {len(lines)} requests, of at most {o.batch_max_lines}.")
            ]
        errors, ids, models, batch.lines = [], set(), set(), []
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                id, body, url, method = (line[field] for field in ("custom_id", "body", "url", "method"))
                models.add(body["model"])
                batch.tokens += prompt_tokens(body)
            except (ValueError, KeyError, TypeError) as wrong:
                code = "missing_required_parameter" if isinstance(wrong, KeyError) else "invalid_json_line"
                errors.append(fault(code, f"This line is not a request: {wrong}.", number))
                continue
            if id in ids:
                errors.append(fault("duplicate_custom_id", f"The custom_id {id} is used twice.", number, "custom_id"))
            if (method, url) != ("POST", batch.value["endpoint"]):
                errors.append(fault("invalid_url", "The URL is not the endpoint of the batch.", number, "url"))
            if len(models) > 1:
                errors.append(
                    fault("mismatched_model", "The model is not that of the first line.", number, "body.model")
                )
            if o.models is not None and body["model"] not in o.models:
                errors.append(
                    fault("model_not_found", f"The model {body['model']} does not exist.", number, "body.model")
                )
            ids.add(id)
            batch.lines.append(line)
        unfinished = [
            b for b in self.batches.values() if b.value["status"] in ("in_progress", "finalizing", "cancelling")
        ]
        limit = o.batch_token_limit
        if not errors and limit is not None and batch.tokens + sum(other.tokens for other in unfinished) > limit:
            said = f"Enqueued token limit reached for {body['model']} in organization org-x. Limit: {limit:,} enqueued "
            said += "tokens. Please try again once some in_progress batches have been completed."
            errors.append(fault("token_limit_exceeded", said))
        batch.value["model"] = min(models, default=None)
        return errors[:100]

    async def finish(self, batch, status):
        """Answers the lines of a batch, those that were in time, and writes its files."""
        o, value = self.options, batch.value
        done, failed, entries = [], [], []
        for number, line in enumerate(batch.lines):
            if number % 20 == 19:
                await asyncio.sleep(0)  # others are served in between
            in_time = status == "completed" or chance(o.seed, value["id"], number) < o.batch_done_share
            result, entry = self.line_result(batch, line, None if in_time else f"batch_{status}")
            good = result["response"] and result["response"]["status_code"] == 200
            (done if good else failed).append(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            entries += [entry] if good else []
        if o.batch_shuffle:
            random.Random(name(o.seed, value["id"])).shuffle(done)
        for field, lines in (("output", done), ("error", failed)):
            if lines:
                file = self.keep_file(b"".join(lines), f"{value['id']}_{field}.jsonl", "batch_output")
                file.entries = entries if field == "output" else []
                value[f"{field}_file_id"] = file.value["id"]
        value["request_counts"] = {"total": len(batch.lines), "completed": len(done), "failed": len(failed)}
        spent = [sum(entry[f"{part}_tokens"] for entry in entries) for part in ("prompt", "completion")]
        value["usage"] = {
            "input_tokens": spent[0], "input_tokens_details": {"cached_tokens": 0}, "output_tokens": spent[1],
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": sum(spent),
        }  # fmt: skip
        self.enter(batch, status)

    def line_result(self, batch, line, too_late):
        """Return the line of an output or error file, and the log's entry."""
        o, body = self.options, line["body"]
        key = request_key(body.get("messages"))
        entry = new_entry("batch", 0) | {"key": key, "batch": batch.value["id"], "custom_id": line["custom_id"]}
        result = {"id": "batch_req_" + name(o.seed, self.tick(), letters=32), "custom_id": line["custom_id"]}
        if not too_late:
            self.seen[key] += 1
            entry["attempt"] = self.seen[key]
            fault = self.attempt_fault(o.faults, ATTEMPT_FAULTS, key, entry["attempt"])
            too_late = "request_timeout" if fault == "hang" else None
        if too_late:
            entry["outcome"] = too_late
            said = {
                "batch_expired": "This request could not be executed before the completion window expired.",
                "batch_cancelled": "This request was not executed because the batch was cancelled.",
            }.get(too_late, "The call to the model timed out.")
            result |= {"response": None, "error": {"code": too_late, "message": said}}
        else:
            body = {k: v for k, v in body.items() if k not in o.ignores}
            if wrong := unfit(o, body):
                reply, entry["outcome"] = error(o, *wrong), wrong[4] or "bad_request"
            else:
                fault = fault if fault in STATUS_FAULTS else None  # the others are of a connection
                reply = self.reply_to(body, key, entry["attempt"], fault, entry)
            entry["status"] = reply.status
            id = name(o.seed, key, entry["attempt"], letters=32)
            result |= {"response": {"status_code": reply.status, "request_id": id, "body": reply.body}, "error": None}
        self.record(entry)
        return result, entry


def new_entry(via, index):
    """Return a line of the log."""
    return {
        "via": via, "index": index, "arrived": time.time(), "key": None, "attempt": 0, "outcome": None, "status": 0,
        "answer": None, "prompt_tokens": 0, "completion_tokens": 0, "billed": False, "whole": False, "concurrency": 0,
    }  # fmt: skip


# --- the server


class Server(Batches):
    def __init__(self, port=0, answer=None, **options):
        """answer: a function of (key, request body) that gives the text of an answer in place of the task pool."""
        self.port, self.custom, self.thread = port, answer, None
        self.options = Options(**options)
        self.forget()
        self.configure()

    def forget(self):
        self.entries, self.seen = [], Counter()
        self.kept = defaultdict(lambda: {"seen": 0, "billed": 0, "whole": 0})
        self.arrived = self.in_flight = self.max_in_flight = self.connections = 0
        self.down_until, self.api_seen, self.serial = None, Counter(), 0
        self.files, self.batches = {}, {}

    def configure(self, **changes):
        self.options = o = dataclasses.replace(self.options, **changes)
        self.requests_bucket = o.rate_limit_rpm and Bucket(o.rate_limit_rpm, o.rate_burst)
        self.tokens_bucket = o.rate_limit_tpm and Bucket(o.rate_limit_tpm)

    # a thread of this process

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run(lambda port: ready.set())), daemon=True)
        self.thread.start()
        if not ready.wait(10):
            raise RuntimeError("openai_server: does not listen after 10 s")
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)

    def within(self, do):
        """do() in the server's thread, between two of its steps."""
        if not self.thread or not self.thread.is_alive():
            return do()
        done = concurrent.futures.Future()
        self.loop.call_soon_threadsafe(lambda: done.set_result(do()))
        return done.result(10)

    def stats(self):
        return self.within(self.told)

    @property
    def log(self):
        """Return the entries of the requests so far, each a dict."""
        return self.within(lambda: list(self.entries))

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    async def run(self, listening):
        self.loop, self.stop, tasks = asyncio.get_running_loop(), asyncio.Event(), set()

        async def connected(reader, writer):
            tasks.add(task := asyncio.current_task())
            try:
                await self.connection(reader, writer)
            except asyncio.CancelledError:
                pass  # the server stops
            finally:
                tasks.discard(task)

        server = await asyncio.start_server(connected, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        listening(self.port)
        await self.stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # HTTP/1.1

    async def connection(self, reader, writer):
        self.connections += 1
        writer.transport.set_write_buffer_limits(high=0)  # drain() waits until all is with the kernel

        def gone():
            return reader.at_eof() or writer.transport.is_closing()

        try:
            while request := await self.read(reader, writer, gone):
                keep = request.headers.get("connection", "").lower() != "close"
                if not await self.respond(request, writer) or not keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            pass  # the client is gone, or speaks something else
        finally:
            writer.close()

    async def read(self, reader, writer, gone):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        if headers.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(await reader.readuntil(b"\r\n"), 16):
                parts.append((await reader.readexactly(size + 2))[:-2])
            await reader.readuntil(b"\r\n")
            body = b"".join(parts)
        elif length := int(headers.get("content-length", 0)):
            body = await reader.readexactly(length)
        url = urlsplit(target)
        query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        return Request(method, url.path, query, headers, body, gone)

    async def respond(self, request, writer):
        """Answers a request; returns whether the connection can be used again."""
        chat = (request.method, request.path) == ("POST", "/v1/chat/completions")
        self.in_flight += chat
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        started = time.monotonic()
        reply = None
        try:
            reply = await (self.chat(request) if chat else self.api(request))
            whole = await self.send(reply, request, writer, started)
        except ConnectionError:
            whole = False
        finally:
            self.in_flight -= chat
        if whole and reply.sent:
            reply.sent()
        if reply and reply.entry:
            reply.entry["whole"] = whole
            self.record(reply.entry)
        return whole

    async def send(self, reply, request, writer, started):
        """Returns whether the whole body was given to the kernel for a client that was still there."""
        transport = writer.transport
        if reply.way == "hang":
            await self.wait(self.options.hang_s, request)
            return False
        if reply.way == "reset":
            reset(transport)
            return False
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, ensure_ascii=False).encode()
        headers = {
            "content-type": reply.type,
            "content-length": len(body),
            "x-request-id": "req_" + name(self.options.seed, request.path, self.tick(), letters=32),
            "openai-processing-ms": round((time.monotonic() - started) * 1000),
            "openai-version": "2020-10-01",
            **reply.headers,
        }
        head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        head = f"HTTP/1.1 {reply.status} {reason(reply.status)}\r\n{head}\r\n".encode()
        if request.gone():
            return False
        if reply.way == "drip":
            return await self.drip(head + body, request, writer)
        writer.write(head + (body if reply.way == "whole" else body[: len(body) // 2]))
        await writer.drain()
        if reply.way == "reset_body":
            await asyncio.sleep(0.02)  # so that the client reads what there is before the reset throws it away
            reset(transport)
        return reply.way == "whole"

    async def drip(self, data, request, writer):
        """Sends in a hundred pieces: a read never has to wait for long, and the answer is long in coming."""
        step = len(data) // 100 + 1
        for first in range(0, len(data), step):
            await self.wait(self.options.hang_s / 100, request)
            if request.gone():
                return False
            writer.write(data[first : first + step])
            await writer.drain()
        return True

    async def wait(self, seconds, request):
        """Sleeps, but no longer than the client is there."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not request.gone():
            await asyncio.sleep(min(left, 0.05))

    def tick(self):
        self.serial += 1
        return self.serial

    # chat

    async def chat(self, request):
        o = self.options
        self.arrived += 1
        entry = new_entry("chat", self.arrived) | {"concurrency": self.in_flight}
        try:
            body = json.loads(request.body)
            if not isinstance(body, dict):
                raise ValueError
        except ValueError:
            body = None
        if body and "messages" in body:
            entry["key"] = request_key(body["messages"])
            entry["attempt"] = self.seen[entry["key"]] + 1
        if o.latency_s:
            await self.wait(o.latency_s * (1 + o.latency_growth * (self.in_flight - 1)), request)
        reply = self.gate(request, body, entry)
        if reply is None:
            self.seen[entry["key"]] += 1
            body = {k: v for k, v in body.items() if k not in o.ignores}
            fault = self.attempt_fault(o.faults, ATTEMPT_FAULTS, entry["key"], entry["attempt"])
            reply = self.reply_to(body, entry["key"], entry["attempt"], fault, entry)
            if fault == "slow":
                await self.wait(o.slow_s, request)
        entry["status"] = reply.status
        reply.entry = entry
        reply.headers |= self.rate_headers()
        return reply

    def attempt_fault(self, faults, names, key, attempt):
        if attempt > self.options.max_faults_per_request:
            return None
        return drawn(faults, names, chance(self.options.seed, key, attempt))

    def gate(self, request, body, entry):
        """Return the reply of a server that does not get as far as the model, or None."""
        o = self.options
        if refused := self.unauthorised(request):
            entry["outcome"] = "bad_key"
            return refused
        if body is None:
            entry["outcome"] = "bad_request"
            return error(o, 400, "We could not parse the JSON body of your request.")
        if o.down_after is not None and self.arrived >= o.down_after:
            self.down_until = self.down_until or time.monotonic() + o.down_for_s
            if time.monotonic() < self.down_until:
                entry["outcome"] = "down"
                return error(o, 503, "The server is overloaded or not ready yet.", "server_error")
        if o.quota_after is not None and self.arrived >= o.quota_after:
            entry["outcome"] = "quota"
            said = "You exceeded your current quota, please check your plan and billing details."
            return error(o, 429, said, "insufficient_quota", None, "insufficient_quota")
        if wrong := unfit(o, {k: v for k, v in body.items() if k not in o.ignores}):
            entry["outcome"] = wrong[4] or "bad_request"
            return error(o, *wrong)
        if o.max_concurrent is not None and self.in_flight > o.max_concurrent:
            entry["outcome"] = "concurrency"
            return error(o, 429, "Too many concurrent requests.", "requests", None, "rate_limit_exceeded")
        for bucket, amount, what in (
            (self.requests_bucket, 1, "requests"),
            (self.tokens_bucket, prompt_tokens(body) + (body.get("max_completion_tokens") or 0), "tokens"),
        ):
            if bucket and (after := bucket.take(amount)):
                entry["outcome"] = f"rate_{what}"
                said = f"Rate limit reached for {body['model']} on {what} per min. Try again in {duration(after)}."
                later = {"retry_after": -int(-after // 1), "retry_after_ms": -int(-after * 1000 // 1)}
                return error(o, 429, said, what, None, "rate_limit_exceeded", **later)
        return None

    def unauthorised(self, request):
        o, given = self.options, request.headers.get("authorization", "").removeprefix("Bearer ")
        if o.api_key is None or given == o.api_key:
            return None
        said = f"Incorrect API key provided: {given[:3]}***{given[-2:]}." if given else "You didn't provide an API key."
        return error(o, 401, said, "invalid_request_error", None, "invalid_api_key")

    def rate_headers(self):
        headers = {}
        for bucket, what in ((self.requests_bucket, "requests"), (self.tokens_bucket, "tokens")):
            if bucket:
                headers[f"x-ratelimit-limit-{what}"] = int(bucket.rate * 60 + 0.5)
                headers[f"x-ratelimit-remaining-{what}"] = max(0, int(bucket.level))
                headers[f"x-ratelimit-reset-{what}"] = duration(bucket.reset_s())
        return headers

    def failure(self, fault):
        """Return the reply of an attempt that gets no answer, or None."""
        o = self.options
        if fault in STATUS_FAULTS:
            status, said, kind, code = STATUS_FAULTS[fault]
            later = {"retry_after": f"{o.retry_after_s:g}"} if fault == "429" else {}
            later |= {"retry_after_ms": f"{o.retry_after_ms:g}"} if fault == "429_ms" else {}
            return error(o, status, said, kind, None, code, **later)
        if fault == "502_html":
            return Reply(502, HTML, type="text/html")
        if fault in ("hang", "reset"):
            return Reply(0, way=fault)
        if fault == "not_json_200":
            return Reply(200, b'{"id": "chatcmpl-1", "choices": [{"ind')
        if fault == "html_200":
            return Reply(200, HTML.replace(b"502 Bad Gateway", b"Please log in"), type="text/html; charset=utf-8")
        return None

    def reply_to(self, body, key, attempt, fault, entry):
        """Return what the model's server says to an attempt; fills in the log's entry."""
        o = self.options
        if reply := self.failure(fault):
            entry["outcome"] = fault
            return reply
        kind = drawn(o.faults, ANSWER_FAULTS, chance(o.seed, key, "answer"))
        entry["answer"], entry["outcome"] = kind, fault or kind or "answered"
        if kind == "content_policy_400":
            entry["outcome"] = kind
            said = "Your request was rejected as a result of our safety system."
            return error(o, 400, said, "invalid_request_error", None, "content_policy_violation")
        if kind is None and "response_format" in o.ignores:
            kind = "prose"
        choice, spent = answered(o, key, body, kind, self.custom)
        choices = [choice]
        if fault == "empty_choices":
            choices, spent = [], usage(spent["prompt_tokens"], 0)
        entry |= {"billed": True}
        entry["prompt_tokens"], entry["completion_tokens"] = spent["prompt_tokens"], spent["completion_tokens"]
        value = completion(o, key, attempt, body, choices, None if kind == "no_usage" else spent)
        return Reply(200, value, way=WAYS.get(fault, "whole"))

    # the log

    def record(self, entry):
        self.entries.append(entry)
        counts = self.kept[entry["key"]]
        counts["seen"] += 1
        counts["billed"] += entry["billed"]
        counts["whole"] += entry["billed"] and entry["whole"]
        self.write_log(entry)

    def write_log(self, entry):
        if self.options.log:
            with open(self.options.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def told(self):
        billed = [entry for entry in self.entries if entry["billed"]]
        return {
            "requests": len(self.entries),
            "outcomes": dict(Counter(entry["outcome"] for entry in self.entries)),
            "max_concurrency": self.max_in_flight,
            "in_flight": self.in_flight,
            "connections": self.connections,
            "billed": {
                "requests": len(billed),
                "prompt_tokens": sum(entry["prompt_tokens"] for entry in billed),
                "completion_tokens": sum(entry["completion_tokens"] for entry in billed),
            },
            "keys": {key: dict(counts) for key, counts in self.kept.items()},
            "batches": {id: batch.value["status"] for id, batch in self.batches.items()},
            "downloads": {id: file.downloads for id, file in self.files.items()},
            "api": {f"{method} {path}": n for (method, path), n in self.api_seen.items()},
        }

    # everything else

    async def api(self, request):
        o, route = self.options, (request.method, request.path)
        if route == ("GET", "/stats"):
            return Reply(200, self.told() | ({"log": self.entries} if "log" in request.query else {}))
        if route == ("POST", "/config"):
            changes = json.loads(request.body)
            if changes.pop("forget", False):
                self.forget()
            self.configure(**changes)
            return Reply(200, dataclasses.asdict(self.options))
        if refused := self.unauthorised(request):
            return refused
        self.api_seen[route] += 1
        fault = self.attempt_fault(o.api_faults, API_FAULTS, list(route), self.api_seen[route])
        if reply := self.failure(fault):
            return reply
        reply = await self.resource(request)
        reply.way = WAYS.get(fault, "whole")
        return reply

    async def resource(self, request):
        o, (method, path) = self.options, (request.method, request.path)
        if (method, path) == ("GET", "/v1/models"):
            models = o.models or ["gpt-4o-mini"]
            data = [{"id": x, "object": "model", "created": 1721172741, "owned_by": "system"} for x in models]
            return Reply(200, {"object": "list", "data": data})
        if found := re.fullmatch(r"/v1/(files|batches)(?:/([\w-]+)(?:/(content|cancel))?)?", path):
            kind, id, verb = found.groups()
            if handler := getattr(self, f"{method.lower()}_{verb or kind}{'' if verb or not id else '_one'}", None):
                known = self.files if kind == "files" else self.batches
                if id and id not in known:
                    return error(o, 404, f"No such {kind[:4].title()} object: {id}", param="id")
                return await handler(request, *([known[id]] if id else []))
        return error(o, 404, f"Invalid URL ({method} {path})")


def reset(transport):
    """Ends a connection with RST."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def main(argv):
    options, texts = {}, ("api_key", "dialect", "log")
    fields = {field.name for field in dataclasses.fields(Options)} | {"port"}
    for flag, value in itertools.zip_longest(argv[::2], argv[1::2]):
        field = flag.removeprefix("--").replace("-", "_")
        if field not in fields or value is None:
            sys.exit(f"openai_server: no option, or no value: {flag}")
        options[field] = value if field in texts else json.loads(value)
    server = Server(**options)
    asyncio.run(server.run(lambda port: print(json.dumps({"port": port, "base_url": server.base_url}), flush=True)))


if __name__ == "__main__":
    main(sys.argv[1:])

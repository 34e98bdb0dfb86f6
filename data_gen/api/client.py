"""One attempt at a request to any OpenAI-compatible server, and the meaning of its outcome. Callers retry."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_gen.api.prices import parse_host
from data_gen.api.prompt import FORMATS
from data_gen.api.rate import parse_retry_after
from data_gen.base.cli import UsageError

RETRIED = {408, 409, 425, 429}  # and every 5xx
OVERLOADED = {408, 429, 503, 504, 524, 529}
GAVE_UP = {504, 524}  # a proxy gave up; the server behind it may go on, and bill
OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_funds")
BLOCKED = ("content_policy", "content_filter", "invalid_prompt", "moderation", "safety system", "responsibleai")
MAX_TOKENS = 10**9  # largest credible count
MIN_KEY_CHARS = 8  # a shorter key is not hidden: "none" or "EMPTY", for a server without keys, may occur in answers
CONNECT_S = 30
OPENAI_HOST = "api.openai.com"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True)
class Dialect:
    """The part of the API that a server understands. It begins with everything; each refusal leaves something out."""

    format: str = "json_schema"  # then json_object, then text
    limit: str = "max_completion_tokens"  # or max_tokens
    temperature: bool = True

    def drop_refused(self, refusal: str) -> "Dialect | None":
        """Return the dialect to try after a refusal, or None if the refusal names nothing that we can leave out."""
        text = refusal.lower()
        if self.temperature and "temperature" in text:
            return replace(self, temperature=False)
        other = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}[self.limit]
        if re.search(rf"\b{self.limit}\b", text):
            return replace(self, limit=other)
        if any(word in text for word in ("response_format", "json_schema", "json_object", "schema", "grammar")):
            return self.lower_format()
        return None

    def lower_format(self) -> "Dialect | None":
        """Return the dialect with the next less exact format, or None below text."""
        lower = {"json_schema": "json_object", "json_object": "text"}.get(self.format)
        return replace(self, format=lower) if lower else None


@dataclass(frozen=True)
class Sampling:
    """The fields that every request has besides its messages."""

    model: str
    max_output_tokens: int
    temperature: float
    extra: dict[str, Any] = field(default_factory=dict)  # fields of --extra, which replace others

    def build_body(
        self, messages: list[dict[str, str]], dialect: Dialect, formats: Mapping[str, Any] = FORMATS
    ) -> dict[str, Any]:
        """Return the body of a request."""
        body: dict[str, Any] = {"model": self.model, "messages": messages, dialect.limit: self.max_output_tokens}
        if dialect.temperature:
            body["temperature"] = self.temperature
        if formats[dialect.format]:
            body["response_format"] = formats[dialect.format]
        return body | self.extra


@dataclass(frozen=True)
class Reply:
    """The outcome of an attempt.

    kind is answer, refused (the server will not answer this request), failed (not billed), lost (perhaps billed),
    unsupported (the server does not understand the dialect) or fatal (the server will answer no request). The collector
    adds odd: the server does not understand this request, but has answered others in the same dialect.
    """

    kind: str
    status: int | None
    body: str
    headers: dict[str, str] = field(default_factory=dict)
    started_at: float = 0.0  # time.monotonic()
    overloaded: bool = False

    def describe_load(self) -> dict[str, Any]:
        """Return the arguments of Rate.record_failure that tell of the server's load."""
        limited = self.status == 429
        return {"overloaded": self.overloaded, "limited": limited, "retry_after": parse_retry_after(self.headers)}


class Client:
    """The client of the openai package without its retries. The key is never printed, logged or stored."""

    def __init__(self, base_url: str, key: str, timeout_s: float):
        import openai  # takes half a second, and is not installed everywhere

        self.openai, self.timeout_s = openai, timeout_s
        self.secret = key if len(key) >= MIN_KEY_CHARS and not key.isalpha() else ""
        # An older server knows only max_tokens, ignores the newer name and may then write for ever.
        official = parse_host(base_url) == OPENAI_HOST
        self.dialect = Dialect(limit="max_completion_tokens" if official else "max_tokens")
        timeout = openai.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
        self.api = openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", max_retries=0, timeout=timeout)

    async def close(self) -> None:
        """Close the connections."""
        await self.api.close()

    async def send(self, body: dict[str, Any]) -> Reply:
        """Return the outcome of one POST to /chat/completions."""
        started_at = time.monotonic()
        try:
            create = self.api.chat.completions.with_raw_response.create
            known = {name: body[name] for name in ("model", "messages")}
            rest = {name: value for name, value in body.items() if name not in known}
            # The package's time-out is for one read: a server that sends byte by byte would never reach it.
            asked = asyncio.wait_for(create(**known, extra_body=rest), self.timeout_s + 1)
            response = (await asked).http_response
            text, headers = self.hide_key(decode_utf8(response)), self.keep_headers(response.headers)
            kind = "answer" if is_completion(text) else "lost"
            return Reply(kind, response.status_code, text, headers, started_at)
        except self.openai.APIStatusError as error:
            text, headers = self.hide_key(decode_utf8(error.response)), self.keep_headers(error.response.headers)
            status = error.status_code
            kind = "lost" if status in GAVE_UP else classify_error(status, text)
            return Reply(kind, status, text, headers, started_at, status in OVERLOADED)
        except self.openai.APIConnectionError as error:
            cause = error.__cause__
            name = type(cause or error).__name__
            unsent = name in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
            text = self.hide_key(f"{name}: {cause or error}")
            return Reply("failed" if unsent else "lost", None, text, {}, started_at, "Timeout" in name)
        except asyncio.TimeoutError:
            text = f"TimeoutError: no whole answer in {self.timeout_s:g} s"
            return Reply("lost", None, text, {}, started_at, True)

    def hide_key(self, text: str) -> str:
        """Return a text with [key] in place of the key."""
        return text.replace(self.secret, "[key]") if self.secret else text

    def keep_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that Rate uses, with lower-case names."""
        lower = {name.lower(): self.hide_key(value) for name, value in headers.items()}
        return {name: value for name, value in lower.items() if name.startswith(("retry-after", "x-ratelimit-"))}


def decode_utf8(response: Any) -> str:
    """Return a response's body as UTF-8, the encoding of JSON (RFC 8259). The header may name an unknown charset."""
    return response.content.decode("utf-8", "replace")


def is_completion(text: str) -> bool:
    """Return whether a body is a completion with a message."""
    try:
        return isinstance(json.loads(text)["choices"][0]["message"], dict)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return False


def classify_error(status: int, text: str) -> str:
    """Return the kind of a Reply with an error status. "failed" is worth another try."""
    text = text.lower()
    if any(code in text for code in OUT_OF_MONEY):
        return "fatal"
    if status == 429 and "request too large" in text:  # for the limit of a minute: it will never fit
        return "unsupported"
    if status in RETRIED or status >= 500:
        return "failed"
    if status in (400, 403, 422) and any(word in text for word in BLOCKED):
        return "refused"  # 403: a router's moderation
    return "fatal" if status in (401, 402, 403, 404) else "unsupported"


def extract_message(body: str) -> str:
    """Return the message in an error's body, whatever the body's structure."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        found = json.loads(body)
        found = found.get("error") or found.get("detail") or found.get("message") or found
        if isinstance(found, dict):
            found = found.get("message") or found
        return " ".join(str(found).split())[:300]
    return " ".join(body.split())[:300] or "an empty answer"


@dataclass(frozen=True)
class Answer:
    """The content of a completion: its text, why it ended, its id and model, and the billed tokens."""

    text: str
    finish_reason: str
    refusal: str
    id: str
    model: str
    usage: tuple[int, int] | None  # (input, output) tokens


def read_answer(body: str) -> Answer:
    """Return the first choice of a completion. is_completion() must hold for the body."""
    found = json.loads(body)
    choice = found["choices"][0]
    content = choice["message"].get("content")
    if isinstance(content, list):  # parts, as some servers send them
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    return Answer(
        content if isinstance(content, str) else "",
        str(choice.get("finish_reason") or ""),
        str(choice["message"].get("refusal") or ""),
        str(found.get("id") or ""),
        str(found.get("model") or ""),
        read_usage(found.get("usage")),
    )


def read_usage(usage: Any) -> tuple[int, int] | None:
    """Return (input, output) tokens of a completion's usage, or None if a number is absent or not credible."""
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        n = usage.get(name) if isinstance(usage, dict) else None
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= MAX_TOKENS:
            return None
        counts.append(n)
    return counts[0], counts[1]


def find_api_key(base_url: str, environment: Mapping[str, str], name: str = "OPENAI_API_KEY") -> str:
    """Return the API key in environment[name], or "" for a server on this machine. Raise UsageError without one."""
    key = environment.get(name, "").strip()
    if not key and parse_host(base_url) not in LOOPBACK:
        raise UsageError(f"no API key in ${name} for {base_url}; set it, or name another variable by --api-key-env")
    if not re.fullmatch("[!-~]*", key):
        raise UsageError(f"the API key in ${name} holds a space, a line end or a letter that no key has; set it anew")
    return key

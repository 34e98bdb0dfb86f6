"""One attempt at a request over any OpenAI-compatible server, and what its outcome means. Retrying is the caller's."""

import asyncio
import contextlib
import json
import re
import time
from dataclasses import dataclass, field, replace

from data_gen.api.prices import host_of
from data_gen.api.prompt import FORMATS
from data_gen.api.rate import retry_after
from data_gen.base.cli import UsageError

RETRIED = {408, 409, 425, 429}  # and every 5xx
OVERLOADED = {408, 429, 503, 504, 524, 529}
GAVE_UP = {504, 524}  # of a proxy: the server behind it may go on, and bill
OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_funds")
BLOCKED = ("content_policy", "content_filter", "invalid_prompt", "moderation", "safety system", "responsibleai")
MOST_TOKENS = 10**9  # of a count that can be meant
LEAST_KEY = 8  # letters of one that is a secret; "none" or "EMPTY", for a server that wants none, are words of answers
CONNECT_S = 30
OPENAI_HOST = "api.openai.com"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True)
class Dialect:
    """What of the API a server understands; found out by asking, one step down at each refusal."""

    format: str = "json_schema"  # then json_object, then text
    limit: str = "max_completion_tokens"  # or max_tokens
    temperature: bool = True

    def without(self, refusal: str) -> "Dialect | None":
        """The next thing to try after a refusal that names something of ours, or None where it names nothing."""
        told = refusal.lower()
        if self.temperature and "temperature" in told:
            return replace(self, temperature=False)
        other = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}[self.limit]
        if re.search(rf"\b{self.limit}\b", told):
            return replace(self, limit=other)
        if any(word in told for word in ("response_format", "json_schema", "json_object", "schema", "grammar")):
            return self.poorer()
        return None

    def poorer(self) -> "Dialect | None":
        """With the next less exact format, or None below text."""
        lower = {"json_schema": "json_object", "json_object": "text"}.get(self.format)
        return replace(self, format=lower) if lower else None


@dataclass(frozen=True)
class Sampling:
    """What every request's body says besides its messages."""

    model: str
    max_output_tokens: int
    temperature: float
    extra: dict = field(default_factory=dict)  # fields of --extra, which win

    def body(self, messages, dialect: Dialect) -> dict:
        body = {"model": self.model, "messages": messages, dialect.limit: self.max_output_tokens}
        if dialect.temperature:
            body["temperature"] = self.temperature
        if FORMATS[dialect.format]:
            body["response_format"] = FORMATS[dialect.format]
        return body | self.extra


@dataclass(frozen=True)
class Reply:
    """kind: answer, refused (this request will not be answered), failed (not billed), lost (billed perhaps),
    unsupported (the dialect is too rich), fatal (no request will be answered)."""

    kind: str
    status: int | None
    body: str
    headers: dict = field(default_factory=dict)
    started_at: float = 0.0  # time.monotonic()
    overloaded: bool = False

    def pressure(self) -> dict:
        """What Rate.failed() wants to know."""
        limited = self.status == 429
        return {"overloaded": self.overloaded, "limited": limited, "retry_after": retry_after(self.headers)}


class Client:
    """The openai package's client with its retries off. key: never told, logged or kept."""

    def __init__(self, base_url, key, timeout_s):
        import openai  # half a second, and not everywhere that the tests run

        self.openai, self.timeout_s = openai, timeout_s
        self.secret = key if len(key) >= LEAST_KEY and not key.isalpha() else ""
        # A server that does not know a limit may ignore it, and write for ever: older ones know max_tokens alone.
        official = host_of(base_url) == OPENAI_HOST
        self.dialect = Dialect(limit="max_completion_tokens" if official else "max_tokens")
        timeout = openai.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
        self.api = openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", max_retries=0, timeout=timeout)

    async def close(self):
        await self.api.close()

    async def ask(self, body) -> Reply:
        """One POST to /chat/completions."""
        started_at = time.monotonic()
        try:
            create = self.api.chat.completions.with_raw_response.create
            known = {name: body[name] for name in ("model", "messages")}
            rest = {name: value for name, value in body.items() if name not in known}
            # The package's time-out is for one read: a server that drips would never meet it.
            asked = asyncio.wait_for(create(**known, extra_body=rest), self.timeout_s + 1)
            response = (await asked).http_response
            text, headers = self.clean(utf8(response)), self.kept(response.headers)
            kind = "answer" if is_completion(text) else "lost"
            return Reply(kind, response.status_code, text, headers, started_at)
        except self.openai.APIStatusError as error:
            text, headers = self.clean(utf8(error.response)), self.kept(error.response.headers)
            status = error.status_code
            kind = "lost" if status in GAVE_UP else kind_of(status, text)
            return Reply(kind, status, text, headers, started_at, status in OVERLOADED)
        except self.openai.APIConnectionError as error:
            cause = error.__cause__
            name = type(cause or error).__name__
            unsent = name in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
            text = self.clean(f"{name}: {cause or error}")
            return Reply("failed" if unsent else "lost", None, text, {}, started_at, "Timeout" in name)
        except asyncio.TimeoutError:
            text = f"TimeoutError: no whole answer in {self.timeout_s:g} s"
            return Reply("lost", None, text, {}, started_at, True)

    def clean(self, text):
        return text.replace(self.secret, "[key]") if self.secret else text

    def kept(self, headers) -> dict:
        """Those that Rate heeds."""
        lower = {name.lower(): self.clean(value) for name, value in headers.items()}
        return {name: value for name, value in lower.items() if name.startswith(("retry-after", "x-ratelimit-"))}


def utf8(response) -> str:
    """JSON is UTF-8 (RFC 8259), whatever a header says: one of a charset that is none would lose a paid answer."""
    return response.content.decode("utf-8", "replace")


def is_completion(text) -> bool:
    try:
        return isinstance(json.loads(text)["choices"][0]["message"], dict)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return False


def kind_of(status, text) -> str:
    """What an error status means: "failed" is tried again."""
    told = text.lower()
    if any(code in told for code in OUT_OF_MONEY):
        return "fatal"
    if status == 429 and "request too large" in told:  # for a minute's limit: it will never fit
        return "unsupported"
    if status in RETRIED or status >= 500:
        return "failed"
    if status in (400, 403, 422) and any(word in told for word in BLOCKED):
        return "refused"  # 403: a router's moderation
    return "fatal" if status in (401, 402, 403, 404) else "unsupported"


def message_of(body: str) -> str:
    """The sentence in an error's body, in whichever shape it comes."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        found = json.loads(body)
        found = found.get("error") or found.get("detail") or found.get("message") or found
        if isinstance(found, dict):
            found = found.get("message") or found
        return " ".join(str(found).split())[:300]
    return " ".join(body.split())[:300] or "an empty answer"


@dataclass(frozen=True)
class Answer:
    """What a completion says: its text, why it ended, its id and model, and the tokens that were billed."""

    text: str
    finish_reason: str
    refusal: str
    id: str
    model: str
    usage: tuple | None  # (input, output) tokens


def read_answer(body: str) -> Answer:
    """The first choice of a completion. The body is one that is_completion() holds for."""
    found = json.loads(body)
    choice = found["choices"][0]
    content = choice["message"].get("content")
    if isinstance(content, list):  # parts, as some servers send them
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    tokens = tuple(usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    told = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_TOKENS for n in tokens)
    return Answer(
        content if isinstance(content, str) else "",
        str(choice.get("finish_reason") or ""),
        str(choice["message"].get("refusal") or ""),
        str(found.get("id") or ""),
        str(found.get("model") or ""),
        tokens if told else None,
    )


def key_for(base_url, environment, name="OPENAI_API_KEY") -> str:
    """The API key in environment[name]; a server on this machine needs none. Raises UsageError."""
    key = environment.get(name, "").strip()
    if not key and host_of(base_url) not in LOOPBACK:
        raise UsageError(f"no API key in ${name} for {base_url}; set it, or name another variable by --api-key-env")
    if not re.fullmatch("[!-~]*", key):
        raise UsageError(f"the API key in ${name} holds a space, a line end or a letter that no key has; set it anew")
    return key

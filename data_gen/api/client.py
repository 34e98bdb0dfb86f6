"""One attempt at a request to any OpenAI-compatible server. Callers retry."""

import asyncio
import re
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from data_gen.api.answers import judge_success
from data_gen.api.cleaner import Cleaner
from data_gen.api.dialect import Dialect
from data_gen.api.errors import GAVE_UP, OVERLOADED, classify_error
from data_gen.api.prices import parse_host
from data_gen.api.rate import parse_retry_after
from data_gen.base.cli import UsageError

CONNECT_S = 30
TICK_S = 1.0  # between two looks at a request whose time may be over
OPENAI_HOST = "api.openai.com"
AZURE = re.compile(r".*\.(?:azure\.(?:com|us|cn)|azure-api\.net)")
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """The outcome of an attempt.

    kind is answer, refused (the server will not answer this request), failed (not billed), lost (perhaps billed),
    unsupported (the server does not understand the dialect) or fatal (the server will answer no request). The collector
    adds odd: the server does not understand this request, but has answered others in the same dialect.
    """

    kind: str
    status: int | None  # of an error inside of a 200, that of the error
    body: str
    headers: dict[str, str] = field(default_factory=dict)
    started_at: float = 0.0  # time.monotonic()
    overloaded: bool = False
    hint: str = ""  # what to do about it

    @property
    def is_rate_limit(self) -> bool:
        """Return whether the server's limit of rate or of money in flight, not the request, is at fault."""
        return self.kind == "failed" and self.status in (402, 429)

    def describe_load(self) -> dict[str, Any]:
        """Return the arguments of Rate.record_failure that tell of the server's load."""
        limited = self.status in (402, 429)
        return {"overloaded": self.overloaded, "limited": limited, "retry_after": parse_retry_after(self.headers)}


class Client:
    """The client of the openai package without its retries. The key is never printed, logged or stored."""

    def __init__(self, base_url: str, key: str, timeout_s: float):
        import openai  # takes half a second, and is not installed everywhere

        host, parts = parse_host(base_url), urlsplit(base_url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))  # such as Azure's api-version
        self.openai, self.timeout_s = openai, timeout_s
        self.path, self.cleaner = parts.path.rstrip("/"), Cleaner([key, *list_secrets(base_url)])
        # An older server knows only max_tokens, ignores the newer name and may then write for ever.
        self.dialect = Dialect(limit="max_completion_tokens" if host == OPENAI_HOST else "max_tokens")
        is_azure = AZURE.fullmatch(host) is not None
        hooks = {"request": [drop_authorization]} if is_azure else {}
        self.api = openai.AsyncOpenAI(
            base_url=parts._replace(query="", fragment="").geturl(),
            api_key=key or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=min(CONNECT_S, timeout_s)),  # wait_awake() has the limit
            default_query=query,
            default_headers={"api-key": key} if key and (is_azure or "api-version" in query) else {},
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )

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
            response = (await wait_awake(create(**known, extra_body=rest), self.timeout_s + 1)).http_response
            text, headers = self.read_body(response), self.keep_headers(response.headers)
            kind, status = judge_success(text)
            return self.make_reply(kind, status if status != 200 else response.status_code, text, headers, started_at)
        except self.openai.APIStatusError as error:
            text, headers = self.read_body(error.response), self.keep_headers(error.response.headers)
            status = error.status_code
            kind = "lost" if status in GAVE_UP else classify_error(status, text)
            return self.make_reply(kind, status, text, headers, started_at)
        except self.openai.APIConnectionError as error:
            cause = error.__cause__
            name = type(cause or error).__name__
            unsent = name in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
            text = self.hide_key(f"{name}: {cause or error}")
            return Reply("failed" if unsent else "lost", None, text, {}, started_at, "Timeout" in name)
        except asyncio.TimeoutError:
            text = f"TimeoutError: no whole answer in {self.timeout_s:g} s"
            return Reply("lost", None, text, {}, started_at, True)

    def make_reply(self, kind: str, status: int, text: str, headers: dict[str, str], started_at: float) -> Reply:
        """Return the outcome of an attempt that the server replied to."""
        if kind == "fatal" and status == 402 and parse_retry_after(headers) is not None:
            kind = "failed"  # a router's limit on the money in flight
        hint = ""
        if status == 404 and not re.search(r"/v\d", self.path):
            hint = f"; the address of most servers ends in /v1, and that of --base-url in {self.path or 'no path'}"
        return Reply(kind, status, text, headers, started_at, status in OVERLOADED, hint)

    def read_body(self, response: Any) -> str:
        """Return a response's body without the key."""
        return self.cleaner.clean_body(decode_json_bytes(response.content))

    def hide_key(self, text: str) -> str:
        """Return a text with [key] in place of the key."""
        return self.cleaner.clean(text)

    def keep_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that Rate uses, with lower-case names."""
        lower = {name.lower(): self.hide_key(value) for name, value in headers.items()}
        return {name: value for name, value in lower.items() if name.startswith(("retry-after", "x-ratelimit-"))}


async def drop_authorization(request: Any) -> None:
    """Take the header out of a request in which Azure would look for another kind of key."""
    request.headers.pop("authorization", None)


async def wait_awake(call: Awaitable[Result], seconds: float) -> Result:
    """Await a call for this long, counting only time in which this process ran. Raise asyncio.TimeoutError after it.

    A machine that was asleep, or too busy to let the process run, has not waited for the server.
    """
    task = asyncio.ensure_future(call)
    try:
        left = seconds
        while not task.done():
            if left <= 0:
                raise asyncio.TimeoutError
            await asyncio.wait([task], timeout=min(left, TICK_S))
            left -= TICK_S
        return task.result()
    finally:
        task.cancel()


def decode_json_bytes(data: bytes) -> str:
    """Return the text of a body. JSON is UTF-8 (RFC 8259), whatever a header says, but for a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def list_secrets(base_url: str) -> list[str]:
    """Return the password and the values of the query in an address, but for Azure's api-version."""
    parts = urlsplit(base_url)
    values = [value for name, value in parse_qsl(parts.query) if name != "api-version"]
    return [value for value in (parts.password or "", *values) if value]


def hide_secrets(base_url: str) -> str:
    """Return an address without user name, password, and values of its query that may be keys."""
    return Cleaner(list_secrets(base_url)).clean(re.sub("//[^/]*@", "//", base_url))


def find_api_key(base_url: str, environment: Mapping[str, str], name: str = "OPENAI_API_KEY") -> str:
    """Return the API key in environment[name], or "" for a server on this machine. Raise UsageError without one."""
    key = environment.get(name, "").strip()
    if not key and parse_host(base_url) not in LOOPBACK:
        address = hide_secrets(base_url)
        raise UsageError(f"no API key in ${name} for {address}; set it, or name another variable by --api-key-env")
    if not re.fullmatch("[!-~]*", key):
        raise UsageError(f"the API key in ${name} holds a space, a line end or a letter that no key has; set it anew")
    return key

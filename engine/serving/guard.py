"""What every request passes: Host and Origin, the API key, the size and the pace of its body, one line in the log.

A page of another site can send requests to a server on this machine. Its browser names the site in Origin, or, where
the site's name was made to mean this machine, in Host: both must be this server's own.
"""

import asyncio
import hmac
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engine.serving.metrics import Metrics
from engine.serving.openai_api import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/compare", "/health")  # need no key: the pages ask for it
CSP = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """Who may use the server. hosts: names in Host; empty for any, where a key is asked for."""

    hosts: Sequence[str] = LOOPBACK
    api_key: str | None = None
    max_body_bytes: int = 1 << 20
    timeout: float = 30.0  # seconds for a body to arrive


def error_response(error: ApiError) -> Response:
    """Return OpenAI's error object with its status."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, headers)


def check_access(access: Access, request: Request) -> None:
    """Raise ApiError for a request of a foreign page and for one without the key."""
    host = request.headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if access.hosts and name not in access.hosts:
        raise ApiError(403, f"Host is {host!r}, wanted one of {', '.join(access.hosts)}", code="foreign_host")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise ApiError(403, f"requests from pages of {origin!r} are not answered", code="foreign_origin")
    if access.api_key is None or request.url.path in OPEN_PATHS or request.method == "OPTIONS":
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), access.api_key.encode()):
        raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")


async def read_body(request: Request, access: Access) -> bytes:
    """Return a request's body. Raises ApiError for one that is too large or comes too slowly."""
    too_large = ApiError(413, f"the body is over {access.max_body_bytes} bytes", code="body_too_large")
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > access.max_body_bytes:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > access.max_body_bytes:
                raise too_large

    try:
        await asyncio.wait_for(read(), access.timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {access.timeout:g} s", code="slow_body") from None
    return bytes(body)


async def read_json(request: Request, access: Access) -> Any:
    """Return what a request's body says as JSON. Raises ApiError."""
    body = await read_body(request, access)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None


class Guard:
    """An ASGI application around another: checks access, adds headers, counts, and writes one line a request."""

    def __init__(self, app: Any, access: Access, metrics: Metrics, paths: Iterable[str]):
        self.app, self.access, self.metrics, self.paths = app, access, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        notes = scope.setdefault("state", {})  # what the endpoint tells of its tokens

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            check_access(self.access, Request(scope))
            await self.app(scope, receive, send_with_headers)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_headers)
        finally:
            seconds, path = time.monotonic() - began, scope["path"]
            known = path if path in self.paths else "other"
            self.metrics.count(known, status or 499, seconds, notes.get("first_token"))
            tokens = f" {notes['prompt_tokens']}+{notes.get('tokens', 0)} tokens" if "prompt_tokens" in notes else ""
            clock = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{clock} {scope['method']} {known} {status or 499} {seconds:.3f} s{tokens}", file=sys.stderr)

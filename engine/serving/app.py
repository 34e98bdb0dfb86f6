"""The server's application: OpenAI's endpoints over one or two models, the pages, health and metrics."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from engine.base.errors import DataError
from engine.serving.guard import Access, Guard, error_response, read_json
from engine.serving.metrics import Metrics
from engine.serving.model_service import Answering, ModelService, Piece, add_loads
from engine.serving.openai_api import (
    ApiError,
    Choice,
    Wanted,
    chat_chunk,
    completion_chunk,
    count_usage,
    legacy_logprobs,
    new_head,
    read_chat,
    read_completion,
    whole_chat,
    whole_completion,
)  # fmt: skip
from engine.serving.openapi import describe_api
from engine.serving.pages import read_page
from engine.serving.prompts import encode_chat

PAGE = Path(__file__).with_name("page.html")
PATHS = (
    "/", "/compare", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions", "/v1/completions",
)  # fmt: skip
NO_COMPARISON = "Nothing to compare: start engine.serve with --compare-with and a second model or two files of answers."
KEEP_ALIVE = 15.0  # seconds without a token after which a stream gets a comment
STILL_HERE, DONE = ": still here\n\n", "data: [DONE]\n\n"


class Server:
    """The endpoints. services: by the name that a request's `model` gives; the first is the default.

    comparison: the endpoints of /compare, where there is something to compare; without a service it is all there is.
    """

    def __init__(self, services: Sequence[ModelService], access: Access, comparison: Sequence[Route] = ()):
        self.services = {service.name: service for service in services}
        self.access, self.metrics, self.comparison = access, Metrics(), comparison
        self.created = int(time.time())

    def application(self) -> Any:
        """Return the ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.tell_metrics),
            Route("/openapi.json", self.describe),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.tell_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            *(self.comparison or [Route("/compare", self.explain_comparison)]),
        ]
        handlers: Any = {
            ApiError: lambda request, error: error_response(error),
            404: lambda request, error: error_response(ApiError(404, f"there is no {request.url.path}")),
            405: refuse_method,
            500: lambda request, error: error_response(ApiError(500, "the server failed; its log says how")),
        }
        paths = {*PATHS, *(route.path for route in self.comparison)}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), self.access, self.metrics, paths)

    # ---- what needs no model ------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """Return the page, or lead to the comparison where there is no model to talk to."""
        if not self.services:
            return RedirectResponse("/compare")
        return HTMLResponse(read_page(PAGE, '<a href="/compare">Compare two models</a>' if self.comparison else ""))

    async def explain_comparison(self, request: Request) -> Response:
        """Return how a comparison is begun."""
        return PlainTextResponse(NO_COMPARISON, 404)

    async def health(self, request: Request) -> Response:
        """Return 200 while requests are answered, else 503."""
        alive = all(service.is_alive() for service in self.services.values())
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def tell_metrics(self, request: Request) -> Response:
        """Return Prometheus's text."""
        loads = [service.load() for service in self.services.values()]
        return PlainTextResponse(self.metrics.text(add_loads(loads)))

    async def describe(self, request: Request) -> Response:
        """Return the OpenAPI description of these endpoints."""
        sizes = [service.model.config.vocab_size for service in self.services.values()]
        return JSONResponse(describe_api(self.access.api_key is not None, min(sizes, default=1)))

    async def list_models(self, request: Request) -> Response:
        """Return the models."""
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self.services]})

    async def tell_model(self, request: Request) -> Response:
        """Return one model."""
        return JSONResponse(self._describe(self._find_service(request.path_params["name"]).name))

    def _describe(self, name: str) -> dict[str, Any]:
        service = self.services[name]
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "cria",
            "max_model_len": service.limits.max_length, "prompt_style": service.style,
        }  # fmt: skip

    def _find_service(self, name: str) -> ModelService:
        if not self.services:
            raise ApiError(404, "this server has answers to compare and no model; start it with --model", "model")
        if not name:
            return next(iter(self.services.values()))
        if name not in self.services:
            known = ", ".join(self.services)
            raise ApiError(404, f"there is no model {name!r}, wanted one of {known}", "model", "model_not_found")
        return self.services[name]

    # ---- answers ------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer /v1/chat/completions."""
        wanted = read_chat(await read_json(request, self.access))
        service = self._find_service(wanted.model)
        try:
            prompt = encode_chat(
                wanted.messages, service.tokenizer, service.style,
                input=wanted.input, tools=wanted.tools, more=wanted.more,
            )  # fmt: skip
        except DataError as error:
            raise ApiError(400, str(error), "messages") from None
        return await self._respond(request, service, wanted, prompt, ChatFormat(wanted))

    async def complete(self, request: Request) -> Response:
        """Answer /v1/completions, of one prompt."""
        wanted = read_completion(await read_json(request, self.access))
        service = self._find_service(wanted.model)
        if len(wanted.prompts) != 1:
            raise ApiError(400, f"prompt: there are {len(wanted.prompts)}, wanted one a request", "prompt")
        prompt, tokenizer = wanted.prompts[0], service.tokenizer
        if isinstance(prompt, str):
            begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
            ids = begin + tokenizer.encode(prompt)
        else:
            ids = list(prompt)
            if not all(0 <= id < service.model.config.vocab_size for id in ids):
                raise ApiError(400, "prompt: there is a token id that the model does not have", "prompt")
        if not ids:
            raise ApiError(400, "prompt: it is empty", "prompt")
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        return await self._respond(request, service, wanted, ids, CompletionFormat(wanted, text))

    async def _respond(
        self, request: Request, service: ModelService, wanted: Wanted, prompt: Sequence[int], made: Any
    ) -> Response:
        answering = service.answer(wanted, prompt)
        notes = request.scope["state"]
        notes["prompt_tokens"] = answering.prompt_tokens
        head = new_head(made.kind, service.name)
        watched = watch(answering, notes)
        if wanted.stream:
            events = stream_events(answering, watched, made, head, wanted)
            return EventStream(events, answering)
        choices = await collect(request, answering, watched, wanted.n)
        return JSONResponse(made.whole(head, choices, answering.prompt_tokens))


class Closing(Protocol):
    """What is written until it is closed."""

    def close(self) -> None:
        """End what is still being written."""


def refuse_method(request: Request, error: HTTPException) -> Response:
    """Return status 405 with the methods that the path has, in Allow."""
    response = error_response(ApiError(405, f"{request.method} is not for this path"))
    response.headers.update(error.headers or {})
    return response


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, begun or not, the answer ends with it."""

    def __init__(self, events: AsyncIterator[str], answering: Closing):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answering = answering

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.close()


class ChatFormat:
    """How the pieces of a chat are written."""

    kind = "chat.completion"

    def __init__(self, wanted: Wanted):
        self.wants_logprobs = wanted.sampling.n_logprobs is not None

    def begin(self, head: Mapping[str, Any], index: int) -> dict[str, Any] | None:
        """Return the first chunk of a choice. Content is "", since null has crashed clients."""
        return chat_chunk(head, index, {"role": "assistant", "content": ""})

    def chunk(self, head: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece with text."""
        return chat_chunk(head, piece.index, {"content": piece.text}, list(piece.tokens))

    def end(self, head: Mapping[str, Any], index: int, reason: str) -> dict[str, Any]:
        """Return the last chunk of a choice."""
        return chat_chunk(head, index, {}, finish_reason=reason)

    def whole(self, head: Mapping[str, Any], choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """Return the answer in one piece."""
        return whole_chat(head, choices, prompt_tokens, self.wants_logprobs)


class CompletionFormat:
    """How the pieces of a completion are written. prompt: its text, for echo."""

    kind = "text_completion"

    def __init__(self, wanted: Wanted, prompt: str):
        self.wants_logprobs = wanted.sampling.n_logprobs is not None
        self.echo = prompt if wanted.echo else ""
        self.offsets: dict[int, int] = {}

    def begin(self, head: Mapping[str, Any], index: int) -> dict[str, Any] | None:
        """Return the chunk that echoes the prompt, if it is wanted."""
        self.offsets[index] = len(self.echo)
        return completion_chunk(head, index, self.echo) if self.echo else None

    def chunk(self, head: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece with text."""
        logprobs = legacy_logprobs(piece.tokens, self.offsets[piece.index]) if piece.tokens else None
        self.offsets[piece.index] += sum(len(token["token"]) for token in piece.tokens)
        return completion_chunk(head, piece.index, piece.text, logprobs)

    def end(self, head: Mapping[str, Any], index: int, reason: str) -> dict[str, Any]:
        """Return the last chunk of a choice."""
        return completion_chunk(head, index, "", finish_reason=reason)

    def whole(self, head: Mapping[str, Any], choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """Return the answer in one piece."""
        for choice in choices:
            choice.text = self.echo + choice.text
        return whole_completion(head, choices, prompt_tokens, self.wants_logprobs, len(self.echo))


async def watch(answering: Answering, notes: dict[str, Any]) -> AsyncIterator[Piece | None]:
    """Yield the pieces of an answer, noting the time of the first token and how many there were, for the log."""
    began = time.monotonic()
    async for piece in answering.pieces(KEEP_ALIVE):
        if piece is not None and piece.n_tokens:
            notes.setdefault("first_token", time.monotonic() - began)
            notes["tokens"] = notes.get("tokens", 0) + piece.n_tokens
        yield piece


def format_event(event: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def as_api_error(error: Exception) -> ApiError:
    """Return the error that a client is told."""
    return error if isinstance(error, ApiError) else ApiError(500, f"the model failed: {type(error).__name__}")


async def collect(request: Request, answering: Answering, pieces: AsyncIterator[Piece | None], n: int) -> list[Choice]:
    """Return the whole choices. If the client leaves before, they end and ApiError 499 is raised."""
    choices = [Choice() for _ in range(n)]

    async def read() -> None:
        async for piece in pieces:
            if piece is None:
                continue
            if piece.error is not None:
                raise as_api_error(piece.error)
            choice = choices[piece.index]
            choice.text += piece.text
            choice.n_tokens += piece.n_tokens
            choice.tokens += piece.tokens
            choice.finish_reason = piece.finish_reason or choice.finish_reason

    async def wait_for_leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.ensure_future(read()), asyncio.ensure_future(wait_for_leave())
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(499, "the client has left")
        await reading
    finally:
        answering.close()
        for task in (reading, leaving):
            task.cancel()
    return choices


async def stream_events(
    answering: Answering, pieces: AsyncIterator[Piece | None], made: Any, head: Mapping[str, Any], wanted: Wanted
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer."""
    choices = [Choice() for _ in range(wanted.n)]
    empty = {"usage": None} if wanted.include_usage else {}

    def event(chunk: Mapping[str, Any]) -> str:
        return format_event({**chunk, **empty})

    for index in range(wanted.n):
        first = made.begin(head, index)
        if first is not None:
            yield event(first)
    async for piece in pieces:
        if piece is None:
            yield STILL_HERE
            continue
        if piece.error is not None:
            yield format_event(as_api_error(piece.error).body())
            return
        choices[piece.index].n_tokens += piece.n_tokens
        if piece.text or piece.tokens:
            yield event(made.chunk(head, piece))
        if piece.finish_reason is not None:
            yield event(made.end(head, piece.index, piece.finish_reason))
    if wanted.include_usage:
        last = made.end(head, 0, "stop") | {"choices": [], "usage": count_usage(answering.prompt_tokens, choices)}
        yield format_event(last)
    yield DONE

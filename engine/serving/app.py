"""The server's application: OpenAI's endpoints over one or two models, the page, health and metrics."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.base.errors import DataError
from engine.serving.guard import Access, Guard, error_response, read_body
from engine.serving.metrics import Metrics
from engine.serving.model_service import Answering, ModelService, Piece
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
from engine.serving.prompts import encode_chat

PAGE = Path(__file__).with_name("page.html")
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")
KEEP_ALIVE = 15.0  # seconds without a token after which a stream gets a comment


class Server:
    """The endpoints. services: by the name that a request's `model` gives; the first is the default."""

    def __init__(self, services: Sequence[ModelService], access: Access):
        self.services = {service.name: service for service in services}
        self.default, self.access, self.metrics = services[0], access, Metrics()
        self.created = int(time.time())

    def application(self) -> Any:
        """Return the ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.tell_metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.tell_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        handlers: Any = {
            ApiError: lambda request, error: error_response(error),
            404: lambda request, error: error_response(ApiError(404, f"there is no {request.url.path}")),
            405: lambda request, error: error_response(ApiError(405, f"{request.method} is not for this path")),
            500: lambda request, error: error_response(ApiError(500, "the server failed; its log says how")),
        }
        return Guard(Starlette(routes=routes, exception_handlers=handlers), self.access, self.metrics, PATHS)

    # ---- what needs no model ------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """Return the page."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def health(self, request: Request) -> Response:
        """Return 200 while requests are answered, else 503."""
        alive = all(service.is_alive() for service in self.services.values())
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def tell_metrics(self, request: Request) -> Response:
        """Return Prometheus's text."""
        return PlainTextResponse(self.metrics.text(self.default.load()))

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
        if not name:
            return self.default
        if name not in self.services:
            known = ", ".join(self.services)
            raise ApiError(404, f"there is no model {name!r}, wanted one of {known}", "model", "model_not_found")
        return self.services[name]

    # ---- answers ------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer /v1/chat/completions."""
        wanted = read_chat(await self._read_json(request))
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
        wanted = read_completion(await self._read_json(request))
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

    async def _read_json(self, request: Request) -> Any:
        body = await read_body(request, self.access)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None

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


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, begun or not, the answer ends with it."""

    def __init__(self, events: AsyncIterator[str], answering: Answering):
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
        return whole_completion(head, choices, prompt_tokens, self.wants_logprobs)


async def watch(answering: Answering, notes: dict[str, Any]) -> AsyncIterator[Piece | None]:
    """Yield the pieces of an answer, noting the time of the first token and how many there were, for the log."""
    began = time.monotonic()
    async for piece in answering.pieces(KEEP_ALIVE):
        if piece is not None and piece.n_tokens:
            notes.setdefault("first_token", time.monotonic() - began)
            notes["tokens"] = notes.get("tokens", 0) + piece.n_tokens
        yield piece


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
        return f"data: {json.dumps({**chunk, **empty}, ensure_ascii=False)}\n\n"

    for index in range(wanted.n):
        first = made.begin(head, index)
        if first is not None:
            yield event(first)
    async for piece in pieces:
        if piece is None:
            yield ": still here\n\n"
            continue
        if piece.error is not None:
            yield f"data: {json.dumps(as_api_error(piece.error).body())}\n\n"
            return
        choices[piece.index].n_tokens += piece.n_tokens
        if piece.text or piece.tokens:
            yield event(made.chunk(head, piece))
        if piece.finish_reason is not None:
            yield event(made.end(head, piece.index, piece.finish_reason))
    if wanted.include_usage:
        last = made.end(head, 0, "stop") | {"choices": [], "usage": count_usage(answering.prompt_tokens, choices)}
        yield f"data: {json.dumps(last)}\n\n"
    yield "data: [DONE]\n\n"

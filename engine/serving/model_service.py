"""A model that answers in a thread of its own, and what an event loop sees of it: pieces of answers as they come."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.inference.sampling import Draw
from engine.inference.scheduler import CANCELLED, Load, Request, Scheduler
from engine.model.llama import Transformer
from engine.serving.answer_text import AnswerText
from engine.serving.openai_api import ApiError, Wanted
from engine.serving.structured import Constraint, SchemaError
from engine.text.templates import find_stop_ids
from engine.text.tokenizer import Tokenizer

RETRY_AFTER = 1  # seconds, told to whoever finds the queue full


@dataclass(frozen=True)
class Limits:
    """How much a service takes on at once."""

    max_concurrency: int = 8  # answers that are written at once
    max_queue: int = 64  # answers that wait
    max_length: int = 2048  # tokens of a prompt and its answer


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer, or its end."""

    index: int  # of the choice
    text: str = ""
    n_tokens: int = 0
    tokens: Sequence[dict[str, Any]] = ()  # logprobs of the token
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Answering:
    """The choices of one request. pieces() ends when all have ended; close() ends them before."""

    prompt_tokens: int
    requests: list[Request] = field(default_factory=list)
    queue: "asyncio.Queue[Piece]" = field(default_factory=asyncio.Queue)

    async def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """Yield pieces as they come, and None whenever none came for so many seconds."""
        open_choices = len(self.requests)
        while open_choices:
            try:
                piece = await asyncio.wait_for(self.queue.get(), patience)
            except asyncio.TimeoutError:
                yield None
                continue
            open_choices -= piece.finish_reason is not None or piece.error is not None
            yield piece

    def close(self) -> None:
        """End what is still being written."""
        for request in self.requests:
            request.cancelled = True


def add_loads(loads: Iterable[Load]) -> Load:
    """Return the sums over several models."""
    counts = [dataclasses.astuple(load) for load in loads]
    return Load(*map(sum, zip(*counts, strict=True))) if counts else Load(0, 0, 0, 0, 0)


class ModelService:
    """One model under one name. Its thread begins with start() and ends with stop()."""

    def __init__(self, name: str, model: Transformer, tokenizer: Tokenizer, style: str, limits: Limits):
        self.name, self.model, self.tokenizer, self.style, self.limits = name, model, tokenizer, style, limits
        self.stop_ids = find_stop_ids(tokenizer, style)
        self.scheduler = Scheduler(model, limits.max_concurrency, limits.max_length)
        self.constraint: Constraint | None = None
        self.is_stopping = False
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self.thread.start()

    def stop(self) -> None:
        """End all answers and the thread."""
        self.is_stopping = True
        self.thread.join()

    def load(self) -> Load:
        """Return what the model is doing and has done."""
        return self.scheduler.load()

    def is_alive(self) -> bool:
        """Return whether requests are answered."""
        return self.thread.is_alive() and not self.is_stopping

    def answer(self, wanted: Wanted, prompt: Sequence[int]) -> Answering:
        """Begin the choices of a request to one prompt. Call it in the event loop. Raises ApiError if it is refused."""
        longest, load = self.limits.max_length, self.load()
        if len(prompt) >= longest:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and this model takes {longest} with the answer "
                "(context_length_exceeded); shorten it",
                "messages" if wanted.messages else "prompt", "context_length_exceeded",
            )  # fmt: skip
        if not self.is_alive():
            raise ApiError(503, "the server is shutting down; try again later", code="unavailable")
        most = self.limits.max_concurrency + self.limits.max_queue
        if load.running + load.waiting + wanted.n > most:
            raise ApiError(503, f"{most} answers are being written or waited for; try again later", code="queue_full")
        unknown = [id for id in wanted.sampling.bias if not 0 <= id < self.model.config.vocab_size]
        if unknown:
            raise ApiError(400, f"logit_bias: there is no token {unknown[0]}", "logit_bias")
        answering, loop = Answering(len(prompt)), asyncio.get_running_loop()
        for index in range(wanted.n):
            answering.requests.append(self._new_request(wanted, prompt, index, answering, loop))
        for request in answering.requests:
            self.scheduler.submit(request)
        return answering

    def _new_request(
        self, wanted: Wanted, prompt: Sequence[int], index: int, answering: Answering, loop: asyncio.AbstractEventLoop
    ) -> Request:
        text = AnswerText(self.tokenizer, wanted.stops)
        sampling = dataclasses.replace(wanted.sampling, seed=(wanted.sampling.seed + index) % 2**63)

        def send(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(answering.queue.put_nowait, piece)

        def on_token(draw: Draw) -> bool:
            tokens = [] if draw.logprob is None else [self.describe_draw(draw)]
            send(Piece(index, text.push(draw.id), 1, tokens))
            return not text.is_stopped

        def on_end(reason: str, error: Exception | None) -> None:
            if reason == CANCELLED and error is None:
                error = ApiError(503, "the server is shutting down; try again later", code="unavailable")
            send(Piece(index, text.flush(), finish_reason=None if error else reason, error=error))

        most = self.limits.max_length - len(prompt)
        return Request(
            prompt, min(wanted.max_tokens or most, most), self.stop_ids, sampling, on_token, on_end,
            self._new_grammar(wanted),
        )  # fmt: skip

    def _new_grammar(self, wanted: Wanted):
        if wanted.schema is None and wanted.regex is None:
            return None
        try:
            if self.constraint is None:
                self.constraint = Constraint(self.tokenizer)
            if wanted.schema is not None:
                return self.constraint.follow_schema(wanted.schema)
            return self.constraint.follow_regex(wanted.regex or "")
        except ImportError:
            raise ApiError(
                501, "structured answers need llguidance; pip install 'cria-engine[serve]'", "response_format"
            ) from None
        except SchemaError as error:
            raise ApiError(400, f"response_format: {error}", "response_format") from None

    def describe_draw(self, draw: Draw) -> dict[str, Any]:
        """Return the entry of logprobs.content for a token."""

        def describe(id: int, logprob: float) -> dict[str, Any]:
            piece = self.tokenizer.piece(id) or next(
                (text.encode() for text, known in self.tokenizer.special_ids.items() if known == id), b""
            )
            # JSON has no infinity: a token that a grammar forbids is as good as impossible.
            return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(piece)}

        assert draw.logprob is not None
        return describe(draw.id, draw.logprob) | {"top_logprobs": [describe(*top) for top in draw.likeliest]}

    def _work(self) -> None:
        try:
            while not self.is_stopping:
                if not self.scheduler.step():
                    self.scheduler.wait(0.1)
        finally:
            self.is_stopping = True
            self.scheduler.stop()

"""Two answers shown at one pace: neither says by its speed, or by its end, which model wrote it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from engine.serving.app import as_api_error
from engine.serving.model_service import Piece

TICK = 0.04  # seconds between looks while an answer that is already written is still being shown
SPEED = 60.0  # characters/s of the longer answer where the shorter one came in one piece


class Answer(Protocol):
    """An answer that is being written."""

    def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """Yield the pieces of the answer as they come."""

    def close(self) -> None:
        """End what is still being written."""


class Pace:
    """How many characters of both answers may be shown.

    The slower answer leads. Once the shorter one is shown as a whole, the longer one goes on as fast as both came
    until then: a rest that is already written would otherwise appear at once, and tell that its model is the faster.
    Answers that are both there from the beginning tell nothing, and are shown at once.
    """

    def __init__(self) -> None:
        self.began: float | None = None  # when the first characters were shown
        self.alone: float | None = None  # since when one answer goes on alone
        self.common = 0  # characters that both have shown

    def allow(self, lengths: tuple[int, int], has_ended: tuple[bool, bool], now: float) -> int:
        """Return up to which character both may be shown now, of answers that have so many."""
        if self.alone is None:
            if self.began is None and all(has_ended):
                return max(lengths)
            self.common = min(lengths)
            if self.began is None and self.common:
                self.began = now
            if not any(ended and length == self.common for ended, length in zip(has_ended, lengths, strict=True)):
                return self.common
            self.alone = now
        seconds = self.alone - (self.alone if self.began is None else self.began)
        speed = self.common / seconds if seconds > 0 else SPEED
        return min(self.common + int(speed * (now - self.alone)), max(lengths))


class Relay:
    """Two answers as they come, and what has been shown of each."""

    def __init__(self, answers: Sequence[Answer]):
        self.answers, self.texts = answers, ["", ""]
        self.reasons: list[str | None] = [None, None]
        self.shown = 0  # characters of each
        self.changed = asyncio.Event()

    def shown_texts(self) -> tuple[str, str]:
        """Return what has been shown."""
        return self.texts[0][: self.shown], self.texts[1][: self.shown]

    def close(self) -> None:
        """End what is still being written."""
        for answer in self.answers:
            answer.close()

    async def steps(self, patience: float) -> AsyncIterator[tuple[str, str] | None]:
        """Yield what is shown next until all is shown, and None whenever nothing was for so many seconds.

        Raises ApiError where a model fails.
        """
        pace = Pace()
        readers = [asyncio.ensure_future(self._read(side)) for side in (0, 1)]
        try:
            while True:
                self.changed.clear()
                for reader in readers:
                    if reader.done():
                        reader.result()  # raises what ended it
                a, b = (len(text) for text in self.texts)
                has_ended = self.reasons[0] is not None, self.reasons[1] is not None
                upto = pace.allow((a, b), has_ended, time.monotonic())
                if upto > self.shown:
                    before, self.shown = self.shown, upto
                    yield self.texts[0][before:upto], self.texts[1][before:upto]
                if all(has_ended) and self.shown >= max(a, b):
                    return
                is_held = pace.alone is not None and self.shown < max(a, b)
                try:
                    await asyncio.wait_for(self.changed.wait(), TICK if is_held else patience)
                except asyncio.TimeoutError:
                    if not is_held:
                        yield None
        finally:
            for reader in readers:
                reader.cancel()

    async def _read(self, side: int) -> None:
        try:
            async for piece in self.answers[side].pieces():
                if piece is None:
                    continue
                if piece.error is not None:
                    raise as_api_error(piece.error)
                self.texts[side] += piece.text
                self.reasons[side] = piece.finish_reason or self.reasons[side]
                self.changed.set()
        finally:
            self.changed.set()

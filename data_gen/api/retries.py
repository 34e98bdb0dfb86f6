"""Calls to the files and batches endpoints: retried after failures that may pass, ended soon after a signal."""

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from data_gen.api.client import classify_error, extract_message
from data_gen.api.collector import Collector
from data_gen.api.rate import parse_retry_after
from data_gen.base.cli import Failure

Result = TypeVar("Result")

GRACE_S = 5  # for the call in flight when a signal comes


class Halted(Exception):
    """A signal ended the wait. Batches continue at the server, and the ledger has recorded them."""


class Calls:
    """Makes calls for a collector, which knows about signals, back-off and patience."""

    def __init__(self, collector: Collector):
        self.collector, self.client = collector, collector.client
        self.patience_s = collector.limits.patience_s

    async def make_call(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Await call(), and call again after a failure that may pass.

        Raise Failure after --patience or for a failure that will not pass.
        """
        openai, since = self.client.openai, time.monotonic()
        for tries in itertools.count(1):
            response, body = None, ""
            try:
                found = await self.wait_unless_halted(call())
                if not isinstance(found, str):
                    return found
                body = found  # a proxy's page
            # ValueError: half a JSON text; AttributeError: a proxy's page where the package wants a list
            except (openai.APIError, ValueError, AttributeError) as error:
                response = getattr(error, "response", None)
                body = str(error) if response is None else response.text
            text = extract_message(self.client.hide_key(body))
            if response is not None and classify_error(response.status_code, body) != "failed":
                status = response.status_code
                raise Failure(f"the server said {status}: {text}; the same command goes on from here")
            if time.monotonic() - since > self.patience_s:
                why = f"no answer for {self.patience_s:g} s (--patience): {text}"
                raise Failure(f"{why}; the same command goes on from here")
            after = parse_retry_after(response.headers) if response is not None else None
            await self.pause(max(after or 0, self.collector.rate.draw_backoff_s(tries)))
        raise AssertionError("unreachable")

    async def wait_unless_halted(self, call: Awaitable[Result]) -> Result:
        """Await a call, but for GRACE_S at most after a signal. Raise Halted then."""
        task, halt_at = asyncio.ensure_future(call), math.inf
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if self.collector.stopping:
                halt_at = min(halt_at, time.monotonic() + GRACE_S)
            if time.monotonic() > halt_at:
                task.cancel()
                raise Halted
        return task.result()

    async def pause(self, seconds: float) -> None:
        """Sleep. Raise Halted when a signal comes."""
        until = time.monotonic() + seconds
        while True:
            await asyncio.sleep(max(0.0, min(0.25, until - time.monotonic())))
            if self.collector.stopping:
                raise Halted
            if time.monotonic() >= until:
                return

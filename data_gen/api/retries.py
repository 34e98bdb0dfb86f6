"""Calls to the files and batches endpoints: retried after failures that may pass, ended soon after a signal."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from data_gen.api.client import wait_awake
from data_gen.api.collector import Collector
from data_gen.api.errors import classify_error, extract_message, find_error
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
            response, status, body = None, None, ""
            try:
                found = await self.wait_unless_halted(wait_awake(call(), self.client.timeout_s))
                status, body = find_inner_error(found)
                if not body:
                    return found
            # ValueError: half a JSON text; AttributeError: a proxy's page where the package wants a list
            except (openai.APIError, ValueError, AttributeError) as error:
                response = getattr(error, "response", None)
                body = str(error) if response is None else response.text
                status = None if response is None else response.status_code
            except asyncio.TimeoutError:
                body = f"no whole answer in {self.client.timeout_s:g} s"
            text = extract_message(self.client.cleaner.clean_body(body))
            if status is not None and classify_error(status, body) != "failed":
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


def find_inner_error(found: Any) -> tuple[int | None, str]:
    """Return (status, body) of an error in what the package took for an answer, (None, "") for an answer."""
    if isinstance(found, str):
        return None, found or "an empty answer"  # a proxy's page
    fields = getattr(found, "model_extra", None)
    if not fields or getattr(found, "id", None):
        return None, ""
    status = find_error(fields)
    return status, "" if status is None else json.dumps(fields, default=str)

"""Calls of the files and batches endpoints: again after what passes, and soon over once a signal came."""

import asyncio
import itertools
import math
import time

from data_gen.api.client import kind_of, message_of
from data_gen.api.rate import retry_after
from data_gen.base.cli import Failure

GRACE_S = 5  # for the call in flight when a signal comes


class Halted(Exception):
    """A signal came. What is at the server goes on there, and the ledger knows it."""


class Calls:
    def __init__(self, collector, options):
        self.collector, self.client, self.options = collector, collector.client, options

    async def make(self, call):
        """await call(), again after what passes. Raises Failure after --patience or on what does not pass."""
        openai, since = self.client.openai, time.monotonic()
        for tries in itertools.count(1):
            response, status = None, 0
            try:
                found = await self.unless_halted(call())
                if not isinstance(found, str):
                    return found
                text = found  # a proxy's page
            # ValueError: half a JSON text; AttributeError: a proxy's page where the package wants a list
            except (openai.APIError, ValueError, AttributeError) as error:
                response = getattr(error, "response", None)
                status, text = (response.status_code, response.text) if response is not None else (0, str(error))
            text = message_of(self.client.clean(text))
            if status and kind_of(status, response.text) != "failed":
                raise Failure(f"the server said {status}: {text}; the same command goes on from here")
            if time.monotonic() - since > self.options.patience:
                why = f"no answer for {self.options.patience:g} s (--patience): {text}"
                raise Failure(f"{why}; the same command goes on from here")
            after = retry_after(response.headers) if response is not None else None
            await self.pause(max(after or 0, self.collector.rate.backoff(tries)))

    async def unless_halted(self, made):
        """await made; after a signal for a moment only."""
        task, halt_at = asyncio.ensure_future(made), math.inf
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if self.collector.stopping:
                halt_at = min(halt_at, time.monotonic() + GRACE_S)
            if time.monotonic() > halt_at:
                task.cancel()
                raise Halted
        return task.result()

    async def pause(self, seconds):
        """Sleeps. Raises Halted when a signal comes."""
        until = time.monotonic() + seconds
        while True:
            await asyncio.sleep(max(0.0, min(0.25, until - time.monotonic())))
            if self.collector.stopping:
                raise Halted
            if time.monotonic() >= until:
                return

"""Rate control: how many requests may be in flight, and when the next may start.

The limit follows additive increase, multiplicative decrease (Chiu and Jain, 1989), with a doubling start as in TCP. If
the server asks for a pause, none starts during it. If the server names no limits, throughput shows them. A circuit
breaker opens when nothing gets through.
"""

import contextlib
import email.utils
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

FIRST_LIMIT = 4
BREAKER_FAILURES = 10  # in a row, without an answer in between, until the server counts as down
FIRST_COOL_DOWN_S, LONGEST_COOL_DOWN_S = 5, 60
LONGEST_BACKOFF_S = 60
GAIN = 1.05  # least gain of throughput that justifies more requests in flight; 1.25 for twice as many, as in BBR
HOLD_WINDOWS = 10  # windows for which a limit found by throughput stays before a larger one is tried


class Rate:
    """The state of one server. Times are seconds of clock().

    max_in_flight bounds the limit. backoff_s is the wait before a first retry, and all waits scale with it. A caller
    asks can_start(), then calls record_start() and, at the end of the request, record_answer(), record_failure() or
    release().
    """

    def __init__(
        self,
        max_in_flight: int,
        backoff_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self.max_in_flight, self.backoff_s = max_in_flight, backoff_s
        self.clock, self.rng = clock, rng or random.Random()
        self.limit, self.slow_start = float(min(max_in_flight, FIRST_LIMIT)), True
        self.in_flight = self.answers = 0
        self.paused_until = self.halved_at = self.opened_at = -math.inf
        self.failures, self.cool_downs, self.last_answer = 0, 0, clock()
        # 429s since the last answer that came at a limit of one request and named no time to wait
        self.n_rate_limited = 0
        self.window = Window()

    # ---- asking --------------------------------------------------------------------------------------------------

    def can_start(self) -> bool:
        """Return whether a request may start now."""
        return self.is_below_limit() and self.wait_s() == 0

    def is_below_limit(self) -> bool:
        """Return whether fewer requests are in flight than the limit allows."""
        return self.in_flight < (1 if self.is_open() else max(1, int(self.limit)))

    def wait_s(self) -> float:
        """Return the seconds for which no request may start."""
        return max(0.0, self.paused_until - self.clock())

    def is_open(self) -> bool:
        """Return whether the breaker is open. Then one request at a time tries whether the server is back."""
        return self.failures >= BREAKER_FAILURES

    def silence_s(self) -> float:
        """Return the seconds since the last answer, or since the start."""
        return self.clock() - self.last_answer

    def excuse_silence(self, seconds: float) -> None:
        """Let a time not count as the server's silence."""
        self.last_answer += max(0.0, seconds)

    def draw_backoff_s(self, tries: int) -> float:
        """Return random seconds to wait after this many tries: up to a span that doubles with each (full jitter)."""
        return self.rng.random() * min(LONGEST_BACKOFF_S, 2 ** min(tries, 30)) * self.backoff_s

    # ---- recording -----------------------------------------------------------------------------------------------

    def record_start(self) -> None:
        """Count a request as in flight."""
        self.in_flight += 1

    def record_answer(self, started_at: float, tokens: int, headers: Mapping[str, str]) -> None:
        """Raise the limit after an answer of this many tokens. headers are {lower-case name: value}."""
        self.in_flight -= 1
        self.answers += 1
        self.failures = self.cool_downs = self.n_rate_limited = 0
        self.last_answer = self.clock()
        self.limit = min(self.max_in_flight, self.limit + (1 if self.slow_start else 1 / self.limit))
        if "x-ratelimit-remaining-requests" in headers or "x-ratelimit-remaining-tokens" in headers:
            self.apply_headers(headers)
        else:
            self.limit, self.slow_start = self.window.add_answer(self, started_at, tokens)

    def record_failure(
        self, started_at: float, overloaded: bool = False, limited: bool = False, retry_after: float | None = None
    ) -> None:
        """Lower the limit, pause or open the breaker after a failed request.

        overloaded: the server is too busy. limited: the server is up and limits the rate (429). retry_after: the
        seconds that the server asks to wait.
        """
        self.in_flight -= 1
        if retry_after is not None:
            self.pause(retry_after)
        if overloaded and started_at > self.halved_at:  # halve once for all requests that were then in flight
            if limited and retry_after is None and self.limit == 1:  # the limit cannot fall: ask less often
                self.n_rate_limited += 1
                self.pause(self.draw_backoff_s(self.n_rate_limited))
            self.limit, self.slow_start, self.halved_at = max(1.0, self.limit / 2), False, self.clock()
            self.window.since = None
        self.failures += not limited
        if not limited and self.is_open() and (self.failures == BREAKER_FAILURES or started_at > self.opened_at):
            self.opened_at = self.clock()  # later failures of requests in flight now change nothing
            cool_down = min(LONGEST_COOL_DOWN_S, FIRST_COOL_DOWN_S * 2**self.cool_downs)
            self.cool_downs = min(self.cool_downs + 1, 30)
            self.limit, self.slow_start, self.window.since = 1.0, True, None
            self.pause(cool_down * self.backoff_s)

    def release(self) -> None:
        """Count the end of a request that says nothing about the server's load."""
        self.in_flight -= 1

    def pause(self, seconds: float) -> None:
        """Let no request start for this many seconds."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def apply_headers(self, headers: Mapping[str, str]) -> None:
        """Pause until the server's window is over if no request or hardly a token remains in it."""
        for unit, share in (("requests", 0.0), ("tokens", 0.02)):
            remaining = parse_number(headers.get(f"x-ratelimit-remaining-{unit}"))
            allowed = parse_number(headers.get(f"x-ratelimit-limit-{unit}")) or 0
            if remaining is not None and remaining < max(1, share * allowed):
                self.pause(parse_duration(headers.get(f"x-ratelimit-reset-{unit}")) or self.backoff_s)


class Window:
    """Finds the limit of a server that names none: above it, more requests in flight bring no more tokens per second.

    A window lasts for as many answers as the limit at its start while the limit doubles, and later for twice as many.
    """

    def __init__(self) -> None:
        self.best = self.best_limit = 0.0  # the highest tokens per second, and the limit at which it was reached
        self.hold = 0  # windows for which the limit still stays at best_limit
        self.since: float | None = None  # start of the window; None before a first answer
        self.limit = 0.0
        self.tokens = self.answers = 0

    def restart(self, now: float, limit: float) -> None:
        """Begin a new window at this limit."""
        self.since, self.tokens, self.answers, self.limit = now, 0, 0, limit

    def add_answer(self, rate: Rate, started_at: float, tokens: int) -> tuple[float, bool]:
        """Return the new limit, and whether it may still double, after one more answer."""
        now = rate.clock()
        if self.since is None:
            self.restart(started_at, rate.limit)
        since = started_at if self.since is None else self.since
        self.tokens, self.answers = self.tokens + tokens, self.answers + 1
        limit, slow_start = rate.limit, rate.slow_start
        if self.hold:
            limit = min(limit, self.best_limit)
        if self.answers < max(8, self.limit * (1 if slow_start else 2)) or now <= since:
            return limit, slow_start
        speed, at_limit = self.tokens / (now - since), self.limit
        needed = max(GAIN, 1 + (at_limit / (self.best_limit or at_limit) - 1) / 4)
        self.restart(now, limit)
        if self.hold:
            self.hold -= 1
            self.best = speed if self.hold == 0 else self.best
        elif speed > self.best * needed or not self.best_limit:
            self.best, self.best_limit = speed, at_limit
        elif at_limit >= 1.5 * self.best_limit:  # much more in flight, no more came out
            limit, slow_start, self.hold = min(limit, self.best_limit), False, HOLD_WINDOWS
        return limit, slow_start


def parse_retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a response asks to wait, by retry-after-ms or Retry-After in seconds or as a date."""
    ms = parse_number(headers.get("retry-after-ms"))
    if ms is not None:
        return max(0.0, ms / 1000)
    text = headers.get("retry-after")
    seconds = parse_number(text)
    if seconds is None and text:
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # no date, or the year 99999999
            then = email.utils.mktime_tz(email.utils.parsedate_tz(text))  # type: ignore[arg-type]
            seconds = then - (time.time() if now is None else now)
    return None if seconds is None else max(0.0, seconds)


def parse_duration(text: str | None) -> float:
    """Return the seconds of a text such as "1h2m3.5s", "120ms" or "6", or 0 for anything else."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    if not text or not re.fullmatch(r"(\d+(\.\d+)?(ms|[hms]|$))+", text.strip()):
        return 0.0
    return sum(float(value) * units[unit] for value, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[hms]|$)", text.strip()))


def parse_number(text: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None

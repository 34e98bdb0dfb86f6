"""How many requests may be in flight, and when the next may start.

Additive increase, multiplicative decrease (Chiu and Jain, 1989), with a doubling start as in TCP; a pause where the
server names one; a look at throughput where it names no limits; a circuit breaker where nothing gets through.
"""

import contextlib
import email.utils
import math
import random
import re
import time

FIRST_LIMIT = 4
BREAKER_FAILURES = 10  # in a row, nothing answered in between, and the server counts as down
FIRST_COOL_DOWN_S, LONGEST_COOL_DOWN_S = 5, 60
LONGEST_BACKOFF_S = 60
GAIN = 1.05  # of throughput, below which more requests in flight are no use; 1.25 for twice as many, as in BBR
HOLD_WINDOWS = 10  # that a limit found by throughput stays before more is tried again


class Rate:
    """The state of one server. Times are seconds of clock().

    most: requests in flight at most. backoff_s: of a first retry; all waits scale with it. A caller asks may_start(),
    tells started(), then answered(), failed() or left(); ready_in() is how long nothing may start.
    """

    def __init__(self, most, backoff_s=1.0, clock=time.monotonic, rng=None):
        self.most, self.backoff_s, self.clock, self.rng = most, backoff_s, clock, rng or random.Random()
        self.limit, self.slow_start = float(min(most, FIRST_LIMIT)), True
        self.in_flight = self.answers = 0
        self.paused_until = self.cut_at = self.opened_at = -math.inf
        self.failures, self.cool_downs, self.last_answer = 0, 0, clock()
        self.turned_away = 0  # rounds of 429 since the last answer with one request in flight and no time named
        self.window = Window()

    # ---- asking --------------------------------------------------------------------------------------------------

    def may_start(self) -> bool:
        return self.has_room() and self.ready_in() == 0

    def has_room(self) -> bool:
        return self.in_flight < (1 if self.is_open() else max(1, int(self.limit)))

    def ready_in(self) -> float:
        return max(0.0, self.paused_until - self.clock())

    def is_open(self) -> bool:
        """Whether the breaker is open: then one request at a time asks whether the server is back."""
        return self.failures >= BREAKER_FAILURES

    def silent_s(self) -> float:
        """Seconds since the last answer, or since the start."""
        return self.clock() - self.last_answer

    def backoff(self, tries) -> float:
        """Seconds before a request that failed so many times is tried again: full jitter on a doubling span."""
        return self.rng.random() * min(LONGEST_BACKOFF_S, 2 ** min(tries, 30)) * self.backoff_s

    # ---- telling -------------------------------------------------------------------------------------------------

    def started(self):
        self.in_flight += 1

    def answered(self, started_at, tokens, headers):
        """tokens: of the answer. headers: of the response, {lower-case name: value}."""
        self.in_flight -= 1
        self.answers += 1
        self.failures = self.cool_downs = self.turned_away = 0
        self.last_answer = self.clock()
        self.limit = min(self.most, self.limit + (1 if self.slow_start else 1 / self.limit))
        if "x-ratelimit-remaining-requests" in headers or "x-ratelimit-remaining-tokens" in headers:
            self.heed(headers)
        else:
            self.limit, self.slow_start = self.window.add(self, started_at, tokens)

    def failed(self, started_at, overloaded=False, limited=False, retry_after=None):
        """overloaded: the server is too busy. limited: it is up and says so (429). retry_after: seconds it named."""
        self.in_flight -= 1
        if retry_after is not None:
            self.pause(retry_after)
        if overloaded and started_at > self.cut_at:  # one cut for all that was in flight when the limit was cut
            if limited and retry_after is None and self.limit == 1:  # nothing to cut: ask less often
                self.turned_away += 1
                self.pause(self.backoff(self.turned_away))
            self.limit, self.slow_start, self.cut_at = max(1.0, self.limit / 2), False, self.clock()
            self.window.since = None
        self.failures += not limited
        if not limited and self.is_open() and (self.failures == BREAKER_FAILURES or started_at > self.opened_at):
            self.opened_at = self.clock()  # what fails later but was in flight already asks nothing
            cool_down = min(LONGEST_COOL_DOWN_S, FIRST_COOL_DOWN_S * 2**self.cool_downs)
            self.cool_downs = min(self.cool_downs + 1, 30)
            self.limit, self.slow_start, self.window.since = 1.0, True, None
            self.pause(cool_down * self.backoff_s)

    def left(self):
        """A request ended that says nothing of the server."""
        self.in_flight -= 1

    def pause(self, seconds):
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def heed(self, headers):
        """Where no request or hardly a token remains, wait until the server's window is over."""
        for what, share in (("requests", 0), ("tokens", 0.02)):
            remaining = number(headers.get(f"x-ratelimit-remaining-{what}"))
            allowed = number(headers.get(f"x-ratelimit-limit-{what}")) or 0
            if remaining is not None and remaining < max(1, share * allowed):
                self.pause(duration(headers.get(f"x-ratelimit-reset-{what}")) or self.backoff_s)


class Window:
    """Tokens a second over as many answers as may be in flight at its start, or twice as many: a server that names no
    limits shows its own by not getting any faster."""

    def __init__(self):
        self.best = self.best_limit = 0.0
        self.hold = 0
        self.since = None

    def restart(self, now, limit):
        self.since, self.tokens, self.answers, self.limit = now, 0, 0, limit  # since: None before a first answer

    def add(self, rate, started_at, tokens):
        """The limit and whether it may still double, after one more answer."""
        now = rate.clock()
        if self.since is None:
            self.restart(started_at, rate.limit)
        self.tokens, self.answers = self.tokens + tokens, self.answers + 1
        limit, slow_start = rate.limit, rate.slow_start
        if self.hold:
            limit = min(limit, self.best_limit)
        if self.answers < max(8, self.limit * (1 if slow_start else 2)) or now <= self.since:
            return limit, slow_start
        speed, at_limit = self.tokens / (now - self.since), self.limit
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


def retry_after(headers, now=None) -> float | None:
    """Seconds that a response asks to wait: Retry-After in seconds or as a date, retry-after-ms."""
    ms = number(headers.get("retry-after-ms"))
    if ms is not None:
        return max(0.0, ms / 1000)
    text = headers.get("retry-after")
    seconds = number(text)
    if seconds is None and text:
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # no date, or one of the year 99999999
            then = email.utils.mktime_tz(email.utils.parsedate_tz(text))
            seconds = then - (time.time() if now is None else now)
    return None if seconds is None else max(0.0, seconds)


def duration(text) -> float:
    """Seconds of "1h2m3.5s", "120ms" or "6"; 0 where it is none."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    if not text or not re.fullmatch(r"(\d+(\.\d+)?(ms|[hms]|$))+", text.strip()):
        return 0.0
    return sum(float(value) * units[unit] for value, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[hms]|$)", text.strip()))


def number(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None

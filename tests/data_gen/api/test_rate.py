"""The rate on a clock of its own: starts, cuts, pauses and retries, and the limit that a server shows."""

import email.utils
import heapq
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.api.rate import (
    BREAKER_FAILURES,
    FIRST_COOL_DOWN_S,
    LONGEST_BACKOFF_S,
    LONGEST_COOL_DOWN_S,
    Rate,
    parse_duration,
    parse_number,
    parse_retry_after,
)  # fmt: skip

NAMED = {"x-ratelimit-remaining-requests": "1000"}  # a server that names its limits: throughput is not looked at


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def rate_of(most=1000, backoff_s=1.0):
    clock = Clock()
    return Rate(most, backoff_s, clock, random.Random(0)), clock


def start_all(rate):
    """Start as many requests as may start now and return their times."""
    started = []
    while rate.can_start():
        rate.record_start()
        started.append(rate.clock())
    return started


def rounds(rate, clock, n, headers=NAMED):
    """Return the requests in flight in each of n rounds. All requests of a round are answered after a second."""
    found = []
    for _ in range(n):
        started = start_all(rate)
        found.append(len(started))
        clock.now += 1
        for at in started:
            rate.record_answer(at, 100, headers)
    return found


def fail_all(rate, clock, started, **how):
    clock.now += 1
    for at in started:
        rate.record_failure(at, **how)


# ---- growing and shrinking -------------------------------------------------------------------------------------------


def test_the_limit_doubles_at_first_and_stops_at_most():
    assert rounds(*rate_of(100), 7) == [4, 8, 16, 32, 64, 100, 100]
    assert rounds(*rate_of(3), 2) == [3, 3] and rounds(*rate_of(1), 2) == [1, 1]


def test_after_a_cut_one_more_a_round():
    rate, clock = rate_of()
    rounds(rate, clock, 4)
    fail_all(rate, clock, start_all(rate), overloaded=True, limited=True)
    assert rate.limit == 32 and not rate.slow_start
    found = rounds(rate, clock, 6)
    assert found[0] == 32 and all(after - before in (0, 1) for before, after in itertools.pairwise(found))
    assert found[-1] in (36, 37)


def test_one_halving_for_all_that_was_in_flight():
    rate, clock = rate_of()
    rounds(rate, clock, 3)
    first = start_all(rate)
    clock.now += 1
    for at in first[:20]:
        rate.record_failure(at, overloaded=True, limited=True)
    assert rate.limit == 16
    clock.now += 1  # the others were in flight when the limit was cut
    for at in first[20:]:
        rate.record_failure(at, overloaded=True, limited=True)
    assert rate.limit == 16 and rate.in_flight == 0
    fail_all(rate, clock, start_all(rate), overloaded=True, limited=True)
    assert rate.limit == 8


def test_what_started_one_by_one_before_a_cut_cuts_no_more():
    rate, clock = rate_of()
    rounds(rate, clock, 3)
    started = []
    for _ in range(20):  # later ones than the first that fails, and earlier than its failure
        rate.record_start()
        started.append(clock.now)
        clock.now += 0.1
    for at in started:
        rate.record_failure(at, overloaded=True, limited=True)
        clock.now += 0.1
    assert rate.limit == 16
    rate.record_start()
    rate.record_failure(clock.now, overloaded=True, limited=True)
    assert rate.limit == 8


def test_the_limit_never_falls_below_one():
    rate, clock = rate_of()
    for _ in range(8):
        started = start_all(rate)
        assert started
        fail_all(rate, clock, started, overloaded=True, limited=True)
        clock.now += rate.wait_s()
    assert rate.limit == 1 and rate.is_below_limit()


def test_429s_that_name_no_time_are_asked_ever_less_often():
    rate, clock = rate_of()
    asked = 0
    while clock.now < 1000 + 900:
        fail_all(rate, clock, start_all(rate), overloaded=True, limited=True)
        asked += 1
        clock.now += 0.05 + rate.wait_s()
    assert asked < 60, "it was hammered"
    rate.record_start()
    rate.record_answer(clock.now, 100, {})
    assert rate.n_rate_limited == 0 and rate.wait_s() == 0


def test_an_error_that_is_not_overload_leaves_the_limit():
    rate, clock = rate_of()
    fail_all(rate, clock, start_all(rate))
    assert rate.limit == 4


def test_what_says_nothing_of_the_server_changes_nothing():
    rate, _ = rate_of()
    rate.failures = 3
    for _ in start_all(rate):
        rate.release()
    assert (rate.in_flight, rate.limit, rate.failures, rate.answers, rate.wait_s()) == (0, 4, 3, 0, 0)


EVENTS = st.sampled_from(("start", "answer", "fail", "overload", "limited", "retry", "left", "tick", "long tick"))


@given(st.integers(1, 40), st.lists(st.tuples(EVENTS, st.integers(0, 10**6)), max_size=300))
@settings(max_examples=150, deadline=None)
def test_whatever_comes_the_books_are_right(most, events):
    rate, clock = rate_of(most)
    flying, answers, failures = [], 0, 0
    for event, n in events:
        if event == "start":
            if rate.can_start():
                assert len(flying) < most and (failures < BREAKER_FAILURES or not flying)
                rate.record_start()
                flying.append(clock.now)
        elif "tick" in event:
            clock.now += 100 if event == "long tick" else 0.3
        elif flying:
            at = flying.pop(n % len(flying))
            if event == "answer":
                rate.record_answer(at, n, NAMED if n % 2 else {})
                answers, failures = answers + 1, 0
            elif event == "left":
                rate.release()
            elif event == "retry":
                rate.record_failure(at, True, True, n % 50)
                assert rate.wait_s() >= n % 50
            else:
                rate.record_failure(at, overloaded=event != "fail", limited=event == "limited")
                failures += event != "limited"
        assert 1 <= rate.limit <= most and rate.in_flight == len(flying)
        assert (rate.answers, rate.failures, rate.is_open()) == (answers, failures, failures >= BREAKER_FAILURES)
        assert rate.can_start() == (rate.is_below_limit() and rate.wait_s() == 0)
    clock.now += 1000
    while flying:
        rate.release()
        flying.pop()
    assert rate.can_start()


def test_how_long_nothing_was_answered():
    rate, clock = rate_of()
    clock.now += 7
    assert rate.silence_s() == 7
    fail_all(rate, clock, start_all(rate))
    assert rate.silence_s() == 8
    rounds(rate, clock, 1)
    assert rate.silence_s() == 0


# ---- pauses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overloaded", [False, True])
@pytest.mark.parametrize("limited", [False, True])
def test_nothing_starts_in_a_pause_that_the_server_named(overloaded, limited):
    """Whatever the failure: a 429, a 503, or an error that tells of no load."""
    rate, clock = rate_of()
    started, how = start_all(rate), {"overloaded": overloaded, "limited": limited}
    rate.record_failure(started[0], **how, retry_after=20.0)
    assert rate.wait_s() == 20 and not rate.can_start()
    rate.record_failure(started[1], **how, retry_after=3.0)
    assert rate.wait_s() == 20, "a shorter pause does not end a longer one"
    clock.now += 19.5
    assert rate.wait_s() == 0.5 and not rate.can_start()
    for at in started[2:]:
        rate.record_answer(at, 1, NAMED)
    clock.now += 0.5
    assert rate.wait_s() == 0 and rate.can_start()


NOW = 1_800_000_000


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "7"}, 7), ({"retry-after": " 0.25 "}, 0.25), ({"retry-after": "0"}, 0),
        ({"retry-after": "-5"}, 0), ({"retry-after-ms": "250"}, 0.25), ({"retry-after-ms": "-1"}, 0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5), ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after": email.utils.formatdate(NOW + 30, usegmt=True)}, 30),
        ({"retry-after": email.utils.formatdate(NOW - 30, usegmt=True)}, 0),
        ({"retry-after": "Fri, 15 Jan 2027 09:01:00 +0100"}, 60),
        ({"retry-after": "1e9"}, 1e9), ({"retry-after": "9" * 400}, None), ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None), ({"retry-after": "soon"}, None), ({"retry-after": ""}, None), ({}, None),
        ({"retry-after": "Fri, 31 Dec 99999999 23:59:59 GMT"}, None), ({"retry-after": "Mon, 01 Foo 2020"}, None),
        ({"retry-after-ms": "nan"}, None), ({"retry-after": "1 Jan 2020 00:00:00 +99999999999999"}, 0),
    ],
)  # fmt: skip
def test_seconds_that_a_response_asks_for(headers, seconds):
    assert parse_retry_after(headers, NOW) == seconds


@given(st.text(max_size=40) | st.text("0123456789 ,:+-MonTueJan GMT", max_size=40))
def test_no_header_is_an_error(text):
    for seconds in (
        parse_retry_after({"retry-after": text}),
        parse_retry_after({"retry-after-ms": text}),
        parse_duration(text),
    ):
        assert seconds is None or seconds >= 0
    rate, _ = rate_of()
    rate.record_start()
    rate.record_answer(0, 1, {f"x-ratelimit-{kind}-{what}": text for kind in ("remaining", "limit", "reset") for what in
                         ("requests", "tokens")})  # fmt: skip
    assert rate.wait_s() >= 0


def test_the_date_is_of_this_clock(monkeypatch):
    monkeypatch.setattr("data_gen.api.rate.time.time", lambda: NOW)
    assert parse_retry_after({"retry-after": email.utils.formatdate(NOW + 5, usegmt=True)}) == 5


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("6m0s", 360), ("120ms", 0.12), ("1s", 1), ("1h2m3.5s", 3723.5), ("6", 6), ("0.5", 0.5), ("1m30", 90),
        (" 8.64s ", 8.64), (" 6 ", 6), ("2m59.56s", 179.56), ("", 0), (None, 0), ("soon", 0), ("5 parsecs", 0),
        ("-3s", 0), ("3x", 0), ("s", 0), ("1.2.3s", 0),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


def test_numbers():
    assert [parse_number(text) for text in ("5", " -1.5 ", "x", None, "nan", "-inf", "")] == [
        5,
        -1.5,
        None,
        None,
        None,
        None,
        None,
    ]


def limits(remaining=None, allowed=None, reset=None, what="requests"):
    found = {"remaining": remaining, "limit": allowed, "reset": reset}
    return {f"x-ratelimit-{name}-{what}": value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    "headers, pause",
    [
        (limits("0", "5000", "6m0s"), 360), (limits("0", None, "120ms"), 0.12), (limits("1", "5000", "6m0s"), 0),
        (limits("0", "150000", "12s", "tokens"), 12), (limits("0", None, "12s", "tokens"), 12),
        (limits("2999", "150000", "12s", "tokens"), 12), (limits("3000", "150000", "12s", "tokens"), 0),
        (limits("-3", "100", "9"), 9), (limits("0", "100"), 2.5), (limits("0", "100", "later"), 2.5),
        (limits("x", "100", "9s"), 0), (limits(None, "100", "9s"), 0),
        (limits("0", "9", "1s") | limits("0", "9", "4s", "tokens"), 4),
        (limits("7", "9", "1h") | limits("900", "1000", "1h", "tokens"), 0),
    ],
)  # fmt: skip
def test_where_nothing_remains_the_servers_window_is_waited_for(headers, pause):
    rate, clock = rate_of(backoff_s=2.5)
    rate.record_start()
    rate.record_answer(clock.now, 100, headers)
    assert rate.wait_s() == pytest.approx(pause) and rate.can_start() == (pause == 0)


# ---- trying again ----------------------------------------------------------------------------------------------------


def test_backoff_is_random_doubles_and_is_bounded():
    for scale in (1.0, 0.01):
        rate, _ = rate_of(backoff_s=scale)
        for tries in (1, 2, 3, 4, 5, 6, 7, 50, 10**6):
            waits = [rate.draw_backoff_s(tries) for _ in range(400)]
            top = min(LONGEST_BACKOFF_S, 2.0 ** min(tries, 100)) * scale
            assert 0 <= min(waits) < 0.05 * top and 0.95 * top < max(waits) <= top
            assert abs(sum(waits) / len(waits) - top / 2) < 0.1 * top and len(set(waits)) > 390


# ---- the breaker -----------------------------------------------------------------------------------------------------


def opened(backoff_s=1.0):
    rate, clock = rate_of(backoff_s=backoff_s)
    while not rate.is_open():
        fail_all(rate, clock, start_all(rate)[: BREAKER_FAILURES - rate.failures])
        rate.in_flight = 0
    return rate, clock


def test_failures_in_a_row_open_it_and_an_answer_between_does_not():
    rate, clock = rate_of()
    rounds(rate, clock, 2)
    started = start_all(rate)
    for at in started[: BREAKER_FAILURES - 1]:
        rate.record_failure(at)
    assert not rate.is_open() and rate.wait_s() == 0
    rate.record_answer(started[-1], 1, NAMED)
    for at in started[BREAKER_FAILURES - 1 : -1]:
        rate.record_failure(at)
    assert not rate.is_open() and rate.wait_s() == 0


def test_it_lets_one_ask_cools_down_twice_as_long_each_time_and_closes_on_an_answer():
    rate, clock = opened()
    waits = []
    for _ in range(7):
        waits.append(rate.wait_s())
        clock.now += waits[-1] - 0.01
        assert start_all(rate) == []
        clock.now += 0.02
        started = start_all(rate)
        assert len(started) == 1
        fail_all(rate, clock, started)
    assert waits == [min(LONGEST_COOL_DOWN_S, FIRST_COOL_DOWN_S * 2**n) for n in range(7)]
    clock.now += rate.wait_s()
    assert rounds(rate, clock, 4) == [1, 2, 4, 8] and not rate.is_open()
    assert rate.cool_downs == 0


def test_what_was_in_flight_when_it_opened_does_not_lengthen_the_cool_down():
    rate, clock = rate_of()
    rounds(rate, clock, 3)
    started = start_all(rate)
    fail_all(rate, clock, started)
    assert len(started) == 32 and rate.in_flight == 0 and rate.wait_s() == FIRST_COOL_DOWN_S


def test_what_started_one_by_one_before_it_opened_does_not_lengthen_the_cool_down():
    rate, clock = rate_of()
    started = [clock.now + n / 10 for n in range(BREAKER_FAILURES + 5)]
    clock.now += 10
    for at in started:
        rate.record_start()
        rate.record_failure(at)
    assert rate.wait_s() == FIRST_COOL_DOWN_S and rate.cool_downs == 1


def test_while_some_are_in_flight_nobody_else_asks():
    rate, clock = rate_of()
    rounds(rate, clock, 3)
    started = start_all(rate)
    for at in started[:-1]:
        rate.record_failure(at)
    clock.now += 100
    assert not rate.can_start() and not rate.is_below_limit()
    rate.release()
    assert rate.can_start()


def test_cool_downs_scale_with_backoff_s():
    assert opened(backoff_s=0.01)[0].wait_s() == pytest.approx(0.01 * FIRST_COOL_DOWN_S)


def test_the_429_of_a_server_that_is_up_does_not_open_it():
    rate, clock = rate_of()
    for _ in range(20):
        fail_all(rate, clock, start_all(rate), overloaded=True, limited=True)
        clock.now += rate.wait_s()
    assert not rate.is_open() and rate.failures == 0


def test_a_429_neither_closes_it_nor_lengthens_it():
    rate, clock = opened()
    clock.now += rate.wait_s()
    fail_all(rate, clock, start_all(rate), overloaded=True, limited=True, retry_after=2)
    assert rate.is_open() and rate.wait_s() == 2 and rate.cool_downs == 1


# ---- a server whose throughput ends ----------------------------------------------------------------------------------


def simulate(capacity, most=256, answers=6000, seconds=1.0, seed=0, headers=None, change=None):
    """The limit at each answer, and the answers a second of the last half: a server that works at so many at once and
    lets the others wait in line. change: {answer: new capacity}."""
    clock, rng = Clock(), random.Random(seed)
    rate = Rate(most, clock=clock, rng=rng)
    working, line, seen, times = [], [], [], []
    while len(seen) < answers:
        capacity = (change or {}).get(len(seen), capacity)
        line += [(at, 80 + rng.randrange(40)) for at in start_all(rate)]
        while line and len(working) < capacity:
            at, tokens = line.pop(0)
            heapq.heappush(working, (clock.now + seconds * tokens / 100 * (0.8 + 0.4 * rng.random()), at, tokens))
        clock.now, at, tokens = heapq.heappop(working)
        rate.record_answer(at, tokens, headers or {})
        seen.append(rate.limit)
        times.append(clock.now)
    half = answers // 2
    return seen, half / (times[-1] - times[half - 1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [1, 2, 16, 64])
def test_the_limit_settles_near_what_the_server_can_do(capacity, seed):
    seen, speed = simulate(capacity, seed=seed)
    late = seen[len(seen) // 2 :]
    assert max(late) <= max(3 * capacity, 24), "far more in flight are no use"
    assert min(late) >= capacity, "it does not collapse"
    assert speed > 0.97 * capacity, "the server is kept busy"


def test_a_server_without_an_end_is_used_up_to_most():
    seen, _ = simulate(10**6, most=64, answers=2000)
    assert seen[100] == seen[-1] == max(seen) == 64


def test_one_that_names_limits_is_not_judged_by_its_throughput():
    seen, _ = simulate(16, most=128, answers=2000, headers=NAMED)
    assert seen[-1] == 128


def test_a_server_that_grows_is_found_out():
    seen, _ = simulate(16, answers=15_000, change={3000: 64})
    assert 16 <= seen[2999] <= 48 and 64 < sum(seen[-3000:]) / 3000 <= 160


def test_a_server_that_shrinks_is_not_asked_for_more_and_more():
    seen, speed = simulate(64, answers=15_000, change={3000: 16})
    assert max(seen[-3000:]) <= 200 and speed > 15.5


@pytest.mark.parametrize(
    "more, gain, settled", [(2, 1.3, 32), (2, 1.2, 16), (1.5, 1.14, 24), (1.5, 1.11, 16), (1.4, 1, 22.4)]
)
def test_what_is_a_gain(more, gain, settled):
    """Twice as many requests in flight need a quarter more tokens per second, 1.5 times as many an eighth."""
    rate, clock = rate_of(64)
    for limit, speed in ((16, 100), (16 * more, 100 * gain)):
        rate.limit, rate.window.since = limit, None
        for _ in range(math.ceil(limit)):
            started, clock.now = clock.now, clock.now + 10 / limit
            found, doubles = rate.window.add_answer(rate, started, speed * 10 / limit)
    assert found == pytest.approx(settled) and doubles == (settled != 16)
    assert rate.window.best == pytest.approx(100 * gain if settled in (24, 32) else 100)


def test_answers_without_a_token_do_no_harm():
    rate, clock = rate_of(64)
    for _ in range(100):
        started = start_all(rate)
        assert started
        for at in started:
            rate.record_answer(at, 0, {})  # at the very moment, too
        clock.now += 1
    assert 1 <= rate.limit <= 64


def test_throughput_never_undoes_a_cut():
    rate, clock = rate_of(256)
    rounds(rate, clock, 5, {})  # each of these as fast as it is large
    for _ in range(3):
        fail_all(rate, clock, start_all(rate)[:3], overloaded=True, limited=True)
        rate.in_flight = 0
    before = rate.limit
    for _ in range(60):
        started = start_all(rate)
        clock.now += 1
        for at in started:
            rate.record_answer(at, 1, {})
            assert rate.limit <= before + 1
            before = rate.limit


def test_a_window_that_began_before_a_cut_is_not_judged_with_what_came_after():
    for failures, limit in ((1, 32), (BREAKER_FAILURES, 1)):
        rate, clock = rate_of(256)
        rounds(rate, clock, 4, {})
        started = start_all(rate)
        clock.now += 1
        for at in started[:failures]:
            rate.record_failure(at, overloaded=True)
        assert rate.limit == limit
        rate.record_answer(started[-1], 100, {})
        assert rate.window.limit <= limit + 1 and rate.window.tokens == 100


def test_a_plateau_that_is_found_after_a_cut_leaves_the_smaller_limit():
    rate, clock = rate_of(256)
    window = rate.window
    window.best, window.best_limit, window.answers = 100, 50.0, 1000
    window.since, window.tokens, window.limit = clock.now - 10, 0, 80.0
    rate.limit, rate.slow_start = 10.0, False
    assert window.add_answer(rate, clock.now, 10) == (10.0, False) and window.hold

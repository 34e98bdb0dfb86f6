"""Bills: the most that any field of a usage can mean, and never less than what a server of that kind bills."""

import asyncio
import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen.api import rate
from data_gen.api.answers import bill_outcome, judge_success
from data_gen.api.attempt import Limits, PreparedRequest
from data_gen.api.bill import MAX_TOKENS, Bill, read_bill
from data_gen.api.client import Reply
from data_gen.api.collector import Collector
from data_gen.api.dialect import Dialect
from data_gen.api.ledger import Ledger
from data_gen.api.prices import PICO, Budget, Price

BASE = {"prompt_tokens": 100, "completion_tokens": 50}
WHOLE = BASE | {"total_tokens": 150}
DETAILS = {"completion_tokens_details": {"reasoning_tokens": 40}}

TOLD = {  # a body's usage -> (input, output)
    "OpenAI, reasoning inside": (WHOLE | DETAILS, (100, 50)),
    "the total alone tells": (BASE | {"total_tokens": 2150}, (100, 2050)),
    "Grok, reasoning outside": (
        BASE | {"total_tokens": 2150, "completion_tokens_details": {"reasoning_tokens": 2000}}, (100, 2050),
    ),
    "reasoning outside, a total that leaves it out": (
        WHOLE | {"completion_tokens_details": {"reasoning_tokens": 2000}}, (100, 2050),
    ),
    "a field of its own": (WHOLE | {"reasoning_tokens": 2000}, (100, 2050)),
    "one part told twice": (
        WHOLE | {"reasoning_tokens": 2000, "completion_tokens_details": {"reasoning_tokens": 40}}, (100, 2050),
    ),
    "one part told twice, the larger last": (WHOLE | DETAILS | {"reasoning_tokens": 2000}, (100, 2050)),
    "no total: perhaps outside": (BASE | DETAILS, (100, 90)),
    "Gemini": (
        {"promptTokenCount": 100, "candidatesTokenCount": 50, "thoughtsTokenCount": 900, "totalTokenCount": 1050},
        (100, 950),
    ),
    "Gemini, thoughts without a total": (
        {"prompt_token_count": 100, "candidates_token_count": 50, "thoughts_token_count": 900}, (100, 950),
    ),
    "parts that can be seen": (
        WHOLE | {"completion_tokens_details": {"text_tokens": 50, "reasoning_tokens": 0}}, (100, 50),
    ),
    "a cache inside": (WHOLE | {"prompt_tokens_details": {"cached_tokens": 80}}, (100, 50)),
    "Anthropic, a cache outside": (
        {"input_tokens": 10, "cache_read_input_tokens": 5000, "output_tokens": 50}, (5010, 50),
    ),
    "a cache outside that a total holds": (
        {"input_tokens": 10, "cache_read_input_tokens": 5000, "output_tokens": 50, "total_tokens": 5060}, (5010, 50),
    ),
    "two names of one count": (WHOLE | {"input_tokens": 90, "output_tokens": 60}, (100, 60)),
    "the largest of two totals": (BASE | {"total_tokens": 150, "total_token_count": 175}, (100, 75)),
}  # fmt: skip


@pytest.mark.parametrize("usage, tokens", TOLD.values(), ids=TOLD)
def test_the_most_that_a_usage_can_mean(usage, tokens):
    bill = read_bill({"usage": usage})
    assert bill.tokens == tokens and bill.is_whole
    assert bill.compute_cost(Price(3, 7)) == 3 * tokens[0] + 7 * tokens[1]


def test_what_is_hidden_has_the_higher_price():
    bill = read_bill({"usage": BASE | {"total_tokens": 1150}})
    assert bill.hidden == 1000 and bill.compute_cost(Price(9, 2)) == 9 * 100 + 2 * 50 + 9 * 1000


@pytest.mark.parametrize("place", ["usage", "usageMetadata", "usage_metadata"])
def test_a_usage_under_another_name(place):
    assert read_bill({place: WHOLE}).tokens == (100, 50)
    assert read_bill({"x_groq": {"usage": WHOLE}}).tokens == (100, 50)


DOLLARS = {
    "OpenRouter": ({"cost": 0.02, "cost_details": {"upstream_inference_cost": None}}, 0.02),
    "OpenRouter, parts": (
        {"cost": 0.02, "cost_details": {
            "upstream_inference_cost": 0.019, "upstream_inference_prompt_cost": 0.009,
            "upstream_inference_completions_cost": 0.01,
        }}, 0.02,
    ),
    "OpenRouter, a key of one's own": (
        {"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, 0.021,
    ),
    "Perplexity": ({"cost": {"input_tokens_cost": 0.5, "output_tokens_cost": 1, "total_cost": 1.6}}, 1.6),
    "two parts": ({"prompt_cost": 0.5, "completion_cost": 1}, 1.5),
    "DeepInfra": ({"estimated_cost": 0.25}, 0.25),
    "Grok": ({"cost_in_usd_ticks": 5 * 10**9}, 0.5),
    "a text": ({"cost": "0.125"}, 0.125),
    "none": ({"cost": None}, 0), "no number": ({"cost": "free"}, 0), "negative": ({"cost": -5}, 0),
    "not finite": ({"cost": float("inf")}, 0), "NaN": ({"cost": float("nan")}, 0), "true": ({"cost": True}, 0),
    "no fortune": ({"cost": 1e30}, 0), "tiny": ({"cost": "1e-99999999"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("usage, usd", DOLLARS.values(), ids=DOLLARS)
def test_dollars_that_the_server_names_count_where_they_are_more(usage, usd):
    bill = read_bill({"usage": WHOLE | usage})
    assert bill.dollars == pytest.approx(usd * PICO)
    assert bill.tokens == (100, 50) and bill.compute_cost(Price(1, 1)) == max(150, bill.dollars)


@pytest.mark.parametrize("name", ["cost", "total_cost"])
def test_dollars_beside_the_usage_count_too(name):
    assert read_bill({"usage": WHOLE | {"cost": 0.125}, name: 0.25}).dollars == PICO // 4
    assert read_bill({"usage": WHOLE | {"cost": 0.5}, name: 0.25}).dollars == PICO // 2


def test_of_several_usages_the_most_tokens_and_the_most_dollars_count():
    body = {"usage": WHOLE, "usage_metadata": {"prompt_tokens": 9, "cost": 0.5}, "x_groq": {"usage": {"cost": 0.25}}}
    bill = read_bill(body)
    assert bill.tokens == (100, 50) and bill.dollars == PICO // 2


@pytest.mark.parametrize("usage", [
    None, [], "150", 5, {}, {"prompt_tokens": 5}, {"prompt_tokens": 5, "completion_tokens": None},
    {"prompt_tokens": True, "completion_tokens": 7}, {"prompt_tokens": -1, "completion_tokens": 7},
    {"prompt_tokens": "5", "completion_tokens": "7"}, {"prompt_tokens": 5.0, "completion_tokens": 7},
    {"prompt_tokens": 5, "completion_tokens": MAX_TOKENS + 1}, {"total_tokens": 9},
])  # fmt: skip
def test_a_bill_without_both_counts_costs_the_most_that_an_answer_can(usage):
    bill = read_bill({"usage": usage})
    assert bill.tokens == (None, None) and bill.compute_cost(Price(1, 1), 4000) == 4000


def test_a_bill_without_both_counts_costs_more_than_that_where_it_tells_more():
    assert read_bill({"usage": {"total_tokens": 9000}}).compute_cost(Price(1, 2), 4000) == 18000
    assert read_bill({"usage": {"cost": 1}}).compute_cost(Price(1, 2), 4000) == PICO


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens", "cost", "is_byok", "usage",
                 "cost_details", "x_groq", "completion_tokens_details", "upstream_inference_cost", "usageMetadata"]
            ),
            inner, max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(JUNK)
def test_junk_is_a_bill_too(value):
    for body in ({"usage": value}, {"x_groq": value}, value if isinstance(value, dict) else {}):
        bill = read_bill(body)
        assert bill.input >= 0 and bill.output >= bill.hidden >= 0 and bill.dollars >= 0
        assert bill.compute_cost(Price(3, 2), 5) >= (0 if bill.is_whole else 5)


# ---- what a server bills ---------------------------------------------------------------------------------------------


def bill_at_random(rng, price):
    """Return a usage in one of the ways of real servers, and the picodollars that the server bills for it."""
    prompt, visible = rng.randint(0, 900), rng.randint(0, 300)
    hidden = rng.choice((0, rng.randint(1, 4000)))
    usage = {"prompt_tokens": prompt, "completion_tokens": visible}
    billed = price.compute_cost(prompt, visible + hidden)
    way = rng.randrange(7)
    if way == 0:
        usage |= {"completion_tokens": visible + hidden, "total_tokens": prompt + visible + hidden}
        usage["completion_tokens_details"] = {"reasoning_tokens": hidden}
    elif way == 1:
        usage["total_tokens"] = prompt + visible + hidden
    elif way == 2:
        usage |= {"total_tokens": prompt + visible + hidden, "completion_tokens_details": {"reasoning_tokens": hidden}}
    elif way == 3:
        usage["completion_tokens_details"] = {"reasoning_tokens": hidden, "audio_tokens": 0}
    elif way == 4:
        usage = {"promptTokenCount": prompt, "candidatesTokenCount": visible, "thoughtsTokenCount": hidden}
    elif way == 5:
        usage |= {"total_tokens": prompt + visible, "cost": billed / PICO}
    else:
        usage["thinking_tokens"] = hidden
    return usage, billed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), price_in=st.integers(0, 10**7), price_out=st.integers(0, 10**8))
def test_the_bill_told_is_never_under_what_the_server_billed(tmp_path_factory, seed, price_in, price_out):
    """Random usages, hidden fields and errors in 200s, with 64 requests in flight."""
    rng, price, billed = random.Random(seed), Price(price_in, price_out), []

    class Server:
        dialect, in_flight, most = Dialect(), 0, 0

        async def send(self, body):
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            for _ in range(rng.randrange(8)):
                await asyncio.sleep(0)
            self.in_flight -= 1
            usage, cost = bill_at_random(rng, price)
            luck, found = rng.random(), {"choices": [{"message": {"content": "{}"}, "finish_reason": "stop"}]}
            if luck < 0.1:  # an error that costs nothing
                found = {"error": {"message": "Provider returned error", "code": rng.choice((429, 502, None))}}
            elif luck < 0.2:  # one that came on the way, and is billed
                found = {"error": {"message": "broke off", "code": 500}, "choices": None, "usage": usage}
            elif luck < 0.25:
                found = {"choices": [{"message": {"content": "{"}, "finish_reason": "error"}], "usage": usage}
            elif luck < 0.3:
                found = {"choices": [], "usage": usage}
            else:
                found["usage"] = usage
            billed.append(cost if "usage" in found else 0)
            text = json.dumps(found)
            return Reply(*judge_success(text), text)

    class Rows:
        wanted = 150

        def __init__(self):
            self.rows = self.kept_by_request = []

        @property
        def is_full(self):
            return len(self.rows) >= self.wanted

        def add_outcome(self, entry):
            self.rows.append(1)

    quiet = SimpleNamespace(
        print_line=lambda text: None, show_state=lambda run: None, show_reading=lambda entries, *_: entries
    )
    prompter = SimpleNamespace(n_tasks=1, n_requests=None)
    builder = SimpleNamespace(
        prompter=prompter, price=price, sampling=SimpleNamespace(max_output_tokens=300),
        prepare=lambda number, dialect: PreparedRequest({"model": "m"}, "-", price.compute_cost(900, 300)),
    )  # fmt: skip
    ledger, clock = Ledger(tmp_path_factory.mktemp("ledger")), rate.Rate(64, 1e-6)
    ledger.db.execute("PRAGMA synchronous=OFF")
    clock.limit = 64.0
    collector = Collector(ledger, Rows(), Server(), clock, Budget(None), builder, Limits(max_attempts=50), quiet)
    try:
        asyncio.run(collector.run())
        totals = ledger.compute_totals()
        assert totals.spent + totals.uncertain >= sum(billed), "less was told than was billed"
        assert totals.spent == collector.budget.spent and totals.uncertain == collector.budget.uncertain
        assert collector.client.most > 20
    finally:
        ledger.close()


@pytest.mark.parametrize("kind", ["failed", "unsupported", "fatal", "refused", "odd"])
def test_an_error_costs_what_it_tells(kind):
    for usage, cost in ((None, 0), (WHOLE, 150), ({"cost": 0.5}, PICO // 2)):
        body = json.dumps({"error": "no", "usage": usage})
        assert bill_outcome(kind, body, Price(1, 1), 4000)[2] == cost
        assert bill_outcome(kind, body, Price(1, 1), 4000, is_last=True)[2] == cost


def test_what_was_lost_is_in_doubt_unless_it_tells_its_bill():
    assert bill_outcome("lost", "", Price(1, 1), 4000) == ("lost", (None, None), 0)
    assert bill_outcome("lost", "", Price(1, 1), 4000, is_last=True) == ("refused", (None, None), 4000)
    body = json.dumps({"choices": [], "usage": WHOLE})
    assert bill_outcome("lost", body, Price(1, 1), 4000) == ("failed", (100, 50), 150)
    assert bill_outcome("lost", body, Price(1, 1), 4000, is_last=True) == ("refused", (100, 50), 150)


def test_a_bill_of_nothing():
    assert Bill().tokens == (None, None) and Bill().compute_cost(Price(1, 1)) == 0

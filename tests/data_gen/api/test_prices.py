"""Money: exact in whole picodollars, rounded up, never past a cap; the table of prices, whole and broken."""

import datetime
import json
import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from data_gen.api.prices import (
    MAX_DECIMALS,
    MAX_USD,
    PICO,
    PRICE_TABLE,
    Budget,
    Model,
    Price,
    PriceTable,
    describe_end,
    find_price,
    format_usd,
    parse_amount,
    parse_host,
    read_price_table,
)
from data_gen.base.cli import DataError, UsageError

OPENAI = "https://api.openai.com/v1"
LOCAL = "http://localhost:8000/v1"
AMOUNTS = st.decimals(0, MAX_USD, allow_nan=False, allow_infinity=False)


def table(**models):
    found = {name: Model(tuple(map(Decimal, pair))) for name, pair in models.items()}
    return PriceTable("2026-01", Decimal("0.5"), found)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@given(AMOUNTS, AMOUNTS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_price_is_exact_and_at_most_a_picodollar_a_token_too_high(usd_in, usd_out, n_in, n_out):
    price = find_price("m", LOCAL, table(), usd_in, usd_out)
    for given_usd, found in ((usd_in, price.input), (usd_out, price.output)):
        exact = Fraction(given_usd) * PICO / 10**6
        assert isinstance(found, int) and exact <= found < exact + 1
    assert price.compute_cost(n_in, n_out) == n_in * price.input + n_out * price.output


def test_digits_beyond_those_of_a_decimal_context_are_rounded_up_too():
    assert find_price("m", LOCAL, table(), Decimal("1." + "0" * 40 + "1"), 0) == Price(10**6 + 1, 0)


@given(st.integers(0, 10**15), st.integers(0, 10**15), st.decimals(0, 1, allow_nan=False))
def test_a_share_of_a_price_is_rounded_up(price_in, price_out, share):
    found = Price(price_in, price_out).scale(share)
    for whole, part in ((price_in, found.input), (price_out, found.output)):
        assert Fraction(share) * whole <= part < Fraction(share) * whole + 1


def test_a_million_tokens_cost_what_the_table_says():
    price = find_price("gpt-5.4", OPENAI, read_price_table())
    assert (
        price == Price(2_500_000, 15_000_000)
        and price.compute_cost(10**6, 0) == 25 * PICO // 10
        and price.compute_cost(0, 10**6) == 15 * PICO
    )
    assert price.scale(Decimal("0.5")) == Price(1_250_000, 7_500_000) and Price(3, 5).scale(Decimal("0.5")) == Price(
        2, 3
    )


@given(st.integers(0, 10**19), st.integers(1, 8))
def test_what_is_told_is_never_less_than_what_was_spent(picodollars, digits):
    told = format_usd(picodollars, digits)
    amount = Fraction(Decimal(told.removeprefix("$").replace(",", "")))
    assert Fraction(picodollars, PICO) <= amount < Fraction(picodollars, PICO) + Fraction(1, 10**digits)
    assert told == "$0" or len(told.partition(".")[2]) == digits


def test_dollars_as_they_are_told():
    told = [
        format_usd(0),
        format_usd(1),
        format_usd(1, 6),
        format_usd(PICO),
        format_usd(123_456_700_000),
        format_usd(1_234_567 * PICO, 2),
        format_usd(100 * PICO + 1),
    ]
    assert told == ["$0", "$0.0001", "$0.000001", "$1.0000", "$0.1235", "$1,234,567.00", "$100.0001"]


@pytest.mark.parametrize("text", ["nan", "NaN", "sNaN", "inf", "-1", "-0.01", "x", "", "1,5", "1000000.01", "1e999999"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError):
        parse_amount(text)


def test_amounts_are_decimals_up_to_a_million():
    assert (
        parse_amount("0.1") == Decimal("0.1")
        and parse_amount(0) == 0
        and parse_amount("1e6") == 10**6
        and parse_amount(0.1) == Decimal("0.1")
    )


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_that_comes_along_is_whole():
    found = read_price_table()
    assert 0 < found.batch <= 1 and found.as_of[:2] == "20" and found.models
    priced = [model for model in found.models.values() if model.usd]
    assert all(isinstance(usd, Decimal) and 0 < usd < 1000 for model in priced for usd in model.usd)
    assert all(model.usd[0] < model.usd[1] and model.as_of for model in priced)
    assert all(model.ends for model in found.models.values() if not model.usd)
    sources = json.loads(PRICE_TABLE.read_text())["sources"]
    assert {model.as_of for model in priced} <= set(sources), "a price without a source"


def list_names(text):
    """Return the models that commands in a text name."""
    return set(re.findall(r"--(?:model|judge) (gpt-[\w.-]+|o\d[\w-]*)", text))


def test_examples_name_models_that_have_a_price_and_no_announced_end():
    root, table = PRICE_TABLE.parents[1], read_price_table()
    pages = [root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("data_gen/*.py"))]
    named = [(page.name, name) for page in pages for name in list_names(page.read_text())]
    assert {"README.md", "data.md", "judging.md", "generate.py"} <= {page for page, _ in named}
    lasting = {name for name, model in table.models.items() if model.usd and model.ends is None}
    assert not [(page, name) for page, name in named if name not in lasting]


TODAY = datetime.date(2026, 11, 30)


@pytest.mark.parametrize("ends, said", [
    ("2026-12-11", "in 11 days"), ("2026-12-01", "tomorrow"), ("2026-11-30", "today"), ("2026-11-28", "2 days ago"),
    ("2027-02-28", "in 90 days"), ("2027-03-01", ""), (None, ""),
])  # fmt: skip
def test_an_end_is_told_when_it_is_near(ends, said):
    last = None if ends is None else datetime.date.fromisoformat(ends)
    known = PriceTable("", Decimal(1), {"m": Model((1, 2), "", last), "n": Model((1, 2)), "o": Model(None, "", TODAY)})
    for name in ("m", "m-2025-01-02"):
        found = describe_end(name, LOCAL, known, TODAY)
        assert (f"{name} was announced to end on {ends}, {said}" in found and "of n" in found) if said else not found
    assert describe_end("unknown", LOCAL, known, TODAY) == ""
    assert describe_end("m", LOCAL, PriceTable("", Decimal(1), known.models, "api.openai.com"), TODAY) == ""


def test_a_model_that_has_ended_is_refused_by_name_unless_prices_are_given():
    with pytest.raises(
        UsageError, match=r"gpt-4\.1-nano was announced to end on 2026-10-23 .*no end is announced of .*5\.4"
    ):
        find_price("gpt-4.1-nano", OPENAI, read_price_table())
    assert find_price("gpt-4.1-nano", OPENAI, read_price_table(), Decimal(1), Decimal(2)) == Price(10**6, 2 * 10**6)


def test_an_amount_of_many_decimals_is_refused_at_once():
    for text in ("1e-99999999", "0e-99999999", "0." + "0" * MAX_DECIMALS + "1"):
        with pytest.raises(ValueError, match="decimals"):
            parse_amount(text)
    assert find_price("m", LOCAL, table(), parse_amount(f"1e-{MAX_DECIMALS}"), Decimal(0)) == Price(1, 0)


def test_a_dated_name_has_the_price_of_the_model():
    known = PriceTable("", Decimal(1), {"m": Model((1, 2)), "m-2025-01-02": Model((3, 4))})
    assert find_price("m-2024-11-20", OPENAI, known) == find_price("m", OPENAI, known) == Price(10**6, 2 * 10**6)
    assert find_price("m-2025-01-02", OPENAI, known) == Price(3 * 10**6, 4 * 10**6)
    for other in ("m-2024-11", "m-20241120", "ft:m:mine", "m-2024-11-20-x", "2024-11-20"):
        with pytest.raises(UsageError, match="no known price"):
            find_price(other, OPENAI, known)


def test_an_unknown_model_is_told_the_nearest_and_the_flags():
    with pytest.raises(UsageError, match=r"gpt-5\.4-mni has no known price.*did you mean gpt-5\.4-mini\?.*--price-in"):
        find_price("gpt-5.4-mni", OPENAI, read_price_table())


@pytest.mark.parametrize("url", [LOCAL, "https://openrouter.ai/api/v1", "https://api.openai.com.example.org/v1"])
def test_another_host_wants_prices_for_the_same_name(url):
    with pytest.raises(UsageError, match="--price-in and --price-out"):
        find_price("gpt-5.4", url, read_price_table())
    assert find_price("gpt-5.4", url, read_price_table(), Decimal(0), Decimal(0)) == Price(0, 0)
    with pytest.raises(UsageError) as error:  # a name that would be refused there as well is no help
        find_price("gpt-5.4-mni", url, read_price_table())
    assert "did you mean" not in str(error.value)


def test_prices_that_are_given_win_and_go_together():
    assert find_price("gpt-5.4", OPENAI, read_price_table(), Decimal("0.07"), Decimal(1)) == Price(70_000, 10**6)
    for one in ({"given_in": Decimal(1)}, {"given_out": Decimal(0)}):
        with pytest.raises(UsageError, match="go together"):
            find_price("gpt-5.4", OPENAI, read_price_table(), **one)


def test_the_host_of_an_address_is_found():
    assert parse_host("HTTPS://API.OpenAI.com:443/v1") == "api.openai.com" and parse_host("http://[::1]:80/v1") == "::1"


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "api.openai.com/v1", "http://", "http://[::1", "ftp://x/v1", "http://x:99999/v1", "http://x:y"]
)  # fmt: skip
def test_an_address_that_is_none_is_an_error_of_usage(url):
    with pytest.raises(UsageError, match="no address of a server"):
        parse_host(url)
    with pytest.raises(UsageError):
        find_price("gpt-5.4", url, read_price_table())


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    ended = {"input": 1, "output": 2, "as_of": "2031-01", "ends": "2031-12-31"}
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps({"as_of": "2031-02", "models": {"m": [0.1, "0.3"], "n": [0, 5], "o": ended}}).encode()
    )
    found = read_price_table(path)
    models = {"m": Model((Decimal("0.1"), Decimal("0.3"))), "n": Model((0, 5))}
    models["o"] = Model((1, 2), "2031-01", datetime.date(2031, 12, 31))
    assert found == PriceTable("2031-02", Decimal(1), models)
    assert find_price("m", OPENAI, found) == Price(100_000, 300_000)
    assert find_price("m", "http://gpu-7:8000/v1", found) == Price(100_000, 300_000), (
        "a table without a host is for any"
    )
    with pytest.raises(UsageError):
        find_price("gpt-5.4", OPENAI, found)


BROKEN = {
    "empty": "",
    "no JSON": "{",
    "list": "[]",
    "number": "1",
    "null": "null",
    "no models": '{"as_of": "x"}',
    "no date": '{"models": {}}',
    "models in a list": '{"as_of": "x", "models": [["m", 1, 2]]}',
    "one price": '{"as_of": "x", "models": {"m": [1]}}',
    "three prices": '{"as_of": "x", "models": {"m": [1, 2, 3]}}',
    "a number for two": '{"as_of": "x", "models": {"m": 1}}',
    "a text for two": '{"as_of": "x", "models": {"m": "12"}}',
    "an object for two": '{"as_of": "x", "models": {"m": {"1": 0, "2": 0}}}',
    "negative": '{"as_of": "x", "models": {"m": [1, -0.1]}}',
    "NaN": '{"as_of": "x", "models": {"m": [NaN, 1]}}',
    "infinite": '{"as_of": "x", "models": {"m": [1, Infinity]}}',
    "a text that says NaN": '{"as_of": "x", "models": {"m": ["nan", 1]}}',
    "true": '{"as_of": "x", "models": {"m": [true, 1]}}',
    "null price": '{"as_of": "x", "models": {"m": [null, 1]}}',
    "huge": '{"as_of": "x", "models": {"m": [1e999999999, 1]}}',
    "odd batch": '{"as_of": "x", "batch": "half", "models": {}}',
    "deep": "[" * 100_000,
    "an end that is no day": '{"as_of": "x", "models": {"m": {"input": 1, "output": 2, "ends": "soon"}}}',
    "an end that is a number": '{"as_of": "x", "models": {"m": {"input": 1, "output": 2, "ends": 5}}}',
    "one price and an end": '{"as_of": "x", "models": {"m": {"input": 1, "ends": "2031-01-01"}}}',
    "a price of endless decimals": '{"as_of": "x", "models": {"m": [1e-99999999, 1]}}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_named(tmp_path, text):
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"prices\.json.*wanted"):
        read_price_table(path)


def test_what_is_wrong_in_a_table_is_said(tmp_path):
    path = tmp_path / "prices.json"
    for text, said in ((BROKEN["three prices"], "m has not two"), (BROKEN["no models"], "no 'models'")):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            read_price_table(path)


def test_a_table_that_is_not_there_or_not_text(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "bytes"):
        with pytest.raises(DataError):
            read_price_table(path)
    assert PRICE_TABLE.is_file()


# ---- the budget ------------------------------------------------------------------------------------------------------


class Spending(RuleBasedStateMachine):
    """Attempts reserve an amount and are then lost, or billed at most that amount, in any order."""

    @initialize(cap=st.none() | st.integers(0, 1000), data=st.data())
    def begin(self, cap, data):
        before = 1000 if cap is None else cap
        spent = data.draw(st.integers(0, before))
        uncertain = data.draw(st.integers(0, before - spent))
        self.budget, self.open, self.spent, self.uncertain = Budget(cap, spent, uncertain), [], spent, uncertain

    @rule(most=st.integers(0, 300))
    def reserve(self, most):
        room = self.budget.cap is None or self.spent + self.uncertain + sum(self.open) + most <= self.budget.cap
        assert self.budget.reserve(most) is room
        self.open += [most] * room

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle(self, data):
        most = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        cost = data.draw(st.integers(0, most))
        self.budget.settle(most, cost)
        self.spent += cost

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def lose(self, data):
        most = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.budget.count_lost(most)
        self.uncertain += most

    @invariant()
    def the_cap_holds(self):
        if hasattr(self, "budget"):
            b = self.budget
            assert (b.spent, b.uncertain, b.reserved) == (self.spent, self.uncertain, sum(self.open))
            assert b.committed == self.spent + self.uncertain + sum(self.open)
            assert b.cap is None or b.committed <= b.cap
            assert not b.overrun


Spending.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestSpending = Spending.TestCase


def test_a_bill_beyond_what_was_asked_is_seen_and_stays_seen():
    budget = Budget(100)
    assert budget.reserve(10) and budget.reserve(10) and budget.reserve(10)
    budget.settle(10, 10)
    assert not budget.overrun
    budget.settle(10, 11)
    budget.settle(10, 1)
    assert budget.overrun and budget.spent == budget.committed == 22


def test_what_fits_exactly_is_let_through_and_a_picodollar_more_is_not():
    budget = Budget(10, spent=3, uncertain=2)
    assert not budget.reserve(6) and budget.reserve(5) and not budget.reserve(1) and budget.reserve(0)

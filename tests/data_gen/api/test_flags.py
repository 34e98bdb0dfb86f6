"""Values of flags: what is taken at the very edge, and what is refused beyond it."""

import json
from argparse import ArgumentTypeError, Namespace
from decimal import Decimal

import pytest

from data_gen.api import flags
from data_gen.base.cli import UsageError


@pytest.mark.parametrize("name", ["model", "messages", "n", "stream", "max_tokens", "max_completion_tokens"])
def test_more_fields_of_a_request_set_nothing_that_decides_its_cost_or_its_answer(name):
    """Of n answers one would be read and all be paid, beyond the cap."""
    with pytest.raises(ArgumentTypeError, match=f"a JSON object without .*{name}"):
        flags.parse_fields(json.dumps({"top_p": 0.5, name: 2}))
    assert flags.parse_fields('{"top_p": 0.5, "temperature": 0}') == {"top_p": 0.5, "temperature": 0}


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (flags.parse_count, {"1": 1, "52000": 52000}, ("0", "-1", "1.5", "")),
        (flags.parse_limit, {"1": 1, "1000000": 10**6}, ("0", "1000001", "1e3")),
        (flags.parse_seconds, {"0.001": 0.001, "999999999": 999999999}, ("0", "-1", "1e9", "nan", "inf")),
        (flags.parse_temperature, {"0": 0, "2": 2}, ("-0.1", "2.1", "nan")),
        (flags.parse_dollars, {"0": 0, "0.1": Decimal("0.1"), "1000000": 10**6}, ("-0.01", "1000000.01", "NaN", "5$")),
    ],
)  # fmt: skip
def test_a_limit_itself_is_taken_and_what_lies_beyond_is_not(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(ArgumentTypeError, match="wanted"):
            parse(text)


def test_patience_is_longer_than_one_answer_may_take():
    """Else a run would end while it waits for its first answer."""
    options = Namespace(base_url="http://localhost/v1", timeout=600.0, replay=False, extra={}, prices=None)
    for patience in (599.0, 600.0):
        with pytest.raises(UsageError, match="is not longer than --timeout 600"):
            flags.check_run_flags(Namespace(**vars(options), patience=patience))
    flags.check_run_flags(Namespace(**vars(options), patience=601.0))

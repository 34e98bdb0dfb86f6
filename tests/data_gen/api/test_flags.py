"""Flags that go together."""

import json
from argparse import ArgumentTypeError, Namespace

import pytest

from data_gen.api import flags
from data_gen.base.cli import UsageError


def test_patience_is_longer_than_one_answer_may_take():
    """Else a run would end while it waits for its first answer."""
    options = Namespace(base_url="http://localhost/v1", timeout=600.0, replay=False, extra={}, prices=None)
    for patience in (599.0, 600.0):
        with pytest.raises(UsageError, match="is not longer than --timeout 600"):
            flags.check_run_flags(Namespace(**vars(options), patience=patience))
    flags.check_run_flags(Namespace(**vars(options), patience=601.0))


@pytest.mark.parametrize("name", ["model", "messages", "n", "stream", "max_tokens", "max_completion_tokens"])
def test_what_we_count_on_is_not_set_by_extra(name):
    """The cap of a run holds for one answer of a request, of as many tokens as --max-output-tokens says."""
    assert flags.parse_fields('{"seed": 3}') == {"seed": 3}
    with pytest.raises(ArgumentTypeError, match="wanted a JSON object without model, messages, n, stream"):
        flags.parse_fields(json.dumps({"seed": 3, name: 1}))


VALUES = {
    flags.parse_count: (["1", "52000"], ["0", "-1", "1.5", "x", ""]),
    flags.parse_limit: (["1", "1000000"], ["0", "1000001", "x"]),
    flags.parse_seconds: (["0.001", "600", "1e8"], ["0", "-1", "1e9", "nan", "inf", "x"]),
    flags.parse_temperature: (["0", "2", "0.7"], ["-0.1", "2.01", "nan", "x"]),
}


@pytest.mark.parametrize("parse", VALUES)
def test_values_that_no_run_can_have_are_refused(parse):
    good, bad = VALUES[parse]
    assert [parse(text) for text in good] == [pytest.approx(float(text)) for text in good]
    for text in bad:
        with pytest.raises(ArgumentTypeError, match=f"^got {text!r}, wanted "):
            parse(text)

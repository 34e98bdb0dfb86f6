"""Attempts that are ready to send."""

import json

from data_gen.api.attempt import RequestBuilder
from data_gen.api.dialect import Dialect, Sampling, keeps_format
from data_gen.api.prices import Price
from data_gen.api.prompt import Prompter
from data_gen.judging.comparisons import Comparisons, Shown


def test_a_format_of_the_users_own_is_kept():
    prompter, plain = Prompter(({"instruction": "a", "input": "", "output": "b"},)), Dialect()
    of_ours = RequestBuilder(prompter, Sampling("m", 100, 1.0), Price(1, 1)).get_format(plain)
    assert of_ours == prompter.formats[plain.format] and of_ours
    own = {"type": "text"}
    sampling = Sampling("m", 100, 1.0, {"response_format": own})
    builder = RequestBuilder(prompter, sampling, Price(1, 1))
    assert builder.get_format(plain) == own == builder.prepare(0, plain).body["response_format"]


def test_a_judge_asks_for_verdicts_in_every_format():
    """The messages are its own, and so is what they are to be answered in."""
    comparisons = Comparisons((), (Shown("asked", "a", "b"),))
    for name, wanted in comparisons.formats.items():
        prepared = RequestBuilder(comparisons, Sampling("m", 100, 1.0), Price(1, 1)).prepare(0, Dialect(name))
        assert prepared.body.get("response_format") == wanted
    assert not keeps_format('{"reason": "", "winner": "3"}', comparisons.formats["json_schema"])
    assert keeps_format('{"reason": "", "winner": "2"}', comparisons.formats["json_schema"])


def test_the_most_that_a_request_can_cost_is_by_the_bytes_of_its_body():
    seeds = ({"instruction": "Écrivez « 雪 ».", "input": "", "output": "雪"},)
    prepared = RequestBuilder(Prompter(seeds), Sampling("m", 100, 1.0), Price(1, 10**6)).prepare(7, Dialect())
    assert "雪" in prepared.body["messages"][1]["content"]
    assert prepared.max_cost == len(json.dumps(prepared.body, ensure_ascii=False).encode()) + 100 * 10**6

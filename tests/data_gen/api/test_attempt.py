"""Attempts that are ready to send."""

import json

from data_gen.api.attempt import Asker
from data_gen.api.client import Dialect, Sampling
from data_gen.api.prices import Price
from data_gen.api.prompt import Prompter


def test_the_most_that_a_request_can_cost_is_by_the_bytes_of_its_body():
    seeds = ({"instruction": "Écrivez « 雪 ».", "input": "", "output": "雪"},)
    ask = Asker(Prompter(seeds), Sampling("m", 100, 1.0), Price(1, 10**6)).prepare(7, Dialect())
    assert "雪" in ask.body["messages"][1]["content"]
    assert ask.most == len(json.dumps(ask.body, ensure_ascii=False).encode()) + 100 * 10**6

"""What is told of a server by its answers, each once."""

import pytest

from data_gen.api.answers import Answer
from data_gen.api.bill import Bill
from data_gen.api.observations import THINKING_AT_START, THINKING_LATER, Observations

WANTED = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": ["a"]}}}
WHOLE = Bill(10, 5, is_whole=True)


def answer(text="", finish_reason="stop", refusal="", bill=WHOLE, thinks=False):
    return Answer(text, finish_reason, refusal, "", "", bill, thinks)


@pytest.mark.parametrize(
    "one, format, is_told",
    [
        (answer('{"a": 1}'), WANTED, False), (answer('<think>x</think>{"a": 1}'), WANTED, False),
        (answer('{"b": 1}'), WANTED, True), (answer("Sure!"), WANTED, True), (answer("Sure!"), None, False),
        (answer("Sure!", refusal="no"), WANTED, False), (answer("Sure!", "length"), WANTED, False),
        (answer("Sure!", "content_filter"), WANTED, False), (answer(" \n"), WANTED, False),
    ],
)  # fmt: skip
def test_a_format_that_is_not_kept_is_told_once(one, format, is_told):
    said = []
    observations = Observations(said.append)
    for _ in range(2):
        observations.look_at_format(one, format)
    line = "the server takes json_schema and does not keep to it; tasks are read from whatever text it writes"
    assert said == ([line] if is_told else [])


@pytest.mark.parametrize(
    "bill, cost, token_cost, told",
    [
        (WHOLE, 5, 5, []), (WHOLE, 4, 5, []), (WHOLE, 6, 5, ["names"]), (Bill(), 6, 5, ["tells no usage"]),
        (Bill(10, 5, hidden=7, is_whole=True), 5, 5, ["7 tokens more than completion_tokens"]),
        (Bill(10, 5, hidden=7, is_whole=True), 6, 5, ["7 tokens more than completion_tokens", "names"]),
    ],
)  # fmt: skip
def test_what_is_odd_about_a_bill_is_told_once(bill, cost, token_cost, told):
    said = []
    observations = Observations(said.append)
    for _ in range(2):
        observations.look_at_bill(answer(bill=bill), cost, token_cost)
    assert len(said) == len(told) and all(words in line for words, line in zip(told, said, strict=True))


@pytest.mark.parametrize("first, most", [((), THINKING_AT_START), (("text",), THINKING_LATER)])
def test_reasoning_alone_ends_a_run(first, most):
    observations = Observations(print)
    for text in first:
        assert observations.count_thinking(answer(text), 9) == ""
    for _ in range(most - 1):
        assert observations.count_thinking(answer(thinks=True), 9) == ""
    told = observations.count_thinking(answer(thinks=True), 9)
    assert told.startswith(f"the last {most} answers are reasoning alone") and "--max-output-tokens 9 did not" in told
    assert observations.count_thinking(answer("text"), 9) == "" and observations.thinking == 0


def test_an_open_thought_is_no_text():
    """A model that has only ever thought is left after as few answers as one that says so in a field."""
    observations = Observations(print)
    told = [observations.count_thinking(answer("<think>still", "length"), 9) for _ in range(THINKING_AT_START)]
    assert told[:-1] == [""] * (THINKING_AT_START - 1) and told[-1] and not observations.has_text

"""What is asked in a comparison: the questions of files, requests and records, and what a model is given of them."""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from engine.base.errors import DataError
from engine.comparing import questions
from engine.comparing.endpoints import MOST_ROUNDS, Comparison
from engine.comparing.questions import (
    FileContestant,
    ModelContestant,
    Question,
    order_questions,
    parse_questions,
    read_question,
)
from engine.serving.openai_api import ApiError

CHAT = '{{"messages": [{{"role": "user", "content": "Say A."}}, {{"role": "assistant", "content": "{}"}}]}}'


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("LIST.CSV", "instruction,input\nSay A.,a\n", ("Say A.", "a")),
        ("List.Tsv", "instruction\tinput\nSay, A.\ta\n", ("Say, A.", "a")),
        ("list.txt", "Say A.\n", ("Say A.", "")),
        ("list.json", '[{"instruction": " ", "input": "a"}]', ("a", "")),
        ("list.json", '[{"instruction": "Say A.", "input": " ", "output": "x"}]', ("Say A.", " ")),
        ("list.jsonl", CHAT.format(""), ("Say A.", "")),
    ],
)
def test_a_list_of_questions_is_read_by_the_end_of_its_name_or_what_it_holds(name, text, found):
    assert parse_questions(name, text) == [Question(*found)]


def test_a_chat_that_has_an_answer_already_is_no_question():
    with pytest.raises(DataError, match=r"^list.jsonl:1: got a chat of 2 messages, wanted one instruction$"):
        parse_questions("list.jsonl", CHAT.format("A."))


def test_a_model_is_given_instruction_and_input_in_its_own_style(monkeypatch):
    def encode(messages, tokenizer, style, **more):
        assert (messages, tokenizer, style, more) == ([("user", "Sort.")], "tokens", "chatml", {"input": "b a"})
        return [5, 6]

    monkeypatch.setattr(questions, "encode_chat", encode)
    service = SimpleNamespace(tokenizer="tokens", style="chatml", answer=lambda wanted, prompt: (wanted, prompt))
    contestant = ModelContestant(service, "alpaca")
    assert contestant.name == "alpaca" and contestant.answer(Question("Sort.", "b a", 7), "wanted") == (
        "wanted",
        [5, 6],
    )

    def refuse(*_, **__):
        raise DataError("too many words")

    monkeypatch.setattr(questions, "encode_chat", refuse)
    with pytest.raises(ApiError) as error:
        contestant.answer(Question("Sort."), "wanted")
    told = error.value.body()["error"]
    assert (error.value.status, told["message"], told["param"]) == (400, "too many words", "instruction")


def test_a_record_is_given_by_its_number():
    assert FileContestant("a", ["x", "y", "z"]).answer(Question("q", number=1), None).text == "y"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"instruction": "A"}, Question("A")), ({"instruction": " A ", "input": "b"}, Question(" A ", "b")),
        ({"instruction": "A\ud800", "input": "\ud800"}, Question("A\ufffd", "\ufffd")), ({}, None),
        ({"input": "b"}, None), ({"instruction": " "}, None), ({"instruction": 1}, None),
        ({"instruction": "A", "input": None}, None),
    ],
)  # fmt: skip
def test_a_question_in_a_voters_own_words(body, found):
    if found is not None:
        assert read_question(body) == found
        return
    with pytest.raises(ApiError, match="instruction: wanted a text, and input, if there is one, a text"):
        read_question(body)


def test_a_question_is_done_as_often_as_it_was_voted_on():
    asked = [Question("a"), Question("b", "c"), Question("a"), Question("d")]
    voted = Counter([Question("a").key(), Question("b", "c").key(), Question("b", "c").key()])
    found = order_questions(asked, "voter", voted)
    assert sorted((one.instruction, is_done) for one, is_done in found) == [
        ("a", False), ("a", True), ("b", True), ("d", False),
    ]  # fmt: skip
    assert [done for one, done in found if one.instruction == "a"] == [True, False] and sum(voted.values()) == 3


def test_a_round_that_is_forgotten_is_written_no_longer(monkeypatch):
    """Nobody can vote on it."""
    import asyncio

    made = Comparison.__new__(Comparison)
    answers = []

    def answer(question, wanted):
        answers.append(SimpleNamespace(closed=0))
        answers[-1].close = lambda one=answers[-1]: setattr(one, "closed", one.closed + 1)
        return answers[-1]

    contestants = [SimpleNamespace(name=name, answer=answer) for name in "ab"]
    made.__init__(contestants, SimpleNamespace(kept=[]), None)

    async def read_body(request, *known):
        return {"voter": "v", "instruction": "Say A."}

    monkeypatch.setattr(made, "_read_body", read_body)
    monkeypatch.setattr("engine.comparing.endpoints.MOST_ROUNDS", 2)
    for _ in range(4):
        asyncio.run(made.ask(None))
    assert [one.closed for one in answers] == [1, 1, 1, 1, 0, 0, 0, 0] and len(made.rounds) == 2 < MOST_ROUNDS

"""What a request's chat becomes before it is encoded: nothing of it is lost on the way to the template."""

import pytest

from engine.base.errors import DataError
from engine.serving import prompts

USER, ANSWER, TOOL = ("user", "Where?"), ("assistant", ""), ("tool", "Here.")


@pytest.fixture
def rows(monkeypatch):
    """The rows that are encoded."""
    found = []
    monkeypatch.setattr(prompts, "encode_prompt", lambda row, tokenizer, style: (found.append(row), [7])[1])
    return found


def test_tools_and_what_messages_have_beside_a_text_reach_the_template(rows):
    more, tools = {1: {"tool_calls": [{"name": "find"}]}, 2: {"name": "find"}}, [{"type": "function"}]
    assert prompts.encode_chat([USER, ANSWER, TOOL], None, "model", tools=tools, more=more) == [7]
    assert (rows[0].messages, rows[0].tools, rows[0].more) == ((USER, ANSWER, TOOL), tools, more)
    prompts.encode_chat([USER], None, "model")
    assert (rows[1].tools, rows[1].more) == ((), {})


@pytest.mark.parametrize("style", ["model", "alpaca"])
def test_an_input_follows_the_instruction_or_has_a_place_of_its_own(style, rows):
    prompts.encode_chat([USER], None, style, input="A map.")
    alone = style == "alpaca"
    assert (rows[0].input, rows[0].messages) == (("A map.", None) if alone else ("", (("user", "Where?\n\nA map."),)))


@pytest.mark.parametrize("chat", [[USER, ANSWER], [("system", "Be brief.")], [TOOL, ANSWER]])
def test_a_chat_that_asks_nothing_is_refused(chat, rows):
    with pytest.raises(DataError, match="the last message is of role"):
        prompts.encode_chat(chat, None, "model")
    assert rows == []


def test_an_input_without_an_instruction_of_its_own_is_refused(rows):
    with pytest.raises(DataError, match="the last message is of role tool; leave input out"):
        prompts.encode_chat([USER, ANSWER, TOOL], None, "model", input="A map.")
    assert rows == []

"""Files of prompts: text, a prompt a line, and rows; and the question of a row."""

import json

import pytest

from engine.base.errors import DataError
from engine.data.prompts import ask_for, read_prompts
from engine.text.templates import Row


def test_a_text_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffSay it.\r\n\n  \n Now \u00e9. \n".encode())
    rows = read_prompts(path)
    assert [(row.source, row.instruction, row.input) for row in rows] == [
        ("prompts.txt:1", "Say it.", ""), ("prompts.txt:4", " Now \u00e9. ", ""),
    ]  # fmt: skip
    assert all(row.messages is None and not row.is_raw for row in rows)


def test_rows_need_no_answer(tmp_path):
    path = tmp_path / "prompts.json"
    chat, tool = [{"role": "user", "content": "c"}], {"type": "function", "function": {"name": "f", "parameters": {}}}
    path.write_text(json.dumps([{"instruction": "a", "input": "b"}, {"messages": chat, "tools": [tool]}]))
    rows = read_prompts(path)
    assert [ask_for(row) for row in rows] == ["a\n\nb", "c"] and list(rows[1].tools) == [tool]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"caf\xe9\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_prompts_is_told(content, said, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"--prompts {path}: {said}"):
        read_prompts(path)


def test_the_question_of_a_chat_is_its_last():
    chat = (("system", "s"), ("user", "one"), ("assistant", "a"), ("user", "two"), ("assistant", "b"))
    assert ask_for(Row("x:1", chat)) == "two" and ask_for(Row("x:1", None, "one")) == "one"

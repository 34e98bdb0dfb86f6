"""Rows that a template cannot say."""

import json

import pytest

from engine.base.errors import DataError
from engine.text.tokenizer_files import load_tokenizer
from engine.training.config import FinetuneConfig
from engine.training.datasets import read_tables
from tests.helpers.chat_tokenizers import CHATML, write_byte_level

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)


def test_rows_that_the_template_refuses_are_named_or_dropped_and_counted(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "a")]
    chats = [[{"role": role, "content": text} for role, text in turns[begin:]] for begin in (1, 0, 1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML, chat_template=NO_SYSTEM))

    def read(path, skip):
        config = FinetuneConfig(
            model="x", data=(str(path),), prompt_style="template", token_cache="off", skip_bad_rows=skip
        )
        return read_tables(config, tokenizer, print, show_progress=False)[0][0]

    with pytest.raises(DataError, match=r"rows.jsonl:2: .* fails on this row: no system; .* --skip-bad-rows"):
        read(path, False)
    table, skipped, _ = read(path, True)
    assert table.rows["number"].tolist() == [1, 3] and [bad.source for bad in skipped] == [f"{path}:2"]
    assert skipped[0].reason.startswith("the checkpoint's chat template fails on this row: no system")
    path.write_text(json.dumps({"messages": chats[1]}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .* no system"):
        read(path, True)

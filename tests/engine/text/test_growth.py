"""Time grows with what a stranger wrote, not with its square: vocabularies, templates, chats."""

import dataclasses

import pytest

from engine.base.errors import DataError
from engine.text.sentencepiece_file import NORMAL, SentencePieceModel
from engine.text.templates import Row, render_row
from engine.text.tokenizer_files import load_tokenizer
from engine.text.tokenizer_json import make_bpe
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level
from tests.helpers.hostile import is_linear, measure_cpu_s

MARKED = (
    "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def measure(call, make, n):
    """Return the CPU seconds of a call on what make returns for n, 2 n and 4 n."""
    return [measure_cpu_s(call, make(k * n), times=2) for k in (1, 2, 4)]


def make_chat(n, text="a"):
    """Return a row of n messages."""
    return dataclasses.replace(Row("row 1", None, "-"), messages=(("user", text), ("assistant", text)) * (n // 2))


def test_one_long_piece_of_a_vocabulary():
    def make(n):
        tokens = ["a", "b", "ab", "ab" * (n // 2)]
        return SentencePieceModel(tokens, [0.0] * 4, [NORMAL] * 4, byte_fallback=False, has_prefix=False)

    assert make_bpe(make(4))["merges"] == ["a b", "ab ab"]
    assert is_linear(measure(make_bpe, make, 20_000))


def test_a_chat_of_many_answers(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path, SPECIALS["chatml"], chat_template=MARKED))

    def render(row):
        return render_row(row, "template", tokenizer)

    assert len(render(make_chat(8))) == 8 * 3
    assert is_linear(measure(render, make_chat, 2000))


def test_blanks_before_a_token_that_swallows_them(tmp_path):
    folder = write_byte_level(tmp_path, SPECIALS["chatml"], chat_template=UNMARKED)
    path = folder / "tokenizer.json"
    assert '"lstrip": false' in path.read_text()
    path.write_text(path.read_text().replace('"lstrip": false', '"lstrip": true'))
    tokenizer = load_tokenizer(folder)

    def render(row):
        return render_row(row, "template", tokenizer)

    texts = [part.whole() for part in render(make_chat(2, "a  ")) if hasattr(part, "whole")]
    assert texts == ["a", "a"]
    assert is_linear(measure(render, lambda n: make_chat(2, "a" + " " * n + "b"), 4000))


def test_a_template_is_not_run_for_each_of_very_many_answers(tmp_path):
    """Without marks, each answer wants what the template makes of all before it."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path, SPECIALS["chatml"], chat_template=UNMARKED))
    with pytest.raises(DataError, match=r"row 1: a chat of 2000 messages .* split the chat"):
        render_row(make_chat(2000), "template", tokenizer)

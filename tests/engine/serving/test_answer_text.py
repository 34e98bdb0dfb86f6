"""Stop strings that come in pieces, and characters that do."""

import pytest

from engine.serving.answer_text import AnswerText, count_overlap
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer"), SPECIALS["chatml"]))


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("one two", [], "one two"),
        ("one two", ["two"], "one "),
        ("one two", ["two", "wo"], "one "),  # both are whole at once: the earlier one counts
        ("one two", ["wo", "two"], "one "),
        ("one two", ["twofold", "e t"], "on"),
        ("aaab", ["aab"], "a"),
        ("ends with tw", ["two"], "ends with tw"),
        ("Größe 東京 end", ["京"], "Größe 東"),
    ],
)
def test_text_ends_before_the_first_stop(tokenizer, text, stops, want):
    answer, shown = AnswerText(tokenizer, stops), ""
    for id in tokenizer.encode(text):
        shown += answer.push(id)
        assert want.startswith(shown)  # nothing is shown that would have to be taken back
    assert shown + answer.flush() == want
    assert answer.is_stopped == (want != text)


def test_count_overlap():
    assert count_overlap("xxab", "abc") == 2 and count_overlap("abc", "abc") == 0 and count_overlap("", "a") == 0

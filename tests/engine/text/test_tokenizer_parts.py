"""What the files beside a tokenizer say of it."""

import json

import pytest

from engine.base.errors import DataError
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, TOKENS, write_byte_level


@pytest.mark.parametrize("value", [False, 1.5, 1.0, "1", [[1]], [True], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_token_id(file, value, tmp_path):
    """False is the number 0 to Python, and 1.0 the number 1."""
    folder = write_byte_level(tmp_path, SPECIALS["chatml"])
    (folder / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(DataError, match=rf"{file}: eos_token_id is .*, wanted a whole number"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_the_tokenizer_does_not_have_begin_and_end_nothing(file, tmp_path):
    """As in a config that was copied from a model of a larger vocabulary."""
    folder = write_byte_level(tmp_path, SPECIALS["chatml"], adds_bos=False, bos_token="", eos_token="")
    known = len(TOKENS) + 3
    (folder / file).write_text(json.dumps({"eos_token_id": [9999, known, 77777], "bos_token_id": 9999}))
    found = load_tokenizer(folder)
    assert (found.bos_id, found.eos_id, found.stop_ids, found.vocab_size) == (None, known, {known}, known + 1)
    (folder / file).write_text(json.dumps({"eos_token_id": 9999}))
    with pytest.raises(DataError, match="got no end-of-text token"):
        load_tokenizer(folder)

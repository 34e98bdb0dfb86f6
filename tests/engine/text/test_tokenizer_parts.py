"""What the files beside a tokenizer say of it."""

import json

import pytest

from engine.base.errors import DataError
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level


@pytest.mark.parametrize("value", [False, 1.5, 1.0, "1", [[1]], [True], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_token_id(file, value, tmp_path):
    """False is the number 0 to Python, and 1.0 the number 1."""
    folder = write_byte_level(tmp_path, SPECIALS["chatml"])
    (folder / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(DataError, match=rf"{file}: eos_token_id is .*, wanted a whole number"):
        load_tokenizer(folder)

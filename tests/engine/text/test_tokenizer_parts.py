"""What the files beside a tokenizer say of it."""

import json

import pytest

from engine.base.errors import DataError
from engine.text import tokenizer as tokenizer_module
from engine.text.templates import Row, render_row
from engine.text.tokenizer_files import convert_to_llama_tokenizer, load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, TOKENS, write_byte_level


@pytest.mark.parametrize("value", [False, 1.5, 1.0, "1", [[1]], [True], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_token_id(file, value, tmp_path):
    """False is the number 0 to Python, and 1.0 the number 1."""
    folder = write_byte_level(tmp_path, SPECIALS["chatml"])
    (folder / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(DataError, match=rf"{file}: eos_token_id is .*, wanted a whole number"):
        load_tokenizer(folder)


def test_an_end_of_turn_that_the_files_name_ends_an_answer(tmp_path):
    for role, ends in (("eot_token", True), ("pad_token", False)):
        found = load_tokenizer(write_byte_level(tmp_path / role, SPECIALS["chatml"], **{role: "<|im_end|>"}))
        assert (found.special_ids["<|im_end|>"] in found.stop_ids) == ends and found.eos_id in found.stop_ids


def test_an_answer_ends_in_the_id_of_the_config_where_no_file_names_its_token(tmp_path):
    """Though the files name an end of a turn, which ends an answer too."""
    folder = write_byte_level(tmp_path, SPECIALS["chatml"], eos_token="", eot_token="<|im_end|>")
    end, other = (load_tokenizer(folder).special_ids[token] for token in ("<|im_end|>", "</s>"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": other}))
    found = load_tokenizer(folder)
    assert found.eos_id == other != end and found.stop_ids == {end, other}


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7])
def test_texts_of_any_number_are_encoded_each(n, tmp_path, monkeypatch):
    """In blocks, the last of which may be short, and with those behind a special token among the others."""
    monkeypatch.setattr(tokenizer_module, "BLOCK", 3)
    tokenizer = load_tokenizer(write_byte_level(tmp_path, SPECIALS["chatml"]))
    texts = [f"text {i}" for i in range(n)]
    alone = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == alone and all(alone)
    assert tokenizer.encode_batch(texts, [i % 2 == 0 for i in range(n)]) == alone


def test_a_bos_that_the_files_deny_is_none(tmp_path):
    for name, bos in (("none", None), ("some", "<s>"), ("unsaid", "")):
        folder = write_byte_level(tmp_path / name, SPECIALS["chatml"], adds_bos=False, bos_token=bos)
        (folder / "config.json").write_text(json.dumps({"bos_token_id": len(TOKENS)}))
        assert load_tokenizer(folder).bos_id == (None if bos is None else len(TOKENS))


@pytest.mark.parametrize("newer", [False, True])
def test_of_two_files_that_name_a_token_the_older_one_counts_unless_the_newer_lists_all(newer, tmp_path):
    more = {"added_tokens_decoder": {}} if newer else {}
    folder = write_byte_level(tmp_path, SPECIALS["chatml"], **{"eos_token": "</s>"} | more)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    found = load_tokenizer(folder)
    assert found.eos_id == found.special_ids["</s>" if newer else "<|im_end|>"]


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


def test_all_that_decides_ids_is_in_a_tokenizers_description(tmp_path):
    """Also what is in no file that is saved: ids that config.json names, tokens without an embedding."""
    described = []
    for name, ends in (("a", 1), ("b", 2), ("c", 2)):
        folder = write_byte_level(tmp_path / name, SPECIALS["chatml"], adds_bos=False, bos_token="", eos_token="")
        (folder / "config.json").write_text(json.dumps({"eos_token_id": ends}))
        described.append(load_tokenizer(folder).describe())
    assert described[0]["files"] == described[1]["files"] and described[0] != described[1] == described[2]
    found = load_tokenizer(tmp_path / "c")
    found.forget_unembedded(len(TOKENS) + 2)
    assert found.describe() != described[2]
    found = load_tokenizer(tmp_path / "c")
    found._encode = lambda texts, follows: [[1] for _ in texts]
    assert found.describe() != described[2]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a", SPECIALS["chatml"]))
    (tmp_path / "b").mkdir()
    for name in tokenizer.files:
        (tmp_path / "b" / name).write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path / "b")
    assert {path.read_bytes() for path in (tmp_path / "b").iterdir()} == {b"old"}


@pytest.mark.parametrize("style", ["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("what", [{"tools": [{"type": "function"}]}, {"more": {1: {"tool_calls": [{}]}}}])
def test_a_style_that_cannot_say_calls_of_tools_refuses_them(style, what, tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path, SPECIALS[style]))
    row = Row("f:7", (("user", "Hi"), ("assistant", "Ho")), **what)
    with pytest.raises(DataError, match="f:7: the row calls tools, which --prompt-style template alone can say"):
        render_row(row, style, tokenizer)


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_a_processor_that_puts_a_token_before_a_text_names_bos(kind, tmp_path):
    folder = write_byte_level(tmp_path, SPECIALS["chatml"])
    spec = json.loads((folder / "tokenizer.json").read_text())
    begin, end = (spec["added_tokens"][i] for i in (0, 1))
    spec["post_processor"] = {"type": kind, "sep": [end["content"], end["id"]], "cls": [begin["content"], begin["id"]]}
    if kind == "RobertaProcessing":
        spec["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(folder).bos_id == begin["id"]


def test_an_id_before_a_text_that_no_token_has_is_refused(tmp_path):
    folder = write_byte_level(tmp_path, SPECIALS["chatml"])
    spec = json.loads((folder / "tokenizer.json").read_text())
    (special,) = spec["post_processor"]["special_tokens"].values()
    special["ids"] = [9999]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="puts the id 9999 before a text, wanted one of a token it has"):
        load_tokenizer(folder)


@pytest.mark.parametrize("legacy, prefix, scheme", [
    (None, None, "first"), (False, True, "first"), (True, None, "always"), (True, False, "never"),
    (None, False, "never"),
])  # fmt: skip
def test_where_a_llama_tokenizer_puts_a_space(legacy, prefix, scheme):
    spec = {"model": {}}
    convert_to_llama_tokenizer(spec, {"legacy": legacy, "add_prefix_space": prefix})
    assert spec["pre_tokenizer"]["prepend_scheme"] == scheme


def test_a_text_behind_a_special_token_is_in_a_tokenizers_description(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path, SPECIALS["chatml"]))
    described, encode = [], tokenizer._encode
    for follows in (None, True, False):
        tokenizer._encode = lambda texts, asked, follows=follows: [[7]] if asked == follows else encode(texts, asked)
        described.append(json.dumps(tokenizer.describe()))
    assert len(set(described)) == 3

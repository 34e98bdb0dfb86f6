"""Tokenizers in the GGUF files that we write: read back they give the same ids, or the file is not written."""

import dataclasses
import json

import pytest

from engine.base.errors import UsageError
from engine.formats.save_gguf import save_gguf
from engine.text.gguf_vocabulary import PROBES, SPLIT_ORDER, describe_roles, make_vocabulary
from engine.text.sentencepiece_file import CONTROL
from engine.text.tokenizer_files import load_tokenizer
from engine.text.tokenizer_gguf import SPLITS
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level, write_sentencepiece
from tests.helpers.checkpoints import BASE, random_model
from tests.helpers.spm_tokenizers import train_sentencepiece

TEXTS = [*PROBES, "Name three fruits.", "<|im_start|>user</s>", "", "  two  spaces  ", "ab\u0000ab"]


def cross(tokenizer, path, more=0):
    """Return the tokenizer as it is read from a GGUF that we wrote, and the metadata of its vocabulary."""
    size = tokenizer.vocab_size + more
    vocabulary = make_vocabulary(tokenizer, size)
    save_gguf(path, random_model(dataclasses.replace(BASE, vocab_size=size)), vocabulary, "f32")
    return load_tokenizer(path), vocabulary


def check(tokenizer, read):
    assert read.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (read.bos_id, read.eos_id, read.add_bos) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos)
    assert tokenizer.special_ids.items() <= read.special_ids.items()
    for ids in tokenizer.encode_batch(TEXTS):
        assert read.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("style", SPECIALS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_byte_level_ids_cross(style, adds_bos, tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "hf", SPECIALS[style], adds_bos, chat_template="{{ 1 }}"))
    read, vocabulary = cross(tokenizer, tmp_path / "model.gguf", more=3)
    check(tokenizer, read)
    assert vocabulary["tokenizer.ggml.pre"] == "gpt-2" and vocabulary["tokenizer.chat_template"] == "{{ 1 }}"
    assert vocabulary["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"
    assert vocabulary["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]


def test_a_byte_level_token_past_the_embedding_is_left_out(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "hf", (*SPECIALS["alpaca"], "[PAD]")))
    n_tokens = tokenizer.vocab_size
    assert tokenizer.forget_unembedded(n_tokens - 1)
    read, vocabulary = cross(tokenizer, tmp_path / "model.gguf")
    check(tokenizer, read)
    assert len(vocabulary["tokenizer.ggml.tokens"]) == n_tokens - 1 and "[PAD]" not in read.special_ids


@pytest.mark.parametrize("style", SPECIALS)
def test_sentencepiece_ids_cross(style, tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "spm", SPECIALS[style]))
    read, vocabulary = cross(tokenizer, tmp_path / "model.gguf", more=2)
    check(tokenizer, read)
    assert vocabulary["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.add_space_prefix" not in vocabulary


@pytest.mark.parametrize("n_left", [0, 1, 2])
def test_tokens_that_were_added_to_a_sentencepiece_model_come_along_unless_they_have_no_embedding(n_left, tmp_path):
    """As Stanford's [PAD], whose id is the first one after the pieces."""
    train_sentencepiece(tmp_path / "spm")
    added = {"[PAD]": 500, "<|im_end|>": 501}
    (tmp_path / "spm" / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path / "spm")
    assert tokenizer.forget_unembedded(502 - n_left)
    read, vocabulary = cross(tokenizer, tmp_path / "model.gguf")
    check(tokenizer, read)
    kept = {token: id for token, id in added.items() if id < 502 - n_left}
    assert {token: id for token, id in read.special_ids.items() if id >= 500} == kept
    assert vocabulary["tokenizer.ggml.tokens"][500:] == list(kept)
    assert vocabulary["tokenizer.ggml.token_type"][500:] == [CONTROL] * len(kept)


def test_a_model_that_puts_no_space_before_a_text(tmp_path):
    train_sentencepiece(tmp_path / "spm", add_dummy_prefix=False)
    tokenizer = load_tokenizer(tmp_path / "spm")
    read, vocabulary = cross(tokenizer, tmp_path / "model.gguf")
    check(tokenizer, read)
    assert vocabulary["tokenizer.ggml.add_space_prefix"] is False


def split_by(folder, cuts, **model):
    """Write a byte-level tokenizer whose texts are cut by these patterns; return it."""
    write_byte_level(folder, SPECIALS["llama3"])
    spec = json.loads((folder / "tokenizer.json").read_text())
    steps = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in cuts]
    spec["pre_tokenizer"] = {
        "type": "Sequence", "pretokenizers": [*steps, spec["pre_tokenizer"] | {"use_regex": False}]
    }  # fmt: skip
    spec["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(folder)


@pytest.mark.parametrize("pre", SPLIT_ORDER)
def test_the_split_is_found_by_what_it_does(pre, tmp_path):
    tokenizer = split_by(tmp_path / "hf", SPLITS[pre], ignore_merges=pre == "llama-bpe")
    read, vocabulary = cross(tokenizer, tmp_path / "model.gguf")
    check(tokenizer, read)
    assert SPLITS[vocabulary["tokenizer.ggml.pre"]] == SPLITS[pre]


def test_a_split_that_llama_cpp_does_not_know_is_refused(tmp_path):
    tokenizer = split_by(tmp_path / "hf", [r"\p{L}"])
    with pytest.raises(UsageError, match="would split text otherwise"):
        make_vocabulary(tokenizer, tokenizer.vocab_size)


def test_roles_and_the_template_of_a_file_of_its_own_come_along(tmp_path):
    names = {"pad_token": "<|im_start|>", "unk_token": "<|im_end|>"}
    folder = write_byte_level(tmp_path / "hf", SPECIALS["chatml"], chat_template="{{ 1 }}", **names)
    (folder / "chat_template.jinja").write_text("{{ 2 }}")
    tokenizer = load_tokenizer(folder)
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.special_ids["<|im_start|>"],
             "unknown": tokenizer.special_ids["<|im_end|>"]}  # fmt: skip
    made = make_vocabulary(tokenizer, tokenizer.vocab_size)
    assert {role: made[f"tokenizer.ggml.{role}_token_id"] for role in roles} == roles
    assert made["tokenizer.chat_template"] == "{{ 2 }}" and made["tokenizer.ggml.add_bos_token"] is True
    kinds = made["tokenizer.ggml.token_type"]
    assert [kinds[id] for id in tokenizer.special_ids.values()] == [CONTROL] * 4
    assert not tokenizer.forget_unembedded(tokenizer.bos_id)  # of the roles none has an embedding
    assert not any(f"{role}_token_id" in describe_roles(tokenizer, tokenizer.bos_id) for role in roles)

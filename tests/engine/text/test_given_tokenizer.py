"""--tokenizer of a model that has its own: the ids must be of the same text, because they choose rows of embeddings."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from engine import export, finetune
from engine.base.errors import DataError, run_main
from engine.model.config import MODELS
from engine.text.tokenizer_files import find_tokenizer, load_tokenizer
from tests.helpers.small_model import VOCAB_SIZE, small_model
from tests.helpers.spm_tokenizers import train_sentencepiece

SHAPE = replace(MODELS["tiny"], vocab_size=VOCAB_SIZE + 64)  # padded, as many models are


def change_vocab(folder, change):
    """Write the small model's tokenizer with another vocabulary; change gets {token: id} and the merges."""
    folder.mkdir()
    for path in small_model().glob("tokenizer*"):
        shutil.copy(path, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec["model"]["vocab"], spec["model"]["merges"], spec["added_tokens"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def swap(vocab, merges, added):
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_one_and_move_the_rest(vocab, merges, added):
    """Leave out a token of merges that no other needs: all behind it get one id less."""
    token = next(token for token in list(vocab)[1000:] if not any(token in pair for pair in merges))
    lost = vocab.pop(token)
    merges[:] = [pair for pair in merges if "".join(pair) != token]
    for other, id in vocab.items():
        vocab[other] = id - (id > lost)


def drop_the_last(vocab, merges, added):
    lost = [token for token, id in vocab.items() if id >= VOCAB_SIZE - 5]
    for token in lost:
        del vocab[token]
    merges[:] = [pair for pair in merges if "".join(pair) not in lost]


def add_new(vocab, merges, added):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [{"id": VOCAB_SIZE, "content": "[PAD]", "special": True, **flags}]
    added += [{"id": VOCAB_SIZE + 1, "content": "gadolinium", "special": False, **flags}]


def rename_special(vocab, merges, added):
    for token in added:
        token["content"] = token["content"].replace("</s>", "<|im_end|>")
    vocab["<|im_end|>"] = vocab.pop("</s>")


@pytest.mark.parametrize("change, n", [(swap, 2), (drop_one_and_move_the_rest, None)])
def test_ids_of_other_text_are_refused(tmp_path, change, n):
    given = change_vocab(tmp_path / "given", change)
    with pytest.raises(DataError) as told:
        find_tokenizer(SHAPE, str(given), small_model())
    found = re.search(r"given: ([\d,]+) of its ids are .*, the first (\d+): got (.*), wanted (.*?)\. ", str(told.value))
    ours, own = (
        json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] for folder in (given, small_model())
    )
    unlike = [id for token, id in ours.items() if own.get(token) != id]
    assert int(found[1].replace(",", "")) == len(unlike) and int(found[2]) == min(unlike)
    assert n is None or len(unlike) == n
    names = ({id: token.replace("Ġ", " ") for token, id in vocab.items()} for vocab in (ours, own))
    assert [found[3], found[4]] == [repr(table[min(unlike)]) for table in names]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    train_sentencepiece(tmp_path / "given")  # 500 ids, all of which the model embeds
    with pytest.raises(DataError, match="of its ids are other text in the model's own tokenizer"):
        find_tokenizer(SHAPE, str(tmp_path / "given"), small_model())


@pytest.mark.parametrize("change", [add_new, drop_the_last, rename_special, lambda *_: None])
def test_the_same_ids_are_taken(tmp_path, change):
    given = change_vocab(tmp_path / "given", change)
    if change is rename_special:
        (given / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    found = find_tokenizer(SHAPE, str(given), small_model())
    assert found.describe() == load_tokenizer(given).describe() and not found.warnings


def test_the_same_tokenizer_in_another_file_is_taken(smollm2, tmp_path):
    """SmolLM2's GGUF and the tokenizer.json made of it; SentencePiece's file and the tokenizer.json made of that."""
    train_sentencepiece(tmp_path / "pieces")
    for own, shape in ((smollm2, MODELS["smollm2-135m"]), (tmp_path / "pieces", SHAPE)):
        given = tmp_path / f"of-{own.stem}"
        given.mkdir()
        load_tokenizer(own).save(given)
        (given / "tokenizer.model").unlink(missing_ok=True)
        assert find_tokenizer(shape, str(given), own).vocab_size == load_tokenizer(own).vocab_size


def test_a_model_without_a_tokenizer_takes_any_and_one_that_cannot_be_read_is_told(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(small_model(), base, ignore=shutil.ignore_patterns("tokenizer*"))
    given = str(change_vocab(tmp_path / "given", swap))
    assert not find_tokenizer(SHAPE, given, base).warnings
    (base / "tokenizer.json").write_text("{")
    (warning,) = find_tokenizer(SHAPE, given, base).warnings
    assert (
        str(base / "tokenizer.json") in warning and f"the ids of --tokenizer {given} could not be compared" in warning
    )


@pytest.mark.parametrize("command", [finetune, export])
def test_commands_refuse_it_and_write_nothing(tmp_path, rows_file, capsys, command):
    given, out = change_vocab(tmp_path / "given", swap), tmp_path / "out"
    words = ["--model", small_model(), "--tokenizer", given, "--out", out]
    words += ["--data", rows_file] if command is finetune else []
    assert run_main(command.main, list(map(str, words))) == 3
    assert "error: --tokenizer" in capsys.readouterr().err and not list(out.glob("[!.]*"))

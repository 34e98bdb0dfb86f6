"""Ids in training and elsewhere: which texts are compared, what counts as another id, and what ends with 1."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def ids(load_beside_stand_in):
    return load_beside_stand_in("scripts.parity.tokenizer_ids")


class Words:
    """A tokenizer of single characters, which adds BOS or not."""

    def __init__(self, add_bos=True, shift=0):
        self.bos_id, self.add_bos, self.warnings, self.shift = 1, add_bos, [], shift

    def encode_batch(self, texts):
        return [[ord(character) + self.shift for character in text] for text in texts]

    def save(self, folder):
        pass


def test_the_texts_are_those_of_the_rows_and_of_the_vectors(ids, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a1", "input": "", "output": "b2"}]))
    (tmp_path / "v.gguf.inp").write_text(f"one{ids.SEPARATOR}two\r{ids.SEPARATOR}", newline="")
    texts = ids.read_texts(tmp_path / "rows.json", [tmp_path / "v.gguf.inp"])
    assert texts == [*ids.TRICKY, "a1", "b2", "one", "two\r"] and ids.read_texts(None, []) == list(ids.TRICKY)


def test_vectors_are_those_of_the_same_vocabulary(ids, tmp_path):
    for name in ("other", "mine"):
        (tmp_path / f"{name}.gguf.inp").write_text(f"{name}{ids.SEPARATOR}")
        (tmp_path / f"{name}.gguf.out").write_text(" 1 2\n")
    vectors = sorted(tmp_path.glob("*.inp"), reverse=True)
    assert ids.read_vectors(Path("mine.gguf"), vectors) == (["mine"], [[1, 2]])
    assert ids.read_vectors(Path("third.gguf"), vectors) is None


def test_bos_is_before_a_text_where_the_tokenizer_adds_it(ids):
    assert ids.encode_as_training(Words(), ["a"]) == [[1, 97]] and ids.encode_as_training(Words(False), ["a"]) == [[97]]


READERS = ("saved", "transformers", "tokenizers", "llama.cpp", "llama.cpp before", "vectors")


@pytest.mark.parametrize("wrong", [None, *READERS])
def test_other_ids_of_equal_number_count_against_the_reader_that_has_them(wrong, ids, tmp_path, monkeypatch):
    gguf, texts = tmp_path / "v.gguf", ["abc", "d"]
    gguf.touch()
    (tmp_path / "v.gguf.inp").write_text("".join(text + ids.SEPARATOR for text in texts))
    own = Words().encode_batch(texts)
    own[0][0] += wrong == "vectors"
    (tmp_path / "v.gguf.out").write_text("".join(" ".join(map(str, one)) + "\n" for one in own))

    def encode(reader):
        found = ids.encode_as_training(Words(), texts)
        found[1][-1] += reader == wrong
        return found

    loads = iter([Words(), Words(shift=int(wrong == "saved"))])
    monkeypatch.setattr(ids, "load_tokenizer", lambda _: next(loads))
    monkeypatch.setattr(ids, "write_model_config", lambda *_: None)
    monkeypatch.setattr(ids, "convert", lambda script, folder: "converted")
    monkeypatch.setattr(ids, "encode_in_transformers", lambda *_: encode("transformers"))
    monkeypatch.setattr(ids, "encode_in_tokenizers", lambda *_: encode("tokenizers"))
    of_file = {"converted": "llama.cpp", gguf: "llama.cpp before"}
    monkeypatch.setattr(ids, "encode_in_llama_cpp", lambda command, file, _: encode(of_file[file]))
    table = ids.compare(gguf, texts, [tmp_path / "v.gguf.inp"], Path("convert.py"), ["llama"])
    counts = {reader: (0, 2) for reader in READERS}
    assert table == counts | ({wrong: (2 if wrong == "saved" else 1, 2)} if wrong else {})


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_one_vocabulary_that_differs_makes_the_exit_code(bad, ids, monkeypatch, call_main, tmp_path):
    tables = iter([{"saved": (int(i == bad), 9)} for i in range(2)])
    monkeypatch.setattr(ids, "compare", lambda *_: next(tables))
    monkeypatch.setattr(ids, "version", lambda _: "1")
    monkeypatch.setattr(ids, "find_spec", lambda _: SimpleNamespace())
    assert call_main(ids, "a", "b", "--json", tmp_path / "x.json") == (bad is not None)
    assert json.loads((tmp_path / "x.json").read_text())["vocabularies"].keys() == {"a", "b"}

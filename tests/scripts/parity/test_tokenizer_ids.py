"""Ids in training and elsewhere: which texts are compared, what counts as another id, and what ends with 1."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.calls import Calls


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


def test_a_folder_gets_the_config_of_a_small_llama(ids, tmp_path):
    given = []

    class Config:
        def __init__(self, **how):
            given.append(how)

        def to_dict(self):
            return {"model_type": "llama"}

    ids.transformers.LlamaConfig = Config
    ids.write_model_config(tmp_path, SimpleNamespace(vocab_size=9, bos_id=1, eos_id=2))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"]
    }  # fmt: skip
    assert given == [{"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 64,
                      "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}]  # fmt: skip


def test_special_tokens_in_a_text_stay_text_in_other_programs(ids, monkeypatch, tmp_path):
    def theirs(text, split_special_tokens):
        assert split_special_tokens
        return {"input_ids": [len(text)]}

    loaded = []
    monkeypatch.setattr(ids.transformers.AutoTokenizer, "from_pretrained", lambda f: loaded.append(f) or theirs)
    assert ids.encode_in_transformers(tmp_path, ["a", "bc"]) == [[1], [2]]

    class Tokenizer:
        encode_special_tokens = False

        @classmethod
        def from_file(cls, path):
            loaded.append(path)
            return cls()

        def encode_batch(self, texts):
            assert self.encode_special_tokens
            return [SimpleNamespace(ids=[ord(text[0])]) for text in texts]

    monkeypatch.setattr(ids.tokenizers, "Tokenizer", Tokenizer)
    assert ids.encode_in_tokenizers(tmp_path, ("a", "bc")) == [[97], [98]]
    assert loaded == [tmp_path, str(tmp_path / "tokenizer.json")]


@pytest.mark.parametrize(("code", "is_made"), [(0, True), (0, False), (3, True)])
def test_a_converter_that_fails_or_makes_nothing_is_told(code, is_made, ids, monkeypatch, tmp_path):
    ran = []

    def run(command, **how):
        ran.append((command, how))
        if is_made:
            (tmp_path / "converted.gguf").touch()
        return SimpleNamespace(returncode=code, stderr="x" * 3000 + "why")

    monkeypatch.setattr(ids.subprocess, "run", run)
    if code or not is_made:
        with pytest.raises(SystemExit) as told:
            ids.convert(Path("dir/convert.py"), tmp_path)
        assert told.value.code == f"convert.py failed on {tmp_path}:\n{'x' * 1997}why"
    else:
        assert ids.convert(Path("dir/convert.py"), tmp_path) == tmp_path / "converted.gguf"
    words = [sys.executable, "dir/convert.py", tmp_path, "--vocab-only", "--outfile", tmp_path / "converted.gguf"]
    assert ran == [(list(map(str, words)), {"capture_output": True, "text": True, "check": False})]


@pytest.mark.parametrize("code", [0, 1])
def test_llama_cpp_gets_the_texts_and_gives_their_ids(code, ids, monkeypatch):
    ran = []
    ended = SimpleNamespace(returncode=code, stdout="[[1], [2, 3]]", stderr="x" * 3000 + "why")
    monkeypatch.setattr(ids.subprocess, "run", lambda command, **how: ran.append((command, how)) or ended)
    if code:
        with pytest.raises(SystemExit) as told:
            ids.encode_in_llama_cpp(["llama", "a b"], Path("x.gguf"), ["a", "ü"])
        assert told.value.code == f"llama 'a b' failed on x.gguf:\n{'x' * 1997}why"
    else:
        assert ids.encode_in_llama_cpp(["llama", "a b"], Path("x.gguf"), ["a", "ü"]) == [[1], [2, 3]]
    ((command, how),) = ran
    assert command == ["llama", "a b", "x.gguf"] and json.loads(how.pop("input")) == ["a", "ü"]
    assert how == {"capture_output": True, "text": True, "check": False}


def test_texts_that_differ_are_shown_and_warnings_are_told(ids, monkeypatch, tmp_path, capsys):
    """Five at most, the beginning of each. llama.cpp converts only with a script, and reads a GGUF as it is."""
    texts, loads = [str(i) * 100 for i in range(8)], iter([Words(), Words(shift=1)])
    first = Words()
    first.warnings = ["look out"]
    loads = iter([first, Words(shift=1)])
    monkeypatch.setattr(ids, "load_tokenizer", lambda _: next(loads))
    monkeypatch.setattr(ids, "write_model_config", lambda *_: None)
    same = ids.encode_as_training(Words(), texts)
    monkeypatch.setattr(ids, "encode_in_transformers", lambda *_: same)
    monkeypatch.setattr(ids, "encode_in_tokenizers", lambda *_: same)
    assert ids.compare(tmp_path, texts, [], None, ["llama"]) == {
        "saved": (8, 8), "transformers": (0, 8), "tokenizers": (0, 8)
    }  # fmt: skip
    shown = [f"{tmp_path.name}, saved: {text[:80]!r}" for text in texts[:5]]
    assert capsys.readouterr().err.splitlines() == ["warning: look out", *shown]


def test_the_table_and_the_file(ids, monkeypatch, call_main, tmp_path, capsys):
    calls = Calls()
    tables = {"one": {"saved": (0, 9), "vectors": (0, 4)}, "two.gguf": {"saved": (0, 9), "llama.cpp before": (2, 9)}}
    compare = calls.stand_in("compare", lambda vocabulary, *_: tables[vocabulary.name])
    monkeypatch.setattr(ids, "compare", compare)
    monkeypatch.setattr(ids, "read_texts", calls.stand_in("read_texts", ["a"]))
    monkeypatch.setattr(ids, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(ids, "today", lambda: "2026-01-31")
    monkeypatch.setattr(ids, "find_spec", lambda name: name != "sentencepiece")
    flags = ("--rows", "dir/r.json", "--vectors", "v.inp", "--convert", "c.py", "--json", tmp_path / "x.json")
    assert call_main(ids, "one", "dir/two.gguf", *flags, "--llama-cpp", "llama 'a b'") is True
    assert capsys.readouterr().out.splitlines() == [
        "| vocabulary | saved | transformers | tokenizers | llama.cpp | llama.cpp before | vectors |",
        "|---|---|---|---|---|---|---|", "| one | 0 of 9 |  |  |  |  | 0 of 4 |",
        "| two.gguf | 0 of 9 |  |  |  | 2 of 9 |  |",
    ]  # fmt: skip
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "what": "texts whose ids differ from training's, of how many", "rows": "r.json",
        "vocabularies": {name: {reader: list(pair) for reader, pair in of.items()} for name, of in tables.items()},
        "date": "2026-01-31", "transformers": "transformers 1", "tokenizers": "tokenizers 1",
        "llama_cpp_python": "llama_cpp_python 1",
    }  # fmt: skip
    more = "['a'], [PosixPath('v.inp')], PosixPath('c.py'), ['llama', 'a b'])"
    assert calls.lines == [
        "read_texts(PosixPath('dir/r.json'), [PosixPath('v.inp')])", f"compare(PosixPath('one'), {more}",
        f"compare(PosixPath('dir/two.gguf'), {more}",
    ]  # fmt: skip
    del tables["two.gguf"]["llama.cpp before"]
    for is_there in (True, False):
        calls.lines.clear()
        monkeypatch.setattr(ids, "find_spec", lambda name, is_there=is_there: is_there and name == "llama_cpp")
        assert call_main(ids, "one") is False
        own = f"[{sys.executable!r}, '-c', {ids.LLAMA_CPP!r}]" if is_there else "None"
        assert calls.lines[1] == f"compare(PosixPath('one'), ['a'], [], None, {own})"


def test_flags_have_defaults(ids, defaults_of):
    assert defaults_of(ids, "v") == {
        "vocabularies": [Path("v")], "rows": None, "vectors": [], "convert": None, "llama_cpp": None, "json": None
    }  # fmt: skip


def test_vectors_must_be_as_many_as_their_texts(ids, tmp_path, monkeypatch):
    gguf = tmp_path / "v.gguf"
    (tmp_path / "v.gguf.inp").write_text(f"a{ids.SEPARATOR}b{ids.SEPARATOR}")
    (tmp_path / "v.gguf.out").write_text("97\n")
    monkeypatch.setattr(ids, "load_tokenizer", lambda _: Words())
    monkeypatch.setattr(ids, "write_model_config", lambda *_: None)
    for name in ("encode_in_transformers", "encode_in_tokenizers"):
        monkeypatch.setattr(ids, name, lambda *_: [])
    with pytest.raises(ValueError, match="shorter"):
        ids.compare(gguf, [], [tmp_path / "v.gguf.inp"], None, None)

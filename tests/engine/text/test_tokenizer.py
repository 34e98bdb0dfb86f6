"""Ids of each kind of checkpoint, against transformers and SentencePiece."""

import functools
import json
import random
import shutil
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from engine.base.errors import DataError, UsageError
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.checkpoints import cache_gguf_parsing
from tests.helpers.spm_tokenizers import train_sentencepiece

SPELLED = [
    "</s>",
    "<s>",
    "<unk>",
    " </s>",
    "a</s>b",
    "<s> hi",
    "<|im_end|>",
    "[PAD]",
    "<0x41>",
    "x<|eot_id|>",
    "\0002\0",
]
TRICKY = [
    "", " ", "  ", "   ", " a", "  a", "a ", "a  ", "a  b", "a   b    c", " " * 33, "\n", "\n\n\n", " \n", "\n a", "\t",
    "\ta", "a\r\nb\r\n", "\r", "\v\f", "don't I'LL we've", "The quick brown fox.", "x" * 3000, "ab" * 700, "=" * 77,
    "def f(x):\n    return x[0] ** 2  # ok\n\n\tif a != b: {}\n", "http://a.b/c?d=e&f=%20", "é ñ ü", "e\u0301 n\u0303",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "漢字かな交じり文", "العربية لغة", "नमस्ते", "ﬁ Å", "\u00a0a\u3000b\u200bc", "\ufeffa", "\ufffd",
    "\0", "a\0b", "\x01\x02\x7f\x85", "\U0010ffff", "\ufdd0",
]  # fmt: skip
NUMBERS = ["0", "12345 678", "a1b22c333", "\n 1", "3.14159e-10", "½ ² ٣٤ Ⅷ 一", "1,000,000 $5", "3 times"]
ALL = TRICKY + NUMBERS + SPELLED
parts = st.lists(st.sampled_from([*" \n▁ab<s/>0'é漢\0\u0301👍\u200d", "the", "  "]), max_size=30)
text = parts.map("".join) | st.text(max_size=20)


def hf_ids(hf, text):
    return hf.encode(text, add_special_tokens=False, split_special_tokens=True)


def hf_adds_bos(hf):
    return hf.bos_token_id is not None and hf("a")["input_ids"][:1] == [hf.bos_token_id]


def facts(tokenizer):
    names = ("vocab_size", "bos_id", "eos_id", "add_bos", "stop_ids", "special_ids")
    return {name: getattr(tokenizer, name) for name in names}


def same(ours, other_ids, texts=ALL):
    for text in texts:
        ids = ours.encode(text)
        assert ids == other_ids(text), repr(text)
        assert not set(ids) & (set(ours.special_ids.values()) - {0}), repr(text)
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def check_save(ours, out):
    """save -> load -> save: the same behaviour and the same bytes. Returns transformers' tokenizer of the folder."""
    ours.save(out / "first")
    again = load_tokenizer(out / "first")
    second = out / "new" / "second"
    again.save(second)
    ours.save(out / "first")
    written = {path.name: path.read_bytes() for path in (out / "first").iterdir()}
    assert written == {path.name: path.read_bytes() for path in second.iterdir()}
    assert facts(again) == facts(ours)
    same(again, ours.encode)
    for text in ALL:
        assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    hf = AutoTokenizer.from_pretrained(out / "first")
    same(ours, functools.partial(hf_ids, hf))
    assert hf_adds_bos(hf) == ours.add_bos
    assert (hf.bos_token_id, hf.eos_token_id, len(hf)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    for text in ALL:
        ids = ours.encode(text)
        decoded = hf.decode([ours.eos_id, *ids, ours.eos_id], skip_special_tokens=True)
        assert decoded == ours.decode([ours.eos_id, *ids, ours.eos_id]), repr(text)
    return hf


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join([stream.push(id) for id in ids] + [stream.flush()])


# ---- GGUF, byte-level BPE -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol(smollm2):
    return load_tokenizer(smollm2)


def test_smollm2_saved_for_transformers(smol, tmp_path):
    hf = check_save(smol, tmp_path)
    assert hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("hi<|im_end|>\n")
    assert facts(smol) | {"special_ids": 0} == {
        "vocab_size": 49152, "bos_id": 1, "eos_id": 2, "add_bos": False, "stop_ids": {2}, "special_ids": 0,
    }  # fmt: skip
    assert smol.special_ids["<|im_start|>"] == 1
    assert "tokenizer.model" not in smol.files


def test_smollm2_as_transformers_reads_the_gguf(smol, smollm2, monkeypatch):
    cache_gguf_parsing(monkeypatch)
    hf = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    same(smol, functools.partial(hf_ids, hf), TRICKY + SPELLED)
    # It does not know the pre-tokenizer smollm, by which a digit stands alone and leaves the space to the newline.
    assert smol.encode("\n 1") == [smol.encode("\n ")[0], *smol.encode("1")] != hf_ids(hf, "\n 1")


@settings(deadline=None, max_examples=150)
@given(text=text)
def test_smollm2_is_lossless(smol, text):
    assume(all(smol.decode(smol.encode(c)) == c for c in text))  # it has no token for a few bytes, and drops them
    ids = smol.encode(text)
    assert smol.decode(ids) == text
    assert streamed(smol, ids) == text


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 300), max_size=30))  # most are single bytes: broken UTF-8
def test_streaming_equals_decoding(smol, ids):
    assert streamed(smol, ids) == smol.decode(ids)


def test_a_stream_holds_back_half_a_character(smol):
    stream, ids = smol.stream(), smol.encode("漢")
    assert len(ids) > 1
    assert [stream.push(id) for id in ids] == [""] * (len(ids) - 1) + ["漢"]
    assert stream.push(ids[0]) + stream.push(2) == ""
    assert stream.flush() == "\ufffd"


def write_gguf(path, model, tokens, types, **values):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in values.items():
        adder = {"merges": "add_token_merges", "scores": "add_token_scores", "pre": "add_tokenizer_pre"}.get(name)
        getattr(writer, adder or f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "[PAD]", "</s>"]
CORPUS = [
    "the cat sat on the mat 12345 times",
    "def f(x):\n    return x",
    "don't I'LL  we",
    "a</s>b x<|eot_id|> </s>",
] * 9


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE cut as Llama 3 cuts; special tokens last. Its corpus spells two of them."""
    from engine.text.tokenizer_gguf import LLAMA3_SPLIT

    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    spec = json.loads(bpe.to_str())
    assert spec["model"]["merges"].pop() == ["Ġtim", "es"]  # a word that only ignore_merges finds
    bpe = tokenizers.Tokenizer.from_str(json.dumps(spec))
    bpe.add_special_tokens(SPECIALS)
    return bpe


def with_bos(bpe):
    bos = SPECIALS[0]
    template = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    bpe = tokenizers.Tokenizer.from_str(bpe.to_str())
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return bpe


def hf_folder(folder, bpe, tokenizer_config, **more):
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config": tokenizer_config, **more}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(("pre", "add_bos"), [("llama-bpe", True), ("gpt-2", False)])
def test_gguf_of_byte_level_bpe(bpe, pre, add_bos, tmp_path):
    spec, n = json.loads(bpe.to_str()), bpe.get_vocab_size()
    tokens = [bpe.id_to_token(id) for id in range(n)]
    ids = {f"{role}_token_id": bpe.token_to_id(SPECIALS[i]) for i, role in enumerate(["bos", "eos", "eot"])}
    merges = [" ".join(merge) for merge in spec["model"]["merges"]]
    types = [1] * (n - len(SPECIALS)) + [3] * len(SPECIALS)
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", "gpt2", tokens, types, pre=pre, merges=merges, **ids))
    assert (ours.add_bos, ours.bos_id) == (add_bos, ids["bos_token_id"])
    assert ours.stop_ids == {ids["eos_token_id"], ids["eot_token_id"]}
    check_save(ours, tmp_path)
    if add_bos:
        reference = with_bos(bpe)
    else:
        reference = tokenizers.Tokenizer.from_str(bpe.to_str())
        reference.model.ignore_merges = False
        reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.encode_special_tokens = True
    same(ours, lambda text: reference.encode(text, add_special_tokens=False).ids)


def test_gguf_with_an_unknown_pre_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gpt2", ["a", "b"], [1, 1], pre="mystery", eos_token_id=0)
    with pytest.raises(DataError, match=r"'mystery', wanted one of .*smollm"):
        load_tokenizer(path)


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


def test_tokenizer_json_like_llama_3(bpe, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": "<|eot_id|>"}
    id = bpe.token_to_id
    stops = {"bos_token_id": id(SPECIALS[0]), "eos_token_id": [id("<|end_of_text|>"), id("<|eot_id|>")]}
    folder = hf_folder(tmp_path / "m", with_bos(bpe), config, generation_config=stops, config={"model_type": "llama"})
    ours = load_tokenizer(folder)
    assert (ours.eos_id, ours.stop_ids) == (id("<|eot_id|>"), {id("<|end_of_text|>"), id("<|eot_id|>")})
    assert ours.add_bos and ours.bos_id == id(SPECIALS[0])
    assert ours.special_ids == {token: id(token) for token in SPECIALS}
    ours.save(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    hf = AutoTokenizer.from_pretrained(folder)
    same(ours, functools.partial(hf_ids, hf))
    assert hf_adds_bos(hf)
    for text in ALL:
        assert ours.decode([ours.bos_id, *ours.encode(text), ours.eos_id]) == text


def test_tokenizer_json_without_bos_and_eos_from_the_model_config(bpe, tmp_path):
    ours = load_tokenizer(hf_folder(tmp_path, bpe, {"bos_token": None}, config={"eos_token_id": 7, "bos_token_id": 5}))
    assert (ours.bos_id, ours.add_bos, ours.eos_id, ours.stop_ids) == (None, False, 7, {7})
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(hf_folder(tmp_path, bpe, {}, config={}))


@pytest.mark.parametrize("more", [{}, {"added_tokens_decoder": {}}], ids=["old", "new"])
def test_two_files_that_name_different_tokens(bpe, more, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **more}
    folder = hf_folder(tmp_path, bpe, config, special_tokens_map={"eos_token": {"content": "<|eot_id|>"}})
    assert load_tokenizer(folder).eos_id == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_merges_do_not_make_special_tokens(bpe, tmp_path):
    spec = json.loads(bpe.to_str())
    spec["added_tokens"] = []
    token = "the"  # which merges make
    ours = load_tokenizer(hf_folder(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(spec)), {"eos_token": token}))
    assert ours.eos_id == bpe.token_to_id(token)
    assert ours.eos_id not in ours.encode(token) and ours.decode(ours.encode(token)) == token


# ---- SentencePiece --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory):
    """Return a tokenizer.model of LLaMA's kind, trained here: BPE, bytes for what it does not know, all spaces kept."""
    folder = tmp_path_factory.mktemp("llama")
    train_sentencepiece(folder)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def reference(llama_model):
    return sentencepiece.SentencePieceProcessor(model_file=str(llama_model))


@pytest.fixture(scope="module")
def llama(llama_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    shutil.copy(llama_model, folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def llama_saved(llama, tmp_path_factory):
    """The same from the files of Hugging Face that save adds, by the tokenizers library."""
    folder = tmp_path_factory.mktemp("saved")
    llama.save(folder)
    return load_tokenizer(folder)


def test_llama_is_sentencepiece_and_so_is_what_it_saves(llama, llama_model, reference, tmp_path):
    same(llama, reference.encode)
    assert facts(llama) == {
        "vocab_size": 500, "bos_id": 1, "eos_id": 2, "add_bos": True, "stop_ids": {2},
        "special_ids": {"<unk>": 0, "<s>": 1, "</s>": 2},
    }  # fmt: skip
    check_save(llama, tmp_path)
    assert "tokenizer.model" in llama.files
    assert (tmp_path / "first" / "tokenizer.model").read_bytes() == llama_model.read_bytes()


@settings(deadline=None, max_examples=300)
@given(text=text)
def test_llama_on_any_text(llama, llama_saved, reference, text):
    ids = llama.encode(text)
    assert ids == reference.encode(text) == llama_saved.encode(text)
    assert llama.decode(ids) == llama_saved.decode(ids) == streamed(llama, ids) == text.replace("▁", " ")


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(3, 300).filter(lambda id: id != 3 + 0x20), max_size=20))
def test_llama_decodes_broken_bytes_as_sentencepiece_does(llama, llama_saved, reference, ids):
    assert llama.decode(ids) == reference.decode(ids) == streamed(llama, ids) == llama_saved.decode(ids)


def test_merges_of_equal_score(llama_saved, reference):
    """LLaMA's fifteen runs of spaces all score -1e9."""
    rng = random.Random(0)
    mixed = ["".join(rng.choices([" " * 7, " ", "\n", "a", "=", "the"], k=20)) for _ in range(2000)]
    same(llama_saved, reference.encode, [" " * n for n in range(150)] + mixed)


def hf_llama_folder(folder, model, **config):
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_hugging_face_folder_with_tokenizer_model_alone(llama_model, reference, tmp_path):
    pytest.importorskip("google.protobuf")  # transformers reads the file with it
    folder = hf_llama_folder(tmp_path / "m", llama_model, add_bos_token=True)
    ours, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.add_bos and hf_adds_bos(hf)
    same(ours, reference.encode)
    differs = [text for text in ALL if ours.encode(text) != hf_ids(hf, text)]
    assert {" a"} <= set(differs) <= {text for text in ALL if text[:1] == " " or "  " in text}


def test_meta_folder_with_an_added_token(llama_model, tmp_path):
    shutil.copy(llama_model, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 500}')
    assert check_save(load_tokenizer(tmp_path), tmp_path).convert_tokens_to_ids("[PAD]") == 500


def test_folder_of_stanford_alpaca(llama_model, reference, tmp_path):
    folder = hf_llama_folder(tmp_path / "m", llama_model, bos_token="", eos_token="</s>", add_bos_token=False)
    (folder / "added_tokens.json").write_text('{"[PAD]": 500}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]", "bos_token": {"content": "<s>"}}')
    ours = load_tokenizer(folder)
    assert (ours.vocab_size, ours.bos_id, ours.add_bos, ours.special_ids["[PAD]"]) == (501, 1, False, 500)
    same(ours, reference.encode)
    ours.save(tmp_path / "saved")
    again, hf = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert facts(again) == facts(ours) and hf.pad_token_id == 500 and not hf_adds_bos(hf)
    same(ours, functools.partial(hf_ids, hf))
    assert ours.decode([500, *ours.encode("hi"), 500]) == "hi"


def test_folder_with_both_files_is_read_as_transformers_reads_it(llama, llama_model, tmp_path):
    llama.save(tmp_path / "saved")
    folder = hf_llama_folder(tmp_path / "m", llama_model, bos_token="<s>", eos_token="</s>")
    shutil.copy(tmp_path / "saved" / "tokenizer.json", folder)
    ours, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    same(ours, functools.partial(hf_ids, hf))
    assert ours.encode(" a") != llama.encode(" a")
    assert ours.add_bos == hf_adds_bos(hf) and facts(ours) == facts(llama)


def test_gguf_of_sentencepiece(reference, tmp_path):
    n = reference.get_piece_size()
    types = [2, 3, 3] + [6 if reference.is_byte(id) else 1 for id in range(3, n)]
    tokens, scores = [reference.id_to_piece(id) for id in range(n)], [reference.get_score(id) for id in range(n)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", "llama", tokens, types, scores=scores, **ids))
    same(ours, reference.encode)
    assert (ours.add_bos, ours.bos_id, ours.eos_id) == (True, 1, 2)
    check_save(ours, tmp_path)


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_lone_surrogates_are_named(bpe, tmp_path):
    ours = load_tokenizer(hf_folder(tmp_path, bpe, {"eos_token": "</s>"}))
    with pytest.raises(DataError, match=r"text 1 has the lone surrogate '\\ud800' at 2"):
        ours.encode_batch(["fine", "no\ud800"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.txt", b"", "neither tokenizer.model nor tokenizer.json"),
        ("tokenizer.json", b'{"model": ', "broken JSON"),
        ("tokenizer.json", b"[1]", "got a list"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "vocab"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}', "cannot read it"),
        ("tokenizer.json", b'{"decoder": {"type": "WordPiece"}, "model": {"vocab": {}}}', "WordPiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ("tokenizer.model", b"", "tiktoken"),
    ],
)
def test_corrupt_folders(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_corrupt_gguf(smollm2, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(smollm2.read_bytes()[:200_000])
    with pytest.raises(DataError, match=r"m\.gguf"):
        load_tokenizer(tmp_path / "m.gguf")
    with pytest.raises(DataError, match="neither"):
        load_tokenizer(tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'cria-engine\[gguf\]'"):
        load_tokenizer(smollm2)

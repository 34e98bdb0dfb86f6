"""A tokenizer means the same ids in training and, after export, in the programs that read what we write."""

import json
from dataclasses import replace

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from engine.base.errors import DataError
from engine.data.dataset import encode_rows
from engine.model.config import MODELS
from engine.text.chat_templates import adopt_style
from engine.text.own_template import open_own_template
from engine.text.parts import Special
from engine.text.sentencepiece_file import BPE, CONTROL, read_model
from engine.text.templates import Row, encode_prompt
from engine.text.tokenizer_files import find_tokenizer, load_tokenizer
from tests.engine.text.test_tokenizer import hf_adds_bos, hf_ids, write_gguf
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level
from tests.helpers.spm_tokenizers import list_pieces, train_sentencepiece, write_metaspace

CHAT = (("system", "the name"), ("user", " who is\n the user"), ("assistant", "  the assistant "), ("user", "why"))
CHATS = (CHAT, (*CHAT, ("assistant", "so")), (("user", "name <s> </s> the <|im_end|>"), ("assistant", "a  b")))
TEXTS = [
    "", " ", " a", "  a", "a  b", "    return x\n\n  the  quick", "\tthe", "a\r\nb", "The quick brown fox.", "</s> <s>",
    "漢字 é", "x <|im_start|> y", "<0x41>", "the\n    user", "lazy   dogs   " * 9,
]  # fmt: skip


def saved_everywhere(ours, folder):
    """Save a tokenizer, and check that every reader of the folder gives the ids of training. Return the folder."""
    ours.save(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    again, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    alone.encode_special_tokens = True
    for text in TEXTS:
        ids = ours.encode(text)
        assert again.encode(text) == ids and hf_ids(theirs, text) == ids, repr(text)
        assert alone.encode(text).ids == [ours.bos_id] * ours.add_bos + ids, repr(text)
    assert hf_adds_bos(theirs) == ours.add_bos == again.add_bos
    assert theirs.bos_token_id == ours.bos_id == again.bos_id
    return folder


# ---- the space after special tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("scheme", ["always", "first", "never", "prepend"])
def test_a_chat_has_the_ids_of_transformers(scheme, legacy, style, tmp_path):
    """The class LlamaTokenizer goes by `legacy`, other classes by what tokenizer.json says."""
    for hf_class in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        config = {"tokenizer_class": hf_class} | ({} if legacy is None else {"legacy": legacy})
        ours = load_tokenizer(write_metaspace(tmp_path / hf_class, scheme, **config))
        adopt_style(ours, style).save(tmp_path / "out")
        (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        for messages in CHATS[:2]:
            chat = [{"role": role, "content": content} for role, content in messages]
            ends = messages[-1][0] == "assistant"
            ids = theirs.apply_chat_template(chat, add_generation_prompt=not ends)["input_ids"]
            row = Row("f:1", messages)
            mine = encode_rows([row], ours, style).tokens.tolist() if ends else encode_prompt(row, ours, style)
            assert mine == ids
        assert ours.encode("the") == hf_ids(theirs, "the")


@pytest.mark.parametrize("scheme", ["first", "prepend"])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized", "single_word"])
def test_special_tokens_of_a_style_are_written_so_that_all_find_them_as_they_are(flag, scheme, tmp_path):
    """By these flags transformers drops blanks beside a token, or does not find it in a chat."""
    folder = write_metaspace(tmp_path / "base", scheme)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token[flag] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]}
    config |= {"added_tokens_decoder": decoder, "eos_token": {"__type": "AddedToken", **decoder["2"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, row = load_tokenizer(folder), Row("f:1", CHATS[1])
    chat = [{"role": role, "content": content} for role, content in CHATS[1]]
    for style in ("chatml", "llama2", "llama3"):
        adopt_style(ours, style).save(tmp_path / "out")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs.apply_chat_template(chat)["input_ids"] == encode_rows([row], ours, style).tokens.tolist()


@pytest.mark.parametrize("hf_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("scheme", ["always", "first", "prepend"])
def test_the_written_files_say_where_training_put_a_space(scheme, hf_class, tmp_path):
    """Alpaca's BOS is the tokenizer's, so its text gets one; in transformers the template writes BOS before it."""
    ours = load_tokenizer(write_metaspace(tmp_path / "base", scheme, tokenizer_class=hf_class))
    adopt_style(ours, "alpaca").save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    row = Row("f:1", None, "the name", "", "user")
    ids = encode_prompt(row, ours)
    chat = [{"role": "user", "content": "the name"}]
    assert ids == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == encode_prompt(row, again)
    assert theirs("the user")["input_ids"] == [ours.bos_id, *ours.encode("the user")]
    assert adopt_style(again, "alpaca").files == again.files
    config = json.loads(adopt_style(ours, "chatml").files["tokenizer_config.json"])
    is_first = scheme == "first" or hf_class == "LlamaTokenizer"
    assert config.get("add_prefix_space") is (False if is_first else None)  # llama.cpp: no space after <|im_start|>
    assert (config["tokenizer_class"] != hf_class) == (hf_class == "LlamaTokenizer")


def encode_as_llama_cpp(tokenizer, chat):
    """Return the ids of a chat by the written files: without add_prefix_space, no text has a space but its own."""
    parts = open_own_template(tokenizer).render(chat, [], True, "a chat", [False] * len(chat))
    return [
        id
        for part in parts
        for id in (
            [tokenizer.special_ids[part.name]] if isinstance(part, Special) else tokenizer.encode(part.whole(), True)
        )
    ]


@pytest.mark.parametrize("hf_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("begins", ["", " ", "{{ ' ' }}", "{{ bos_token }}"])
def test_a_chat_that_begins_with_text_begins_with_a_space_everywhere(begins, hf_class, tmp_path):
    """Training and transformers put a space before the first text of a chat, llama.cpp puts none."""
    template = begins + (
        "{% for m in messages %}\n{{ '<' + m.role + '>\n' + m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    base = write_metaspace(tmp_path / "base", "first", tokenizer_class=hf_class, chat_template=template, legacy=False)
    ours = load_tokenizer(base)
    adopted = adopt_style(ours, "template")
    adopted.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    for messages in (CHAT[1:2], CHAT):
        chat = [{"role": role, "content": content} for role, content in messages]
        ids = encode_prompt(Row("f:1", messages), ours, "template")
        assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ids
        assert encode_prompt(Row("f:1", messages), again, "template") == ids == encode_as_llama_cpp(again, chat)
    assert json.loads(again.files["tokenizer_config.json"])["add_prefix_space"] is False  # which llama.cpp goes by
    assert adopt_style(again, "template").files == again.files


def test_text_of_a_user_that_spells_a_special_token_stays_text(tmp_path):
    ours = load_tokenizer(write_metaspace(tmp_path, "first"))
    row = Row("f:1", CHATS[2])
    ids = encode_rows([row], ours, "chatml").tokens.tolist()
    assert [ids.count(ours.special_ids[token]) for token in ("<s>", "</s>", "<|im_end|>")] == [0, 0, 2]


def test_alpaca_begins_a_text_after_bos(tmp_path):
    ours = load_tokenizer(write_metaspace(tmp_path, "first"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    row = Row("f:1", None, "the name", "", "user")
    ids = encode_prompt(row, ours)
    assert ids == theirs(theirs.decode(ids[1:]))["input_ids"] and theirs.convert_ids_to_tokens(ids[1]).startswith("▁")


@pytest.mark.parametrize("scheme", ["always", "first", "never", "prepend"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_json_is_written_as_its_class_runs_it(legacy, scheme, tmp_path):
    """LlamaTokenizer of transformers 5 takes only vocabulary and merges; the tokenizers library knows no classes."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    saved_everywhere(load_tokenizer(write_metaspace(tmp_path / "base", scheme, **config)), tmp_path / "out")


# ---- BOS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": False}])
@pytest.mark.parametrize("named", ["<s>", "<|im_start|>", None, "absent"])
@pytest.mark.parametrize("template", [True, False])
def test_the_bos_of_training_is_that_of_transformers(template, named, flags, tmp_path):
    config = flags if named == "absent" else {"bos_token": named, **flags}
    folder = write_byte_level(tmp_path / "base", SPECIALS["chatml"], adds_bos=template, **config)
    if named == "absent":
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        del stated["bos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert [ours.bos_id] * ours.add_bos + ours.encode("a") == theirs("a")["input_ids"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    saved = saved_everywhere(ours, tmp_path / "out")
    if named == "<s>" and (not flags or (template and flags == {"add_bos_token": True})):
        assert all((saved / name).read_bytes() == content for name, content in before.items())


def test_an_older_map_that_names_another_bos_is_overruled_by_the_template(tmp_path):
    folder = write_byte_level(tmp_path / "base", SPECIALS["chatml"], bos_token="<|im_start|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|im_end|>"}}))
    ours = load_tokenizer(folder)
    assert (ours.bos_id, ours.add_bos) == (ours.special_ids["<s>"], True)
    saved_everywhere(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text()) == {"bos_token": "<s>"}


def test_a_template_of_two_tokens_is_refused(tmp_path):
    folder = write_byte_level(tmp_path, SPECIALS["chatml"])
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["post_processor"]["single"].insert(0, spec["post_processor"]["single"][0])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="puts 2 tokens before a text"):
        load_tokenizer(folder)


# ---- tokenizer.model alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, {}, {"add_bos_token": True, "legacy": False}, {"add_bos_token": False}])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"add_dummy_prefix": False}, {"model_type": "unigram", "vocab_size": 360}, {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"user_words": ["dogs,", "<|im_start|>", "\t"]},
    ],
    ids=["like llama", "no prefix", "unigram", "no bytes", "normalised", "user's words"],
)  # fmt: skip
def test_a_tokenizer_model_alone_is_saved_as_what_training_used(options, config, tmp_path):
    reference = train_sentencepiece(tmp_path / "base", **options)
    if config is not None:
        stated = {
            "tokenizer_class": "LlamaTokenizer", "chat_template": "x", "model_max_length": 77, "auto_map": {"a": "b"},
            "clean_up_tokenization_spaces": True, "sp_model_kwargs": {},
            "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True}, **config
        }  # fmt: skip
        (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(stated))
        (tmp_path / "base" / "special_tokens_map.json").write_text('{"unk_token": {"content": "<unk>"}}')
    ours = load_tokenizer(tmp_path / "base")
    assert not ours.warnings and ours.add_bos == ((config or {}).get("add_bos_token") is not False)
    for text in TEXTS:
        if "<|im_start|>" not in text:
            assert ours.encode(text) == reference.encode(text), repr(text)
    out = saved_everywhere(ours, tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == (tmp_path / "base" / "tokenizer.model").read_bytes()
    if config is not None:
        kept = json.loads((out / "tokenizer_config.json").read_text())
        assert kept["clean_up_tokenization_spaces"] is False  # "a ." stays as it was
        assert (kept["chat_template"], kept["model_max_length"]) == ("x", 77) and "auto_map" not in kept


def test_the_files_of_a_saved_tokenizer_model_do_not_change_again(tmp_path):
    train_sentencepiece(tmp_path / "base")
    load_tokenizer(tmp_path / "base").save(tmp_path / "once")
    load_tokenizer(tmp_path / "once").save(tmp_path / "twice")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("once", "twice")
    )
    assert first == second


def test_scores_that_a_tokenizer_json_cannot_say_are_told(tmp_path):
    """Of pieces of equal score the leftmost is merged first; a tokenizer.json knows only ranks."""
    tokens, scores, types, _ = list_pieces()
    scores = [-1000.0 if kind == 1 else 0.0 for kind in types]
    path = write_gguf(tmp_path / "m.gguf", "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2)
    ours = load_tokenizer(path)
    assert len(ours.warnings) == 1 and "cannot be written as a tokenizer.json" in ours.warnings[0]
    ours.save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert [load_tokenizer(tmp_path / "out").encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def keep_tokenizer_json(folder, scheme="prepend", **config):
    """Write what a tokenizer.model is saved as, without it. scheme: as write_metaspace's."""
    train_sentencepiece(folder)
    files = load_tokenizer(folder).files
    (folder / "tokenizer.model").unlink()
    spec = json.loads(files["tokenizer.json"])
    if scheme != "prepend":
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        spec |= {"normalizer": None, "pre_tokenizer": metaspace}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(json.loads(files["tokenizer_config.json"]) | config))
    return spec


@pytest.mark.parametrize("scheme", ["always", "first", "never", "prepend"])
def test_a_tokenizer_json_alone_gets_the_scores_that_llama_cpp_goes_by(scheme, tmp_path):
    keep_tokenizer_json(tmp_path / "base", scheme)
    ours = load_tokenizer(tmp_path / "base")
    ours.save(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    for text in TEXTS:
        assert processor.encode(text.lstrip(" ")) == ours.encode(text.lstrip(" ")), repr(text)
    again = load_tokenizer(tmp_path / "out")
    assert again.files == ours.files and again.special_ids == ours.special_ids
    assert processor.get_piece_size() == ours.vocab_size and processor.is_control(ours.eos_id)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)


@pytest.mark.parametrize("change", ["a word is added", "a merge is missing", "none"])
def test_no_tokenizer_model_is_written_that_would_give_other_ids(change, tmp_path):
    spec = keep_tokenizer_json(tmp_path)
    if change == "a word is added":
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 500, "content": "<think>", "special": False})
    if change == "a merge is missing":
        del spec["model"]["merges"][0]  # the word stays, so SentencePiece would make it
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert ("tokenizer.model" in load_tokenizer(tmp_path).files) == (change == "none")


# ---- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"add_space_prefix": False}, {"add_bos_token": False}])
def test_a_gguf_of_sentencepiece_keeps_pieces_scores_and_types(values, tmp_path):
    tokens, scores, types, _ = list_pieces()
    tokens, scores, types = [*tokens, "[PAD]", "<|im_end|>", ""], [*scores, 0.0, 0.0, 0.0], [*types, 3, 4, 5]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", "llama", tokens, types, scores=scores, **ids, **values))
    out = saved_everywhere(ours, tmp_path / "out")
    model = read_model((out / "tokenizer.model").read_bytes())
    assert model.tokens == [*tokens[:-1], f"[EMPTY_{len(tokens) - 1}]"]
    assert model.scores == pytest.approx(scores) and model.types == [*types[:-2], CONTROL, 5]
    assert model.has_prefix == values.get("add_space_prefix", True) and model.kind == BPE
    assert not model.charsmap and not model.removes_spaces and model.byte_fallback
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    for text in TEXTS:
        assert processor.encode(text) == ours.encode(text)


def test_a_gguf_with_many_unknown_tokens_or_none(tmp_path):
    """Phi-3's calls its 53 unused tokens unknown, and <unk> a control token."""
    tokens, scores, types, _ = list_pieces()
    for n, kind in ((3, 2), (0, 3)):
        names = [*tokens, *(f"[PAD{i}]" for i in range(n))]
        kinds, ids = [kind, *types[1:], *[2] * n], {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
        path = write_gguf(tmp_path / f"{n}.gguf", "llama", names, kinds, scores=scores + [0.0] * n, **ids)
        out = saved_everywhere(load_tokenizer(path), tmp_path / f"out{n}")
        assert read_model((out / "tokenizer.model").read_bytes()).types == [2, *types[1:], *[3] * n]


def cut(pre, text, tmp_path):
    """Return the words into which a byte-level GGUF cuts a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    values = {"merges": [], "eos_token_id": 0} | ({} if pre is None else {"pre": pre})
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", "gpt2", alphabet, [1] * 256, **values))
    spec = tokenizers.Tokenizer.from_str(ours.files["tokenizer.json"].decode())
    level = tokenizers.decoders.ByteLevel()
    words = [level.decode([word]) for word, _ in spec.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(words) == text
    return "|".join(words), ours


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [  # as llama.cpp cuts them
        ("gpt-2", "I|'ve| | 123456| USD|...|\n   | x|=$|1"),
        ("smollm", "I|'ve|  |1|2|3|4|5|6| USD|...|\n   | x|=$|1"),
        ("llama-bpe", "I|'ve| | |123|456| USD|...\n|   | x|=$|1"),
        ("smaug-bpe", "I|'ve| | |123|456| USD|...\n|   | x|=$|1"),
        ("deepseek-llm", "I|'|ve|  |123456| USD|...|\n|   | x|=$|1"),
        ("deepseek-coder", "I|'|ve|  |1|2|3|4|5|6| USD|...|\n|   | x|=$|1"),
        ("default", "I|'|ve| | |123|456| USD|...|\n   | x|=$|1"),
    ],
)
def test_a_gguf_is_cut_as_llama_cpp_cuts_it(pre, wanted, tmp_path):
    assert cut(pre, "I've  123456 USD...\n    x=$1", tmp_path)[0] == wanted


@pytest.mark.parametrize("pre", ["falcon3", "pixtral", "llama3", "llama-v3"])
def test_other_names_of_llama_bpe(pre, tmp_path):
    text = "I've  123456 USD...\n    x=$1"
    assert cut(pre, text, tmp_path)[0] == cut("llama-bpe", text, tmp_path)[0]


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_a_gguf_that_does_not_say_how_text_is_cut_is_told(pre, tmp_path):
    text = "It's 1234 + 5%"
    words, ours = cut(pre, text, tmp_path)
    assert words == cut("default", text, tmp_path)[0] != cut("gpt-2", text, tmp_path)[0]
    assert len(ours.warnings) == 1 and "tokenizer.ggml.pre is" in ours.warnings[0]
    assert not cut("gpt-2", text, tmp_path)[1].warnings


# ---- tokens of turns, tokens without an embedding -------------------------------------------------------------------


def test_chat_tokens_that_a_file_calls_words(tmp_path):
    folder = write_metaspace(tmp_path / "json", "always", special=False)
    train_sentencepiece(tmp_path / "model", user_words=SPECIALS["chatml"][2:])
    tokens, scores, types, _ = list_pieces()
    tokens, scores, types = [*tokens, *SPECIALS["chatml"][2:]], [*scores, 0.0, 0.0], [*types, 4, 4]
    gguf = write_gguf(tmp_path / "m.gguf", "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2)
    for path in (folder, tmp_path / "model", gguf):
        ours = load_tokenizer(path)
        begin, end = (ours.special_ids[token] for token in SPECIALS["chatml"][2:])
        ids = encode_rows([Row("f:1", (("user", "<|im_start|>"), ("assistant", "so")))], ours, "chatml").tokens.tolist()
        assert ids[0] == begin and (ids.count(begin), ids.count(end)) == (2, 2)
        assert begin not in ours.encode("say <|im_start|> now")


@pytest.mark.parametrize("kind", [1, 4], ids=["a piece", "a word of the user"])
def test_a_token_that_ends_a_text_is_special_whatever_its_file_calls_it(kind, tmp_path):
    """Text that spells it must not end an answer, nor an example of training."""
    tokens, scores, types, _ = list_pieces()
    pieces = {"scores": [*scores, 0.0], "bos_token_id": 1, "eos_token_id": len(tokens)}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    paths = {
        write_gguf(tmp_path / "pieces.gguf", "llama", [*tokens, "[END]"], [*types, kind], **pieces): "[END]",
        write_gguf(
            tmp_path / "bytes.gguf", "gpt2", [*alphabet, "[END]"], [1] * 256 + [kind], merges=[], pre="gpt-2",
            eos_token_id=256,
        ): "[END]",
    }  # fmt: skip
    train_sentencepiece(tmp_path / "model", user_words=["[END]"])
    model = read_model((tmp_path / "model" / "tokenizer.model").read_bytes())
    paths[tmp_path / "model"] = max((t for t, k in zip(model.tokens, model.types, strict=True) if k == kind), key=len)
    stated = {"eos_token": paths[tmp_path / "model"]}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(stated))
    for path, token in paths.items():
        ours = load_tokenizer(path)
        text = f"so {token} the".replace("\u2581", " ")
        assert ours.special_ids[token] == ours.eos_id and ours.eos_id not in ours.encode(text), path
        if path.suffix == ".gguf":  # nor in another program, by the files that are made of it
            (added,) = (t for t in json.loads(ours.files["tokenizer.json"])["added_tokens"] if t["content"] == token)
            assert added["special"]
            if "tokenizer.model" in ours.files:
                assert read_model(ours.files["tokenizer.model"]).types[ours.eos_id] == CONTROL


def test_words_that_are_no_chat_tokens_stay_words(tmp_path):
    ours = load_tokenizer(write_metaspace(tmp_path, "always", ["<think>", "   "], special=False))
    n = ours.vocab_size
    assert (
        n - 2 in ours.encode("so <think> the") and n - 1 in ours.encode("a   b") and "<think>" not in ours.special_ids
    )


def test_a_token_past_the_embedding_that_nothing_uses_is_left_out(tmp_path):
    folder = write_metaspace(tmp_path, "always", ["[PAD]", "<|im_start|>", "<|im_end|>"])
    n = load_tokenizer(folder).vocab_size
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, n - 1]}))
    assert load_tokenizer(folder).stop_ids == {2, n - 1}
    ours = find_tokenizer(replace(MODELS["tiny"], vocab_size=n - 3), "", folder)
    assert ours.stop_ids == {ours.eos_id} == {2}
    assert ours.vocab_size == n - 3 and "[PAD]" not in ours.special_ids and max(ours.encode("[PAD] the")) < n - 3
    assert ours.unembedded == {"[PAD]": n - 3, "<|im_start|>": n - 2, "<|im_end|>": n - 1}
    with pytest.raises(
        DataError, match=r"chatml needs the token <\|im_start\|>, whose id \d+ is past the model's embedd"
    ):
        encode_rows([Row("f:1", CHAT)], ours, "chatml")
    ours.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("changes", "special"), [({"eos_token": "[PAD]"}, True), ({}, False)])
def test_a_token_past_the_embedding_that_is_used_is_refused(changes, special, tmp_path):
    folder = write_metaspace(tmp_path, "always", ["[PAD]"], special, **changes)
    n = load_tokenizer(folder).vocab_size
    with pytest.raises(DataError, match="do not belong together"):
        find_tokenizer(replace(MODELS["tiny"], vocab_size=n - 1), "", folder)

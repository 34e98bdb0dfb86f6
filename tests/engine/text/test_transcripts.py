"""All that a tokenizer is, by the files it is read from, and all that rows become under each template."""

import hashlib
import json

import pytest

from engine.base.errors import DataError, UsageError
from engine.data.dataset import encode_rows
from engine.model.config import ModelConfig
from engine.text.chat_templates import (
    adopt_style,
    begins_with_bare_text,
    begins_with_bos,
    find_carried_style,
    pin_template,
)
from engine.text.parts import Special
from engine.text.sentencepiece_file import SentencePieceModel, write_model
from engine.text.templates import STYLES, Row, encode_prompt, find_stop_ids, render_row
from engine.text.tokenizer_files import find_tokenizer, load_tokenizer
from tests.engine.text.test_tokenizer import write_gguf
from tests.helpers.chat_tokenizers import CHATML, LLAMA3, SPECIALS, TOKENS, write_byte_level
from tests.helpers.spm_tokenizers import list_pieces, write_metaspace
from tests.helpers.transcripts import shorten

TEXTS = ["ab", " a", "a  b\n", "é12", "<s></s><|im_end|>", "the user"]


def write_byte_gguf(folder, pre=None, **values):
    tokens = [*TOKENS, *LLAMA3, "[UNK]", "more"]
    ids = {"bos_token_id": 257, "eos_token_id": 258, "eot_token_id": 261}
    types = [1] * len(TOKENS) + [3] * len(LLAMA3) + [2, 4]
    values = {"merges": ["a b"], **ids, **({} if pre is None else {"pre": pre}), **values}
    return write_gguf(folder / "m.gguf", "gpt2", tokens, types, **values)


def write_piece_gguf(folder, **values):
    tokens, scores, types, _ = list_pieces()
    tokens, scores, types = [*tokens, "[PAD]", "<|im_end|>", ""], [*scores, 0.0, 0.0, 0.0], [*types, 3, 4, 5]
    values = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": len(tokens) - 3, **values}
    return write_gguf(folder / "m.gguf", "llama", tokens, types, scores=scores, **values)


def write_pieces(folder, has_prefix=True, roles=None, files=None):
    """Write a tokenizer.model, and other files beside it."""
    tokens, scores, types, _ = list_pieces()
    model = SentencePieceModel(tokens, scores, types, byte_fallback=True, has_prefix=has_prefix)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(write_model(model, roles or {"unk": 0, "bos": 1, "eos": 2}))
    for name, value in (files or {}).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def write_changed(folder, change, scheme="prepend", **config):
    """Write a tokenizer.json of pieces without chat tokens after change(its content)."""
    write_metaspace(folder, scheme, (), **config)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def drop_bytes(spec):
    """Leave bytes out, so that what has no piece becomes the unknown token."""
    model = spec["model"]
    kept = [token for token in model["vocab"] if not token.startswith("<0x")]
    model |= {"byte_fallback": False, "vocab": {token: id for id, token in enumerate(kept)}}


def drop_bos(spec):
    spec["post_processor"] = None


def use_scores(spec):
    """Make a Unigram model of the pieces, of which the longer are likelier."""
    vocab = [[token, -float(20 - min(len(token), 10))] for token in spec["model"]["vocab"]]
    spec["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": vocab}


def write_saved_pieces(folder, has_bos):
    """Write the tokenizer.json that a tokenizer.model is saved as, and not the model."""
    spec = json.loads(load_tokenizer(write_pieces(folder)).files["tokenizer.json"])
    (folder / "tokenizer.model").unlink()
    names = {"bos_token": "<s>" if has_bos else None, "eos_token": "</s>", "unk_token": "<unk>"}
    if not has_bos:
        spec["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


STANFORD = {  # the files of a folder that a trainer of 2023 wrote
    "added_tokens": {"[PAD]": 413, "<|im_end|>": 414},
    "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>",
                           "additional_special_tokens": ["<|im_end|>", "<none>"]},
    "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "model_max_length": 512, "legacy": False,
                         "bos_token": {"content": "<s>"}, "add_bos_token": True},
    "generation_config": {"eos_token_id": [2, 414], "bos_token_id": 1},
}  # fmt: skip
KINDS = {
    "byte level": lambda folder: write_byte_level(folder, LLAMA3, eot_token="<|eot_id|>"),
    "byte level without bos": lambda folder: write_byte_level(folder, CHATML, adds_bos=False, add_bos_token=True),
    "byte level that names another bos": lambda folder: write_byte_level(folder, LLAMA3, bos_token="<|eot_id|>"),
    **{f"metaspace {scheme}": lambda folder, scheme=scheme: write_metaspace(folder, scheme)
       for scheme in ("never", "first", "always", "prepend")},
    "metaspace of few tokens": lambda folder: write_metaspace(folder, "prepend", tokens=()),
    "class": lambda folder: write_metaspace(folder, "never", tokens=(), tokenizer_class="LlamaTokenizer"),
    "legacy class": lambda folder: write_metaspace(folder, "never", tokenizer_class="LlamaTokenizerFast", legacy=True),
    "class without prefix": lambda folder: write_metaspace(
        folder, "always", tokenizer_class="LlamaTokenizer", add_prefix_space=False, legacy=True
    ),
    "metaspace without bytes": lambda folder: write_changed(folder, drop_bytes),
    "metaspace without bos": lambda folder: write_changed(folder, drop_bos, bos_token=None),
    "scores": lambda folder: write_changed(folder, use_scores, "always"),
    "saved pieces": lambda folder: write_saved_pieces(folder, True),
    "saved pieces without bos": lambda folder: write_saved_pieces(folder, False),
    "pieces": write_pieces,
    "pieces without prefix": lambda folder: write_pieces(folder, has_prefix=False),
    "pieces without bos": lambda folder: write_pieces(folder, roles={"unk": 0, "eos": 2}),
    "pieces of 2023": lambda folder: write_pieces(folder, files=STANFORD),
    "pieces that add no bos": lambda folder: write_pieces(
        folder, files={"tokenizer_config": {"add_bos_token": False, "chat_template": "{{ messages }}"}}
    ),
    "gguf of llama-bpe": lambda folder: write_byte_gguf(folder, "llama-bpe"),
    "gguf of smollm": lambda folder: write_byte_gguf(folder, "smollm", chat_template="x", add_bos_token=True),
    "gguf of nothing said": write_byte_gguf,
    "gguf of pieces": write_piece_gguf,
    "gguf of pieces without bos": lambda folder: write_piece_gguf(
        folder, add_bos_token=False, add_space_prefix=False, chat_template="x"
    ),
}  # fmt: skip


def describe_tokenizer(tokenizer):
    """Return what a tokenizer knows, gives and writes, a line each."""
    specials = dict(tokenizer.special_ids)
    lines = [
        f"{tokenizer.vocab_size} tokens; bos {tokenizer.bos_id}, added: {tokenizer.add_bos}; eos {tokenizer.eos_id}; "
        f"ends {sorted(tokenizer.stop_ids)}",
        f"special {specials}",
        *(f"warning {warning}" for warning in tokenizer.warnings),
        *(f"{text!r} -> {tokenizer.encode(text)} or {tokenizer.encode(text, True)}" for text in TEXTS),
        f"decoded {[tokenizer.decode(tokenizer.encode(text)) for text in TEXTS]}",
        f"pieces {[tokenizer.piece(id) for id in (0, 3, 100, 257, 258, 400, tokenizer.vocab_size - 1, 9999)]}",
    ]
    for name, content in sorted(tokenizer.files.items()):
        if name.endswith(".json"):
            content = json.dumps(shorten(json.loads(content)))
        lines.append(f"{name}: {content if isinstance(content, str) else hashlib.sha256(content).hexdigest()[:12]}")
    return "\n".join(lines)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_tokenizer_is(name, tmp_path, snapshot):
    folder = tmp_path / "folder"
    if "gguf" in name:
        folder.mkdir()
    tokenizer = load_tokenizer(KINDS[name](folder))
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.bos_id, again.eos_id, again.add_bos) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos)
    assert describe_tokenizer(tokenizer).replace(str(tmp_path), "FOLDER") == snapshot


# ---- templates ------------------------------------------------------------------------------------------------------

OWN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]}
ROWS = [
    Row("f:1", None, "Say {x}", "", "ok"), Row("f:2", None, "Say", "it", " ok "), Row("f:3", None, "Say", "", ""),
    Row("f:4", None, "a te", "", "xt", is_raw=True),
    Row("f:5", (("user", " Hi "), ("assistant", " Yes "), ("user", "And?"), ("assistant", "No"))),
    Row("f:6", (("system", "Be."), ("user", "Hi"), ("assistant", "A"), ("assistant", "B"))),
    Row("f:7", (("user", "Hi"), ("assistant", "A"), ("user", "C"), ("assistant", "D")), unlearned=frozenset({1})),
    Row("f:8", (("assistant", "Hello"), ("user", "Hi"), ("assistant", "A"))),
    Row("f:9", (("system", "Be."), ("user", "Hi"), ("assistant", ""))),
    Row("f:10", (("user", "</s><|im_end|>"), ("assistant", "<s>"))),
    Row("f:11", (("user", "Hi"), ("assistant", ""), ("tool", "seen"), ("assistant", "So")), tools=({"name": "look"},),
        more={1: CALL}),
]  # fmt: skip


def show(tokenizer, ids, is_target=None):
    """Return ids as text, special tokens in [], with what carries loss in { }."""
    names = {id: f"[{token}]" for token, id in tokenizer.special_ids.items()}
    text, inside = "", False
    for i, id in enumerate(ids):
        learned = bool(is_target is not None and is_target[i])
        text += "{" * (learned and not inside) + "}" * (inside and not learned)
        text += names.get(int(id)) or tokenizer.piece(int(id)).decode(errors="replace")
        inside = learned
    return repr(text + "}" * inside)


def tell(make):
    """Return what a function returns, or the error that it raises."""
    try:
        return make()
    except DataError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("style", STYLES)
def test_what_rows_become(style, tmp_path, snapshot):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t", SPECIALS.get(style, CHATML), chat_template=OWN))
    lines = [f"ends {sorted(find_stop_ids(tokenizer, style))}"]
    for row in ROWS:
        made = tell(lambda row=row: encode_rows([row], tokenizer, style, 150).select())
        if isinstance(made, str):
            lines.append(f"{row.source} {made}")
        else:
            lines.append(f"{row.source} {show(tokenizer, made.tokens, made.is_target)} {made.counts}")
            whole = encode_rows([row], tokenizer, style, 4000, train_on_prompt=not row.unlearned).select()
            lines.append(f"    {int(whole.is_target.sum())} of {len(whole.tokens)} of the whole row")
        lines.append(f"    {tell(lambda row=row: show(tokenizer, encode_prompt(row, tokenizer, style)))}")
        parts = tell(lambda row=row: render_row(row, style, tokenizer))
        if not isinstance(parts, str):
            lines.append(
                f"    after a special token: {[p.follows_special for p in parts if not isinstance(p, Special)]}"
            )
    assert "\n".join(lines) == snapshot


@pytest.mark.parametrize("given", ["gguf", "folder"])
@pytest.mark.parametrize("is_same", [True, False])
def test_a_given_tokenizer_of_other_ids_is_refused_in_either_form(given, is_same, tmp_path):
    """The model's own and the given one: one in a folder, the other in a .gguf."""
    folder = write_byte_level(tmp_path / "folder", LLAMA3)
    if not is_same:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(
            text.replace('"c": ', '"?": ').replace('"d": ', '"c": ').replace('"?": ', '"d": ')
        )
    gguf = write_byte_gguf(tmp_path, "gpt-2")
    name, model = (gguf, folder) if given == "gguf" else (folder, gguf)
    config = ModelConfig(
        dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=128, norm_eps=1e-5
    )
    told = tell(lambda: find_tokenizer(config, str(name), model).bos_id)
    if is_same:
        assert told == 257
    else:
        assert told.startswith(
            f"refused: --tokenizer {name}: 2 of its ids are other text in the model's own tokenizer, the "
        )
        assert told.endswith(f"take the tokenizer's files out of {model} if they are the wrong ones")


def test_a_tokenizer_of_more_tokens_than_the_model_embeds_is_refused(tmp_path):
    gguf = write_byte_gguf(tmp_path, "gpt-2")
    shape = dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=128, norm_eps=1e-5)
    assert find_tokenizer(ModelConfig(vocab_size=264, **shape), str(gguf), None).vocab_size == 264
    told = tell(lambda: find_tokenizer(ModelConfig(vocab_size=263, **shape), str(gguf), None))
    assert told == f"refused: {gguf}: the tokenizer has 264 tokens, the model embeds 263; they do not belong together"
    with pytest.raises(UsageError, match="--random-init with 263 tokens needs --tokenizer, a folder"):
        find_tokenizer(ModelConfig(vocab_size=263, **shape), "", None)


# ---- the files that go with a model of a style -----------------------------------------------------------------------

ADOPTED = {
    "byte level": lambda folder: write_byte_level(folder, (*CHATML, *LLAMA3[2:]), chat_template=OWN),
    "metaspace": lambda folder: write_metaspace(folder, "first", chat_template=f"x{OWN[15:]}"),
    "class": lambda folder: write_metaspace(folder, "never", tokenizer_class="LlamaTokenizer"),
    "pieces": lambda folder: write_pieces(folder, files=STANFORD),
}  # fmt: skip


def tell_changes(before, after):
    """Return what differs between the files of two tokenizers, by the keys of their JSON; templates by their hash."""
    lines = []
    for name in sorted(before | after):
        if before.get(name) == after.get(name):
            continue
        if name not in after:
            lines.append(f"{name} is gone")
            continue
        old, new = (json.loads(files.get(name, b"{}")) for files in (before, after))
        for key in old | new:
            if old.get(key) != new.get(key):
                text = json.dumps(shorten(new.get(key, "GONE")))
                lines.append(
                    f"{name} {key}: {text if len(text) < 230 else hashlib.sha256(text.encode()).hexdigest()[:12]}"
                )
    return lines


@pytest.mark.parametrize("kind", ADOPTED)
def test_what_goes_with_a_model_of_a_style(kind, tmp_path, snapshot):
    tokenizer, lines = load_tokenizer(ADOPTED[kind](tmp_path / "t")), []
    lines.append(f"carries {find_carried_style(tokenizer)}")
    for style in STYLES:
        adopted = tell(lambda style=style: adopt_style(tokenizer, style))
        lines.append(f"== {style}")
        if isinstance(adopted, str):
            lines.append(adopted)
            continue
        told = f"eos {adopted.eos_id}, ends {sorted(adopted.stop_ids)}, bos {adopted.bos_id} added: {adopted.add_bos}"
        lines += [told, *tell_changes(tokenizer.files, adopted.files)]
        assert find_carried_style(adopted) == style or style == "template"
    assert "\n".join(lines) == snapshot


def test_templates_whose_day_is_pinned(snapshot):
    """Once, whatever they ask; those that ask for no day are left as they are."""
    lines = []
    for template in (
        "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%H\") }}",
        "  {% if date_string is defined %}{{ date_string }}{% endif %}",
        "\n{{ datetime }} {{ my_datetime }}", "{{ strftime_now(f) }}", "{{ messages }}", "{{ update_strings }}",
    ):  # fmt: skip
        pinned = pin_template(template)
        assert pin_template(pinned) == pinned
        lines.append(repr(pinned))
    assert "\n".join(lines) == snapshot


@pytest.mark.parametrize(
    ("begin", "is_bare"),
    [("x", True), (" x", False), ("▁x", False), ("{{ bos_token }}x", False), ("{{ bos_token }}", False)],
)
def test_a_text_begins_bare_without_a_space_or_a_special_token(begin, is_bare, tmp_path):
    """Also one that is written as SentencePiece writes it: it would get a second one."""
    tokenizer = load_tokenizer(write_metaspace(tmp_path / "t", "first", chat_template=f"{begin}{OWN[15:]}"))
    assert begins_with_bare_text(tokenizer) == is_bare
    assert begins_with_bos(tokenizer, "template") == ("bos_token" in begin)

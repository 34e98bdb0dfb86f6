"""The chat template that travels with a model, against transformers on the written folder."""

import json

import pytest
from transformers import AutoTokenizer

from engine.data.dataset import encode_rows
from engine.text.chat_templates import (
    adopt_style,
    find_carried_style,
    pin_template,
    quote,
    settle_template,
    without_template_bos,
    write_chat_template,
)
from engine.text.own_template import compile_template, read_chat_templates
from engine.text.templates import Row, encode_prompt, find_stop_ids
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import CHATML, LLAMA3, SPECIALS, TOKENS, write_byte_level
from tests.helpers.spm_tokenizers import write_metaspace

OWN = "{{ bos_token }}You are Tim. {% for m in messages %}{{ m.content }}{% endfor %}"
QUESTION = " It's \\n a 'test' {{ x }} of\n\n\"quotes\" and é 漢 \n"
CHAT = (("system", " Be brief.\n"), ("user", QUESTION), ("assistant", " Yes. "), ("user", "Why?"), ("assistant", "So."))
styles = pytest.mark.parametrize("style", SPECIALS)


def adopted(folder, style, specials=None, **options):
    tokenizer = load_tokenizer(write_byte_level(folder / "base", specials or SPECIALS[style], **options))
    adopt_style(tokenizer, style).save(folder / "out")
    return tokenizer, AutoTokenizer.from_pretrained(folder / "out")


def their_ids(theirs, messages, answer_next=False):
    messages = [{"role": role, "content": content} for role, content in messages]
    return theirs.apply_chat_template(messages, add_generation_prompt=answer_next)["input_ids"]


@styles
@pytest.mark.parametrize("adds_bos", [True, False])
def test_transformers_makes_the_prompt_of_training(style, adds_bos, tmp_path):
    ours, theirs = adopted(tmp_path, style, adds_bos=adds_bos, chat_template=OWN)
    for question in ("Name a colour.", QUESTION):
        row = Row("f:1", None, question, "", "Red.")
        assert their_ids(theirs, (("user", question),), True) == encode_prompt(row, ours, style)
        trained = encode_rows([row], ours, style).tokens.tolist()
        assert their_ids(theirs, (("user", question), ("assistant", "Red."))) == trained
    if style != "alpaca":
        assert their_ids(theirs, CHAT) == encode_rows([Row("f:1", CHAT)], ours, style).tokens.tolist()
        assert their_ids(theirs, CHAT[:-1], True) == encode_prompt(Row("f:1", CHAT), ours, style)


@styles
def test_what_ends_an_answer_is_said(style, tmp_path):
    ours, theirs = adopted(tmp_path, style)
    again = load_tokenizer(tmp_path / "out")
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(style, SPECIALS[style][1])
    assert theirs.eos_token == ends and again.eos_id == ours.special_ids[ends]
    changed = adopt_style(ours, style)
    assert changed.stop_ids == find_stop_ids(ours, style) == ours.stop_ids | {again.eos_id}
    assert (changed.eos_id, changed.add_bos, changed.bos_id) == (again.eos_id, again.add_bos, again.bos_id)
    assert theirs("hi")["input_ids"] == [ours.bos_id] * again.add_bos + ours.encode("hi")
    assert again.add_bos == (style != "chatml")  # llama.cpp adds BOS to a chat where it adds it to a text


@styles
def test_the_style_is_found_again(style, tmp_path):
    ours, _ = adopted(tmp_path, style)
    assert find_carried_style(ours) == "alpaca"  # none is carried
    again = load_tokenizer(tmp_path / "out")
    assert find_carried_style(again) == style
    assert adopt_style(again, style).files == again.files


@styles
def test_a_chat_that_a_style_does_not_know_gives_a_prompt(style, tmp_path):
    """llama.cpp tries a template on a system message and three turns, and takes ChatML where it fails."""
    _, theirs = adopted(tmp_path, style)
    text = theirs.decode(their_ids(theirs, CHAT[:-1], True))
    places = [text.index(content.strip()) for _, content in CHAT[:-1]]
    assert places == sorted(places)


def test_an_empty_system_message_leaves_alpacas_first_sentences(tmp_path):
    ours, theirs = adopted(tmp_path, "alpaca")
    ids = encode_prompt(Row("f:1", None, "Hi"), ours)
    assert their_ids(theirs, (("system", ""), ("user", "Hi")), True) == ids
    assert their_ids(theirs, (("system", "Be brief."), ("user", "Hi")), True) != ids


def test_one_template_is_left_where_a_base_has_two(tmp_path):
    base = write_byte_level(tmp_path / "base", CHATML, chat_template=OWN)
    (base / "chat_template.jinja").write_text("other" + OWN)
    tokenizer = load_tokenizer(base)
    assert (
        read_chat_templates(tokenizer)["default"] == "other" + OWN == AutoTokenizer.from_pretrained(base).chat_template
    )
    settle_template(tokenizer).save(base)
    assert not (base / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(base).chat_template == "other" + OWN
    adopt_style(tokenizer, "chatml").save(base)
    assert not (base / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(base).chat_template == write_chat_template("chatml", tokenizer)


def test_tokens_keep_their_flags_and_an_older_map_agrees(tmp_path):
    bos = {"content": LLAMA3[0], "__type": "AddedToken", **FLAGS_OF_A_TOKEN}
    base = write_byte_level(tmp_path / "base", LLAMA3, bos_token=bos)
    (base / "special_tokens_map.json").write_text(json.dumps({"bos_token": LLAMA3[0], "eos_token": LLAMA3[1]}))
    adopt_style(load_tokenizer(base), "llama3").save(tmp_path / "out")
    config, older = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    assert config["bos_token"] == bos and config["eos_token"] == older["eos_token"] == "<|eot_id|>"
    assert load_tokenizer(tmp_path / "out").eos_id == len(TOKENS) + 4


@pytest.mark.parametrize("text", ["it's", "a\\'b", "\n'\\n", '"', "{{ x }} {% y %}", ""])
def test_any_text_can_stand_in_a_template(text):
    assert compile_template(f"{{{{ {quote(text)} }}}}").render() == text


def test_a_style_without_bos_says_so_in_every_file(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML, adds_bos=True))
    for style, adds in (("chatml", None), ("llama2", True)):
        files = adopt_style(tokenizer, style).files
        assert json.loads(files["tokenizer_config.json"]).get("add_bos_token", True) is (adds is True)
        assert (CHATML[0] in str(json.loads(files["tokenizer.json"])["post_processor"])) == (adds is True)


def test_without_bos_no_pair_of_texts_begins_with_it_either():
    """Nor does the tokenizer name BOS among the tokens that it puts around texts."""
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    step = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, bos, text]}
    step["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    for steps in (step, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, step]}):
        files = without_template_bos({"tokenizer.json": json.dumps({"post_processor": steps})}, "<s>")
        left = json.loads(files["tokenizer.json"])["post_processor"]
        left = left.get("processors", [left])[-1]
        assert (left["single"], left["pair"], left["special_tokens"]) == ([text], [text, text], {})
    assert without_template_bos({}, "<s>") == {}


@pytest.mark.parametrize(("scheme", "text"), [("first", " the user"), ("always", "the user"), ("never", "the user")])
def test_an_own_template_writes_the_space_that_is_put_before_the_first_text_alone(scheme, text, tmp_path):
    """Beside add_prefix_space: false no program puts one there."""
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    base = write_metaspace(tmp_path / "base", scheme, chat_template=own)
    ours = load_tokenizer(base)
    adopt_style(ours, "template").save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    written = compile_template(config["chat_template"]).render(messages=[{"role": "user", "content": "the user"}])
    assert written == text and config.get("add_prefix_space", True) is (scheme != "first")
    asked = encode_prompt(Row("f:1", None, "the user", "", "name"), ours, "template")
    assert their_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), (("user", "the user"),), True) == asked


@pytest.mark.parametrize("style", ["template", "chatml"])
def test_a_checkpoints_own_template_keeps_the_blanks_that_its_tokens_swallow(style, tmp_path):
    base = write_byte_level(tmp_path / "base", CHATML, chat_template=OWN)
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["added_tokens"][3] |= {"lstrip": True, "rstrip": True, "normalized": True, "single_word": True}
    (base / "tokenizer.json").write_text(json.dumps(spec))
    files = adopt_style(load_tokenizer(base), style).files
    (token,) = (t for t in json.loads(files["tokenizer.json"])["added_tokens"] if t["content"] == CHATML[3])
    assert (token["lstrip"], token["rstrip"]) == (style == "template",) * 2
    assert not token["normalized"] and not token["single_word"]


@pytest.mark.parametrize("template", ["{{ strftime_now('%d %b') }}", "{{ date_string }}", "{{ 'no date' }}"])
def test_a_day_is_pinned_once(template):
    pinned = pin_template(template)
    assert pin_template(pinned) == pinned and (pinned == template) == ("no date" in template)


FLAGS_OF_A_TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


SPACES = {
    "first": ("first", {}),
    "always": ("always", {}),
    "never": ("never", {}),
    "prepend": ("prepend", {}),
    "legacy": ("always", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "not legacy": ("always", {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
    "class alone": ("prepend", {"tokenizer_class": "LlamaTokenizer"}),
}


@styles
@pytest.mark.parametrize("space", SPACES)
def test_spaces_before_texts(style, space, tmp_path):
    """A space that a tokenizer puts before the first text alone stands behind Alpaca's BOS too, as in training."""
    scheme, config = SPACES[space]
    base = write_metaspace(tmp_path / "base", scheme, **config)
    config = json.loads((base / "tokenizer_config.json").read_text())
    if style == "llama3":
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": LLAMA3[0]}))
    ours, before = load_tokenizer(base), AutoTokenizer.from_pretrained(base)
    adopt_style(ours, style).save(tmp_path / "out")
    again, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for question in ("the user", " the user"):
        row = Row("f:1", None, question, "", "name")
        asked = their_ids(theirs, (("user", question),), True)
        assert asked == encode_prompt(row, ours, style) == encode_prompt(row, again, style)
        assert (
            their_ids(theirs, (("user", question), ("assistant", "name")))
            == encode_rows([row], ours, style).tokens.tolist()
        )
        assert theirs(question)["input_ids"] == [ours.bos_id] * again.add_bos + ours.encode(question)
        plain = before.encode(question, add_special_tokens=False)
        assert (
            plain
            == theirs.encode(question, add_special_tokens=False)
            == again.encode(question)
            == ours.encode(question)
        )
    if style != "alpaca":
        assert their_ids(theirs, CHAT[:-1], True) == encode_prompt(Row("f:1", CHAT), ours, style)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    puts_none = before.encode("the", add_special_tokens=False) != before.encode("</s>the", add_special_tokens=False)[1:]
    assert (config.get("add_prefix_space") is False) == (puts_none and style != "alpaca")  # which llama.cpp goes by

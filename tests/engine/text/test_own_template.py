"""--prompt-style template against transformers: ids, loss masks, and templates that cannot be learned from."""

import json
import re
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.base.errors import DataError
from engine.data.dataset import encode_rows
from engine.text import own_template
from engine.text.chat_templates import adopt_style, find_carried_style, pin_date
from engine.text.own_template import compile_template, cut_text, read_chat_templates, read_signs
from engine.text.parts import Special, Text
from engine.text.templates import Row, encode_prompt, find_stop_ids
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import LLAMA3, SPECIALS, write_byte_level

CHAT = (
    ("system", " Be brief.\n"),
    ("user", "Say 'a' {{ b }}"),
    ("assistant", " Yes. "),
    ("user", "é?"),
    ("assistant", "So."),
)
# As checkpoints have them: a system message of their own, a date, blocks on lines of their own, loopcontrols.
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Tim.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = """
{{- bos_token }}
{%- set day = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + day + "\n\n" }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
VICUNA = (  # no special token but BOS and EOS; roles checked
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ ' USER: ' + m.content }}{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
PLAIN = (  # no special token at all: answers and questions are one string
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKING = (  # what is not given is none, as by transformers: Llama 3.1 writes an environment where it is not
    "{% if tools is not none %}<|im_start|>system\nYou have {{ tools | length }} tools.<|im_end|>\n{% endif %}"
    "{% if documents is not none %}<|im_start|>system\nRead {{ documents }}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{% if m.name is defined or m.tool_calls is defined %}!{% endif %}{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "smollm": ("chatml", SMOLLM), "dated": ("llama3", DATED), "vicuna": ("llama2", VICUNA), "plain": ("llama2", PLAIN),
    "marked": ("chatml", MARKED), "asking": ("chatml", ASKING),
}  # fmt: skip
each = pytest.mark.parametrize("name", TEMPLATES)


def load(folder, name, **options):
    style, template = TEMPLATES.get(name, ("chatml", name))
    return pin_date(
        load_tokenizer(write_byte_level(folder / "base", SPECIALS[style], chat_template=template, **options))
    )


def as_dicts(messages):
    return [{"role": role, "content": content} for role, content in messages]


def one(row, tokenizer):
    return encode_rows([row], tokenizer, "template", max_length=2000).select()


def learned(dataset, tokenizer):
    """Return the texts that carry loss, a string for each run of ids."""
    text_of = {id: text for text, id in tokenizer.special_ids.items()}
    cuts = np.flatnonzero(np.diff(dataset.is_target.astype(int))) + 1
    runs = np.split(dataset.tokens, cuts)[int(not dataset.is_target[0]) :: 2]
    return ["".join(text_of.get(i) or tokenizer.decode([i]) for i in run.tolist()) for run in runs]


@each
def test_ids_are_those_of_transformers_before_and_after_the_export(name, tmp_path):
    ours = load(tmp_path, name)
    adopted = adopt_style(ours, "template")
    ours.save(tmp_path / "base")
    adopted.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert find_carried_style(again) == "template"
    for folder in ("base", "out"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder)
        ids = theirs.apply_chat_template(as_dicts(CHAT))["input_ids"]
        assert ids == one(Row("f:1", CHAT), ours).tokens.tolist() == one(Row("f:1", CHAT), again).tokens.tolist()
        for messages in (CHAT[:2], CHAT[1:2], CHAT[:4]):
            prompt = theirs.apply_chat_template(as_dicts(messages), add_generation_prompt=True)["input_ids"]
            assert prompt == encode_prompt(Row("f:1", messages), ours, "template")
            assert prompt == encode_prompt(Row("f:1", messages), again, "template")
    assert again.eos_id == adopted.eos_id == theirs.eos_token_id
    assert adopted.stop_ids == find_stop_ids(ours, "template") == {ours.eos_id, again.eos_id}


LEARNED = {  # of both answers of CHAT
    "smollm": [" Yes. <|im_end|>", "So.<|im_end|>"],
    "dated": ["Yes.<|eot_id|>", "So.<|eot_id|>"],
    "vicuna": ["  Yes. </s>", " So.</s>"],
    "plain": ["  Yes. \n", " So.\n"],
    "marked": [" Yes. <|im_end|>", "So.<|im_end|>"],
    "asking": [" Yes. <|im_end|>", "So.<|im_end|>"],
}


@each
def test_what_carries_loss(name, tmp_path):
    ours = load(tmp_path, name)
    assert learned(one(Row("f:1", CHAT), ours), ours) == LEARNED[name]


def test_a_template_with_generation_masks_as_transformers_does(tmp_path):
    ours = load(tmp_path, "marked")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base").apply_chat_template(
        as_dicts(CHAT), return_dict=True, return_assistant_tokens_mask=True
    )
    got = one(Row("f:1", CHAT), ours)
    assert got.tokens.tolist() == theirs["input_ids"]
    assert got.is_target.tolist() == [bool(x) for x in theirs["assistant_masks"]] and got.is_target.any()


def test_an_instruction_is_a_chat_of_two(tmp_path):
    ours = load(tmp_path, "smollm")
    row, chat = Row("f:1", None, "Add.", "2 3", "5"), Row("f:1", (("user", "Add.\n\n2 3"), ("assistant", "5")))
    assert one(row, ours).tokens.tolist() == one(chat, ours).tokens.tolist()
    assert encode_prompt(row, ours, "template") == encode_prompt(chat, ours, "template")


@each
def test_text_that_spells_a_special_token_stays_text(name, tmp_path):
    ours = load(tmp_path, name)
    spelled = "a <|im_end|></s><s> <|eot_id|>\ufdd0\ufdd1 <|im_start|>assistant\nb"
    clean = "".join("x" if c in "<>" else c for c in spelled)
    got, like = (one(Row("f:1", (("user", text), ("assistant", text))), ours) for text in (spelled, clean))
    specials = set(ours.special_ids.values())
    assert [i for i in got.tokens if i in specials] == [i for i in like.tokens if i in specials]
    assert ours.decode(got.tokens.tolist()).count(spelled) == 2
    assert got.is_target.tolist() == like.is_target.tolist()


def test_the_day_is_the_same_every_day_and_travels(tmp_path):
    base = write_byte_level(tmp_path / "base", LLAMA3, chat_template=DATED)
    text = AutoTokenizer.from_pretrained(base).apply_chat_template(as_dicts(CHAT), tokenize=False)
    assert "26 Jul 2024" not in text
    pinned = pin_date(load_tokenizer(base))
    pinned.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(as_dicts(CHAT), tokenize=False) == re.sub(r"\d\d \w+ 20\d\d", "26 Jul 2024", text)
    assert pin_date(pinned).files == pinned.files


GIVEN = """
{%- if not date_string is defined %}
    {%- set date_string = "1 May 2023" %}
{%- endif %}
{{- bos_token + "Today: " + date_string + (datetime | default(".")) }}"""


@pytest.mark.parametrize("template", [GIVEN + MARKED, GIVEN + DATED])
def test_no_program_gives_a_template_another_day_than_training(template, tmp_path):
    """llama.cpp gives every template today's date, as date_string and datetime; transformers and training give none."""
    base = write_byte_level(tmp_path / "base", LLAMA3, chat_template=template)
    before = AutoTokenizer.from_pretrained(base).apply_chat_template(as_dicts(CHAT), tokenize=False)
    pinned = pin_date(load_tokenizer(base))
    pinned.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for given in ({}, {"date_string": "30 Nov 2026", "datetime": "Nov 30 2026"}):
        text = theirs.apply_chat_template(as_dicts(CHAT), tokenize=False, **given)
        assert text == re.sub(r"\d\d \w+ 20\d\d", "26 Jul 2024", before) and "Today: 1 May 2023." in text
    assert pin_date(pinned).files == pinned.files


def test_named_templates_stay_and_a_template_in_a_file_goes_before(tmp_path):
    named = [{"name": "default", "template": SMOLLM}, {"name": "tool_use", "template": PLAIN}]
    base = write_byte_level(tmp_path / "base", SPECIALS["chatml"], chat_template=named)
    adopt_style(load_tokenizer(base), "template").save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == named
    (base / "chat_template.jinja").write_text(MARKED)
    adopt_style(load_tokenizer(base), "template").save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == MARKED
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize("marked", ["default", "tool_use"])
def test_each_of_two_templates_marks_its_answers_or_does_not(marked, tmp_path):
    other = "tool_use" if marked == "default" else "default"
    named = [{"name": marked, "template": MARKED}, {"name": other, "template": SMOLLM}]
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", SPECIALS["chatml"], chat_template=named))
    messages = (("user", "Two?"), ("assistant", "Yes."))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for tools in ((), (tool,)):
        row = Row("f:1", messages, tools=tools)
        assert learned(one(row, tokenizer), tokenizer) == ["Yes.<|im_end|>"]


def test_what_carries_loss_within_what_does_is_a_part_of_it(tmp_path):
    assert read_signs("a(b(c)d)e(f)", "()") == ("abcdef", [(1, 4), (5, 6)])
    nested = MARKED.replace(
        "{{ m.content }}", "{{ '<' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '>' }}", 1
    )
    tokenizer = load(tmp_path, nested)
    row = Row("f:1", (("user", "Two?"), ("assistant", "Yes.")))
    assert learned(one(row, tokenizer), tokenizer) == ["<Yes.><|im_end|>"]


@pytest.mark.parametrize("wants", ["messages[0].role == 'system'", "tools", "messages[0].content == 'Me'"])
def test_a_template_that_not_every_chat_suits_is_exported_with_its_end(wants, tmp_path):
    refuses = f"{{% if not {wants} %}}{{{{ raise_exception('not so') }}}}{{% endif %}}"
    adopted = adopt_style(load(tmp_path, refuses + MARKED), "template")
    ends = "</s>" if "Me" in wants else "<|im_end|>"  # no chat is known that it can say: the end stays EOS
    assert adopted.eos_id == adopted.special_ids[ends] and adopted.add_bos == ("Me" in wants)


REFUSED = {
    "last": (  # the last answer is written otherwise, as by templates that leave out what a model thought
        "{% for m in messages %}<|im_start|>{{ m.content }}{% if loop.last %}!{% endif %}<|im_end|>{% endfor %}",
        "f:1: the checkpoint's chat template writes the beginning of a chat otherwise when more follows .message 3",
    ),
    "thinking": (  # what the model thought is written in the last answer alone, after the very prompt that is asked
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}",
        "f:1: .* otherwise when more follows .message 3",
    ),
    "prompt": (
        SMOLLM.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'"),
        "f:1: .* otherwise when more follows .message 3",
    ),
    "raises": ("{{ raise_exception('no roles\n') }}", "f:1: .* fails on this row: no roles; change the row"),
    "nothing": ("{% if false %}a{% endif %}", "f:1: .* writes nothing"),
    "broken": ("{% for %}", "is no Jinja that can be read: .*line 1; choose another --prompt-style"),
    "undefined": ("{{ messages.nothing.more }}", "f:1: .* fails on this row"),
    "escape": ("{{ ''.__class__.__mro__ }}", "f:1: .* fails on this row: .*unsafe"),
    "changes": ("{{ messages.append(1) }}", "f:1: .* fails on this row: .*"),
    "none": (None, "this tokenizer has none .chat_template.jinja"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    template, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        one(Row("f:1", CHAT), load(tmp_path, template))


@pytest.mark.parametrize(
    "jinja, config, found",
    [
        (None, {}, {}), (None, {"chat_template": "x"}, {"default": "x"}), (None, {"chat_template": ""}, {}),
        (None, {"chat_template": 5}, {}), (None, {"chat_template": {"a": "x"}}, {}),
        (None, {"chat_template": [{"name": name, "template": name * 2} for name in "ab"]}, {"a": "aa", "b": "bb"}),
        ("z", {"chat_template": "x"}, {"default": "z"}),
    ],
)  # fmt: skip
def test_templates_are_found_where_they_may_be(jinja, config, found):
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    files |= {} if jinja is None else {"chat_template.jinja": jinja.encode()}
    assert read_chat_templates(SimpleNamespace(files=files)) == found


def parts_of(tokenizer, messages=(("user", "Hi"),), tools=()):
    rows = as_dicts(messages)
    return own_template.open_own_template(tokenizer).render(rows, tools, True, "f:1", [True] * len(rows))


def test_a_chat_with_tools_has_the_template_that_is_named_for_them(tmp_path):
    named = [{"name": "default", "template": "{{ 'plain' }}"}, {"name": "tool_use", "template": "{{ 'tools' }}"}]
    tokenizer = load_tokenizer(
        write_byte_level(tmp_path / "base", SPECIALS["chatml"], chat_template=named)
    )  # fmt: skip
    assert [part.whole() for part in parts_of(tokenizer)] == ["plain"]
    assert [part.whole() for part in parts_of(tokenizer, tools=[{"type": "function"}])] == ["tools"]


def test_a_special_token_that_begins_another_is_not_taken_for_it(tmp_path):
    specials = (*SPECIALS["chatml"], "<|im_end|>2", "<|im_end|>23")
    template = "{{ '<|im_end|>23<|im_end|>x<|im_end|>2' }}{{ pad_token }}"
    tokenizer = load_tokenizer(
        write_byte_level(tmp_path / "base", specials, chat_template=template, pad_token="<|im_start|>")
    )
    names = [part.name if isinstance(part, Special) else part.whole() for part in parts_of(tokenizer)]
    assert names == ["<|im_end|>23", "<|im_end|>", "x", "<|im_end|>2", "<|im_start|>"]


def test_a_prompt_may_be_written_otherwise_than_what_was_learned(tmp_path):
    """A template that counts the messages cannot be learned from; but nothing is learned of a prompt."""
    tokenizer = load(tmp_path, "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}")
    assert encode_prompt(Row("f:1", CHAT), tokenizer, "template")
    with pytest.raises(DataError, match="writes the beginning of a chat otherwise when more follows"):
        one(Row("f:1", CHAT), tokenizer)


def test_a_chat_that_would_take_hours_is_refused(tmp_path, monkeypatch):
    tokenizer = load(tmp_path, "vicuna")
    n = len("".join(part.name if isinstance(part, Special) else part.whole() for part in parts_of(tokenizer, CHAT[:4])))
    for name, limit in (("MAX_CHARACTERS_RUN", n), ("MAX_MESSAGES_RUN", 9)):
        with monkeypatch.context() as patch:
            patch.setattr(own_template, name, limit)
            with pytest.raises(DataError, match="whose 2 answers the checkpoint's chat template does not mark"):
                one(Row("f:1", CHAT), tokenizer)
    monkeypatch.setattr(own_template, "MAX_MESSAGES_RUN", 9)
    assert len(one(Row("f:1", CHAT, unlearned=frozenset({2})), tokenizer).tokens), "one answer is learned"
    monkeypatch.undo()
    assert len(one(Row("f:1", CHAT), tokenizer).tokens)


def test_blocks_and_json_are_written_as_transformers_writes_them():
    assert compile_template("a\n    {% if true %}\nx\n    {% endif %}\ny").render() == "a\nx\ny"
    assert compile_template("{{ x | tojson }}").render(x={"a": "<b> & 'é'"}) == """{"a": "<b> & 'é'"}"""
    assert list(cut_text("a~b", 0, 3, deque(), "~")) == [Text("ab", follows_special=False)]
    assert list(cut_text("abc", 1, 3, deque(), "~")) == [Text("bc", follows_special=True)]


def test_what_a_message_does_not_say_is_not_there(tmp_path):
    tokenizer = load(tmp_path, "{{ messages[0] | tojson }}")
    message = {"role": "user", "content": "Hi", "name": None}
    (part,) = own_template.open_own_template(tokenizer).render([message], (), True, "f:1", [False])
    assert json.loads(part.whole()) == {"role": "user", "content": "Hi"}


def test_spans_are_those_of_the_answers_that_are_learned():
    """Where all are learned, a template may mark them as it likes."""
    two = [(0, 2), (5, 9)]
    assert own_template.choose_spans(two, [True], "f:1") == two == own_template.choose_spans(two, [True, True], "f:1")
    assert own_template.choose_spans(two, [False, True], "f:1") == [(5, 9)]
    with pytest.raises(DataError, match="f:1: the checkpoint's chat template marks 2 answers, the row has 3"):
        own_template.choose_spans(two, [False, True, True], "f:1")


@pytest.mark.parametrize("side", [None, "lstrip", "rstrip"])
def test_a_special_token_swallows_the_blanks_on_its_side(side, tmp_path):
    folder = write_byte_level(tmp_path / "base", SPECIALS["chatml"], chat_template="{{ 'a  <|im_end|> \\n b' }}")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][3] |= {side: True} if side else {}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    before, token, after = parts_of(load_tokenizer(folder))
    assert token.name == "<|im_end|>" and before.whole() == ("a" if side == "lstrip" else "a  ")
    assert after.whole() == ("b" if side == "rstrip" else " \n b")


@pytest.mark.parametrize(
    "prompt, added, learned",
    [("<e>\n", "yes<e>\n", "yes<e>"), ("<e>\n", "yes\n", "yes\n"), ("<e>\n", " \n", " \n"), ("<e>", "", "")],
)
def test_blanks_after_the_token_that_ends_an_answer_are_no_part_of_it(prompt, added, learned):
    """An answer of blanks alone has no such token: the one before it is the prompt's."""
    template = own_template.OwnTemplate.__new__(own_template.OwnTemplate)
    template.specials = ("<e>",)
    begin, end = template.find_answer(
        lambda n, answer_next: prompt if answer_next else prompt + added, 1, prompt + added + "more", "a row"
    )
    assert (prompt + added)[begin:end] == learned and begin == len(prompt)


def test_a_message_keeps_what_it_says_though_it_is_empty():
    said = {"role": "assistant", "content": "", "tool_calls": [], "n": 0, "more": None}
    assert own_template.drop_none(said) == {"role": "assistant", "content": "", "tool_calls": [], "n": 0}

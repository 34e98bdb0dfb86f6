"""The template of training as other programs use it: a chat template in Jinja that travels with the tokenizer.

transformers, vLLM and llama.cpp make a prompt by the chat template of the tokenizer's files. A style's template gives
the very text that training encodes, so that their ids are those of engine.text.templates.
"""

import copy
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.text.own_template import JINJA_FILE, read_chat_templates, render_probe
from engine.text.parts import Special, Text
from engine.text.templates import ALPACA_NO_INPUT, Row, find_end_of_turn, find_stop_ids, render_row
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import convert_to_llama_tokenizer
from engine.text.tokenizer_json import write_json
from engine.text.tokenizer_parts import CONFIG, TOKENS_MAP, Files, drop_flags, read_json

FLAGS = ("lstrip", "rstrip", "normalized", "single_word")  # of a token; a checkpoint's own template obeys the first two
DAY = datetime(2024, 7, 26)  # which the templates of Llama 3 name where there is no clock
STRFTIME = re.compile(r"strftime_now\(\s*(\"[^\"]*\"|'[^']*')\s*\)")
MACRO = "{%- macro strftime_now(format) -%}"  # begins a template that asks no clock
# Today's date, which llama.cpp gives every template. transformers gives none, so the template says a day of its own.
GIVEN = {name: f"{{%- set {name} = {{}}.{name} -%}}" for name in ("date_string", "datetime")}

# ---- templates ------------------------------------------------------------------------------------------------------
# BOS and EOS stand for the tokens' texts, since programs differ in which token they call bos_token. No template raises
# an exception: llama.cpp tries one on a chat of its own, and takes ChatML where that fails.

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ BOS }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (  # every turn begins with BOS; the system message is part of the next user's
    "{% set system = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set system.text = '<<SYS>>\\n' + (message['content'] | trim) + '\\n<</SYS>>\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ BOS + '[INST] ' + system.text + (message['content'] | trim) + ' [/INST]' }}{% set system.text = '' %}"
    "{% else %}{{ ' ' + (message['content'] | trim) + ' ' + EOS }}{% endif %}"
    "{% endfor %}"
)
# Stanford's was trained on one question and one answer. Of a longer chat each turn is such a pair, and a system message
# takes the place of the first sentences.
ALPACA = (
    "{% set system = namespace(text=PREAMBLE) %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system.text = message['content'] or PREAMBLE %}"
    "{% elif message['role'] == 'user' %}{{ BOS + system.text + BEFORE + message['content'] + AFTER }}"
    "{% else %}{{ message['content'] + EOS }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3}


def write_chat_template(style: str, tokenizer: Tokenizer) -> str:
    """Return the chat template of a style in Jinja."""
    preamble, rest = ALPACA_NO_INPUT.split("\n\n", 1)
    before, after = f"\n\n{rest}".split("{instruction}")
    has_bos = style != "alpaca" or tokenizer.add_bos
    texts = {
        "BOS": find_token_text(tokenizer, tokenizer.bos_id) if has_bos else "",
        "EOS": find_token_text(tokenizer, tokenizer.eos_id),
        "PREAMBLE": preamble, "BEFORE": before, "AFTER": after,
    }  # fmt: skip
    return re.sub("|".join(texts), lambda match: quote(texts[match[0]]), TEMPLATES[style])


def find_token_text(tokenizer: Tokenizer, id: int | None) -> str:
    """Return the text of a special token, "" where it has none."""
    return next((text for text, known in tokenizer.special_ids.items() if known == id), "")


def quote(text: str) -> str:
    """Return the text as a string of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


# ---- the tokenizer's files ------------------------------------------------------------------------------------------


def find_carried_style(tokenizer: Tokenizer) -> str:
    """Return the style whose template the tokenizer's files carry: "template" for another, "alpaca" for none."""
    carried = read_chat_templates(tokenizer)
    if not carried:
        return "alpaca"
    written = {style: {"default": write_chat_template(style, tokenizer)} for style in TEMPLATES}
    return next((style for style in TEMPLATES if carried == written[style]), "template")


def begins_with_bos(tokenizer: Tokenizer, style: str) -> bool:
    """Return whether a prompt of the style begins with BOS."""
    if style == "template":
        parts = render_probe(tokenizer, answer_next=True)
    else:
        parts = render_row(Row("a probe", None, "Hello"), style, tokenizer, answer_next=True)
    bos = "bos", find_token_text(tokenizer, tokenizer.bos_id)
    return not parts or (isinstance(parts[0], Special) and parts[0].name in bos)


def begins_with_bare_text(tokenizer: Tokenizer) -> bool:
    """Return whether what the tokenizer's own template writes begins neither with a special token nor with a space."""
    parts = render_probe(tokenizer, answer_next=True)
    return bool(parts) and isinstance(parts[0], Text) and not parts[0].whole().startswith((" ", "▁"))


def adopt_style(tokenizer: Tokenizer, style: str) -> Tokenizer:
    """Return the tokenizer with files that say how a model of this style is asked and where its answers end.

    chat_template is the style's, in tokenizer_config.json alone, where old and new programs look. eos_token is what
    ended an answer in training. Under a style without BOS the tokenizer adds none to a text, since llama.cpp adds to a
    chat what is added to a text.
    """
    adopted = copy.copy(tokenizer)
    adopted.stop_ids = find_stop_ids(tokenizer, style)
    adopted.eos_id = find_end_of_turn(tokenizer, style)
    adopted.add_bos = tokenizer.add_bos and begins_with_bos(tokenizer, style)
    names = {"bos_token": tokenizer.bos_id, "eos_token": adopted.eos_id}
    texts = {role: text for role, id in names.items() if (text := find_token_text(tokenizer, id))}
    own = read_chat_templates(tokenizer)
    spaces_first = tokenizer.encode("a") != tokenizer.encode("a", follows_special=True)
    if spaces_first and style == "template" and begins_with_bare_text(tokenizer):
        own = {name: begin_template("", " ", template) for name, template in own.items()}
    files = replace_chat_templates(
        tokenizer, own if style == "template" else {"default": write_chat_template(style, tokenizer)}
    )
    if spaces_first:
        files |= settle_first_space(files, style)
    config = name_tokens(read_json(Path(), files, CONFIG), texts)
    if tokenizer.add_bos and not adopted.add_bos:
        config["add_bos_token"] = False
        files |= without_template_bos(files, find_token_text(tokenizer, tokenizer.bos_id))
    files[CONFIG] = write_json(config)
    if TOKENS_MAP in files:
        files[TOKENS_MAP] = write_json(name_tokens(read_json(Path(), files, TOKENS_MAP), texts))
    # A style's special tokens stand in a text as they are. transformers drops blanks beside some, and misses others.
    adopted.files = drop_flags(files, tokenizer.special_ids, FLAGS[2:] if style == "template" else FLAGS)
    return adopted


def settle_template(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with its chat template in one file, where two files have one.

    transformers takes that of chat_template.jinja, llama.cpp's converter that of tokenizer_config.json.
    """
    settled = copy.copy(tokenizer)
    if JINJA_FILE in tokenizer.files and "chat_template" in read_json(Path(), tokenizer.files, CONFIG):
        settled.files = replace_chat_templates(tokenizer, read_chat_templates(tokenizer))
    return settled


def pin_date(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer whose own chat templates name a fixed day where they ask for today's.

    So rows are the same tokens on every day, and the prompt that is learned is the one that is asked later: the
    template is written with its day.
    """
    templates = {name: pin_template(template) for name, template in read_chat_templates(tokenizer).items()}
    pinned = copy.copy(tokenizer)
    pinned.files = replace_chat_templates(tokenizer, templates) if templates else tokenizer.files
    return pinned


def pin_template(template: str) -> str:
    """Return the template with a macro in place of strftime_now, and without a date that a program gives it."""
    head = "".join(
        unset for name, unset in GIVEN.items() if re.search(rf"\b{name}\b", template) and unset not in template
    )
    if "strftime_now" in template and MACRO not in template:
        formats = {format[1:-1] for format in STRFTIME.findall(template)}
        texts = ", ".join(f"{quote(format)}: {quote(DAY.strftime(format))}" for format in sorted(formats))
        day = f"{{{{ {{{texts}}}.get(format, {quote(DAY.strftime('%d %b %Y'))}) }}}}"
        head += f"{MACRO}{day}{{%- endmacro -%}}"
    return begin_template(head, "", template) if head else template


def begin_template(head: str, text: str, template: str) -> str:
    """Return the template behind tags and a text, neither of which changes what it writes itself.

    What is written, be it nothing, keeps a line break that the template begins with. Blanks before a first tag are
    taken away, as jinja2 does where they begin a line.
    """
    own = re.sub(r"\A[ \t]+(?=\{%(?!\+))", "", template)
    return f"{head}{{{{ {quote(text)} }}}}{own}"


def replace_chat_templates(tokenizer: Tokenizer, templates: dict[str, str]) -> Files:
    """Return the tokenizer's files with these chat templates in tokenizer_config.json, and none elsewhere."""
    files = {name: content for name, content in tokenizer.files.items() if name != JINJA_FILE}
    named = [{"name": name, "template": template} for name, template in templates.items()]
    value = templates["default"] if list(templates) == ["default"] else named
    return files | {CONFIG: write_json(read_json(Path(), files, CONFIG) | {"chat_template": value})}


def name_tokens(config: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """Return the settings with these named tokens. A token that is there with its flags, as an object, keeps them."""
    stated = {role: config.get(role) for role in texts}
    kept = {
        role: token for role, token in stated.items() if isinstance(token, dict) and token["content"] == texts[role]
    }
    return config | texts | kept


def settle_first_space(files: Files, style: str) -> Files:
    """Return the files of a tokenizer that puts a space before the first text alone, so that all put one where we do.

    Behind a special token transformers puts none and llama.cpp puts one. Alpaca's text has one, after BOS: then both
    put one before every text. In a chat none has one but what the template writes, as before a first text of its own:
    add_prefix_space tells llama.cpp's converter, and the class is one by which transformers does not go by that key.
    """
    spec, config = (read_json(Path(), files, name) for name in ("tokenizer.json", CONFIG))
    if "LlamaTokenizer" in str(config.get("tokenizer_class")) or '"first"' not in json.dumps(spec["pre_tokenizer"]):
        convert_to_llama_tokenizer(spec, config)
        config = {"unk_token": "<unk>"} | config
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if style == "alpaca":
        steps = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
        for step in (step for step in steps if step.get("prepend_scheme") == "first"):
            step["prepend_scheme"] = "always"
    else:
        config["add_prefix_space"] = False
    return {"tokenizer.json": write_json(spec), CONFIG: write_json(config)}


def without_template_bos(files: Files, bos: str) -> Files:
    """Return {"tokenizer.json": one that does not begin a text with BOS}, {} without such a file."""
    if "tokenizer.json" not in files:
        return {}
    spec = read_json(Path(), files, "tokenizer.json")
    steps = spec.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            for name in ("single", "pair"):
                step[name] = [piece for piece in step[name] if piece.get("SpecialToken", {}).get("id") != bos]
            step["special_tokens"].pop(bos, None)
    return {"tokenizer.json": write_json(spec)}

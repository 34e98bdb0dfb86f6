"""The messages of a chat as the ids that the model goes on from, in the template it was trained with."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.base.errors import DataError
from engine.text.chat_templates import find_carried_style
from engine.text.parts import Part, Special, Text
from engine.text.templates import ALPACA_NO_INPUT, Message, Row, encode_parts, encode_prompt
from engine.text.tokenizer import Tokenizer

PREAMBLE, REST = ALPACA_NO_INPUT.split("\n\n", 1)
BEFORE, AFTER = f"\n\n{REST}".split("{instruction}")


def choose_style(name: str, trained: str | None, tokenizer: Tokenizer) -> str:
    """Return what --prompt-style means. auto is the style that the model was trained with here, else its files'."""
    return (trained or find_carried_style(tokenizer)) if name == "auto" else name


def encode_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    style: str,
    *,
    input: str = "",
    tools: Sequence[Any] = (),
    more: Mapping[int, dict[str, Any]] | None = None,
) -> list[int]:
    """Return the ids of a chat whose next message is the model's.

    input: of the last message, an instruction. Alpaca's template has a place for it where nothing was said before; else
    it follows the instruction, as in training. tools, more: for the checkpoint's own template, see Row. Raises
    DataError for a chat that the template cannot say.
    """
    role, text = messages[-1]
    if role == "assistant" or not any(asks in ("user", "tool") for asks, _ in messages):
        raise DataError(f"the last message is of role {role}, and the model answers one of the user; end with it")
    if input and role != "user":
        raise DataError(f"input belongs to an instruction, and the last message is of role {role}; leave input out")
    if style == "alpaca" and len(messages) == 1 and role == "user":
        return encode_prompt(Row("the request", None, text, input), tokenizer, style)
    if input:
        messages = [*messages[:-1], (role, f"{text}\n\n{input}")]
    if style == "alpaca":
        return encode_parts(render_alpaca_chat(messages, tokenizer.add_bos), tokenizer, style)
    row = Row("the request", tuple(messages), tools=tools, more=more or {})
    return encode_prompt(row, tokenizer, style)


def render_alpaca_chat(messages: Sequence[Message], add_bos: bool) -> list[Part]:
    """Return the parts of a chat as alpaca's chat template writes it: each turn is an instruction and its answer.

    A system message takes the place of the sentences before the instruction.
    """
    parts: list[Part] = []
    preamble, text = PREAMBLE, ""
    for role, content in messages:
        if role == "system":
            preamble = content or PREAMBLE
        elif role == "user":
            parts += [Special("bos")] if add_bos else []
            text = preamble + BEFORE + content + AFTER
        else:
            parts += [Text(text + content, follows_special=False), Special("eos")]
            text = ""
    return [*parts, Text(text, follows_special=False)] if text else parts

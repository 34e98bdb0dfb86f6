"""Prompt templates: a row of a dataset as the texts and special tokens of a style, and a prompt as ids."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.base.errors import DataError
from engine.text.own_template import find_own_end, open_own_template
from engine.text.parts import Part, Special, Text
from engine.text.tokenizer import Tokenizer

Message = tuple[str, str]  # (role, content); the role is system, user, assistant or tool


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a dataset file: an instruction and its answer, a chat, or text that goes under no template."""

    source: str  # where it was read, for messages; of a file it is an engine.data.values.Place, as file.json:17
    messages: tuple[Message, ...] | None  # a chat, None for an instruction
    instruction: str = ""
    input: str = ""
    output: str = ""
    is_raw: bool = False  # instruction and output are a text and how it goes on, under no template
    unlearned: frozenset[int] = frozenset()  # numbers of the messages that are answers and carry no loss
    tools: Sequence[Any] = ()  # that a chat may call: for a checkpoint's own template alone, like more
    more: Mapping[int, dict[str, Any]] = field(default_factory=dict)  # {message: its tool_calls and the like}


ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


# ---- styles ---------------------------------------------------------------------------------------------------------
# Each function yields the parts of a chat. answer_next: add the beginning of an answer, for the model to go on from.


def render_chatml(messages: Sequence[Message], answer_next: bool) -> Iterator[Part]:
    """Yield <|im_start|>role\\ncontent<|im_end|>\\n for each message."""
    for role, content in messages:
        is_answer = role == "assistant"
        yield Special("<|im_start|>")
        yield Text(f"{role}\n", content) if is_answer else Text(f"{role}\n{content}")
        yield Special("<|im_end|>", loss=is_answer)
        yield Text("\n")
    if answer_next:
        yield Special("<|im_start|>")
        yield Text("assistant\n")


def render_llama3(messages: Sequence[Message], answer_next: bool) -> Iterator[Part]:
    """Yield <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|> for each message, after BOS.

    The content is stripped, as in Meta's ChatFormat.
    """
    yield Special("bos")
    for role, content in messages:
        is_answer = role == "assistant"
        yield from (Special("<|start_header_id|>"), Text(role), Special("<|end_header_id|>"))
        yield Text("\n\n", content.strip()) if is_answer else Text("\n\n" + content.strip())
        yield Special("<|eot_id|>", loss=is_answer)
    if answer_next:
        yield from (Special("<|start_header_id|>"), Text("assistant"), Special("<|end_header_id|>"), Text("\n\n"))


def render_llama2(messages: Sequence[Message], answer_next: bool) -> Iterator[Part]:
    """Yield BOS [INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nuser [/INST] answer EOS for each turn.

    A turn is one string, as in Meta's code.
    """
    system, prompt = "", ""
    for role, content in messages:
        content = content.strip()
        if not prompt and role not in ("system", "user"):
            raise DataError(f"the llama2 style begins with a message of the user, got one of {role}")
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            prompt, system = f"[INST] {system}{content} [/INST]", ""
        else:
            yield from (Special("bos"), Text(prompt, f" {content} "), Special("eos", loss=True))
    if answer_next and not prompt:
        raise DataError("the llama2 style wants a message of the user to answer, got none")
    if answer_next:
        yield from (Special("bos"), Text(prompt))


CHAT_STYLES: dict[str, Callable[[Sequence[Message], bool], Iterator[Part]]] = {
    "chatml": render_chatml,
    "llama2": render_llama2,
    "llama3": render_llama3,
}
STYLES = ("alpaca", *CHAT_STYLES, "template")  # template: the checkpoint's own
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}  # alpaca and llama2 end a turn with EOS


# ---- rows -----------------------------------------------------------------------------------------------------------


def render_row(row: Row, style: str, tokenizer: Tokenizer, answer_next: bool = False) -> list[Part]:
    """Return the parts of a row under a template. Raise DataError for a row that the template cannot say.

    answer_next: leave the last answer out, and end where the model is to write it.
    """
    if style == "alpaca" or row.is_raw:
        return render_alpaca(row, tokenizer.add_bos, answer_next)
    messages = row.messages
    if messages is None:
        question = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
        messages = (("user", question), ("assistant", row.output))
    if answer_next and messages[-1][0] == "assistant":
        messages = messages[:-1]
    learned = [role == "assistant" and i not in row.unlearned for i, (role, _) in enumerate(messages)]
    if style == "template":
        chat = [{"role": role, "content": content} | row.more.get(i, {}) for i, (role, content) in enumerate(messages)]

        def render(chat: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Part]:
            return open_own_template(tokenizer).render(chat, tools, answer_next, row.source, learned)

        parts = render(chat, row.tools)
        if row.tools or row.more:
            require_tools_said(render, chat, row, parts)
        return parts
    if row.tools or row.more:
        raise DataError(f"{row.source}: the row calls tools, which --prompt-style template alone can say")
    styled = CHAT_STYLES[style](messages, answer_next)
    if not row.unlearned:
        return list(styled)
    return list(drop_loss(styled, [learned[i] for i, (role, _) in enumerate(messages) if role == "assistant"]))


def require_tools_said(
    render: Callable[[Sequence[Mapping[str, Any]], Sequence[Any]], list[Part]],
    chat: Sequence[Mapping[str, Any]],
    row: Row,
    parts: list[Part],
) -> None:
    """Raise DataError where a template writes the same parts whatever the tools, a call or its result is.

    Such a call would be learned as an answer of nothing.
    """

    def require_said(what: str, chat: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> None:
        try:
            is_said = render(chat, tools) != parts
        except DataError:  # it is read, at the least
            return
        if not is_said:
            raise DataError(
                f"{row.source}: the checkpoint's chat template leaves out {what}, so it would not be learned; leave "
                "the row out, or choose a checkpoint whose template has tools"
            )

    if row.tools:
        require_said("tools", chat, ())
    for i, message in enumerate(chat):
        other: dict[str, Any] = {}
        if message.get("tool_calls"):
            calls = [call | {"function": call["function"] | {"name": "other_tool"}} for call in message["tool_calls"]]
            other = {"tool_calls": calls}
        elif message["role"] == "tool":
            other = {"content": f"{message['content']} more"}
        if other:
            what = f"the {'calls' if 'tool_calls' in other else 'result'} of a tool in message {i + 1}"
            require_said(what, [*chat[:i], {**message, **other}, *chat[i + 1 :]], row.tools)


def drop_loss(parts: Iterable[Part], learned: Sequence[bool]) -> Iterator[Part]:
    """Yield the parts of a chat with the loss of some answers taken away. learned: whether each answer keeps it."""
    n_answers = 0  # that have ended: each ends in a special token that carries loss
    for part in parts:
        keeps = n_answers >= len(learned) or learned[n_answers]
        if isinstance(part, Special):
            n_answers += part.loss
            yield replace(part, loss=part.loss and keeps)
        else:
            yield part if keeps else replace(part, prompt=part.prompt + part.response, response="")


def render_alpaca(row: Row, add_bos: bool, answer_next: bool) -> list[Part]:
    """Return the parts of an instruction under Stanford's template, or of raw text. Raise DataError for a chat."""
    if row.messages is not None:
        raise DataError(
            f"{row.source}: the row holds chat messages, or a system text or history, which the alpaca style cannot "
            "say; pass --prompt-style chatml, llama2, llama3 or template"
        )
    template = ALPACA_INPUT if row.input else ALPACA_NO_INPUT
    prompt = row.instruction if row.is_raw else template.format(instruction=row.instruction, input=row.input)
    parts: list[Part] = [Special("bos")] if add_bos else []
    if answer_next:
        return [*parts, Text(prompt, follows_special=False)]
    return [*parts, Text(prompt, row.output, follows_special=False), Special("eos", loss=True)]


# ---- ids ------------------------------------------------------------------------------------------------------------


def find_special_id(tokenizer: Tokenizer, name: str, style: str) -> int:
    """Return the id of a Special by its name. Raise DataError, naming the style, when the tokenizer lacks it."""
    id = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(name, tokenizer.special_ids.get(name))
    if name in tokenizer.unembedded:
        raise DataError(
            f"prompt style {style} needs the token {name}, whose id {tokenizer.unembedded[name]} is past the model's "
            "embedding; choose another --prompt-style"
        )
    if id is None:
        known = ", ".join(sorted(tokenizer.special_ids)[:8])
        raise DataError(
            f"prompt style {style} needs the token {name}, and this tokenizer has none (it has {known}); "
            "choose another --prompt-style"
        )
    return id


def encode_prompt(row: Row, tokenizer: Tokenizer, style: str = "alpaca") -> list[int]:
    """Return the ids of a row without its output, under the template: the model's answer follows them."""
    return encode_parts(render_row(row, style, tokenizer, answer_next=True), tokenizer, style)


def encode_parts(parts: Iterable[Part], tokenizer: Tokenizer, style: str) -> list[int]:
    """Return the ids of parts. Raise DataError, naming the style, for a special token that the tokenizer lacks."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Special):
            ids.append(find_special_id(tokenizer, part.name, style))
        else:
            ids += tokenizer.encode(part.whole(), part.follows_special)
    return ids


def find_end_of_turn(tokenizer: Tokenizer, style: str) -> int:
    """Return the id that ends an answer in the style's template; EOS where a template of the checkpoint has none."""
    end = find_own_end(tokenizer) if style == "template" else END_OF_TURN.get(style)
    return tokenizer.eos_id if end is None else find_special_id(tokenizer, end, style)


def find_stop_ids(tokenizer: Tokenizer, style: str) -> frozenset[int]:
    """Return the ids that end an answer: the checkpoint's own and the end of a turn in the style's template."""
    return tokenizer.stop_ids | {find_end_of_turn(tokenizer, style)}

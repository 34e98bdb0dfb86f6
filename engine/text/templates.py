"""Rows of a dataset, the templates that make text of them, and the prompt and the end of an answer as ids."""

from dataclasses import dataclass

from engine.base.errors import DataError
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Row:
    source: str  # "file.json:17", for messages: the number of the row, in JSONL of its line, from 1
    messages: tuple[tuple[str, str], ...] | None  # chat: (role, content), role is system, user or assistant
    instruction: str = ""  # Alpaca, where messages is None
    input: str = ""
    output: str = ""


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


@dataclass(frozen=True)
class Text:
    """Tokenised as one string; the tokens of the prompt alone carry no loss, those of the rest do."""

    prompt: str
    response: str = ""


@dataclass(frozen=True)
class Special:
    """One token of the tokenizer by name ("bos", "eos" or its text), which no text can spell."""

    name: str
    loss: bool = False


def chatml(messages, answer_next):
    """<|im_start|>role\\ncontent<|im_end|>\\n"""
    for role, content in messages:
        ours = role == "assistant"
        yield Special("<|im_start|>")
        yield Text(f"{role}\n", content) if ours else Text(f"{role}\n{content}")
        yield from (Special("<|im_end|>", loss=ours), Text("\n"))
    if answer_next:
        yield from (Special("<|im_start|>"), Text("assistant\n"))


def llama3(messages, answer_next):
    """<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>, content stripped, as Meta's ChatFormat."""
    yield Special("bos")
    for role, content in messages:
        ours = role == "assistant"
        yield from (Special("<|start_header_id|>"), Text(role), Special("<|end_header_id|>"))
        yield Text("\n\n", content.strip()) if ours else Text("\n\n" + content.strip())
        yield Special("<|eot_id|>", loss=ours)
    if answer_next:
        yield from (Special("<|start_header_id|>"), Text("assistant"), Special("<|end_header_id|>"), Text("\n\n"))


def llama2(messages, answer_next):
    """BOS [INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nuser [/INST] answer EOS; a turn is one string, as in Meta's code."""
    system = ""
    for role, content in messages:
        content = content.strip()
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            prompt, system = f"[INST] {system}{content} [/INST]", ""
        else:
            yield from (Special("bos"), Text(prompt, f" {content} "), Special("eos", loss=True))
    if answer_next:
        yield from (Special("bos"), Text(prompt))


CHAT_STYLES = {"chatml": chatml, "llama2": llama2, "llama3": llama3}


def render_row(row: Row, style: str, add_bos: bool, answer_next: bool = False) -> list[Text | Special]:
    """A row under a template. answer_next leaves the last answer out and ends where the model writes it."""
    if style == "alpaca":
        if row.messages is not None:
            raise DataError(
                f"{row.source}: the row holds chat messages, which the alpaca style cannot say; "
                "pass --prompt-style chatml, llama2 or llama3"
            )
        template = ALPACA_INPUT if row.input else ALPACA_NO_INPUT
        prompt = template.format(instruction=row.instruction, input=row.input)
        body = [Text(prompt)] if answer_next else [Text(prompt, row.output), Special("eos", loss=True)]
        return [Special("bos"), *body] if add_bos else body
    messages = row.messages
    if messages is None:
        question = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
        messages = (("user", question), ("assistant", row.output))
    if answer_next and messages[-1][0] == "assistant":
        messages = messages[:-1]
    return list(CHAT_STYLES[style](messages, answer_next))


def special_id(tokenizer, name, style):
    token = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(name, tokenizer.special_ids.get(name))
    if token is None:
        known = ", ".join(sorted(tokenizer.special_ids)[:8])
        raise DataError(
            f"prompt style {style} needs the token {name}, and this tokenizer has none (it has {known}); "
            "choose another --prompt-style"
        )
    return token


def encode_prompt(row: Row, tokenizer: Tokenizer, style: str = "alpaca") -> list[int]:
    """The ids after which the model answers: a row without its output, under the template."""
    ids = []
    for part in render_row(row, style, tokenizer.add_bos, answer_next=True):
        ids += (
            [special_id(tokenizer, part.name, style)]
            if isinstance(part, Special)
            else tokenizer.encode(part.prompt + part.response)
        )
    return ids


def find_stop_ids(tokenizer, style):
    """The ids that end an answer: the checkpoint's own, and the one that ends a turn of the template."""
    end = tokenizer.special_ids.get({"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(style))
    return tokenizer.stop_ids if end is None else tokenizer.stop_ids | {end}

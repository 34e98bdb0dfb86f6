"""The chat template that a checkpoint brings with it: --prompt-style template.

A template is a stranger's program, so it runs in jinja2's immutable sandbox, with the settings, filters and functions
that transformers gives it. Text of a row that spells a special token stays text, as under every style.
"""

import contextlib
import functools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.base.errors import DataError, summarize_error
from engine.text.parts import Part, Special, Text
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_parts import read_json, read_named_tokens

CONFIG, JINJA_FILE = "tokenizer_config.json", "chat_template.jinja"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # begins what a template says carries loss
# Characters that mean nothing. Those that a row does not use mark places in what a template writes.
UNUSED = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))]
ANSWER = "An answer of mine"  # to see what a template writes after an answer
USER, SYSTEM = {"role": "user", "content": "Hello"}, {"role": "system", "content": "Be kind."}
TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
PROBES: tuple[tuple[list[dict[str, str]], list[dict[str, Any]]], ...] = (  # messages, tools
    ([USER], []), ([SYSTEM, USER], []), ([USER], [{"type": "function", "function": TOOL}])
)  # fmt: skip

# A template without {% generation %} is run twice for each answer, over all before it.
MAX_MESSAGES_RUN, MAX_CHARACTERS_RUN = 500_000, 1 << 28  # of one row: a second or two

Chat = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ..., ...}, as in a dataset
Span = tuple[int, int]  # first character, end


def read_chat_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Return {name: chat template} of the tokenizer's files, as transformers takes them; a single one is "default".

    chat_template.jinja goes before tokenizer_config.json.
    """
    if JINJA_FILE in tokenizer.files:
        return {"default": tokenizer.files[JINJA_FILE].decode()}
    found = read_json(Path(), tokenizer.files, CONFIG).get("chat_template")
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {"default": found} if isinstance(found, str) and found else {}


@functools.lru_cache(maxsize=4)
def open_own_template(tokenizer: Tokenizer) -> "OwnTemplate":
    """Return the template of a tokenizer. Raise DataError where its files have none, or one that is no Jinja."""
    return OwnTemplate(tokenizer)


class OwnTemplate:
    """The chat template of a tokenizer, and what it is given beside the messages."""

    def __init__(self, tokenizer: Tokenizer):
        found = read_chat_templates(tokenizer)
        if "default" not in found:
            raise DataError(
                "prompt style template wants a chat template, and this tokenizer has none (chat_template.jinja, or "
                "chat_template in tokenizer_config.json); choose another --prompt-style"
            )
        chosen = {False: found["default"], True: found.get("tool_use", found["default"])}  # by whether there are tools
        self.marks_loss = {with_tools: bool(GENERATION.search(template)) for with_tools, template in chosen.items()}
        self.compiled = {with_tools: compile_template(template) for with_tools, template in chosen.items()}
        self.names = name_tokens(tokenizer)
        self.specials = tuple(sorted(tokenizer.special_ids, key=len, reverse=True))  # those first that contain others
        self.spelled = re.compile("|".join(map(re.escape, self.specials)) or "(?!)")
        self.swallows = {side: find_swallowing(tokenizer, side) for side in ("lstrip", "rstrip")}

    def render(
        self, messages: Chat, tools: Sequence[Any], answer_next: bool, source: str, learned: Sequence[bool]
    ) -> list[Part]:
        """Return the parts of a chat.

        answer_next: end where the model is to write an answer; then nothing carries loss. learned: whether each message
        carries loss. Raise DataError, naming the source, where the template fails or cannot be learned from.
        """
        row = {"messages": [drop_none(message) for message in messages], "tools": list(tools) or None}
        written = json.dumps(row, ensure_ascii=False)
        signs = list(islice((c for c in UNUSED if c not in written), 3))
        row = self.hide_specials(row, signs[0])

        def write(n: int, answer_next: bool) -> str:
            """Return what the template makes of the first n messages, with signs around what it says carries loss."""
            try:
                return self.compiled[bool(tools)].render(
                    messages=row["messages"][:n], tools=row["tools"], documents=None,
                    add_generation_prompt=answer_next, loss_signs=signs[1:], **self.names,
                )  # fmt: skip
            except Exception as error:  # whatever a stranger's program raises
                raise DataError(
                    f"{source}: the checkpoint's chat template fails on this row: {summarize_error(error)}; change the "
                    "row, leave it out by --skip-bad-rows, or choose another --prompt-style"
                ) from error

        text, spans = read_signs(write(len(messages), answer_next), signs[1:])
        if not text:
            raise DataError(f"{source}: the checkpoint's chat template writes nothing; choose another --prompt-style")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answer_next:
            spans = []
        elif self.marks_loss[bool(tools)]:
            spans = choose_spans(spans, [learned[i] for i in answers], source)
        else:
            n_runs = sum(learned[i] for i in answers)
            if n_runs * len(messages) > MAX_MESSAGES_RUN or n_runs * len(text) > MAX_CHARACTERS_RUN:
                raise DataError(
                    f"{source}: a chat of {len(messages)} messages and {len(text)} characters, whose {n_runs} answers "
                    "the checkpoint's chat template does not mark; split the chat, or choose another --prompt-style"
                )

            def plain(n: int, answer_next: bool) -> str:
                return read_signs(write(n, answer_next), signs[1:])[0]

            spans = [self.find_answer(plain, i, text, source) for i in answers if learned[i]]
        return self.split(text, spans, signs[0])

    def hide_specials(self, value: Any, sign: str) -> Any:
        """Return a row's value with a sign in every special token that its texts spell, after the first character."""
        if isinstance(value, str):
            return self.spelled.sub(lambda match: match[0][0] + sign + match[0][1:], value)
        if isinstance(value, list):
            return [self.hide_specials(item, sign) for item in value]
        if isinstance(value, dict):
            return {key: self.hide_specials(item, sign) for key, item in value.items()}
        return value

    def find_answer(self, write: Callable[[int, bool], str], i: int, text: str, source: str) -> Span:
        """Return where message i, an answer, stands in the text: what it adds to the prompt before it.

        Blanks after the special token that ends it are no part of it. Raise DataError where the template writes the
        messages up to the answer otherwise when more follow: what is asked then is not what was learned.
        """
        prompt, until = write(i, True) if i else "", write(i + 1, False)
        if not until.startswith(prompt) or not text.startswith(until):
            raise DataError(
                f"{source}: the checkpoint's chat template writes the beginning of a chat otherwise when more follows "
                f"(message {i + 1}), so the prompt of its answer would not be the one that is learned; choose another "
                "--prompt-style"
            )
        end = len(until.rstrip())
        return len(prompt), end if until[:end].endswith(self.specials) and end > len(prompt) else len(until)

    def split(self, text: str, spans: Sequence[Span], sign: str) -> list[Part]:
        """Return the parts of what the template wrote. spans: where it carries loss. sign: is taken out of texts."""
        parts: list[Part] = []
        at, spans = 0, deque(sorted(spans))
        for match in self.spelled.finditer(text) if self.specials else ():
            token, start, end = match[0], match.start(), match.end()
            if start < at:  # blanks that the token before it swallowed are special tokens themselves
                continue
            while token in self.swallows["lstrip"] and start > at and text[start - 1].isspace():
                start -= 1
            while token in self.swallows["rstrip"] and end < len(text) and text[end].isspace():
                end += 1
            parts += cut_text(text, at, start, spans, sign)
            carries_loss = any(a <= match.start() < b for a, b in take_spans(spans, start, end))
            parts.append(Special(token, carries_loss))
            at = end
        return [*parts, *cut_text(text, at, len(text), spans, sign)]


def render_probe(tokenizer: Tokenizer, answer_next: bool) -> list[Part]:
    """Return what the tokenizer's own template makes of a short chat: of the first of PROBES that it can say.

    Without answer_next, the chat has ANSWER. Where the template can say none, the list is empty.
    """
    answer = [] if answer_next else [{"role": "assistant", "content": ANSWER}]
    for messages, tools in PROBES:
        chat = [*messages, *answer]
        with contextlib.suppress(DataError):
            return open_own_template(tokenizer).render(chat, tools, answer_next, "a probe", [False] * len(chat))
    return []


def find_own_end(tokenizer: Tokenizer) -> str | None:
    """Return the special token that the tokenizer's own template writes after an answer, None where it writes none."""
    parts = render_probe(tokenizer, answer_next=False)
    begins = [i for i, part in enumerate(parts) if isinstance(part, Text) and ANSWER in part.whole()]
    return next((part.name for part in parts[begins[-1] :] if isinstance(part, Special)), None) if begins else None


def name_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return {bos_token, eos_token, ...: text}, as a template may call them."""
    text_of = {id: text for text, id in tokenizer.special_ids.items()}
    known = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    texts = {role: text_of.get(id) for role, id in known.items() if id is not None}
    return {k: text for k, text in (texts | read_named_tokens(Path(), tokenizer.files)).items() if text is not None}


def drop_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the keys that hold nothing, as transformers gives it to a template."""
    return {key: value for key, value in message.items() if value is not None}


def find_swallowing(tokenizer: Tokenizer, side: str) -> set[str]:
    """Return the special tokens that swallow the blanks on one side of them: lstrip or rstrip."""
    added = read_json(Path(), tokenizer.files, "tokenizer.json").get("added_tokens") or []
    return {token["content"] for token in added if token.get(side)}


def read_signs(text: str, signs: Sequence[str]) -> tuple[str, list[Span]]:
    """Return (the text without the signs that begin and end what carries loss, where that stands in it).

    What stands in another such piece is a part of it.
    """
    plain, begins, spans = "", [], []
    for piece in re.split(f"([{''.join(signs)}])", text):
        if piece == signs[0]:
            begins.append(len(plain))
        elif piece == signs[1]:
            begin = begins.pop()
            if not begins:
                spans.append((begin, len(plain)))
        else:
            plain += piece
    return plain, spans


def choose_spans(spans: list[Span], learned: Sequence[bool], source: str) -> list[Span]:
    """Return the spans of the answers that are learned. Raise DataError where spans and answers are not as many."""
    if all(learned):
        return spans
    if len(spans) != len(learned):
        raise DataError(
            f"{source}: the checkpoint's chat template marks {len(spans)} answers, the row has {len(learned)}, so none "
            "can be left out; choose another --prompt-style"
        )
    return [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]


def take_spans(spans: deque[Span], start: int, end: int) -> list[Span]:
    """Return the sorted spans that touch text[start:end], and take those out that end before: text is read forward."""
    while spans and spans[0][1] <= start:
        spans.popleft()
    return [(a, b) for a, b in takewhile(lambda span: span[0] < end, spans) if b > start]


def cut_text(text: str, start: int, end: int, spans: deque[Span], sign: str) -> Iterator[Text]:
    """Yield text[start:end], cut where loss begins and ends; nothing where it is empty."""
    if start < end:
        inside = [(max(a, start), min(b, end)) for a, b in take_spans(spans, start, end)]
        cuts = [start, *(place for span in inside for place in span), end]
        runs = [text[a:b].replace(sign, "") for a, b in pairwise(cuts)]
        yield Text(runs[0], runs[1] if len(runs) > 1 else "", tuple(runs[2:]), follows_special=start > 0)


# ---- Jinja ----------------------------------------------------------------------------------------------------------


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: puts the two loss_signs around what carries loss."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> Any:
        """Return the call of mark that stands for the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [jinja2.nodes.Name("loss_signs", "load")])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, signs: Sequence[str], caller: Callable[[], str]) -> str:
        """Return what the tag encloses, between the signs."""
        return signs[0] + caller() + signs[1]


def compile_template(template: str) -> jinja2.Template:
    """Return the compiled template. Raise DataError where it is no Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = dump_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": format_now}
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the checkpoint's chat template is no Jinja that can be read: {error.message}, line {error.lineno}; "
            "choose another --prompt-style"
        ) from error


def raise_exception(message: str) -> None:
    """Raise what a template calls an error."""
    raise jinja2.TemplateError(message)


def format_now(format: str) -> str:
    """Return the time of now in a format."""
    return datetime.now().strftime(format)


def dump_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """Return JSON as transformers' filter tojson writes it, without the escapes of HTML that jinja2's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

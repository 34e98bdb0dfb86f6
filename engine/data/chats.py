"""Chats of rows: `messages` of role and content, and ShareGPT's `conversations` of from and value."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.json_files import parse_json
from engine.data.values import BadRow, get_text, is_empty, require_text, require_type, shorten
from engine.text.templates import Message

ROLES = {role: role for role in ("user", "assistant", "system", "tool")} | {"developer": "system"}
SHAREGPT_ROLES = ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
LOSS_KEYS = ("weight", "train", "loss")  # OpenAI's and axolotl's, axolotl's, ms-swift's: whether an answer is learned
READ = {"role", "content", "from", "value", *LOSS_KEYS, "tool_calls", "tool_call_id"}
TOOLS = "which a checkpoint's own chat template alone can say; pass --prompt-style template"
REFUSED = {  # keys of a row or a message that change what it means, where they are not empty: why
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "wanted text alone: a LLaMA sees none"),
    **dict.fromkeys(("chosen", "rejected"), "wanted one answer, since preferences are not learned; keep it as output"),
    "kto_tag": "wanted rows to learn; leave those out that are not to be",
    "train_detail": "wanted weight 0 or 1 on a whole answer", "loss_scale": "wanted weight 0 or 1 on a whole answer",
    "functions": "wanted their new form, tools", "function_call": "wanted its new form, tool_calls",
}  # fmt: skip


@dataclass
class Chat:
    """A chat that is being read, as the fields of a Row."""

    messages: list[Message] = field(default_factory=list)
    unlearned: set[int] = field(default_factory=set)
    more: dict[int, dict[str, Any]] = field(default_factory=dict)
    waits_for_tool: bool = False  # the last message calls one

    def wanted_roles(self) -> tuple[str, ...]:
        """Return the roles that the next message may have."""
        last = self.messages[-1][0] if self.messages else None
        if last == "tool":
            return "assistant", "tool"
        if last == "assistant":
            return ("tool",) if self.waits_for_tool else ("user",)
        return ("assistant",) if last == "user" else ("user", "system") if last is None else ("user",)


def refuse_keys(value: Mapping[str, Any], prefix: str = "") -> None:
    """Raise BadRow for a key that changes what a row or message means and cannot be obeyed."""
    for key in value:  # in the order of the row, so that the same row is told the same way
        if key in REFUSED and not is_empty(value[key]):
            raise BadRow(f"{prefix}{key}: got {shorten(value[key])}, {REFUSED[key]}")


def parse_chat(turns: Sequence[Any], key: str, require_answers: bool, with_tools: bool, unread: set[str]) -> Chat:
    """Return the messages under a key of a row. Raise BadRow.

    A chat may begin with a system message. Then user and assistant alternate, and the assistant is last. An answer that
    calls tools is followed by their results and another answer. Unless require_answers, the user may be last.
    with_tools: tools may be called. Names of keys that are not read are added to unread.
    """
    chat = Chat()
    for i, turn in enumerate(turns):
        add_message(chat, require_type(turn, dict, f"{key}[{i}]"), f"{key}[{i}]", with_tools)
        read = READ | {"name"} if chat.messages[-1][0] == "tool" else READ
        unread |= {f"{key}[].{name}" for name in turn if name not in read and not is_empty(turn[name])}
    last = chat.messages[-1][0] if chat.messages else "none"
    if last != "assistant" and (require_answers or last not in ("user", "tool")):
        raise BadRow(f"{key}: got {last} as the last role, wanted assistant")
    return chat


def add_message(chat: Chat, turn: Mapping[str, Any], name: str, with_tools: bool) -> None:
    """Add a message to a chat. Raise BadRow for one that cannot be read or does not belong there."""
    sharegpt = "from" in turn and "role" not in turn
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    said = get_text(dict(turn), role_key, name + ".")
    role = (SHAREGPT_ROLES if sharegpt else ROLES).get(said, said)
    refuse_keys(turn, name + ".")
    calls = turn.get("tool_calls") or []
    if (role == "tool" or said == "function_call" or calls) and not with_tools:
        what = "tool_calls" if calls else f"{role_key} {said!r}"
        raise BadRow(f"{name}.{what}: got a call of a tool or its result, {TOOLS}")
    if role not in chat.wanted_roles():
        words = {"user": "human", "assistant": "gpt"} if sharegpt else {}
        wanted = "'" + "' or '".join(words.get(role, role) for role in chat.wanted_roles()) + "'"
        wanted = wanted.replace(" or 'system'", " or a system message")
        raise BadRow(f"{name}.{role_key}: got {shorten(said)}, wanted {wanted}")
    more: dict[str, Any] = {}
    if calls or said == "function_call":
        text = get_text(dict(turn), text_key, name + ".") if said == "function_call" else ""
        more["tool_calls"] = parse_calls(parse_text(text, name) if text else calls, f"{name}.tool_calls")
    if role == "tool":
        more |= {key: turn[key] for key in ("tool_call_id", "name") if not is_empty(turn.get(key))}
    content = ""
    if said != "function_call" and not (calls and turn.get(text_key) is None):
        content = read_content(turn, text_key, name)
    learned = read_loss(turn, name, role)
    if role == "assistant" and not learned:
        chat.unlearned.add(len(chat.messages))
    if more:
        chat.more[len(chat.messages)] = more
    chat.messages.append((role, content))
    chat.waits_for_tool = "tool_calls" in more


def read_content(turn: Mapping[str, Any], key: str, name: str) -> str:
    """Return a message's text. Parts of text are joined by newlines, as vLLM and llama.cpp do. Raise BadRow."""
    if not isinstance(turn.get(key), list):
        return get_text(dict(turn), key, name + ".")
    texts = []
    for i, part in enumerate(turn[key]):
        place = f"{name}.{key}[{i}]"
        kind = require_type(part, dict, place).get("type")
        if kind != "text":
            raise BadRow(f"{place}.type: got {shorten(kind)}, wanted 'text': a LLaMA reads nothing else")
        texts.append(get_text(part, "text", place + "."))
    return "\n".join(texts)


def read_loss(turn: Mapping[str, Any], name: str, role: str) -> bool:
    """Return whether a message carries loss, were it an answer. Raise BadRow for a weight that cannot be obeyed."""
    learned = True
    for key in LOSS_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise BadRow(f"{name}.{key}: got {shorten(value)}, wanted 0 or 1")
        if value and role != "assistant":
            raise BadRow(f"{name}.{key}: got {shorten(value)} on a message of the {role}; answers alone are learned")
        learned = learned and bool(value)
    return learned


def parse_text(text: str, name: str) -> Any:
    """Return the JSON value in a text. Raise BadRow."""
    try:
        return parse_json(text.encode(), 0)
    except BadRow:
        raise BadRow(f"{name}: got {shorten(text)}, wanted JSON") from None


def parse_tools(value: Any) -> list[Any]:
    """Return the tools of a row, which may be a list or its JSON as text. Raise BadRow."""
    return require_type(parse_text(value, "tools") if isinstance(value, str) else value, list, "tools")


def parse_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls of tools as templates want them: {"type", "function": {"name", "arguments": object}}.

    A call may be without the outer object, and its arguments may be JSON as text. Raise BadRow.
    """
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = require_type(require_type(call, dict, name).get("function", call), dict, name)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_text(arguments or "{}", name + ".arguments")
        require_text(function.get("name"), name + ".name")
        inner = {"name": function["name"], "arguments": require_type(arguments, dict, name + ".arguments")}
        calls.append({**{k: v for k, v in call.items() if k == "id"}, "type": "function", "function": inner})
    json.dumps(calls)  # a template may write them
    return calls

"""A conversation in a terminal: its turns, each answered by a model as the user watches, and the user's commands."""

import json
import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.inference.sampling import Draw, Sampling
from engine.inference.scheduler import Request, Scheduler
from engine.model.llama import Transformer
from engine.serving.prompts import encode_chat
from engine.text.templates import Message, find_stop_ids
from engine.text.tokenizer import Tokenizer

HELP = '''/help            this
/reset           forget the conversation
/retry           answer the last message again
/system TEXT     begin with a system text; without TEXT, with none
/set NAME VALUE  temperature, top_p, top_k, min_p, repetition_penalty, max_tokens or seed; /set shows them
/save FILE       write the conversation as a row that engine.finetune --data takes
/quit            end; so does Ctrl-D. Ctrl-C stops an answer
A line that ends in \\ goes on in the next; """ begins a text of several lines, and ends it. //TEXT sends /TEXT.'''
RANGES: dict[str, tuple[type, float, float]] = {  # {setting: (type, least, most)}
    "temperature": (float, 0, 100), "top_p": (float, 1e-6, 1), "top_k": (int, 0, 2**31), "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 10), "max_tokens": (int, 1, 2**31), "seed": (int, 0, 2**62),
}  # fmt: skip


@dataclass(frozen=True)
class ChatSettings:
    """How a conversation begins."""

    sampling: Sampling  # of the first answer; each further one takes the next seed
    max_tokens: int  # of an answer
    max_length: int  # tokens of the conversation
    system: str = ""


@dataclass
class Turn:
    """A question and its answer, which is empty until there is one."""

    question: str
    answer: str = ""


class Chat:
    """A conversation with a model: its turns, its settings, and the commands that change them."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, style: str, settings: ChatSettings):
        self.tokenizer, self.style, self.system = tokenizer, style, settings.system
        self.sampling, self.max_tokens = settings.sampling, settings.max_tokens
        self.scheduler = Scheduler(model, 1, min(settings.max_length, model.config.max_positions))
        self.stop_ids = find_stop_ids(tokenizer, style)
        self.turns: list[Turn] = []

    def messages(self) -> list[Message]:
        """Return what has been said: the system text, and the turns that were answered."""
        said: list[Message] = [("system", self.system)] if self.system else []
        for turn in self.turns:
            if turn.answer:
                said += [("user", turn.question), ("assistant", turn.answer)]
        return said

    # ---- answers ------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> str:
        """Print the answer as it comes. Return what ended it. Raise DataError for a chat that cannot be answered."""
        messages = [*self.messages(), ("user", question)]
        prompt = encode_chat(messages, self.tokenizer, self.style)
        longest = self.scheduler.max_length
        if len(prompt) >= longest:
            raise DataError(
                f"the conversation has {len(prompt)} tokens, wanted under {longest}; /reset begins a new one, "
                "--max-length allows a longer one"
            )
        turn, text = Turn(question), self.tokenizer.stream()
        self.turns.append(turn)
        ended: list[Any] = []

        def show(piece: str) -> None:
            turn.answer += piece
            print(piece, end="", flush=True)

        def on_token(draw: Draw) -> bool:
            show(text.push(draw.id))
            return True

        most = min(self.max_tokens, longest - len(prompt))
        request = Request(
            prompt, most, self.stop_ids, self.sampling, on_token, lambda *how: ended.extend(how),
        )  # fmt: skip
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)

        def cancel(*_: object) -> None:
            request.cancelled = True

        before = signal.signal(signal.SIGINT, cancel)
        try:
            self.scheduler.submit(request)
            while self.scheduler.step():
                pass
            show(text.flush())
        finally:
            signal.signal(signal.SIGINT, before)
        reason, error = ended
        if error is not None:
            raise error
        return reason

    # ---- commands -----------------------------------------------------------------------------------------------

    def obey(self, line: str) -> str:
        """Carry out a command and return what to say. Raises DataError for one that cannot be carried out."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if name == "/system":
            self.system = rest
            return "the system text is set" if rest else "there is no system text"
        if name == "/set":
            return self._set(rest)
        if name == "/save":
            return self._save(rest)
        raise DataError(f"there is no {name}; /help tells what there is, //{line[1:]} sends it as a message")

    def _set(self, rest: str) -> str:
        values = {name: getattr(self.sampling, name) for name in RANGES if name != "max_tokens"}
        values["max_tokens"] = self.max_tokens
        if not rest:
            return "  ".join(f"{name} {values[name]:g}" for name in RANGES)
        name, _, text = rest.replace("=", " ").partition(" ")
        name = name.replace("-", "_")
        if name not in RANGES:
            raise DataError(f"there is no setting {name}; wanted one of {', '.join(RANGES)}")
        kind, least, most = RANGES[name]
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            wanted = "a whole number" if kind is int else "a number"
            raise DataError(f"{name} is {text.strip()!r}, wanted {wanted} of {least:g} to {most:g}")
        if name == "max_tokens":
            self.max_tokens = value
        else:
            self.sampling = replace(self.sampling, **{name: value})
        return f"{name} is {value:g}"

    def _save(self, rest: str) -> str:
        if not rest or not any(turn.answer for turn in self.turns):
            raise DataError("/save wants the name of a file" if not rest else "there is nothing to save yet")
        path = Path(rest).expanduser()
        row = {"messages": [{"role": role, "content": content} for role, content in self.messages()]}
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps([row], ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); name another file") from None
        return f"saved in {path}"

"""Talk to a model in a terminal. Earlier turns are not computed again.

python -m engine.chat --model out/demo
python -m engine.chat --model model.gguf --temperature 0.7
python -m engine.chat --model smollm2-135m --adapter-dir out/lora --system "Answer in one sentence."
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.base.device import choose_device, choose_dtype, choose_kernels
from engine.base.errors import DataError, print_error, run_main
from engine.base.flags import ADAPTER_HELP, KERNELS, KERNELS_HELP, MODEL_HELP, find_empty, flag, parse_flags
from engine.inference.sampling import Sampling
from engine.inference.scheduler import CANCELLED
from engine.serving.models import load_model
from engine.serving.prompts import choose_style
from engine.serving.terminal_chat import Chat, ChatSettings
from engine.text.templates import STYLES

QUOTES = '"""'


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in a terminal; /help tells its commands. Without a terminal each line of stdin is a turn."""

    model: str = flag("smollm2-135m", MODEL_HELP)
    adapter_dir: str | None = flag(None, ADAPTER_HELP)
    prompt_style: str = flag(
        "auto",
        "the template; auto is the one the model was fine-tuned with here, else its own chat template, else alpaca",
        ("auto", *STYLES),
    )
    system: str = flag("", "system text")
    max_new_tokens: int = flag(512, "longest answer")
    max_length: int = flag(2048, "tokens of a conversation, at most what the model takes")
    temperature: float = flag(0.7, "0 is greedy; 1 samples the model's own distribution")
    top_p: float = flag(1.0, "sample from the fewest tokens that hold this probability")
    seed: int = flag(0, "of sampling; each answer takes the next one")
    device: str = flag("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "of the weights; auto is bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    kernels: str = flag("auto", KERNELS_HELP, KERNELS)
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self) -> None:
        problems = find_empty(adapter_dir=self.adapter_dir)
        if self.max_new_tokens < 1 or self.max_length < 2:
            problems.append("--max-new-tokens wants 1 or more, --max-length 2 or more")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.seed < 0:
            problems.append("--temperature and --seed want 0 or more, --top-p more than 0 and at most 1")
        if problems:
            raise ValueError("\n".join(problems))


def read_turns(is_terminal: bool) -> Iterator[str]:
    """Yield what the user writes, line by line or over several lines, until the end of stdin."""

    def read_line(prompt: str) -> str:
        return input(prompt) if is_terminal else input()

    while True:
        text = ""
        try:
            text = read_line("> ")
            if text.startswith(QUOTES):
                text = text[len(QUOTES) :]
                while not text.rstrip().endswith(QUOTES):
                    text += "\n" + read_line(". ")
                text = text.rstrip()[: -len(QUOTES)].strip("\n")
            else:
                while text.endswith("\\"):
                    text = text[:-1] + "\n"
                    text += read_line(". ")
        except KeyboardInterrupt:  # at the prompt: what was being written is dropped
            print()
            continue
        except EOFError:
            if text.strip():
                yield text
            if is_terminal:
                print()
            return
        if text.strip():
            yield text


def converse(chat: Chat, is_terminal: bool) -> None:
    """Answer turns until the user ends. In a terminal a failure is told and the chat goes on; else it is raised."""
    for text in read_turns(is_terminal):
        try:
            if text.strip() == "/quit":
                return
            if text.startswith("/") and not text.startswith("//") and text.strip() != "/retry":
                print(chat.obey(text.strip()))
                continue
            if text.strip() == "/retry":
                if not chat.turns:
                    raise DataError("there is nothing to answer again")
                text = chat.turns.pop().question
            before, began = chat.scheduler.load().answer_tokens, time.monotonic()
            reason = chat.ask(text[1:] if text.startswith("//") else text)
            n, seconds = chat.scheduler.load().answer_tokens - before, time.monotonic() - began
            note = f"{n} tokens, {n / seconds:.1f} tokens/s" + (", stopped" if reason == CANCELLED else "")
            print(f"\n\033[2m{note}\033[0m\n" if is_terminal else "", flush=True)
        except DataError as error:
            if not is_terminal:
                raise
            print_error(f"error: {error}")
        except KeyboardInterrupt:  # before an answer had begun
            if not is_terminal:
                raise
            print()


def keep_history() -> None:
    """Let the arrow keys find earlier lines, also those of earlier chats, in a file that its user alone can read."""
    import atexit
    import readline

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cria"
    path = folder / "chat_history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    except OSError as error:
        print_error(f"warning: {path}: the history is not kept ({error.strerror})")
        return
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, path)


def main(argv: list[str]) -> None:
    """Load the model and talk."""
    config, _ = parse_flags(ChatConfig, argv)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    kernels = choose_kernels(config.kernels, device, dtype)
    model, tokenizer, trained = load_model(config.model, device, dtype, kernels, config.adapter_dir or "")
    for warning in tokenizer.warnings:
        print_error(f"warning: {warning}")
    style = choose_style(config.prompt_style, trained, tokenizer)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        keep_history()
        print(f"{shlex.quote(config.model)} ({style}). /help tells what there is; Ctrl-D ends.")
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
    settings = ChatSettings(sampling, config.max_new_tokens, config.max_length, config.system)
    converse(Chat(model, tokenizer, style, settings), is_terminal)


if __name__ == "__main__":
    sys.exit(run_main(main))

"""engine.chat: a conversation in a terminal and without one."""

import contextlib
import io
import itertools
import json
import os
import readline
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from engine import chat
from engine.base.errors import DataError
from engine.base.errors import run_main as run
from engine.inference.sampling import Sampling
from engine.serving.models import load_model
from engine.serving.prompts import encode_chat
from engine.serving.terminal_chat import Chat, ChatSettings
from engine.text.templates import Row, encode_prompt
from tests.helpers.run import environment
from tests.helpers.small_model import small_model
from tests.helpers.terminals import Terminal


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(small_model()), torch.device("cpu"), torch.float32, "ref")[:2]


def new_chat(loaded, temperature=0.0, max_tokens=6, max_length=400, system="", style="alpaca"):
    return Chat(*loaded, style, ChatSettings(Sampling(temperature=temperature), max_tokens, max_length, system))


def talk(monkeypatch, capsys, text, *flags):
    """Run the command with a text as its stdin, which is no terminal: return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = run(chat.main, ["--model", str(small_model()), "--max-new-tokens", "4", *flags])
    return code, *capsys.readouterr()


def test_a_turn_goes_on_from_the_earlier_ones_without_computing_them_again(loaded, capsys):
    talking = new_chat(loaded)
    talking.ask("Name a fruit.")
    first = talking.turns[0].answer
    assert capsys.readouterr().out == first != ""
    before = talking.scheduler.load()
    talking.ask("Another one?")
    load = talking.scheduler.load()
    said = [("user", "Name a fruit."), ("assistant", first), ("user", "Another one?")]
    assert talking.messages()[:3] == said
    n_first = len(encode_chat(said[:1], loaded[1], "alpaca"))
    assert load.kept_tokens - before.kept_tokens >= n_first
    assert load.prompt_tokens - before.prompt_tokens == len(encode_chat(said, loaded[1], "alpaca"))


def test_greedy_answers_are_those_of_a_fresh_conversation(loaded):
    talking, fresh = new_chat(loaded), new_chat(loaded)
    for question in ("Name a fruit.", "Another one?", "Why?"):
        talking.ask(question)
    fresh.turns = [*talking.turns[:2]]
    fresh.ask("Why?")
    assert fresh.turns[2] == talking.turns[2]


def test_each_answer_has_a_seed_of_its_own_and_a_chat_can_be_repeated(loaded):
    answers = []
    for _ in range(2):
        talking = new_chat(loaded, temperature=2.0, max_tokens=12)
        talking.ask("Name a fruit.")
        talking.turns.clear()
        talking.ask("Name a fruit.")
        answers.append([talking.sampling.seed, talking.turns[0].answer])
    assert answers[0] == answers[1] and answers[0][0] == 2


def test_a_conversation_that_is_too_long_is_refused_and_stays_as_it_was(loaded):
    talking = new_chat(loaded, max_length=60)
    talking.ask("Hi")
    with pytest.raises(DataError, match=r"tokens, wanted under 60; /reset"):
        talking.ask("word " * 60)
    assert len(talking.turns) == 1


def test_a_conversation_is_no_longer_than_the_model_takes(loaded):
    most = loaded[0].config.max_positions
    for asked, wanted in ((most - 1, most - 1), (most, most), (most + 1, most)):
        assert new_chat(loaded, max_length=asked).scheduler.max_length == wanted


def test_an_exception_of_the_model_is_raised_and_ctrl_c_is_as_before(loaded, monkeypatch):
    talking, before = new_chat(loaded), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(talking.scheduler, "_prefill", lambda wave: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        talking.ask("Hi")
    assert signal.getsignal(signal.SIGINT) == before


def test_commands(loaded, tmp_path):
    talking = new_chat(loaded)
    assert "/retry" in talking.obey("/help")
    assert talking.obey("/set temperature 0.5") == "temperature is 0.5" and talking.sampling.temperature == 0.5
    assert talking.obey("/set top-p=0.9") == "top_p is 0.9"
    assert talking.obey("/set max_tokens 3") == "max_tokens is 3" and talking.max_tokens == 3
    assert "max_tokens 3" in talking.obey("/set")
    for line in ("/set", "/set temperature"):
        with pytest.raises(DataError):
            talking.obey(f"{line} x")
    for line in ("/set temperature -1", "/set temperature nan", "/set top_k 1.5", "/set seed -1", "/nothing", "/save"):
        with pytest.raises(DataError):
            talking.obey(line)
    with pytest.raises(DataError, match="nothing to save"):
        talking.obey(f"/save {tmp_path / 'chat.json'}")
    talking.obey("/system Be brief.")
    talking.ask("Name a fruit.")
    talking.obey(f"/save {tmp_path / 'chat.json'}")
    (row,) = json.loads((tmp_path / "chat.json").read_text())
    answer = talking.turns[0].answer
    contents = ["Be brief.", "Name a fruit.", answer]
    assert [message["content"] for message in row["messages"]] == contents
    with pytest.raises(DataError, match="cannot be written"):  # never over another file
        talking.obey(f"/save {tmp_path / 'chat.json'}")
    talking.obey("/reset")
    assert talking.turns == [] and talking.messages() == [("system", "Be brief.")]


@pytest.mark.parametrize("style", ["alpaca", "llama2"])
def test_the_input_of_a_request_is_never_passed_over(loaded, style):
    tokenizer = loaded[1]

    def encode(*messages, **more):
        return encode_chat(messages, tokenizer, style, **more)

    row = Row("here", None, "Sort.", "b a")
    assert encode(("user", "Sort."), input="b a") == encode_prompt(row, tokenizer, style)
    said = ("user", "Hi"), ("assistant", "Hello")
    joined = encode(*said, ("user", "Sort.\n\nb a"))
    assert encode(*said, ("user", "Sort."), input="b a") == joined
    with pytest.raises(DataError, match="role assistant"):
        encode(*said, input="b a")


def test_without_a_terminal_each_line_is_a_turn(monkeypatch, capsys):
    text = 'Name a fruit.\n\n/set temperature 0\nOne \\\nmore\n"""\nA text\nof lines\n"""\n/retry\n//not a command'
    asked = []
    real = Chat.ask
    monkeypatch.setattr(Chat, "ask", lambda self, question: asked.append(question) or real(self, question))
    code, out, err = talk(monkeypatch, capsys, text)
    assert (code, err) == (0, "")
    assert asked == ["Name a fruit.", "One \nmore", "A text\nof lines", "A text\nof lines", "/not a command"]
    assert "\033" not in out and ">" not in out.splitlines()[0]


def test_without_a_terminal_an_error_ends_the_command(monkeypatch, capsys):
    code, _, err = talk(monkeypatch, capsys, "/nothing\nHi\n")
    assert (
        code == 3 and err == "error: there is no /nothing; /help tells what there is, //nothing sends it as a message\n"
    )
    assert talk(monkeypatch, capsys, "/retry\n")[0] == 3
    assert talk(monkeypatch, capsys, "", "--top-p", "0")[0] == 2
    assert talk(monkeypatch, capsys, "")[:2] == (0, "")


# Answers of at most 77 tokens hang after the third one, until they are stopped.
HANGING = """
import sys, time
from engine import chat
from engine.base.errors import run_main
from engine.inference.scheduler import Scheduler
real = Scheduler._decode
def decode(self, going_on):
    request = going_on[0].request
    while request.max_new_tokens == 77 and going_on[0].n_drawn >= 3 and not request.cancelled:
        time.sleep(0.01)
    real(self, going_on)
Scheduler._decode = decode
sys.exit(run_main(chat.main))
"""


def test_a_conversation_in_a_terminal(tmp_path):
    env = environment() | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    terminal = Terminal(HANGING, "--model", small_model(), "--temperature", "0", "--max-new-tokens", "5", env=env)
    try:
        terminal.read_until("Ctrl-D ends.")
        terminal.read_until("> ")
        terminal.write("Name a fruit.\r")
        terminal.read_until("5 tokens, ")
        terminal.read_until("\n\r\n")
        terminal.write("/set max_tokens 77\r")
        terminal.read_until("max_tokens is 77")
        terminal.write("Go on for ever.\r")
        terminal.read_until("ever.\r\n")
        time.sleep(0.1)
        terminal.write("\x03")  # Ctrl-C, in the midst of the answer or before it: it ends, and the chat does not
        terminal.read_until("tokens/s, stopped")
        terminal.read_until("\n\r\n")
        terminal.write("/set max_tokens 2\r")
        terminal.read_until("max_tokens is 2")
        terminal.write("/nothing\r")
        terminal.read_until("error: there is no /nothing")
        terminal.write("\x1b[A\x1b[A\x1b[A\r")  # the third line from below, by the arrow keys
        terminal.read_until("Go on for ever.")
        terminal.read_until("2 tokens, ")
        while terminal.process.poll() is None:  # again: a Ctrl-D that comes before the prompt does is lost
            with contextlib.suppress(OSError):  # it has just ended
                terminal.write("\x04")
            time.sleep(0.05)
        assert terminal.process.returncode == 0
    finally:
        terminal.close()
    history = tmp_path / "cria" / "chat_history"
    assert "Name a fruit." in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_the_history_is_kept_and_is_its_users_alone(tmp_path, monkeypatch, capsys):
    kept = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("atexit.register", lambda *what: kept.append(what))
    monkeypatch.setattr("readline.read_history_file", lambda path: kept.append(path))
    before = os.umask(0)
    try:
        chat.keep_history()
    finally:
        os.umask(before)
    path = tmp_path / "state" / "cria" / "chat_history"
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept == [path, (readline.write_history_file, path)]
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    chat.keep_history()
    assert "the history is not kept" in capsys.readouterr().err and len(kept) == 2


def read_all(monkeypatch, is_terminal, typed):
    """Return the turns that are read of what is typed, line by line, and the prompts. An exception is raised."""
    lines, prompts = iter(typed), []

    def read_line(prompt=""):
        prompts.append(prompt)
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read_line)
    return list(chat.read_turns(is_terminal)), prompts


def test_ctrl_c_drops_what_was_being_written_and_ctrl_d_ends(monkeypatch, capsys):
    typed = ["a", "b\\", KeyboardInterrupt(), '"""', "c", KeyboardInterrupt(), " ", "d"]
    assert read_all(monkeypatch, True, typed) == (["a", "d"], ["> ", "> ", ". ", "> ", ". ", ". ", "> ", "> ", "> "])
    assert capsys.readouterr().out == "\n\n\n"  # one after each Ctrl-C, one at the end
    assert read_all(monkeypatch, False, ["a", "b\\"]) == (["a", "b\n"], [""] * 3) and not capsys.readouterr().out
    assert read_all(monkeypatch, False, ['""" a', "", ' b """ ', "c"])[0] == [" a\n\n b ", "c"]


class Talk:
    """A chat whose answers have three tokens, but for questions that name an exception."""

    def __init__(self):
        self.asked, self.turns = [], []
        self.scheduler = SimpleNamespace(load=lambda: SimpleNamespace(answer_tokens=3 * len(self.asked)))

    def ask(self, question):
        self.asked.append(question)
        if question in ("DataError", "KeyboardInterrupt"):
            raise {"DataError": DataError("too long"), "KeyboardInterrupt": KeyboardInterrupt()}[question]
        return chat.CANCELLED if question == "stop" else "length"

    def obey(self, line):
        return f"obeyed {line}"


def test_in_a_terminal_a_failure_is_told_and_the_chat_goes_on(monkeypatch, capsys):
    lines = ["/retry", "DataError", "KeyboardInterrupt", "//a", "/set x ", "stop", " /quit ", "b"]
    clock = itertools.count(0, 2)
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(chat, "read_turns", lambda is_terminal: iter(lines))
    talk = Talk()
    chat.converse(talk, True)
    assert talk.asked == ["DataError", "KeyboardInterrupt", "/a", "stop"]
    told, errors = capsys.readouterr()
    assert errors == "error: there is nothing to answer again\nerror: too long\n"
    note = "\n\033[2m3 tokens, 1.5 tokens/s{}\033[0m\n\n"
    assert told == "\n" + note.format("") + "obeyed /set x\n" + note.format(", stopped")
    for line, error in (("/retry", DataError), ("DataError", DataError), ("KeyboardInterrupt", KeyboardInterrupt)):
        monkeypatch.setattr(chat, "read_turns", lambda is_terminal, line=line: iter([line]))
        with pytest.raises(error):
            chat.converse(Talk(), False)


def test_an_answer_is_made_again_of_the_last_question(monkeypatch, capsys):
    talk = Talk()
    talk.turns = [SimpleNamespace(question="a"), SimpleNamespace(question="b")]
    monkeypatch.setattr(chat, "read_turns", lambda is_terminal: iter([" /retry"]))
    chat.converse(talk, False)
    assert talk.asked == ["b"] and [turn.question for turn in talk.turns] == ["a"] and capsys.readouterr().out == "\n"

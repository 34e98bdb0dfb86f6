"""The program of OpenAI's Python client against a stand-in for the package: what it asks, and what it tells."""

import json
import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers.calls import Calls
from tests.helpers.run import ROOT

TEXT = "Apples pears figs"


class OpenAIError(Exception):
    def __init__(self, message="", code=None):
        super().__init__(message)
        self.message, self.code = message, code


class BadRequestError(OpenAIError):
    pass


class NotFoundError(OpenAIError):
    pass


def of(**fields):
    return SimpleNamespace(**fields)


def usage():
    return of(total_tokens=5, prompt_tokens=2, completion_tokens=3)


def choice(text, finish="stop", tokens=()):
    parts = [of(bytes=list(part.encode()), top_logprobs=[1, 2]) for part in tokens]
    message = of(content=text)
    return of(message=message, finish_reason=finish, logprobs=of(content=parts))


def chat(model, messages, temperature=None, wrong="", **options):
    """Answer as a right server does, or with one thing wrong."""
    if model == "nothing":
        raise NotFoundError("there is none", "model_not_found" if wrong != "unknown model" else "other")
    if temperature == 9 and wrong == "a wrong value":
        return of(choices=[choice(TEXT)])
    if temperature == 9:
        raise BadRequestError("temperature is too high")
    if len(messages[0]["content"]) > 9000:
        if wrong == "too long":
            raise NotFoundError("context_length_exceeded")
        raise BadRequestError("context_length_exceeded: it is too long")
    if options.get("stream"):
        last = of(choices=[], usage=usage() if "stream_options" in options else None)
        chunks = [of(choices=[of(delta=of(content=part))], usage=None) for part in (*TEXT.partition(" "), None)]
        return iter([*chunks, last] if "stream_options" in options else chunks[wrong == "streaming" :])
    if "n" in options:
        return of(choices=[choice("one"), choice("one" if wrong == "n and seed" else "two")])
    if "stop" in options:
        return of(choices=[choice(TEXT if wrong == "stop" else TEXT[: TEXT.index(options["stop"][0])])])
    if "logprobs" in options:
        return of(choices=[choice(TEXT, tokens=("Apples ", "pears", "" if wrong == "logprobs" else " figs"))])
    if options.get("response_format", {}).get("type") == "json_schema":
        fruits = ["a", "b", "c"] if wrong == "json_schema" else ["a"]
        return of(choices=[choice(json.dumps({"fruits": fruits}))])
    if "response_format" in options:
        return of(choices=[choice("[1]" if wrong == "json_object" else "{}")])
    return of(choices=[choice(TEXT)], usage=usage())


def run(monkeypatch, wrong=""):
    """Return the calls of the program, in the order that it makes them."""
    calls = Calls()
    create = lambda **how: chat(**how, wrong=wrong)  # noqa: E731
    completion = of(choices=[of(text=TEXT, logprobs=of(tokens=["t"] * (5 if wrong == "completions" else 6)))])
    models = of(list=lambda: of(data=[of(id="mine")]))

    def make(name):
        chats = of(completions=of(create=calls.stand_in(f"{name} chat", create)))
        return of(models=models, chat=chats, completions=of(create=calls.stand_in(f"{name} completion", completion)))

    class Later:
        def __init__(self, **how):
            calls.lines.append(f"AsyncOpenAI {how}")
            self.chat = of(completions=of(create=self.create))
            self.n = 0

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def create(self, **how):
            calls.stand_in("later")(**how)
            self.n += 1
            return of(choices=[choice("other" if wrong == "eight at once" and self.n == 8 else TEXT)])

    openai = ModuleType("openai")
    for error in (OpenAIError, BadRequestError, NotFoundError):
        setattr(openai, error.__name__, error)
    openai.OpenAI = calls.stand_in("OpenAI", lambda **_: make("it"))
    openai.AsyncOpenAI = Later
    monkeypatch.setitem(sys.modules, "openai", openai)
    monkeypatch.setattr(sys, "argv", ["with_openai.py", "http://it"])
    runpy.run_path(str(ROOT / "scripts" / "serving" / "clients" / "with_openai.py"))
    return calls


FEATURES = [
    "plain", "usage", "streaming", "streaming with usage", "n and seed", "stop", "logprobs", "json_schema",
    "json_object", "completions", "too long", "unknown model", "a wrong value", "eight at once",
]  # fmt: skip


def test_every_feature_is_asked_for_and_right(monkeypatch, capsys, snapshot):
    calls = run(monkeypatch)
    out = capsys.readouterr().out
    told = [json.loads(line) for line in out.splitlines()]
    assert [line["feature"] for line in told] == FEATURES and all(line["right"] is True for line in told)
    assert all(len(line["got"]) <= 60 for line in told) and told[0]["got"] == TEXT
    assert calls.text().replace("word " * 5000, "LONG") == snapshot


@pytest.mark.parametrize(
    "wrong",
    ["streaming", "n and seed", "stop", "logprobs", "json_schema", "json_object", "completions", "too long",
     "unknown model", "a wrong value", "eight at once"],
)  # fmt: skip
def test_one_fault_is_one_wrong_feature(wrong, monkeypatch, capsys):
    run(monkeypatch, wrong)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["feature"] for line in told if not line["right"]] == [wrong]
    if wrong == "a wrong value":
        assert told[-2]["got"] == "an answer"
    if wrong == "too long":
        assert "NotFoundError" in told[10]["got"]

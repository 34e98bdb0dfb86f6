"""The program of LangChain against stand-ins for its packages: what it asks, and what it tells."""

import json
import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers.calls import Calls
from tests.helpers.run import ROOT

TEXT = "Apples pears figs"
FEATURES = [
    "plain", "usage", "streaming", "streaming with usage", "n", "stop", "logprobs", "json_schema", "too long",
    "a wrong value", "four at once",
]  # fmt: skip


class Overflow(Exception):
    pass


class BadRequestError(Exception):
    pass


class Part:
    """A message, or a part of one."""

    def __init__(self, content, usage=None):
        self.content, self.usage_metadata = content, usage

    def __add__(self, other):
        return Part(self.content + other.content, self.usage_metadata or other.usage_metadata)


def run(monkeypatch, wrong=""):
    calls = Calls()
    usage = {"total_tokens": 5}

    class Chat:
        def __init__(self, **how):
            self.how = how
            calls.stand_in("ChatOpenAI")(**how)

        def invoke(self, asked, **more):
            calls.stand_in("invoke")([str(one)[:40] for one in asked], **more)
            if len(asked[0]) > 9000:
                raise Overflow("it is too long")
            if "top_p" in more:
                raise BadRequestError("top_p is wrong")
            if "stop" in more:
                return Part(TEXT if wrong == "stop" else TEXT[: TEXT.index(more["stop"][0])])
            message = Part(TEXT, usage)
            tokens = ["Apples ", "pears"] + ([] if wrong == "logprobs" else [" figs"])
            message.response_metadata = {"logprobs": {"content": [{"token": token} for token in tokens]}}
            return message

        def stream(self, asked):
            calls.stand_in("stream")(asked)
            parts = [Part("Apples"), Part(" pears figs")][wrong == "streaming" and "stream_usage" not in self.how :]
            other = {"total_tokens": 6} if wrong == "streaming with usage" else usage
            return iter([*parts, Part("", other)] if self.how.get("stream_usage") else parts)

        def generate(self, asked):
            calls.stand_in("generate")(asked)
            texts = ("one", "one" if wrong == "n" else "two")
            return SimpleNamespace(generations=[[SimpleNamespace(text=text) for text in texts]])

        def with_structured_output(self, schema, method):
            calls.stand_in("with_structured_output")(schema, method=method)
            fruits = {"fruits": ["a"] * (3 if wrong == "json_schema" else 2)}
            return SimpleNamespace(invoke=calls.stand_in("structured", fruits))

        def batch(self, asked):
            calls.stand_in("batch")(asked)
            return [Part("other" if wrong == "four at once" and i == 3 else TEXT) for i in range(len(asked))]

    made = {name: ModuleType(name) for name in ("openai", "langchain_core", "langchain_core.exceptions",
                                                "langchain_core.messages", "langchain_openai")}  # fmt: skip
    models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="mine")]))
    made["openai"].OpenAI = calls.stand_in("OpenAI", lambda **_: SimpleNamespace(models=models))
    made["openai"].BadRequestError = BadRequestError
    made["langchain_core.exceptions"].ContextOverflowError = Overflow
    made["langchain_core.messages"].HumanMessage = made["langchain_core.messages"].SystemMessage = str
    made["langchain_openai"].ChatOpenAI = Chat
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["with_langchain.py", "http://it"])
    runpy.run_path(str(ROOT / "scripts" / "serving" / "clients" / "with_langchain.py"))
    return calls


def test_every_feature_is_asked_for_and_right(monkeypatch, capsys, snapshot):
    calls = run(monkeypatch)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["feature"] for line in told] == FEATURES and all(line["right"] is True for line in told)
    assert told[0]["got"] == TEXT and calls.text() == snapshot


@pytest.mark.parametrize("wrong", ["streaming", "streaming with usage", *FEATURES[4:8], "four at once"])
def test_one_fault_is_one_wrong_feature(wrong, monkeypatch, capsys):
    run(monkeypatch, wrong)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["feature"] for line in told if not line["right"]] == [wrong]

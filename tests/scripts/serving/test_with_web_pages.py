"""The calls of chat pages against a stand-in for the server: which answers are right, and which are told as wrong."""

import contextlib
import json
import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers.run import ROOT

FEATURES = [
    "models", "Open WebUI: a stream", "role once, text added", "usage last", "id and created are one",
    "LibreChat: its fields", "a second turn", "a title, not streamed", "an error they can show",
]  # fmt: skip


def chunk(delta, index=0):
    return {"id": "a", "created": 1 + index, "choices": [{"delta": delta}] if delta else []}


def run(monkeypatch, capsys, kind="text/event-stream; charset=utf-8", role_twice=False, done=True, other_id=False):
    """Return what the program tells of each feature, where the server does one thing wrong."""
    deltas = [{"role": "assistant", "content": ""}, {"content": "Fig."}, {"role": "assistant"} if role_twice else {}]
    chunks = [chunk(delta, index if other_id else 0) for index, delta in enumerate([*deltas, None])]
    chunks[-1]["usage"] = {"total_tokens": 5}
    lines = [": a comment", *(line for one in chunks for line in (f"data: {json.dumps(one)}", "")), ""]
    lines += ["data: [DONE]", ""] if done else []

    @contextlib.contextmanager
    def stream(method, url, json, headers, timeout):
        assert (method, url, json["stream"]) == ("POST", "http://it/v1/chat/completions", True)
        yield SimpleNamespace(iter_lines=lambda: iter(lines), headers={"content-type": kind})

    def post(url, **how):
        told = {"choices": [{"message": {"content": "Fruits"}}]}
        wrong = {"error": {"message": "no JSON"}}
        is_wrong = "content" in how
        return SimpleNamespace(status_code=400 if is_wrong else 200, json=lambda: wrong if is_wrong else told)

    models = {"object": "list", "data": [{"id": "mine"}]}
    httpx = ModuleType("httpx")
    httpx.get, httpx.post, httpx.stream = lambda url, **_: SimpleNamespace(json=lambda: models), post, stream
    monkeypatch.setitem(sys.modules, "httpx", httpx)
    monkeypatch.setattr(sys, "argv", ["with_web_pages.py", "http://it"])
    runpy.run_path(str(ROOT / "scripts" / "serving" / "clients" / "with_web_pages.py"))
    return {line["feature"]: line["right"] for line in map(json.loads, capsys.readouterr().out.splitlines())}


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ({}, []), ({"kind": "application/json"}, ["Open WebUI: a stream"]),
        ({"done": False}, ["Open WebUI: a stream", "LibreChat: its fields", "a second turn"]),
        ({"role_twice": True}, ["role once, text added"]), ({"other_id": True}, ["id and created are one"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_stream_is_read_as_pages_read_it_and_one_fault_is_one_wrong_feature(fault, wrong, monkeypatch, capsys):
    """Lines that are empty or comments are no chunks, and [DONE] is none."""
    found = run(monkeypatch, capsys, **fault)
    assert list(found) == FEATURES and [name for name, is_right in found.items() if not is_right] == wrong

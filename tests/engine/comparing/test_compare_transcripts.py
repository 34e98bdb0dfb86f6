"""All that the endpoints of the comparison say to a list of requests, and what is kept of them."""

import json
import re

import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from engine.comparing import endpoints
from engine.comparing.endpoints import Comparison
from engine.comparing.questions import Question
from engine.comparing.vote_file import VoteFile
from engine.serving.app import Server
from engine.serving.guard import Access
from tests.helpers.comparisons import FULL, Scripted, Told

QUESTIONS = [Question(f"Question {n}", f"input {n}" if n % 3 == 0 else "") for n in range(5)]


@pytest.mark.parametrize("is_fixed", [False, True], ids=["open", "fixed"])
def test_what_is_said_to_a_list_of_requests(is_fixed, tmp_path, monkeypatch, snapshot):
    monkeypatch.setattr(endpoints.secrets, "randbelow", lambda n: 0)  # the second contestant is A
    contestants = (
        Scripted("base", Told("one two"), Told("three"), Told("late", refusal=FULL)),
        Scripted("tuned", Told("A B C")),
    )
    votes, access = VoteFile(tmp_path / "votes.jsonl"), Access()
    numbered = [Question(q.instruction, q.input, n) for n, q in enumerate(QUESTIONS)] if is_fixed else QUESTIONS
    comparison = Comparison(
        contestants, votes, access, numbered, is_fixed, 0 if is_fixed else 100, can_talk=not is_fixed
    )
    client = TestClient(Server([], access, comparison.routes()).application(), base_url="http://127.0.0.1")
    rounds, told = [], []

    def say(path, **body):
        body = {
            key: rounds[value] if key == "round" and isinstance(value, int) else value for key, value in body.items()
        }
        response = client.post(f"/compare/{path}", json=body) if body else client.get(f"/compare/{path}")
        rounds.extend(re.findall(r'{"round": "([\w-]+)"}', response.text))
        text = f"> {path} {json.dumps(body)}\n{response.status_code} {response.text.strip()}"
        for number, id in enumerate(rounds):
            text = text.replace(id, f"ROUND{number}")
        told.append(re.sub(r"\n{2,}", "\n", text))

    say("questions", voter="v1")
    say("questions", voter="v2", name="mine.txt", text="Ask\n\nAgain")
    say("questions", voter="v2", name="mine.json", text="[1]")
    say("questions", voter="no one")
    ask = {"number": 3} if is_fixed else {"instruction": "Question 3", "input": "input 3"}
    say("ask", voter="v1", temperature=0.5, top_p=0.25, max_tokens=9, seed=4, **ask)
    say("vote", voter="v2", round=0, vote="A")
    say("vote", voter="v1", round=0, vote="C")
    say("vote", voter="v1", round=0, vote="B")
    say("vote", voter="v1", round=0, vote="B")
    say("vote", voter="v1", round=0, vote="A")
    say("vote", voter="v1", round="none", vote="A")
    say("ask", voter="v2", **ask)
    say("vote", voter="v2", round=1, vote="tie")
    say("ask", voter="v2", **ask)
    say("ask", voter="v2", instruction="", number=5)
    say("ask", voter="v2", instruction="x", number=-1, odd=1)
    say("questions", voter="v1")
    say("results")
    say("annotations")
    votes.close()
    assert (
        client.get("/compare").status_code == 200
        and ('<a href="/">Talk</a>' in client.get("/compare").text) != is_fixed
    )
    kept = re.sub(r'"\d{4}-[\d:TZ-]+"', '"TIME"', (tmp_path / "votes.jsonl").read_text())
    for number, id in enumerate(rounds):
        kept = kept.replace(id, f"ROUND{number}")
    kept = re.sub(r'"seed": \d{5,}', '"seed": "drawn"', kept)
    assert "\n".join([*told, kept]) == snapshot

"""A blind comparison served over a real socket, between contestants that say what a test tells them to."""

import asyncio
import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request

import uvicorn

from engine.comparing.endpoints import Comparison
from engine.comparing.vote_file import VoteFile
from engine.serving.app import Server
from engine.serving.guard import Access
from engine.serving.model_service import Piece
from engine.serving.openai_api import ApiError


class Told:
    """An answer in pieces. hangs: nothing comes after them until it is closed. error: comes after them."""

    def __init__(self, *pieces, hangs=False, error=None, refusal=None, reason="stop"):
        self.texts, self.hangs, self.error, self.refusal, self.reason = pieces, hangs, error, refusal, reason
        self.closed = threading.Event()

    async def pieces(self, patience=None):
        for text in self.texts:
            yield Piece(0, text, 1)
            await asyncio.sleep(0)
        while self.hangs and not self.closed.is_set():
            await asyncio.sleep(0.01)
        yield Piece(0, error=self.error) if self.error else Piece(0, finish_reason=self.reason)

    def close(self):
        self.closed.set()


class Scripted:
    """A contestant that gives the answers of a list, and notes what it was asked."""

    def __init__(self, name, *answers):
        self.name, self.answers, self.heard = name, list(answers), []

    def answer(self, question, wanted):
        self.heard.append((question, wanted))
        told = self.answers.pop(0) if self.answers else Told(f"{self.name[::-1]} says: {question.instruction}")
        if told.refusal:
            raise told.refusal
        return told


class Compared:
    """A server that compares two contestants, until it is left. votes: the file."""

    def __init__(self, votes, contestants=None, questions=(), access=None, **more):
        self.contestants = contestants or (Scripted("alpaca"), Scripted("davinci"))
        self.votes = VoteFile(votes)
        access = access or Access()
        more = {"longest": 2048} | more
        self.comparison = Comparison(self.contestants, self.votes, access, questions, **more)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        server = Server([], access, self.comparison.routes())
        self.uvicorn = uvicorn.Server(uvicorn.Config(server.application(), log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join()
        self.socket.close()
        self.votes.close()

    def send(self, path, body=None, headers=()):
        """Return (status, what came back): JSON where it is, else the text."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        return send(self.url + path, data, headers)

    def ask(self, instruction="Name a fruit.", voter="v1", **more):
        """Return the round's id and both answers as shown, after both have ended."""
        _, text = self.send("/compare/ask", {"voter": voter, "instruction": instruction, **more})
        return read_round(text)

    def vote(self, id, vote="A", voter="v1"):
        return self.send("/compare/vote", {"voter": voter, "round": id, "vote": vote})


def send(url, data=None, headers=()):
    request = urllib.request.Request(url, data, dict(headers))
    try:
        with urllib.request.urlopen(request) as response:
            status, found = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, found = error.code, error.read()
    with contextlib.suppress(ValueError):
        return status, json.loads(found)
    return status, found.decode()


def read_events(text):
    """Return the events of a stream, without its comments and its end."""
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


def read_round(text):
    """Return (id, answer A, answer B) of a whole stream."""
    events = read_events(text)
    shown = [event["texts"] for event in events if "texts" in event]
    return events[0]["round"], *("".join(texts[side] for texts in shown) for side in (0, 1))


FULL = ApiError(503, "72 answers are being written or waited for; try again later", code="queue_full")

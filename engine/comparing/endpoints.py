"""The endpoints of the blind comparison: which answer is whose leaves the server after the vote alone."""

import asyncio
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from data_gen.judging.humans import VOTES
from engine.base.errors import DataError
from engine.comparing.pace import Relay
from engine.comparing.questions import (
    Contestant,
    Question,
    order_questions,
    parse_questions,
    read_question,
)
from engine.comparing.results import build_annotations, compute_results, select_pair
from engine.comparing.vote_file import VoteFile
from engine.serving.app import DONE, KEEP_ALIVE, STILL_HERE, EventStream, format_event
from engine.serving.guard import Access, read_json
from engine.serving.openai_api import ApiError, Wanted, read_chat
from engine.serving.pages import read_page

PAGE = Path(__file__).with_name("compare.html")
VOTER = re.compile(r"[A-Za-z0-9-]{1,64}")
SETTINGS = ("temperature", "top_p", "max_tokens", "seed")
MOST_ROUNDS = 1000  # that are remembered; the oldest is forgotten


@dataclass(eq=False)
class Round:
    """Two answers to a question, shown to a voter as A and B."""

    id: str
    voter: str
    question: Question
    names: tuple[str, str]  # as shown
    relay: Relay
    settings: Mapping[str, Any]
    is_whole: bool = False  # all of both answers was shown

    def close(self) -> None:
        """End what is still being written."""
        self.relay.close()

    def as_row(self, vote: str) -> dict[str, Any]:
        """Return the row of a vote on this round."""
        return {
            "prompt": self.question.instruction, "input": self.question.input, "models": list(self.names), "vote": vote,
            "answers": list(self.relay.shown_texts()), "stopped": not self.is_whole, "settings": self.settings,
            "voter": self.voter, "round": self.id, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip


class Comparison:
    """Two contestants, the baseline first, and the votes on their answers.

    questions are those that voters are asked from the beginning; has_fixed_questions: nothing else can be answered.
    longest: tokens of a prompt and its answer, 0 where nothing is written. can_talk: the server has a model of its own.
    """

    def __init__(
        self, contestants: tuple[Contestant, Contestant], votes: VoteFile, access: Access,
        questions: Sequence[Question] = (), has_fixed_questions: bool = False, longest: int = 0, can_talk: bool = False,
    ):  # fmt: skip
        self.contestants, self.votes, self.access = contestants, votes, access
        self.questions, self.has_fixed_questions, self.longest = questions, has_fixed_questions, longest
        self.can_talk = can_talk
        self.names = contestants[0].name, contestants[1].name
        self.rounds: OrderedDict[str, Round] = OrderedDict()
        self.writing = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Return the endpoints."""
        return [
            Route("/compare", self.page),
            Route("/compare/questions", self.list_questions, methods=["POST"]),
            Route("/compare/ask", self.ask, methods=["POST"]),
            Route("/compare/vote", self.vote, methods=["POST"]),
            Route("/compare/results", self.tell_results),
            Route("/compare/annotations", self.export),
        ]

    async def page(self, request: Request) -> Response:
        """Return the page."""
        return HTMLResponse(read_page(PAGE, '<a href="/">Talk</a>' if self.can_talk else ""))

    # ---- questions --------------------------------------------------------------------------------------------------

    async def list_questions(self, request: Request) -> Response:
        """Return what a voter is asked, in the voter's order: the server's questions, or those of a file's text."""
        body = await self._read_body(request, "name", "text")
        voter, questions = read_voter(body), self.questions
        if body.get("text") is not None:
            if self.has_fixed_questions:
                raise ApiError(400, "two files of answers are compared; their questions are the only ones", "text")
            name, text = body.get("name") or "questions", body["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise ApiError(400, "name, text: wanted a file's name and what it holds, both texts", "text")
            try:
                questions = parse_questions(name, text)
            except DataError as error:
                raise ApiError(400, str(error), "text") from None
        pair = select_pair(self.names, self.votes.kept)
        voted = Counter(one.vote.key for one in pair if one.row.get("voter") == voter)
        listed = [
            {"instruction": one.instruction, "input": one.input, "number": one.number, "is_done": is_done}
            for one, is_done in order_questions(questions, voter, voted)
        ]
        longest = self.longest - 1 if self.longest else None
        return JSONResponse({"questions": listed, "is_fixed": self.has_fixed_questions, "max_tokens": longest})

    # ---- answers ----------------------------------------------------------------------------------------------------

    async def ask(self, request: Request) -> Response:
        """Begin a round, and stream both answers at one pace."""
        body = await self._read_body(request, "instruction", "input", "number", *SETTINGS)
        voter, question = read_voter(body), self._find_question(body)
        wanted = read_chat(
            {name: body[name] for name in SETTINGS if body.get(name) is not None}
            | {"messages": [{"role": "user", "content": question.instruction}], "stream": True}
        )
        shown = self.contestants if secrets.randbelow(2) else self.contestants[::-1]
        first = shown[0].answer(question, wanted)
        try:
            second = shown[1].answer(question, wanted)
        except ApiError:
            first.close()
            raise
        made = Round(
            secrets.token_urlsafe(16), voter, question, (shown[0].name, shown[1].name), Relay((first, second)),
            {} if self.has_fixed_questions else describe_settings(wanted),
        )  # fmt: skip
        self.rounds[made.id] = made
        while len(self.rounds) > MOST_ROUNDS:
            self.rounds.popitem(last=False)[1].close()
        return EventStream(self._stream(made), made)

    def _find_question(self, body: Mapping[str, Any]) -> Question:
        number = body.get("number")
        if not self.has_fixed_questions:
            return read_question(body)
        if type(number) is not int or not 0 <= number < len(self.questions):
            raise ApiError(400, f"number: wanted a whole number of 0 to {len(self.questions) - 1}", "number")
        return self.questions[number]

    async def _stream(self, made: Round) -> AsyncIterator[str]:
        """Yield the events of a round: its id, texts that A and B go on with, and that both have ended."""
        yield format_event({"round": made.id})
        try:
            async for texts in made.relay.steps(KEEP_ALIVE):
                yield STILL_HERE if texts is None else format_event({"texts": texts})
        except ApiError as error:
            self.rounds.pop(made.id, None)
            made.close()
            yield format_event(error.body())
            return
        made.is_whole = True
        yield format_event({"ended": made.relay.reasons})
        yield DONE

    # ---- votes ------------------------------------------------------------------------------------------------------

    async def vote(self, request: Request) -> Response:
        """Keep a vote, once, and tell then whose answers they were. It ends a round that is still being written."""
        body = await self._read_body(request, "round", "vote")
        voter, id, vote = read_voter(body), body.get("round"), body.get("vote")
        if vote not in VOTES:
            raise ApiError(400, f"vote: wanted one of {', '.join(VOTES)}", "vote")
        async with self.writing:
            row = next((one.row for one in reversed(self.votes.kept) if one.row.get("round") == id), None)
            if row is None:
                row = await self._keep(id, voter, vote)
            elif row["vote"] != vote or row.get("voter") != voter:
                raise ApiError(409, f"this round has a vote already, {row['vote']}; it stays", "vote", "voted")
        return JSONResponse({"vote": row["vote"], "models": row["models"]})

    async def _keep(self, id: Any, voter: str, vote: str) -> dict[str, Any]:
        made = self.rounds.get(id) if isinstance(id, str) else None
        if made is None or made.voter != voter:
            raise ApiError(404, "there is no such round (any more); ask the question again", "round", "unknown_round")
        made.close()
        row = made.as_row(vote)
        try:
            await asyncio.to_thread(self.votes.add, row)
        except OSError as error:
            why = error.strerror or error
            raise ApiError(500, f"the vote could not be kept: {why}; make room and vote again", "vote") from None
        self.rounds.pop(made.id, None)
        return row

    # ---- results ----------------------------------------------------------------------------------------------------

    async def tell_results(self, request: Request) -> Response:
        """Return the figures of all votes on these contestants."""
        return JSONResponse(compute_results(self.names, self.votes.kept))

    async def export(self, request: Request) -> Response:
        """Return AlpacaEval's annotations."""
        headers = {"Content-Disposition": 'attachment; filename="annotations.json"'}
        return JSONResponse(build_annotations(self.names, self.votes.kept), headers=headers)

    async def _read_body(self, request: Request, *known: str) -> dict[str, Any]:
        body = await read_json(request, self.access)
        if not isinstance(body, dict):
            raise ApiError(400, f"the body is a {type(body).__name__}, wanted a JSON object")
        unknown = sorted(set(body) - {"voter", *known})
        if unknown:
            raise ApiError(400, f"unknown parameter {unknown[0]!r}; leave it out", unknown[0], "unknown_parameter")
        return body


def read_voter(body: Mapping[str, Any]) -> str:
    """Return who votes. Raises ApiError."""
    voter = body.get("voter")
    if not isinstance(voter, str) or not VOTER.fullmatch(voter):
        raise ApiError(400, "voter: wanted 1 to 64 letters, digits and dashes that the voter keeps", "voter")
    return voter


def describe_settings(wanted: Wanted) -> dict[str, Any]:
    """Return how the answers of a round were drawn."""
    sampling = wanted.sampling
    return {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": wanted.max_tokens,
        "seed": sampling.seed,
    }  # fmt: skip

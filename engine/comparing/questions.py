"""What is asked in a comparison: lists of questions, and who answers them."""

import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_gen.base import cli
from data_gen.judging.answers import Questions, join_input, make_key, match_answers, read_answers, replace_surrogates
from engine.base.errors import DataError, UsageError
from engine.comparing.pace import Answer
from engine.data.data_files import TABLES
from engine.data.prompts import read_prompts
from engine.serving.model_service import ModelService, Piece
from engine.serving.openai_api import ApiError, Wanted
from engine.serving.prompts import encode_chat


@dataclass(frozen=True)
class Question:
    """An instruction and its input. number: its place in the list of two files of answers, None of any other."""

    instruction: str
    input: str = ""
    number: int | None = None

    def key(self) -> str:
        """Return what it shares with a vote on it."""
        return make_key(join_input(self.instruction, self.input))


def order_questions(questions: Sequence[Question], voter: str, voted: Counter[str]) -> list[tuple[Question, bool]]:
    """Return (question, whether this voter has voted on it), in the order in which the voter is asked.

    voted counts the voter's votes by the key of their question: a question that comes twice wants two.
    """
    left = Counter(voted)
    shuffled = list(questions)
    random.Random(voter).shuffle(shuffled)
    found = []
    for question in shuffled:
        key = question.key()
        found.append((question, left[key] > 0))
        left[key] -= 1
    return found


# ---- lists of questions ---------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file as engine.evaluate --prompts reads it. Raise DataError."""
    found = []
    for row in read_prompts(path):
        instruction, given = row.instruction, row.input
        if row.messages:
            texts = [text for role, text in row.messages if role != "assistant" or text]
            if len(texts) != 1:
                raise DataError(f"{row.source}: got a chat of {len(texts)} messages, wanted one instruction")
            instruction = texts[0]
        if not instruction.strip():
            instruction, given = given, ""
        if not instruction.strip():
            raise DataError(f"{row.source}: got a blank instruction, wanted a text")
        found.append(Question(instruction, given))
    return found


def parse_questions(name: str, text: str) -> list[Question]:
    """Return the questions in the text of a file. Raise DataError, with the file's name."""
    kind = next((kind for kind in TABLES if name.lower().endswith(kind)), "")  # any other shows by what it holds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"questions{kind}"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            return read_questions(path)
        except DataError as error:
            raise DataError(str(error).replace("--prompts ", "").replace(str(path), name)) from None


# ---- who answers ----------------------------------------------------------------------------------------------------


class Contestant(Protocol):
    """One of the two whose answers are compared."""

    name: str

    def answer(self, question: Question, wanted: Wanted) -> Answer:
        """Begin an answer. Raises ApiError if it is refused."""


class ModelContestant:
    """A model that answers when it is asked."""

    def __init__(self, service: ModelService, name: str):
        self.service, self.name = service, name

    def answer(self, question: Question, wanted: Wanted) -> Answer:
        """Begin an answer. Raises ApiError if it is refused."""
        service = self.service
        try:
            prompt = encode_chat(
                [("user", question.instruction)], service.tokenizer, service.style, input=question.input
            )
        except DataError as error:
            raise ApiError(400, str(error), "instruction") from None
        return service.answer(wanted, prompt)


class Recorded:
    """An answer that is there already."""

    def __init__(self, text: str):
        self.text = text

    async def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """Yield the answer as one piece."""
        yield Piece(0, self.text, finish_reason="stop")

    def close(self) -> None:
        """Do nothing: nothing is being written."""


class FileContestant:
    """A model whose answers were recorded: by the number of their question."""

    def __init__(self, name: str, texts: Sequence[str]):
        self.name, self.texts = name, texts

    def answer(self, question: Question, wanted: Wanted) -> Answer:
        """Return the recorded answer."""
        assert question.number is not None
        return Recorded(self.texts[question.number])


def read_contestants(paths: Sequence[str]) -> tuple[tuple[FileContestant, FileContestant], list[Question]]:
    """Return the contestants of two files of answers, the first of them the baseline, and their questions.

    Raises DataError and UsageError.
    """
    with as_own_errors():
        found: Questions = match_answers([read_answers(Path(path)) for path in paths])
    first, second = (
        FileContestant(name, [outputs[place] for outputs in found.outputs]) for place, name in enumerate(found.names)
    )
    return (first, second), [Question(text, "", number) for number, text in enumerate(found.instructions)]


@contextlib.contextmanager
def as_own_errors() -> Iterator[None]:
    """Raise the errors of data_gen's readers as the engine's, which end a command with the same exit code."""
    try:
        yield
    except cli.UsageError as error:
        raise UsageError(str(error)) from None
    except cli.DataError as error:
        raise DataError(str(error)) from None


def read_question(body: Mapping[str, Any]) -> Question:
    """Return the question that a request asks in its own words. Raises ApiError."""
    texts = [body.get(name, "") for name in ("instruction", "input")]
    if not all(isinstance(text, str) for text in texts) or not texts[0].strip():
        raise ApiError(400, "instruction: wanted a text, and input, if there is one, a text", "instruction")
    return Question(replace_surrogates(texts[0]), replace_surrogates(texts[1]))

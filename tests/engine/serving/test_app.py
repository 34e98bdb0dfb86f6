"""What is collected of a model's pieces, with a client that stays and one that leaves."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")

from engine.serving import app
from engine.serving.app import collect
from engine.serving.model_service import Piece
from engine.serving.openai_api import ApiError


def collected(pieces, leaves=False, n=2):
    """Return the choices, or the error, and whether the answers were closed."""
    closed = []

    async def come():
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece
        if leaves:
            await asyncio.sleep(60)

    async def receive():
        await asyncio.sleep(0 if leaves else 60)
        return {"type": "http.disconnect"}

    async def run():
        answering = SimpleNamespace(close=lambda: closed.append(True))
        try:
            return await collect(SimpleNamespace(receive=receive), answering, come(), n)
        except ApiError as error:
            return error

    return asyncio.run(run()), closed


def test_pieces_of_several_choices_are_put_together_and_silence_is_no_piece():
    pieces = [Piece(0, "a", 1), None, Piece(1, "x", 2), Piece(0, "b", 1, finish_reason="stop"), Piece(1, "y", 1)]
    (first, second), closed = collected([*pieces, Piece(1, "", 0, finish_reason="length")])
    assert (first.text, first.n_tokens, first.finish_reason) == ("ab", 2, "stop")
    assert (second.text, second.n_tokens, second.finish_reason) == ("xy", 3, "length") and closed == [True]


@pytest.mark.parametrize("error, status, text", [(KeyError("k"), 500, "the model failed: KeyError"),
                                                 (ApiError(400, "odd"), 400, "odd")])  # fmt: skip
def test_an_error_ends_all(error, status, text):
    found, closed = collected([Piece(0, "a", 1), Piece(1, error=error)])
    assert (found.status, str(found)) == (status, text) and closed == [True]


def test_a_client_that_leaves_ends_its_answers():
    found, closed = collected([None], leaves=True)
    assert found.status == 499 and closed == [True]


def test_the_time_of_the_first_token_and_their_number_are_noted(monkeypatch):
    clock = iter([100.0, 102.5, 109.0])
    monkeypatch.setattr(app, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    async def pieces(patience):
        for piece in (None, Piece(0, "", 0), Piece(0, "a", 2), Piece(0, "b", 3, finish_reason="stop")):
            yield piece

    async def run(notes):
        return [piece async for piece in app.watch(SimpleNamespace(pieces=pieces), notes)]

    notes = {}
    assert len(asyncio.run(run(notes))) == 4 and notes == {"first_token": 2.5, "tokens": 5}


@pytest.mark.parametrize(
    "alive, status, text", [((True, True), 200, "ok"), ((True, False), 503, "stopping"), ((), 200, "ok")]
)
def test_health_is_that_of_every_model(alive, status, text):
    services = {i: SimpleNamespace(is_alive=lambda one=one: one) for i, one in enumerate(alive)}
    found = asyncio.run(app.Server.health(SimpleNamespace(services=services), None))
    assert (found.status_code, found.body) == (status, f'{{"status":"{text}"}}'.encode())

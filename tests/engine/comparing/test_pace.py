"""Two answers at one pace: the slower one leads, and an end changes nothing about the speed."""

import asyncio

import pytest

pytest.importorskip("starlette")

from engine.comparing.pace import SPEED, Pace, Relay
from engine.serving.model_service import Piece
from engine.serving.openai_api import ApiError


def test_no_more_is_shown_of_one_than_of_the_other():
    pace = Pace()
    shown = [
        pace.allow(lengths, (False, False), now) for now, lengths in enumerate([(0, 9), (3, 9), (7, 40), (30, 50)])
    ]
    assert shown == [0, 3, 7, 30]


@pytest.mark.parametrize("is_fast_longer", [True, False])
def test_the_longer_answer_goes_on_as_fast_as_both_came(is_fast_longer):
    """Whether the rest lies ready or is still being written cannot be seen."""
    pace = Pace()
    for now in range(1, 11):  # ten characters a second, by the slower one
        slow = 10 * now
        assert pace.allow((500, slow), (True, False), now) == slow
    if is_fast_longer:  # the slow one ends at 100, and 400 lie ready
        shown = [pace.allow((500, 100), (True, True), 10 + wait) for wait in (0, 1, 2, 30, 60)]
        assert shown == [100, 111, 122, 433, 500]
    else:  # the fast one was at its end with 100, and the slow one goes on
        pace = Pace()
        for now in range(1, 11):
            assert pace.allow((100, 10 * now), (True, False), now) == 10 * now
        shown = [pace.allow((100, 10 * now), (True, False), now) for now in range(10, 15)]
        assert shown == [100, 110, 120, 130, 140]


def test_answers_that_lie_ready_are_shown_at_once():
    assert Pace().allow((300, 20), (True, True), 5.0) == 300


def test_after_an_answer_of_one_piece_the_other_does_not_burst():
    pace = Pace()
    assert pace.allow((4, 900), (False, True), 1.0) == 4
    assert pace.allow((4, 900), (True, True), 1.0) == 4
    assert pace.allow((4, 900), (True, True), 2.0) == 4 + SPEED


class Written:
    def __init__(self, *pieces):
        self.all, self.is_closed = pieces, False

    async def pieces(self, patience=None):
        for piece in self.all:
            await asyncio.sleep(0)
            yield piece

    def close(self):
        self.is_closed = True


def run(relay, patience=30):
    async def collect():
        return [texts async for texts in relay.steps(patience)]

    return asyncio.run(collect())


def test_a_relay_shows_all_of_both_in_equal_steps():
    a = Written(None, *(Piece(0, f"a{n:02}", 1) for n in range(30)), None, Piece(0, finish_reason="stop"))
    b = Written(*(Piece(0, "b", 1) for _ in range(90)), Piece(0, finish_reason="length"))
    relay = Relay((a, b))
    steps = run(relay)
    assert relay.shown_texts() == ("".join(f"a{n:02}" for n in range(30)), "b" * 90)
    assert tuple("".join(step[side] for step in steps) for side in (0, 1)) == relay.shown_texts()
    assert all(len(left) == len(right) for left, right in steps) and len(steps) > 10
    assert relay.reasons == ["stop", "length"]


def test_a_failure_of_one_ends_both():
    relay = Relay(
        (Written(Piece(0, "fine", 1), Piece(0, finish_reason="stop")), Written(Piece(0, error=KeyError("x"))))
    )
    with pytest.raises(ApiError, match="the model failed: KeyError"):
        run(relay)


def test_silence_is_told():
    class Slow(Written):
        async def pieces(self, patience=None):
            await asyncio.sleep(0.2)
            yield Piece(0, "late", finish_reason="stop")

    steps = run(Relay((Slow(), Slow())), patience=0.02)
    assert steps[0] is None and steps[-1] == ("late", "late")

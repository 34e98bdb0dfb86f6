"""A call to the files and batches endpoints that is never answered is given up as the flags say."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")

import openai

from data_gen.api.cleaner import Cleaner
from data_gen.api.retries import Calls
from data_gen.base.cli import Failure


def test_a_silent_server_is_left_after_timeout_and_patience():
    client = SimpleNamespace(openai=openai, timeout_s=0.05, cleaner=Cleaner([]))
    rate = SimpleNamespace(draw_backoff_s=lambda tries: 0)
    collector = SimpleNamespace(client=client, limits=SimpleNamespace(patience_s=0.1), rate=rate, stopping=False)
    began = []

    async def stay_silent():
        began.append(None)
        await asyncio.sleep(4)

    with pytest.raises(Failure, match=r"no answer for 0.1 s \(--patience\): no whole answer in 0.05 s"):
        asyncio.run(Calls(collector).make_call(stay_silent))
    assert 1 <= len(began) <= 2


def make_calls(waits, backoff_s=0, key=""):
    """Return Calls that append their waits to a list in place of waiting."""
    client = SimpleNamespace(openai=openai, timeout_s=5, cleaner=Cleaner([key]))
    rate = SimpleNamespace(draw_backoff_s=lambda tries: backoff_s * tries)
    collector = SimpleNamespace(client=client, limits=SimpleNamespace(patience_s=60), rate=rate, stopping=False)
    calls = Calls(collector)

    async def note(seconds):
        waits.append(seconds)

    calls.pause = note
    return calls


def make_error(status, text, **headers):
    """Return what the package raises for a reply with this status."""
    error = openai.APIError("no", request=None, body=None)
    error.response = SimpleNamespace(status_code=status, text=text, headers=headers)
    return error


def test_the_longer_one_of_back_off_and_the_servers_wish_is_waited_for():
    errors = [
        make_error(429, "slow", **{"retry-after": "1"}),
        make_error(503, "slow", **{"retry-after": "50"}),
        make_error(500, "no"),
        ValueError("half a text"),
        make_error(429, "slow", **{"retry-after": "0"}),
    ]
    waits = []

    async def fail_first():
        if errors:
            raise errors.pop(0)
        return 5

    assert asyncio.run(make_calls(waits, backoff_s=10).make_call(fail_first)) == 5
    assert waits == [10, 50, 30, 40, 50]


def test_the_key_is_told_in_no_failure_and_what_no_retry_mends_is_told_at_once():
    waits = []

    async def refuse():
        raise make_error(401, '{"error": {"message": "Incorrect API key: sk-secret-0123456789"}}')

    with pytest.raises(Failure, match="the server said 401: Incorrect API key: ") as failure:
        asyncio.run(make_calls(waits, key="sk-secret-0123456789").make_call(refuse))
    assert "secret" not in str(failure.value) and waits == []

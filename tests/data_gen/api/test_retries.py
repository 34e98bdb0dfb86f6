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

"""What a model takes on, and what its pieces say, without a model."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")

from engine.inference.sampling import Draw, Sampling
from engine.inference.scheduler import CANCELLED, Load
from engine.serving import model_service
from engine.serving.model_service import Limits, ModelService, add_loads
from engine.serving.openai_api import ApiError, Wanted


@pytest.fixture
def service(monkeypatch):
    """A service whose scheduler only notes what it is given. Its words are its tokens."""
    words = {3: b"fig", 4: b" \xf0\x9f", 5: b"\x8d\x87"}
    tokenizer = SimpleNamespace(
        special_ids={"<end>": 2}, piece=lambda id: words.get(id, b""),
        stream=lambda: SimpleNamespace(push=lambda id: words[id].decode(errors="ignore"), flush=lambda: "..."),
    )  # fmt: skip
    given = []
    scheduler = SimpleNamespace(submit=given.append, load=lambda: Load(1, 1, 0, 0, 0), given=given)
    monkeypatch.setattr(model_service, "Scheduler", lambda *_: scheduler)
    monkeypatch.setattr(model_service, "find_stop_ids", lambda *_: {2})
    monkeypatch.setattr(ModelService, "is_alive", lambda self: not self.is_stopping)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    return ModelService("m", model, tokenizer, "alpaca", Limits(max_concurrency=2, max_queue=3, max_length=10))


def wanted(**changes):
    asked = {"model": "m", "sampling": Sampling(), "max_tokens": None, "n": 1, "stops": (), "stream": False}
    return Wanted(**asked | {"include_usage": False} | changes)


def answered(service, *args):
    async def answer():
        return service.answer(*args)

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("n_prompt", "changes", "code"),
    [
        (9, {}, None), (10, {}, "context_length_exceeded"), (1, {"n": 3}, None), (1, {"n": 4}, "queue_full"),
        (1, {"sampling": Sampling(bias={0: 1.0, 8: 1.0})}, None),
        (1, {"sampling": Sampling(bias={9: 1.0})}, "no token 9"),
    ],
)  # fmt: skip
def test_a_service_takes_as_much_as_its_limits_say(n_prompt, changes, code, service):
    """One answer is being written and one waits."""
    if code is None:
        assert len(answered(service, wanted(**changes), [1] * n_prompt).requests) == changes.get("n", 1)
        return
    with pytest.raises(ApiError) as refused:
        answered(service, wanted(**changes), [1] * n_prompt)
    assert code in (refused.value.code or str(refused.value)) and not service.scheduler.given


def test_a_service_that_ends_refuses(service):
    service.is_stopping = True
    with pytest.raises(ApiError, match="shutting down"):
        answered(service, wanted(), [1])


def test_each_choice_has_a_seed_of_its_own_and_the_grammar_that_is_asked_for(service, monkeypatch):
    made = []
    grammar = SimpleNamespace(follow_schema=lambda s: ("schema", s), follow_regex=lambda r: ("regex", r))
    monkeypatch.setattr(model_service, "Constraint", lambda tokenizer: made.append(tokenizer) or grammar)
    for changes, found in (({}, None), ({"schema": {}}, ("schema", {})), ({"regex": "a"}, ("regex", "a"))):
        answered(service, wanted(n=3, sampling=Sampling(seed=2**63 - 2), **changes), [1, 2])
        asked = service.scheduler.given[-3:]
        assert [one.sampling.seed for one in asked] == [2**63 - 2, 2**63 - 1, 0]
        assert [one.grammar for one in asked] == [found] * 3 and {one.max_new_tokens for one in asked} == {8}
    assert len(made) == 1, "a vocabulary is read once"


def test_what_becomes_of_tokens_and_of_the_end(service):
    async def run():
        answering = service.answer(wanted(stops=("g",)), [1])
        request = service.scheduler.given[-1]
        goes_on = request.on_token(Draw(4)), request.on_token(Draw(3))
        request.on_end("stop", None)
        service.answer(wanted(), [1])
        cut = service.scheduler.given[-1]
        cut.on_end(CANCELLED, None)
        await asyncio.sleep(0)
        return goes_on, [answering.queue.get_nowait() for _ in range(3)]

    goes_on, (first, second, last) = asyncio.run(run())
    assert goes_on == (True, False), "nothing is computed behind a stop string"
    assert (first.text, second.text, first.n_tokens) == (" ", "fi", 1)
    assert (last.text, last.finish_reason, last.error) == ("", "stop", None)


def test_an_answer_that_is_cut_off_is_an_error_and_an_end_has_what_is_left(service):
    async def run(reason):
        answering = service.answer(wanted(), [1])
        service.scheduler.given[-1].on_end(reason, None)
        return [piece async for piece in answering.pieces()]

    (cut,), (whole,) = asyncio.run(run(CANCELLED)), asyncio.run(run("length"))
    assert cut.error.status == 503 and cut.finish_reason is None
    assert (whole.text, whole.finish_reason, whole.error) == ("...", "length", None)


def test_a_token_is_described_by_its_text_or_its_name_and_what_cannot_come_by_a_number(service):
    found = service.describe_draw(Draw(3, -0.5, ((3, -0.5), (2, -math.inf), (4, -2.0), (8, -3.0))))
    assert (found["token"], found["logprob"], found["bytes"]) == ("fig", -0.5, list(b"fig"))
    assert [top["token"] for top in found["top_logprobs"]] == ["fig", "<end>", " \ufffd", ""]
    assert [top["logprob"] for top in found["top_logprobs"]] == [-0.5, -9999.0, -2.0, -3.0]
    json.dumps(found, allow_nan=False)


def test_loads_of_several_models_are_summed():
    loads = [Load(1, 2, 3, 4, 5), Load(10, 20, 30, 40, 50)]
    assert add_loads(loads) == Load(11, 22, 33, 44, 55) and add_loads([]) == Load(0, 0, 0, 0, 0)

"""Answers to several prompts: each has a seed of its own, and one that fails ends all."""

import pytest

from engine.inference import answers
from engine.inference.sampling import Sampling
from engine.inference.scheduler import Draw


class Scheduler:
    """Ends a request a step, with its seed as the only token; request number `failing` with an error."""

    failing = None

    def __init__(self, model, n_sequences, longest):
        self.asked, self.is_stopped = [], False
        self.sizes = n_sequences, longest
        Scheduler.last = self

    def submit(self, request):
        self.asked.append(request)

    def step(self):
        request = self.asked.pop(0)
        if request.sampling.seed - 5 == self.failing:
            request.on_end("error", ValueError("odd"))
        else:
            assert request.on_token(Draw(request.sampling.seed))
            request.on_end("stop", None)
        return bool(self.asked)

    def stop(self):
        self.is_stopped = True


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.setattr(answers, "Scheduler", Scheduler)
    monkeypatch.setattr(Scheduler, "failing", None)
    ended = []

    def ask(prompts, n_sequences=2):
        return answers.answer_prompts(None, prompts, (), 10, Sampling(seed=5), n_sequences, ended.append), ended

    return ask


@pytest.mark.parametrize("n, n_sequences, sizes", [(3, 2, (2, 13)), (1, 8, (1, 11)), (3, 8, (3, 13))])
def test_each_prompt_has_an_answer_with_a_seed_of_its_own(n, n_sequences, sizes, ask):
    found, ended = ask([[1] * (i + 1) for i in range(n)], n_sequences)
    assert [one.ids for one in found] == [[5 + i] for i in range(n)] and ended == list(range(n))
    assert {one.reason for one in found} == {"stop"} and Scheduler.last.sizes == sizes


def test_an_error_ends_all(ask, monkeypatch):
    monkeypatch.setattr(Scheduler, "failing", 1)
    with pytest.raises(ValueError, match="odd"):
        ask([[1], [1], [1]])
    assert Scheduler.last.is_stopped and len(Scheduler.last.asked) == 1

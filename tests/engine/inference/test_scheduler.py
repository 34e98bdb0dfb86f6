"""Continuous batching: the tokens of the simple path, whoever joins, leaves and shares what."""

import random
from dataclasses import replace

import pytest
import torch

from engine.inference import scheduler as scheduler_module
from engine.inference.generation import generate
from engine.inference.sampling import Draw, Sampler, Sampling
from engine.inference.scheduler import CANCELLED, LENGTH, STOP, Request, Scheduler, count_common
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import new_model

CONFIG = ModelConfig(
    dim=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=64, vocab_size=97, max_seq_len=256
)
TEMPLATE = list(range(1, 31))
PLAIN = Sampling()


@pytest.fixture(scope="module")
def model():
    model = new_model(CONFIG, "cpu", torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that greedy answers are not one token again and again
    return model


class Answer:
    """A request and what came of it."""

    def __init__(self, prompt, n=12, stop_ids=(), sampling=PLAIN, grammar=None, until=None):
        self.draws, self.reason, self.error = [], None, None
        self.request = Request(prompt, n, stop_ids, sampling, self.take, self.end, grammar)
        self.until = until

    def take(self, draw):
        self.draws.append(draw)
        return self.until is None or draw.id != self.until

    def end(self, reason, error):
        assert self.reason is None, "an answer ends once"
        self.reason, self.error = reason, error

    @property
    def ids(self):
        return [draw.id for draw in self.draws]


def answer_all(scheduler, answers):
    for answer in answers:
        scheduler.submit(answer.request)
    while scheduler.step():
        pass
    return [answer.ids for answer in answers]


def make_prompts(n):
    rng = random.Random(0)
    return [
        TEMPLATE[: rng.choice((0, 9, 30))] + [rng.randrange(97) for _ in range(rng.randint(1, 25))] for _ in range(n)
    ]


@pytest.mark.parametrize("keep_prefixes", [True, False])
@pytest.mark.parametrize("n_sequences", [1, 3, 12])
def test_greedy_answers_are_those_of_the_simple_path(model, n_sequences, keep_prefixes):
    prompts = make_prompts(32)
    want = [generate(model, [prompt], {5}, 12)[0] for prompt in prompts]
    scheduler = Scheduler(model, n_sequences, 80, keep_prefixes)
    answers = [Answer(prompt, stop_ids={5}) for prompt in prompts]
    rng = random.Random(1)
    waiting = list(answers)
    while waiting or scheduler.step():  # they join whenever the others are somewhere in their answers
        for _ in range(rng.randint(0, 4)):
            if waiting:
                scheduler.submit(waiting.pop(0).request)
        scheduler.step()
    assert [answer.ids for answer in answers] == want
    assert {answer.reason for answer in answers} == {LENGTH, STOP} or all(len(w) == 12 for w in want)
    load = scheduler.load()
    assert load.prompt_tokens == sum(map(len, prompts)) and (load.kept_tokens > 0) == keep_prefixes


def test_a_wave_computes_a_shared_beginning_once(model):
    prompts = [[*TEMPLATE, i] for i in (40, 41, 42, 43)]
    scheduler = Scheduler(model, 4, 60)
    assert answer_all(scheduler, [Answer(p) for p in prompts]) == [generate(model, [p], (), 12)[0] for p in prompts]
    assert scheduler.load().kept_tokens == 3 * len(TEMPLATE)


def test_the_next_turn_of_a_chat_goes_on_where_the_last_one_ended(model):
    scheduler = Scheduler(model, 2, 120)
    first = Answer([*TEMPLATE, 50])
    answer_all(scheduler, [first])
    second = [*TEMPLATE, 50, *first.ids, 51, 52, 53]
    assert answer_all(scheduler, [Answer(second)]) == generate(model, [second], (), 12)
    assert scheduler.load().kept_tokens == len(TEMPLATE) + 1 + len(first.ids) - 1  # the last token has no keys yet


def test_the_last_token_of_an_answer_that_goes_on_has_no_keys_to_take(model):
    scheduler = Scheduler(model, 2, 120)
    first, last = Answer([*TEMPLATE, 50]), Answer([])
    scheduler.submit(first.request)
    for _ in range(5):
        scheduler.step()
    last.request.prompt = [*TEMPLATE, 50, *first.ids, 51]
    scheduler.submit(last.request)
    while scheduler.step():
        pass
    assert scheduler.load().kept_tokens == len(TEMPLATE) + 5
    assert last.ids == generate(model, [last.request.prompt], (), 12)[0]


def test_a_sampled_answer_depends_on_its_seed_alone(model):
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, seed=7, repetition_penalty=1.2)
    alone = answer_all(Scheduler(model, 1, 60), [Answer([*TEMPLATE, 3], sampling=sampling)])
    others = [Answer(p, sampling=Sampling(temperature=1.0, seed=i)) for i, p in enumerate(make_prompts(9))]
    beside = answer_all(Scheduler(model, 10, 80), [*others, Answer([*TEMPLATE, 3], sampling=sampling)])
    assert beside[-1] == alone[0]
    assert len({tuple(ids) for ids in beside}) > 5


def test_the_length_of_the_cache_ends_an_answer(model):
    answer = Answer([1, 2, 3], n=100)
    answer_all(Scheduler(model, 1, 10), [answer])
    assert (len(answer.ids), answer.reason) == (7, LENGTH)


def test_whoever_listens_may_stop(model):
    free = Answer([9, 8, 7])
    answer_all(Scheduler(model, 1, 40), [free])
    answer = Answer([9, 8, 7], until=free.ids[3])
    answer_all(Scheduler(model, 1, 40), [answer])
    assert answer.ids == free.ids[: free.ids.index(free.ids[3]) + 1] and answer.reason == STOP


def test_cancelled_requests_leave_and_the_others_go_on(model):
    scheduler = Scheduler(model, 2, 60)
    answers = [Answer([i, i + 1, i + 2]) for i in range(4)]
    for answer in answers:
        scheduler.submit(answer.request)
    scheduler.step()
    answers[0].request.cancelled = answers[3].request.cancelled = True
    while scheduler.step():
        pass
    assert [answer.reason for answer in answers] == [CANCELLED, LENGTH, LENGTH, CANCELLED]
    assert len(answers[0].ids) == 1 and not answers[3].ids
    assert answers[2].ids == generate(model, [[2, 3, 4]], (), 12)[0]


def test_an_error_of_one_listener_is_its_own(model):
    answers = [Answer([1, 2, 3]), Answer([4, 5, 6])]
    answers[0].request.on_token = lambda draw: 1 / 0
    answer_all(Scheduler(model, 2, 60), answers)
    assert isinstance(answers[0].error, ZeroDivisionError) and answers[1].error is None
    assert len(answers[1].ids) == 12


def test_an_error_of_the_model_ends_all_that_run_and_no_other(model, monkeypatch):
    scheduler = Scheduler(model, 2, 60)
    answers = [Answer([1, 2, 3]), Answer([4, 5, 6]), Answer([7, 8, 9])]
    for answer in answers:
        scheduler.submit(answer.request)
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_draw", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        scheduler.step()
    assert [type(answer.error) for answer in answers[:2]] == [MemoryError] * 2
    while scheduler.step():
        pass
    assert answers[2].ids == generate(model, [[7, 8, 9]], (), 12)[0]


@pytest.mark.parametrize("event", ["a cancel", "an error in an answer", "an error in another prompt"])
def test_what_is_broken_off_leaves_no_token_whose_keys_are_not_there(event, model, monkeypatch):
    """The next turn of the chat would read them. A forward may fail when some layers have stored theirs."""

    def fail(*_):
        raise MemoryError("no room in the last layer")

    scheduler = Scheduler(model, 1, 120)
    scheduler.decoder = None  # torch's forward, layer by layer
    first, other = Answer([*TEMPLATE, 50]), Answer(list(range(90, 40, -1)))
    scheduler.submit(first.request)
    for _ in range(4):
        scheduler.step()
    if event != "an error in an answer":
        first.request.cancelled = True
        scheduler.step()
    if event != "a cancel":
        if event == "an error in another prompt":
            scheduler.submit(other.request)
        with monkeypatch.context() as patch:
            patch.setattr(model.layers[-1], "forward", fail)
            scheduler.step()
    assert isinstance((other if "prompt" in event else first).error, MemoryError) == (event != "a cancel")
    following = [*TEMPLATE, 50, *first.ids, 51, 52]
    assert len(first.ids) == 4 and answer_all(scheduler, [Answer(following)]) == generate(model, [following], (), 12)


def test_stop_ends_all(model):
    scheduler = Scheduler(model, 1, 60)
    answers = [Answer([1, 2]), Answer([3, 4])]
    for answer in answers:
        scheduler.submit(answer.request)
    scheduler.step()
    scheduler.stop()
    assert [answer.reason for answer in answers] == [CANCELLED] * 2 and not scheduler.step()


def test_prompts_that_cannot_be_answered_are_refused(model):
    scheduler = Scheduler(model, 1, 10)
    with pytest.raises(ValueError, match="an empty prompt"):
        scheduler.submit(Answer([]).request)
    with pytest.raises(ValueError, match="the prompt has 10 tokens, wanted under 10"):
        scheduler.submit(Answer([1] * 10).request)


def test_count_common_leaves_the_last_token():
    assert count_common([1, 2, 3], [1, 2, 3]) == 2
    assert count_common([1, 2, 3, 4], [1, 2, 9]) == 2
    assert count_common([1], []) == 0


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw(logits, prompt=(0,), times=1, **settings):
    sampler = Sampler(Sampling(**settings), prompt, torch.device("cpu"))
    return [sampler.draw(torch.tensor(logits)) for _ in range(times)]


def count_ids(logits, **settings):
    return {d.id for seed in range(200) for d in draw(logits, temperature=1.0, seed=seed, **settings)}


def test_top_k_top_p_and_min_p_keep_the_likeliest():
    logits = [0.0, 1.0, 2.0, 3.0]  # p: 0.03, 0.09, 0.24, 0.64
    assert count_ids(logits) == {0, 1, 2, 3}
    assert count_ids(logits, top_k=2) == {2, 3}
    assert count_ids(logits, top_p=0.6) == {3}
    assert count_ids(logits, top_p=0.65) == {2, 3}
    assert count_ids([0.0, 0.0], top_p=0.5) == {0}  # half and half: the first one is top_p already
    assert count_ids(logits, min_p=0.3) == {2, 3}
    assert count_ids(logits, top_k=3, top_p=0.7) == {2, 3}  # p of the three that stay: 0.09, 0.24, 0.66
    assert count_ids(logits, top_k=3, top_p=0.655) == {3}  # whose p is 0.644 of all and 0.665 of the three


def test_penalties_and_biases():
    assert [d.id for d in draw([0.0, 1.0, 0.9], times=3, frequency_penalty=0.2)] == [1, 2, 1]
    assert [d.id for d in draw([0.0, 1.0, 0.5], times=3, presence_penalty=0.8)] == [1, 2, 1]
    assert [d.id for d in draw([0.0, 1.0], times=3, presence_penalty=0.6)] == [1, 1, 1]  # once, however often it came
    assert [d.id for d in draw([0.0, 1.0, 0.9], times=3, repetition_penalty=1.5)] == [1, 2, 1]
    assert draw([0.0, 1.0, 0.9], prompt=[1], repetition_penalty=1.5)[0].id == 2
    assert draw([-1.0, -0.9], prompt=[1], repetition_penalty=1.5)[0].id == 0
    assert draw([0.0, 1.0], bias={0: 2.0})[0].id == 0


def test_log_probabilities_are_the_models_own():
    (found,) = draw([0.0, 1.0, 2.0], n_logprobs=2, bias={0: 100.0}, temperature=0.5)
    want = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1).tolist()
    assert found.id == 0 and found.logprob == pytest.approx(want[0])
    assert [(id, pytest.approx(want[id])) for id in (2, 1)] == list(found.likeliest)
    assert draw([0.0, 1.0]) == [Draw(1)]


@pytest.mark.parametrize(("kind", "keeps"), [(None, True), ("linear", True), ("llama3", True), ("dynamic", False)])
def test_keys_are_kept_where_they_do_not_depend_on_the_length_of_their_text(kind, keeps):
    scaling = RopeScaling(kind=kind, original_max_seq_len=64) if kind else None
    scaled = new_model(replace(CONFIG, rope_scaling=scaling), "cpu", torch.float32)
    assert (
        Scheduler(scaled, 1, 8).keep_prefixes == keeps
        and not Scheduler(scaled, 1, 8, keep_prefixes=False).keep_prefixes
    )


def test_the_prompts_of_one_forward_are_bounded_together(model, monkeypatch):
    """Three of 5 tokens fill 15; a prompt of more than that goes alone."""
    monkeypatch.setattr(scheduler_module, "WAVE_TOKENS", 15)
    scheduler = Scheduler(model, 8, 60)
    for n in (5, 5, 5, 1, 20, 2):
        scheduler.submit(Answer(list(range(1, n + 1))).request)
    waves = [[len(running.request.prompt) for running in scheduler._next_wave()] for _ in range(4)]
    assert waves == [[5, 5, 5], [1], [20], [2]]

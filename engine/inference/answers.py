"""Answers to many prompts: as many at once as there are sequences, each as soon as one is free."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

from engine.inference.sampling import Draw, Sampling
from engine.inference.scheduler import Request, Scheduler
from engine.model.llama import Transformer


@dataclass
class Answer:
    """One answer: its ids without the stop id, and why it ended (see engine.inference.scheduler)."""

    ids: list[int] = field(default_factory=list)
    reason: str = ""


def answer_prompts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    stop_ids: Container[int],
    max_new_tokens: int,
    sampling: Sampling,
    n_sequences: int,
    on_end: Callable[[int], None] = lambda number: None,
) -> list[Answer]:
    """Return an answer to each prompt. on_end(number) is called as each one ends; answer i draws with seed + i.

    Raises ValueError for an empty prompt, and whatever the model's forward raises.
    """
    longest = max(map(len, prompts), default=1) + max_new_tokens
    scheduler = Scheduler(model, min(n_sequences, len(prompts)) or 1, longest)
    answers = [Answer() for _ in prompts]
    errors: list[Exception] = []

    def submit(number: int) -> None:
        answer = answers[number]

        def take(draw: Draw) -> bool:
            answer.ids.append(draw.id)
            return True

        def end(reason: str, error: Exception | None) -> None:
            answer.reason = reason
            if error is not None:
                errors.append(error)
            on_end(number)

        seeded = replace(sampling, seed=sampling.seed + number)
        scheduler.submit(Request(prompts[number], max_new_tokens, stop_ids, seeded, take, end))

    for number in range(len(prompts)):
        submit(number)
    while scheduler.step() and not errors:
        pass
    if errors:
        scheduler.stop()
        raise errors[0]
    return answers

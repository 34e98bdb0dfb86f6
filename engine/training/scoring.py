"""Answers to held-out examples, beside the answers that the examples have."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.base.errors import UsageError
from engine.data.dataset import Dataset
from engine.model.llama import Transformer
from engine.text.templates import find_stop_ids
from engine.text.tokenizer import Tokenizer
from engine.training.answers import answer
from engine.training.plan import Plan
from engine.training.run import Run
from engine.training.saving import Checkpoints

SHOWN = 3  # answers that the terminal shows; metrics.jsonl and the report have all


@dataclass(frozen=True)
class Question:
    """A held-out example as a question: the ids up to its last answer, and that answer."""

    prompt: list[int]
    reference: list[int]


def find_questions(held_out: Dataset, n: int, stop_ids: frozenset[int]) -> list[Question]:
    """Return the first n examples that can be asked: those with a prompt, whose last answer is not truncated."""
    questions: list[Question] = []
    for example in range(len(held_out)):
        tokens, is_target = held_out.tokens_of(example), held_out.is_target_of(example)
        before = np.flatnonzero(~is_target)
        start = int(before[-1]) + 1  # the first token is never a target
        if start > 1 and start < len(tokens) and int(tokens[-1]) in stop_ids:
            questions.append(Question(tokens[:start].tolist(), [int(i) for i in tokens[start:] if i not in stop_ids]))
        if len(questions) == n:
            break
    return questions


def require_questions(plan: Plan) -> None:
    """Raise UsageError where --score-answers finds no held-out example that can be asked."""
    if not plan.config.score_answers or plan.held_out is None:
        return
    if not find_questions(plan.held_out, 1, find_stop_ids(plan.tokenizer, plan.config.prompt_style)):
        raise UsageError(
            f"--score-answers {plan.config.score_answers}: no held-out example has a prompt and an answer that ends "
            "within --max-length; leave it out, or hold out other rows"
        )


def score_answers(plan: Plan, run: Run, checkpoints: Checkpoints, model: Transformer, step: int) -> None:
    """Write greedy answers to the first held-out examples, and how many are equal to the answers they have."""
    assert plan.held_out is not None, "the caller has asked whether anything is held out"
    config, tokenizer = plan.config, plan.tokenizer
    stop_ids = find_stop_ids(tokenizer, config.prompt_style)
    questions = find_questions(plan.held_out, config.score_answers, stop_ids)
    n = max(len(question.reference) for question in questions)
    n += n // 2 + 8  # a longer answer is not the wanted one; this much shows how it goes on
    longest = max(len(question.prompt) for question in questions)
    n = min(n, plan.model_config.max_positions - longest)
    run.progress.print_message(f"answering {len(questions)} held-out examples, {n} tokens each at most")
    prompts, max_tokens = [question.prompt for question in questions], checkpoints.batches.packing.max_tokens
    ids = answer(model, max_tokens, prompts, stop_ids, n)
    titles = drop_common_lines([decode(tokenizer, question.prompt) for question in questions])
    title = {0: "before", plan.total_steps: "after"}.get(step, f"after {step} steps")
    n_equal, overlap = 0, 0.0
    for i, (question, found) in enumerate(zip(questions, ids, strict=True)):
        wanted, text = decode(tokenizer, question.reference), decode(tokenizer, found)
        is_equal = text.split() == wanted.split()
        n_equal, overlap = n_equal + is_equal, overlap + measure_overlap(text, wanted)
        run.metrics.write("answer", step=step, prompt=titles[i], wanted=wanted, text=text, equal=is_equal)
        if i < SHOWN:
            lines = (f"[{title}] {titles[i]}", f"wanted: {wanted}", f"answer: {text}")
            run.progress.print_message("\n".join(lines).replace("\n", "\n    "))
    overlap /= len(questions)
    run.metrics.write("score", step=step, equal=n_equal, answers=len(questions), overlap=overlap)
    run.progress.print_message(
        f"step {step}: {n_equal} of {len(questions)} held-out answers are as wanted; {overlap:.0%} of the words are"
    )


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return ids as text without blanks around it."""
    return tokenizer.decode(list(ids)).strip()


def measure_overlap(text: str, wanted: str) -> float:
    """Return the F1 of the words of two texts, 0 to 1: 2 |both| / (|text| + |wanted|), each word as often as it is."""
    words, others = Counter(text.split()), Counter(wanted.split())
    total = words.total() + others.total()
    return 2 * (words & others).total() / total if total else 1.0


def drop_common_lines(texts: Sequence[str]) -> list[str]:
    """Return the texts without the lines that all begin with and all end with, which are the template's."""
    lines = [text.split("\n") for text in texts]
    shortest = min(map(len, lines)) - 1  # a line of each stays
    head = tail = 0
    while head < shortest and len({text[head] for text in lines}) == 1:
        head += 1
    while tail < shortest - head and len({text[-1 - tail] for text in lines}) == 1:
        tail += 1
    return ["\n".join(text[head : len(text) - tail]).strip() for text in lines]

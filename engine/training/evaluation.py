"""Between steps: the loss on held-out examples, and answers to sample prompts."""

import dataclasses

import numpy as np
import torch

from engine.data.packing import Packing, make_micro_batches
from engine.model.llama import Transformer
from engine.text.templates import Row, encode_prompt, find_stop_ids
from engine.training.answers import answer
from engine.training.plan import Plan
from engine.training.run import Run
from engine.training.saving import Checkpoints
from engine.training.scoring import score_answers

CHUNK_EXAMPLES = 256  # held-out examples that are packed together


def evaluate_if_due(plan: Plan, run: Run, checkpoints: Checkpoints, model: Transformer, step: int) -> None:
    """Evaluate and answer the sample prompts where that is due after a step, or before the first step (0).

    What metrics.jsonl holds of that step already, from before a resume, is not done again.
    """
    config = plan.config
    if plan.held_out and plan.is_due(config.eval_every, step) and ("eval", step) not in run.reported:
        evaluate(plan, run, checkpoints, model, step)
        if config.score_answers:
            score_answers(plan, run, checkpoints, model, step)
    if plan.is_due(config.sample_every, step) and ("sample", step) not in run.reported:
        show_samples(plan, run, checkpoints, model, step)


@torch.no_grad()
def evaluate(plan: Plan, run: Run, checkpoints: Checkpoints, model: Transformer, step: int) -> None:
    """Report the mean loss a token on the held-out examples. Raises Stopped, with the state saved, on a signal."""
    held_out, world = plan.held_out, run.world
    assert held_out is not None, "the caller has asked whether anything is held out"
    packing: Packing = dataclasses.replace(checkpoints.batches.packing, best_fit=True)
    world.note_place(f"the evaluation after step {step}")
    chunks = np.split(np.arange(len(held_out)), range(CHUNK_EXAMPLES, len(held_out), CHUNK_EXAMPLES))
    total, n_tokens = torch.zeros((), device=plan.device), held_out.counts["loss_tokens"]
    for chunk in run.progress.track("evaluating", chunks):
        if world.any_rank(run.signals.pending()):
            checkpoints.stop_run(step)
        for batch in make_micro_batches(held_out.get_examples(chunk), packing, ranks=world.size, rank=world.rank):
            total += model.loss(batch)
    loss = float(world.sum_over_ranks(total)) / n_tokens
    run.metrics.write("eval", step=step, loss=loss, perplexity=float(np.exp(loss)), loss_tokens=n_tokens)
    run.progress.print_message(f"step {step}: held-out loss {loss:.4f}")


def show_samples(plan: Plan, run: Run, checkpoints: Checkpoints, model: Transformer, step: int) -> None:
    """Write greedy answers to the sample prompts, to the terminal and to metrics.jsonl."""
    tokenizer, style = plan.tokenizer, plan.config.prompt_style
    prompts = [encode_prompt(Row("", None, prompt), tokenizer, style) for prompt in plan.sample_prompts]
    n = plan.config.sample_tokens
    run.progress.print_message(f"answering {len(prompts)} sample prompts, {n} tokens each at most")
    max_tokens = checkpoints.batches.packing.max_tokens
    answers = answer(model, max_tokens, prompts, find_stop_ids(tokenizer, style), n)
    titles = {0: "before", plan.total_steps: "after"}
    title = titles.get(step, f"after {step} steps")
    for prompt, ids in zip(plan.sample_prompts, answers, strict=True):
        text = tokenizer.decode(ids).strip()
        run.metrics.write("sample", step=step, prompt=prompt, text=text)
        run.progress.print_message(f"[{title}] {prompt}\n    " + text.replace("\n", "\n    "))

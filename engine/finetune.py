"""Fine-tune a LLaMA.

    python -m engine.finetune --model DIR --data alpaca.json --out DIR

main() prepares, train() is the loop, finish() writes what others load.
"""

import dataclasses
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine import checkpoint, data, packing
from engine.cards import CARDS, card_at_hand
from engine.cli import from_cli, stanford
from engine.config import EMBEDDED, FinetuneConfig
from engine.errors import CriaError, DivergedError, Stopped, UsageError, exit_code_of
from engine.estimate import estimate_on
from engine.estimate import tell as tell_estimate
from engine.fit import confirm, within_memory
from engine.generate import generate, stop_ids
from engine.job import Job, find_resume, finished, plan, prepare
from engine.load import cpu_multiplies_bf16
from engine.log import Metrics, Progress
from engine.memory import state_bytes
from engine.mix import dataset_mix
from engine.model import Transformer, new_model
from engine.optim import AdamW, lr_factor
from engine.report import write_report
from engine.rows import Row
from engine.run import (
    LOCK,
    METRICS,
    RUN,
    Signals,
    claim,
    environment,
    need_disk,
    read_json,
    read_lines,
    write_json,
)
from engine.step import Feeder, Figures, Mark
from engine.weights import save_hf

EVAL_CHUNK = 256  # held-out examples packed together


# ---- train ----------------------------------------------------------------------------------------------------------


def batches_of_step(job: Job, step: int) -> list[packing.MicroBatch]:
    """The global batch cut into micro-batches, weighted so that their losses add up to the step's."""
    if step > job.total_steps:
        return []
    config, examples = job.config, job.examples_of(step)
    means = config.loss_norm == "micro-mean"
    return packing.micro_batches(
        job.train, examples, job.max_tokens, config.micro_batch_size, config.packing, config.share_prefix, job.align,
        scale=None if means else 1 / job.train.loss_tokens()[examples].sum(), mean_of_means=means,
    )  # fmt: skip


def forward_backward(job: Job, model: Transformer, optimizer: AdamW, feed: Feeder, step: int, lr: float):
    """Gradients of one global batch, micro-batch by micro-batch. Returns the loss, a scalar on the device, and counts
    of what was computed; or None when a signal asks to stop, as if the step had not begun."""
    batches = feed.take(step)
    loss = torch.zeros((), device=job.device)
    for batch in batches:
        if job.signals.pending():
            return None
        part = model.loss(batch)
        if job.config.optimizer_in_backward and len(batches) == 1:
            optimizer.begin(lr, part)
        part.backward()
        loss += part.detach()
    examples = job.examples_of(step)
    return loss, {
        "examples": len(examples),
        "tokens": int(job.train.lengths()[examples].sum()),
        "computed_tokens": sum(len(batch.tokens) for batch in batches),
        "loss_tokens": int(job.train.loss_tokens()[examples].sum()),
    }


def train(job: Job, model: Transformer, optimizer: AdamW, start: int) -> None:
    """The loop. Raises Stopped after saving on a signal, DivergedError when the loss stops being a number.

    The host never waits for the step under way: what it needs to know of a step, to count updates and to tell, it reads
    when the next one has been given to the device.
    """
    config, told = job.config, None
    with Feeder(partial(batches_of_step, job), model) as feed:
        for step in range(start + 1, job.total_steps + 1):
            began = Mark(job.device)
            lr = config.lr * lr_factor(config.lr_schedule, step, job.total_steps, config.warmup_ratio)
            done = within_memory(job, optimizer, feed, partial(forward_backward, job, model, optimizer, feed, step, lr))
            told = told and tell(job, optimizer, *told)
            if done is None:
                stop(job, optimizer, step - 1)
            loss, counts = done
            within = optimizer.begun is not None
            norm = optimizer.grad_norm()
            finite = torch.isfinite(loss + norm)
            optimizer.step(lr, norm, config.grad_clip, apply=finite)
            optimizer.zero_grad()
            told = step, lr, counts, began, Figures(loss, norm, finite), within

            if not job.runs_ahead or job.pauses_after(step) or job.signals.pending():
                told = tell(job, optimizer, *told)
            after_step(job, model, optimizer, step)
            if job.keeps_states and job.due(config.save_every, step):
                try_to_save(job, optimizer, step)
            if job.signals.pending():
                told = told and tell(job, optimizer, *told)
                stop(job, optimizer, step)


def tell(job: Job, optimizer: AdamW, step: int, lr: float, counts: dict, began: Mark, figures: Figures, within):
    """Reads a step's figures, waiting for them if need be, and tells them. within: it was updated in backward."""
    loss, norm, finite = figures.read()
    job.n_skipped = 0 if finite else job.n_skipped + 1
    if not finite:
        optimizer.n_updates -= 1  # the device has left it out
        skip(job, step, loss, norm, [job.train.sources[i] for i in job.examples_of(step)], within)
    log_step(job, step, loss, lr, norm, counts, figures.mark.seconds_since(began))


def after_step(job: Job, model: Transformer, optimizer: AdamW, step: int) -> None:
    """What is due after a step (0: before the first) and was not done before a resume: held-out loss, samples."""
    if job.held_out and job.due(job.config.eval_every, step) and ("eval", step) not in job.told:
        evaluate(job, model, step, optimizer)
    if job.due(job.config.sample_every, step) and ("sample", step) not in job.told:
        show_samples(job, model, step)


def log_step(job, step, loss, lr, norm, counts, seconds):
    rate, mfu = counts["tokens"] / seconds, None
    epoch = round(step / data.steps_per_epoch(len(job.train), job.config.global_batch_size), 4)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(job.device)
        card = card_at_hand(job.device)
        mfu = 6 * job.model_config.n_parameters * rate / (1e12 * card.peak_tflops) if card else None
    job.progress.step(step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate)
    job.metrics.write(
        "train", step=step, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, **counts, step_seconds=seconds,
        tokens_per_second=rate, mfu=mfu, peak_memory_bytes=memory,
    )  # fmt: skip


def skip(job, step, loss, norm, rows, within):
    """A step whose loss or gradient is not finite changes nothing; too many in a row end the run, as does one whose
    layers were updated within backward."""
    n = job.n_skipped
    job.metrics.write("skip", step=step, reason="non-finite", loss=loss, grad_norm=norm, rows=rows)
    job.progress.say(f"step {step}: loss {loss}, gradient norm {norm}; no update ({n} in a row)")
    if n > job.config.max_skips or within:
        raise DivergedError(
            f"step {step}: {n} step{'s in a row' * (n > 1)} had no finite loss or gradient (loss {loss}, norm {norm})"
            + ", and some layers are updated already, as --optimizer-in-backward does" * within
            + f"; lower --lr, or look at the rows: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"
        )


@torch.no_grad()
def evaluate(job: Job, model: Transformer, step: int, optimizer: AdamW) -> None:
    """The loss a token on the held-out examples."""
    held, config = job.held_out, job.config
    cut = partial(
        packing.micro_batches, held, max_tokens=job.max_tokens, max_examples=config.micro_batch_size,
        share_prefix=config.share_prefix, align=job.align,
    )  # fmt: skip
    chunks = np.split(np.arange(len(held)), range(EVAL_CHUNK, len(held), EVAL_CHUNK))
    total, n_tokens = torch.zeros((), device=job.device), held.counts["loss_tokens"]
    for chunk in job.progress.phase("evaluating", chunks):
        for batch in cut(chunk):
            if job.signals.pending():
                stop(job, optimizer, step)
            total += model.loss(batch)
    loss = float(total) / n_tokens
    job.metrics.write("eval", step=step, loss=loss, perplexity=float(np.exp(loss)), loss_tokens=n_tokens)
    job.progress.say(f"step {step}: held-out loss {loss:.4f}")


def show_samples(job: Job, model: Transformer, step: int) -> None:
    """Greedy answers to the sample prompts, to the terminal and metrics.jsonl."""
    ids = [data.encode_prompt(Row("", None, p), job.tokenizer, job.config.prompt_style) for p in job.prompts]
    stops = stop_ids(job.tokenizer, job.config.prompt_style)
    answers = generate(model, ids, stops, job.config.sample_tokens)
    title = "before" if step == 0 else "after" if step == job.total_steps else f"after {step} steps"
    for prompt, answer in zip(job.prompts, answers, strict=True):
        text = job.tokenizer.decode(answer).strip()
        job.metrics.write("sample", step=step, prompt=prompt, text=text)
        job.progress.say(f"[{title}] {prompt}\n    " + text.replace("\n", "\n    "))


# ---- save -----------------------------------------------------------------------------------------------------------


def save(job: Job, optimizer: AdamW, step: int) -> None:
    """A training state. Raises OSError when the disk is full; older states are then intact."""
    began = time.perf_counter()
    facts = job.facts | {"n_updates": optimizer.n_updates}
    folder = checkpoint.save(job.out, step, optimizer.tensors(), facts, job.config.keep)
    job.saved, size = step, (folder / checkpoint.STATE).stat().st_size
    job.metrics.write("save", step=step, path=folder.name, seconds=time.perf_counter() - began, bytes=size)


def try_to_save(job: Job, optimizer: AdamW, step: int) -> None:
    """A state on the way: a full disk costs this one, not the run."""
    try:
        save(job, optimizer, step)
    except OSError as error:
        reason = f"the state could not be saved ({error.strerror}); older states are intact"
        job.progress.say(f"warning: step {step}: {reason}")
        job.metrics.write("skip", step=step, reason=reason)


def save_or_fail(job: Job, optimizer: AdamW, step: int, why: str) -> None:
    """The state at the end of a process, unless it is on disk already."""
    try:
        if job.saved != step:
            save(job, optimizer, step)
    except OSError as error:
        raise CriaError(f"{why}; step {step}: the state could not be saved ({error.strerror})") from None


def stop(job: Job, optimizer: AdamW, step: int):
    """A signal came: saves once, and ends."""
    why = f"stopped by {job.signals.received} after step {step}"
    save_or_fail(job, optimizer, step, why)
    raise Stopped(f"{why}; run the same command again to go on")


def finish(job: Job, model: Transformer, optimizer: AdamW) -> None:
    """The model as a complete Hugging Face folder. On a full disk the training state is saved, if that fits."""
    try:
        save_hf(
            job.out, model, max_shard_bytes=job.config.max_shard_bytes, bos_id=job.tokenizer.bos_id,
            eos_ids=sorted(job.tokenizer.stop_ids),
            generation_config=job.source.generation_config if job.source else None,
        )  # fmt: skip
        job.tokenizer.save(job.out)
    except OSError as error:
        why = f"the model could not be written ({error.strerror})"
        save_or_fail(job, optimizer, job.total_steps, why)
        raise CriaError(f"{why}; the training state is saved: make room and run the same command again") from None


# ---- main -----------------------------------------------------------------------------------------------------------


def build(job: Job, found) -> tuple[Transformer, AdamW, int]:
    """The model, its optimizer and the step they stand at."""
    config = job.config
    accumulate = not config.optimizer_in_backward
    model = new_model(job.model_config, job.device, job.dtype, job.kernels, config.recompute, accumulate)
    if found is None and job.source:
        job.source.read_into(model)
    elif found is None:
        model.init_weights(config.seed)
    optimizer = AdamW(
        model, beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay,
        master=config.master_weights, states=config.optimizer_states, seed=config.seed, impl=job.kernels,
        offload=config.offload_optimizer, in_backward=config.optimizer_in_backward,
    )  # fmt: skip
    if found is None:
        return model, optimizer, 0
    folder, manifest = found
    checkpoint.load(folder, optimizer.tensors())
    optimizer.n_updates = manifest["n_updates"]
    return model, optimizer, manifest["step"]


def main(argv):
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(f"WORLD_SIZE is {world}: this version trains in one process; start it without torchrun")
    native_bf16 = cpu_multiplies_bf16() and not torch.cuda.is_available()
    embedded = EMBEDDED | ({"dtype": "bf16"} if native_bf16 else {})  # nearly twice as fast there
    config, notes = from_cli(FinetuneConfig, argv, stanford, embedded)
    signals = Signals()
    with claim(Path(config.out)) as out:
        for note in notes:
            print(note)
        job = prepare(config, out, signals, print)
        if finished(job):
            print(f"{out} holds this run, finished; --resume never starts it over")
            return
        found = find_resume(job, print)
        states = config.keep + 1 - len(checkpoint.checkpoints(out)) if job.keeps_states else 0
        weights, *rest, _ = state_bytes(job.model_config, job.dtype, config.master_weights, config.optimizer_states)
        need_disk(
            out, weights + (weights + sum(rest)) * max(0, states), "free some, choose another folder, or lower --keep"
        )
        if not config.dry_run:
            run(job, found)
            return
        print(plan(job))
        print()
        dry_run(job)
        (out / LOCK).unlink()
        if not any(out.iterdir()):
            out.rmdir()


def dry_run(job: Job) -> None:
    """What the run takes on the card that is here, or on one that is not."""
    card = card_at_hand(job.device)
    if card is None:
        card = CARDS["H100"]
        print(f"Not on this device, whose figures are not known, but on one {card.name}; engine.estimate has others.")
    dtype = job.dtype if job.device.type == "cuda" or job.config.dtype != "auto" else torch.bfloat16
    tell_estimate(estimate_on(card, job.config, job.model_config, dataset_mix(job.train, job.config), dtype))


def run(job: Job, found) -> None:
    config, out = job.config, job.out
    checkpoint.clean(out)
    if config.resume == "never":
        checkpoint.rewind(out, -1)
    print(plan(job))
    model, optimizer, start = build(job, found)
    if found:
        job.saved = start
        checkpoint.rewind(out, start)
        print(f"going on after step {start}, from {found[0]}")
    earlier = read_json(out / RUN).get("seconds", 0.0) if found else 0.0
    record = {
        "status": "running",
        "config": dataclasses.asdict(config),
        "model": {
            "name": config.model,
            "parameters": job.model_config.n_parameters,
            **dataclasses.asdict(job.model_config),
        },
        "data": job.train.counts | {"held_out": len(job.held_out) if job.held_out else 0},
        "total_steps": job.total_steps,
        "facts": job.facts,
        "environment": environment(job.device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(out / RUN, record | {"seconds": earlier})
    began, status = time.monotonic(), "failed"
    job.metrics = Metrics(out / METRICS, start if found else None)
    job.told = frozenset((line["event"], line.get("step")) for line in read_lines(out / METRICS))
    job.signals.training = True
    with Progress(job.total_steps, start, every=config.log_every) as job.progress:
        try:
            if job.device.type == "cuda":
                confirm(job, model, optimizer)
            after_step(job, model, optimizer, start)
            train(job, model, optimizer, start)
            finish(job, model, optimizer)
            status = "done"
        except Stopped:
            status = "stopped"
            raise
        finally:
            close(job, record, status, earlier + time.monotonic() - began)
    print(f"the model is in {out}, the report in {out / 'report.html'}")


def close(job, record, status, seconds):
    """How the run ended, for whoever looks later. A disk too full to say so must not hide how it ended."""
    try:
        write_json(job.out / RUN, record | {"status": status, "seconds": seconds})
        job.metrics.write("end", step=job.total_steps if status == "done" else None, seconds=seconds, status=status)
        write_report(job.out)
    except OSError as error:
        job.progress.say(f"warning: run.json, metrics.jsonl or report.html is not up to date ({error.strerror})")
    finally:
        job.metrics.close()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

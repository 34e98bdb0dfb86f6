"""Fine-tune a LLaMA.

    python -m engine.finetune --model DIR --data alpaca.json --out DIR

main() prepares, train() is the loop, finish() writes what others load.
"""

import dataclasses
import os
import resource
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.base.device import cpu_multiplies_bf16
from engine.base.errors import DataError, DivergedError, Stopped, exit_code_of
from engine.base.files import read_json, write_json
from engine.base.flags import from_cli
from engine.base.signals import Signals
from engine.base.terminal import Progress
from engine.data import packing
from engine.data.batches import count_steps_per_epoch
from engine.distributed import fsdp
from engine.distributed import world as distributed
from engine.inference.generation import generate
from engine.model.batch import MicroBatch
from engine.model.llama import Transformer, new_model
from engine.output import checkpoint
from engine.output.folder import LOCK, METRICS, RUN, describe_environment, lock_output_folder, read_lines
from engine.output.metrics import Metrics
from engine.output.report import write_report
from engine.planning.cards import CARDS, card_at_hand
from engine.planning.projection import estimate_run
from engine.planning.setting import mesh_problems
from engine.planning.tables import print_estimate
from engine.planning.workload import dataset_mix
from engine.text.templates import Row, encode_prompt, find_stop_ids
from engine.training.config import EMBEDDED, FinetuneConfig
from engine.training.loss_spikes import Spike, Spikes
from engine.training.micro_batch_size import confirm, halved_before, within_memory
from engine.training.optimizer import AdamW, lr_factor
from engine.training.planning_input import recipe_from_config, setting_from_config
from engine.training.prepare import Job, find_resume, finished, plan, prepare
from engine.training.run_ahead import Feeder, Figures, Mark
from engine.training.saving import finish, load_state, roll_back, room_for_states, save, saved_meanwhile, stop
from engine.training.stanford_flags import stanford

EVAL_CHUNK = 256  # held-out examples packed together
PATHS = {"model", "tokenizer", "data", "eval_data", "token_cache", "out", "sample_prompts", "resume"}  # of a machine


# ---- train ----------------------------------------------------------------------------------------------------------


def batches_of_step(job: Job, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of the global batch, weighted so that all losses add up to the step's."""
    if step > job.total_steps:
        return []
    config, examples = job.config, job.examples_of(step)
    means = config.loss_norm == "micro-mean"
    how = packing.Packing(job.max_tokens, config.micro_batch_size, config.packing, config.share_prefix, job.align)
    return packing.make_micro_batches(
        job.train, examples, how, scale=None if means else 1 / job.train.loss_tokens()[examples].sum(),
        mean_of_means=means, ranks=job.world.size, rank=job.world.rank,
    )  # fmt: skip


def forward_backward(job: Job, model: Transformer, optimizer: AdamW, feed: Feeder, step: int, lr: float):
    """Gradients of this rank's part of a global batch, micro-batch by micro-batch. Returns its loss, a scalar on the
    device, and counts; or None when a signal asks to stop, as if the step had not begun: ranks, which must agree on
    that, end the step first."""
    batches = feed.take(step)
    loss = torch.zeros((), device=job.device)
    for i, batch in enumerate(batches, 1):
        if job.world.size == 1 and job.signals.pending():
            return None
        fsdp.set_last_micro_batch(model, i == len(batches))
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
            job.world.note_place(f"step {step}")
            done = within_memory(job, optimizer, feed, partial(forward_backward, job, model, optimizer, feed, step, lr))
            told = told and tell(job, optimizer, *told)
            if done is None:
                stop(job, optimizer, step - 1)
            loss, counts = done
            within = optimizer.begun is not None
            loss, norm, shared = over_ranks(job, loss, optimizer.grad_norm(), counts)
            finite = torch.isfinite(loss + norm)
            optimizer.step(lr, norm, config.grad_clip, apply=finite)
            optimizer.zero_grad()
            told = step, lr, counts, began, Figures(loss, norm, finite, *shared), within

            if not job.runs_ahead or job.pauses_after(step) or job.asked_to_stop():
                told = tell(job, optimizer, *told)
            after_step(job, model, optimizer, step)
            if job.keeps_states and job.due(config.save_every, step):
                save(job, optimizer, step)
            saved_meanwhile(job)
            if job.asked_to_stop():
                told = told and tell(job, optimizer, *told)
                stop(job, optimizer, step)


def over_ranks(job: Job, loss, norm, counts):
    """(loss, gradient norm, [computed tokens, ranks that a signal reached]) of all ranks, on the device; alone, [], as
    the host knows them. Filled, not copied there: a copy would wait for the device."""
    if job.world.size == 1:
        return loss, norm, []
    square = norm.double().square()
    if job.world.replicas > 1:  # each replica holds every gradient
        square = square / job.world.replicas
    host = counts["computed_tokens"], job.signals.pending()
    filled = [torch.full((), float(n), dtype=torch.float64, device=loss.device) for n in host]
    loss, square, *shared = job.world.sum_over_ranks(torch.stack([loss.double(), square, *filled]))
    return loss, square.sqrt().float(), shared


def tell(job: Job, optimizer: AdamW, step: int, lr: float, counts: dict, began: Mark, figures: Figures, within):
    """Reads a step's figures, waiting for them if need be, and tells them. within: it was updated in backward."""
    loss, norm, finite, *shared = figures.read()
    if shared:
        counts["computed_tokens"], job.n_signals = map(int, shared)
    job.n_skipped = 0 if finite else job.n_skipped + 1
    if not finite:
        optimizer.n_updates -= 1  # the device has left it out
        skip(job, step, loss, norm, [job.train.sources[i] for i in job.examples_of(step)], within)
    log_step(job, step, loss, lr, norm, counts, figures.mark.seconds_since(began))
    if finite:
        spike = job.spikes.look(step, loss)
        job.n_spiked = job.n_spiked + 1 if spike else 0
        if spike:
            tell_spike(job, optimizer, step, spike)


def after_step(job: Job, model: Transformer, optimizer: AdamW, step: int) -> None:
    """What is due after a step (0: before the first) and was not done before a resume: held-out loss, samples."""
    if job.held_out and job.due(job.config.eval_every, step) and ("eval", step) not in job.told:
        evaluate(job, model, step, optimizer)
    if job.due(job.config.sample_every, step) and ("sample", step) not in job.told:
        show_samples(job, model, step)


def log_step(job, step, loss, lr, norm, counts, seconds):
    rate, mfu = counts["tokens"] / seconds, None
    epoch = round(step / count_steps_per_epoch(len(job.train), job.config.global_batch_size), 4)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(job.device)
        card = card_at_hand(job.device)
        mfu = 6 * job.model_config.n_parameters * rate / (job.world.size * 1e12 * card.peak_tflops) if card else None
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
        text = (
            f"step {step}: {n} step{'s in a row' * (n > 1)} had no finite loss or gradient (loss {loss}, norm {norm})"
            + ", and some layers are updated already, as --optimizer-in-backward does" * within
            + f"; lower --lr, or look at the rows: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"
        )
        raise job.world.error_on_all_ranks(DivergedError(text))


def tell_spike(job: Job, optimizer: AdamW, step: int, spike: Spike) -> None:
    """A loss that stands out is told with its rows. With --spike-rollback the run goes on with the next step from the
    newest state on disk; too many in a row end it."""
    said = f"step {step}: loss {spike.loss:.4f} is a spike: the median was {spike.median:.4f} +- {spike.deviation:.4f}"
    back_to = None
    if job.config.spike_rollback:
        back_to = roll_back(job, optimizer)
        where = f"back to the state of step {back_to}, the rows of {step - (back_to or 0)} steps are left out"
        said += f"; {'no state to go back to yet' if back_to is None else where}"
    job.progress.say(f"warning: {said}")
    rows = [job.train.sources[i] for i in job.examples_of(step)]
    job.metrics.write("spike", step=step, **dataclasses.asdict(spike), back_to=back_to, rows=rows)
    if back_to is None:
        return
    job.spikes.forget(back_to)
    if job.n_spiked > job.config.max_skips:
        text = (
            f"step {step}: the loss spiked {job.n_spiked} times in a row after the state of step {back_to}; lower "
            f"--lr, or look at the rows: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"
        )
        raise job.world.error_on_all_ranks(DivergedError(text))


@torch.no_grad()
def evaluate(job: Job, model: Transformer, step: int, optimizer: AdamW) -> None:
    """The loss a token on the held-out examples."""
    held, config = job.held_out, job.config
    how = packing.Packing(job.max_tokens, config.micro_batch_size, True, config.share_prefix, job.align)
    cut = partial(packing.make_micro_batches, held, packing=how, ranks=job.world.size, rank=job.world.rank)
    job.world.note_place(f"the evaluation after step {step}")
    chunks = np.split(np.arange(len(held)), range(EVAL_CHUNK, len(held), EVAL_CHUNK))
    total, n_tokens = torch.zeros((), device=job.device), held.counts["loss_tokens"]
    for chunk in job.progress.phase("evaluating", chunks):
        if job.world.any_rank(job.signals.pending()):
            stop(job, optimizer, step)
        for batch in cut(chunk):
            total += model.loss(batch)
    loss = float(job.world.sum_over_ranks(total)) / n_tokens
    job.metrics.write("eval", step=step, loss=loss, perplexity=float(np.exp(loss)), loss_tokens=n_tokens)
    job.progress.say(f"step {step}: held-out loss {loss:.4f}")


def show_samples(job: Job, model: Transformer, step: int) -> None:
    """Greedy answers to the sample prompts, to the terminal and metrics.jsonl."""
    ids = [encode_prompt(Row("", None, p), job.tokenizer, job.config.prompt_style) for p in job.prompts]
    stops = find_stop_ids(job.tokenizer, job.config.prompt_style)
    answers = generate(model, ids, stops, job.config.sample_tokens)
    title = "before" if step == 0 else "after" if step == job.total_steps else f"after {step} steps"
    for prompt, answer in zip(job.prompts, answers, strict=True):
        text = job.tokenizer.decode(answer).strip()
        job.metrics.write("sample", step=step, prompt=prompt, text=text)
        job.progress.say(f"[{title}] {prompt}\n    " + text.replace("\n", "\n    "))


# ---- main -----------------------------------------------------------------------------------------------------------


def build(job: Job, found: checkpoint.Checkpoint | None) -> tuple[Transformer, AdamW, int]:
    """The model, its optimizer and the step they stand at."""
    config = job.config
    accumulate = not config.optimizer_in_backward
    shard = partial(fsdp.shard_model, world=job.world) if job.world.size > 1 else None
    model = new_model(job.model_config, job.device, job.dtype, job.kernels, config.recompute, accumulate, shard)
    held = fsdp.local_shards(model)
    if found is None and job.source:
        job.source.read_into(model, held)
    elif found is None:
        model.init_weights(config.seed, held)
    optimizer = AdamW(
        model, beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay,
        master=config.master_weights, states=config.optimizer_states, seed=config.seed, impl=job.kernels,
        offload=config.offload_optimizer, in_backward=config.optimizer_in_backward,
    )  # fmt: skip
    if found is None:
        return model, optimizer, 0
    load_state(found, optimizer)
    return model, optimizer, found.step


def main(argv):
    native_bf16 = cpu_multiplies_bf16() and not torch.cuda.is_available()
    embedded = EMBEDDED | ({"dtype": "bf16"} if native_bf16 else {})  # nearly twice as fast there
    config, notes = from_cli(FinetuneConfig, argv, stanford, embedded)
    signals = Signals()
    with ExitStack() as stack:
        world = stack.enter_context(distributed.start_ranks(config.device, config.rank_timeout))
        say = print if world.is_main else silent
        for note in notes:
            say(note)
        out = Path(config.out)
        world.on_all_ranks(lambda: world.is_main and stack.enter_context(lock_output_folder(out)))
        job = world.on_all_ranks(lambda: prepare(config, out, signals, say, world))
        agree(job)
        if world.on_main(lambda: finished(job)):
            say(f"{out} holds this run, finished; --resume never starts it over")
            return
        found = world.on_main(lambda: find_resume(job, say))
        if world.is_main:
            halved_before(job, say)
        job.max_tokens, job.halved = world.broadcast((job.max_tokens, job.halved))
        job.facts["max_tokens"] = job.max_tokens
        world.on_main(lambda: room_for_states(job))
        if not config.dry_run:
            run(job, found)
            return
        say(plan(job))
        say("")
        if world.is_main:
            dry_run(job)
            (out / LOCK).unlink()
            if not any(out.iterdir()):
                out.rmdir()


def silent(*_):
    """What ranks but the first say."""


def agree(job: Job) -> None:
    """The same plan on every rank. Raises DataError where they read or were told other things."""
    held, facts = job.held_out, job.facts
    mine = {
        "data": facts["data_sha256"], "held-out data": held.sha256() if held else None, "sample prompts": job.prompts,
        "settings": {k: v for k, v in dataclasses.asdict(job.config).items() if k not in PATHS},
        "model": facts["model"], "dtype": facts["dtype"], "kernels": job.kernels,
    }  # fmt: skip
    first, *rest = job.world.gather(mine)
    for rank, theirs in enumerate(rest, 1):
        if other := " and ".join(what for what in first if theirs[what] != first[what]):
            raise job.world.error_on_all_ranks(DataError(
                f"rank {rank} has other {other} than rank 0; files and flags must be the same on every machine"
            ))  # fmt: skip
    job.max_tokens = job.facts["max_tokens"] = job.world.min_over_ranks(job.max_tokens)
    job.world.arrange_replicas(job.world.min_over_ranks(job.replicas))


def dry_run(job: Job) -> None:
    """What the run takes on the card that is here, or on one that is not."""
    card = card_at_hand(job.device)
    if card is None:
        card = CARDS["H100"]
        print(f"Not on this device, whose figures are not known, but on one {card.name}; engine.estimate has others.")
    dtype = job.dtype if job.device.type == "cuda" or job.config.dtype != "auto" else torch.bfloat16
    config, cards = dataclasses.replace(job.config, replicas=job.replicas), job.world.size
    problems = mesh_problems(cards, config.replicas, config.global_batch_size, config.optimizer_in_backward)
    if cards > 1 and problems:
        print(f"Not estimated on {cards} cards: " + "\n".join(problems))
        return
    recipe, setting = recipe_from_config(config, cards), setting_from_config(config, dtype, cards)
    print_estimate(estimate_run(job.model_config, card, dataset_mix(job.train, recipe), recipe, setting))


def run(job: Job, found: checkpoint.Checkpoint | None) -> None:
    config, out, world = job.config, job.out, job.world
    if world.is_main:
        checkpoint.remove_temporaries(out)
        if config.resume == "never":
            checkpoint.remove_later(out, -1)
        print(plan(job))
    job.saver = checkpoint.Saver(
        out, config.keep, world.rank, world.size, world.gather_beside_training if world.size > 1 else None, job.device
    )
    model, optimizer, start = build(job, found)
    world.wait_for_all()  # a state is read everywhere before it may be removed
    if found:
        job.saved = start
        if world.is_main:
            checkpoint.remove_later(out, start)
            print(f"going on after step {start}, from {found.folder}")
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
        "environment": describe_environment(job.device) | {"ranks": world.size, "replicas": world.replicas},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    began, status = time.monotonic(), "failed"
    if world.is_main:
        write_json(out / RUN, record | {"seconds": earlier})
        job.metrics = Metrics(out / METRICS, start if found else None)
    lines = world.broadcast(read_lines(out / METRICS) if world.is_main else None)
    job.told = frozenset((line["event"], line.get("step")) for line in lines)
    job.spikes = Spikes(config.spike_threshold)
    job.spikes.remember(lines)
    job.signals.training = True
    with ExitStack() as stack:
        quiet = None if world.is_main else stack.enter_context(open(os.devnull, "w"))
        job.progress = stack.enter_context(Progress(job.total_steps, start, every=config.log_every, file=quiet))
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
            job.saver.close()
            if world.is_main:
                close(job, record, status, earlier + time.monotonic() - began)
    if world.is_main:
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

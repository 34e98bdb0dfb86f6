"""The largest micro-batch that fits: found from the estimate, tried before the first step, halved once if need be."""

import contextlib
import json
import os
import re

import numpy as np
import torch

from engine.base.errors import CriaError, UsageError
from engine.base.files import read_json
from engine.data import dataset as data
from engine.data import packing
from engine.distributed.fsdp import set_last_micro_batch
from engine.model.config import ModelConfig
from engine.model.llama import Transformer
from engine.planning.fitting import MOST_TOKENS, Limits, cheapest_that_fits, mesh_that_fits, shards_that_fit
from engine.planning.memory import CONTEXT_BYTES
from engine.training.config import FinetuneConfig
from engine.training.optimizer import AdamW
from engine.training.planning_input import setting_from_config
from engine.training.run_ahead import Feeder

HALVED = "halved.json"  # in --out: micro-batches that ranks ran out of memory with, and those to take instead
ALIGN = 64  # tokens: micro-batches on a GPU are whole rows of a GEMM's tiles


def auto_layout(
    c: ModelConfig, config: FinetuneConfig, train: data.Dataset, device, dtype, ranks: int = 1
) -> tuple[int, int]:
    """(replicas of the model over the ranks, tokens of a micro-batch).

    On a CPU one replica where --replicas does not say, and 2048 tokens, where more gains nothing. On CUDA as
    mesh_that_fits() says, and as many tokens as fit the free memory beside a shard, were all of
    them to carry loss, and no more than a step holds. Raises UsageError with what does fit when not one example does.
    """
    counts = shards_that_fit(c, config.optimizer_states, ranks)
    if config.replicas:
        counts = [ranks // config.replicas]
    if device.type == "cpu":
        return ranks // max(counts), max(2048, config.max_length)
    room = torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES  # of which the context is taken already
    most, step = largest(config, train, ALIGN)
    least = -(-config.max_length // ALIGN) * ALIGN
    most = min(MOST_TOKENS, most, config.micro_batch_tokens or most)
    limits = Limits(max(least, most), step if config.optimizer_in_backward else None)
    setting, tokens = mesh_that_fits(
        c, setting_from_config(config, dtype, ranks), room, limits, share_tokens=-(-step // ranks), least_tokens=least,
        counts=counts,
    )  # fmt: skip
    if tokens // ALIGN * ALIGN < config.max_length and not config.micro_batch_tokens:
        advice = smaller(c, config, dtype, room, config.max_length, config.max_length, ranks, setting.replicas)
        raise UsageError(
            f"{config.model}: an example of {config.max_length} tokens and what training keeps do not fit the "
            f"{room / 1e9:.1f} GB that are free; {advice}"
        )
    return setting.replicas, tokens // ALIGN * ALIGN


def largest(config: FinetuneConfig, train: data.Dataset, align: int) -> tuple[int, int]:
    """Tokens, up to a multiple of align, of the largest micro-batch that there can be and of the largest step: those of
    the longest examples."""
    longest = np.sort(train.lengths())[::-1][: config.global_batch_size]
    most, step = (-(-int(part.sum()) // align) * align for part in (longest[: config.micro_batch_size], longest))
    return most, step


def smaller(c, config, dtype, room_bytes, tokens, most_tokens, ranks=1, replicas=1):
    """The settings next in price that fit, as advice; tokens: of a micro-batch that did not, most_tokens: that may."""
    setting = setting_from_config(config, dtype, ranks).with_replicas(replicas)
    limits = Limits(most_tokens)
    fits = cheapest_that_fits(c, setting, room_bytes, limits, tokens=tokens, least_tokens=config.max_length)
    ways = [f"{' '.join(fit.flags)} ({fit.memory.total / 1e9:.1f} GB)" for fit in fits[:3] if fit.flags]
    if ways:
        return "pass " + ", or ".join(ways)
    return "take a smaller --max-length or a larger card: python -m engine.estimate tells which"


def is_out_of_memory(error: Exception) -> bool:
    """Whether the card had no room: for torch's allocator, for cuBLAS's workspace, for a kernel's code."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("ALLOC_FAILED|out of memory", str(error)))


def within_memory(job, optimizer: AdamW, feed: Feeder | None, work):
    """What work() returns; where it runs out of memory, half the micro-batch and work() again, once in a run."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = ". ".join(str(error).split(". ")[:2])  # "CUDA out of memory. Tried to allocate 2.00 GiB"
        if optimizer.begun and feed:
            raise CriaError(
                f"out of memory ({reason}) in a step whose updates --optimizer-in-backward had begun; "
                + advice(job, job.max_tokens // 2)
            )
        optimizer.zero_grad()  # outside the handler, whose traceback keeps what the failed pass had saved
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        halve(job, reason)
        if feed:
            feed.forget()


def confirm(job, model: Transformer, optimizer: AdamW) -> None:
    """Before the first step on a GPU: the largest micro-batch that there can be, all of it with loss, forward and
    backward beside its own gradients. Says what it takes; where that is too much, micro-batches are halved."""
    most, step = largest(job.config, job.train, job.align)

    def try_it():
        tokens = min(job.max_tokens, most)
        batch = packing.make_largest_micro_batch(tokens, job.config.max_length, job.model_config.vocab_size)
        if job.config.optimizer_in_backward and tokens == step:
            loss = model.loss(batch)
            optimizer.begin(0.0, loss * torch.nan)  # which updates nothing
            loss.backward()
        else:
            for last in (False, True):
                set_last_micro_batch(model, last)
                model.loss(batch).backward()
        return tokens

    tokens = within_memory(job, optimizer, None, try_it)
    optimizer.zero_grad()
    peak, room = torch.cuda.max_memory_allocated(job.device), torch.cuda.mem_get_info(job.device)[1]
    job.progress.say(f"micro-batches of {tokens} tokens take {peak / 2**30:.2f} of {room / 2**30:.2f} GiB at most")
    torch.cuda.reset_peak_memory_stats(job.device)


def halve(job, reason: str) -> None:
    """Half the tokens of a micro-batch, said once in a run. Raises CriaError where they were halved before, or cannot
    be without changing the maths, or without the other ranks, which wait in the step: then the next start halves."""
    config = job.config
    fewer = max(job.max_tokens // 2 // job.align * job.align, config.max_length)
    said = f"out of memory with micro-batches of {job.max_tokens} tokens ({reason})"
    if job.halved or fewer == job.max_tokens or config.loss_norm == "micro-mean":
        raise CriaError(f"{said}; {advice(job, fewer)}")
    if job.world.size > 1:
        leave_word(job.out, {"from": job.max_tokens, "to": fewer})
        raise CriaError(f"{said}; the same command goes on with {fewer}; {advice(job, fewer)}")
    job.progress.say(
        f"out of memory with micro-batches of {job.max_tokens} tokens ({reason}); going on with {fewer}, which changes "
        "the speed and nothing else"
    )
    job.max_tokens = job.facts["max_tokens"] = fewer
    job.halved = True


def leave_word(out, told: dict) -> None:
    """By as many ranks at once as ran out of memory. One that cannot must still tell why the run ends."""
    new = out / f".tmp-{HALVED}-{os.getpid()}"
    with contextlib.suppress(OSError):
        new.write_text(json.dumps(told))
        os.replace(new, out / HALVED)


def halved_before(job, say) -> None:
    """What ranks that ran out of memory left word of: the micro-batches that they had then are halved now, and so are
    larger ones that were chosen here."""
    told = read_json(job.out / HALVED)
    larger = job.config.micro_batch_tokens is None and job.max_tokens > told.get("to", job.max_tokens)
    if larger or job.max_tokens in (told.get("from"), told.get("to")):
        say(f"micro-batches of {told['to']} tokens: those of {told['from']} ran out of memory")
        job.max_tokens, job.halved = told["to"], True


def advice(job, most_tokens):
    """What the peak was, and what would fit with micro-batches of at most most_tokens."""
    if job.device.type != "cuda":
        return "lower --micro-batch-tokens"
    peak, room = torch.cuda.max_memory_allocated(job.device), torch.cuda.mem_get_info(job.device)[1]
    layout = job.world.size, job.world.replicas
    ways = smaller(job.model_config, job.config, job.dtype, int(0.9 * room), job.max_tokens, most_tokens, *layout)
    return f"the peak was {peak / 1e9:.1f} of {room / 1e9:.1f} GB; {ways}"

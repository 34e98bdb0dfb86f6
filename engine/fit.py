"""The largest micro-batch that fits: found from the estimate, tried before the first step, halved once if need be."""

import re

import numpy as np
import torch

from engine import data, packing
from engine.config import FinetuneConfig, ModelConfig
from engine.errors import CriaError, UsageError
from engine.memory import CONTEXT_BYTES, MOST_TOKENS, cheapest_that_fits, largest_micro_batch, setting_of
from engine.model import Transformer
from engine.optim import AdamW
from engine.step import Feeder

ALIGN = 64  # tokens: micro-batches on a GPU are whole rows of a GEMM's tiles


def auto_tokens(c: ModelConfig, config: FinetuneConfig, train: data.Dataset, device, dtype) -> int:
    """Tokens of a micro-batch: on CPU 2048, where more gains nothing; on CUDA as many as fit the free memory, were all
    of them to carry loss, and no more than a step holds. Raises UsageError with what does fit when not one example
    does."""
    if device.type == "cpu":
        return max(2048, config.max_length)
    room = torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES  # of which the context is taken already
    step = int(np.sort(train.lengths())[-config.global_batch_size :].sum())
    most = max(config.max_length, min(MOST_TOKENS, step))
    tokens = largest_micro_batch(c, room, most_tokens=-(-most // ALIGN) * ALIGN, **setting_of(config, dtype))
    if tokens // ALIGN * ALIGN < config.max_length:
        advice = smaller(c, config, dtype, room, config.max_length, config.max_length)
        raise UsageError(
            f"{config.model}: an example of {config.max_length} tokens and what training keeps do not fit the "
            f"{room / 1e9:.1f} GB that are free; {advice}"
        )
    return tokens // ALIGN * ALIGN


def smaller(c, config, dtype, room_bytes, tokens, most_tokens):
    """The settings next in price that fit, as advice; tokens: of a micro-batch that did not, most_tokens: that may."""
    fits = cheapest_that_fits(
        c, room_bytes, tokens=tokens, least_tokens=config.max_length, most_tokens=most_tokens,
        **setting_of(config, dtype),
    )  # fmt: skip
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
        optimizer.zero_grad()  # outside the handler, whose traceback keeps what the failed pass had saved
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        halve(job, reason)
        if feed:
            feed.forget()


def confirm(job, model: Transformer, optimizer: AdamW) -> None:
    """Before the first step on a GPU: the largest micro-batch that there can be, all of it with loss, forward and
    backward beside its own gradients. Says what it takes; where that is too much, micro-batches are halved."""

    def largest():
        batch = packing.synthetic(job.max_tokens, job.config.max_length, job.model_config.vocab_size)
        for _ in range(2):
            model.loss(batch).backward()

    within_memory(job, optimizer, None, largest)
    optimizer.zero_grad()
    peak, room = torch.cuda.max_memory_allocated(job.device), torch.cuda.mem_get_info(job.device)[1]
    job.progress.say(
        f"micro-batches of {job.max_tokens} tokens take {peak / 2**30:.2f} of {room / 2**30:.2f} GiB at most"
    )
    torch.cuda.reset_peak_memory_stats(job.device)


def halve(job, reason: str) -> None:
    """Half the tokens of a micro-batch, said once in a run. Raises CriaError where they were halved before, or cannot
    be without changing the maths."""
    config = job.config
    fewer = max(job.max_tokens // 2 // job.align * job.align, config.max_length)
    if job.halved or fewer == job.max_tokens or config.loss_norm == "micro-mean":
        advice = "lower --micro-batch-tokens"
        if job.device.type == "cuda":
            peak, room = torch.cuda.max_memory_allocated(job.device), torch.cuda.mem_get_info(job.device)[1]
            reason += f"; the peak was {peak / 1e9:.1f} of {room / 1e9:.1f} GB"
            advice = smaller(job.model_config, config, job.dtype, int(0.9 * room), job.max_tokens, fewer)
        raise CriaError(f"out of memory with micro-batches of {job.max_tokens} tokens ({reason}); {advice}")
    job.progress.say(
        f"out of memory with micro-batches of {job.max_tokens} tokens ({reason}); going on with {fewer}, which changes "
        "the speed and nothing else"
    )
    job.max_tokens = job.facts["max_tokens"] = fewer
    job.halved = True

"""The largest micro-batch that fits: found from the estimate, tried before the first step, halved once if need be."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import CriaError, DataError, UsageError
from engine.base.files import read_json
from engine.base.host_memory import read_free_bytes
from engine.data.batches import Batches
from engine.data.dataset import Dataset
from engine.data.packing import make_largest_micro_batch
from engine.distributed.fsdp import set_last_micro_batch
from engine.distributed.world import World
from engine.model.config import ModelConfig
from engine.model.llama import Transformer
from engine.planning.cards import CARDS, MACHINE_GPUS, detect_card, find_rates
from engine.planning.fitting import (
    MOST_TOKENS,
    Limits,
    find_cheapest_fits,
    find_mesh_that_fits,
    find_shard_counts,
    resolve_recompute,
    resolve_states,
)
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.planning.setting import Setting
from engine.planning.step_time import update_seconds
from engine.planning.weights import state_bytes
from engine.training.config import FinetuneConfig
from engine.training.optimizer import AdamW
from engine.training.plan import Plan
from engine.training.planning_input import setting_from_config
from engine.training.run_ahead import Prefetcher

HALVED = "halved.json"  # in --out: tells the next start which micro-batches were too large, and the size to use
TOKENS_MULTIPLE = 64  # of which a micro-batch's tokens are a multiple on a GPU: they fill the tiles of GEMMs
TOKENS_MULTIPLE_OF_CPU = 32  # in bf16: oneDNN compiles for each size that it multiplies, and keeps 0.5 to 2 MB of each


def choose_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Return of what number the tokens of a micro-batch are a multiple, by padding: 1 where nothing is gained."""
    if device.type == "cuda":
        return TOKENS_MULTIPLE
    return TOKENS_MULTIPLE_OF_CPU if dtype == torch.bfloat16 else 1


def choose_mesh_and_tokens(
    c: ModelConfig, config: FinetuneConfig, train: Dataset, device: torch.device, dtype: torch.dtype, ranks: int = 1,
    on_cpu: bool | None = None,
) -> tuple[Setting, int]:  # fmt: skip
    """Return the setting, with optimizer states, replicas of the model over the ranks and --recompute decided, and the
    tokens of a micro-batch.

    On a CPU there is one replica unless --replicas says otherwise, states are fp32 unless --optimizer-states does, and
    a micro-batch has 2048 tokens: more gains nothing. On CUDA resolve_states() chooses the states and
    find_mesh_that_fits() the replicas. A micro-batch then gets as many tokens as fit into the free memory beside a
    shard, even with a loss at every token, but no more than a step holds. on_cpu: see setting_from_config(). Raises
    UsageError, with settings that would
    fit, where not even one example fits.
    """
    setting = setting_from_config(config, dtype, ranks, on_cpu)
    if device.type == "cpu":
        recompute = "cheap" if config.recompute == "auto" else config.recompute
        states = "fp32" if config.optimizer_states == "auto" else config.optimizer_states
        replicas = config.replicas or ranks // max(find_shard_counts(c, states, ranks, setting.adapter))
        setting = dataclasses.replace(setting.with_replicas(replicas), recompute=recompute, states=states)
        return setting, max(2048, config.max_length)
    available_bytes = torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES  # the context is in use already
    most, step = count_largest_tokens(config, train, TOKENS_MULTIPLE)
    least = round_up(config.max_length, TOKENS_MULTIPLE)
    most = min(MOST_TOKENS, most, config.micro_batch_tokens or most)
    limits, share = Limits(max(least, most), step if config.optimizer_in_backward else None), -(-step // ranks)
    host_bytes = (read_free_bytes() or math.inf) / min(ranks, MACHINE_GPUS)
    setting = resolve_states(
        c, setting, available_bytes, limits, least_tokens=least, replicas=config.replicas,
        update_s=lambda way: project_update(c, way, device), host_bytes=host_bytes,
    )  # fmt: skip
    counts = (
        [ranks // config.replicas] if config.replicas else find_shard_counts(c, setting.states, ranks, setting.adapter)
    )
    setting, tokens = find_mesh_that_fits(
        c, setting, available_bytes, limits, share_tokens=share, least_tokens=least, counts=counts
    )
    require_host_memory(c, setting, host_bytes)
    setting, tokens = resolve_recompute(c, setting, available_bytes, limits, share_tokens=share, tokens=tokens)
    tokens = tokens // TOKENS_MULTIPLE * TOKENS_MULTIPLE
    if tokens < config.max_length and not config.micro_batch_tokens:
        advice = advise_settings(c, setting, available_bytes, config.max_length, config.max_length, config.max_length)
        raise UsageError(
            f"{config.model}: an example of {config.max_length} tokens and what training keeps do not fit the "
            f"{available_bytes / 1e9:.1f} GB that are free; {advice}"
        )
    return setting, tokens


def require_host_memory(c: ModelConfig, setting: Setting, host_bytes: float) -> None:
    """Raise UsageError, with settings that would do, where offloaded states do not fit a GPU's part of host memory."""

    def need(way: Setting) -> int:
        return memory(c, way, BatchShape(1, 1)).host

    if need(setting) <= host_bytes:
        return
    ways = {f"--optimizer-states {name}": dataclasses.replace(setting, states=name) for name in ("bf16", "8bit")}
    least = dataclasses.replace(setting, states="8bit", master="stochastic")
    ways["--optimizer-states 8bit --master-weights stochastic"] = least
    advice = [f"{flags} ({need(way) / 1e9:.1f} GB)" for flags, way in ways.items() if need(way) <= host_bytes]
    a_rank = " a rank" if setting.n_cards > 1 else ""
    raise UsageError(
        f"--offload-optimizer keeps {need(setting) / 1e9:.1f} GB{a_rank} in the host's memory, of which "
        f"{host_bytes / 1e9:.1f} GB are free; "
        + (f"pass {', or '.join(advice)}" if advice else "take a machine with more memory")
    )


def project_update(c: ModelConfig, setting: Setting, device: torch.device) -> float:
    """Return the projected seconds of an update on this GPU, or on an H100 where its figures are not known."""
    card = detect_card(device) or CARDS["H100"]
    return update_seconds(card, find_rates(card), state_bytes(c, setting), setting)


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple that is not under n."""
    return -(-n // multiple) * multiple


def count_largest_tokens(config: FinetuneConfig, train: Dataset, multiple: int) -> tuple[int, int]:
    """Return the tokens of the largest micro-batch and of the largest step that the longest examples could make.

    Both are rounded up to a multiple.
    """
    longest = np.sort(train.lengths())[::-1][: config.global_batch_size]
    micro_batch = longest[: config.micro_batch_size]
    return round_up(int(micro_batch.sum()), multiple), round_up(int(longest.sum()), multiple)


def advise_settings(
    c: ModelConfig, setting: Setting, available_bytes: int, tokens: int, most_tokens: int, least_tokens: int
) -> str:
    """Return the cheapest changes of the settings that would fit, as advice.

    tokens: of the micro-batch that did not fit; most_tokens, least_tokens: what one may have.
    """
    fits = find_cheapest_fits(
        c, setting, available_bytes, Limits(most_tokens), tokens=tokens, least_tokens=least_tokens
    )
    ways = [f"{' '.join(fit.flags)} ({fit.memory.total / 1e9:.1f} GB)" for fit in fits[:3] if fit.flags]
    if ways:
        return "pass " + ", or ".join(ways)
    return "take a smaller --max-length or a larger card: python -m engine.estimate tells which"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the GPU had no memory left for torch's allocator, cuBLAS's workspace or a kernel's code."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("ALLOC_FAILED|out of memory", str(error)))


def describe_out_of_memory(error: RuntimeError) -> str:
    """Return the first two sentences of an out-of-memory error; raise any other error again.

    For example "CUDA out of memory. Tried to allocate 2.00 GiB".
    """
    if not is_out_of_memory(error):
        raise error
    return ". ".join(str(error).split(". ")[:2])


class MicroBatchSize:
    """The size of a run's micro-batches: tried before the first step, and halved once where memory runs out.

    The size in use is batches.packing.max_tokens. is_halved says that an earlier process halved it already.
    """

    def __init__(
        self, plan: Plan, batches: Batches, world: World, say: Callable[[str], None], is_halved: bool = False
    ) -> None:
        self.plan, self.batches, self.world, self.say, self.is_halved = plan, batches, world, say, is_halved

    @property
    def max_tokens(self) -> int:
        return self.batches.packing.max_tokens

    def recover(self, reason: str, optimizer: AdamW, prefetcher: Prefetcher | None = None) -> None:
        """Free what a pass that ran out of memory holds, and halve the micro-batch, once in a run.

        prefetcher: its micro-batches of the old size are dropped. Raises CriaError, with settings that would fit, where
        halving cannot help. Call this after the except block: inside it the traceback still holds the tensors of the
        failed pass.
        """
        if optimizer.step_in_backward and prefetcher:
            raise CriaError(
                f"out of memory ({reason}) in a step whose updates --optimizer-in-backward had begun; "
                + self.advise(self.max_tokens // 2)
            )
        optimizer.zero_grad()
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()
        self.halve(reason)
        if prefetcher:
            prefetcher.drop_prefetched()

    def try_largest(self, model: Transformer, optimizer: AdamW) -> None:
        """Run the largest micro-batch that the data can make, forward and backward, with loss at every token.

        Call it on a GPU before the first step. Memory that suffices here suffices for every later step. Prints the peak
        of memory.
        """
        plan = self.plan
        most, step = count_largest_tokens(plan.config, plan.train, plan.packing.multiple)

        def run_largest():
            tokens = min(self.max_tokens, most)
            batch = make_largest_micro_batch(tokens, plan.config.max_length, plan.model_config.vocab_size)
            if plan.config.optimizer_in_backward and tokens == step:
                loss = model.loss(batch)
                optimizer.begin_in_backward(0.0, loss * torch.nan)  # a loss of NaN updates nothing
                loss.backward()
            else:
                for is_last in (False, True):  # the second backward runs beside the gradients of the first
                    set_last_micro_batch(model, is_last)
                    with optimizer.micro_batch(is_last):
                        model.loss(batch).backward()
            return tokens

        while True:
            try:
                tokens = run_largest()
                break
            except RuntimeError as error:
                reason = describe_out_of_memory(error)
            self.recover(reason, optimizer)
        optimizer.zero_grad()
        peak, total = torch.cuda.max_memory_allocated(plan.device), torch.cuda.mem_get_info(plan.device)[1]
        self.say(f"micro-batches of {tokens} tokens take {peak / 2**30:.2f} of {total / 2**30:.2f} GiB at most")
        torch.cuda.reset_peak_memory_stats(plan.device)

    def halve(self, reason: str) -> None:
        """Halve the tokens of a micro-batch, and say so.

        Raises CriaError where they were halved before, where that would change the maths, and on several ranks: the
        others wait inside the step, so the next start of the same command halves instead.
        """
        config, packing = self.plan.config, self.batches.packing
        fewer = max(self.max_tokens // 2 // packing.multiple * packing.multiple, config.max_length)
        what = f"out of memory with micro-batches of {self.max_tokens} tokens ({reason})"
        if self.is_halved or fewer == self.max_tokens or config.loss_norm == "micro-mean":
            raise CriaError(f"{what}; {self.advise(fewer)}")
        if self.world.size > 1:
            record_halving(self.plan.out, self.max_tokens, fewer)
            raise CriaError(f"{what}; the same command goes on with {fewer}; {self.advise(fewer)}")
        self.say(f"{what}; going on with {fewer}, which changes the speed and nothing else")
        self.batches.packing = dataclasses.replace(packing, max_tokens=fewer)
        self.is_halved = True

    def advise(self, most_tokens: int) -> str:
        """Return the peak of memory, and settings that would fit with micro-batches of at most most_tokens."""
        plan = self.plan
        if plan.device.type != "cuda":
            return "lower --micro-batch-tokens"
        peak, total = torch.cuda.max_memory_allocated(plan.device), torch.cuda.mem_get_info(plan.device)[1]
        setting = setting_from_config(plan.config, plan.dtype, self.world.size, plan.on_cpu)
        setting = setting.with_replicas(self.world.replicas)
        setting = dataclasses.replace(setting, recompute=plan.recompute)
        ways = advise_settings(
            plan.model_config, setting, int(0.9 * total), self.max_tokens, most_tokens, plan.config.max_length
        )
        return f"the peak was {peak / 1e9:.1f} of {total / 1e9:.1f} GB; {ways}"


def record_halving(out: Path, tokens: int, fewer: int) -> None:
    """Leave a note for the next start that micro-batches of so many tokens ran out of memory.

    Several ranks may write it at once. A rank that cannot write it must still be able to say why the run ends.
    """
    new = out / f".tmp-{HALVED}-{os.getpid()}"
    with contextlib.suppress(OSError):
        new.write_text(json.dumps({"from": tokens, "to": fewer}))
        os.replace(new, out / HALVED)


def read_halving(plan: Plan, tokens: int, say: Callable[[str], None]) -> int | None:
    """Return the tokens that an earlier start, which ran out of memory, left for this one, or None.

    They replace `tokens` if that is the size that ran out, or a larger one that --micro-batch-tokens did not ask for.
    """
    note = read_json(plan.out / HALVED, "remove the file")
    if note and not all(type(note.get(key)) is int and note[key] > 0 for key in ("from", "to")):
        raise DataError(f"{plan.out / HALVED}: its from and to are no numbers of tokens; remove the file")
    is_larger = plan.config.micro_batch_tokens is None and tokens > note.get("to", tokens)
    if is_larger or tokens in (note.get("from"), note.get("to")):
        say(f"micro-batches of {note['to']} tokens: those of {note['from']} ran out of memory")
        return note["to"]
    return None

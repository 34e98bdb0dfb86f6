"""One optimizer step: the gradients of a global batch, their norm over all ranks, clipping, one update.

The host never waits for the step under way. It reads the figures of a step after it has given the device the gradients
of the next one, just before that step's update, whose bias corrections need to know whether the earlier update counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.data.batches import StepBatch
from engine.distributed.fsdp import set_last_micro_batch
from engine.distributed.world import World
from engine.model.llama import Transformer
from engine.training.micro_batch_size import MicroBatchSize, describe_out_of_memory
from engine.training.optimizer import AdamW
from engine.training.run_ahead import Figures, Mark, Prefetcher


@dataclass(frozen=True)
class StepReport:
    """How a step went, as every rank knows it."""

    step: int
    lr: float
    loss: float  # mean over the loss tokens of the global batch, on all ranks
    grad_norm: float  # before clipping, over all ranks
    is_finite: bool  # loss and norm are numbers, and the weights were updated
    updated_in_backward: bool  # layers were updated as backward went, whether or not the rest was finite
    n_signals: int  # ranks that a signal had reached
    seconds: float  # between the step's begin and its end on the device
    n_tokens: int  # of the global batch, as its examples hold them
    n_computed_tokens: int  # of all ranks
    n_loss_tokens: int  # of the global batch
    examples: np.ndarray  # of the global batch, as places in the dataset


def seed_draw(*numbers: int) -> int:
    """Return a seed of 48 bits that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 16


@dataclass(frozen=True)
class PendingStep:
    """A step that the device has been given and whose figures the host has not read."""

    step: int
    lr: float
    batch: StepBatch  # without its micro-batches
    began: Mark
    updated_in_backward: bool
    figures: Figures  # loss, norm, is finite; on several ranks also computed tokens and signals


class Steps:
    """Takes the optimizer steps of a model, and reads how each went when the device is busy with the next.

    has_signal says whether a signal asks this process to stop; size halves micro-batches that run out of memory. seed:
    of an adapter's dropout, which depends on step, rank and micro-batch too, so that a resumed run draws the same.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: AdamW,
        prefetcher: Prefetcher,
        grad_clip: float,
        world: World | None = None,
        has_signal: Callable[[], bool] = lambda: False,
        size: MicroBatchSize | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer, self.prefetcher, self.grad_clip = model, optimizer, prefetcher, grad_clip
        self.world, self.has_signal, self.size, self.seed = world or World(), has_signal, size, seed
        self.pending: PendingStep | None = None
        self.reports: list[StepReport] = []  # read, and not yet handed out

    def take_step(self, step: int, lr: float) -> bool:
        """Give the device one optimizer step, and read the figures of the step before.

        Returns False, with nothing changed, where a signal asks a lone process to stop before all gradients are there.
        Ranks, which must agree on that, end the step first.
        """
        began = Mark(self.model.norm.device)
        computed = self.compute_within_memory(step, lr)
        self.read_pending()
        if computed is None:
            return False
        batch, loss = computed
        in_backward = self.optimizer.step_in_backward is not None
        loss, norm, shared = self.sum_over_ranks(loss, self.optimizer.grad_norm(), batch.n_computed_tokens)
        is_finite = torch.isfinite(loss + norm)
        self.optimizer.step(lr, norm, self.grad_clip, apply=is_finite)
        figures = Figures(loss, norm, is_finite, *shared)
        counts = replace(batch, micro_batches=())  # else their device memory would be held during the next step
        self.pending = PendingStep(step, lr, counts, began, in_backward, figures)
        return True

    def take_reports(self, wait: bool) -> list[StepReport]:
        """Return the reports of steps whose figures were read since the last call. wait: read the newest step's too."""
        if wait:
            self.read_pending()
        reports, self.reports = self.reports, []
        return reports

    def compute_within_memory(self, step: int, lr: float) -> tuple[StepBatch, torch.Tensor] | None:
        """Call compute_gradients, and once more with half the micro-batch where it runs out of memory."""
        while True:
            try:
                return self.compute_gradients(step, lr)
            except RuntimeError as error:
                reason = describe_out_of_memory(error)
                if self.size is None:
                    raise
            self.size.recover(reason, self.optimizer, self.prefetcher)

    def compute_gradients(self, step: int, lr: float) -> tuple[StepBatch, torch.Tensor] | None:
        """Run this rank's micro-batches of a step, forward and backward.

        Returns them with their summed loss, a scalar on the device; None when a signal asks a lone process to stop.
        """
        batch = self.prefetcher.take(step)
        loss = torch.zeros((), device=self.model.norm.device)
        for i, micro_batch in enumerate(batch.micro_batches, 1):
            if self.world.size == 1 and self.has_signal():
                return None
            is_last = i == len(batch.micro_batches)
            set_last_micro_batch(self.model, is_last)
            with self.optimizer.micro_batch(is_last):
                part = self.model.loss(micro_batch, seed_draw(self.seed, step, self.world.rank, i))
                if self.optimizer.in_backward and len(batch.micro_batches) == 1:
                    self.optimizer.begin_in_backward(lr, part)
                part.backward()
            loss += part.detach()
        return batch, loss

    def sum_over_ranks(
        self, loss: torch.Tensor, norm: torch.Tensor, n_computed_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return loss, gradient norm and [computed tokens, ranks that a signal reached] of all ranks, on the device.

        On one rank the list is empty, because the host has these numbers. On several, torch.full puts them on the
        device: a copy would wait for it.
        """
        if self.world.size == 1:
            return loss, norm, []
        square = norm.double().square()
        if self.world.replicas > 1:  # each replica holds every gradient
            square = square / self.world.replicas
        host = n_computed_tokens, self.has_signal()
        filled = [torch.full((), float(n), dtype=torch.float64, device=loss.device) for n in host]
        loss, square, *shared = self.world.sum_over_ranks(torch.stack([loss.double(), square, *filled]))
        return loss, square.sqrt().float(), shared

    def read_pending(self) -> None:
        """Wait for the figures of the pending step, if there is one, and keep its report."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        loss, norm, is_finite, *shared = pending.figures.read()
        n_computed_tokens, n_signals = map(int, shared) if shared else (pending.batch.n_computed_tokens, 0)
        if not is_finite:
            self.optimizer.n_updates -= 1  # the device has left this update out
        self.reports.append(StepReport(
            pending.step, pending.lr, loss, norm, bool(is_finite), pending.updated_in_backward, n_signals,
            pending.figures.mark.seconds_since(pending.began), pending.batch.n_tokens, n_computed_tokens,
            pending.batch.n_loss_tokens, pending.batch.examples,
        ))  # fmt: skip

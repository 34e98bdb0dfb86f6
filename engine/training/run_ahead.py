"""What lets the host run ahead of the device, so that the device never waits for it.

Micro-batches are prepared in advance, and figures are read after the device has computed them.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from engine.data.batches import Batches, StepBatch
from engine.model.batch import DeviceMicroBatch
from engine.model.llama import Transformer


class Prefetcher:
    """Hands out the micro-batches of each step, planned and on the device. A thread prepares the next step's meanwhile.

    On a GPU they are copied from pinned memory on a stream of their own. The stream that computes waits for that copy;
    the host does not. last_step: the last one that is prepared ahead.
    """

    def __init__(self, batches: Batches, model: Transformer, last_step: int) -> None:
        self.batches, self.model, self.last_step = batches, model, last_step
        self.pool = ThreadPoolExecutor(1, "prefetcher")
        self.stream = torch.cuda.Stream(model.norm.device) if model.norm.is_cuda else None
        self.ahead: tuple[int, Future] | None = None  # (step, what the thread prepares for it)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self, step: int) -> StepBatch:
        """Return the micro-batches of a step. Raises whatever making them raised."""
        future = self.ahead[1] if self.ahead and self.ahead[0] == step else self.pool.submit(self._prepare, step)
        batch, copied = future.result()
        self.ahead = (step + 1, self.pool.submit(self._prepare, step + 1)) if step < self.last_step else None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_event(copied)
            for tensor in find_cuda_tensors(batch.micro_batches):
                tensor.record_stream(current)  # its memory returns to the copying stream only after this one is done
        return batch

    def drop_prefetched(self) -> None:
        """Drop what was prepared ahead, because the size of micro-batches has changed."""
        self.ahead = None

    def _prepare(self, step):
        batch: StepBatch = self.batches.make_step(step)
        if self.stream is None:
            return replace(batch, micro_batches=[self.model.prepare_batch(b) for b in batch.micro_batches]), None
        with torch.cuda.stream(self.stream):
            batch = replace(batch, micro_batches=[self.model.prepare_batch(b) for b in batch.micro_batches])
            return batch, self.stream.record_event()


def find_cuda_tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield every CUDA tensor in nested tuples, lists and DeviceMicroBatches."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from find_cuda_tensors(item)
    elif isinstance(value, DeviceMicroBatch):
        yield from find_cuda_tensors(list(vars(value).values()))


class Mark:
    """A moment in the device's queue of work."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record(torch.cuda.current_stream(device))
        self.at = time.perf_counter()

    def seconds_since(self, earlier: "Mark") -> float:
        """Wait for the device to reach this mark, and return the seconds between the two."""
        if self.event is None or earlier.event is None:
            return self.at - earlier.at
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class Figures:
    """Scalars on their way from the device to the host."""

    def __init__(self, *scalars: torch.Tensor) -> None:
        values = torch.stack([s.detach().double() for s in scalars])
        self.values = values.to("cpu", non_blocking=True) if values.is_cuda else values
        self.mark = Mark(values.device)

    def read(self) -> list[float]:
        """Wait for the scalars, and so for everything the device was given before them, and return them."""
        if self.mark.event:
            self.mark.event.synchronize()
        return self.values.tolist()

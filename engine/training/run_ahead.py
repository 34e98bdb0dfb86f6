"""The pieces of an optimizer step that keep the host out of the device's way: micro-batches that are ready before they
are asked for, and figures that are read after they are known."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from engine.model.batch import MicroBatch, Ready
from engine.model.llama import Transformer


class Feeder:
    """The micro-batches of a step, planned and on the device; a thread of its own prepares the next step's meanwhile.

    make: step -> its MicroBatches, [] after the last. On a GPU they are copied from pinned memory by a stream of their
    own, which the stream that asks waits for, not the host.
    """

    def __init__(self, make: Callable[[int], list[MicroBatch]], model: Transformer):
        self.make, self.model = make, model
        self.pool = ThreadPoolExecutor(1, "feeder")
        self.stream = torch.cuda.Stream(model.norm.device) if model.norm.is_cuda else None
        self.ahead = None  # (step, future)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[Ready]:
        """Raises what make raises."""
        asked, future = self.ahead or (None, None)
        batches, copied = future.result() if asked == step else self.pool.submit(self._prepare, step).result()
        self.ahead = step + 1, self.pool.submit(self._prepare, step + 1)
        if copied is not None:
            here = torch.cuda.current_stream(self.stream.device)
            here.wait_event(copied)
            for tensor in tensors_of(batches):
                tensor.record_stream(here)  # its memory is not the copying stream's again before this one is done
        return batches

    def forget(self):
        """What was prepared ahead: make would make it differently now."""
        self.ahead = None

    def _prepare(self, step):
        if self.stream is None:
            return [self.model.ready(batch) for batch in self.make(step)], None
        with torch.cuda.stream(self.stream):
            batches = [self.model.ready(batch) for batch in self.make(step)]
            return batches, self.stream.record_event()


def tensors_of(value):
    """Every CUDA tensor in nested tuples, lists and Readys."""
    if isinstance(value, torch.Tensor):
        yield from [value] if value.is_cuda else []
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, Ready):
        yield from tensors_of(list(vars(value).values()))


class Mark:
    """A moment in the device's queue of work."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record(torch.cuda.current_stream(device))
        self.at = time.perf_counter()

    def seconds_since(self, earlier: "Mark") -> float:
        """Waits for the device to reach this mark."""
        if self.event is None:
            return self.at - earlier.at
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class Figures:
    """Scalars on their way from the device."""

    def __init__(self, *scalars: torch.Tensor):
        values = torch.stack([s.detach().double() for s in scalars])
        self.values = values.to("cpu", non_blocking=True) if values.is_cuda else values
        self.mark = Mark(values.device)

    def read(self) -> list[float]:
        """Waits until they are here, which takes as long as what the device was given before them."""
        if self.mark.event:
            self.mark.event.synchronize()
        return self.values.tolist()

"""Optimizer states that are kept in the host's memory: each visits the device for its update, or the CPU updates it.

Offload: states visit the device.

    upload of tensor i + 1  |  update of tensor i  |  download of tensor i - 1

Three slots of device memory, each as large as the largest parameter's states, are used in turn by an uploading stream,
the computing one and a downloading one. So the slower direction of the bus bounds an update, and the host waits for
nothing. The same kernels update the same numbers: the result is bit for bit the one of states on the device.

HostUpdates: gradients go down, the CPU updates weights and states, and weights come up.

    download of tensor i + 1 and later  |  update of tensor i on the CPU  |  upload of tensor i - 1

Each way moves 2 bytes a parameter in bf16, where states move up to 12. The norm of all gradients has to be known before
the first update, so nothing of this overlaps with backward.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from engine.base.host_memory import SLOTS, STATE_ARENA_BYTES, HostMemory, round_up
from kernels.ops.adamw import AdamWState


class Offload:
    """Optimizer states {name: state} in the host's memory, of parameters on a device."""

    def __init__(self, states: dict[str, AdamWState], device: torch.device):
        self.states, self.device, self.cuda = states, device, device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)  # copy_to_host's copies end before another stream reads them
        largest = max(count_bytes(state) for state in self.states.values())
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self.free: list[torch.cuda.Event | None] = [None] * SLOTS  # events after which a slot may be filled again
        self.up: Any = None  # streams, on a GPU
        self.down: Any = None
        if self.cuda:
            self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def states_on_device(self) -> Iterator[tuple[str, AdamWState]]:
        """Yield (name, its state on the device) of each parameter. What the caller writes to a state is copied back."""
        names = list(self.states)
        arrivals = [self._upload(0, self.states[names[0]])]
        for i, name in enumerate(names):
            if i + 1 < len(names):
                arrivals.append(self._upload((i + 1) % SLOTS, self.states[names[i + 1]]))
            state, arrived = arrivals[i]
            if self.cuda:
                torch.cuda.current_stream(self.device).wait_event(arrived)
            yield name, state
            self._download(i % SLOTS, state, self.states[name])
            arrivals[i] = None

    def wait(self) -> None:
        """Wait until the host's memory holds what was computed."""
        if self.cuda:
            self.down.synchronize()

    def _upload(self, slot, state):
        views = lay_out_state(self.slots[slot], state)
        if not self.cuda:
            copy_state(state, views)
            return views, None
        if self.free[slot] is not None:
            self.up.wait_event(self.free[slot])
        with torch.cuda.stream(self.up):
            copy_state(state, views)
        return views, self.up.record_event()

    def _download(self, slot, views, state):
        if not self.cuda:
            copy_state(views, state)
            return
        self.down.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.down):
            copy_state(views, state)
        self.free[slot] = self.down.record_event()


class HostUpdates:
    """Copies of gradients and weights in the host's memory, of parameters {name: this rank's rows} on a device."""

    def __init__(self, shards: dict[str, torch.Tensor], device: torch.device):
        self.shards, self.device, self.cuda = shards, device, device.type == "cuda"
        memory = HostMemory(self.cuda, STATE_ARENA_BYTES)
        self.grads = {name: reserve_like(t, memory) for name, t in shards.items()}
        self.weights = {name: reserve_like(t, memory) for name, t in shards.items()}
        self.is_stale = True  # whether somebody else may have written weights on the device
        self.arrivals: dict[str, torch.cuda.Event | None] = {}
        self.up: Any = None  # streams, on a GPU
        self.down: Any = None
        if self.cuda:
            self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def download(self, grads: dict[str, torch.Tensor]) -> None:
        """Begin to copy every gradient, and weights that may have been written elsewhere, to the host."""
        if self.cuda:
            self.down.wait_event(torch.cuda.current_stream(self.device).record_event())
        for name, grad in grads.items():
            pairs = [(self.grads[name], grad), (self.weights[name], self.shards[name])][: 1 + self.is_stale]
            if not self.cuda:
                for target, source in pairs:
                    target.copy_(source)
                self.arrivals[name] = None
                continue
            with torch.cuda.stream(self.down):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(self.down)  # a gradient may be dropped before it has been copied
            self.arrivals[name] = self.down.record_event()
        self.is_stale = False

    def tensors_on_host(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (name, weights, gradient) of each parameter as they arrive. Weights that the caller writes go up."""
        for name, arrived in self.arrivals.items():
            if arrived is not None:
                arrived.synchronize()
            yield name, self.weights[name], self.grads[name]
            if not self.cuda:
                self.shards[name].copy_(self.weights[name])
                continue
            with torch.cuda.stream(self.up):
                self.shards[name].copy_(self.weights[name], non_blocking=True)
        if self.cuda:  # the next forward reads all of them
            torch.cuda.current_stream(self.device).wait_event(self.up.record_event())


def reserve_like(t: torch.Tensor, memory: HostMemory) -> torch.Tensor:
    """Return an uninitialised tensor of t's shape and dtype in the host's memory."""
    return memory.reserve_piece(t.nbytes).view(t.dtype).view(t.shape)


def copy_to_host(state: AdamWState, memory: HostMemory) -> AdamWState:
    """Return a copy of a state in the host's memory. On a GPU the copy is queued on the current stream."""
    views = lay_out_state(memory.reserve_piece(count_bytes(state)), state)
    copy_state(state, views)
    return views


def count_bytes(state: AdamWState) -> int:
    """Return the bytes of a state whose tensors are laid out in one piece of memory."""
    return sum(round_up(t.nbytes) for t in state.tensors().values())


def lay_out_state(memory: torch.Tensor, state: AdamWState) -> AdamWState:
    """Return views of a piece of memory, shaped as the state's tensors. Nothing is copied."""
    views, first = {}, 0
    for name, t in state.tensors().items():
        views[name] = memory[first : first + t.nbytes].view(t.dtype).view(t.shape)
        first += round_up(t.nbytes)
    return dataclasses.replace(state, **views)


def copy_state(source: AdamWState, target: AdamWState) -> None:
    """Copy every tensor of a state into another state. On a GPU the copies are queued."""
    for name, t in target.tensors().items():
        t.copy_(source.tensors()[name], non_blocking=True)

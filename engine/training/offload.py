"""Optimizer states that are kept in the host's memory, and visit the device for their updates.

    upload of tensor i + 1  |  update of tensor i  |  download of tensor i - 1

Three slots of device memory, each as large as the largest parameter's states, are used in turn by an uploading stream,
the computing one and a downloading one. So the slower direction of the bus bounds an update, and the host waits for
nothing. The same kernels update the same numbers: the result is bit for bit the one of states on the device.
engine.training.host_updates is the other way: states stay, and the CPU updates them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from engine.base.host_memory import SLOTS, HostMemory, round_up
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

"""Optimizer states in the host's memory, which visit the device for their update.

    upload of tensor i + 1  |  update of tensor i  |  download of tensor i - 1

Three slots of device memory, each as large as the largest parameter's states, are used in turn by an uploading stream,
the computing one and a downloading one, so that what bounds an update is the slower direction of the bus, and the host
waits for nothing. The same kernels update the same numbers: bit for bit what is computed without it.
"""

import dataclasses
from collections.abc import Iterator

import torch

from kernels.ops.adamw import AdamWState

SLOTS = 3
ALIGN = 128  # bytes
ARENA_BYTES = 1 << 30  # of memory for states that are offloaded
COPY_ARENA_BYTES = 1 << 28  # of memory for a copy of the state that is being saved


class Offload:
    """States {name: state} in the host's memory, of parameters on `device`."""

    def __init__(self, states: dict[str, AdamWState], device: torch.device):
        self.states, self.device, self.cuda = states, device, device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)  # what HostMemory.take copies is there before another stream reads it
        largest = max(size_of(state) for state in self.states.values())
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self.free = [None] * SLOTS  # event after which a slot's last content is back in the host's memory
        self.up, self.down = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if self.cuda else (None, None)

    def visits(self) -> Iterator[tuple[str, AdamWState]]:
        """(name, its state on the device), one after another; what the caller writes to it goes back."""
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
        """Until the host's memory holds what was computed."""
        if self.cuda:
            self.down.synchronize()

    def _upload(self, slot, state):
        views = carve(self.slots[slot], state)
        if not self.cuda:
            copy(state, views)
            return views, None
        if self.free[slot] is not None:
            self.up.wait_event(self.free[slot])
        with torch.cuda.stream(self.up):
            copy(state, views)
        return views, self.up.record_event()

    def _download(self, slot, views, state):
        if not self.cuda:
            copy(views, state)
            return
        self.down.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.down):
            copy(views, state)
        self.free[slot] = self.down.record_event()


def size_of(state):
    return sum(-(-t.nbytes // ALIGN) * ALIGN for t in state.tensors().values())


class HostMemory:
    """The host's memory for states: pinned, where a GPU copies from it, in arenas of a power of two, as torch rounds
    every pinned tensor's up to one."""

    def __init__(self, pinned: bool):
        self.pinned, self.arenas = pinned, []  # [memory, bytes taken]

    def take(self, state: AdamWState) -> AdamWState:
        """The state, moved here."""
        size = size_of(state)
        arena = next((a for a in self.arenas if a[1] + size <= len(a[0])), None)
        if arena is None:
            whole = max(ARENA_BYTES, 1 << (size - 1).bit_length()) if self.pinned else size
            arena = [torch.empty(whole, dtype=torch.uint8, pin_memory=self.pinned), 0]
            self.arenas.append(arena)
        here = carve(arena[0][arena[1] :], state)
        arena[1] += size
        copy(state, here)
        return here


def carve(memory, state):
    """The state's tensors laid out in a slot."""
    views, at = {}, 0
    for name, t in state.tensors().items():
        views[name] = memory[at : at + t.nbytes].view(t.dtype).view(t.shape)
        at += -(-t.nbytes // ALIGN) * ALIGN
    return dataclasses.replace(state, **views)


def copy(source, target):
    for name, t in target.tensors().items():
        t.copy_(source.tensors()[name], non_blocking=True)

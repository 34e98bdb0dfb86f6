"""Updates on the CPU of parameters whose master and states are in the host's memory.

Gradients leave the device while backward goes on, a group of Transformer.parameter_groups() at a time:

    backward of group i - 1  |  download of group i's gradients  |  upload of group i - 2's sums

Sums of a step's earlier micro-batches come back for the next one, so that backward's GEMMs add to them: every number is
rounded as where gradients stay on the device. Gradients of three groups are on the device at most, of two in a step of
one micro-batch. After the last backward, when the norm of all gradients is known:

    update of tensor i on the CPU  |  upload of tensor i - 1's weights

In bf16 a micro-batch moves 2 bytes a parameter down, all but a step's first as many up, and an update as many up, where
states that visit the device move up to 12 each way.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import kernels
from engine.base.host_memory import STATE_ARENA_BYTES, HostMemory
from engine.model.llama import Transformer

Pair = tuple[torch.Tensor, torch.Tensor]  # target, source


@dataclass(frozen=True)
class Copied:
    """The end of copies that a Lane was given. On a CPU they are done at once, and there is no event."""

    event: torch.cuda.Event | None = None

    def wait_on_host(self) -> None:
        """Return when the copies are done."""
        if self.event is not None:
            self.event.synchronize()

    def wait_on_device(self) -> None:
        """Let what the device is given from now on wait until the copies are done."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class Lane:
    """Copies between a device and the host's memory, one after the other, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[Pair]) -> Copied:
        """Copy sources to targets, after all that the device has been given.

        Tensors on the device may be dropped at once: their memory is kept until the copies are done.
        """
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return Copied()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                (target if target.is_cuda else source).record_stream(self.stream)
            return Copied(self.stream.record_event())


class HostUpdates:
    """Gradients and weights in the host's memory, of a model's parameters {name: this rank's rows} on a device."""

    def __init__(self, model: Transformer, shards: dict[str, torch.Tensor], device: torch.device, impl: str) -> None:
        self.model, self.shards, self.impl = model, shards, impl
        self.params, self.groups = dict(model.named_parameters()), model.parameter_groups()
        memory = HostMemory(device.type == "cuda", STATE_ARENA_BYTES)
        self.grads = {name: reserve_like(t, memory) for name, t in shards.items()}
        self.weights = {name: reserve_like(t, memory) for name, t in shards.items()}
        self.up, self.down = Lane(device), Lane(device)
        self.is_stale = True  # whether somebody else may have written weights on the device
        self.is_last = False  # whether the micro-batch under way is the step's last
        self.left: dict[str, Copied] = {}  # gradients that this step has sent to the host
        self.leaving = Copied()  # the group that was sent last
        self.arrived: dict[int, Copied] = {}  # groups whose sums this micro-batch has sent to the device
        self.squares: dict[str, torch.Tensor] = {}  # of the step's gradients: kernels.sum_squares()

    def forget_step(self) -> None:
        """Drop the gradients of a step that has ended, or that is taken once more."""
        self.left, self.arrived, self.squares = {}, {}, {}

    # ---- backward ---------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Let gradients leave the device in the backward of the one micro-batch whose loss and backward run within."""
        self.is_last, self.arrived, top = is_last, {}, len(self.groups) - 1
        self._fetch(top)
        self._fetch(top - 1)
        # The loss adds to the head's gradient in forward.
        hook = self.model.layers[-1].register_forward_hook(lambda *_: self._await(top))
        self.model.on_gradients = self._send
        try:
            yield
            if is_last or not self.model.config.tied:  # the next loss would add to a tied head's at once
                self._send(0)
        finally:
            self.model.on_gradients = None
            hook.remove()

    def _send(self, group):
        """Send a group's gradients to the host, and make ready for backward of the groups before it."""
        grads = {name: self._drop_grad(name) for name in self.groups[group]}
        if self.is_last:
            self.squares |= {name: kernels.sum_squares(grad, self.impl) for name, grad in grads.items()}
        copied = self.down.copy((self.grads[name], grad) for name, grad in grads.items())
        del grads  # the device's memory is free once it has been copied
        self.left |= dict.fromkeys(self.groups[group], copied)
        self.leaving.wait_on_host()  # the group before: its memory then serves what comes next
        self.leaving = copied
        self._fetch(group - 2)
        self._await(group - 1)

    def _drop_grad(self, name):
        grad, self.params[name].grad = self.params[name].grad, None
        assert grad is not None, f"{name} has no gradient"
        return grad

    def _fetch(self, group):
        """Send the sums of a group's gradients to the device, where backward will add to them, if there are any."""
        names = self.groups[group] if group >= 0 else []
        if names and names[0] in self.left:
            self.left[names[0]].wait_on_host()  # in general it has long been there
            pairs = [(torch.empty_like(self.params[name]), self.grads[name]) for name in names]
            for name, (sums, _) in zip(names, pairs, strict=True):
                self.params[name].grad = sums
            self.arrived[group] = self.up.copy(pairs)

    def _await(self, group):
        if group in self.arrived:
            self.arrived[group].wait_on_device()

    # ---- after backward ---------------------------------------------------------------------------------------------

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of the gradients that have left, a scalar on the device: the bits of kernels.grad_norm().

        Call it after the last micro-batch of a step.
        """
        return kernels.norm_of_sums([self.squares[name] for name in self.params], self.impl)

    def send(self, grads: dict[str, torch.Tensor]) -> None:
        """Send gradients that have not left in backward to the host, tensor by tensor."""
        for name, grad in grads.items():
            self.left[name] = self.down.copy([(self.grads[name], grad)])

    def tensors_on_host(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (name, weights, gradient) of each parameter as they arrive. Weights that the caller writes go up."""
        if self.is_stale:
            self.down.copy([(self.weights[name], shard) for name, shard in self.shards.items()]).wait_on_host()
            self.is_stale = False
        copied = Copied()
        for name, left in self.left.items():
            left.wait_on_host()
            yield name, self.weights[name], self.grads[name]
            copied = self.up.copy([(self.shards[name], self.weights[name])])
        copied.wait_on_device()  # the next forward reads all of them


def reserve_like(t: torch.Tensor, memory: HostMemory) -> torch.Tensor:
    """Return an uninitialised tensor of t's shape and dtype in the host's memory."""
    return memory.reserve_piece(t.nbytes).view(t.dtype).view(t.shape)

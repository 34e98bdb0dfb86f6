"""AdamW over kernels.adamw, clipping and the learning-rate schedules."""

import math
import os
import random
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

import kernels
from engine.base.errors import UsageError
from engine.base.host_memory import STATE_ARENA_BYTES, HostMemory
from engine.distributed.fsdp import local_shards
from engine.model.llama import Transformer
from engine.model.shard import Shard
from engine.training.host_updates import HostUpdates
from engine.training.offload import Offload, copy_to_host
from kernels.native.cpu import find_cpu, load_cpu
from kernels.native.library import NativeError
from kernels.ops.adamw import AdamWState, states_of
from kernels.ops.eight_bit import BLOCK


def lr_factor(schedule: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return the factor of the peak learning rate at an optimizer step, counted from 1.

    It rises from 0 for ceil(warmup_ratio * total_steps) steps. Then it falls to 0 as half a cosine or as a line, or
    stays. Step for step as transformers' get_*_schedule_with_warmup.
    """
    done, warmup = step - 1, math.ceil(warmup_ratio * total_steps)
    if done < warmup:
        return done / max(1, warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, (total_steps - done) / max(1, total_steps - warmup))
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total_steps - warmup))))


def count_updates(schedule: str, total_steps: int, warmup_ratio: float) -> int:
    """Return how many steps have a learning rate over 0: the first of a warm-up changes no weight."""
    return sum(lr_factor(schedule, step, total_steps, warmup_ratio) > 0 for step in range(1, total_steps + 1))


def choose_optimizer(kernels_impl: str) -> str:
    """Return the kernels of the optimizer: those of the model, or "cuda" on a GPU where CRIA_OPTIMIZER names it.

    Raises UsageError for another name.
    """
    named = os.environ.get("CRIA_OPTIMIZER", "triton")
    if named not in ("triton", "cuda", "cpu"):
        raise UsageError(f"CRIA_OPTIMIZER is {named!r}, wanted triton, cuda or cpu")
    return "cuda" if named == "cuda" and kernels_impl == "triton" else kernels_impl


def prefers_cpu(n_ranks: int) -> bool:
    """Return whether the CPU is to update offloaded states: as CRIA_OPTIMIZER says, else on one rank.

    The gradients of one rank leave the GPU during backward then; those of several stay until it ends.
    """
    named = os.environ.get("CRIA_OPTIMIZER")
    return named == "cpu" or (named is None and n_ranks == 1)


def chooses_cpu(offload: bool, kernels_impl: str, n_ranks: int) -> bool | None:
    """Return whether the CPU updates offloaded states: if prefers_cpu() says so and csrc/cpu is there.

    None means that no states are offloaded. Without CRIA_OPTIMIZER, the references (kernels_impl "ref") leave csrc/cpu
    alone. Raises UsageError if CRIA_OPTIMIZER is cpu, and states are not offloaded or csrc/cpu is not there.
    """
    if os.environ.get("CRIA_OPTIMIZER") != "cpu":
        chosen = offload and prefers_cpu(n_ranks) and kernels_impl != "ref" and find_cpu() is not None
        return chosen if offload else None
    if not offload:
        raise UsageError("CRIA_OPTIMIZER is cpu, which updates offloaded states; add --offload-optimizer")
    try:
        load_cpu()
    except NativeError as error:
        raise UsageError(f"CRIA_OPTIMIZER is cpu: {error}") from None
    return True


class AdamW:
    """Updates a model's parameters in place. Matrices decay, norms do not.

    master says how the fp32 number behind a bf16 parameter is kept, and states how m and v are, with the names that
    kernels.adamw uses. A parameter in fp32 is its own master. seed is that of stochastic rounding. With offload, master
    and states are kept in the host's memory: see engine.training.offload. With on_cpu too, the CPU updates them there,
    see engine.training.host_updates: impl "triton" then means "auto" there. With in_backward, a step that was begun
    by begin_in_backward() updates each parameter as soon as its gradient is known, and drops the gradient. All
    gradients then never exist at one time, and cannot be clipped.
    """

    def __init__(
        self, model: Transformer, *, beta1: float, beta2: float, eps: float, weight_decay: float, master: str = "split",
        states: str = "fp32", seed: int = 0, impl: str = "auto", offload: bool = False, on_cpu: bool = False,
        in_backward: bool = False,
    ) -> None:  # fmt: skip
        self.params, local = model.trained_parameters(), local_shards(model)
        self.local = {name: local[name] for name in self.params}
        device = next(iter(self.params.values())).device
        self.states: dict[str, AdamWState] = {}
        host = HostMemory(device.type == "cuda", STATE_ARENA_BYTES)
        for name, p in self.params.items():  # one by one: never more than one tensor's state on the way to the host
            state = kernels.adamw_state(self.local[name].tensor, master, states_of(p, states), p.numel())
            self.states[name] = copy_to_host(state, host) if offload else state
        self.offload = Offload(self.states, device) if offload and not on_cpu else None
        shards = {name: shard.tensor for name, shard in self.local.items()}
        self.host_updates = HostUpdates(model, shards, device, impl) if offload and on_cpu else None
        self.is_sharded = any(hasattr(p, "to_local") for p in self.params.values())
        first = random.Random(seed).getrandbits(32)
        self.seeds = {name: (first + i) % 2**32 for i, name in enumerate(self.params)}  # each tensor its own
        # The place of each shard's first element in its whole tensor.
        self.offsets = {name: shard.first * math.prod(shard.shape[1:]) for name, shard in self.local.items()}
        self.decays = {name: weight_decay if p.ndim > 1 else 0.0 for name, p in self.params.items()}
        self.settings: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": eps, "impl": impl}
        self.impl, self.n_updates = impl, 0
        self.in_backward = in_backward
        # (lr, loss, norms so far) of a step whose updates happen in backward
        self.step_in_backward: tuple[float, torch.Tensor, list[torch.Tensor]] | None = None
        if in_backward:
            for name, p in self.params.items():
                p.register_post_accumulate_grad_hook(partial(self._update_in_backward, name))

    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Return a context for the loss and the backward of one micro-batch; is_last: it is the last of its step.

        Where the CPU updates, gradients leave the device meanwhile, unless they are sharded: those stay until step().
        """
        if self.host_updates is None or self.is_sharded:
            return nullcontext()
        return self.host_updates.micro_batch(is_last)

    def begin_in_backward(self, lr: float, loss: torch.Tensor) -> None:
        """Begin a step whose only backward, which the caller runs next, updates the parameters.

        For an optimizer made with in_backward. If the loss is not finite nothing is updated. A parameter whose gradient
        is not finite is not updated.
        """
        self.step_in_backward = lr, loss.detach(), []

    def _update_in_backward(self, name, p):
        if self.step_in_backward is not None:
            lr, loss, norms = self.step_in_backward
            norms.append(kernels.grad_norm([local_part(p.grad)], self.impl))
            self._update(name, self.states[name], lr, 1.0, torch.isfinite(loss + norms[-1]))
            p.grad = None

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of the gradients that this rank holds, a scalar on the device."""
        if self.step_in_backward is not None:
            return torch.stack(self.step_in_backward[2]).square().sum().sqrt()
        if self.host_updates and self.host_updates.left:
            return self.host_updates.grad_norm()
        return kernels.grad_norm([local_part(p.grad) for p in self.params.values()], self.impl)

    def step(self, lr: float, norm: torch.Tensor, clip: float, apply: torch.Tensor | None = None) -> None:
        """Update every parameter once, with gradients times min(1, clip / (norm + 1e-6)), and drop the gradients.

        The gradients are clipped as by torch's clip_grad_norm_; clip 0 leaves them as they are. apply is a bool on the
        device. If it is false no parameter or state changes. A caller who reads that must subtract 1 from n_updates
        before the next step.
        """
        if self.step_in_backward is None:
            if self.host_updates:
                self._update_on_cpu(self.host_updates, lr, norm, clip, apply)
            elif self.offload:
                scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
                for name, state in self.offload.states_on_device():
                    self._update(name, state, lr, scale, apply)
            else:
                self._update_all(lr, norm, clip, apply)
        self.n_updates += 1
        self.zero_grad()

    def _update(self, name, state, lr, scale, apply):
        shard = self.local[name]
        kernels.adamw_many(
            [shard.tensor], [local_part(self.params[name].grad)], [state], lr=lr, weight_decays=[self.decays[name]],
            step=self.n_updates + 1, grad_scale=scale, apply=apply, seeds=[self.seeds[name]],
            offsets=[self.offsets[name]], **self.settings,
        )  # fmt: skip

    def _update_on_cpu(self, host, lr, norm, clip, apply):
        if not host.left:
            host.send({name: local_part(p.grad) for name, p in self.params.items()})
        assert len(host.left) == len(self.params), "gradients that were made outside of micro_batch()"
        if apply is not None and not apply:  # waits for the norm
            return
        scale = (clip / (norm + 1e-6)).clamp(max=1.0).item() if clip else 1.0
        settings = self.settings | {"impl": self.impl if self.impl in ("ref", "native") else "auto"}
        for name, weights, grad in host.tensors_on_host():
            kernels.adamw(
                weights, grad, self.states[name], lr=lr, weight_decay=self.decays[name], step=self.n_updates + 1,
                grad_scale=scale, seed=self.seeds[name], offset=self.offsets[name], **settings,
            )  # fmt: skip

    def _update_all(self, lr, norm, clip, apply):
        tensors = [shard.tensor for shard in self.local.values()]
        grads = [local_part(p.grad) for p in self.params.values()]
        kernels.adamw_many(
            tensors, grads, list(self.states.values()), lr=lr, weight_decays=list(self.decays.values()),
            step=self.n_updates + 1, norm=norm, clip=clip, apply=apply, seeds=list(self.seeds.values()),
            offsets=list(self.offsets.values()), **self.settings,
        )  # fmt: skip

    def zero_grad(self) -> None:
        """Drop every gradient, and a step that was begun."""
        for p in self.params.values():
            p.grad = None
        self.step_in_backward = None
        if self.host_updates:
            self.host_updates.forget_step()

    def tensors(self) -> dict[str, Shard]:
        """Return the rows that this rank holds of everything that resume needs: live tensors, not copies.

        Their names are "param.NAME", "m.NAME" and so on.
        """
        if self.offload:
            self.offload.wait()
        if self.host_updates:
            self.host_updates.is_stale = True  # the caller may load other weights
        shards = {f"param.{name}": shard for name, shard in self.local.items()}
        for name, state in self.states.items():
            first, rows, n_whole = self.local[name].first, len(self.params[name]), self.params[name].numel()
            for kind, t in state.tensors().items():
                if kind.endswith("absmax"):  # one row a block
                    shards[f"{kind}.{name}"] = Shard(t, first * n_whole // rows // BLOCK, -(-n_whole // BLOCK))
                else:
                    shards[f"{kind}.{name}"] = Shard(t, first, rows)
        return shards


def local_part(t: torch.Tensor | None) -> torch.Tensor:
    """Return the part of a tensor that this rank holds: all of it where it is not sharded."""
    assert t is not None, "a parameter without a gradient"
    return t.to_local() if hasattr(t, "to_local") else t

"""AdamW over kernels.adamw, clipping and the learning-rate schedules."""

import math
import random
from functools import partial

import torch
from torch import nn

import kernels
from engine.base.host_memory import STATE_ARENA_BYTES, HostMemory
from engine.distributed.fsdp import local_shards
from engine.model.shard import Shard
from engine.training.offload import Offload, move_to_host
from kernels.ops.adamw import states_of
from kernels.ops.eight_bit import BLOCK


def lr_factor(schedule: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """What the peak rate is multiplied by at optimizer step `step`, counted from 1.

    ceil(warmup_ratio * total_steps) steps rise from 0; then a half cosine or a line down to 0, or a constant.
    Step for step as transformers' get_*_schedule_with_warmup.
    """
    done, warmup = step - 1, math.ceil(warmup_ratio * total_steps)
    if done < warmup:
        return done / max(1, warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, (total_steps - done) / max(1, total_steps - warmup))
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total_steps - warmup))))


class AdamW:
    """Updates a model's parameters in place. Matrices decay, norms do not.

    master: how the fp32 number behind a bf16 parameter is kept; states: m and v. Both as kernels.adamw names them; a
    parameter in fp32 is its own master. seed: of stochastic rounding. offload: master and states are kept in the host's
    memory, see engine.training.offload. in_backward: a step that begin() was called for updates each parameter as soon as
    its gradient is known, and drops the gradient, so that there are never all of them; nothing can then be clipped.
    """

    def __init__(
        self, model: nn.Module, *, beta1, beta2, eps, weight_decay, master="split", states="fp32", seed=0, impl="auto",
        offload=False, in_backward=False,
    ):  # fmt: skip
        self.params, self.held = dict(model.named_parameters()), local_shards(model)
        device = next(iter(self.params.values())).device
        self.in_backward = in_backward
        self.states, self.offload, host = {}, None, HostMemory(device.type == "cuda", STATE_ARENA_BYTES)
        for name, p in self.params.items():  # one after the other: never more than one tensor's on the way
            state = kernels.adamw_state(self.held[name].tensor, master, states_of(p, states), p.numel())
            self.states[name] = move_to_host(state, host) if offload else state
        if offload:
            self.offload = Offload(self.states, device)
        first = random.Random(seed).getrandbits(32)
        self.seeds = {name: (first + i) % 2**32 for i, name in enumerate(self.params)}  # each tensor its own
        self.settings = {"beta1": beta1, "beta2": beta2, "eps": eps, "impl": impl}
        self.weight_decay, self.impl, self.n_updates = weight_decay, impl, 0
        self.begun = None  # (lr, loss, norms so far) of a step whose updates happen in backward
        if in_backward:
            for name, p in self.params.items():
                p.register_post_accumulate_grad_hook(partial(self._update_in_backward, name))

    def begin(self, lr: float, loss: torch.Tensor) -> None:
        """Before the only backward of a step, of an optimizer made with in_backward. A loss that is not finite updates
        nothing; a gradient that is not, nothing of its own."""
        self.begun = lr, loss.detach(), []

    def _update_in_backward(self, name, p):
        if self.begun is not None:
            lr, loss, norms = self.begun
            norms.append(kernels.grad_norm([own(p.grad)], self.impl))
            self._update(name, self.states[name], lr, 1.0, torch.isfinite(loss + norms[-1]))
            p.grad = None

    def grad_norm(self) -> torch.Tensor:
        """The norm of the gradients that this rank holds, a scalar on the device."""
        if self.begun is not None:
            return torch.stack(self.begun[2]).square().sum().sqrt()
        return kernels.grad_norm([own(p.grad) for p in self.params.values()], self.impl)

    def step(self, lr: float, norm: torch.Tensor, clip: float, apply: torch.Tensor | None = None) -> None:
        """One update, gradients times min(1, clip / (norm + 1e-6)) as torch's clip_grad_norm_; clip 0 leaves them.

        apply: a bool on the device, false where nothing is to change; the caller who learns that takes 1 from n_updates
        before the next step.
        """
        if self.begun is None:
            scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
            for name, state in self.offload.visits() if self.offload else self.states.items():
                self._update(name, state, lr, scale, apply)
        self.begun = None
        self.n_updates += 1

    def _update(self, name, state, lr, scale, apply):
        p, shard = self.params[name], self.held[name]
        decay = self.weight_decay if p.ndim > 1 else 0.0
        if shard.tensor.numel():
            kernels.adamw(
                shard.tensor, own(p.grad), state, lr=lr, weight_decay=decay, step=self.n_updates + 1, grad_scale=scale,
                apply=apply, seed=self.seeds[name], offset=shard.first * shard.tensor[0].numel(), **self.settings,
            )  # fmt: skip

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None
        self.begun = None

    def tensors(self) -> dict[str, Shard]:
        """Everything that resume needs and this rank holds: {"param.NAME" | "m.NAME" | ...: rows}, live, not copies."""
        if self.offload:
            self.offload.wait()
        kept = {f"param.{name}": shard for name, shard in self.held.items()}
        for name, state in self.states.items():
            first, rows, n_whole = self.held[name].first, len(self.params[name]), self.params[name].numel()
            for kind, t in state.tensors().items():
                if kind.endswith("absmax"):  # a row a block
                    kept[f"{kind}.{name}"] = Shard(t, first * n_whole // rows // BLOCK, -(-n_whole // BLOCK))
                else:
                    kept[f"{kind}.{name}"] = Shard(t, first, rows)
        return kept


def own(t: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, which is all of it where it is not sharded."""
    return t.to_local() if hasattr(t, "to_local") else t

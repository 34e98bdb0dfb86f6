"""AdamW over kernels.adamw with an fp32 master, clipping and the learning-rate schedules."""

import math

import torch
from torch import nn

import kernels

STATES = ("master", "m", "v")


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

    A parameter in fp32 is its own master; one in bf16 has an fp32 master, of which it is the rounding.
    """

    def __init__(self, model: nn.Module, *, beta1, beta2, eps, weight_decay, impl="auto"):
        self.params = dict(model.named_parameters())
        self.settings = {"beta1": beta1, "beta2": beta2, "eps": eps}
        self.weight_decay, self.impl, self.n_updates = weight_decay, impl, 0
        self.master = {n: p.data if p.dtype == torch.float32 else p.data.float() for n, p in self.params.items()}
        self.m = {n: torch.zeros_like(p) for n, p in self.master.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.master.items()}

    def grad_norm(self) -> torch.Tensor:
        """The global norm of the gradients, a scalar on the device."""
        return kernels.grad_norm([p.grad for p in self.params.values()], self.impl)

    def step(self, lr: float, norm: torch.Tensor, clip: float) -> None:
        """One update, gradients times min(1, clip / (norm + 1e-6)) as torch's clip_grad_norm_; clip 0 leaves them."""
        self.n_updates += 1
        scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
        for name, p in self.params.items():
            decay = self.weight_decay if p.ndim > 1 else 0.0
            kernels.adamw(
                p.data, p.grad, self.master[name], self.m[name], self.v[name], lr=lr, weight_decay=decay,
                step=self.n_updates, grad_scale=scale, impl=self.impl, **self.settings,
            )  # fmt: skip

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that resume needs: {"master.NAME" | "m.NAME" | "v.NAME": tensor}, live, not copies."""
        return {f"{kind}.{name}": t for kind in STATES for name, t in getattr(self, kind).items()}

    @torch.no_grad()
    def loaded(self, n_updates: int) -> None:
        """After the tensors were filled from a checkpoint: parameters follow their masters."""
        self.n_updates = n_updates
        for name, p in self.params.items():
            if p.dtype != torch.float32:
                p.copy_(self.master[name])

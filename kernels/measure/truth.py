"""Checks that run before timing: a contender is timed only if its outputs and gradients are those of the reference."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from kernels.measure.cases import BenchCase, Inputs
from kernels.measure.peers import Ready, plain

ALLOWED = 2.0  # times the error of torch's own path


def _map_tensors(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """Return the inputs with change applied to each tensor, and an empty cache."""
    values: dict[str, Any] = {}
    for name, value in vars(inputs).items():
        if name == "cache":
            values[name] = {}
        elif isinstance(value, torch.Tensor):
            values[name] = change(value)
        elif isinstance(value, list):
            values[name] = [change(t) for t in value]
        elif isinstance(value, dict):
            values[name] = {key: change(t) for key, t in value.items()}
        else:
            values[name] = value
    return SimpleNamespace(**values)


def copy_as_leaves(case: BenchCase, inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Return copies of the inputs, in dtype if one is given; those in case.grads require a gradient."""

    def change(t):
        if dtype is None or not t.is_floating_point():
            return t.detach().clone()
        return t.detach().to(dtype, copy=True)

    inputs = _map_tensors(inputs, change)
    for name in case.grads:
        getattr(inputs, name).requires_grad_()
    return inputs


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    """Return an op's outputs as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def run_once(ready: Ready) -> list[torch.Tensor | None]:
    """Return the outputs and gradients of one run, in the case's own layout; None for a gradient that is missing."""
    out = as_tuple(ready.results(ready.run()))
    found: list[torch.Tensor | None] = [ready.canonical(t).detach().clone() for t in out]
    if ready.back:
        return [*found, *ready.back()]
    if ready.leaves:
        grads = torch.autograd.grad(out, ready.leaves, ready.upstream, allow_unused=True)
        found += [None if g is None else ready.canonical(g) for g in grads]
    return found


def largest_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference, taken in b's dtype."""
    a, b = (t if t.is_floating_point() else t.float() for t in (a, b))
    return (a.to(b.dtype) - b).abs().max().item() if b.numel() else 0.0


class Truth:
    """A case's outputs and gradients in a wider dtype, and torch's error in the inputs' dtype.

    wide: the wider dtype; None is fp32, or fp64 for fp32 inputs.
    """

    def __init__(
        self,
        case: BenchCase,
        inputs: Inputs,
        upstream: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        wide: torch.dtype | None = None,
    ) -> None:
        wide = wide or (torch.float64 if dtype == torch.float32 else torch.float32)
        self.names = [f"output {i}" for i in range(len(upstream))] + [f"d{name}" for name in case.grads]
        truth = plain(lambda case, i: (case.truth or case.reference)(i))
        exact = copy_as_leaves(case, inputs, None if case.truth else wide)
        self.found = _complete(run_once(truth(case, exact, tuple(t.to(wide) for t in upstream))))
        torchs = plain(lambda case, i: case.reference(i))
        theirs = _complete(run_once(torchs(case, copy_as_leaves(case, inputs), upstream)))
        self.errors = [largest_error(a, b) for a, b in zip(theirs, self.found, strict=True)]
        self.floors = [1e-6 * b.abs().max().item() if b.numel() else 0.0 for b in self.found]

    def check(self, found: Sequence[torch.Tensor | None]) -> tuple[float, list[str]]:
        """Return the largest error over torch's own, and a complaint for each result that is wrong."""
        ratios, complaints = [0.0], []
        for name, a, b, error, floor in zip(self.names, found, self.found, self.errors, self.floors, strict=True):
            if a is None or a.shape != b.shape:
                complaints.append(f"{name} is {None if a is None else tuple(a.shape)}, wanted {tuple(b.shape)}")
                continue
            off = largest_error(a, b)
            ratios.append(off / max(error, floor, 1e-30))
            if not off <= ALLOWED * error + floor:  # a NaN is wrong too
                complaints.append(f"{name} is off by {off:.3g}, torch by {error:.3g}")
        return max(ratios), complaints


def _complete(found: list[torch.Tensor | None]) -> list[torch.Tensor]:
    missing = [i for i, t in enumerate(found) if t is None]
    if missing:
        raise ValueError(f"the reference makes no gradient for result {missing[0]}")
    return [t for t in found if t is not None]

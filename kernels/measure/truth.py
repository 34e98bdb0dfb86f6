"""Right before fast: kernels.bench times no contender whose outputs and gradients are not those of the reference."""

from types import SimpleNamespace

import torch

from kernels.measure.peers import plain

ALLOWED = 2.0  # times the error of torch's own path


def mapped(inputs, change):
    """The inputs with change applied to each tensor, and an empty cache of what is made for them."""
    kinds = {
        torch.Tensor: change,
        list: lambda ts: [change(t) for t in ts],
        dict: lambda ts: {name: change(t) for name, t in ts.items()},
    }
    values = {name: {} if name == "cache" else value for name, value in vars(inputs).items()}
    return SimpleNamespace(**{name: kinds.get(type(v), lambda v: v)(v) for name, v in values.items()})


def leaves(case, inputs, dtype=None):
    """Copies of the inputs, in another dtype if one is named, whose gradients backward makes."""

    def change(t):
        return t.detach().clone() if dtype is None or not t.is_floating_point() else t.detach().to(dtype, copy=True)

    inputs = mapped(inputs, change)
    for name in case.grads:
        getattr(inputs, name).requires_grad_()
    return inputs


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def results(ready):
    """Outputs and gradients of one run, in the case's own layout."""
    out = as_tuple(ready.run())
    found = [ready.canonical(t).detach().clone() for t in out]
    if ready.back:
        return [*found, *ready.back()]
    if ready.leaves:
        grads = torch.autograd.grad(out, ready.leaves, ready.upstream, allow_unused=True)
        found += [None if g is None else ready.canonical(g) for g in grads]
    return found


def worst(a, b):
    a, b = (t if t.is_floating_point() else t.float() for t in (a, b))
    return (a.to(b.dtype) - b).abs().max().item() if b.numel() else 0.0


class Truth:
    """A case's outputs and gradients in fp32 (fp64 for fp32 inputs), and how far off torch is in the inputs' dtype."""

    def __init__(self, case, inputs, upstream, dtype):
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        self.names = [f"output {i}" for i in range(len(upstream))] + [f"d{name}" for name in case.grads]
        truth = plain(lambda case, i: (case.truth or case.reference)(i))
        exact = leaves(case, inputs, None if case.truth else wide)
        self.found = results(truth(case, exact, tuple(t.to(wide) for t in upstream)))
        torchs = plain(lambda case, i: case.reference(i))
        theirs = results(torchs(case, leaves(case, inputs), upstream))
        self.errors = [worst(a, b) for a, b in zip(theirs, self.found, strict=True)]
        self.floors = [1e-6 * b.abs().max().item() if b.numel() else 0.0 for b in self.found]

    def held_against(self, found):
        """(the largest error over torch's own, complaints)."""
        ratios, complaints = [0.0], []
        for name, a, b, error, floor in zip(self.names, found, self.found, self.errors, self.floors, strict=True):
            if a is None or a.shape != b.shape:
                complaints.append(f"{name} is {None if a is None else tuple(a.shape)}, wanted {tuple(b.shape)}")
                continue
            off = worst(a, b)
            ratios.append(off / max(error, floor, 1e-30))
            if not off <= ALLOWED * error + floor:  # a NaN is wrong too
                complaints.append(f"{name} is off by {off:.3g}, torch by {error:.3g}")
        return max(ratios), complaints

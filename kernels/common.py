"""What every op shares: the choice of an implementation, and the width in which sums are taken."""

import torch

IMPLS = ("auto", "ref")


def choose(op, impl):
    """The implementation to run: "auto" takes the best there is for the device; a named one is insisted on."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl is {impl!r}, wanted one of {', '.join(IMPLS)}")
    return "ref"


def wide(x):
    """x in fp32, or wider where it is wider already: statistics and losses are never summed in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

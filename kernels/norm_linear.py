"""RMSNorm, then a linear map: the way into attention and into the feed-forward.

    y = rms_norm(x, norm_weight) @ weight.T

One op so that an implementation may save x and its statistics alone, and normalise again in backward.
"""

import torch
import torch.nn.functional as F

from kernels.common import choose
from kernels.rms_norm import rms_norm_ref


def norm_linear_ref(x, norm_weight, weight, eps):
    return F.linear(rms_norm_ref(x, norm_weight, eps), weight)


def norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5, impl: str = "auto"
) -> torch.Tensor:
    """x: (T, D). norm_weight: (D,). weight: (N, D). Returns (T, N) in x's dtype.

    Raises ValueError when the shapes do not fit.
    """
    if norm_weight.shape != x.shape[-1:] or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"norm_linear: x ends in {x.shape[-1]}, norm_weight is {tuple(norm_weight.shape)}, "
            f"weight is {tuple(weight.shape)}; all must end in the same D"
        )
    choose("norm_linear", impl)
    return norm_linear_ref(x, norm_weight, weight, eps)

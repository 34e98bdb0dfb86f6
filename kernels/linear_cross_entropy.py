"""The head and its loss.

    loss = sum_t weight_t * (logsumexp(x_t W^T) - x_t W_target^T)        in fp32

Rows are those that carry loss; the caller leaves the others out. The sum is divided by the caller, who alone knows how
many tokens the global batch holds.
"""

import torch
import torch.nn.functional as F

from kernels.common import choose, wide


def linear_cross_entropy_ref(x, weight, targets, weights=None):
    logits = wide(F.linear(x, weight))
    if weights is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Summed cross entropy of the logits x @ weight.T.

    x: (L, D). weight: (V, D). targets: (L,) int64 in [0, V). weights: (L,) fp32, or None for ones.
    Returns a scalar in fp32 (fp64 for fp64 inputs); 0 for L = 0. Raises ValueError when the shapes do not fit.
    """
    if x.shape[-1] != weight.shape[-1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}; "
            f"wanted (L, D), (V, D), (L,)"
        )
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"linear_cross_entropy: weights {tuple(weights.shape)}, targets {tuple(targets.shape)}")
    choose("linear_cross_entropy", impl)
    return linear_cross_entropy_ref(x, weight, targets, weights)

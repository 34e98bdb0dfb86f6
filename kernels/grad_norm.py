"""The global L2 norm of the gradients.

norm = sqrt(sum over tensors of sum(g^2))          in fp32; NaN and Inf propagate
"""

from collections.abc import Sequence

import torch

from kernels.common import choose


def grad_norm_ref(grads):
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]))


@torch.no_grad()
def grad_norm(grads: Sequence[torch.Tensor], impl: str = "auto") -> torch.Tensor:
    """grads: tensors of any shapes on one device. Returns a scalar fp32 tensor there, without waiting for it.

    Raises ValueError when there is none.
    """
    if not grads:
        raise ValueError("grad_norm: no gradients given")
    choose("grad_norm", impl)
    return grad_norm_ref(grads)

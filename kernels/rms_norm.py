"""RMSNorm.

    y = x * rsqrt(mean(x^2) + eps) * weight            statistics in fp32

Source: arXiv:1910.07467; cast order as meta-llama/llama llama/model.py RMSNorm.
"""

import torch

from kernels.common import choose, wide


def rms_norm_ref(x, weight, eps):
    rstd = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
    return (wide(x) * rstd).type_as(x) * weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5, impl: str = "auto") -> torch.Tensor:
    """Normalises the last axis of x by its root mean square and scales it.

    x: (..., D). weight: (D,), same dtype and device. Returns the shape and dtype of x.
    Raises ValueError when the shapes or dtypes do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)}, x ends in {x.shape[-1]}")
    if weight.dtype != x.dtype:
        raise ValueError(f"rms_norm: weight is {weight.dtype}, x is {x.dtype}")
    choose("rms_norm", impl)
    return rms_norm_ref(x, weight, eps)

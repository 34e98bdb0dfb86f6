"""SwiGLU, and SwiGLU followed by the projection back to the residual stream.

    swiglu(gate_up) = silu(gate) * up                  gate_up = [gate, up] side by side; sigmoid in fp32
    swiglu_linear   = swiglu(gate_up) @ weight.T + residual

The second is one op so that an implementation may save gate_up alone and recompute the product in backward.
Source: arXiv:2002.05202.
"""

import torch
import torch.nn.functional as F

from kernels.common import choose, wide


def swiglu_ref(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(wide(gate)).type_as(up) * up


def swiglu_linear_ref(gate_up, weight, residual):
    return residual + F.linear(swiglu_ref(gate_up), weight)


def swiglu(gate_up: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """gate_up: (T, 2F). Returns (T, F). Raises ValueError when the last axis is odd."""
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate_up ends in {gate_up.shape[-1]}, wanted an even number: gate and up side by side"
        )
    choose("swiglu", impl)
    return swiglu_ref(gate_up)


def swiglu_linear(
    gate_up: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """gate_up: (T, 2F). weight: (D, F). residual: (T, D). Returns (T, D). Raises ValueError when they do not fit."""
    if gate_up.shape[-1] != 2 * weight.shape[1] or residual.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"swiglu_linear: gate_up {tuple(gate_up.shape)}, weight {tuple(weight.shape)}, residual "
            f"{tuple(residual.shape)}; wanted (T, 2F), (D, F), (T, D)"
        )
    choose("swiglu_linear", impl)
    return swiglu_linear_ref(gate_up, weight, residual)

"""Use kernels in a module of your own: python examples/own_module.py

On a GPU they run as Triton kernels, on a CPU as C++ where it is built, else as plain torch: impl="auto" chooses.
"""

import torch
from torch import nn

import kernels


class FeedForward(nn.Module):
    """x + W2 (silu(gate) * up) with [gate, up] = W13 RMSNorm(x): two kernels around two GEMMs."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.w13 = nn.Parameter(torch.randn(2 * hidden, dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(dim, hidden) * hidden**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (T, dim) of x (T, dim)."""
        normed, residual = kernels.rms_norm(x, self.norm, 1e-5, "auto", torch.zeros_like(x))
        return residual + kernels.swiglu_linear(normed @ self.w13.T, self.w2)


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
module = FeedForward(64, 128).to(device)
out = module(torch.randn(10, 64, device=device))
out.square().mean().backward()
print(tuple(out.shape), "gradient of W13:", f"{module.w13.grad.norm():.3f}")

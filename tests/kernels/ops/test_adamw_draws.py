"""m and v of stochastic rounding draw bits of their own."""

import math

import pytest
import torch

import kernels
from kernels.native.cpu import find_cpu
from kernels.ops.adamw import AdamWState


@pytest.mark.parametrize("impl", ["ref", "native"])
def test_m_and_v_do_not_round_together(impl):
    """Both are half-way between two bf16 numbers here, and each goes up half of the time."""
    if impl == "native" and find_cpu() is None:
        pytest.skip("the CPU library is compiled by g++, which is missing")
    n, half = 1 << 14, 2.0**-8
    p, m, v = (torch.full((n,), value).bfloat16() for value in (1.0, 1.0, 1.0))
    state = AdamWState(m, v, None, None, None, None)
    g = torch.full((n,), 1 + 2 * half).bfloat16()  # m becomes (1 + g) / 2 and v (3 + g^2) / 4, both 1 + half
    kernels.adamw(p, g, state, lr=0.0, beta1=0.5, beta2=0.75, eps=1e-8, weight_decay=0.0, step=1, seed=3, impl=impl)
    ups = torch.stack([(x > 1).double() for x in (m, v)])
    assert 0.4 < ups[0].mean() < 0.6 and 0.4 < ups[1].mean() < 0.6
    assert torch.corrcoef(ups)[0, 1].abs() < 5 / math.sqrt(n)

"""m and v of stochastic rounding draw bits of their own."""

import math

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels.native.cpu import find_cpu
from kernels.ops.adamw import AdamWState, random_bits
from kernels.ops.adamw_kernels import _random
from tests.helpers.kernels import needs_kernels


@triton.jit(do_not_specialize=["key", "group0"])
def draws_kernel(out_ptr, key, group0, GROUPS: tl.constexpr, STREAM: tl.constexpr):
    group = group0 + tl.arange(0, GROUPS).to(tl.int64)
    tl.store(out_ptr + tl.arange(0, 8 * GROUPS), _random(key, group, STREAM))


@needs_kernels
@pytest.mark.parametrize(
    ("seed", "step", "first", "stream"), [(0, 1, 0, 0), (7, 2, 8, 1), (2**32 - 1, 2**31 - 1, 2**35 - 64, 2)]
)
def test_the_kernels_draws_are_the_references_to_the_last_bit(seed, step, first, stream, device):
    """Also where the number of a group of eight passes 32 bits."""
    out = torch.empty(512, dtype=torch.int32, device=device)
    draws_kernel[(1,)](out, step << 32 | seed, first // 8, GROUPS=64, STREAM=stream)
    want = random_bits(seed, step, first, 512, stream)
    assert out.cpu().equal(want) and (want & 1).any() and want.min() >= 0 and want.max() < 65536


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

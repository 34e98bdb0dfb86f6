"""NF4 in C++ has the bits of the reference. test_training.py runs this file in every instruction set."""

import pytest
import torch

import kernels
from kernels.native.cpu import find_cpu
from kernels.ops import common

pytestmark = pytest.mark.skipif(find_cpu() is None, reason="csrc/cpu is not built here")
SIZES = [1, 2, 63, 64, 65, 130, 577, 64 * 300, 64 * 1102 + 33]  # the last in parts that threads do not share evenly


@pytest.fixture(autouse=True)
def outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)


def equal_bits(a, b):
    return torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_bits_of_the_reference(n, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = (torch.randn(n) * torch.rand(n) ** 4 * 0.1).to(dtype)
        weight[n // 2 : n // 2 + 80] = 0
        ours, reference = (kernels.quantise_nf4(weight, impl=impl) for impl in ("native", "ref"))
        assert all(map(equal_bits, ours.tensors, reference.tensors))
        for to in (torch.float32, torch.bfloat16):
            values = [kernels.dequantise_nf4(ours, to, impl=impl) for impl in ("native", "ref")]
            assert equal_bits(*values), to
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [64, 64 * 3 + 1])
def test_zeros_have_the_bits_of_the_reference(n):
    """Their maximum is 0 in whole blocks, and the least number that is inverted in a part of one."""
    ours, reference = (kernels.quantise_nf4(torch.zeros(n), impl=impl) for impl in ("native", "ref"))
    assert all(map(equal_bits, ours.tensors, reference.tensors))


def test_all_neighbours_of_the_middles():
    """Ratios around each middle between two entries, and maxima that are not exact powers."""
    table = torch.tensor(kernels.ops.nf4.TABLE)
    middles = (table[1:] + table[:-1]) / 2
    near = torch.cat([middles.nextafter(torch.tensor(to)) for to in (-2.0, 2.0)] + [middles, table])
    weight = torch.stack([torch.cat([torch.ones(1), near, torch.zeros(2)]) * s for s in torch.rand(200) + 0.5])
    ours, reference = (kernels.quantise_nf4(weight, impl=impl) for impl in ("native", "ref"))
    assert weight.shape[1] == 64 and equal_bits(ours.codes, reference.codes)


APART = {
    "every other": lambda x: x[::2], "a column": lambda x: x.view(128, 4)[:, 1],
    "one number": lambda x: x[1].expand(130), "turned": lambda x: x.view(8, 64).T,
    "some columns": lambda x: x.view(64, 8)[:, :3],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", APART)
def test_numbers_may_lie_apart(place, dtype):
    weight = APART[place](torch.randn(512).to(dtype))
    assert not weight.is_contiguous()
    apart, together = kernels.quantise_nf4(weight, "native"), kernels.quantise_nf4(weight.contiguous(), "ref")
    assert all(map(equal_bits, apart.tensors, together.tensors)) and apart.shape == together.shape


def test_it_runs_when_nothing_is_asked(monkeypatch):
    called = []
    for name in ("quantise", "dequantise"):
        real = getattr(kernels.native.nf4, name)
        monkeypatch.setattr(kernels.native.nf4, name, lambda *a, real=real, name=name: (called.append(name), real(*a)))
    kernels.dequantise_nf4(kernels.quantise_nf4(torch.randn(3, 64)))
    assert called == ["quantise", "dequantise"]


def test_nothing_is_written_past_the_end():
    q = kernels.quantise_nf4(torch.randn(65), impl="native")
    memory = torch.full((70,), torch.nan)
    kernels.dequantise_nf4(q, torch.float32, memory[:65], "native")
    assert memory[:65].isfinite().all() and memory[65:].isnan().all()

"""PTX that nvcc makes of CUDA C++ runs on the PTX machine. Where there is no nvcc, a kernel that it made once does."""

import shutil
import subprocess

import pytest
import torch

from kernels.compiled.ptx import Module
from tests.helpers.hand_ptx import find_kinds
from tests.helpers.run import ROOT

SOURCE = ROOT / "tests" / "helpers" / "cuda_kernels.cu"
KEPT = ROOT / "tests" / "helpers" / "reduce.ptx"  # nvcc -ptx -arch=sm_80 of the kernel reduce


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def module(request, tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    path = tmp_path_factory.mktemp("cuda") / "kernels.ptx"
    subprocess.run(["nvcc", "-ptx", f"-arch={request.param}", "-o", path, SOURCE], check=True)
    return Module(path.read_text())


def check_reduce(module):
    x, out, negative = torch.randn(5, 1003), torch.empty(5), torch.zeros(1, dtype=torch.int32)
    i = torch.arange(1003)
    want = (x.double() * torch.where(x < 0, 2, torch.where(i % 3 == 0, 1, i % 5))).sum(1)
    for num_warps in (1, 4, 32):
        negative.zero_()
        result = module.launch("reduce", 5, (x, out, 1003, negative), num_warps=num_warps)
        assert not result.findings and (out - want).abs().max() < 1e-3
        assert negative.item() == (x < 0).sum()


def test_a_kernel_that_nvcc_made_once():
    check_reduce(Module(KEPT.read_text()))


def test_a_reduction(module):
    check_reduce(module)


@pytest.mark.parametrize("kernel", ["half_a_block", "half_a_warp"])
def test_a_barrier_that_a_part_reaches(module, kernel):
    assert find_kinds(module.launch(kernel, 1, (torch.zeros(128),))) == {"barrier"}


def test_mathematics(module):
    x = torch.cat((torch.randn(300), torch.tensor([0.0, -0.0, 50.0, -80.0])))
    out = torch.empty(len(x), 16)
    assert not module.launch("mathematics", 3, (x, out, len(x))).findings
    v, a = x.double(), (x.abs() + 0.5).double()
    want = [v.exp(), a.log(), (x * 100).double().sin(), v.cos(), v.tanh(), a.sqrt(), a.rsqrt(), 1 / a]
    want += [a**1.5, v.erf(), v.floor(), (x * 7).double().round(), x.fmod(0.3).double(), v.exp2(), a.log1p(), v / a]
    want = torch.stack(want, 1)
    assert ((out - want).abs() / want.abs().clamp(min=1e-3)).nan_to_num(0).max() < 1e-6
    assert (out.isfinite() == want.float().isfinite()).all()


def test_formats(module):
    x = torch.randn(200) * 30
    b, h = torch.empty(200, 2, dtype=torch.bfloat16), torch.empty(200, dtype=torch.float16)
    e, d, q = (torch.empty(200, dtype=t) for t in (torch.float8_e4m3fn, torch.float64, torch.int64))
    assert not module.launch("formats", 2, (x, b, h, e, d, q, 200)).findings
    assert b.equal(torch.stack((x, x + 1), 1).bfloat16() ** 2) and h.equal(x.half() * 3)
    assert e.view(torch.uint8).equal(x.to(torch.float8_e4m3fn).view(torch.uint8))
    wide = x.double()
    assert torch.allclose(d, wide.abs().sqrt() / 3 + wide.exp(), rtol=1e-14)
    assert q.tolist() == [count(value, i) for i, value in enumerate((x * 1000).tolist())]


def count(value, i):
    """Compute what the kernel `formats` makes of an integer: C++ divides toward zero."""
    n, unsigned = int(value), int(value) % 2**64
    quotient, rest = abs(n) // (i % 7 + 1), abs(n) % 13
    sign = -1 if n < 0 else 1
    return sign * (quotient + rest) + unsigned.bit_count() + 64 - unsigned.bit_length()


def test_votes(module):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (96,), dtype=torch.int32, generator=g)
    y = torch.empty(96, 4, dtype=torch.int32)
    assert not module.launch("votes", 1, (x, y), num_warps=3).findings
    for t, v in enumerate(x.tolist()):
        warp = x[t // 32 * 32 :][:32].tolist()
        ballot = sum((other & 1) << lane for lane, other in enumerate(warp))
        same = sum((other & 3) == (v & 3) for other in warp)
        want = [(x > 0).sum().item(), 1, ballot, same * 1000 + sum(warp)]
        assert [n % 2**32 for n in y[t].tolist()] == [n % 2**32 for n in want]

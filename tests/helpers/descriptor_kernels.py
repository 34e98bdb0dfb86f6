"""Products of matrices by tensor descriptors, run on the PTX machine as compiled for sm_90. Prints what they showed.

python -m tests.helpers.descriptor_kernels       not under TRITON_INTERPRET=1; tests/kernels/compiled/test_simulation.py
"""

import json
import warnings
from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.compiled.simulation import on_machine


@triton.jit
def _multiply(x, w, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALISE: tl.constexpr = False):
    i, j = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=3, warp_specialize=SPECIALISE):
        sums = tl.dot(x.load([i, k]), w.load([j, k]).T, sums)
    y.store([i, j], sums.to(tl.bfloat16))


@triton.jit
def by_device(x_ptr, w_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BN, BK])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BM, BN])
    _multiply(x, w, y, K, BM, BN, BK)


@triton.jit
def by_host(x, w, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALISE: tl.constexpr):
    _multiply(x, w, y, K, BM, BN, BK, SPECIALISE)


@triton.jit
def add_into(x, y, BM: tl.constexpr, BN: tl.constexpr):
    at = [tl.program_id(0) * BM, tl.program_id(1) * BN]
    y.atomic_add(at, x.load(at))


def make_operands():
    """Return x (100, 200) and w (136, 200): no axis is a multiple of a tile."""
    torch.manual_seed(0)
    return torch.randn(100, 200).bfloat16(), torch.randn(136, 200).bfloat16()


def run_product(edit=None, late=False, tiles=(64, 64, 64), specialise=False):
    """Return x @ w.T by descriptors that the host makes, and the launch's results.

    specialise: some warps load, others multiply.
    """
    x, w = make_operands()
    y = torch.zeros(len(x), len(w), dtype=torch.bfloat16)
    bm, bn, bk = tiles
    descriptors = [TensorDescriptor.from_tensor(t, block) for t, block in ((x, [bm, bk]), (w, [bn, bk]), (y, [bm, bn]))]
    with on_machine("sm_90", edit, late=late) as results:
        grid = triton.cdiv(len(x), bm), triton.cdiv(len(w), bn)
        by_host[grid](*descriptors, x.shape[1], BM=bm, BN=bn, BK=bk, SPECIALISE=specialise)
    return y, results


def run_product_by_device(late):
    """Return x @ w.T by descriptors that the kernel makes, and the launch's results."""
    x, w = make_operands()
    y = torch.zeros(len(x), len(w), dtype=torch.bfloat16)
    with on_machine("sm_90", late=late) as results:
        by_device[2, 3](x, w, y, len(x), len(w), x.shape[1], BM=64, BN=64, BK=64)
    return y, results


def run_sum(late):
    """Return what two launches that add x to nothing made, and their results."""
    x, y = make_operands()[0].float(), torch.zeros(100, 200)
    with on_machine("sm_90", late=late) as results:
        for _ in range(2):
            add_into[4, 4](*(TensorDescriptor.from_tensor(t, [32, 64]) for t in (x, y)), BM=32, BN=64)
    return y, results


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    left, right = (t.double() for t in make_operands())
    cases = {
        "by host": (run_product, left @ right.T),
        "by host, small tiles": (partial(run_product, tiles=(64, 32, 32)), left @ right.T),
        "by host, specialised warps": (partial(run_product, specialise=True), left @ right.T),
        "by device": (run_product_by_device, left @ right.T),
        "sum": (run_sum, 2 * left),
    }
    for name, (run, want) in cases.items():
        for is_late in (False, True):
            got, launches = run(late=is_late)
            case = {
                "case": name,
                "late": is_late,
                "error": ((got - want).abs() / want.abs().clamp(min=1)).max().item(),
                "findings": [str(finding) for launch in launches for finding in launch.findings],
                "bulk copies": launches[0].ptx.count("async.bulk.tensor"),
                "setmaxnreg": launches[0].ptx.count("setmaxnreg"),
                "wgmma": launches[0].ptx.count("wgmma.mma_async"),
            }
            print(json.dumps(case), flush=True)

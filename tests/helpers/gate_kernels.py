"""Kernels that the static gate must refuse, and the same ones as it lets them pass. Prints what it says of each.

python -m tests.helpers.gate_kernels       not under TRITON_INTERPRET=1; tests/kernels/test_static.py runs it
"""

import json
import warnings

import triton
import triton.language as tl

from kernels.compiled.launch_cases import Case
from kernels.compiled.rules import run_gate


@triton.jit
def copy(x_ptr, y_ptr, scale_ptr, n, stride, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    few = tl.arange(0, BLOCK // 16)
    scale = tl.sum(tl.load(scale_ptr + few * 3))  # narrow, and allowed: a sixteenth of what the tile moves
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets * stride, mask=offsets < n) * scale, mask=offsets < n)


@triton.jit
def weighted_sum(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    kept = tl.load(x_ptr + cols).to(tl.float32)
    for i in range(n):
        total += tl.load(x_ptr + i * BLOCK + cols).to(tl.float32) * kept
    tl.store(y_ptr + cols, total)


@triton.jit
def matmul(
    a_ptr,
    b_ptr,
    c_ptr,
    inner,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CAST: tl.constexpr,
    FAIL: tl.constexpr,
):
    tl.static_assert(not FAIL, "asked to fail")
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    c = tl.zeros([M, N], tl.float32)
    for first in range(0, inner, K):
        a = tl.load(a_ptr + m[:, None] * inner + first + k[None, :])
        b = tl.load(b_ptr + n[:, None] * inner + first + k[None, :])
        if CAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        c += tl.dot(a, b.T, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


def copying(offset=0, stride=1):
    def build(make):
        x, y, scale = make(1 << 20), make(1 << 20), make(4096)
        return lambda: copy[1,](x[offset:], y, scale, x.numel() - 16, stride, BLOCK=2048, num_warps=4)

    return build


def summing(**options):
    def build(make):
        return lambda: weighted_sum[1,](make(1 << 20), make(8192), 7, BLOCK=8192, num_warps=4, **options)

    return build


def multiplying(m, n, k, num_stages, cast=False, fail=False, num_warps=4):
    def build(make):
        a, b, c = make(m, 4096), make(n, 4096), make(m, n)
        options = dict(M=m, N=n, K=k, CAST=cast, FAIL=fail, num_warps=num_warps, num_stages=num_stages)
        return lambda: matmul[1,](a, b, c, 4096, **options)

    return build


CASES = {
    "copy": copying(),
    "copy, unaligned pointer": copying(offset=1),
    "copy, every other element": copying(stride=2),
    "sum": summing(),
    "sum, few registers": summing(maxnreg=64),
    "matmul": multiplying(128, 128, 64, 2),
    "matmul in fp32": multiplying(64, 64, 32, 2, cast=True, num_warps=8),
    "matmul, 16 rows": multiplying(16, 128, 64, 2),
    "matmul, many stages": multiplying(128, 128, 128, 6),
    "matmul, refused": multiplying(128, 128, 64, 2, fail=True),
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    built = [Case("gate", label, lambda make, build=build: (build(make),)) for label, build in CASES.items()]
    records, violations, *_ = run_gate(built)
    print(json.dumps({"records": records, "violations": [v._asdict() for v in violations]}))

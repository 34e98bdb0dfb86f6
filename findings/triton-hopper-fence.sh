#!/usr/bin/env bash
# Triton 3.6.0, which torch 2.11 installs, compiles a pipelined matrix product for Hopper (sm_90) without a proxy fence.
#
# With num_stages over 1, cp.async fills the tiles in shared memory, and wgmma reads them. wgmma reads shared memory
# through the asynchronous proxy; cp.async (not bulk) writes through the generic one. PTX asks for fence.proxy.async
# between the two (PTX ISA, "Async proxy" and "wgmma.mma_async": accesses across proxies need a cross-proxy fence).
# Triton 3.6.0 waits for the copies, synchronises the block and multiplies; 3.9.0 puts the fence in between. Whether a
# product ever reads old bytes is up to the hardware; nothing in the PTX forbids it. No GPU is needed to see it: the
# kernel is compiled ahead of time and its PTX is read.
#
# What follows: kernels/ops/async_proxy.py adds the fence where Triton leaves it out, the static gate
# (kernels/compiled/async_order.py) refuses a launch without it, and python -m kernels.simulate looks for reads without.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > product.py <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a_ptr, b_ptr, c_ptr, n, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * n + start + cols[None, :])
        b = tl.load(b_ptr + (start + rows)[:, None] * BLOCK + cols[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * BLOCK + cols[None, :], total)


signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
source = ASTSource(product, signature, {(4,): 64}, aligned)
options = {"num_warps": 4, "num_stages": 3}
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
wanted = r"cp\.async\.cg|cp\.async\.wait_group|bar\.sync|fence\.proxy\.async|wgmma\.mma_async"
found = re.findall(wanted, ptx[: ptx.index("wgmma.mma_async") + 20])
shown = [name for i, name in enumerate(found) if i == 0 or found[i - 1] != name]
print("triton", triton.__version__, "sm_90, up to the first product:", " ".join(shown))
between = found[len(found) - 1 - found[::-1].index("cp.async.wait_group") :]
print("fenced" if "fence.proxy.async" in between else "not fenced")
PYTHON
for version in 3.6.0 3.9.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version" setuptools
  HOME="$work" "env-$version/bin/python" -W ignore product.py | tee "said-$version"
done
grep -qx "not fenced" said-3.6.0 && grep -qx "fenced" said-3.9.0 || { echo "not as stated"; exit 1; }

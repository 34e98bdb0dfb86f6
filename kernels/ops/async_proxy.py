"""The two orders around a matrix unit's reads, for versions of Triton that leave them out.

From sm_90 on, the matrix unit reads shared memory by a path of its own, the async proxy, and registers while the
program goes on. PTX wants a fence.proxy.async between a write of shared memory and such a read, and a wgmma.fence
between a write of a register and its read. On sm_90, Triton 3.6 leaves out the first after cp.async, and in 3.6 and 3.7
LLVM moves the conversion of a left operand below the second. The functions here add both: one instruction a block of
keys. Triton's pipeliner does not take them on sm_100, where the first order is missing up to 3.8: so it is refused.
kernels.compiled.async_order finds what lacks either order in every launch that ships.
Source: PTX ISA, "Async proxy" and "wgmma.fence".
"""

import re

import torch
import triton
import triton.language as tl

from kernels.ops.common import chip

TRITON = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))  # (3, 9)
COMPLETE = {"sm_90": (3, 8), "sm_100": (3, 9)}  # the first Triton that keeps both orders itself


def is_refused(chip: str) -> bool:
    """Return whether a kernel with tl.dot of 16-bit operands must not run on this chip under this Triton."""
    return chip == "sm_100" and COMPLETE[chip] > TRITON


def adds_orders(op: str, device: torch.device) -> bool:
    """Return whether the op's kernels must call fence_shared() and settle(), which they do for 16-bit operands.

    Raises RuntimeError if they could not run correctly on this GPU.
    """
    name = chip(device)
    if device.type == "cuda" and is_refused(name):
        raise RuntimeError(
            f"{op}: Triton {triton.__version__} leaves out fences that the matrix unit of {name} needs; wanted Triton "
            f"{'.'.join(map(str, COMPLETE[name]))} or newer, or fp32, or impl='ref'"
        )
    return name == "sm_90" and COMPLETE[name] > TRITON


# Neither is pure, so that the compiler keeps each in its place.


@triton.jit
def fence_shared():
    """Make shared memory visible to the matrix unit. Belongs between the loads of a loop's tiles and its tl.dots."""
    text: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, $1;"  # an operand and a result are asked for
    tl.inline_asm_elementwise(text, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def settle(x):
    """Return x, of 16-bit numbers, in registers that are written above the next wgmma.fence."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)

"""The global L2 norm of the gradients, in one pass over them.

    norm = sqrt(sum over tensors of sum(g^2))

Squares and sums are fp32. Each program sums one stretch of one tensor into its own place, and one last program adds
these partial sums in order. No atomics are used, so equal gradients give equal bits. NaN and Inf propagate. A magnitude
over 1.8e19, whose square exceeds fp32, counts as Inf: the training loop skips such a step.

Bound by memory: each gradient is read once, 2 bytes an element in bf16, and 4 bytes are written a stretch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.ops.common import DTYPES, choose_impl, chunk_size, launch_config, operator

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


CHUNK = 1 << 18  # elements: their squares are a megabyte, which a cache holds


def grad_norm_ref(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the global L2 norm, a scalar in fp32, computed in plain torch."""
    # torch's vector_norm on a CPU adds squares one by one and is off by 6e-5 over 3M elements. Its sum is exact enough.
    chunks = (chunk for g in grads for chunk in g.reshape(-1).split(chunk_size(CHUNK, g.device)))
    return torch.stack([chunk.float().square().sum() for chunk in chunks]).double().sum().sqrt().float()


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first"])
def _partial_kernel(g_ptr, partial_ptr, first, n, TILES: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)  # int64: elements of a tensor pass 2^31
    at = program * (TILES * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(TILES):
        g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
        at += BLOCK
    tl.store(partial_ptr + first + program, tl.sum(total, axis=0))


@triton.jit
def _total_kernel(partial_ptr, norm_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(0, n, BLOCK):
        total += tl.load(partial_ptr + at, mask=at < n, other=0.0)
        at += BLOCK
    tl.store(norm_ptr, tl.sqrt_rn(tl.sum(total, axis=0)))


# ---- launch: shapes, allocation, grid; torch.ops.cria.* -------------------------------------------------------------


def _norm_fake(grads):
    return grads[0].new_empty((), dtype=torch.float32)


@operator("grad_norm", cpu=grad_norm_ref, fake=_norm_fake)
def norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm, a scalar in fp32, of at least one contiguous tensor."""
    device, total = grads[0].device, _norm_fake(grads)
    config, last = launch_config("grad_norm", "partial", device), launch_config("grad_norm", "total", device)
    programs = [triton.cdiv(g.numel(), config["TILES"] * config["BLOCK"]) for g in grads]
    partial = total.new_zeros(triton.cdiv(sum(programs), 16) * 16)  # Triton sees that this length allows 128-bit loads
    first = 0
    for g, n_programs in zip(grads, programs, strict=True):
        if n_programs:
            _partial_kernel[(n_programs,)](g, partial, first, g.numel(), **config)
        first += n_programs
    _total_kernel[(1,)](partial, total, len(partial), **last)
    return total


# ---- public ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def grad_norm(grads: Sequence[torch.Tensor], impl: str = "auto") -> torch.Tensor:
    """Return the global L2 norm of tensors of any shapes on one device: a scalar in fp32 on it, without waiting for it.

    Raises ValueError if the list is empty, or its tensors lie on several devices.
    """
    if not grads:
        raise ValueError("grad_norm: no gradients given")
    if others := {g.device for g in grads} - {grads[0].device}:
        raise ValueError(f"grad_norm: gradients on {grads[0].device} and {others.pop()}, wanted one device")
    impl = "ref" if impl == "auto" and any(g.dtype not in DTYPES for g in grads) else impl
    if choose_impl("grad_norm", impl, grads[0]) == "ref":
        return grad_norm_ref(grads)
    return norm([g.contiguous() for g in grads])

"""The global L2 norm of the gradients, in one pass over them.

    norm = sqrt(sum over tensors of sum(g^2))

Squares and sums are fp32. Each program sums one chunk of one tensor into its own place, and one last program adds these
partial sums in order. No atomics are used, so equal gradients give equal bits. NaN and Inf propagate. A magnitude
over 1.8e19, whose square exceeds fp32, counts as Inf: the training loop skips such a step. Gradients that are never all
there at one time have the same norm, bit for bit: sum_squares() of each, then norm_of_sums().

Bound by memory: each gradient is read once, 2 bytes an element in bf16, and 4 bytes are written a chunk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.ops import grad_norm_cuda
from kernels.ops.common import DTYPES, choose_impl, chunk_size, launch_config, operator
from kernels.ops.tensor_table import count_chunks, find_tensor, is_aligned, make_table, measure_distances, move_pointer

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


CHUNK = 1 << 18  # elements: their squares are a megabyte, which a cache holds


def grad_norm_ref(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the global L2 norm, a scalar in fp32, computed in plain torch."""
    return norm_of_sums_ref(torch.cat([sum_squares_ref(g, chunk_size(CHUNK, g.device)) for g in grads]))


def sum_squares_ref(g: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the sum of squares of each `chunk` elements of a tensor, fp32 (chunks,)."""
    # torch's vector_norm on a CPU adds squares one by one and is off by 6e-5 over 3M elements. Its sum is exact enough.
    return torch.stack([part.float().square().sum() for part in g.reshape(-1).split(chunk)])


def norm_of_sums_ref(sums: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of numbers, a scalar in fp32."""
    return sums.double().sum().sqrt().float()


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _partial_kernel(
    g_ptr, table_ptr, partial_ptr, N: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the squares of one chunk of one of many tensors. The table's rows: see _launch_partial."""
    chunk = tl.program_id(0).to(tl.int64)  # int64: elements of a tensor pass 2^31
    row_ptr = table_ptr + find_tensor(table_ptr, chunk, N)
    chunk -= tl.load(row_ptr)
    n = tl.load(row_ptr + N) * (16 if ALIGNED else 1)
    g_ptr = move_pointer(g_ptr, row_ptr + 2 * N, ALIGNED)
    at = chunk * (TILES * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(TILES):
        g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
        at += BLOCK
    tl.store(partial_ptr + tl.load(row_ptr + 3 * N) + chunk, tl.sum(total, axis=0))


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
    """Return the norm, a scalar in fp32, of at least one contiguous tensor. Tensors of one dtype share a launch."""
    config = launch_config("grad_norm", "partial", grads[0].device)
    *places, n_partials = count_chunks([g.numel() for g in grads], config["TILES"] * config["BLOCK"])
    partial = _norm_fake(grads).new_zeros(_round_up_length(n_partials))
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, g in enumerate(grads):
        if g.numel():
            kinds.setdefault((g.dtype, is_aligned([g])), []).append(i)
    for (_, aligned), members in kinds.items():
        _launch_partial([grads[i] for i in members], [places[i] for i in members], partial, aligned, config)
    return _launch_total(partial)


def _chunk(device):
    config = launch_config("grad_norm", "partial", device)
    return config["TILES"] * config["BLOCK"]


@operator(
    "grad_norm_sums", cpu=lambda g: sum_squares_ref(g, _chunk(g.device)),
    fake=lambda g: g.new_empty(count_chunks([g.numel()], _chunk(g.device))[-1], dtype=torch.float32),
)  # fmt: skip
def sums(g: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each chunk of a contiguous tensor that is not empty, fp32 (chunks,)."""
    n_chunks = count_chunks([g.numel()], _chunk(g.device))[-1]
    partial = g.new_empty(n_chunks, dtype=torch.float32)
    _launch_partial([g], [0], partial, is_aligned([g]), launch_config("grad_norm", "partial", g.device))
    return partial


@operator("grad_norm_of_sums", cpu=norm_of_sums_ref, fake=lambda sums: sums.new_empty(()))
def of_sums(sums: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of fp32 numbers (n,), a scalar."""
    return _launch_total(F.pad(sums, (0, _round_up_length(len(sums)) - len(sums))))


def _round_up_length(n):
    """Return the least multiple of 16 that is not under n: a length at which Triton loads 128 bits at a time."""
    return triton.cdiv(n, 16) * 16


def _launch_total(partial):
    total = partial.new_empty(())
    _total_kernel[(1,)](partial, total, len(partial), **launch_config("grad_norm", "total", partial.device))
    return total


def _launch_partial(grads, places, partial, aligned, config):
    """Sum the squares of each chunk of tensors of one dtype into partial, from each tensor's place on."""
    sizes = [g.numel() for g in grads]
    *first_chunks, n_chunks = count_chunks(sizes, config["TILES"] * config["BLOCK"])
    rows = [first_chunks, [n // 16 if aligned else n for n in sizes], measure_distances(grads, aligned), places]
    table = make_table(rows, grads, partial.device)
    _partial_kernel[(n_chunks,)](grads[0], table, partial, N=table.shape[1], ALIGNED=aligned, **config)


# ---- public ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def grad_norm(grads: Sequence[torch.Tensor], impl: str = "auto") -> torch.Tensor:
    """Return the global L2 norm of tensors of any shapes on one device: a scalar in fp32 on it, without waiting for it.

    impl "cuda": one launch of csrc/cuda/grad_norm.cu, for fp32 and bf16.
    Raises ValueError if the list is empty, or its tensors lie on several devices.
    """
    if not grads:
        raise ValueError("grad_norm: no gradients given")
    if others := {g.device for g in grads} - {grads[0].device}:
        raise ValueError(f"grad_norm: gradients on {grads[0].device} and {others.pop()}, wanted one device")
    if impl == "cuda":
        return grad_norm_cuda.norm([g.contiguous() for g in grads])
    impl = "ref" if impl == "auto" and any(g.dtype not in DTYPES for g in grads) else impl
    if choose_impl("grad_norm", impl, grads[0]) == "ref":
        return grad_norm_ref(grads)
    return norm([g.contiguous() for g in grads])


@torch.no_grad()
def sum_squares(grad: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """Return the sums of squares of the chunks of a tensor of any shape, for norm_of_sums(): fp32 (chunks,)."""
    if choose_impl("grad_norm", impl, grad) == "ref" or not grad.numel():
        return sum_squares_ref(grad, chunk_size(CHUNK, grad.device))
    return sums(grad.contiguous())


@torch.no_grad()
def norm_of_sums(parts: Sequence[torch.Tensor], impl: str = "auto") -> torch.Tensor:
    """Return the global L2 norm of tensors of which sum_squares() made the parts, with grad_norm()'s bits.

    The parts are in the order in which grad_norm() would be given the tensors; none of them is empty.
    """
    joined = torch.cat(list(parts))
    return norm_of_sums_ref(joined) if choose_impl("grad_norm", impl, joined) == "ref" else of_sums(joined)

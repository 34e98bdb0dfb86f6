"""The norm of all gradients in one launch of csrc/cuda/grad_norm.cu."""

from collections.abc import Sequence
from functools import cache

import torch

from kernels.native import cuda

THREADS, CHUNK, MAX_BLOCKS = 256, 16384, 4096  # of csrc/cuda/grad_norm.cu


@cache
def _ticket(device: torch.device) -> torch.Tensor:
    """Return the counter of blocks that are done, 0 between launches."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of contiguous gradients, fp32 or bf16, a scalar in fp32."""
    device = grads[0].device
    rows: list[list[int]] = []
    n_chunks = 0
    for g in grads:
        if g.numel():
            flags = int(g.dtype == torch.float32) | int(g.data_ptr() % 16 == 0) << 32
            rows.append([g.data_ptr(), g.numel(), n_chunks, flags])
            n_chunks += -(-g.numel() // CHUNK)
    result = torch.zeros((), device=device)
    if not rows:
        return result
    table = torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    blocks = min(n_chunks, MAX_BLOCKS)
    sums = torch.empty(blocks, dtype=torch.float64, device=device)
    arguments = (table, len(rows), n_chunks, sums, _ticket(device), result)
    launch = cuda.CudaLaunch(
        "grad_norm.cu", "cria_grad_norm", "cria_grad_norm_kernel", arguments, (), (blocks,), THREADS, 0, grads
    )
    cuda.run(launch)
    return result

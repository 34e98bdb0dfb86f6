"""The inputs of NF4's cases: a random quantised matrix, as tensors that a case may copy, and what is run on them."""

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from kernels.ops import nf4


def make_quantised(shape: Sequence[int], device: str, dtype: torch.dtype) -> SimpleNamespace:
    """Return a quantised random matrix, and one in dtype for its numbers."""
    q = nf4.quantise_nf4(torch.randn(*shape, device=device).to(dtype) * 0.02)
    names = "codes", "absmax_codes", "absmax2", "offset"
    return SimpleNamespace(
        **dict(zip(names, q.tensors, strict=True)), out=torch.empty(*shape, device=device, dtype=dtype)
    )


def dequantise(inputs: SimpleNamespace, impl: str) -> torch.Tensor:
    """Return the matrix's numbers, in inputs.out."""
    q = nf4.NF4Matrix(inputs.codes, inputs.absmax_codes, inputs.absmax2, inputs.offset, tuple(inputs.out.shape))
    return nf4.dequantise_nf4(q, inputs.out.dtype, inputs.out, impl)


def as_bitsandbytes(functional: ModuleType, inputs: SimpleNamespace) -> tuple[torch.Tensor, Any]:
    """Return codes and state as bitsandbytes.functional.dequantize_4bit takes them."""
    device = inputs.codes.device
    second = functional.QuantState(
        inputs.absmax2, code=nf4.absmax_map(device), blocksize=nf4.BLOCK2, dtype=torch.float32
    )
    state = functional.QuantState(
        inputs.absmax_codes, shape=inputs.out.shape, code=nf4.table(device), blocksize=nf4.BLOCK, quant_type="nf4",
        dtype=inputs.out.dtype, offset=inputs.offset, state2=second,
    )  # fmt: skip
    return inputs.codes.view(-1, 1), state

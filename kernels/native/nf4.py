"""NF4 on CPU tensors in C++: what csrc/cpu/nf4.h declares, as functions of tensors."""

import ctypes

import torch

from kernels.native.arguments import NF4Dequantise, NF4Quantise
from kernels.native.cpu import load_cpu
from kernels.native.library import check


def quantise(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Write the codes and maxima of contiguous weight (n,) in fp32 or bf16. Raises NativeError if it is refused."""
    arguments = NF4Quantise(*_describe(weight), *(t.data_ptr() for t in (weight, codes, absmax)))
    check(load_cpu().cria_nf4_quantise(ctypes.byref(arguments)), "nf4_quantise")


def dequantise(
    out: torch.Tensor, codes: torch.Tensor, absmax_codes: torch.Tensor, absmax2: torch.Tensor, offset: torch.Tensor,
    absmax_map: torch.Tensor,
) -> None:  # fmt: skip
    """Write contiguous out (n,) in fp32 or bf16. absmax_map: (256,) fp32. Raises NativeError if it is refused."""
    tensors = out, codes, absmax_codes, absmax2, offset, absmax_map
    arguments = NF4Dequantise(*_describe(out), *(t.data_ptr() for t in tensors))
    check(load_cpu().cria_nf4_dequantise(ctypes.byref(arguments)), "nf4_dequantise")


def _describe(numbers: torch.Tensor) -> tuple[int, bool, int]:
    return numbers.numel(), numbers.dtype == torch.bfloat16, torch.get_num_threads()

"""The host functions of the CUDA library: what they refuse, with or without a GPU."""

import ctypes

import pytest
import torch

from kernels.native.cuda import CudaLaunch, load_cuda, run_on_gpu
from kernels.native.library import NativeError, check
from kernels.native.toolchain import MissingCompiler, find_nvcc

try:
    find_nvcc()
except MissingCompiler as missing:
    pytest.skip(f"nvcc builds the library: {missing}", allow_module_level=True)

NULL, ONE = ctypes.c_void_p(None), ctypes.c_int64(1)


def adamw(n_chunks=1, master=2, states=0):
    """Call cria_adamw without tensors."""
    floats = [ctypes.c_float(0)] * 5
    scales = [ctypes.c_float(0), NULL, ctypes.c_float(1), NULL, ctypes.c_float(0), NULL, NULL]
    numbers = [NULL, ONE, ctypes.c_int64(n_chunks), NULL, NULL, *scales, *floats, ONE]
    return load_cuda().cria_adamw(*numbers, ctypes.c_int(master), ctypes.c_int(states), NULL)


def decode(batch=1, heads=4, dtype=0, dim=64):
    """Call cria_decode_attention without tensors."""
    sizes = [ctypes.c_int64(n) for n in (batch, heads, 2, 0, 16, 0, 0, 1, 64)]
    strides = [ONE, NULL, NULL, ONE, ONE, ONE, NULL, NULL, ONE, ONE]
    numbers = [NULL, NULL, *strides, NULL, NULL, NULL, NULL, *sizes, ctypes.c_float(1), ctypes.c_int64(0)]
    return load_cuda().cria_decode_attention(*numbers, ctypes.c_int(dtype), ctypes.c_int(dim), NULL)


def hopper(n_items=1, heads=4, group=2, dtype=0, dim=64, blocks=1):
    """Call cria_hopper_attention without tensors."""
    sizes = [ctypes.c_int64(n) for n in (1, n_items, heads, group)]
    choices = [ctypes.c_int(n) for n in (dtype, dim, blocks)]
    numbers = [*[NULL] * 5, ONE, ONE, *[NULL] * 4, *sizes, ctypes.c_float(1), *choices, NULL]
    return load_cuda().cria_hopper_attention(*numbers)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (lambda: adamw(n_chunks=0), 1), (lambda: adamw(master=4), 3), (lambda: adamw(states=-1), 3),
        (lambda: decode(dtype=3), 3), (lambda: decode(dim=72), 3), (lambda: decode(batch=0), 1),
        (lambda: decode(heads=3), 1), (lambda: decode(heads=34), 1),
        (lambda: hopper(dtype=2), 3), (lambda: hopper(dim=80), 3), (lambda: hopper(n_items=0), 1),
        (lambda: hopper(group=3), 1), (lambda: hopper(n_items=2**30), 1), (lambda: hopper(blocks=0), 1),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_take_is_refused(code, wanted):
    assert code() == wanted
    with pytest.raises(NativeError, match=r"was given a (size|mode)"):
        check(code(), "a call")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_says_why():
    library = load_cuda()
    with pytest.raises(NativeError, match=r"adamw: CUDA says '.+' \(error \d+\)"):
        check(adamw(), "adamw", library.cria_cuda_error)
    with pytest.raises(NativeError, match="cria_grad_norm: tensors on cpu, wanted a CUDA device"):
        run_on_gpu(CudaLaunch("grad_norm.cu", "cria_grad_norm", "", (torch.zeros(1),)))

"""The CUDA library of csrc/cuda: its functions as ctypes declares them."""

import ctypes
from functools import cache

from kernels.native.library import load

ABI_VERSION = 1  # of csrc/cuda/api.cuh


@cache
def load_cuda() -> ctypes.CDLL:
    """Return the library with the types of its functions declared. Raises NativeError if it cannot be had.

    It loads without a GPU too; calls then return CUDA's error.
    """
    library = load("cuda", ABI_VERSION)
    library.cria_cuda_error.argtypes, library.cria_cuda_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library

"""Memory beside pages that nobody may touch. Imports no torch: the drivers that run under sanitizers use it.

Sanitizers do not see what is loaded or stored under a mask, nor tiles. A page that may not be touched ends the process
at any access.
"""

import ctypes
import importlib.util
import mmap
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
DRAW = np.random.default_rng(0)
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def load_arguments():
    """Return kernels/native/arguments.py as a module, without its package, which imports torch."""
    path = Path(__file__).parents[2] / "kernels" / "native" / "arguments.py"
    spec = importlib.util.spec_from_file_location("arguments", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fenced:
    """A copy of an array's bytes that ends at a page that nobody may touch, or begins behind one."""

    def __init__(self, values: np.ndarray, at_end: bool = True):
        values = np.ascontiguousarray(values)
        self.dtype, size = values.dtype, values.nbytes
        pages = max(1, -(-size // PAGE)) * PAGE
        self.memory = mmap.mmap(-1, pages + 2 * PAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE
        for fence in (begin - PAGE, begin + pages):
            assert mprotect(fence, PAGE, 0) == 0  # PROT_NONE
        self.address, self.size = begin + (pages - size if at_end else 0), size
        ctypes.memmove(self.address, values.ctypes.data, size)

    def read(self) -> np.ndarray:
        """Return what lies in the memory now, as numbers of the array's type."""
        return np.frombuffer((ctypes.c_char * self.size).from_address(self.address), self.dtype)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of fp32 numbers."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def to_fp32(values: np.ndarray) -> np.ndarray:
    """Return numbers of bf16, which are 16-bit words here, or of fp32 in fp32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values

"""Calls cria_weight_gradient of the library named by the first argument over a fuzz of sizes, strides and addresses.

Imports no torch: tests/helpers/native.py runs this file under sanitizers. They do not see loads under a mask, nor those
of tiles, so every array ends where a page begins that nobody may read. "overrun" as a second argument tells a token
more than there is.
"""

import ctypes
import importlib.util
import mmap
import sys
from pathlib import Path

import numpy as np

path = Path(__file__).parents[2] / "kernels" / "native" / "arguments.py"
spec = importlib.util.spec_from_file_location("arguments", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

DRAW = np.random.default_rng(0)
SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 100)
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Matrix:
    """Rows of small whole numbers, up to two numbers apart, in memory that ends with the last row's last number."""

    def __init__(self, rows: int, columns: int, is_fp32: bool = False):
        self.row, self.size = columns + int(DRAW.integers(0, 3)), 4 if is_fp32 else 2
        n = max(0, (rows - 1) * self.row + columns)
        pages = -(-self.size * n // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        end = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + pages
        assert mprotect(end, mmap.PAGESIZE, 0) == 0  # PROT_NONE
        self.address = end - self.size * n
        values = DRAW.integers(-3, 4, n).astype(np.float32)
        data = values if is_fp32 else (values.view(np.uint32) >> 16).astype(np.uint16)
        ctypes.memmove(self.address, data.ctypes.data, data.nbytes)
        strides = self.row * 4, 4
        self.values = np.lib.stride_tricks.as_strided(values, (rows, columns), strides).astype(np.float64)
        self.rows, self.columns = rows, columns

    def read(self):
        """Return what lies in the memory now."""
        n = (self.rows - 1) * self.row + self.columns
        bits = np.uint32 if self.size == 4 else np.uint16
        raw = np.frombuffer((ctypes.c_char * (self.size * n)).from_address(self.address), bits)
        wide = raw.view(np.float32) if self.size == 4 else (raw.astype(np.uint32) << 16).view(np.float32)
        return np.lib.stride_tricks.as_strided(wide, (self.rows, self.columns), (self.row * 4, 4))


def main(library, is_overrun):
    """Call the function, and compare what it writes: sums of small whole numbers are exact."""
    calls = 0
    for _ in range(60):
        tokens, rows, columns = (int(DRAW.choice(SIZES)) for _ in range(3))
        tokens += 250 * int(DRAW.integers(0, 2))
        tokens *= calls % 10 > 0  # a batch without tokens, whose gradient is 0
        is_fp32, is_added, threads = (int(DRAW.integers(0, 2)) for _ in range(3))
        dy, x, out = Matrix(tokens, rows), Matrix(tokens, columns), Matrix(rows, columns, bool(is_fp32))
        given = tokens + is_overrun, rows, columns, dy.row, x.row, out.row, is_fp32, is_added, 1 + threads
        arguments = module.WeightGradient(*given, dy.address, x.address, out.address)
        assert library.cria_weight_gradient(ctypes.byref(arguments)) == 0
        want = dy.values.T @ x.values + (out.values if is_added else 0)
        assert np.allclose(out.read(), want, rtol=0 if is_fp32 else 2**-8, atol=0), given
        calls += 1
    print(calls, "calls")


main(ctypes.CDLL(sys.argv[1]), sys.argv[2:] == ["overrun"])

"""Calls cria_weight_gradient of the library named by the first argument over a fuzz of sizes, strides and addresses.

Imports no torch: tests/helpers/native.py runs this file under sanitizers, and every array ends where a page begins that
nobody may touch. "overrun" as a second argument tells a token more than there is.
"""

import ctypes
import sys

import numpy as np
from fenced_memory import DRAW, Fenced, load_arguments, to_bf16, to_fp32

arguments = load_arguments()
SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 100)


class Matrix:
    """Rows of small whole numbers, up to two numbers apart, in memory that ends with the last row's last number."""

    def __init__(self, rows: int, columns: int, is_fp32: bool = False):
        self.shape, self.row = (rows, columns), columns + int(DRAW.integers(0, 3))
        values = DRAW.integers(-3, 4, (rows - 1) * self.row + columns if rows else 0).astype(np.float32)
        self.memory = Fenced(values if is_fp32 else to_bf16(values))
        self.address, self.values = self.memory.address, self.read().astype(np.float64)

    def read(self):
        """Return what lies in the memory now."""
        return np.lib.stride_tricks.as_strided(to_fp32(self.memory.read()), self.shape, (self.row * 4, 4))


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
        product = arguments.WeightGradient(*given, dy.address, x.address, out.address)
        assert library.cria_weight_gradient(ctypes.byref(product)) == 0
        want = dy.values.T @ x.values + (out.values if is_added else 0)
        assert np.allclose(out.read(), want, rtol=0 if is_fp32 else 2**-8, atol=0), given
        calls += 1
    print(calls, "calls")


main(ctypes.CDLL(sys.argv[1]), sys.argv[2:] == ["overrun"])

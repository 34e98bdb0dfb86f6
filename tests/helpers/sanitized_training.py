"""Calls the ops of a training step and NF4's of the library named by the first argument over a fuzz of shapes.

Imports no torch: tests/helpers/native.py runs this file under sanitizers, and every array lies beside pages that nobody
may touch. Rows are strided where an op takes strides, what may be null is there or not, and outputs lie over inputs
where they may. Numbers are checked to be finite; that they are right is for other tests. The name of an op as a second
argument calls that op, and tells it one column more than there is.
"""

import ctypes
import sys

import numpy as np
from fenced_memory import DRAW, Fenced, load_arguments, to_bf16, to_fp32

arguments = load_arguments()
DIMS = (1, 2, 7, 15, 16, 17, 31, 33, 48, 64, 100)


class Call:
    """The arrays of one call, kept until it ends, in fp32 or bf16."""

    def __init__(self):
        self.is_bf16, self.threads, self.outputs, self.kept = int(draw(2)), 1 + int(draw(2)), [], []

    def keep(self, values):
        """Return the address of a copy of an array."""
        self.kept.append(Fenced(values, bool(draw(2))))
        return self.kept[-1].address

    def numbers(self, n, is_fp32=False):
        """Return the address of n random numbers of the call's type, or of fp32."""
        values = DRAW.uniform(-2, 2, n).astype(np.float32)
        return self.keep(values if is_fp32 or not self.is_bf16 else to_bf16(values))

    def output(self, n, is_fp32=False):
        """Return the address of n numbers that the call writes."""
        address = self.numbers(n, is_fp32)
        self.outputs.append(self.kept[-1])
        return address

    def run(self, function, given):
        """Call a function of the library, and check what it wrote."""
        assert function(ctypes.byref(given)) == 0, function.__name__
        for out in self.outputs:
            assert np.isfinite(to_fp32(out.read())).all(), function.__name__


def draw(n):
    """Return one of n numbers from 0."""
    return DRAW.integers(0, n)


def norm(library, n, dim, more):
    """Call both directions of rms_norm. more: columns that are told and not there."""
    call = Call()
    rows = arguments.Rows(n, dim + more, call.is_bf16, call.threads)
    residual = call.numbers(n * dim) if draw(2) else None
    x, weight, rstd = call.numbers(n * dim), call.numbers(dim), call.output(n, True)
    y, total = call.output(n * dim), call.output(n * dim)
    call.run(library.cria_norm_forward, arguments.NormForward(rows, x, residual, weight, y, total, rstd, 1e-5))
    dy, ds = call.numbers(n * dim), call.numbers(n * dim) if draw(2) else None
    outputs = call.output(n * dim), call.output(dim), call.output(n * dim) if draw(2) else None
    given = dy, x, weight, ds, rstd, *outputs, call.output(5 * dim, True), 5
    call.run(library.cria_norm_backward, arguments.NormBackward(rows, *given))


def swiglu(library, n, dim, more):
    """Call both directions of SwiGLU, the second one in place or not."""
    call = Call()
    rows, gate_up = arguments.Rows(n, dim + more, call.is_bf16, call.threads), call.output(2 * n * dim)
    call.run(library.cria_swiglu_forward, arguments.SwiGLU(rows, gate_up, None, None, call.output(n * dim)))
    dh = call.output(n * dim)
    into = (gate_up, dh) if draw(2) else (call.output(2 * n * dim), call.output(n * dim) if draw(2) else None)
    call.run(library.cria_swiglu_backward, arguments.SwiGLU(rows, gate_up, dh, *into))


def rope(library, n, dim, more):
    """Call RoPE on heads of 2 dim, from one layout to another or in place."""
    call, heads = Call(), 1 + int(draw(3))
    size = n * heads * 2 * dim
    x, of_rows = call.output(size), (heads * 2 * dim, 2 * dim)
    out, of_heads = (x, of_rows) if draw(2) else (call.output(size), (2 * dim, n * 2 * dim))
    cos, sin = call.numbers(n * dim, True), call.numbers(n * dim, True)
    rows = arguments.Rows(n, dim + more, call.is_bf16, call.threads)
    given = x, out, cos, sin, heads, *of_rows, *of_heads, int(draw(2))
    call.run(library.cria_rope, arguments.Rope(rows, *given))


def cross_entropy(library, n, vocab, more):
    """Call the cross entropy of rows that lie up to three numbers apart."""
    call, stride = Call(), vocab + int(draw(4))
    logits, losses = call.output((n - 1) * stride + vocab), call.output(n, True)
    targets = call.keep(DRAW.choice([-100, 0, vocab - 1, vocab // 2], n).astype(np.int64))
    weights = call.numbers(n, True) if draw(2) else None
    rows = arguments.Rows(n, vocab + more, call.is_bf16, call.threads)
    given = logits, stride + more, targets, weights, losses, -100, int(draw(2)), 1e-4 * draw(2), 0.1 * draw(2)
    call.run(library.cria_cross_entropy, arguments.CrossEntropy(rows, *given))


def make_limits(keys, queries):
    """Return what each of `queries` places among the keys sees: a prefix that some share, and its document up to it."""
    ends = np.unique(np.append(DRAW.integers(1, keys + 1, 3), keys))
    places = np.sort(DRAW.permutation(keys)[:queries])
    document = np.searchsorted(ends, places, side="right")
    begins = np.append(0, ends)[document]
    shares = (document > 0) & (DRAW.integers(0, 2, len(ends) + 1)[document] == 1)
    limits = np.stack((begins, places + 1, 0 * places, np.where(shares, ends[0], 0)))
    limits[:, DRAW.integers(0, 8, queries) == 0] = 0  # of no document
    return limits.astype(np.int32)


def attention(library, keys, dim, more):
    """Call both directions of attention on strided heads."""
    call, kv_heads, group = Call(), 1 + int(draw(2)), 1 + int(draw(3))
    queries, heads, row = 1 + int(draw(keys)), kv_heads * group, {}

    def strided(name, n, heads, make):
        """Return the address of n rows of heads, a few numbers apart, and keep their strides."""
        row[f"{name}_row"], row[f"{name}_head"] = heads * dim + int(draw(4)), dim
        return make((n - 1) * row[f"{name}_row"] + heads * dim)

    tensors = {
        name: strided(name, queries if name in ("q", "o", "d_o", "dq") else keys, heads if name in
                      ("q", "o", "d_o", "dq") else kv_heads, call.output if name[0] == "d" else call.numbers)
        for name in arguments.STRIDED
    }  # fmt: skip
    sizes = queries, keys, heads, kv_heads, dim + more, call.is_bf16, call.threads
    limits, lse = call.keep(make_limits(keys, queries)), call.numbers(heads * queries, True)
    call.run(
        library.cria_attention_forward,
        arguments.Attention(*sizes, out=tensors["o"], lse=lse, limits=limits, **tensors, **row),
    )
    call.run(library.cria_attention_backward, arguments.Attention(*sizes, lse=lse, limits=limits, **tensors, **row))


def nf4(library, n, dim, more):
    """Quantise n * dim numbers, and make them anew from any codes."""
    call, size = Call(), n * dim
    codes, blocks = call.keep(np.zeros((size + 1) // 2, np.uint8)), -(-size // 64)
    given = size + 64 * more, call.is_bf16, call.threads
    absmax = call.output(blocks, True)
    call.run(library.cria_nf4_quantise, arguments.NF4Quantise(*given, call.numbers(size), codes, absmax))
    absmax_codes = call.keep(DRAW.integers(0, 256, blocks, np.uint8))
    tables = call.numbers(-(-blocks // 256), True), call.numbers(1, True), call.numbers(256, True)
    call.run(
        library.cria_nf4_dequantise, arguments.NF4Dequantise(*given, call.output(size), codes, absmax_codes, *tables)
    )


def main(library, ops, more):
    """Call each op over and over, with other shapes each time."""
    for op in ops:
        for _ in range(40):
            op(library, 1 + int(draw(70)), int(DRAW.choice(DIMS)), more)
    print(40 * len(ops), "calls of", library.cria_instruction_set().decode())


library = ctypes.CDLL(sys.argv[1])
library.cria_instruction_set.restype = ctypes.c_char_p
OPS = {op.__name__: op for op in (norm, swiglu, rope, cross_entropy, attention, nf4)}
main(library, [OPS[name] for name in sys.argv[2:3]] or list(OPS.values()), more=len(sys.argv[2:3]))

"""Calls cria_few_rows and cria_decode of the library named by the first argument over a fuzz of shapes and addresses.

Imports no torch: tests/helpers/native.py runs this file under sanitizers. Every array is a block of memory of its own,
so that an access before or past it is seen; most begin at odd multiples of their element's size.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np

path = Path(__file__).parents[2] / "kernels" / "native" / "arguments.py"
spec = importlib.util.spec_from_file_location("arguments", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

OK, DRAW = 0, np.random.default_rng(0)
FP32, BF16, Q8 = range(3)


class Memory:
    """`n` random numbers of a type, from -1 to 1; they begin at an odd multiple of its size."""

    def __init__(self, n: int, kind: int = FP32):
        size = (4, 2, 2)[kind]
        numbers = DRAW.uniform(-1, 1, n).astype(np.float32)
        data = {FP32: numbers.view(np.uint8), BF16: np.ascontiguousarray(numbers.view(np.uint16)[1::2]).view(np.uint8)}
        if kind == Q8:
            blocks = DRAW.integers(0, 256, (n // 32, 34), dtype=np.uint8)
            blocks[:, 1] &= 0x3F  # a finite scale
            data[Q8] = blocks.ravel()
        self.bytes = np.concatenate([np.zeros(size, np.uint8), data[kind]])
        self.address = self.bytes.ctypes.data + size

    def as_fp32(self, n):
        return self.bytes[4:].view(np.float32)[:n]


def multiply(library, kind, rows, in_, out, threads):
    """Call cria_few_rows."""
    x, w, y, workspace = Memory(rows * in_), Memory(out * in_, kind), Memory(rows * out), Memory(rows * in_)
    given = (kind, rows, in_, out, threads, x.address, w.address, y.address, workspace.address)
    assert library.cria_few_rows(ctypes.byref(module.FewRows(*given))) == OK
    assert np.isfinite(y.as_fp32(rows * out)).all()


def decode(library, kind, shape, lengths, threads, biases, short=0):
    """Call cria_decode for one row of each length. short: numbers that the workspace lacks."""
    dim, layers, heads, kv_heads, head_dim, hidden, vocab = shape
    qkv, memory = (heads + 2 * kv_heads) * head_dim, []

    def new(n):
        memory.append(Memory(n, kind))
        return memory[-1].address

    def bias(n):
        return new(n) if biases else None

    layer = (module.Layer * layers)(*(
        module.Layer(
            new(dim), new(qkv * dim), bias(qkv), new(dim * heads * head_dim), bias(dim), new(dim),
            new(2 * hidden * dim), bias(2 * hidden), new(dim * hidden), bias(dim),
        )
        for _ in range(layers)
    ))  # fmt: skip
    llama = module.Llama(kind, *shape, 1e-5, new(vocab * dim), new(dim), new(vocab * dim), layer)
    rows, batch, longest = len(lengths), len(lengths) + 1, max(lengths)
    size = library.cria_decode_workspace(ctypes.byref(llama), rows, longest, threads)
    tokens = DRAW.integers(0, vocab, rows)
    sequence = DRAW.permutation(batch)[:rows].astype(np.int64)
    length = np.array(lengths, np.int64)
    angles = [Memory(rows * head_dim // 2) for _ in range(2)]
    cache = [Memory(layers * batch * longest * kv_heads * head_dim, kind) for _ in range(2)]
    workspace, logits = Memory(size - short), Memory(rows * vocab)
    given = (
        *(a.ctypes.data for a in (tokens, sequence, length)),
        *(m.address for m in (*angles, *cache, workspace, logits)),
    )
    step = module.Tokens(rows, batch, longest, threads, *given)
    assert library.cria_decode(ctypes.byref(llama), ctypes.byref(step)) == OK
    assert np.isfinite(logits.as_fp32(rows * vocab)).all()


def main():
    library = ctypes.CDLL(sys.argv[1])
    library.cria_decode_workspace.restype = ctypes.c_int64
    library.cria_decode_workspace.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    if sys.argv[2:] == ["overrun"]:
        decode(library, FP32, (5, 1, 1, 1, 2, 3, 4), (2,), 1, False, short=1)
        return
    calls = 0
    for kind in (FP32, BF16, Q8):
        for rows in (0, 1, 3, 4, 7):
            in_, out = DRAW.integers(1, 5) * 32 if kind == Q8 else DRAW.integers(1, 130), DRAW.integers(0, 140)
            multiply(library, kind, rows, int(in_), int(out), int(DRAW.integers(1, 4)))
            calls += 1
    for kind in (FP32, BF16):
        for heads, kv_heads, head_dim in ((3, 1, 2), (6, 1, 20), (2, 2, 64), (5, 5, 80)):
            shape = (int(DRAW.integers(1, 70)), 2, heads, kv_heads, head_dim, *DRAW.integers(1, 70, 2).tolist())
            for lengths in ((1,), (128, 3), (257, 1, 129, 2, 5)):
                decode(library, kind, shape, lengths, int(DRAW.integers(1, 4)), bool(calls % 2))
                calls += 1
    print(f"{calls} calls", flush=True)


main()

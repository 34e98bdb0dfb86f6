"""What the static gate compiles and the tuner times: every launch function, at the sizes of real models.

A case is a launch function and its arguments, made by a Make: tensors without storage for the gate, random ones on the
GPU for the tuner. There is one for each combination of sizes and optional arguments that selects other machine code.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch

BF16, FP32 = torch.bfloat16, torch.float32
DIMS = (576, 2048, 4096, 5120)  # SmolLM2-135M, TinyLlama-1.1B, LLaMA-7B and Llama-3-8B, LLaMA-13B


class Case(NamedTuple):
    op: str  # of kernels/<op>.py and kernels/launch/<op>.json
    label: str
    build: Callable  # Make -> (operator or launch function, its arguments...)


class Make:
    """Tensors for a case. tokens: rows of a micro-batch. largest: what other sizes are cut to, for a quick try."""

    def __init__(self, device="meta", tokens=8192, largest=1 << 30, dtype=BF16):
        self.device, self.tokens, self.largest, self.dtype = torch.device(device), tokens, largest, dtype

    def size(self, n):
        return min(n, self.largest)

    def __call__(self, *shape, dtype=None, low=None):
        """Normal numbers, or uniform ones in [low, low + 1). dtype: bf16, but for a quick try on a CPU."""
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        values = torch.randn(shape, device=self.device) if low is None else torch.rand(shape, device=self.device) + low
        return values.to(dtype)

    def integers(self, *shape, high, dtype=torch.int64):
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(high, shape, device=self.device).to(dtype)


def rms_norm():
    op = import_module("kernels.rms_norm")

    def forward(dim, residual):
        def build(make):
            n, d = make.tokens, make.size(dim)
            return op.forward, make(n, d), make(n, d) if residual else None, make(d), 1e-5

        return build

    def backward(dim, ds, want_y):
        def build(make):
            n, d = make.tokens, make.size(dim)
            rstd = make(n, dtype=FP32, low=0.5)
            return op.backward, make(n, d), make(n, d), make(d), rstd, make(n, d) if ds else None, want_y

        return build

    for dim in DIMS:
        yield Case("rms_norm", f"forward D={dim}", forward(dim, False))
        yield Case("rms_norm", f"forward D={dim} residual", forward(dim, True))
        yield Case("rms_norm", f"backward D={dim}", backward(dim, False, False))
        yield Case("rms_norm", f"backward D={dim} residual", backward(dim, True, False))
        yield Case("rms_norm", f"backward D={dim} output", backward(dim, False, True))


def rope():
    op = import_module("kernels.rope")

    def rotated(heads, kv_heads, head_dim, inverse):
        def build(make):
            n, d = make.tokens, make.size(head_dim)
            q, k = make(n, heads, d), make(n, kv_heads, d)
            return op.rotated, q, k, make(n, d // 2, dtype=FP32), make(n, d // 2, dtype=FP32), inverse

        return build

    def rotate(heads, kv_heads, head_dim):  # in place, views of one (T, H + 2K, Dh)
        def build(make):
            n, d = make.tokens, make.size(head_dim)
            q, k, _ = make(n, heads + 2 * kv_heads, d).split((heads, kv_heads, kv_heads), 1)
            return op.rotate, q, k, make(n, d // 2, dtype=FP32), make(n, d // 2, dtype=FP32), False

        return build

    yield Case("rope", "H=32 K=32 Dh=128", rotated(32, 32, 128, False))
    yield Case("rope", "H=32 K=32 Dh=128 backward", rotated(32, 32, 128, True))
    yield Case("rope", "H=32 K=8 Dh=128 in place", rotate(32, 8, 128))
    yield Case("rope", "H=9 K=3 Dh=64", rotated(9, 3, 64, False))
    yield Case("rope", "H=32 K=32 Dh=80", rotated(32, 32, 80, False))
    yield Case("rope", "H=8 K=1 Dh=256", rotated(8, 1, 256, False))
    yield Case("rope", "H=8 K=8 Dh=512", rotated(8, 8, 512, False))


def attention():
    op, documents = import_module("kernels.attention"), import_module("kernels.documents")

    def inputs(make, heads, kv_heads, head_dim):
        """q, k, v as views of one tensor, and the plan of documents of 127 tokens, most behind one prefix of 40."""
        n, d = make.tokens, make.size(head_dim)
        starts = [0, *range(40, n, 87)]
        table = [(a, b, 0, 40 if a else 0) for a, b in zip(starts, [*starts[1:], n], strict=True)]
        qkv = make(n, heads + 2 * kv_heads, d)
        plan = documents.plan(torch.tensor(table), n, d, make.device)
        return (*qkv.split((heads, kv_heads, kv_heads), 1), plan)

    def forward(*sizes):
        def build(make):
            q, k, v, plan = inputs(make, *sizes)
            return op.forward, q, k, v, *plan[:3]

        return build

    def backward(*sizes):
        def build(make):
            q, k, v, plan = inputs(make, *sizes)
            o, lse = op.forward(q, k, v, *plan[:3]) if make.device.type != "meta" else (make(*q.shape), None)
            lse = make(q.shape[1], len(q), dtype=FP32) if lse is None else lse
            gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            return op.backward, q, k, v, o, lse, make(*q.shape), *gradients, *plan[:7]

        return build

    for sizes in ((32, 32, 128), (32, 8, 128), (9, 3, 64), (32, 32, 80), (8, 1, 256)):
        label = "H={} K={} Dh={}".format(*sizes)
        yield Case("attention", f"forward {label}", forward(*sizes))
        yield Case("attention", f"backward {label}", backward(*sizes))


OPS = (rms_norm, rope, attention)


def all_cases(only=()):
    """Every case, or those of the named ops."""
    return [case for cases in OPS for case in cases() if not only or case.op in only]

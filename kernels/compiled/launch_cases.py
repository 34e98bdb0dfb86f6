"""The cases that the static gate compiles and the tuner times: every launch function, at the sizes of real models.

A case is a launch function and its arguments. A Make makes the tensors: without storage for the gate, random ones on
the GPU for the tuner. There is a case for each combination of sizes and optional arguments that gives other machine
code.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from kernels.ops import (
    adamw,
    adamw_many,
    attention,
    attention_plan,
    grad_norm,
    linear_cross_entropy,
    nf4,
    rms_norm,
    rope,
    swiglu,
)

BF16, FP32 = torch.bfloat16, torch.float32
DIMS = (576, 2048, 4096, 5120)  # SmolLM2-135M, TinyLlama-1.1B, LLaMA-7B and Llama-3-8B, LLaMA-13B

Call = tuple[Any, ...]  # an operator or launch function, and its arguments


class Make:
    """Makes a case's tensors: without storage on "meta", with random numbers elsewhere.

    tokens: rows of a micro-batch. largest: an upper bound of all other sizes, small for a quick try.
    """

    def __init__(
        self,
        device: torch.device | str = "meta",
        tokens: int = 8192,
        largest: int = 1 << 30,
        dtype: torch.dtype = BF16,
    ) -> None:
        self.device, self.tokens, self.largest, self.dtype = torch.device(device), tokens, largest, dtype

    def size(self, n: int) -> int:
        """Return n, or the largest size if that is smaller."""
        return min(n, self.largest)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, low: float | None = None) -> torch.Tensor:
        """Return normal numbers, or uniform ones in [low, low + 1), in dtype or else the maker's own."""
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        values = torch.randn(shape, device=self.device) if low is None else torch.rand(shape, device=self.device) + low
        return values.to(dtype)

    def integers(self, *shape: int, high: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Return random integers in [0, high)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(high, shape, device=self.device).to(dtype)


class Case(NamedTuple):
    """One launch function at one set of sizes."""

    op: str  # names kernels/ops/<op>.py and kernels/launch/<op>.json
    label: str
    build: Callable[[Make], Call]


def rms_norm_cases() -> Iterator[Case]:
    """Yield the cases of the forward and backward of RMSNorm, with and without a residual."""

    def forward(dim, residual):
        def build(make):
            n, d = make.tokens, make.size(dim)
            return rms_norm.forward, make(n, d), make(n, d) if residual else None, make(d), 1e-5

        return build

    def backward(dim, ds, want_y):
        def build(make):
            n, d = make.tokens, make.size(dim)
            rstd = make(n, dtype=FP32, low=0.5)
            return rms_norm.backward, make(n, d), make(n, d), make(d), rstd, make(n, d) if ds else None, want_y

        return build

    for dim in DIMS:  # as norm_linear has them, whose backward takes most registers
        yield Case("rms_norm", f"forward D={dim}", forward(dim, False))
        yield Case("rms_norm", f"backward D={dim} residual, output", backward(dim, True, True))
    for dim in (576, 4096):
        yield Case("rms_norm", f"forward D={dim} residual", forward(dim, True))
        yield Case("rms_norm", f"backward D={dim}", backward(dim, False, False))
        yield Case("rms_norm", f"backward D={dim} residual", backward(dim, True, False))


def rope_cases() -> Iterator[Case]:
    """Yield the cases of the rotation of queries and keys, into new tensors and in place."""

    def rotated(heads, kv_heads, head_dim, inverse):
        def build(make):
            n, d = make.tokens, make.size(head_dim)
            q, k = make(n, heads, d), make(n, kv_heads, d)
            return rope.rotated, q, k, make(n, d // 2, dtype=FP32), make(n, d // 2, dtype=FP32), inverse

        return build

    def rotate(heads, kv_heads, head_dim):  # in place, views of one (T, H + 2K, Dh)
        def build(make):
            n, d = make.tokens, make.size(head_dim)
            q, k, _ = make(n, heads + 2 * kv_heads, d).split((heads, kv_heads, kv_heads), 1)
            return rope.rotate, q, k, make(n, d // 2, dtype=FP32), make(n, d // 2, dtype=FP32), False

        return build

    yield Case("rope", "H=32 K=32 Dh=128", rotated(32, 32, 128, False))
    yield Case("rope", "H=32 K=32 Dh=128 backward", rotated(32, 32, 128, True))
    yield Case("rope", "H=32 K=8 Dh=128 in place", rotate(32, 8, 128))
    yield Case("rope", "H=32 Dh=128 in place, alone", rotate(32, 0, 128))
    yield Case("rope", "H=9 K=3 Dh=64", rotated(9, 3, 64, False))
    yield Case("rope", "H=32 K=32 Dh=80", rotated(32, 32, 80, False))
    yield Case("rope", "H=8 K=1 Dh=256", rotated(8, 1, 256, False))
    yield Case("rope", "H=8 K=8 Dh=512", rotated(8, 8, 512, False))


def attention_cases() -> Iterator[Case]:
    """Yield the cases of attention over short documents behind a shared prefix, as a layer and as the last one."""

    def views(make, some, heads, kv_heads, head_dim):
        """Return q, k and v, or their gradients: views of one tensor, or of two where q has some rows alone."""
        n, d = make.tokens, make.size(head_dim)
        if some:
            return make(n // 2, heads, d), *make(n, 2 * kv_heads, d).chunk(2, 1)
        return make(n, heads + 2 * kv_heads, d).split((heads, kv_heads, kv_heads), 1)

    def inputs(make, some, *sizes):
        """Return q, k, v and a plan: documents of 127 tokens, most behind one prefix of 40."""
        n, d = make.tokens, make.size(sizes[-1])
        starts = [0, *range(40, n, 87)]
        table = [(a, b, 0, 40 if a else 0) for a, b in zip(starts, [*starts[1:], n], strict=True)]
        rows = torch.arange(0, n - 1, 2) if some else None
        return *views(make, some, *sizes), attention_plan.make_plan(torch.tensor(table), n, d, make.device, rows)

    def forward(*sizes):
        def build(make):
            q, k, v, plan = inputs(make, *sizes)
            return attention.forward, q, k, v, *plan[:3]

        return build

    def backward(some, *sizes):
        def build(make):
            q, k, v, plan = inputs(make, some, *sizes)
            o, lse = attention.forward(q, k, v, *plan[:3]) if make.device.type != "meta" else (make(*q.shape), None)
            lse = make(q.shape[1], len(q), dtype=FP32) if lse is None else lse
            rows = [len(q)] * 2 + [len(k)] * 2 if some else [len(k)] * 2
            angles = [make(n, q.shape[2] // 2, dtype=FP32) for n in rows]
            gradients = views(make, some, *sizes)
            return attention.backward, q, k, v, o, lse, make(*q.shape), *gradients, *plan[:8], angles

        return build

    layers = [(False, *sizes) for sizes in ((9, 3, 64), (32, 32, 128), (32, 8, 128), (32, 32, 80), (8, 1, 256))]
    for some, *sizes in (*layers, (True, 32, 32, 128)):
        label = "H={} K={} Dh={}".format(*sizes) + (" some rows" if some else "")
        yield Case("attention", f"forward {label}", forward(some, *sizes))
        yield Case("attention", f"backward {label}", backward(some, *sizes))


def linear_cross_entropy_cases() -> Iterator[Case]:
    """Yield the cases of the loss and its gradient, and the scaling of gradients in backward."""
    width = 64  # of x: the GEMMs are cuBLAS, and small ones leave the kernel's time to be seen

    def forward(vocab, weights=True, smoothing=0.0, grad=True):
        def build(make):
            n, d, v = make.tokens, make.size(width), make.size(vocab)
            rows = make(n, dtype=FP32, low=0.5) if weights else None
            targets = make.integers(n, high=v)
            return (
                linear_cross_entropy.forward,
                make(n, d),
                make(v, d),
                targets,
                rows,
                -100,
                0.0,
                smoothing,
                grad,
                grad,
                None,
                0,
            )

        return build

    def scaled(dtype, *shape):
        def build(make):
            n, d = map(make.size, shape)
            return linear_cross_entropy.scaled, make(n, d, dtype=dtype), make(dtype=FP32), make.dtype

        return build

    name = "linear_cross_entropy"
    yield Case(name, "V=32000", forward(32000))
    yield Case(name, "V=32000 no gradient", forward(32000, grad=False))
    yield Case(name, "V=32000 no weights, smoothing", forward(32000, weights=False, smoothing=0.1))
    yield Case(name, "V=32001", forward(32001))
    yield Case(name, "V=128256", forward(128256))
    yield Case(name, "dx scaled", scaled(None, 8192, 4096))
    yield Case(name, "dW scaled from fp32", scaled(FP32, 32000, 4096))


def swiglu_cases() -> Iterator[Case]:
    """Yield the cases of the forward and backward of SwiGLU."""

    def forward(dim):
        return lambda make: (swiglu.forward, make(make.tokens, 2 * make.size(dim)))

    def backward(dim, want_h):
        def build(make):
            n, f = make.tokens, make.size(dim)
            return swiglu.backward, make(n, f), make(n, 2 * f), want_h

        return build

    def backward_over(dim):
        return lambda make: (swiglu.backward_over, *backward(dim, True)(make)[1:])

    for dim in (1536, 11008):  # SmolLM2-135M, LLaMA-7B
        yield Case("swiglu", f"forward F={dim}", forward(dim))
        yield Case("swiglu", f"backward F={dim}", backward(dim, False))
        yield Case("swiglu", f"backward F={dim} output", backward(dim, True))
    yield Case("swiglu", "backward F=11008 over", backward_over(11008))


def adamw_cases() -> Iterator[Case]:
    """Yield the cases of the update for every way of keeping the parameter and the states."""
    settings = 0.9, 0.999, 1e-8, 0.1, 7, 3, 0  # betas, eps, decay, step, seed, offset

    def update(master, states, param_dtype, grad_dtype):
        def build(make):
            n = make.size(4096), make.size(11008)
            param, grad = make(*n, dtype=param_dtype), make(*n, dtype=grad_dtype)
            kept = adamw.adamw_state(param, master, states)
            state = kept.m, kept.v, kept.m_absmax, kept.v_absmax, kept.low, kept.master
            scale = make(dtype=FP32, low=0.1)  # on the device, as the engine has it
            apply = make.integers(high=2, dtype=torch.bool) if make.device.type == "meta" else make(1).abs() >= 0
            return adamw.update, param, grad, *state, 1e-3, None, 0.0, scale, apply, *settings

        return build

    def update_many(master, states):
        def build(make):
            _, *arguments = update(master, states, BF16, BF16)(make)
            lists = [[] if t is None else [t, t.clone()] for t in arguments[:8]]
            *numbers, decay, step, seed, offset = arguments[8:]
            return adamw_many.update_many, *lists, *numbers, [decay, 0.0], step, [seed, seed + 1], [offset, 0]

        return build

    for states in adamw.STATES:
        for master in adamw.MASTERS:
            yield Case("adamw", f"{master}, states {states}", update(master, states, BF16, BF16))
        yield Case("adamw", f"fp32 parameter, states {states}", update("fp32", states, FP32, FP32))
        yield Case("adamw", f"split, states {states}, many tensors", update_many("split", states))
    yield Case("adamw", "split, states bf16, fp32 gradient", update("split", "bf16", BF16, FP32))


def grad_norm_cases() -> Iterator[Case]:
    """Yield the cases of the gradient norm."""

    def norm(dtype):
        def build(make):
            d, f = make.size(4096), make.size(11008)
            return grad_norm.norm, [make(2 * f, d, dtype=dtype), make(d, f, dtype=dtype), make(d, dtype=dtype)]

        return build

    def sums(make):
        return grad_norm.sums, make(make.size(11008), make.size(4096))

    def of_sums(make):
        return grad_norm.of_sums, make(make.size(4096), dtype=FP32)

    yield Case("grad_norm", "bf16", norm(None))
    yield Case("grad_norm", "fp32", norm(FP32))
    yield Case("grad_norm", "bf16, one gradient's sums", sums)
    yield Case("grad_norm", "the norm of sums", of_sums)


def nf4_cases() -> Iterator[Case]:
    """Yield the cases of dequantising: whole tiles, and numbers that they do not divide."""

    def dequantise(dtype, *shape):
        def build(make):
            n = math.prod(map(make.size, shape))
            n_codes, n_blocks, n_blocks2 = nf4.nf4_shapes(n)
            codes, code8 = (make.integers(size, high=256, dtype=torch.uint8) for size in (n_codes, n_blocks))
            absmax2, offset = make(n_blocks2, dtype=FP32, low=0.5), make(dtype=FP32, low=0.5)
            return nf4.dequantise, make(n, dtype=dtype), codes, code8, absmax2, offset

        return build

    yield Case("nf4", "bf16 11008 x 4096", dequantise(BF16, 11008, 4096))
    yield Case("nf4", "fp32 11008 x 4096", dequantise(FP32, 11008, 4096))
    yield Case("nf4", "bf16 3001 x 576", dequantise(BF16, 3001, 576))


OPS = (
    rms_norm_cases, rope_cases, attention_cases, linear_cross_entropy_cases, swiglu_cases, adamw_cases, grad_norm_cases,
    nf4_cases,
)  # fmt: skip


def all_cases(only: Collection[str] = ()) -> list[Case]:
    """Return every case, or the cases of the named ops."""
    return [case for cases in OPS for case in cases() if not only or case.op in only]

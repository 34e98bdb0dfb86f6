"""Products of few rows and the forward of one token a sequence, as csrc/cpu/few_rows.h declares them."""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p

import torch

from kernels.native.library import check

TYPES = {torch.float32: 0, torch.bfloat16: 1}
Q8 = 2  # GGUF's q8_0: bytes, 34 for each 32 numbers: an fp16 scale, then signed bytes
Q8_BLOCK, Q8_BYTES = 32, 34


class FewRows(ctypes.Structure):
    """y = x w^T; csrc/cpu/few_rows.h tells the fields of this struct and the others."""

    _fields_ = [(name, c_int64) for name in ("type", "rows", "in_", "out", "threads")] + [
        (name, c_void_p) for name in ("x", "w", "y", "workspace")
    ]


class Layer(ctypes.Structure):
    """The weights of one layer; a bias that there is none of is null."""

    _fields_ = [
        (name, c_void_p)
        for name in ("attention_norm", "wqkv", "bqkv", "wo", "bo", "ffn_norm", "w13", "b13", "w2", "b2")
    ]


class Llama(ctypes.Structure):
    """The shape and the weights of a model."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in ("type", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim", "vocab")
        ),
        ("eps", c_double),
        *((name, c_void_p) for name in ("embedding", "norm", "head")),
        ("layer", ctypes.POINTER(Layer)),
    ]


class Tokens(ctypes.Structure):
    """The next token of some sequences of a cache."""

    _fields_ = [(name, c_int64) for name in ("rows", "sequences", "longest", "threads")] + [
        (name, c_void_p) for name in ("tokens", "sequence", "length", "cos", "sin", "k", "v", "workspace", "logits")
    ]


def multiply_few_rows(library: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor, threads: int) -> torch.Tensor:
    """Return x @ w.T (B, N) fp32, summed in fp32, of x (B, D) fp32 and w (N, D) in fp32 or bf16.

    w in uint8 is q8_0, (N, D / 32 * 34). All are contiguous and on the CPU. Raises ValueError if the shapes do not fit.
    """
    in_ = w.shape[1] // Q8_BYTES * Q8_BLOCK if w.dtype == torch.uint8 else w.shape[1]
    if x.dtype != torch.float32 or x.shape[1] != in_ or not (x.is_contiguous() and w.is_contiguous()):
        raise ValueError(f"few_rows: x {tuple(x.shape)} {x.dtype}, wanted contiguous fp32 of (rows, {in_})")
    y, workspace = torch.empty(len(x), len(w)), torch.empty_like(x)
    pointers = (t.data_ptr() for t in (x, w, y, workspace))
    product = FewRows(TYPES.get(w.dtype, Q8), len(x), in_, len(w), threads, *pointers)
    check(library.cria_few_rows(ctypes.byref(product)), "few_rows")
    return y


def new_layers(layers: Sequence[Sequence[torch.Tensor | None]]) -> ctypes.Array[Layer]:
    """Return the layers as C wants them, of each one's tensors in the order of Layer's fields."""
    return (Layer * len(layers))(*(Layer(*(None if t is None else t.data_ptr() for t in one)) for one in layers))

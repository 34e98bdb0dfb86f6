"""Arguments of csrc/cpu's functions, as ctypes passes them. Standard library only: tests load it without torch."""

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any


class AdamWArguments(ctypes.Structure):
    """The arguments of cria_adamw, as csrc/cpu/adamw.h lays them out. Addresses of what is not there are None."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("param", "grad", "m", "v", "m_absmax", "v_absmax", "low", "master", "maps")
        ),
        *((name, ctypes.c_int64) for name in ("n", "offset")),
        *((name, ctypes.c_float) for name in ("scale", "rest1", "beta2", "rest2", "eps", "decay", "rate")),
        *((name, ctypes.c_uint32) for name in ("step", "seed")),
        *((name, ctypes.c_int32) for name in ("grad_type", "states", "master_type", "threads")),
    ]


class WeightGradient(ctypes.Structure):
    """out = dy^T x; csrc/cpu/weight_gradient.h tells the fields."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "rows", "columns", "dy_row", "x_row", "out_row")),
        *((name, c_int64) for name in ("out_is_fp32", "is_added", "threads")),
        *((name, c_void_p) for name in ("dy", "x", "out")),
    ]


class FewRows(ctypes.Structure):
    """y = x w^T; csrc/cpu/few_rows.h tells the fields of this struct and of the three below."""

    _fields_ = [
        *((name, c_int64) for name in ("type", "rows", "in_", "out", "threads")),
        *((name, c_void_p) for name in ("x", "w", "y", "workspace")),
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
        *((name, c_int64) for name in ("type", "dim", "layers", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "hidden_dim", "vocab")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("embedding", "norm", "head")),
        ("layer", ctypes.POINTER(Layer)),
    ]


class Tokens(ctypes.Structure):
    """The next token of some sequences of a cache."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "sequences", "longest", "threads")),
        *((name, c_void_p) for name in ("tokens", "sequence", "length", "cos", "sin", "k", "v", "workspace", "logits")),
    ]


def _structure(name: str, told_in: str, **fields: Any) -> type[ctypes.Structure]:
    """Return a structure with the fields in the order given."""
    about = f"{name} of csrc/cpu/{told_in}, which tells its fields."
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items()), "__doc__": about})


def _fields(kind: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, kind)


Rows = _structure("Rows", "training.h", **_fields(c_int64, "n", "dim", "is_bf16", "threads"))
NormForward = _structure(
    "NormForward", "training.h", rows=Rows, **_fields(c_void_p, "x", "residual", "weight", "y", "sum", "rstd"),
    eps=c_double,
)  # fmt: skip
NormBackward = _structure(
    "NormBackward", "training.h", rows=Rows,
    **_fields(c_void_p, "dy", "x", "weight", "ds", "rstd", "dx", "dw", "y", "partial"), parts=c_int64,
)  # fmt: skip
SwiGLU = _structure("SwiGLU", "training.h", rows=Rows, **_fields(c_void_p, "gate_up", "dh", "dgate_up", "h"))
Rope = _structure(
    "Rope", "training.h", rows=Rows, **_fields(c_void_p, "x", "out", "cos", "sin"),
    **_fields(c_int64, "heads", "x_row", "x_head", "out_row", "out_head", "inverse"),
)  # fmt: skip
CrossEntropy = _structure(
    "CrossEntropy", "training.h", rows=Rows, logits=c_void_p, stride=c_int64,
    **_fields(c_void_p, "targets", "weights", "losses"), **_fields(c_int64, "ignore_index", "gradient"),
    **_fields(c_double, "z_loss", "smoothing"),
)  # fmt: skip
STRIDED = ("q", "k", "v", "o", "d_o", "dq", "dk", "dv")  # of attention: each has a stride of rows and one of heads
Attention = _structure(
    "Attention", "training.h",
    **_fields(c_int64, "queries", "keys", "heads", "kv_heads", "head_dim", "is_bf16", "threads"),
    **_fields(c_void_p, "q", "k", "v", "o", "d_o", "out", "dq", "dk", "dv", "lse", "limits"),
    **_fields(c_int64, *(f"{name}_{axis}" for name in STRIDED for axis in ("row", "head"))),
)  # fmt: skip
NF4Quantise = _structure(
    "NF4Quantise", "nf4.h", **_fields(c_int64, "n", "is_bf16", "threads"),
    **_fields(c_void_p, "weight", "codes", "absmax"),
)  # fmt: skip
NF4Dequantise = _structure(
    "NF4Dequantise", "nf4.h", **_fields(c_int64, "n", "is_bf16", "threads"),
    **_fields(c_void_p, "out", "codes", "absmax_codes", "absmax2", "offset", "map"),
)  # fmt: skip

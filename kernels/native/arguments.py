"""Arguments of csrc/cpu's functions, as ctypes passes them. Standard library only: tests load it without torch."""

import ctypes
from ctypes import c_double, c_int64, c_void_p


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

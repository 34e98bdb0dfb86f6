"""The ops of a training step, except the GEMMs: their public functions. Each op is one file of kernels/ops."""

from kernels.ops.adamw import adamw, adamw_state, master_of
from kernels.ops.adamw_many import adamw_many
from kernels.ops.attention import attention, attention_plan, rope_attention, rope_attention_rows
from kernels.ops.attention_hopper import check_attention_by_cuda
from kernels.ops.attention_ref import attend
from kernels.ops.common import INTERPRETED, chip
from kernels.ops.decode_attention import DecodeCache, decode_attention
from kernels.ops.grad_norm import grad_norm, norm_of_sums, sum_squares
from kernels.ops.linear import linear
from kernels.ops.linear_cross_entropy import linear_cross_entropy
from kernels.ops.low_rank import LowRank
from kernels.ops.nf4 import NF4Matrix, dequantise_nf4, nf4_shapes, quantise_nf4
from kernels.ops.norm_linear import norm_linear, norm_linear_rows
from kernels.ops.rms_norm import rms_norm
from kernels.ops.rope import rope, rope_cos_sin, rope_frequencies
from kernels.ops.swiglu import swiglu, swiglu_linear

__all__ = [
    "INTERPRETED",
    "DecodeCache",
    "LowRank",
    "NF4Matrix",
    "adamw",
    "adamw_many",
    "adamw_state",
    "attend",
    "attention",
    "attention_plan",
    "check_attention_by_cuda",
    "chip",
    "decode_attention",
    "dequantise_nf4",
    "grad_norm",
    "linear",
    "linear_cross_entropy",
    "master_of",
    "nf4_shapes",
    "norm_linear",
    "norm_linear_rows",
    "norm_of_sums",
    "quantise_nf4",
    "rms_norm",
    "rope",
    "rope_attention",
    "rope_attention_rows",
    "rope_cos_sin",
    "rope_frequencies",
    "sum_squares",
    "swiglu",
    "swiglu_linear",
]

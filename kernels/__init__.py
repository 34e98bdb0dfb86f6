"""Every op of the training step except the GEMMs; one file each: the formula, the reference, the kernels, the public
function."""

from kernels.adamw import adamw, adamw_state, master_of
from kernels.attention import attention, attention_plan, rope_attention, rope_attention_rows
from kernels.attention_ref import attend
from kernels.common import INTERPRETED, chip
from kernels.grad_norm import grad_norm
from kernels.linear_add import linear_add
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.norm_linear import norm_linear, norm_linear_rows
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_cos_sin, rope_frequencies
from kernels.swiglu import swiglu, swiglu_linear

__all__ = [
    "INTERPRETED",
    "adamw",
    "adamw_state",
    "attend",
    "attention",
    "attention_plan",
    "chip",
    "grad_norm",
    "linear_add",
    "linear_cross_entropy",
    "master_of",
    "norm_linear",
    "norm_linear_rows",
    "rms_norm",
    "rope",
    "rope_attention",
    "rope_attention_rows",
    "rope_cos_sin",
    "rope_frequencies",
    "swiglu",
    "swiglu_linear",
]

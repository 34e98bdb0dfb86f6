"""RoPE's tables, for each kind of scaling that carries it past the length of pretraining.

    plain     f_i = theta^(-2i/Dh)                             radians a position of pair i, of Dh/2
    linear    f_i / factor
    dynamic   f_i with theta (factor n / m - factor + 1)^(Dh / (Dh - 2)) for a text of n > m = max_seq_len tokens
    yarn      between f_i (fast pairs) and f_i / factor (slow ones); cosines and sines times attention_factor
    llama3    between f_i and f_i / factor too, by another rule: see kernels.rope

Each is computed in fp32 in the order of transformers' modeling_rope_utils.py, so that logits agree.
Source: arXiv:2309.00071 (yarn, and dynamic, which is called "Dynamic NTK" there), arXiv:2306.15595 (linear).
"""

import functools
import math

import torch

import kernels
from engine.model.config import ModelConfig, RopeScaling


def rope_tables(
    config: ModelConfig, positions: torch.Tensor, one_of_each: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of positions (T,), each (T, Dh/2) fp32. The host does not wait for the device.

    one_of_each: every row is the last token so far of a text of its own. Else a text is a run of rows whose positions
    count up. With dynamic scaling, the frequencies of a row follow from the length of its text.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        lengths = positions + 1 if one_of_each else text_lengths(positions)
        frequencies = dynamic_frequencies(config, scaling.factor, lengths)
    else:
        frequencies = frequencies_on(positions.device, config.head_dim, config.rope_theta, scaling)
    cos, sin = kernels.rope_cos_sin(positions, frequencies)
    if scaling is not None and scaling.attention_factor != 1:
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


@functools.cache
def frequencies_on(device: torch.device, head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Return the (Dh/2,) fp32 frequencies on a device. They are cached: a copy in each forward would wait for it."""
    return frequencies(head_dim, theta, scaling).to(device)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Return the (Dh/2,) fp32 frequencies, in radians a position; of dynamic scaling, for texts up to max_seq_len."""
    if scaling is None or scaling.kind == "dynamic":
        return kernels.rope_frequencies(head_dim, theta)
    if scaling.kind == "linear":
        return kernels.rope_frequencies(head_dim, theta) / scaling.factor
    if scaling.kind == "yarn":
        return yarn_frequencies(head_dim, theta, scaling)
    return kernels.rope_frequencies(head_dim, theta, scaling)


def yarn_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Return the (Dh/2,) fp32 frequencies of YaRN."""

    def pair_of(turns: float) -> float:  # the pair, a fraction, that turns so often in the original length
        return head_dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    turning = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return 1.0 / (scaling.factor * turning) * (1 - keep) + 1.0 / turning * keep


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return the attention factor that YaRN recommends for a factor."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def text_lengths(positions: torch.Tensor) -> torch.Tensor:
    """Return, for each row, one more than the last position of its run of positions that count up. (T,) int64."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions[1:] != positions[:-1] + 1
    run = begins.cumsum(0) - 1
    return torch.zeros_like(positions).scatter_reduce(0, run, positions + 1, "amax")[run]


def dynamic_frequencies(config: ModelConfig, factor: float, lengths: torch.Tensor) -> torch.Tensor:
    """Return the (T, Dh/2) fp32 frequencies of rows whose texts have these lengths (T,)."""
    dim, longest = config.head_dim, config.max_seq_len
    stretch = torch.where(lengths > longest, factor * lengths / longest - (factor - 1), 1.0)  # (T,) fp32
    # In fp64, then rounded: as exact as torch's power of one number, which transformers takes. That of many numbers is
    # less so, and would put angles at position 5000 0.0001 off.
    theta = config.rope_theta * (stretch.double() ** (dim / (dim - 2))).float()[:, None]
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=lengths.device).float() / dim)

"""Rotary position embedding of queries and keys.

    (a, b) -> (a cos - b sin, b cos + a sin)      a = x[..., :Dh/2], b = x[..., Dh/2:], angle = position * frequency

The halves are rotated against each other, as Hugging Face lays heads out; Meta pairs neighbours, and its weights are
permuted when they are read. Angles, sines and products are fp32: bf16 cannot tell positions above 256 apart.
Source: arXiv:2104.09864; llama3 scaling as meta-llama/llama-models llama3/model.py apply_scaling.
"""

import math

import torch

from kernels.common import choose, wide


def rope_frequencies(head_dim: int, theta: float, scaling=None) -> torch.Tensor:
    """Radians a position for each of the Dh/2 pairs, (Dh/2,) fp32: theta^(-2i/Dh), slowed by llama3 scaling if given.

    scaling: an object with factor, low_freq_factor, high_freq_factor, original_max_seq_len (tokens), or None.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs  # tokens a turn
    turns = scaling.original_max_seq_len / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)  # 0: slow pairs, divided by the factor. 1: fast pairs, kept.
    return (1 - blend) * freqs / scaling.factor + blend * freqs


def rope_cos_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions: (T,) integers. Returns cos and sin, each (T, Dh/2) fp32."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x, cos, sin):
    a, b = wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same for every head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def rope_ref(q, k, cos, sin):
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q (T, H, Dh) and k (T, K, Dh) by each token's angles; cos, sin: (T, Dh/2) fp32.

    Returns both; an implementation may write them over its inputs, so use only what is returned.
    Raises ValueError when the shapes do not fit.
    """
    want = (q.shape[0], q.shape[-1] // 2)
    if cos.shape != want or sin.shape != want or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            f"wanted cos and sin {want}, and k with q's T and Dh"
        )
    choose("rope", impl)
    return rope_ref(q, k, cos, sin)

"""AdamW over many tensors in one launch for each kind of them: kernels.ops.adamw on every tensor, bit for bit.

A launch takes a few microseconds of a GPU that begins and ends it with idle SMs, and more of the host. A 7B model has
195 parameters; SmolLM2-135M has 182, most of them so small that the launches take longer than the updates.
"""

import struct
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from kernels.ops import adamw_cuda, eight_bit
from kernels.ops.adamw import (
    AdamWState,
    adamw,
    adamw_ref,
    bias_corrections,
    bits16,
    check_numbers,
    check_tensors,
    rounds_at_random,
)  # fmt: skip
from kernels.ops.adamw_kernels import update_many_kernel
from kernels.ops.common import choose_impl, launch_config, operator
from kernels.ops.tensor_table import count_chunks, is_aligned, make_table, measure_distances


def adamw_many_ref(*arguments: Any) -> None:
    """Update every param and its state in plain torch. The arguments are those of the operator update_many()."""
    streams, numbers, (weight_decays, step, seeds, offsets) = arguments[:8], arguments[8:16], arguments[16:]
    for i, (weight_decay, seed, offset) in enumerate(zip(weight_decays, seeds, offsets, strict=True)):
        tensors = (stream[i] if stream else None for stream in streams)
        one: Any = (*tensors, *numbers, weight_decay, step, seed, offset)
        adamw_ref(*one)


@operator(
    "adamw_update_many",
    mutates=("params", "ms", "vs", "m_absmaxs", "v_absmaxs", "lows", "masters"),
    cpu=adamw_many_ref,
    fake=lambda *arguments: None,
)
def update_many(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], ms: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor], m_absmaxs: Sequence[torch.Tensor], v_absmaxs: Sequence[torch.Tensor],
    lows: Sequence[torch.Tensor], masters: Sequence[torch.Tensor], lr: float, lr_tensor: torch.Tensor | None,
    scale: float, scale_tensor: torch.Tensor | None, apply: torch.Tensor | None, beta1: float, beta2: float, eps: float,
    weight_decays: Sequence[float], step: int, seeds: Sequence[int], offsets: Sequence[int],
) -> None:  # fmt: skip
    """Update contiguous tensors of one kind, none of them empty, as adamw() does.

    A list of tensors that this kind of state lacks is empty. offsets: multiples of 8 where numbers are rounded at
    random. lr_tensor and scale_tensor, if given, replace the numbers.
    """
    device, states_8bit = params[0].device, bool(m_absmaxs)
    config = launch_config("adamw", "update_8bit" if states_8bit else "update", device)
    sizes = [p.numel() for p in params]
    streams = (params, grads, ms, vs, lows, masters)
    aligned = is_aligned(t for stream in streams for t in stream)
    distances = [measure_distances(stream, aligned) if stream else sizes for stream in streams]
    distances += [measure_distances(maxima, False) if maxima else sizes for maxima in (m_absmaxs, v_absmaxs)]
    *first_chunks, n_chunks = count_chunks(sizes, config["TILES"] * config["BLOCK"])
    decays = [struct.unpack("i", struct.pack("f", decay))[0] for decay in weight_decays]
    groups = [offset // 8 for offset in offsets]
    rows = [first_chunks, [n // 16 if aligned else n for n in sizes], *distances, seeds, groups, decays]
    table = make_table(rows, [t for stream in (*streams, m_absmaxs, v_absmaxs) for t in stream], device)
    param, grad, m, v, low, master, m_absmax, v_absmax = (
        bits16(stream[0]) if stream else None for stream in (*streams, m_absmaxs, v_absmaxs)
    )
    maps = eight_bit.tables(device) if states_8bit else (None, None)
    eps, factor = bias_corrections(beta1, beta2, eps, step)
    update_many_kernel[(n_chunks,)](
        param, grad, m, v, m_absmax, v_absmax, low, master, *maps, table,
        lr, lr_tensor, scale, scale_tensor, apply, 1 - beta1, beta2, 1 - beta2, eps, factor, step,
        N=table.shape[1], ALIGNED=aligned, enable_fp_fusion=False, **config,
    )  # fmt: skip


# ---- public ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_many(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], states: Sequence[AdamWState], *,
    lr: torch.Tensor | float, beta1: float, beta2: float, eps: float, weight_decays: Sequence[float], step: int,
    grad_scale: torch.Tensor | float = 1.0, norm: torch.Tensor | None = None, clip: float = 0.0,
    apply: torch.Tensor | None = None, seeds: Sequence[int] = (), offsets: Sequence[int] = (), impl: str = "auto",
) -> None:  # fmt: skip
    """Update each param, on one device, and its state in place: adamw() on each, and the same bits.

    weight_decays, seeds, offsets: one for each param, or no seeds and offsets for 0. The other arguments are adamw()'s.
    norm and clip replace grad_scale: it is then min(1, clip / (norm + 1e-6)), as torch's clip_grad_norm_ computes it,
    and 1 with clip 0. Tensors of one dtype and kind of state share a launch; those whose bits it cannot give have a
    launch each. impl "cuda": one launch of csrc/cuda/adamw.cu for all of one master, of 8-bit and fp32 states alike.
    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    zeros = [0] * len(params)
    each = zip(params, grads, states, weight_decays, seeds or zeros, offsets or zeros, strict=True)
    if impl == "cuda":
        _update_by_cuda(list(each), (lr, grad_scale, norm, clip), apply, step, betas=(beta1, beta2), eps=eps)
        return
    if norm is not None:
        grad_scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
    kinds: dict[tuple, list[tuple]] = {}
    for one in each:
        if one[0].numel():
            kinds.setdefault(_kind_of(*one), []).append(one)
    for members in kinds.values():
        if len(members) == 1 or choose_impl("adamw", impl, params[0], True) != "triton":
            for param, grad, state, weight_decay, seed, offset in members:
                adamw(
                    param, grad, state, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step,
                    grad_scale=grad_scale, apply=apply, seed=seed, offset=offset, impl=impl,
                )  # fmt: skip
            continue
        for param, grad, state, _, seed, offset in members:
            check_tensors(param, grad, state)
            numbers = check_numbers(param, state, lr, grad_scale, apply, step, seed, offset)
        of_each, of_grads, of_states, decays, seeds_, offsets_ = zip(*members, strict=True)
        kept = [[t for state in of_states if (t := getattr(state, f.name)) is not None] for f in fields(AdamWState)]
        update_many(
            of_each, [grad.contiguous() for grad in of_grads], *kept, *numbers, apply, beta1, beta2, eps, decays, step,
            seeds_, offsets_,
        )  # fmt: skip


def _update_by_cuda(each, scales, apply, step, betas, eps):
    lr, grad_scale, norm, clip = scales
    members = []
    for param, grad, state, decay, seed, offset in each:
        check_tensors(param, grad, state)
        numbers = check_numbers(param, state, lr, grad_scale, apply, step, seed, offset)
        if param.numel():
            members.append((param, grad.contiguous(), state, decay, seed, offset))
    if members:
        clipped = (float(clip), norm) if clip else (0.0, None)
        adamw_cuda.update_all(members, (*numbers, *clipped), betas[0], betas[1], eps, step, apply)


def _kind_of(param, grad, state, _weight_decay, _seed, offset):
    """Return what tensors that share a launch have in common."""
    kept = state.tensors()
    streams = [param, grad, *(t for name, t in kept.items() if not name.endswith("absmax"))]
    shift = offset % 8 if rounds_at_random(param, state.m, state.low, state.master) else 0
    alone = param.data_ptr() if shift else None  # a launch over many begins with whole groups of eight
    return param.device, param.dtype, grad.dtype, state.m.dtype, tuple(kept), is_aligned(streams), alone

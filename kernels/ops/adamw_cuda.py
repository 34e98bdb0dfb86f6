"""AdamW over all tensors of a model in one launch of csrc/cuda/adamw.cu: kernels.ops.adamw on each, bit for bit, p too.

The Triton kernel divides by an approximate reciprocal of an approximate root. This one rounds both to nearest, as the
reference does.
"""

import struct
from collections.abc import Sequence

import torch

from kernels.native import cuda
from kernels.ops import eight_bit
from kernels.ops.adamw import AdamWState, bias_corrections, rounds_at_random

THREADS, CHUNK, TABLES_BYTES = 512, 32768, 73728  # of csrc/cuda/adamw.cu
MACHINE_BLOCKS = 2  # on the PTX machine; a GPU gets as many as it holds
MASTERS, STATES = ("param", "master", "low", "stochastic"), (torch.float32, torch.bfloat16, torch.uint8)

Member = tuple[torch.Tensor, torch.Tensor, AdamWState, float, int, int]  # with weight decay, seed and offset


def _master_of(param: torch.Tensor, state: AdamWState) -> str:
    if param.dtype == torch.float32:
        return "param"
    return "master" if state.master is not None else "low" if state.low is not None else "stochastic"


def kind_of(member: Member, states_8bit: bool) -> tuple[int, int]:
    """Return what tensors that share a launch have in common: master and states, as numbers.

    states_8bit: whether tensors with fp32 states go with those of 8-bit states.
    """
    param, _, state, *_ = member
    states = STATES.index(state.m.dtype)
    states = 2 if states == 0 and states_8bit else states
    return MASTERS.index(_master_of(param, state)), states


def _pack(kind: str, *numbers: float) -> int:
    return struct.unpack("q", struct.pack(kind, *numbers))[0]


def make_row(member: Member, first_chunk: int) -> tuple[list[int], list[torch.Tensor], int]:
    """Return a tensor's row of the table, the tensors it reaches, and the number of its chunks."""
    param, grad, state, decay, seed, offset = member
    rest = state.master if state.low is None else state.low
    streams = [param, grad, state.m, state.v, *([] if rest is None else [rest])]
    maxima = [t for t in (state.m_absmax, state.v_absmax) if t is not None]
    shift = offset % 8 if rounds_at_random(param, state.m, state.low, state.master) else 0
    aligned = shift == 0 and all(t.data_ptr() % 16 == 0 for t in streams)
    flags = aligned + 2 * (grad.dtype == torch.float32)
    addresses = [t.data_ptr() for t in streams] + ([0] if rest is None else [])
    addresses += [t.data_ptr() for t in maxima] or [0, 0]
    numbers = [param.numel(), first_chunk, offset // 8, _pack("II", seed, shift), _pack("fI", decay, flags)]
    return addresses + numbers, streams + maxima, -(-(param.numel() + shift) // CHUNK)


def make_launch(
    members: Sequence[Member], kind: tuple[int, int], numbers: tuple, beta1: float, beta2: float, eps: float,
    step: int, apply: torch.Tensor | None,
) -> cuda.CudaLaunch:  # fmt: skip
    """Return the launch that updates tensors of one kind, none of them empty.

    numbers: lr, its tensor, the gradients' scale, its tensor, as kernels.ops.adamw.check_numbers returns them, then the
    limit of the gradients' norm and the norm, or 0.0 and None.
    """
    device, n_chunks = members[0][0].device, 0
    rows: list[list[int]] = []
    reached: list[torch.Tensor] = []
    for member in members:
        row, tensors, n = make_row(member, n_chunks)
        rows.append(row)
        reached += tensors
        n_chunks += n
    table = torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    lr, lr_tensor, scale, scale_tensor, clip, norm = (x.float() if torch.is_tensor(x) else x for x in numbers)
    master, states = kind
    maps = eight_bit.tables(device) if states == 2 else (None, None)
    eps, factor = bias_corrections(beta1, beta2, eps, step)
    arguments = (
        table, len(rows), n_chunks, *maps, lr, lr_tensor, scale, scale_tensor, clip, norm, apply,
        float(1 - beta1), float(beta2), float(1 - beta2), eps, factor, step,
    )  # fmt: skip
    return cuda.CudaLaunch(
        "adamw.cu", "cria_adamw", f"adamwILi{master}ELi{states}E", arguments, kind,
        (min(n_chunks, MACHINE_BLOCKS),), THREADS, TABLES_BYTES if states == 2 else 0, reached,
    )  # fmt: skip


def update_all(
    members: Sequence[Member], numbers: tuple, beta1: float, beta2: float, eps: float, step: int,
    apply: torch.Tensor | None,
) -> None:  # fmt: skip
    """Update tensors, none of them empty, in one launch for each kind. The arguments are make_launch's."""
    has_8bit = any(state.m_absmax is not None for _, _, state, *_ in members)
    kinds: dict[tuple[int, int], list[Member]] = {}
    for member in members:
        kinds.setdefault(kind_of(member, has_8bit), []).append(member)
    for kind, of_kind in kinds.items():
        cuda.run(make_launch(of_kind, kind, numbers, beta1, beta2, eps, step, apply))

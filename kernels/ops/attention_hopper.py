"""Forward of attention by csrc/cuda/hopper_attention.cu: bulk copies of tiles, products of warpgroups; sm_90 alone.

It computes what the Triton forward computes, in bf16 and fp16, for heads of 64 and 128. A block has three or two
warpgroups of 64 queries, for which each tile of 64 keys is copied once. The plan lists the tiles of keys of these
queries and says of each what the queries of each warpgroup see: none (the warpgroup passes it over), some (it masks) or
all. As a bulk copy takes whole tiles, the plan also says where one holds rows of no document, whose values may be NaN.
"""

import math

import numpy as np
import torch

from kernels.native import cuda
from kernels.ops.common import n_sms

DTYPES = (torch.bfloat16, torch.float16)
GROUPS = {64: 3, 128: 2}  # by head size: warpgroups that multiply, of csrc/cuda/hopper_attention.cu
ROWS, KEYS, STAGES = 64, 64, 4  # queries of a warpgroup; rows of a tile of keys, and tiles under way
SOME, ALL, DIRTY = 1, 2, 64  # flags of a listed block of keys: two bits for each warpgroup, and one for its values
LOG2_E = 1.4426950408889634


def rows_of_item(head_dim: int) -> int:
    """Return how many queries an item has. Raises ValueError for a head size that the kernel does not take."""
    if head_dim not in GROUPS:
        raise ValueError(f"attention: impl='cuda' takes heads of 64 and 128, Dh is {head_dim}; pass impl='auto'")
    return GROUPS[head_dim] * ROWS


def flag_blocks(
    items: np.ndarray, blocks: np.ndarray, limits: np.ndarray, seen: np.ndarray, rows_of_item: int
) -> np.ndarray:
    """Return the listed blocks of keys with flags, (n + 1, 4): start * 2 + (read as a prefix), end, flags, 0.

    items, blocks: of list_query_tiles for tiles of rows_of_item queries and KEYS keys. limits: (4, Q). seen: (T,), the
    keys that some query sees.
    """
    in_order = items[np.argsort(items[:, 1], kind="stable")]
    tile_of = np.repeat(in_order[:, 0], in_order[:, 2] - in_order[:, 1])
    code, end = blocks[:-1].T
    start, kind = code >> 1, code & 1
    rows = tile_of[:, None] * rows_of_item + np.arange(rows_of_item)
    is_there, rows = rows < limits.shape[1], np.minimum(rows, limits.shape[1] - 1)
    lo = np.maximum(limits[2 * kind[:, None], rows], start[:, None])
    n = np.minimum(limits[2 * kind[:, None] + 1, rows], end[:, None]) - lo
    by_group = (len(code), rows_of_item // ROWS, ROWS)
    some = ((n > 0) & is_there).reshape(by_group).any(2)
    whole = ((n == KEYS) | ~is_there).reshape(by_group).all(2)
    sees = np.where(whole & some, ALL, np.where(some, SOME, 0))
    unseen = np.concatenate(([0], np.cumsum(~seen.astype(bool))))
    is_dirty = unseen[np.minimum(start + KEYS, len(seen))] > unseen[start]
    flags = (sees << (2 * np.arange(by_group[1]))).sum(1) + DIRTY * is_dirty
    flagged = np.zeros((len(blocks), 4), np.int64)
    flagged[:-1] = np.column_stack((code, end, flags, np.zeros_like(code)))
    return flagged


def check_attention_by_cuda(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError for a head size or dtype that the kernel does not take, and for another GPU than sm_90."""
    rows_of_item(head_dim)
    if dtype not in DTYPES:
        raise ValueError(f"attention: impl='cuda' takes bf16 and fp16, q is {dtype}; pass impl='auto'")
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        raise ValueError(f"attention: impl='cuda' runs on sm_90 alone, this card is {name}; pass impl='auto'")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError for tensors that the kernel does not take."""
    check_attention_by_cuda(q.shape[-1], q.dtype, q.device)
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.numel() and (t.stride(-1) != 1 or t.data_ptr() % 16 or any(s % 8 for s in t.stride()[:-1])):
            raise ValueError(
                f"attention: impl='cuda' takes rows and heads at multiples of 16 bytes, {name} begins at "
                f"{t.data_ptr():#x} with strides {t.stride()}; pass impl='auto'"
            )


def _tiles(t: torch.Tensor, rows: int, panels: int) -> cuda.TileMap:
    """Return the map of t (T, H, Dh) whose tiles are `rows` rows and `panels` times 64 columns of a head."""
    return cuda.TileMap(t.unflatten(-1, (-1, 64)).permute(2, 1, 0, 3), (panels, 1, rows, 64))


def make_launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, items: torch.Tensor, blocks: torch.Tensor
) -> tuple[cuda.CudaLaunch, torch.Tensor, torch.Tensor]:
    """Return the launch, and the tensors that it writes: o (Q, H, Dh), and lse (H, Q) fp32, to the base 2."""
    n_queries, heads, dim = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(heads, n_queries, dtype=torch.float32)
    strides = (v.stride(0) * v.element_size(), v.stride(1) * v.element_size())
    arguments: tuple[cuda.Argument, ...] = (
        *(_tiles(t, ROWS, dim // 64) for t in (q, k, v)), _tiles(o, 16, 1), v, *strides, lse, limits, items, blocks,
        n_queries, len(items), heads, heads // k.shape[1], LOG2_E / math.sqrt(dim),
    )  # fmt: skip
    dtype, grid = DTYPES.index(q.dtype), min(len(items) * heads, n_sms(q.device))
    name = ("13__nv_bfloat16", "6__half")[dtype]
    groups, tile = GROUPS[dim], ROWS * dim * 2
    shared = 2 * groups * tile + 2 * STAGES * tile + 16 * (STAGES + 2) + 8 * (4 + 4 * STAGES)
    launch = cuda.CudaLaunch(
        "hopper_attention.cu", "cria_hopper_attention", f"hopper_attentionI{name}Li{dim}E", arguments,
        (dtype, dim, grid), (grid,), 128 * (groups + 1), shared,
    )  # fmt: skip
    return launch, o, lse


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, items: torch.Tensor, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o (Q, H, Dh) and lse (H, Q) fp32, to the base 2, of arguments that are checked."""
    launch, o, lse = make_launch(q, k, v, limits, items, blocks)
    if o.numel():
        cuda.run(launch)
    return o, lse

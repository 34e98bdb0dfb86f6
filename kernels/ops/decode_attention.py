"""Attention of one query a sequence to the keys and values in a cache, for decoding.

    out[b, h] = sum over keys j of softmax_j(q[b, h] . k[j, h / G] / sqrt(D)) v[j, h / G]

The keys of sequence b are those of a prefix that all sequences share, if there is one, and then the first lengths[b] of
its own. Query heads come in groups of G to a key head. Two layouts of the cache:

    static  k, v (B, S, K, D): row b is sequence b
    paged   k, v (pages, page size, K, D), and a table (B, n) int32: page j of sequence b is number table[b, j]. A page
            holds a multiple of 16 keys, unless it is the only one of its sequence

The prefix is (P, K, D). A sequence without any key gives 0. Softmax and sums are fp32, and the bits of a result depend
on shapes alone, not on the order in which a GPU runs blocks.

Bound by memory: each key and value of a sequence is read once for all queries of its key head, and one of the prefix
once for 4 x (16 / G) sequences. csrc/cuda/decode_attention.cu splits the keys over blocks until they fill the GPU.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from kernels.native import cuda
from kernels.ops.common import n_sms

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (64, 80, 96, 128)
WARPS, ROWS, PREFIX_TILE, LEAST_SPLIT = 4, 16, 64, 64  # of csrc/cuda/decode_attention.cu; keys of a split at least
BLOCKS_PER_SM = {64: 4, 80: 2, 96: 2, 128: 2}  # by head size: of 4 warps, whose registers fill an SM
IMPLS = ("auto", "ref", "cuda")


@dataclass(frozen=True)
class DecodeCache:
    """Keys and values in a cache: see the top of the file."""

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor  # (B,) int64, on the same device
    table: torch.Tensor | None = None
    prefix_k: torch.Tensor | None = None
    prefix_v: torch.Tensor | None = None

    def read(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values of one sequence, (n, K, D) each, in order."""
        own = []
        for kept, prefix in ((self.k, self.prefix_k), (self.v, self.prefix_v)):
            rows = kept[b] if self.table is None else kept[self.table[b].long()].flatten(0, 1)
            rows = rows[: int(self.lengths[b])]
            own.append(rows if prefix is None else torch.cat([prefix, rows]))
        return own[0], own[1]


# ---- reference ------------------------------------------------------------------------------------------------------


def decode_attention_ref(q: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
    """Return the attention (B, H, D) of q (B, H, D), in plain torch, in fp32 or fp64 if q is wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    for b in range(len(q)):
        k, v = (t.to(wide).repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in cache.read(b))
        if len(k):
            scores = torch.einsum("hd,jhd->hj", q[b].to(wide), k) / math.sqrt(q.shape[-1])
            out[b] = torch.einsum("hj,jhd->hd", scores.softmax(-1), v).to(q.dtype)
    return out


# ---- launch ---------------------------------------------------------------------------------------------------------


@cache
def _tickets(device: torch.device, n: int) -> torch.Tensor:
    """Return counters of finished blocks, 0 between launches. Calls on one stream share them."""
    return torch.zeros(n, dtype=torch.int32, device=device)


def make_launch(q: torch.Tensor, cache: DecodeCache) -> tuple[cuda.CudaLaunch, torch.Tensor]:
    """Return the launch, and the tensor (B, H, D) that it writes. The arguments are decode_attention's, checked."""
    batch, heads, dim = q.shape
    kv_heads, prefix = cache.k.shape[2], cache.prefix_k
    capacity = cache.k.shape[1] * (1 if cache.table is None else cache.table.shape[1])
    wanted = -(-BLOCKS_PER_SM[dim] * n_sms(q.device) // (batch * kv_heads))
    splits = max(1, min(wanted, -(-capacity // LEAST_SPLIT)))
    keys_a_split = -(-capacity // (splits * LEAST_SPLIT)) * LEAST_SPLIT
    splits = max(1, -(-capacity // max(1, keys_a_split)))
    n_prefix, tiles, parts = 0, 0, 0
    if prefix is not None and len(prefix):
        n_prefix, tiles = len(prefix), -(-batch // (ROWS // (heads // kv_heads)))
        parts = max(1, min(wanted, -(-n_prefix // PREFIX_TILE)))
    blocks = -(-tiles // WARPS) * kv_heads * parts
    partial = q.new_empty((parts + splits) * batch * heads * (dim + 2), dtype=torch.float32)
    out = q.new_empty(q.shape)
    strides = (0, 0) if prefix is None else (prefix.stride(0), prefix.stride(1))
    arguments: tuple[cuda.Argument, ...] = (
        q, out, q.stride(0), cache.k, cache.v, *cache.k.stride()[:3], prefix, cache.prefix_v, *strides, cache.table,
        cache.lengths, partial, _tickets(q.device, batch * kv_heads), batch, heads, kv_heads,
        0 if cache.table is None else cache.table.shape[1], cache.k.shape[1], n_prefix, parts, splits, keys_a_split,
        math.log2(math.e) / math.sqrt(dim), blocks,
    )  # fmt: skip
    dtype = DTYPES.index(q.dtype)
    name = ("13__nv_bfloat16", "6__half", "f")[dtype]
    group = heads // kv_heads
    shared = WARPS * group * (dim + 2) * 4
    if blocks and dtype < 2:
        shared = max(shared, PREFIX_TILE * ((2 * dim + 63) // 128 * 128 + 64 + 2 * dim + 16))
    launch = cuda.CudaLaunch(
        "decode_attention.cu", "cria_decode_attention", f"decodeI{name}Li{dim}E", arguments, (dtype, dim),
        (blocks + batch * kv_heads * splits,), WARPS * 32, shared,
    )  # fmt: skip
    return launch, out


# ---- public ---------------------------------------------------------------------------------------------------------


def _check(q: torch.Tensor, cache: DecodeCache) -> None:
    def refuse(got: str, wanted: str) -> None:
        raise ValueError(f"decode_attention: {got}, wanted {wanted}")

    k, heads, dim = cache.k, q.shape[1], q.shape[2]
    if q.dtype not in DTYPES or dim not in DIMS:
        refuse(f"q is {tuple(q.shape)} {q.dtype}", f"bf16, fp16 or fp32 and a head size of {DIMS}")
    if heads % k.shape[2] or heads // k.shape[2] > ROWS:
        refuse(f"{heads} query heads to {k.shape[2]} key heads", f"a whole group of at most {ROWS}")
    given = {"q": q, "k": k, "v": cache.v, "prefix_k": cache.prefix_k, "prefix_v": cache.prefix_v}
    for name, t in given.items():
        if t is None:
            continue
        if t.dtype != q.dtype or t.device != q.device or t.stride(-1) != 1 or t.shape[-1] != dim:
            refuse(f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}", f"rows of {dim} {q.dtype} on {q.device}")
        if t.data_ptr() % 16 or any(s * t.element_size() % 16 for s in t.stride()[:-1]):
            refuse(f"{name} begins at {t.data_ptr():#x} with strides {t.stride()}", "multiples of 16 bytes")
    if q.stride(1) != dim:
        refuse(f"q has strides {q.stride()}", "heads next to each other")
    pairs = ((k, cache.v), (cache.prefix_k, cache.prefix_v))
    layouts = [[None if t is None else (t.shape, t.stride()) for t in pair] for pair in pairs]
    if any(of_k != of_v for of_k, of_v in layouts):
        refuse("k and v differ", "equal shapes and strides")
    rows = len(k if cache.table is None else cache.table)
    if rows < len(q):
        refuse(f"a cache of {rows} sequences", f"{len(q)}, as many as there are queries")
    if cache.prefix_k is not None and cache.prefix_k.shape[1] != k.shape[2]:
        refuse(f"a prefix of {cache.prefix_k.shape[1]} key heads", f"{k.shape[2]}, as in k")
    if cache.table is not None and (cache.table.dtype != torch.int32 or not cache.table.is_contiguous()):
        refuse(f"the table is {cache.table.dtype}", "contiguous int32")
    if cache.table is not None and cache.table.shape[1] > 1 and k.shape[1] % ROWS:
        refuse(f"pages of {k.shape[1]} keys", f"a multiple of {ROWS}")
    if cache.lengths.dtype != torch.int64 or cache.lengths.shape != q.shape[:1] or not cache.lengths.is_contiguous():
        refuse(f"lengths are {tuple(cache.lengths.shape)} {cache.lengths.dtype}", f"({len(q)},) int64, contiguous")
    for name, t in {"lengths": cache.lengths, "table": cache.table}.items():
        if t is not None and t.device != q.device:
            refuse(f"{name} on {t.device}", f"all on {q.device}")


@torch.no_grad()
def decode_attention(q: torch.Tensor, cache: DecodeCache, impl: str = "auto") -> torch.Tensor:
    """Return the attention (B, H, D) of one query a sequence, q (B, H, D), to a cache.

    impl: "cuda" runs csrc/cuda/decode_attention.cu; "auto" and "ref" run the reference, until a GPU has measured it.
    Raises ValueError for shapes, strides and dtypes that the kernel does not take.
    """
    if impl not in IMPLS:
        raise ValueError(f"decode_attention: impl is {impl!r}, wanted one of {', '.join(IMPLS)}")
    if impl != "cuda":
        return decode_attention_ref(q, cache)
    _check(q, cache)
    if not len(q):
        return torch.empty_like(q)
    launch, out = make_launch(q, cache)
    cuda.run(launch)
    return out

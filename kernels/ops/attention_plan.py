"""The attention plan: packed documents cut into tiles and lists of blocks, on the host, once a micro-batch.

A tile is a fixed range of rows, whichever documents lie in it; each row carries the range of keys that it sees. For a
tile of queries the plan lists the blocks of keys that some of its rows see, and for a tile of keys the blocks of
queries that see some of its keys. A block is a (start, end) that holds only seen rows, so that no kernel multiplies
padding, whose NaN would survive a weight of zero. Blocks that every row of a tile sees in full are kept as ranges, not
in the lists.

Many documents read a prefix: 130 in an Alpaca micro-batch, against 2 to 3 for any other tile. If a tile of keys has
more blocks of queries than one program should walk, its list is cut into parts, each with a slot of a workspace.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels.ops import attention_hopper
from kernels.ops.common import choose_impl, launch_config, next_power_of_2

ALIGN = 32  # int32s: each section of the plan starts at a multiple of 128 bytes


class QueryDocuments(NamedTuple):
    """The reference's plan: the documents, and the rows whose queries are given."""

    documents: torch.Tensor  # (N, 4)
    query_rows: torch.Tensor  # (L,)


class AttentionPlan(NamedTuple):
    """The kernels' plan: int32 tensors on the device, views of one buffer. Lists of blocks end in a row of padding."""

    limits: torch.Tensor  # (4, Q), of Q queries: first own key, last own key + 1, prefix start, prefix end
    query_items: torch.Tensor  # (tiles of queries, 7): tile, listed lo and hi, full: prefix start, n, own start, n
    query_blocks: torch.Tensor  # (n + 1, 2) of keys: start * 2 + (read as a prefix), end
    seen: torch.Tensor  # (T,): 1 where some query sees the key
    key_items: torch.Tensor  # (tiles of keys + parts, 6): tile, listed lo and hi, full start, n, slot or -1
    key_blocks: torch.Tensor  # (n + 1, 2) of queries: start * 2 + (through a prefix), end
    splits: torch.Tensor  # (n, 3), tiles of keys in parts: tile, first slot, slots
    n_slots: int  # of the workspace
    n_rows: int  # keys
    head_dim: int  # the tiles are chosen for it
    hopper: tuple[torch.Tensor, torch.Tensor] | None = None  # items and blocks of kernels.ops.attention_hopper


def attention_plan(
    documents: torch.Tensor,
    n_rows: int,
    head_dim: int,
    device: torch.device | str,
    impl: str = "auto",
    query_rows: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> AttentionPlan | QueryDocuments | torch.Tensor:
    """Return the plan that attention() takes as `documents` in every layer of a micro-batch, without waiting for a GPU.

    documents: (N, 4) integers, on the CPU, see attention(). n_rows: T, of keys and values. query_rows: (L,),
    increasing, the rows whose queries will be given; None for all. dtype: of q. Returns a plan on the device (copied
    from pinned memory, without waiting), or for impl "ref" the documents on the CPU, with the query rows if there are
    any.
    Raises ValueError if documents are out of order, overlap or reach outside the rows, if a prefix does not end before
    its document, and if query_rows do not increase within the rows.
    """
    device = torch.device(device)
    documents = documents.detach().cpu()
    check_documents(documents, n_rows)
    if query_rows is not None:
        query_rows = query_rows.detach().cpu().long()
        if query_rows.ndim != 1 or (torch.diff(query_rows, prepend=query_rows.new_tensor([-1])) < 1).any():
            raise ValueError("attention: query_rows must be one axis of rows that increase from 0 or more; sort them")
        if len(query_rows) and query_rows[-1] >= n_rows:
            raise ValueError(f"attention: query_rows reach {query_rows[-1].item()}, wanted less than {n_rows} rows")
    if impl == "cuda":
        return make_plan(documents, n_rows, head_dim, device, query_rows, hopper=True)
    chosen = choose_impl("attention", impl, torch.empty(0, dtype=dtype, device=device), has_native=True)
    if chosen == "ref":
        return documents if query_rows is None else QueryDocuments(documents, query_rows)
    make = make_native_plan if chosen == "native" else make_plan
    return make(documents, n_rows, head_dim, device, query_rows)


def make_native_plan(
    documents: torch.Tensor, n_rows: int, head_dim: int, device: torch.device, query_rows: torch.Tensor | None = None
) -> AttentionPlan:
    """Return the plan of csrc/cpu, which needs the limits of each query only; all other tensors are empty."""
    rows_with_queries = np.arange(n_rows) if query_rows is None else query_rows.numpy()
    located = locate_queries(documents.numpy().astype(np.int64), rows_with_queries)
    limits = torch.from_numpy(find_limits(located, rows_with_queries).astype(np.int32))
    none = torch.empty(0, dtype=torch.int32)
    return AttentionPlan(limits, none, none, none, none, none, none, 0, n_rows, head_dim)


def make_plan(
    documents: torch.Tensor, n_rows: int, head_dim: int, device: torch.device, query_rows: torch.Tensor | None = None,
    hopper: bool = False,
) -> AttentionPlan:  # fmt: skip
    """Return the kernels' plan of documents that are known to be valid. hopper: with csrc/cuda's lists too."""
    rows_with_queries = np.arange(n_rows) if query_rows is None else query_rows.numpy()
    lists, n_slots = build_lists(
        documents.numpy().astype(np.int64), n_rows, rows_with_queries, tile_sizes(head_dim, device)
    )
    if hopper:
        located = locate_queries(documents.numpy().astype(np.int64), rows_with_queries)
        size = attention_hopper.rows_of_item(head_dim)
        items, blocks = list_query_tiles(located, rows_with_queries, size, attention_hopper.KEYS)
        lists = (*lists, items, attention_hopper.flag_blocks(items, blocks, lists[0], lists[3], size))
    limits, query_items, query_blocks, seen, key_items, key_blocks, splits, *more = copy_to_device(lists, device)
    return AttentionPlan(
        limits, query_items, query_blocks, seen, key_items, key_blocks, splits, n_slots, n_rows, head_dim,
        (more[0], more[1]) if hopper else None,
    )  # fmt: skip


def check_documents(documents: torch.Tensor, n_rows: int) -> None:
    """Raise ValueError for documents that attention cannot be planned for."""
    if documents.ndim != 2 or documents.shape[1] != 4 or documents.is_floating_point():
        raise ValueError(f"attention: documents is {tuple(documents.shape)} {documents.dtype}, wanted (N, 4) integers")
    start, end, prefix_start, prefix_end = documents.numpy().astype(np.int64).T
    before = np.concatenate(([0], end[:-1]))[: len(end)]
    wrong = (start < before) | (end < start) | (end > n_rows)
    wrong |= (prefix_start < 0) | (prefix_end < prefix_start) | (prefix_end > start)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"attention: documents[{i}] is {documents[i].tolist()}, wanted (start, end, prefix start, prefix end) with "
            f"{before[i]} <= start <= end <= {n_rows} (in order, not overlapping) and a prefix of rows before the start"
        )


class TileSizes(NamedTuple):
    """The rows of the kernels' tiles and blocks."""

    query_tile: int  # of the kernels over tiles of queries
    key_block: int
    query_block: int  # of the kernel over tiles of keys
    key_tile: int
    part: int  # the most blocks of queries that one program walks for a tile of keys


def tile_sizes(head_dim: int, device: torch.device) -> TileSizes:
    """Return the sizes that the launch tables hold for this head width."""
    block_d = max(16, next_power_of_2(head_dim))
    forward, keys = (launch_config("attention", kernel, device, block_d) for kernel in ("forward", "dkdv"))
    return TileSizes(forward["BLOCK_M"], forward["BLOCK_N"], keys["BLOCK_M"], keys["BLOCK_N"], keys["part"])


def copy_to_device(sections: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Return the arrays as int32 tensors on the device, in one copy."""
    places = np.cumsum([0] + [-(-section.size // ALIGN) * ALIGN for section in sections]).tolist()
    buffer = torch.zeros(places[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    for section, place in zip(sections, places, strict=False):
        buffer.numpy()[place : place + section.size] = section.ravel()
    buffer = buffer.to(device, non_blocking=True)
    return [
        buffer[place : place + section.size].view(section.shape)
        for section, place in zip(sections, places, strict=False)
    ]


# ---- the lists, vectorised ------------------------------------------------------------------------------------------


def build_lists(
    documents: np.ndarray, n_rows: int, query_rows: np.ndarray, sizes: TileSizes
) -> tuple[tuple[np.ndarray, ...], int]:
    """Return the tensors of AttentionPlan as arrays, and n_slots. query_rows: (Q,) increasing."""
    query_tile, key_block, query_block, key_tile, part = sizes
    documents = locate_queries(documents, query_rows)
    limits = find_limits(documents, query_rows)
    queries = list_query_tiles(documents, query_rows, query_tile, key_block)
    *keys, n_slots = list_key_tiles(documents, query_rows, n_rows, query_block, key_tile, part)
    changes = np.zeros(n_rows + 1, np.int64)
    np.add.at(changes, documents[:, [0, 2]], 1)
    np.add.at(changes, documents[:, [1, 3]], -1)
    return (limits, *queries, np.cumsum(changes)[:-1] > 0, *keys), n_slots


def locate_queries(documents: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
    """Return the documents that hold queries, (N, 6): with two columns more, the first query and the last one + 1."""
    first_query, last_query = (np.searchsorted(query_rows, documents[:, i]) for i in (0, 1))
    return np.column_stack((documents, first_query, last_query))[first_query < last_query]


def find_limits(documents: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
    """Return the keys that each query sees, AttentionPlan.limits. documents: (N, 6) of locate_queries()."""
    limits = np.zeros((4, len(query_rows)), np.int64)
    queries_in_documents = concatenate_ranges(documents[:, 4], documents[:, 5] - documents[:, 4])
    document_of = np.repeat(np.arange(len(documents)), documents[:, 5] - documents[:, 4])
    limits[:, queries_in_documents] = (
        documents[document_of, 0],
        query_rows[queries_in_documents] + 1,
        documents[document_of, 2],
        documents[document_of, 3],
    )
    return limits


def concatenate_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return arange(start, start + length) of each pair, joined into one array."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def find_tiles_of_intervals(lo: np.ndarray, hi: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays, an interval's index and a tile of `size` rows that it overlaps, for each such pair.

    Intervals must not be empty.
    """
    n = (hi - 1) // size - lo // size + 1
    return np.repeat(np.arange(len(lo)), n), concatenate_ranges(lo // size, n)


def merge_intervals(
    tile: np.ndarray, lo: np.ndarray, hi: np.ndarray, joined: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return intervals (tile, lo, hi) in which each joined one is merged with the one before."""
    firsts = np.flatnonzero(~joined)
    return (tile[firsts], lo[firsts], np.maximum.reduceat(hi, firsts)) if len(firsts) else (tile, lo, hi)


def continues_tile(tile: np.ndarray) -> np.ndarray:
    """Return for each interval whether it lies in the tile of the one before."""
    return np.concatenate(([False], tile[1:] == tile[:-1]))[: len(tile)]


def list_blocks(
    own: Sequence[np.ndarray], prefix: Sequence[np.ndarray], size: int, n_tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks of both kinds of intervals (tile, lo, hi), sorted by tile, and each list's start."""
    tile, lo, hi = (np.concatenate(pair) for pair in zip(own, prefix, strict=True))
    kind = np.repeat((0, 1), (len(own[0]), len(prefix[0])))
    n = -(-(hi - lo) // size)
    interval_of = np.repeat(np.arange(len(n)), n)
    start = lo[interval_of] + size * concatenate_ranges(np.zeros_like(n), n)
    order = np.argsort(tile[interval_of], kind="stable")
    blocks = np.column_stack((start * 2 + kind[interval_of], np.minimum(start + size, hi[interval_of])))[order]
    places = np.searchsorted(tile[interval_of][order], np.arange(n_tiles + 1))
    return np.concatenate((blocks, np.zeros((1, 2), np.int64))), places


def list_query_tiles(
    documents: np.ndarray, query_rows: np.ndarray, size: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return query_items and query_blocks: the keys each tile of `size` queries sees, in blocks of `block` keys."""
    n_queries = len(query_rows)
    n_tiles = -(-n_queries // size)
    document_of, tile = find_tiles_of_intervals(documents[:, 4], documents[:, 5], size)
    start, end, prefix_start, prefix_end, first_query, last_query = documents[document_of].T
    first_query, last_query = np.maximum(first_query, tile * size), np.minimum(last_query, (tile + 1) * size)
    # Blocks that every row sees exist only if each row lies in a document: rows of no document must stay masked.
    rows = np.minimum((np.arange(n_tiles) + 1) * size, n_queries) - np.arange(n_tiles) * size
    covered = (np.bincount(tile, last_query - first_query, n_tiles) == rows)[tile]
    is_single = np.bincount(tile, minlength=n_tiles)[tile] == 1
    n_own = np.where(covered & is_single, (query_rows[first_query] + 1 - start) // block, 0)
    is_prefix_shared = covered.copy()
    if len(tile):
        firsts = np.flatnonzero(~continues_tile(tile))
        runs = np.diff(np.append(firsts, len(tile)))
        for bound in (prefix_start, prefix_end):
            is_prefix_shared &= np.repeat(
                np.minimum.reduceat(bound, firsts) == np.maximum.reduceat(bound, firsts), runs
            )
    n_prefix = np.where(is_prefix_shared, (prefix_end - prefix_start) // block, 0)
    # Own keys: neighbours are joined even across keys that no given query sees, since these belong to a document.
    own = merge_intervals(
        tile, start + n_own * block, query_rows[last_query - 1] + 1,
        continues_tile(tile) & (start == np.concatenate(([-1], end[:-1]))[: len(end)]),
    )  # fmt: skip
    # Prefixes: the union of a tile's, since several documents read one prefix.
    lo, order = prefix_start + n_prefix * block, np.lexsort((prefix_start, tile))
    order = order[(lo < prefix_end)[order]]
    at, lo, hi = tile[order], lo[order], prefix_end[order]
    offset = at * (1 << 32)  # keeps one tile's running maximum out of the next's
    reach = np.concatenate(([-1], np.maximum.accumulate(hi + offset)[:-1]))[: len(at)]
    blocks, places = list_blocks(own, merge_intervals(at, lo, hi, lo + offset <= reach), block, n_tiles)
    full = np.zeros((n_tiles, 4), np.int64)
    full[tile] = np.column_stack(
        (prefix_start, n_prefix, start, n_own)
    )  # equal for all documents of a tile wherever n is not 0
    items = np.column_stack((np.arange(n_tiles), places[:-1], places[1:], full))
    return items[np.argsort(-(np.diff(places) + full[:, 1] + full[:, 3]), kind="stable")], blocks


def list_key_tiles(
    documents: np.ndarray, query_rows: np.ndarray, n_rows: int, block: int, size: int, part: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return key_items, key_blocks, splits, n_slots: the queries that see each tile of `size` keys, in blocks."""
    n_tiles = -(-n_rows // size)
    document_of, tile = find_tiles_of_intervals(documents[:, 0], documents[:, 1], size)
    start, end, _, _, _, last_query = documents[document_of].T
    tile_end = np.minimum((tile + 1) * size, n_rows)
    first_query = np.searchsorted(query_rows, np.maximum(start, tile * size))
    seeing_all = np.maximum(np.searchsorted(query_rows, tile_end - 1), first_query)
    inside = (start <= tile * size) & (tile_end <= end)
    n_full = np.where(inside, np.maximum(last_query - seeing_all, 0) // block, 0)
    full = np.zeros((n_tiles, 2), np.int64)
    full[tile[inside]] = np.column_stack((last_query - n_full * block, n_full))[inside]
    keep = first_query < last_query
    tile, lo, hi = tile[keep], first_query[keep], (last_query - n_full * block)[keep]
    # Blocks of queries never hold rows of no document: intervals are joined only where they touch.
    own = merge_intervals(tile, lo, hi, continues_tile(tile) & (lo == np.concatenate(([-1], hi[:-1]))[: len(hi)]))
    readers = documents[documents[:, 2] < documents[:, 3]]
    reader_of, tile = find_tiles_of_intervals(readers[:, 2], readers[:, 3], size)
    order = np.lexsort((reader_of, tile))
    tile, (lo, hi) = tile[order], readers[reader_of[order], 4:].T
    prefix = merge_intervals(tile, lo, hi, continues_tile(tile) & (lo == np.concatenate(([-1], hi[:-1]))[: len(hi)]))
    blocks, places = list_blocks(own, prefix, block, n_tiles)
    n = np.diff(places)
    parts = np.maximum(1, -(-n // part))
    tile_of, index = np.repeat(np.arange(n_tiles), parts), concatenate_ranges(np.zeros_like(parts), parts)
    length = -(-n // parts)[tile_of]
    lo = places[tile_of] + index * length
    hi = np.minimum(lo + length, places[tile_of + 1])
    slots = np.where(parts > 1, parts, 0)
    first_slot = np.cumsum(slots) - slots
    slot = np.where(parts[tile_of] > 1, first_slot[tile_of] + index, -1)
    full = np.where(index[:, None] == 0, full[tile_of], 0)  # full blocks belong to the first part
    items = np.column_stack((tile_of, lo, hi, full, slot))
    splits = np.column_stack((np.arange(n_tiles), first_slot, slots))[parts > 1]
    items = items[np.argsort(-(hi - lo + full[:, 1]), kind="stable")]  # longest first: they end together
    return items, blocks, splits, int(slots.sum())

"""What attention's kernels work on: packed documents cut into tiles and lists of blocks, on the host, once a batch.

A tile is a fixed range of rows, whatever documents lie in it; every row carries the range of keys that it sees. For a
tile of queries the plan lists the blocks of keys that some of its rows see, and for a tile of keys the blocks of
queries that see some of it. A block is a (start, end) that holds seen rows alone, so that no kernel ever multiplies
padding, whose NaN would survive a weight of zero. Blocks seen whole by a whole tile stay out of the lists, as ranges.

A prefix is read by many documents: 130 in an Alpaca micro-batch, against 2 to 3 for any other tile. Where a tile of
keys has more blocks of queries than one program should walk, the list is cut into parts, each with a slot of a
workspace.
"""

from typing import NamedTuple

import numpy as np
import torch

from kernels.ops.common import choose, launch_config, next_power_of_2

ALIGN = 32  # int32s: each section of the plan starts at a multiple of 128 bytes


class QueryDocuments(NamedTuple):
    """The documents, and the rows whose queries are given: what the reference takes for a plan."""

    documents: torch.Tensor  # (N, 4)
    query_rows: torch.Tensor  # (L,)


class AttentionPlan(NamedTuple):
    """int32 tensors on the device, views of one buffer. Q queries; a list of blocks ends in one row that is padding."""

    limits: torch.Tensor  # (4, Q): each query's first own key, last own key + 1, prefix start, prefix end
    query_items: torch.Tensor  # (tiles of queries, 7): tile, listed lo and hi, full: prefix start, n, own start, n
    query_blocks: torch.Tensor  # (n + 1, 2) of keys: start * 2 + (read as a prefix), end
    seen: torch.Tensor  # (T,): 1 where some query sees the key
    key_items: torch.Tensor  # (tiles of keys + parts, 6): tile, listed lo and hi, full start, n, slot or -1
    key_blocks: torch.Tensor  # (n + 1, 2) of queries: start * 2 + (through a prefix), end
    splits: torch.Tensor  # (n, 3), tiles of keys in parts: tile, first slot, slots
    n_slots: int
    n_rows: int  # keys
    head_dim: int  # that the tiles were chosen for


def attention_plan(
    documents: torch.Tensor,
    n_rows: int,
    head_dim: int,
    device: torch.device | str,
    impl: str = "auto",
    query_rows: torch.Tensor | None = None,
) -> AttentionPlan | QueryDocuments | torch.Tensor:
    """What attention() takes for `documents` in every layer of a micro-batch, so that none waits for the device.

    documents: (N, 4) integers, on the CPU, see attention(). n_rows: T, of keys and values. query_rows: (L,),
    increasing, the rows whose queries will be given; None for all. Returns a plan on the device (copied from pinned
    memory, without waiting), or for impl "ref" the documents on the CPU, with the query rows if there are any.
    Raises ValueError where documents are out of order, overlap or reach outside the rows, where a prefix does not end
    before its document, and where query_rows do not increase within the rows.
    """
    device = torch.device(device)
    documents = documents.detach().cpu()
    check(documents, n_rows)
    if query_rows is not None:
        query_rows = query_rows.detach().cpu().long()
        if query_rows.ndim != 1 or (torch.diff(query_rows, prepend=query_rows.new_tensor([-1])) < 1).any():
            raise ValueError("attention: query_rows must be one axis of rows that increase from 0 or more; sort them")
        if len(query_rows) and query_rows[-1] >= n_rows:
            raise ValueError(f"attention: query_rows reach {query_rows[-1].item()}, wanted less than {n_rows} rows")
    # Which impl depends on the device; a dtype that has no kernels (fp64) has none on CUDA either.
    if choose("attention", impl, torch.empty(0, device=device)) == "ref":
        return documents if query_rows is None else QueryDocuments(documents, query_rows)
    return plan(documents, n_rows, head_dim, device, query_rows)


def plan(documents, n_rows, head_dim, device, query_rows=None):
    """The AttentionPlan of checked documents."""
    query_rows = np.arange(n_rows) if query_rows is None else query_rows.numpy()
    sections, n_slots = build(documents.numpy().astype(np.int64), n_rows, query_rows, tiles(head_dim, device))
    return AttentionPlan(*to_device(sections, device), n_slots, n_rows, head_dim)


def check(documents, n_rows):
    """Raises ValueError for documents that attention cannot be planned for."""
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


def tiles(head_dim, device):
    """BLOCK_M and BLOCK_N of the kernels over queries, of the one over keys, and the most blocks that a part walks."""
    block_d = max(16, next_power_of_2(head_dim))
    forward, keys = (launch_config("attention", kernel, device, block_d) for kernel in ("forward", "dkdv"))
    return forward["BLOCK_M"], forward["BLOCK_N"], keys["BLOCK_M"], keys["BLOCK_N"], keys["part"]


def to_device(sections, device):
    """The arrays as int32 tensors on the device, in one copy."""
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


def build(documents, n_rows, query_rows, tiles):
    """The tensors of AttentionPlan as arrays, and n_slots. query_rows: (Q,) increasing."""
    block_m, block_n, key_block_m, key_block_n, part = tiles
    first_query, last_query = (np.searchsorted(query_rows, documents[:, i]) for i in (0, 1))
    documents = np.column_stack((documents, first_query, last_query))[first_query < last_query]  # that ask anything
    limits = np.zeros((4, len(query_rows)), np.int64)
    asked = spans(documents[:, 4], documents[:, 5] - documents[:, 4])
    of = np.repeat(np.arange(len(documents)), documents[:, 5] - documents[:, 4])
    limits[:, asked] = documents[of, 0], query_rows[asked] + 1, documents[of, 2], documents[of, 3]
    queries = over_queries(documents, query_rows, block_m, block_n)
    *keys, n_slots = over_keys(documents, query_rows, n_rows, key_block_m, key_block_n, part)
    changes = np.zeros(n_rows + 1, np.int64)
    np.add.at(changes, documents[:, [0, 2]], 1)
    np.add.at(changes, documents[:, [1, 3]], -1)
    return (limits, *queries, np.cumsum(changes)[:-1] > 0, *keys), n_slots


def spans(starts, lengths):
    """arange(start, start + length) of each, one after another."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def tiles_of(lo, hi, size):
    """Every (interval, tile of `size` rows that it reaches into); intervals are not empty."""
    n = (hi - 1) // size - lo // size + 1
    return np.repeat(np.arange(len(lo)), n), spans(lo // size, n)


def merge(tile, lo, hi, joined):
    """Each run of intervals that are joined to the one before, as one."""
    firsts = np.flatnonzero(~joined)
    return (tile[firsts], lo[firsts], np.maximum.reduceat(hi, firsts)) if len(firsts) else (tile, lo, hi)


def after(tile):
    """Whether an interval has the tile of the one before."""
    return np.concatenate(([False], tile[1:] == tile[:-1]))[: len(tile)]


def listed(own, prefix, size, n_tiles):
    """The intervals (tile, lo, hi) of both kinds cut into blocks, sorted by tile, and where each tile's list starts."""
    tile, lo, hi = (np.concatenate(pair) for pair in zip(own, prefix, strict=True))
    kind = np.repeat((0, 1), (len(own[0]), len(prefix[0])))
    n = -(-(hi - lo) // size)
    of = np.repeat(np.arange(len(n)), n)
    start = lo[of] + size * spans(np.zeros_like(n), n)
    order = np.argsort(tile[of], kind="stable")
    blocks = np.column_stack((start * 2 + kind[of], np.minimum(start + size, hi[of])))[order]
    places = np.searchsorted(tile[of][order], np.arange(n_tiles + 1))
    return np.concatenate((blocks, np.zeros((1, 2), np.int64))), places


def over_queries(documents, query_rows, size, block):
    """query_items and query_blocks: the keys that each tile of `size` queries sees, in blocks of `block` keys."""
    n_queries = len(query_rows)
    n_tiles = -(-n_queries // size)
    of, tile = tiles_of(documents[:, 4], documents[:, 5], size)
    start, end, prefix_start, prefix_end, first_query, last_query = documents[of].T
    first_query, last_query = np.maximum(first_query, tile * size), np.minimum(last_query, (tile + 1) * size)
    # Seen by every row: only where no row is of no document, as those must stay masked.
    rows = np.minimum((np.arange(n_tiles) + 1) * size, n_queries) - np.arange(n_tiles) * size
    covered = (np.bincount(tile, last_query - first_query, n_tiles) == rows)[tile]
    alone = np.bincount(tile, minlength=n_tiles)[tile] == 1
    n_own = np.where(covered & alone, (query_rows[first_query] + 1 - start) // block, 0)
    same = covered.copy()
    if len(tile):
        firsts = np.flatnonzero(~after(tile))
        runs = np.diff(np.append(firsts, len(tile)))
        for bound in (prefix_start, prefix_end):
            same &= np.repeat(np.minimum.reduceat(bound, firsts) == np.maximum.reduceat(bound, firsts), runs)
    n_prefix = np.where(same, (prefix_end - prefix_start) // block, 0)
    # The own keys: neighbours are joined across keys that no query given here sees, as those are a document's.
    own = merge(
        tile, start + n_own * block, query_rows[last_query - 1] + 1,
        after(tile) & (start == np.concatenate(([-1], end[:-1]))[: len(end)]),
    )  # fmt: skip
    # The prefixes of a tile: their union, as several documents have the same.
    lo, order = prefix_start + n_prefix * block, np.lexsort((prefix_start, tile))
    order = order[(lo < prefix_end)[order]]
    at, lo, hi = tile[order], lo[order], prefix_end[order]
    offset = at * (1 << 32)  # keeps one tile's running maximum out of the next's
    reach = np.concatenate(([-1], np.maximum.accumulate(hi + offset)[:-1]))[: len(at)]
    blocks, places = listed(own, merge(at, lo, hi, lo + offset <= reach), block, n_tiles)
    full = np.zeros((n_tiles, 4), np.int64)
    full[tile] = np.column_stack((prefix_start, n_prefix, start, n_own))  # alike in a tile wherever n is not 0
    items = np.column_stack((np.arange(n_tiles), places[:-1], places[1:], full))
    return items[np.argsort(-(np.diff(places) + full[:, 1] + full[:, 3]), kind="stable")], blocks


def over_keys(documents, query_rows, n_rows, block, size, part):
    """key_items, key_blocks, splits, n_slots: the queries that see each tile of `size` keys, in blocks of `block`."""
    n_tiles = -(-n_rows // size)
    of, tile = tiles_of(documents[:, 0], documents[:, 1], size)
    start, end, _, _, _, last_query = documents[of].T
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
    own = merge(tile, lo, hi, after(tile) & (lo == np.concatenate(([-1], hi[:-1]))[: len(hi)]))
    readers = documents[documents[:, 2] < documents[:, 3]]
    of, tile = tiles_of(readers[:, 2], readers[:, 3], size)
    order = np.lexsort((of, tile))
    tile, lo, hi = tile[order], *readers[of[order], 4:].T
    prefix = merge(tile, lo, hi, after(tile) & (lo == np.concatenate(([-1], hi[:-1]))[: len(hi)]))
    blocks, places = listed(own, prefix, block, n_tiles)
    n = np.diff(places)
    parts = np.maximum(1, -(-n // part))
    of, index = np.repeat(np.arange(n_tiles), parts), spans(np.zeros_like(parts), parts)
    length = -(-n // parts)[of]
    lo = places[of] + index * length
    hi = np.minimum(lo + length, places[of + 1])
    slots = np.where(parts > 1, parts, 0)
    first_slot = np.cumsum(slots) - slots
    slot = np.where(parts[of] > 1, first_slot[of] + index, -1)
    full = np.where(index[:, None] == 0, full[of], 0)  # the first part takes what all the tile sees
    items = np.column_stack((of, lo, hi, full, slot))
    splits = np.column_stack((np.arange(n_tiles), first_slot, slots))[parts > 1]
    items = items[np.argsort(-(hi - lo + full[:, 1]), kind="stable")]  # longest first: they end together
    return items, blocks, splits, int(slots.sum())

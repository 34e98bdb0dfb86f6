"""Attention in plain torch: the reference, and the operators of kernels.ops.attention on CPU tensors.

The reference goes from document to document, and autograd differentiates it. forward_cpu and backward_cpu have the
signatures of the operators: they take a plan and compute whole matrices of scores under its limits.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.ops.rope import unrotate

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


SHORT = 1 << 19  # queries times keys of a document, up to which a CPU computes the formula as it is written


@functools.lru_cache(maxsize=64)
def _causal(n, m):
    """Return (n, m): 0 where one of the last n of m positions sees a key, else -inf; 2 MB at most."""
    return torch.full((n, m), -math.inf).triu_(m - n + 1)


def _attend_short(q, k, v, rows):
    # torch's fused attention on a CPU runs its backward at 18 GFLOP/s in documents of 127 tokens; bmm at 80.
    (n, heads, dim), (m, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    bias = _causal(n, m) if rows is None else torch.zeros(n, m).masked_fill_(torch.arange(m) > rows[:, None], -math.inf)
    q, k, v = (t.float() for t in (q, k, v))
    q = q.view(n, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * n, dim)
    p = torch.baddbmm(bias.repeat(group, 1), q, k.permute(1, 2, 0), alpha=1 / math.sqrt(dim)).softmax(-1)
    return torch.bmm(p, v.transpose(0, 1)).view(kv_heads, group, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the attention of one document, (n, H, Dh).

    k, v: (m, K, Dh), of m positions. q: (n, H, Dh), of the positions `rows` (n,), or of the last n if rows is None.
    """
    n, m = q.shape[0], k.shape[0]
    if q.device.type == "cpu" and n * m <= SHORT and q.dtype in (torch.float32, torch.bfloat16):
        return _attend_short(q, k, v, rows).type_as(q)
    group = q.shape[1] // k.shape[1]  # query heads to a key head
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    if n == m:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        rows = torch.arange(m - n, m, device=q.device) if rows is None else rows.to(q.device)
        mask = torch.arange(m, device=q.device) <= rows[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    query_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention() in plain torch, document by document. Rows of no document come out as zeros."""
    n_rows = len(k)
    rows_before = torch.arange(n_rows + 1)
    if query_rows is not None:
        rows_before = torch.searchsorted(query_rows, rows_before)
    places = rows_before.tolist()  # row -> how many of the queries come before it
    bounds: list = []  # (start, end, prefix start, prefix end) of documents, (start, end) of rows between them
    row = 0
    for document in documents.tolist():
        bounds += [(row, document[0]), document]
        row = document[1]
    bounds.append((row, n_rows))
    # split, not slices: autograd then joins the gradients once, instead of adding a zero-filled tensor for each slice.
    lengths = [b[1] - b[0] for b in bounds]
    pieces = zip(
        bounds, q.split([places[b[1]] - places[b[0]] for b in bounds]), k.split(lengths), v.split(lengths), strict=True
    )
    out = []
    for (start, end, *prefix), queries, keys, values in pieces:
        if not prefix or not len(queries):
            out.append(torch.zeros_like(queries))
            continue
        rows = None if query_rows is None else query_rows[places[start] : places[end]] - start
        if prefix[1] > prefix[0]:
            keys = torch.cat((k[slice(*prefix)], keys))
            values = torch.cat((v[slice(*prefix)], values))
            rows = None if rows is None else rows + prefix[1] - prefix[0]
        out.append(attend(queries, keys, values, rows))
    return torch.cat(out)


# ---- the operators, on CPU tensors ----------------------------------------------------------------------------------


def _seen(limits, n_rows):
    """Return which keys the limits let each query see, (Q, T) bool."""
    keys = torch.arange(n_rows, device=limits.device)
    first, last, prefix, prefix_end = limits[:, :, None]
    return (keys >= first) & (keys < last) | (keys >= prefix) & (keys < prefix_end)


def _keys(x, seen, q):
    """Return x (T, K, Dh) in fp32 for every head of q, with zeros for rows that no query sees, which may hold NaN."""
    return x.float().masked_fill(~seen.any(0)[:, None, None], 0).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _queries(x, seen):
    """Return x (Q, H, Dh) in fp32, with zeros for queries that see nothing."""
    return x.float().masked_fill(~seen.any(1)[:, None, None], 0)


def _softmax(q, k, seen):
    """Return the softmax (H, Q, T) and its lse (H, Q) to the base 2; zeros and infinity for a row that sees nothing."""
    s = torch.einsum("ihd,jhd->hij", _queries(q, seen), _keys(k, seen, q)) / math.sqrt(q.shape[-1])
    s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1).masked_fill(~seen.any(1), math.inf)
    return (s - lse[..., None]).exp(), lse / math.log(2)


def forward_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    limits: torch.Tensor,
    query_items: torch.Tensor,
    query_blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the operator attention_forward in plain torch."""
    seen = _seen(limits, len(k))
    p, lse = _softmax(q, k, seen)
    return torch.einsum("hij,jhd->ihd", p, _keys(v, seen, q)).type_as(q), lse


def backward_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    limits: torch.Tensor,
    query_items: torch.Tensor,
    query_blocks: torch.Tensor,
    seen: torch.Tensor,
    key_items: torch.Tensor,
    key_blocks: torch.Tensor,
    splits: torch.Tensor,
    n_slots: int,
    angles: Sequence[torch.Tensor],
) -> None:
    """Compute the operator attention_backward in plain torch: write dq, dk and dv."""
    seen = _seen(limits, len(k))
    p, _ = _softmax(q, k, seen)
    do = _queries(do, seen)
    dp = torch.einsum("ihd,jhd->hij", do, _keys(v, seen, q))
    ds = p * (dp - (do * o).sum(-1).T[..., None]) / math.sqrt(q.shape[-1])
    dq.copy_(torch.einsum("hij,jhd->ihd", ds, _keys(k, seen, q)))
    by_group = (len(k), k.shape[1], -1, k.shape[2])
    dk.copy_(torch.einsum("hij,ihd->jhd", ds, _queries(q, seen)).reshape(by_group).sum(2))
    dv.copy_(torch.einsum("hij,ihd->jhd", p, do).reshape(by_group).sum(2))
    unrotate(dq, dk, angles)

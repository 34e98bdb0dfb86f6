"""Attention in plain torch: the reference, and what the operators of kernels.attention do on CPU tensors.

The reference goes from document to document and is differentiated by autograd. The operators' twins have their
signatures: they take the limits of a plan, and softmax a whole matrix of scores under them.
"""

import functools
import math

import torch
import torch.nn.functional as F

# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


SHORT = 1 << 19  # queries times keys of a document, up to which a CPU takes the formula as it is written


@functools.lru_cache(maxsize=64)
def _causal(n, m):
    """(n, m): 0 where the last n of m positions see, -inf after them; 2 MB at most."""
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


def attend(q, k, v, rows=None):
    """One document: q (n, H, Dh) are the last n of the m positions whose keys and values are k, v (m, K, Dh), or those
    at the positions `rows` (n,)."""
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


def attention_ref(q, k, v, documents, query_rows=None):
    n_rows = len(k)
    places = torch.arange(n_rows + 1)
    places = places if query_rows is None else torch.searchsorted(query_rows, places)
    places = places.tolist()  # row -> how many of the queries come before it
    bounds, row = [], 0  # (start, end, prefix start, prefix end), the rows of no document among them as (start, end)
    for document in documents.tolist():
        bounds += [(row, document[0]), document]
        row = document[1]
    bounds.append((row, n_rows))
    # Split, not sliced: autograd then joins the pieces' gradients once instead of adding a zero-filled whole for each.
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
    """(Q, T) bool: which keys the limits let each query see."""
    keys = torch.arange(n_rows, device=limits.device)
    first, last, prefix, prefix_end = limits[:, :, None]
    return (keys >= first) & (keys < last) | (keys >= prefix) & (keys < prefix_end)


def _keys(x, seen, q):
    """x (T, K, Dh) in fp32 for every head of q; zeros where no query looks, whatever is there."""
    return x.float().masked_fill(~seen.any(0)[:, None, None], 0).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _queries(x, seen):
    """x (Q, H, Dh) in fp32; zeros where a query sees nothing."""
    return x.float().masked_fill(~seen.any(1)[:, None, None], 0)


def _softmax(q, k, seen):
    """(H, Q, T) and its lse (H, Q) to the base 2; zeros and infinity for a row that sees nothing."""
    s = torch.einsum("ihd,jhd->hij", _queries(q, seen), _keys(k, seen, q)) / math.sqrt(q.shape[-1])
    s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1).masked_fill(~seen.any(1), math.inf)
    return (s - lse[..., None]).exp(), lse / math.log(2)


def forward_cpu(q, k, v, limits, query_items, query_blocks):
    seen = _seen(limits, len(k))
    p, lse = _softmax(q, k, seen)
    return torch.einsum("hij,jhd->ihd", p, _keys(v, seen, q)).type_as(q), lse


def backward_cpu(
    q, k, v, o, lse, do, dq, dk, dv, limits, query_items, query_blocks, seen, key_items, key_blocks, splits, n_slots
):
    seen = _seen(limits, len(k))
    p, _ = _softmax(q, k, seen)
    do = _queries(do, seen)
    dp = torch.einsum("ihd,jhd->hij", do, _keys(v, seen, q))
    ds = p * (dp - (do * o).sum(-1).T[..., None]) / math.sqrt(q.shape[-1])
    dq.copy_(torch.einsum("hij,jhd->ihd", ds, _keys(k, seen, q)))
    by_group = (len(k), k.shape[1], -1, k.shape[2])
    dk.copy_(torch.einsum("hij,ihd->jhd", ds, _queries(q, seen)).reshape(by_group).sum(2))
    dv.copy_(torch.einsum("hij,ihd->jhd", p, do).reshape(by_group).sum(2))

"""Causal attention over packed documents, with grouped queries and an optional shared prefix.

    o_i = sum_j softmax_j(q_i k_j / sqrt(Dh)) v_j        j over the document's prefix, then over its own rows up to i

T rows hold documents back to back; none sees another, except that a document may name earlier rows as its prefix.
Rows that belong to no document (padding) come out as zeros. Softmax in fp32.
Source: arXiv:2205.14135; GQA as arXiv:2305.13245.
"""

import torch
import torch.nn.functional as F

from kernels.common import choose


def attend(q, k, v):
    """One document: q (n, H, Dh) are the last n of the m positions whose keys and values are k, v (m, K, Dh)."""
    n, m = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]  # query heads to a key head
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    if n == m:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)


def attention_ref(q, k, v, documents):
    bounds, row = [], 0  # (start, end, prefix start, prefix end), the rows of no document among them as (start, end)
    for document in documents.tolist():
        bounds += [(row, document[0]), document]
        row = document[1]
    bounds.append((row, q.shape[0]))
    # Split, not sliced: autograd then joins the pieces' gradients once instead of adding a zero-filled whole for each.
    pieces = zip(bounds, *(t.split([b[1] - b[0] for b in bounds]) for t in (q, k, v)), strict=True)
    out = []
    for (_, _, *prefix), queries, keys, values in pieces:
        if not prefix or not len(queries):
            out.append(torch.zeros_like(queries))
            continue
        if prefix[1] > prefix[0]:
            keys = torch.cat((k[slice(*prefix)], keys))
            values = torch.cat((v[slice(*prefix)], values))
        out.append(attend(queries, keys, values))
    return torch.cat(out)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """q: (T, H, Dh). k, v: (T, K, Dh), H a multiple of K. Returns (T, H, Dh) in q's dtype.

    documents: (N, 4) int32, one row a document: start, end, prefix start, prefix end, ends exclusive, in the order of
    their starts and not overlapping; an unshared document has an empty prefix (0, 0).
    Raises ValueError when the shapes do not fit.
    """
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted q (T, H, Dh) and "
            f"k, v (T, K, Dh), H a multiple of K"
        )
    if documents.ndim != 2 or documents.shape[1] != 4:
        raise ValueError(f"attention: documents is {tuple(documents.shape)}, wanted (N, 4)")
    choose("attention", impl)
    return attention_ref(q, k, v, documents)

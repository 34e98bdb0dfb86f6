"""Packed documents of Alpaca's lengths."""

from kernels.measure.documents import draw_alpaca_rows, pack_whole, pack_with_shared_prefixes


def test_the_length_mix():
    rows = draw_alpaca_rows(8192)
    lengths = [prompt + response for prompt, response, _ in rows]
    assert sum(lengths) == 8192 and max(lengths) <= 512 and len(rows) > 40
    documents, n_rows = pack_whole(rows)
    assert n_rows == 8192 and [end - start for start, end, *_ in documents] == lengths
    documents, n_rows = pack_with_shared_prefixes(rows)
    own = [d for d in documents if d[3] > d[2]]
    assert [e - s + pe - ps for s, e, ps, pe in own] == [
        n for n, (*_, prefix) in zip(lengths, rows, strict=True) if n > prefix
    ]
    assert documents[:2] == [(0, 29, 0, 0), (29, 68, 0, 0)] and n_rows % 64 == 0
    assert 8192 * 0.7 < n_rows < 8192 * 0.8  # a quarter of the tokens is shared

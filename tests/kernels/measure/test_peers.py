"""Peers lay attention out as the case does, and give its results."""

import pytest
import torch

from kernels.measure import cases as bench_cases
from kernels.measure import peers as bench_peers
from kernels.measure.documents import draw_alpaca_rows, pack_equal, pack_whole, pack_with_shared_prefixes
from tests.helpers.run import worst


@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads", "peers"),
    [
        ("unshared", 2, 2, ("SDPA flash", "SDPA nested", "FlexAttention")),
        ("unshared", 2, 1, ("SDPA flash", "FlexAttention")),
        ("shared", 2, 2, ("FlexAttention",)),
        ("equal", 2, 2, ("SDPA flash",)),
    ],
)
def test_peers_lay_attention_out_as_it_is(monkeypatch, layout, heads, kv_heads, peers):
    monkeypatch.setattr(bench_peers, "require_cuda", lambda what: None)
    rows = draw_alpaca_rows(400)
    documents, n_rows = {
        "unshared": pack_whole(rows), "shared": pack_with_shared_prefixes(rows), "equal": pack_equal(8, 24),
    }[layout]  # fmt: skip
    case = bench_cases.attention_case(
        "", documents, n_rows, heads, kv_heads, 16, packed=layout != "equal", prefix=layout == "shared"
    )
    assert len(documents) >= 3
    inputs = case.inputs("cpu", torch.float32)
    upstream = (torch.randn(n_rows, heads, 16),)
    for who in peers:
        ready = bench_peers.PEERS["attention"][who](case, inputs, upstream)
        for leaf, t in zip((*ready.leaves, *ready.upstream), (inputs.q, inputs.k, inputs.v, *upstream), strict=True):
            assert torch.equal(ready.canonical(leaf), t), who
        if who != "SDPA nested":  # which runs causally on CUDA alone
            for leaf in ready.leaves:
                leaf.requires_grad_(False)  # FlexAttention has no backward on a CPU
            assert worst(ready.canonical(ready.run()) - case.reference(inputs)) < 1e-5, who

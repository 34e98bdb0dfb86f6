"""The KV cache's choice of attention for one more token a sequence."""

import pytest
import torch

from engine.base.errors import UsageError
from engine.inference.kv_cache import KVCache, choose_decoding
from engine.model.config import ModelConfig
from kernels.compiled.cuda_simulation import cuda_on_machine
from tests.helpers.native import needs_nvcc


def test_decoding_by_cuda_is_a_choice(monkeypatch):
    assert choose_decoding("triton") == "torch"
    monkeypatch.setenv("CRIA_DECODING", "cuda")
    assert choose_decoding("triton") == "cuda" and choose_decoding("ref") == "torch"
    monkeypatch.setenv("CRIA_DECODING", "hip")
    with pytest.raises(UsageError, match="CRIA_DECODING is 'hip', wanted torch or cuda"):
        choose_decoding("triton")


@needs_nvcc
def test_some_sequences_of_a_cache_are_decoded_by_cuda():
    """Sequences out of order, one of them left out, queries that lie beside keys and values."""
    torch.manual_seed(0)
    config = ModelConfig(dim=192, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=256, vocab_size=100)
    caches = [KVCache(config, 4, 45, torch.device("cpu"), torch.float32) for _ in range(2)]
    k, v = torch.randn(2, *caches[0].k.shape)
    for cache in caches:
        cache.k.copy_(k), cache.v.copy_(v)
        cache.lengths = torch.tensor([44, 3, 0, 20])
        cache.begin_token(torch.tensor([3, 0, 2]))
    q, k, v = torch.randn(3, 5, 64).split((3, 1, 1), dim=1)
    want = caches[0].decode(1, q, k, v)
    caches[1].decoding = "cuda"
    with cuda_on_machine("sm_80") as launches:
        out = caches[1].decode(1, q, k, v)
    assert not launches[0].findings and torch.allclose(out, want, atol=1e-6)

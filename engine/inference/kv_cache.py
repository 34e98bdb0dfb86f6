"""The KV cache: keys and values of earlier tokens, kept for the tokens that follow."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import kernels
from engine.model.config import ModelConfig


class KVCache:
    """Keys and values of B sequences, each with its own length.

    The first forward takes the prompts, packed as documents; each later one takes one token a sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
        impl: str = "auto",
    ):
        self.impl = impl
        shape = (config.n_layers, batch, max_len, config.n_kv_heads, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)
        self.documents: torch.Tensor | None = None  # of the prompts; None after the forward of the prompts

    def begin_prompts(self, lengths: torch.Tensor, documents: torch.Tensor) -> None:
        """Prepare for the forward of the prompts, of lengths (B,) and documents (B, 4) on the CPU."""
        self.documents, self.lengths = documents, lengths

    def begin_token(self) -> torch.Tensor:
        """Prepare for the forward of one more token a sequence, and return the tokens' positions (B,)."""
        self.documents, self.lengths = None, self.lengths + 1
        return self.lengths - 1

    def attend_in_layer(self, i: int, cos: torch.Tensor, sin: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return layer i's attend(qkv (T, H + 2K, Dh)) -> (T, H, Dh).

        It applies RoPE, stores the keys and values, and computes attention.
        """

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            n_kv_heads = self.k.shape[3]
            q, k, v = qkv.split((qkv.shape[1] - 2 * n_kv_heads, n_kv_heads, n_kv_heads), dim=1)
            q, k = kernels.rope(q, k, cos, sin, self.impl)
            return self.decode(i, q, k, v) if self.documents is None else self.prefill(i, q, k, v)

        return attend

    def prefill(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store layer i's keys and values of the prompts and return their attention (T, H, Dh)."""
        assert self.documents is not None
        for row, (start, end, *_) in enumerate(self.documents.tolist()):
            self.k[i, row, : end - start], self.v[i, row, : end - start] = k[start:end], v[start:end]
        return kernels.attention(q, k, v, self.documents, self.impl)

    def decode(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store layer i's k, v (B, K, Dh) and return the attention (B, H, Dh) of q to its own sequence so far."""
        self.k[i, self.rows, self.lengths - 1], self.v[i, self.rows, self.lengths - 1] = k, v
        longest, group = int(self.lengths.max()), q.shape[1] // k.shape[1]
        keys, values = (t[i, :, :longest].transpose(1, 2) for t in (self.k, self.v))  # (B, K, S, Dh)
        seen = torch.arange(longest, device=q.device) < self.lengths[:, None]  # (B, S)
        q = q.unflatten(1, (-1, group))  # (B, K, H/K, Dh): the queries of one key head side by side
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)

"""The KV cache: keys and values of earlier tokens, kept for the tokens that follow."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

import kernels
from engine.base.errors import UsageError
from engine.model.config import ModelConfig


@dataclass(frozen=True)
class Prompt:
    """Where a prompt of a prefill lies: in a sequence of the cache, and among the rows of keys of the prefill.

    Of its keys and values, the first `kept` are known already: they are the rows from kept_row on. The others are
    computed: they are the rows row to end.
    """

    sequence: int
    kept_row: int
    kept: int
    row: int
    end: int


@dataclass(frozen=True)
class Prefill:
    """The forward of several prompts, packed.

    rows: the number of rows of keys: those that the cache holds already, and those of the tokens that are computed.
    copies: (sequence, n, first row) of keys that are read from the cache. new_rows: (T,) of the tokens that are
    computed. documents: (N, 4), see kernels.attention.
    """

    rows: int
    copies: Sequence[tuple[int, int, int]]
    new_rows: torch.Tensor
    documents: torch.Tensor
    prompts: Sequence[Prompt]


def pack_prompts(lengths: Sequence[int]) -> Prefill:
    """Return the prefill of whole prompts of these lengths, the first for sequence 0 of a cache and so on."""
    ends = list(accumulate(lengths))
    prompts = [Prompt(i, end - n, 0, end - n, end) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))]
    documents = torch.tensor([(p.row, p.end, 0, 0) for p in prompts], dtype=torch.int32)
    return Prefill(ends[-1], [], torch.arange(ends[-1]), documents, prompts)


def choose_decoding(impl: str) -> str:
    """Return "cuda" where CRIA_DECODING names it and the model runs its kernels on a GPU, else "torch".

    Raises UsageError for another name.
    """
    named = os.environ.get("CRIA_DECODING", "torch")
    if named not in ("torch", "cuda"):
        raise UsageError(f"CRIA_DECODING is {named!r}, wanted torch or cuda")
    return named if impl == "triton" else "torch"


class KVCache:
    """Keys and values of B sequences, each with its own length.

    A forward takes prompts, or one more token of some sequences.
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
        self.impl, self.decoding = impl, choose_decoding(impl)
        shape = (config.n_layers, batch, max_len, config.n_kv_heads, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)  # sequences that a forward of one token goes on with
        self.prefill: Prefill | None = None  # None in a forward of one token a sequence
        self.plan: object = None  # of the prefill's attention

    @property
    def documents(self) -> torch.Tensor | None:
        """Return the documents of the prefill, None in a forward of one token a sequence."""
        return None if self.prefill is None else self.prefill.documents

    def begin_prefill(self, prefill: Prefill) -> None:
        """Prepare for the forward of prompts. What the cache held of their sequences is overwritten."""
        self.prefill, device = prefill, self.k.device
        self.plan = kernels.attention_plan(
            prefill.documents, prefill.rows, self.k.shape[-1], device, self.impl, prefill.new_rows, self.k.dtype
        )
        for prompt in prefill.prompts:
            self.lengths[prompt.sequence] = prompt.kept + prompt.end - prompt.row

    def begin_token(self, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """Prepare for the forward of one more token of these sequences, or all, and return their positions (n,)."""
        self.prefill = None
        self.rows = torch.arange(len(self.lengths), device=self.k.device) if sequences is None else sequences
        self.lengths[self.rows] += 1
        return self.lengths[self.rows] - 1

    def attend_in_layer(self, i: int, cos: torch.Tensor, sin: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return layer i's attend(qkv (T, H + 2K, Dh)) -> (T, H, Dh).

        It applies RoPE, stores the keys and values, and computes attention.
        """

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            n_kv_heads = self.k.shape[3]
            q, k, v = qkv.split((qkv.shape[1] - 2 * n_kv_heads, n_kv_heads, n_kv_heads), dim=1)
            q, k = kernels.rope(q, k, cos, sin, self.impl)
            return self.decode(i, q, k, v) if self.prefill is None else self.attend_prompts(i, q, k, v, self.prefill)

        return attend

    def attend_prompts(
        self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefill: Prefill
    ) -> torch.Tensor:
        """Store layer i's keys and values of the prompts' new tokens and return their attention (T, H, Dh)."""
        new_rows = prefill.new_rows.to(q.device)
        keys, values = (t.new_empty(prefill.rows, *t.shape[1:]) for t in (k, v))
        for kept, new, rows in ((self.k, k, keys), (self.v, v, values)):
            for sequence, n, row in prefill.copies:
                rows[row : row + n] = kept[i, sequence, :n]
            rows[new_rows] = new
        for p in prefill.prompts:  # after all reads: a sequence may give its keys to another and begin anew
            for kept, rows in ((self.k, keys), (self.v, values)):
                kept[i, p.sequence, : p.kept] = rows[p.kept_row : p.kept_row + p.kept]
                kept[i, p.sequence, p.kept : p.kept + p.end - p.row] = rows[p.row : p.end]
        return kernels.attention(q, keys, values, self.plan, self.impl)  # type: ignore[arg-type]

    def decode(self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store layer i's k, v (n, K, Dh) and return the attention (n, H, Dh) of q to its own sequence so far."""
        lengths, group = self.lengths[self.rows], q.shape[1] // k.shape[1]
        self.k[i, self.rows, lengths - 1], self.v[i, self.rows, lengths - 1] = k, v
        if self.decoding == "cuda":
            pages = self.rows.to(torch.int32)[:, None]  # a sequence is one page of the cache
            return kernels.decode_attention(q, kernels.DecodeCache(self.k[i], self.v[i], lengths, pages), "cuda")
        longest = int(lengths.max())
        keys, values = (t[i, self.rows, :longest].transpose(1, 2) for t in (self.k, self.v))  # (n, K, S, Dh)
        seen = torch.arange(longest, device=q.device) < lengths[:, None]  # (n, S)
        q = q.unflatten(1, (-1, group))  # (n, K, H/K, Dh): the queries of one key head side by side
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)

"""The whole LLaMA (1, 2, 3.x), over packed rows of tokens.

T tokens of a micro-batch, documents back to back    D dim    V vocab
H heads    K key/value heads    Dh head dim    F hidden dim of the feed-forward

    x = embed(tokens)
    for each layer:  x = x + wo attention(rope(wqkv norm(x)))
                     x = x + w2 (silu(w1 norm(x)) * w3 norm(x))
    logits = output norm(x)

No padding and no batch axis: which rows see which is told by `documents` (see kernels.attention).
Source: arXiv:2302.13971, arXiv:2407.21783.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
from engine.config import ModelConfig


def parameter(*shape):
    return nn.Parameter(torch.empty(*shape))


class Block(nn.Module):
    """One layer. wqkv holds wq, wk, wv row upon row; w13 holds w1 (gate) and w3 (up)."""

    def __init__(self, config: ModelConfig, impl: str):
        super().__init__()
        dim, heads, kv_heads, head_dim = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.config, self.impl = config, impl
        self.attention_norm = parameter(dim)
        self.wqkv = parameter((heads + 2 * kv_heads) * head_dim, dim)
        self.wo = parameter(dim, heads * head_dim)
        self.ffn_norm = parameter(dim)
        self.w13 = parameter(2 * config.hidden_dim, dim)
        self.w2 = parameter(dim, config.hidden_dim)

    def forward(self, x, attend):
        """x: (T, D). attend: qkv (T, H + 2K, Dh) -> (T, H, Dh), which rotates and masks. Returns (T, D)."""
        c, impl = self.config, self.impl

        qkv, x = kernels.norm_linear(x, self.attention_norm, self.wqkv, c.norm_eps, impl)  # (T, (H + 2K) Dh), and x
        o = attend(qkv.unflatten(1, (c.n_heads + 2 * c.n_kv_heads, c.head_dim)))
        x = torch.addmm(x, o.flatten(1), self.wo.T)

        gate_up, x = kernels.norm_linear(x, self.ffn_norm, self.w13, c.norm_eps, impl)  # (T, 2F), and x
        return kernels.swiglu_linear(gate_up, self.w2, x, impl, consume=True)


class Transformer(nn.Module):
    """impl: which kernels run, "auto" or a name that is insisted on. recompute: "none", or "block" to keep only each
    layer's input and compute the rest again in backward."""

    def __init__(self, config: ModelConfig, impl: str = "auto", recompute: str = "none"):
        super().__init__()
        self.config, self.impl, self.recompute = config, impl, recompute
        self.tok_embeddings = parameter(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, impl) for _ in range(config.n_layers))
        self.norm = parameter(config.dim)
        if not config.tied:
            self.output = parameter(config.vocab_size, config.dim)

    @property
    def head(self):
        """(V, D): the output matrix, which is the embedding when they are tied."""
        return self.tok_embeddings if self.config.tied else self.output

    def forward(self, tokens, positions, documents=None, cache=None):
        """tokens, positions: (T,) int64. Returns the last layer's output (T, D), before the final norm.

        documents: (N, 4) int32 on the CPU, see kernels.attention. cache: keys and values of earlier tokens, see
        engine.generate; one of the two is given.
        """
        config = self.config
        frequencies = kernels.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = kernels.rope_cos_sin(positions, frequencies.to(positions.device))  # shared by all layers
        x = F.embedding(tokens, self.tok_embeddings)
        if cache is None:
            plan = kernels.attention_plan(documents, len(tokens), config.head_dim, x.device, self.impl)
            attend = partial(
                kernels.rope_attention, cos=cos, sin=sin, documents=plan, n_heads=config.n_heads, impl=self.impl
            )
        for i, layer in enumerate(self.layers):
            if cache is not None:
                attend = cache.layer(i, cos, sin)
            if self.recompute == "block" and torch.is_grad_enabled():
                x = checkpoint(layer, x, attend, use_reentrant=False)
            else:
                x = layer(x, attend)
        return x

    def logits(self, x):
        """x: (..., D), rows of forward's output. Returns (..., V) in the dtype of the weights."""
        return F.linear(kernels.rms_norm(x, self.norm, self.config.norm_eps, self.impl), self.head)

    def loss(self, batch):
        """batch: engine.packing.MicroBatch. Returns the summed loss of its loss rows, a scalar in fp32."""
        x = self(batch.tokens, batch.positions, batch.documents)
        x = kernels.rms_norm(x[batch.loss_rows], self.norm, self.config.norm_eps, self.impl)
        return kernels.linear_cross_entropy(x, self.head, batch.targets, batch.weights, self.impl)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Random weights: norms 1, matrices normal with standard deviation 0.02, drawn in the order of the names."""
        generator = torch.Generator(self.norm.device).manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 1:
                p.fill_(1)
            else:
                p.normal_(std=0.02, generator=generator)


def new_model(config: ModelConfig, device, dtype: torch.dtype, impl="auto", recompute="none") -> Transformer:
    """A Transformer with uninitialised weights: allocated once, in place, in the dtype asked for."""
    with torch.device("meta"):
        model = Transformer(config, impl, recompute).to(dtype)
    return model.to_empty(device=device)

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

import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
from engine.model.batch import MicroBatch, Ready
from engine.model.config import ModelConfig


@functools.cache
def frequencies_on(device, *of):
    """kernels.rope_frequencies there, once: a copy from pageable memory in each forward would wait for the device."""
    return kernels.rope_frequencies(*of).to(device)


def parameter(*shape):
    return nn.Parameter(torch.empty(*shape))


class Block(nn.Module):
    """One layer. wqkv holds wq, wk, wv row upon row; w13 holds w1 (gate) and w3 (up)."""

    def __init__(self, config: ModelConfig, impl: str, keep: bool, accumulate: bool):
        super().__init__()
        dim, heads, kv_heads, head_dim = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.config, self.options, self.keep = config, {"impl": impl, "accumulate": accumulate}, keep
        self.attention_norm = parameter(dim)
        self.wqkv = parameter((heads + 2 * kv_heads) * head_dim, dim)
        self.wo = parameter(dim, heads * head_dim)
        self.ffn_norm = parameter(dim)
        self.w13 = parameter(2 * config.hidden_dim, dim)
        self.w2 = parameter(dim, config.hidden_dim)

    def forward(self, x, attend, rows=None):
        """x: (T, D). attend: qkv (T, H + 2K, Dh) -> (T, H, Dh), which rotates and masks. Returns (T, D).

        rows: (U,), the only rows whose output (U, D) is wanted: attend then takes q (U, H, Dh) and kv (T, 2K, Dh).
        """
        c, options, keep = self.config, self.options, self.keep

        if rows is None:
            qkv, x = kernels.norm_linear(x, self.attention_norm, self.wqkv, c.norm_eps, keep=keep, **options)
            o = attend(qkv.unflatten(1, (-1, c.head_dim)))  # (T, (H + 2K) Dh) -> (T, H, Dh)
        else:
            q, kv, x = kernels.norm_linear_rows(
                x, self.attention_norm, self.wqkv, rows, c.n_heads * c.head_dim, c.norm_eps, keep=keep, **options
            )
            o = attend(q.unflatten(1, (-1, c.head_dim)), kv.unflatten(1, (-1, c.head_dim)))
        x = kernels.linear_add(o.flatten(1), self.wo, x, **options)

        gate_up, x = kernels.norm_linear(x, self.ffn_norm, self.w13, c.norm_eps, keep=keep, **options)  # (T, 2F), and x
        return kernels.swiglu_linear(gate_up, self.w2, x, consume=True, keep=keep, **options)


class Transformer(nn.Module):
    """A LLaMA.

    impl: which kernels run, "auto" or a name that is insisted on.
    recompute: what backward computes again instead of keeping: "none"; "cheap", the outputs of norms and SwiGLU, which
    cost a pass over memory; "block", all of a layer but its input. The references keep what autograd keeps, but for
    "block". accumulate: the kernels add gradients to .grad in the GEMMs' epilogues, see kernels.ops.common.weight_gradient;
    each loss() must then be followed by its backward(), with a gradient of 1.
    """

    def __init__(self, config: ModelConfig, impl: str = "auto", recompute: str = "cheap", accumulate: bool = False):
        super().__init__()
        self.config, self.impl, self.recompute, self.accumulate = config, impl, recompute, accumulate
        self.tok_embeddings = parameter(config.vocab_size, config.dim)
        blocks = (Block(config, impl, recompute == "none", accumulate) for _ in range(config.n_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = parameter(config.dim)
        if not config.tied:
            self.output = parameter(config.vocab_size, config.dim)

    @property
    def head(self):
        """(V, D): the output matrix, which is the embedding when they are tied."""
        return self.tok_embeddings if self.config.tied else self.output

    def forward(self, tokens, positions, documents=None, cache=None, rows=None, plans=None):
        """tokens, positions: (T,) int64. Returns the last layer's output (T, D), before the final norm.

        One of three says who sees whom: documents, (N, 4) int32 on the CPU, see kernels.attention; plans, what plan()
        made of them; cache, keys and values of earlier tokens, see engine.generate. rows: (U,) int64, increasing, the
        only ones whose output (U, D) is wanted: the last layer asks and feeds forward for them alone.
        """
        config = self.config
        frequencies = frequencies_on(positions.device, config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = kernels.rope_cos_sin(positions, frequencies)  # shared by all layers
        x = F.embedding(tokens, self.tok_embeddings)
        if cache is None:
            plan, last_plan = plans or self.plan(documents, len(tokens), x.device, rows)
            rope = {"cos": cos, "sin": sin, "impl": self.impl}
            attend = partial(kernels.rope_attention, documents=plan, n_heads=config.n_heads, **rope)
            attend_rows = partial(kernels.rope_attention_rows, documents=last_plan, rows=rows, **rope)
        for i, layer in enumerate(self.layers):
            arguments = x, attend if cache is None else cache.layer(i, cos, sin)
            if rows is not None and layer is self.layers[-1]:
                arguments = x, attend_rows, rows
            if self.recompute == "block" and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        return x

    def plan(self, documents, n_rows, device, rows=None):
        """Attention's plans of all layers but the last, and of the last, whose queries are `rows`."""
        make = partial(kernels.attention_plan, documents, n_rows, self.config.head_dim, device, self.impl)
        return make(), None if rows is None else make(rows)

    def logits(self, x):
        """x: (..., D), rows of forward's output. Returns (..., V) in the dtype of the weights."""
        return F.linear(kernels.rms_norm(x, self.norm, self.config.norm_eps, self.impl), self.head)

    def ready(self, batch: MicroBatch) -> Ready:
        """The micro-batch, which is on the CPU, planned and on the model's device, without waiting for it."""
        device = self.norm.device

        def send(t):
            return t if t is None or device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)

        rows, of_rows = batch.loss_rows.unique_consecutive(return_inverse=True)
        plans = self.plan(batch.documents, len(batch.tokens), device, rows)
        of_rows = None if len(rows) == len(of_rows) else of_rows
        sent = (batch.tokens, batch.positions, batch.targets, batch.weights, rows, of_rows)
        return Ready(*map(send, sent), plans)

    def loss(self, batch: MicroBatch | Ready):
        """Returns the summed loss of the batch's targets, each times its weight, a scalar in fp32."""
        batch = self.ready(batch) if isinstance(batch, MicroBatch) else batch
        # Not self(): FSDP2 has hooks on both, and would let go of the weights in between.
        x = self.forward(batch.tokens, batch.positions, rows=batch.rows, plans=batch.plans)
        x = kernels.rms_norm(x, self.norm, self.config.norm_eps, self.impl)
        x = x if batch.of_rows is None else x[batch.of_rows]
        return kernels.linear_cross_entropy(x, self.head, batch.targets, batch.weights, self.impl, self.accumulate)

    @torch.no_grad()
    def init_weights(self, seed: int, held=None):
        """Random weights: norms 1, matrices normal with standard deviation 0.02, drawn in the order of the names.

        held: {name: the rows that are here} of a sharded model; each matrix is drawn whole, and those rows are kept.
        """
        generator = torch.Generator(self.norm.device).manual_seed(seed)
        for name, p in self.named_parameters():
            here = held[name] if held else None
            if p.ndim == 1:
                (here.tensor if here else p).fill_(1)
            elif here and here.rows:
                whole = here.tensor.new_empty(p.shape).normal_(std=0.02, generator=generator)
                here.tensor.copy_(whole[here.first : here.first + len(here.tensor)])
            else:
                p.normal_(std=0.02, generator=generator)


def new_model(
    config: ModelConfig, device, dtype: torch.dtype, impl="auto", recompute="cheap", accumulate=False, shard=None
) -> Transformer:
    """A Transformer with uninitialised weights: allocated once, in place, in the dtype asked for, after shard(model),
    which may leave it a part of them."""
    with torch.device("meta"):
        model = Transformer(config, impl, recompute, accumulate).to(dtype)
    if shard:
        return shard(model).to_empty(device=device)
    if str(device) == "meta":
        return model
    # Not to_empty, which imports sympy: most of a second.
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))

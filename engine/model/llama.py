"""The whole LLaMA (1, 2, 3.x; Mistral without a window), over packed documents.

T tokens of a micro-batch, documents back to back    D dim    V vocab
H heads    K key/value heads    Dh head dim    F hidden dim of the feed-forward

    x = embed(tokens)
    for each layer:  x = x + wo attention(rope(wqkv norm(x)))
                     x = x + w2 (silu(w1 norm(x)) * w3 norm(x))
    logits = output norm(x)

With an adapter every map may have a low-rank update, see engine.model.adapter, and the weights are frozen.

There is no padding and no batch axis. A row is one token; `documents` says which rows attend to which, see
kernels.attention.
Source: arXiv:2302.13971, arXiv:2407.21783.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
from engine.base.errors import UsageError
from engine.model.adapter import (
    MAPS,
    AdapterConfig,
    is_of_adapter,
    list_updates,
    make_loras,
    map_shapes,
    trained_whole,
)
from engine.model.batch import DeviceMicroBatch, MicroBatch
from engine.model.config import ModelConfig
from engine.model.nf4_weight import NF4Weight
from engine.model.rope import rope_tables
from engine.model.shard import Shard


def new_parameter(*shape: int) -> nn.Parameter:
    """Return an uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape))


def new_weight(config: ModelConfig, name: str, nf4: bool) -> nn.Parameter | NF4Weight:
    """Return an uninitialised weight of a layer: a parameter, or a frozen one in 4 bits."""
    rows, columns = map_shapes(config, name)
    return NF4Weight(rows, columns) if nf4 else new_parameter(sum(rows), columns)


class Block(nn.Module):
    """One layer. wqkv holds the rows of wq, then of wk and wv; w13 those of w1 (gate), then of w3 (up).

    bqkv, bo, b13 and b2 are the biases of wqkv, wo, w13 and w2, or None. They are added by torch, outside the kernels.
    keep: the outputs of norms and SwiGLU are kept for backward rather than computed again. lora: {weight: its updates}.
    nf4: the four weights are frozen, in 4 bits.
    """

    def __init__(self, config: ModelConfig, impl: str, keep: bool, accumulate: bool, lora: dict[str, Any], nf4: bool):
        super().__init__()
        dim = config.dim
        self.config = config
        self.options: dict[str, Any] = {"impl": impl, "accumulate": accumulate}
        self.keeping: dict[str, Any] = self.options | {"keep": keep}
        self.attention_norm = new_parameter(dim)
        self.wqkv = new_weight(config, "wqkv", nf4)
        self.wo = new_weight(config, "wo", nf4)
        self.ffn_norm = new_parameter(dim)
        self.w13 = new_weight(config, "w13", nf4)
        self.w2 = new_weight(config, "w2", nf4)
        self.bqkv = new_parameter(self.wqkv.shape[0]) if config.attention_bias else None
        self.bo = new_parameter(dim) if config.attention_bias else None
        self.b13 = new_parameter(self.w13.shape[0]) if config.mlp_bias else None
        self.b2 = new_parameter(dim) if config.mlp_bias else None
        self.lora = nn.ModuleDict(lora)

    def update_of(self, weight: str, seed: int | None) -> kernels.LowRank | None:
        """Return the updates of a weight of this layer, None where it has none. seed: of the layer's dropout."""
        if weight not in self.lora:
            return None
        return self.lora[weight](None if seed is None else (4 * seed + list(MAPS).index(weight)) % 2**63)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        attend: Callable[..., torch.Tensor],
        rows: torch.Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two tensors (T, D), the sum of which is the layer's output. The next norm adds them.

        x, residual: (T, D), the sum of which is the layer's input; without a residual it is x. attend(qkv (T, H + 2K,
        Dh)) -> (T, H, Dh) rotates and masks. rows (U,): the only rows whose output (U, D) is wanted; attend then takes
        q (U, H, Dh) and kv (T, 2K, Dh), and there is no residual. dropout_seed: of the adapter; None drops nothing.
        """
        c, eps, keeping = self.config, self.config.norm_eps, self.keeping
        update_of = partial(self.update_of, seed=dropout_seed)

        if rows is None:
            qkv, residual = kernels.norm_linear(
                x, self.attention_norm, self.wqkv, eps, residual=residual, low_rank=update_of("wqkv"), **keeping
            )
            qkv = qkv if self.bqkv is None else qkv + self.bqkv
            o = attend(qkv.unflatten(1, (-1, c.head_dim)))  # (T, (H + 2K) Dh) -> (T, H, Dh)
        else:
            q, kv, residual = kernels.norm_linear_rows(
                x, self.attention_norm, self.wqkv, rows, c.n_heads * c.head_dim, eps,
                low_rank=update_of("wqkv"), **keeping,
            )  # fmt: skip
            if self.bqkv is not None:
                q, kv = q + self.bqkv[: q.shape[1]], kv + self.bqkv[q.shape[1] :]
            o = attend(q.unflatten(1, (-1, c.head_dim)), kv.unflatten(1, (-1, c.head_dim)))
        x = kernels.linear(o.flatten(1), self.wo, low_rank=update_of("wo"), **self.options)
        x = x if self.bo is None else x + self.bo

        x, residual = kernels.norm_linear(
            x, self.ffn_norm, self.w13, eps, residual=residual, low_rank=update_of("w13"), **keeping
        )  # x: (T, 2F)
        x = x if self.b13 is None else x + self.b13
        x = kernels.swiglu_linear(x, self.w2, consume=True, low_rank=update_of("w2"), **keeping)
        return x if self.b2 is None else x + self.b2, residual


def choose_attention(impl: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return the kernels of attention: those of the model, or "cuda" on a GPU where CRIA_ATTENTION names it.

    Raises UsageError for another name, and for what the kernel of csrc/cuda does not take.
    """
    named = os.environ.get("CRIA_ATTENTION", "triton")
    if named not in ("triton", "cuda"):
        raise UsageError(f"CRIA_ATTENTION is {named!r}, wanted triton or cuda")
    if named == "triton" or impl != "triton":
        return impl
    try:
        kernels.check_attention_by_cuda(head_dim, dtype, device)
    except ValueError as error:
        raise UsageError(f"CRIA_ATTENTION is cuda: {error}; or unset it") from None
    return "cuda"


class Transformer(nn.Module):
    """A LLaMA.

    impl: which kernels run: "triton", "ref" or "auto".

    recompute: what backward computes again instead of keeping it. "none": nothing. "cheap": the outputs of norms and
    SwiGLU, each of which costs one pass over memory. "block": everything in a layer but its input. With the references,
    "none" and "cheap" are alike: both keep what autograd keeps.

    accumulate: the GEMMs of backward add a weight's gradient to its .grad, see kernels.ops.common.weight_gradient. Each
    loss() must then be followed by its backward(), with a gradient of 1.

    on_gradients, where it is set, is called in backward with the place of a group in parameter_groups() when all
    gradients of the group are there. It is not called for the first group, whose gradients are there at the end.

    adapter: the low-rank updates that are trained in place of the weights; None trains the weights.
    """

    def __init__(
        self, config: ModelConfig, impl: str = "auto", recompute: str = "cheap", accumulate: bool = False,
        adapter: AdapterConfig | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config, self.impl, self.recompute, self.accumulate = config, impl, recompute, accumulate
        self.adapter = adapter
        self.on_gradients: Callable[[int], None] | None = None
        self.tok_embeddings = new_parameter(config.vocab_size, config.dim)
        keep, nf4 = recompute == "none", adapter is not None and adapter.nf4_base
        self.layers = nn.ModuleList(
            Block(config, impl, keep, accumulate, make_loras(config, adapter, layer) if adapter else {}, nf4)
            for layer in range(config.n_layers)
        )
        self.norm = new_parameter(config.dim)
        if not config.tied:
            self.output = new_parameter(config.vocab_size, config.dim)
        if adapter is not None:
            for name, p in self.named_parameters():
                p.requires_grad_(is_of_adapter(name) or name in trained_whole(adapter))

    def nf4_weights(self) -> dict[str, NF4Weight]:
        """Return the weights in 4 bits, by the names that they would have as parameters."""
        return {name: module for name, module in self.named_modules() if isinstance(module, NF4Weight)}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that get gradients, by name: all of them, or those of the adapter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def head(self) -> torch.Tensor:
        """Return the output matrix (V, D), which is the embedding when they are tied."""
        return self.tok_embeddings if self.config.tied else self.output

    def parameter_groups(self) -> list[list[str]]:
        """Return the parameters' names in forward's order: the embedding, each layer, the final norm with the head.

        A tied head is the embedding.
        """
        layers = [[f"layers.{i}.{name}" for name, _ in layer.named_parameters()] for i, layer in enumerate(self.layers)]
        return [["tok_embeddings"], *layers, ["norm"] if self.config.tied else ["norm", "output"]]

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: Any = None,
        rows: torch.Tensor | None = None,
        plans: tuple[Any, Any] | None = None,
        dropout_seed: int | None = None,
    ) -> torch.Tensor:
        """Return the final norm (T, D) of the last layer's output, of tokens and positions (T,) int64.

        One of three says which rows attend to which: documents (N, 4) int32 on the CPU, see kernels.attention; plans,
        which plan_attention() made from documents; cache, an engine.inference.kv_cache.KVCache of earlier tokens.
        Without them the tokens are one document, and without positions they are counted from 0. rows
        (U,) int64, increasing: the only rows whose output (U, D) is wanted. The last layer then computes queries and
        the feed-forward of these rows only. dropout_seed: of an adapter's dropout, in backward
        too; None drops nothing.
        """
        config = self.config
        if positions is None:
            positions = torch.arange(len(tokens), device=tokens.device)
        if documents is None and cache is None and plans is None:
            documents = torch.tensor([[0, len(tokens), 0, 0]], dtype=torch.int32)
        # Shared by all layers. A cache without documents takes one token of each sequence.
        cos, sin = rope_tables(config, positions, cache is not None and cache.documents is None)
        x = F.embedding(tokens, self.tok_embeddings)
        residual: torch.Tensor | None = None
        if cache is None:
            plan, last_plan = plans or self.plan_attention(documents, len(tokens), x.device, rows)
            by_cuda = getattr(plan, "hopper", None) is not None
            rope: dict[str, Any] = {"cos": cos, "sin": sin, "impl": "cuda" if by_cuda else self.impl}
            attend = partial(kernels.rope_attention, documents=plan, n_heads=config.n_heads, **rope)
            rope_rows: dict[str, Any] = rope | {"documents": last_plan, "rows": rows}
            attend_rows = partial(kernels.rope_attention_rows, **rope_rows)
        recomputed = self.recompute == "block" and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            seed = None if dropout_seed is None else dropout_seed * len(self.layers) + i
            arguments: tuple[Any, ...] = attend if cache is None else cache.attend_in_layer(i, cos, sin), None, seed
            is_last = layer is self.layers[-1]
            if rows is not None and is_last:
                arguments = attend_rows, rows, seed
            if residual is not None and (recomputed or is_last):
                # A checkpoint would keep both, and both would live in the last layer's forward, when memory is fullest.
                x, residual = x + residual, None
            self._announce_gradients(x, i + 1)
            if recomputed:
                x, residual = checkpoint(layer, x, None, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, residual = layer(x, residual, *arguments)
        self._announce_gradients(x, len(self.layers) + 1)
        return kernels.rms_norm(x, self.norm, config.norm_eps, self.impl, residual)[0]

    def _announce_gradients(self, x, group):
        """Let backward call on_gradients when it has passed the group of parameters whose input is x."""
        if self.on_gradients is not None and x.requires_grad:
            x.register_hook(lambda dx, announce=self.on_gradients: announce(group))

    def plan_attention(
        self, documents: torch.Tensor | None, n_rows: int, device: torch.device, rows: torch.Tensor | None = None
    ) -> tuple[Any, Any]:
        """Return the attention plans of all layers but the last, and of the last, whose queries are `rows`."""
        assert documents is not None, "without plans or a cache, documents say which rows see which"
        dtype, head_dim = self.norm.dtype, self.config.head_dim
        impl = choose_attention(self.impl, head_dim, dtype, device)
        make = partial(kernels.attention_plan, documents, n_rows, head_dim, device, impl, dtype=dtype)
        return make(), None if rows is None else make(query_rows=rows)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (..., V), in the dtype of the weights, of rows (..., D) of forward's output."""
        return F.linear(x, self.head)

    def prepare_batch(self, batch: MicroBatch) -> DeviceMicroBatch:
        """Plan a micro-batch's attention and copy it to the model's device. The host does not wait for the copies."""
        device = self.norm.device

        def send(t):
            return t if t is None or device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)

        rows, row_of_target = batch.loss_rows.unique_consecutive(return_inverse=True)
        plans = self.plan_attention(batch.documents, len(batch.tokens), device, rows)
        row_of_target = None if len(rows) == len(row_of_target) else row_of_target
        return DeviceMicroBatch(
            send(batch.tokens), send(batch.positions), send(batch.targets), send(batch.weights), send(rows),
            send(row_of_target), plans,
        )  # fmt: skip

    def loss(self, batch: MicroBatch | DeviceMicroBatch, dropout_seed: int | None = None) -> torch.Tensor:
        """Return the summed loss of the batch's targets, each times its weight, a scalar in fp32.

        dropout_seed: of an adapter's dropout, here and in backward; None drops nothing.
        """
        batch = self.prepare_batch(batch) if isinstance(batch, MicroBatch) else batch
        # Not self(...): FSDP2 hooks both loss and forward, and would reshard the weights between forward and the head.
        x = self.forward(batch.tokens, batch.positions, rows=batch.rows, plans=batch.plans, dropout_seed=dropout_seed)
        x = x if batch.row_of_target is None else x[batch.row_of_target]
        return kernels.linear_cross_entropy(x, self.head, batch.targets, batch.weights, self.impl, self.accumulate)

    @torch.no_grad()
    def init_weights(self, seed: int, shards: dict[str, Shard] | None = None) -> None:
        """Set norms to 1, biases to 0, and draw matrices from a normal distribution of standard deviation 0.02.

        Matrices are drawn in the order of named_parameters(). shards: {name: the rows that this rank holds} of a
        sharded model; each rank draws whole matrices and keeps its rows, so weights do not depend on the number of
        ranks.
        """
        generator = torch.Generator(self.norm.device).manual_seed(seed)
        for name, p in self.named_parameters():
            shard = shards[name] if shards else None
            if is_of_adapter(name):
                continue
            if p.ndim == 1:
                (shard.tensor if shard else p).fill_(name.endswith("norm"))
            elif shard and shard.rows:
                whole = shard.tensor.new_empty(p.shape).normal_(std=0.02, generator=generator)
                shard.tensor.copy_(whole[shard.first : shard.end])
            else:
                p.normal_(std=0.02, generator=generator)

    @torch.no_grad()
    def init_adapter(self, seed: int, shards: dict[str, Shard] | None = None) -> None:
        """Draw each A uniformly from +-1 / sqrt(in), as PEFT does, and set each B to 0: the updates change nothing yet.

        The As are drawn on the CPU in the order of list_updates(), so they depend on the seed alone. shards: as in
        init_weights().
        """
        generator, parameters = torch.Generator().manual_seed(seed), dict(self.named_parameters())
        for update in list_updates(self.config, self.adapter) if self.adapter else ():
            drawn = torch.empty(update.rank, update.columns).uniform_(-1, 1, generator=generator)
            b = shards[update.b].tensor if shards else parameters[update.b]
            b.zero_()
            shard = shards[update.a] if shards else Shard(parameters[update.a].detach())
            first, end = max(shard.first, update.first_rank), min(shard.end, update.first_rank + update.rank)
            if first < end:
                rows = drawn[first - update.first_rank : end - update.first_rank]
                shard.tensor[first - shard.first : end - shard.first].copy_(rows / update.columns**0.5)


def new_model(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    impl: str = "auto",
    recompute: str = "cheap",
    accumulate: bool = False,
    shard: Callable[["Transformer"], "Transformer"] | None = None,
    adapter: AdapterConfig | None = None,
) -> Transformer:
    """Return a Transformer with uninitialised weights of this dtype. adapter: the updates that it has, if any.

    shard: called with the model before anything is allocated; it may reduce each parameter to the rows of this rank.
    """
    with torch.device("meta"):
        model = Transformer(config, impl, recompute, accumulate, adapter).to(dtype)
    if shard:
        return shard(model).to_empty(device=device)
    if str(device) == "meta":
        return model
    # Not to_empty(), which imports sympy and so takes most of a second.
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))

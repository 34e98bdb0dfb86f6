"""The bytes of what one GPU holds of a model's weights and of AdamW's tensors, counted on the real model's shapes.

Under an adapter only its factors, and what is trained whole beside them, have masters, states and gradients. Matrices
in 4 bits, 4.127 bits a weight, are no parameters: each of several GPUs holds them whole.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.base.host_memory import COPY_ARENA_BYTES, HostMemory
from engine.model.adapter import MAPS, AdapterConfig, list_updates
from engine.model.config import ModelConfig
from engine.model.llama import Transformer, new_model
from engine.planning.setting import Setting
from kernels.ops.adamw import adamw_state, states_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateBytes:
    """Bytes of what one GPU holds of the weights and of AdamW's tensors."""

    weights: int
    trained: int  # of the weights that are trained, all but those under an adapter
    master: int  # fp32 masters, or the 16 bits that split weights lack
    states: int  # m and v
    largest: int  # master and states of the one parameter that has most


# ---- weights and optimizer states -----------------------------------------------------------------------------------


@functools.cache
def _meta_model(c: ModelConfig, adapter: AdapterConfig | None) -> Transformer:
    return new_model(c, "meta", torch.bfloat16, adapter=adapter)


@functools.cache
def parameter_shapes(c: ModelConfig, adapter: AdapterConfig | None = None) -> tuple[Shape, ...]:
    """Return the shape of each parameter, in the model's order."""
    return tuple(tuple(p.shape) for p in _meta_model(c, adapter).parameters())


@functools.cache
def trained_shapes(c: ModelConfig, adapter: AdapterConfig | None = None) -> tuple[Shape, ...]:
    """Return the shape of each parameter that is trained, in the model's order."""
    return tuple(tuple(p.shape) for p in _meta_model(c, adapter).trained_parameters().values())


def count_trained(c: ModelConfig, adapter: AdapterConfig | None = None) -> int:
    """Return the number of parameters that are trained."""
    return sum(math.prod(shape) for shape in trained_shapes(c, adapter))


@dataclass(frozen=True)
class PackedWeights:
    """The matrices in 4 bits."""

    n_bytes: int = 0
    numbers: int = 0  # that they stand for
    of_layer: tuple[int, ...] = (0,) * len(MAPS)  # the same of each of a layer's matrices, in the order of MAPS


@functools.cache
def packed_weights(c: ModelConfig, adapter: AdapterConfig | None) -> PackedWeights:
    """Return the matrices in 4 bits of a model with an adapter."""
    weights = _meta_model(c, adapter).nf4_weights()
    numbers = {name: math.prod(weight.shape) for name, weight in weights.items()}
    n_bytes = sum(t.nbytes for weight in weights.values() for t in weight.buffers())
    of_layer = tuple(numbers.get(f"layers.0.{name}", 0) for name in MAPS)
    return PackedWeights(n_bytes, sum(numbers.values()), of_layer)


def shard_shape(shape: Shape, shards: int) -> Shape:
    """Return the shape of the largest shard of a tensor (n, ...): (ceil(n / shards), ...)."""
    return (-(-shape[0] // shards), *shape[1:])


@functools.cache
def adamw_bytes(shape: Shape, dtype: torch.dtype, master: str, states: str) -> dict[str, int]:
    """Return the bytes of each tensor that AdamW keeps for a parameter: {"m": ..., "v": ..., "low": ...}."""
    p = torch.empty(shape, dtype=dtype, device="meta")
    return {name: t.nbytes for name, t in adamw_state(p, master, states_of(p, states)).tensors().items()}


@functools.cache
def _state_bytes(
    c: ModelConfig, dtype: torch.dtype, master: str, states: str, shards: int, adapter: AdapterConfig | None
) -> StateBytes:
    weights = sum(math.prod(shard_shape(shape, shards)) for shape in parameter_shapes(c, adapter)) * dtype.itemsize
    weights += packed_weights(c, adapter).n_bytes
    trained, masters, moments, largest = 0, 0, 0, 0
    for shape, n in Counter(shard_shape(shape, shards) for shape in trained_shapes(c, adapter)).items():
        kept = adamw_bytes(shape, dtype, master, states)
        of_master = kept.get("low", 0) + kept.get("master", 0)
        trained += n * math.prod(shape) * dtype.itemsize
        masters += n * of_master
        moments += n * (sum(kept.values()) - of_master)
        largest = max(largest, sum(kept.values()))
    return StateBytes(weights, trained, masters, moments, largest)


def state_bytes(c: ModelConfig, setting: Setting) -> StateBytes:
    """Return the bytes of one GPU's weights, masters and optimizer states."""
    return _state_bytes(c, setting.dtype, setting.master, setting.states, setting.shards, setting.adapter)


@functools.cache
def _copy_bytes(c: ModelConfig, setting: Setting, arena_bytes: int) -> int:
    dtype, master, states = setting.dtype, setting.master, setting.states
    shapes = [shard_shape(shape, setting.shards) for shape in trained_shapes(c, setting.adapter)]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    for shape in shapes:
        sizes += adamw_bytes(shape, dtype, master, states).values()
    host = HostMemory(pinned=True, arena_bytes=arena_bytes)
    for n_bytes in sizes:
        host.place_piece(n_bytes)
    return sum(host.sizes)


def copy_bytes(c: ModelConfig, setting: Setting) -> int:
    """Return the bytes of pinned memory into which a save copies one GPU's trained weights, masters and states."""
    return _copy_bytes(c, setting, COPY_ARENA_BYTES)


# ---- whole weights of a sharded model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeBytes:
    """Bytes of a block's parameters and of those outside of blocks, with the padding of equal shards."""

    block: int
    others: int
    trained_block: int  # of the parameters that are trained
    trained_others: int


@functools.cache
def whole_bytes(c: ModelConfig, dtype: torch.dtype, shards: int, adapter: AdapterConfig | None = None) -> WholeBytes:
    """Return the bytes of the parameters that FSDP2 gathers at a time."""
    model = _meta_model(c, adapter)

    def gathered(parameters: Iterable[torch.nn.Parameter]) -> int:
        return sum(shards * math.prod(shard_shape(tuple(p.shape), shards)) * dtype.itemsize for p in parameters)

    block, others = list(model.layers[0].parameters()), list(model.parameters(recurse=False))
    trained = ([p for p in group if p.requires_grad] for group in (block, others))
    return WholeBytes(*map(gathered, (block, others, *trained)))


# ---- an adapter's updates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerUpdates:
    """What an adapter adds to one layer: the rank of all updates of each matrix, in the order of MAPS."""

    ranks: tuple[int, ...] = (0,) * len(MAPS)
    first: int = 0  # place in MAPS of the first matrix that backward reaches; len(MAPS): none

    def u_numbers(self, rows: int, tokens: int) -> int:
        """Return the numbers of u that the layer keeps: those of the first matrix for all tokens."""
        return self.ranks[0] * tokens + sum(self.ranks[1:]) * rows


@functools.cache
def layer_updates(c: ModelConfig, adapter: AdapterConfig | None) -> tuple[LayerUpdates, ...]:
    """Return each layer's updates. Backward ends at the first matrix that has one, or at an embedding that is trained.

    Without an adapter nothing is added, and backward passes all layers.
    """
    if adapter is None:
        return (LayerUpdates(),) * c.n_layers
    ranks: Counter[tuple[int, str]] = Counter()
    for update in list_updates(c, adapter):
        ranks[update.layer, update.parameter] += update.rank
    reached, layers = "embed_tokens" in adapter.saved, []
    for layer in range(c.n_layers):
        of_layer = tuple(ranks[layer, name] for name in MAPS)
        first = 0 if reached else next((i for i, rank in enumerate(of_layer) if rank), len(MAPS))
        reached = reached or any(of_layer)
        layers.append(LayerUpdates(of_layer, first))
    return tuple(layers)

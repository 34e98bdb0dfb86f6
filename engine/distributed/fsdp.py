"""A model that FSDP2 shards over the ranks, and the shards that this rank holds."""

from typing import Any

import torch

from engine.distributed.world import World
from engine.model.llama import Transformer
from engine.model.shard import Shard, first_row


def shard_model(model: Transformer, world: World) -> Transformer:
    """Shard a model's parameters over the ranks, in place. A model on the meta device is never allocated whole."""
    # Imported here: it takes a second, which a run of one rank does not have to wait.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    groups: list[Any] = [*model.layers, model]
    for module in groups:
        kept = module in (model.layers[-1], model)  # not freed after forward: backward needs them first
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=not kept)
    for name in ("loss", "logits"):
        register_fsdp_forward_method(model, name)
    for module in groups:  # gradients are sums over ranks, not means: see engine.distributed.world
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def set_last_micro_batch(model: Any, last: bool) -> None:
    """Set whether the next backward is the last one of a step.

    Replicas sum their gradients only in the last one. Until then, each keeps its own sums, in fp32.
    """
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(last)


def local_shards(model: torch.nn.Module) -> dict[str, Shard]:
    """Return {name: the rows that this rank holds} of the parameters: all rows where nothing is sharded."""
    return {name: local_shard(p) for name, p in model.named_parameters()}


def local_shard(p: Any) -> Shard:
    """Return the rows that this rank holds of a parameter, a tensor or a DTensor."""
    if not hasattr(p, "to_local"):
        return Shard(p.data)
    local, mesh = p.to_local(), p.device_mesh
    n_shards, shard = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    first = first_row(len(p), n_shards, shard)
    assert len(local) == first_row(len(p), n_shards, shard + 1) - first
    return Shard(local.detach(), first, len(p))


def gather_parameters(model: Any, world: World) -> dict[str, torch.Tensor]:
    """Return the whole trained parameters in the host's memory on rank 0, and {} on the others.

    They are gathered one after the other, so that each GPU holds at most one whole parameter.
    """
    whole = {}
    for module in (*model.layers, model):
        module.reshard()  # the last forward may have left them whole, as plain parameters
    for name, p in model.trained_parameters().items():
        full = p.full_tensor()
        if world.is_main:
            whole[name] = full.to("cpu", copy=True)
    return whole

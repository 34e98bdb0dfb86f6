"""A model cut over the ranks by FSDP2, and what each rank holds of it."""

import torch

from engine.distributed.world import World
from engine.model.shard import Shard, first_row


def shard_model(model, world: World):
    """Cuts a model's parameters over the ranks, in place. On meta, nothing is allocated before it is cut."""
    # Imported here: it takes a second, which a run of one rank need not wait.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    groups = [*model.layers, model]
    for module in groups:
        kept = module in (model.layers[-1], model)  # whole until backward, which begins with them
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=not kept)
    for name in ("loss", "logits"):
        register_fsdp_forward_method(model, name)
    for module in groups:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def set_last_micro_batch(model, last: bool) -> None:
    """Whether the next backward is the last one of a step. Replicas add their gradients up there alone; until then each
    keeps its own sums, in fp32."""
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(last)


def local_shards(model) -> dict[str, Shard]:
    """What this rank holds of each parameter: {name: rows}; of a model that is not sharded, all."""
    return {name: held_of(p) for name, p in model.named_parameters()}


def held_of(p) -> Shard:
    if not hasattr(p, "to_local"):
        return Shard(p.data)
    local, mesh = p.to_local(), p.device_mesh
    shards = mesh.size(mesh.ndim - 1)
    first = first_row(len(p), shards, mesh.get_local_rank(mesh.ndim - 1))
    assert len(local) == first_row(len(p), shards, mesh.get_local_rank(mesh.ndim - 1) + 1) - first
    return Shard(local.detach(), first, len(p))


def gather_parameters(model, world: World) -> dict[str, torch.Tensor]:
    """The whole parameters in the host's memory of rank 0, {} elsewhere; one at a time is whole on each rank."""
    whole = {}
    for module in (*model.layers, model):
        module.reshard()  # the last forward may have left them whole, as plain parameters
    for name, p in model.named_parameters():
        full = p.full_tensor()
        if world.is_main:
            whole[name] = full.to("cpu", copy=True)
    return whole

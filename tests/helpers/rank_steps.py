"""Two steps of a small bf16 model on one of several ranks, for each kind of states, in one process group."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from engine.data import packing
from engine.data.batches import StepBatch
from engine.distributed.fsdp import local_shards, shard_model
from engine.distributed.world import World, start_ranks
from engine.model.config import ModelConfig
from engine.model.llama import Transformer, new_model
from engine.training.optimizer import AdamW
from engine.training.step import Steps
from tests.helpers.datasets import dataset

# Two shards of a matrix are whole blocks of 256 elements, and all matrices have 8-bit states.
SHAPE = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=128, vocab_size=256, max_seq_len=64)
KINDS = [  # master, m and v, where they are kept and updated
    ("stochastic", "8bit", "device"), ("stochastic", "fp32", "device"), ("split", "8bit", "device"),
    ("fp32", "bf16", "device"), ("stochastic", "8bit", "host, updated on the device"), ("split", "bf16", "host"),
]  # fmt: skip
N_STEPS, N_MICRO_BATCHES, LR = 2, 4, 1e-2
ROWS = [[*range(7 * i, 7 * i + 9 + i % 5), 200 + i] for i in range(N_STEPS * N_MICRO_BATCHES)]


def make_model(world: World | None = None) -> Transformer:
    """Return the model, or this rank's shard of it, with weights of seed 0."""
    model = new_model(SHAPE, "cpu", torch.bfloat16, "ref", shard=partial(shard_model, world=world) if world else None)
    model.init_weights(0, local_shards(model))
    return model


def make_optimizer(model: Transformer, master: str, states: str, place: str) -> AdamW:
    return AdamW(
        model, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, master=master, states=states, seed=3, impl="ref",
        offload=place != "device", on_cpu=place == "host",
    )  # fmt: skip


def micro_batches(step: int) -> list[packing.MicroBatch]:
    """Return a step's micro-batches, each of one row. Steps count from 1."""
    data, first = dataset(ROWS), (step - 1) * N_MICRO_BATCHES
    examples = [data.get_examples(np.array([first + i])) for i in range(N_MICRO_BATCHES)]
    return [packing.make_micro_batches(one, packing.Packing(64), scale=1 / 40)[0] for one in examples]


def take_steps(world: World, kind: tuple[str, str, str]) -> dict:
    """Take the steps, each rank every second micro-batch, and return this rank's rows and the figures."""
    model = make_model(world)
    optimizer = make_optimizer(model, *kind)

    def take(step):
        mine = [model.prepare_batch(batch) for batch in micro_batches(step)[world.rank :: world.size]]
        return StepBatch(mine, np.arange(N_MICRO_BATCHES), 0, 0, 0)

    steps = Steps(model, optimizer, SimpleNamespace(take=take), grad_clip=0.0, world=world)
    for step in range(1, N_STEPS + 1):
        assert steps.take_step(step, LR)
    rows = {name: (shard.tensor.clone(), shard.first) for name, shard in optimizer.tensors().items()}
    return {"rows": rows, "figures": [(report.loss, report.grad_norm) for report in steps.take_reports(wait=True)]}


def main() -> None:
    """Run every kind on two shards and on two replicas, and save what came of it to the folder that is given."""
    torch.set_num_threads(1)
    with start_ranks("cpu", 60) as world:
        found = {}
        for replicas in (1, 2):
            world.arrange_replicas(replicas)
            found |= {(replicas, *kind): take_steps(world, kind) for kind in KINDS}
        torch.save(found, f"{sys.argv[1]}/{world.rank}.pt")

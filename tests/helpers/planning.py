"""Small models, recipes and settings for the tests of engine.planning."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from engine.distributed.fsdp import shard_model
from engine.model.adapter import AdapterConfig
from engine.model.batch import MicroBatch
from engine.model.config import MODELS, ModelConfig
from engine.model.llama import Transformer, new_model
from engine.planning.cards import find_card
from engine.planning.projection import Estimate, estimate_run
from engine.planning.setting import Recipe
from engine.planning.workload import alpaca_mix
from engine.training.config import FinetuneConfig
from engine.training.planning_input import recipe_from_config, setting_from_config

SMALL = dict(
    dim=48, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=80, vocab_size=301, max_seq_len=128, head_dim=16
)  # fmt: skip
SHAPES = {  # changes of SMALL
    "grouped queries": {}, "all heads have keys": {"n_kv_heads": 4}, "tied": {"tied": True},
    "one layer": {"n_layers": 1}, "heads of another width": {"dim": 40, "head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip
TINY = ModelConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=12, vocab_size=10, max_seq_len=64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_of(model: str = "llama-7b", **changes: Any) -> FinetuneConfig:
    """Return engine.finetune's default settings for a named shape, but for fp32 states, with changes."""
    return FinetuneConfig(model, random_init=True, data=("alpaca",), **{"optimizer_states": "fp32"} | changes)


def recipe_of(n_cards: int = 1, **changes: Any) -> Recipe:
    """Return the recipe of config_of(**changes) on n_cards GPUs."""
    return recipe_from_config(config_of(**changes), n_cards)


def estimate_of(card: str = "H100", n_cards: int = 1, **changes: Any) -> Estimate:
    """Return the estimate of config_of(**changes) on n_cards GPUs, trained on Alpaca."""
    config, recipe = config_of(**changes), recipe_of(n_cards, **changes)
    setting = setting_from_config(config, torch.bfloat16, n_cards)
    return estimate_run(MODELS[config.model], find_card(card), alpaca_mix(recipe), recipe, setting)


def sharded_model(
    c: ModelConfig,
    dtype: torch.dtype,
    replicas: int,
    shards: int,
    recompute: str = "cheap",
    adapter: AdapterConfig | None = None,
) -> tuple[Transformer, Callable[[], None]]:
    """Return a model as engine.distributed shards it in the process group at hand, and a function that takes a step.

    The step is the forward and backward of two micro-batches; replicas are summed with the last.
    """
    names = ("replicas", "shards")
    mesh = init_device_mesh("cpu", (replicas, shards)[replicas == 1 :], mesh_dim_names=names[replicas == 1 :])
    model = new_model(c, "cpu", dtype, "ref", recompute, adapter=adapter)
    model.init_weights(0)
    model.init_adapter(0)
    shard_model(model, SimpleNamespace(mesh=mesh, replicas=replicas, shards=shards))
    documents, rows = torch.tensor([[0, 8, 0, 0]], dtype=torch.int32), torch.arange(5, 8)
    batch = MicroBatch(
        torch.randint(301, (8,)), torch.arange(8), documents, rows, torch.randint(301, (3,)), torch.ones(3)
    )

    def step() -> None:
        for last in (False, True):
            for module in (*model.layers, model):
                module.set_requires_all_reduce(last)
            model.loss(batch).backward()

    return model, step

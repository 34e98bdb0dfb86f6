"""Convert a FinetuneConfig to the Setting and the Recipe that engine.planning computes with."""

import torch

from engine.model.adapter import adapter_from_settings
from engine.planning.setting import Recipe, Setting
from engine.training.config import FinetuneConfig
from engine.training.optimizer import prefers_cpu


def setting_from_config(
    config: FinetuneConfig, dtype: torch.dtype, n_cards: int = 1, on_cpu: bool | None = None
) -> Setting:
    """Return the choices that decide the bytes of a step on n_cards GPUs, which are one replica without --replicas.

    on_cpu: whether the CPU updates offloaded states. None: as prefers_cpu() says, wherever csrc/cpu is.
    """
    replicas = (config.replicas or 1) if n_cards > 1 else 1
    return Setting(
        dtype, config.master_weights, config.optimizer_states, config.recompute, config.offload_optimizer,
        config.optimizer_in_backward, n_cards // replicas, replicas, config.save_every not in ("off", "end"),
        prefers_cpu(n_cards) if on_cpu is None else on_cpu, adapter_from_settings(vars(config)),
    )  # fmt: skip


def recipe_from_config(config: FinetuneConfig, n_cards: int = 1) -> Recipe:
    """Return what a run on n_cards GPUs trains on, and how often."""
    return Recipe(
        config.model, n_cards, config.replicas, config.epochs, config.max_steps, config.global_batch_size,
        config.micro_batch_tokens, config.micro_batch_size, config.max_length, config.seed, config.train_on_prompt,
        config.share_prefix,
    )  # fmt: skip

"""What planning is given of a run's settings."""

import torch

from engine.planning.setting import Setting
from engine.training.planning_input import recipe_from_config, setting_from_config
from tests.helpers.planning import config_of


def test_without_replicas_a_setting_is_one_over_all_cards():
    for config, n, mesh in (
        (config_of(), 1, (1, 1)), (config_of(replicas=2), 1, (1, 1)), (config_of(), 4, (4, 1)),
        (config_of(replicas=2), 8, (4, 2)),
    ):  # fmt: skip
        setting = setting_from_config(config, torch.bfloat16, n)
        assert (setting.shards, setting.replicas) == mesh


def test_every_flag_that_decides_bytes_arrives(monkeypatch):
    config = config_of(
        master_weights="stochastic", optimizer_states="8bit", recompute="block", optimizer_in_backward=True,
        grad_clip=0.0, save_every="epoch",
    )  # fmt: skip
    wanted = Setting(torch.float32, "stochastic", "8bit", "block", False, True, saves=True, on_cpu=True)
    assert setting_from_config(config, torch.float32) == wanted
    offloaded = config_of(offload_optimizer=True)
    assert setting_from_config(offloaded, torch.bfloat16) == Setting(offload=True, on_cpu=True)
    assert setting_from_config(offloaded, torch.bfloat16, 2) == Setting(offload=True, shards=2)
    assert setting_from_config(offloaded, torch.bfloat16, on_cpu=False) == Setting(offload=True)
    monkeypatch.setenv("CRIA_OPTIMIZER", "cpu")
    assert setting_from_config(offloaded, torch.bfloat16, 2) == Setting(offload=True, shards=2, on_cpu=True)
    monkeypatch.setenv("CRIA_OPTIMIZER", "triton")
    assert setting_from_config(offloaded, torch.bfloat16) == Setting(offload=True)
    assert not setting_from_config(config_of(save_every="off"), torch.bfloat16).saves


def test_a_recipe_has_the_runs_settings():
    config = config_of(epochs=2, max_steps=7, micro_batch_tokens=4096, seed=5, share_prefix=False)
    recipe = recipe_from_config(config, 8)
    assert recipe.n_cards == 8
    for name in vars(recipe):
        assert name == "n_cards" or getattr(recipe, name) == getattr(config, name), name

"""The disk that a run asks for before it begins."""

from types import SimpleNamespace

import pytest
import torch

from engine.model.config import MODELS
from engine.training import saving
from engine.training.config import FinetuneConfig


@pytest.mark.parametrize(
    ("save_every", "keep", "there", "n_states"),
    [("5", 2, 0, 3), ("epoch", 1, 0, 2), ("5", 2, 2, 1), ("5", 2, 5, 0), ("end", 2, 0, 0), ("off", 2, 0, 0)],
)
def test_there_is_room_for_every_state_that_lies_there_at_one_time(
    tmp_path, monkeypatch, save_every, keep, there, n_states
):
    """One more than --keep, since the oldest goes when the newest is whole; those that are there have their place."""
    for step in range(there):
        (tmp_path / f"checkpoint-{step}").mkdir()
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), save_every=save_every, keep=keep,
                            optimizer_states="fp32")  # fmt: skip
    plan = SimpleNamespace(
        config=config, out=tmp_path, model_config=MODELS["tiny"], dtype=torch.bfloat16,
        saves_during_run=save_every not in ("off", "end"),
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(saving.folder, "require_disk_space", lambda out, need, remedy: asked.append((out, need)))
    saving.require_disk_space(plan)
    n = MODELS["tiny"].n_parameters
    assert asked == [(tmp_path, n * (2 + n_states * (2 + 2 + 8)))], (
        "the weights; and 16 bits more, m and v in each state"
    )

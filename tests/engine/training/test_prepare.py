"""What several ranks agree on before a run."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.data.packing import Packing
from engine.model.config import MODELS
from engine.training.config import FinetuneConfig
from engine.training.plan import Plan
from engine.training.prepare import agree_on_plan


@pytest.mark.parametrize("asked", ["auto", "none"])
@pytest.mark.parametrize("theirs", ["none", "cheap"])
def test_one_rank_that_must_recompute_makes_all_do_so_unless_a_flag_says_none(asked, theirs):
    config = FinetuneConfig(model="tiny", random_init=True, data=("rows.json",), recompute=asked)
    facts = {"data_sha256": "0", "model": {}, "dtype": "float32"}
    train = SimpleNamespace()
    plan = Plan(
        config, Path("out"), torch.device("cpu"), torch.float32, "ref", MODELS["tiny"], None, None, train, None, [], 3,
        Packing(512), 2, "none", facts,
    )  # fmt: skip
    other = iter(
        [384, 1, int(theirs == "none")]
    )  # the other rank's tokens, replicas, and whether it recomputes nothing
    world = SimpleNamespace(
        gather=lambda mine: [mine, mine], min_over_ranks=lambda mine: min(mine, next(other)), arrange_replicas=print
    )
    agreed = agree_on_plan(plan, world)
    assert (agreed.packing.max_tokens, agreed.replicas) == (384, 1)
    assert agreed.recompute == (theirs if asked == "auto" else "none")
    assert dataclasses.replace(agreed, recompute="none", packing=plan.packing, replicas=2) == plan

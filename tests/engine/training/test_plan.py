"""What is due after which step, and when the host must wait for a step's figures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.data.packing import Packing
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS
from engine.planning.setting import describe_mesh
from engine.planning.weights import count_trained
from engine.training import plan as plan_module
from engine.training.config import FinetuneConfig
from engine.training.plan import (
    Plan,
    count_examples,
    describe_adapter,
    describe_offload,
    describe_plan,
    suggest_more_updates,
)

STEPS = 7
DUE = {"off": [], "end": [0, 7], "epoch": [0, 3, 6, 7], "2": [0, 2, 4, 6, 7], "7": [0, 7], "9": [0, 7]}


class Small(Plan):
    """7 steps in epochs of 3, with these settings alone."""

    def __init__(self, held_out=None, device="cpu", **config):
        config = {"eval_every": "off", "save_every": "off", "sample_every": "off", "spike_rollback": False} | config
        facts = {"config": SimpleNamespace(**config), "held_out": held_out, "device": torch.device(device)}
        self.__dict__.update(facts, total_steps=STEPS)

    order = SimpleNamespace(steps_per_epoch=3)


@pytest.mark.parametrize("every", DUE)
def test_what_is_due_after_which_step(every):
    assert [step for step in range(STEPS + 1) if Small().is_due(every, step)] == DUE[every]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [7]),
        ({"eval_every": "2", "held_out": "a dataset"}, DUE["2"]),
        ({"eval_every": "2"}, [7]),
        ({"save_every": "2"}, DUE["2"]),
        ({"save_every": "end"}, [7]),  # the last step's alone, which is waited for
        ({"sample_every": "epoch"}, DUE["epoch"]),
        ({"sample_every": "epoch", "save_every": "2", "eval_every": "5", "held_out": "x"}, [0, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_host_waits_where_something_due_must_know_how_the_step_went(settings, steps):
    assert [step for step in range(STEPS + 1) if Small(**settings).must_wait_after(step)] == steps


@pytest.mark.parametrize(
    ("device", "rollback", "ahead"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_the_host_runs_ahead_on_a_gpu_where_no_step_is_undone(device, rollback, ahead):
    assert Small(device=device, spike_rollback=rollback).runs_ahead == ahead


@pytest.mark.parametrize(
    "rows, size, epochs, max_steps, text",
    [
        (1000, 128, 1, None, "--global-batch-size 32, or --epochs 3"),
        (1280, 128, 1, None, "--global-batch-size 64, or --epochs 2"),
        (1279, 128, 1, None, "--global-batch-size 32, or --epochs 3"),
        (30, 128, 3, None, "--global-batch-size 4, or --epochs 20"),
        (5, 1, 2, None, "--epochs 4"), (5, 2, 2, None, "--global-batch-size 1, or --epochs 10"),
        (30, 8, 1, 3, "a larger --max-steps"),
        (30, 8, 1, 9, "--global-batch-size 1, or --epochs 7"),
    ],
)  # fmt: skip
def test_what_gives_more_updates(rows, size, epochs, max_steps, text):
    steps = max(1, rows // size)
    plan = SimpleNamespace(
        config=SimpleNamespace(epochs=epochs, max_steps=max_steps, global_batch_size=size), train=range(rows),
        order=SimpleNamespace(steps_per_epoch=steps), total_steps=min(epochs * steps, max_steps or 10**9),
    )  # fmt: skip
    assert suggest_more_updates(plan) == f"for more pass {text}"


@pytest.mark.parametrize(
    "on_cpu, ranks, text",
    [
        (None, 1, ""), (False, 1, "host's memory; they visit the device for their updates"),
        (True, 1, "updated by the CPU; gradients go there in backward"),
        (True, 2, "updated by the CPU; gradients go there after backward"),
    ],
)  # fmt: skip
def test_where_offloaded_states_are_updated(on_cpu, ranks, text):
    found = describe_offload(SimpleNamespace(on_cpu=on_cpu), SimpleNamespace(size=ranks))
    assert found.endswith(text) and found.startswith("\noptimizer: master and states in the" if text else "")


def test_what_an_adapter_trains():
    adapter = AdapterConfig(r=8, targets=("q_proj", "v_proj"), rank_pattern=(("v_proj", 4),))
    shape = MODELS["tiny"]
    config = SimpleNamespace(adapter_dir=None, lora_targets=("q_proj", "v_proj"))
    plan = SimpleNamespace(adapter=adapter, model_config=shape, config=config)
    n = count_trained(shape, adapter)
    text = (
        f"\nadapter: {n / 1e6:.2f}M parameters are trained ({100 * n / shape.n_parameters:.2g}%), updates of rank 4, 8"
    )
    assert describe_adapter(plan) == f"{text} of q_proj, v_proj" and n > 0
    config.adapter_dir = "a"
    assert describe_adapter(plan) == f"{text} of q_proj, v_proj, going on from a"
    plan.adapter = None
    assert describe_adapter(plan) == ""


@pytest.mark.parametrize(
    "size, rows, text", [(1, 9, "1 example"), (9, 9, "9 examples"), (10, 9, "all 9 examples"), (2, 1, "all 1 example")]
)
def test_how_many_examples_a_step_has(size, rows, text):
    assert count_examples(SimpleNamespace(config=SimpleNamespace(global_batch_size=size), train=range(rows))) == text


@pytest.mark.parametrize(
    "lr, schedule, ratio, n", [(0.0, "cosine", 0.0, 0), (1e-4, "constant", 0.0, STEPS), (1e-4, "constant", 0.5, 6)]
)
def test_updates_are_the_steps_with_a_rate(lr, schedule, ratio, n):
    assert Small(lr=lr, lr_schedule=schedule, warmup_ratio=ratio).n_updates == n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_is_called_slow_on_a_cpu_without_its_instructions(dtype, multiplies, device, monkeypatch):
    monkeypatch.setattr(plan_module, "cpu_multiplies_bf16", lambda: multiplies)
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), micro_batch_size=3, optimizer_states="fp32")
    plan = Plan(
        config, Path("out"), torch.device(device), dtype, "ref", MODELS["tiny"], None, None, range(40), None, [], 30,
        Packing(512), 1, "cheap", {"dtype": "bf16"}, None,
    )  # fmt: skip
    told = describe_plan(plan, SimpleNamespace(size=4, n_shards=2, replicas=2))
    is_slow = device == "cpu" and dtype == torch.bfloat16 and not multiplies
    assert ("kernels: ref (this CPU has no bf16 instructions: --dtype fp32 is faster); weights" in told) == is_slow
    assert ("kernels: ref; weights" in told) == (not is_slow) and f"bf16 on {device}, kernels" in told
    assert (
        f" GB, on 4 ranks: {describe_mesh(2, 2)}\nplan: 30 steps of all 40 examples in micro-batches of at most "
        in told
    )
    assert "at most 512 tokens and 3 examples; 40 examples, 3 epochs" in told

"""What several ranks agree on before a run."""

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import DataError, UsageError
from engine.data.packing import Packing
from engine.distributed.world import World
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS, RopeScaling
from engine.training import prepare as prepare_module
from engine.training.config import GROUPS, FinetuneConfig
from engine.training.plan import Plan
from engine.training.prepare import (
    PATHS,
    agree_on_plan,
    check_ranks,
    prepare,
    read_prompts,
    select_fixed_settings,
    take_recorded_states,
)
from tests.helpers.small_model import small_model


def make_plan(recompute="auto", **facts):
    """A plan of two replicas in micro-batches of 512 tokens, without rows or a model."""
    config = FinetuneConfig(model="tiny", random_init=True, data=("rows.json",), recompute=recompute)
    facts = {"data_sha256": "0", "model": {}, "dtype": "float32"} | facts
    return Plan(
        config, Path("out"), torch.device("cpu"), torch.float32, "ref", MODELS["tiny"], None, None, SimpleNamespace(),
        None, [], 3, Packing(512), 2, "none", facts,
    )  # fmt: skip


WITH_DATA = SimpleNamespace(sha256=lambda: "1")
OF_A_RANK = {
    "data": {"facts": {"data_sha256": "1"}}, "held-out data": {"held_out": WITH_DATA},
    "sample prompts": {"sample_prompts": ["Say no."]}, "settings": {"config": {"lr": 0.5}},
    "settings ": {"config": {"eval_every": "7"}},  # which a resumed run may change, and ranks may not
    "optimizer states (choose them by --optimizer-states)": {"config": {"optimizer_states": "8bit"}},
    "model": {"facts": {"model": {"dim": 8}}}, "base": {"facts": {"base_sha256": "1"}},
    "dtype": {"facts": {"dtype": "bfloat16"}}, "kernels": {"kernels": "native"},
}  # fmt: skip


@pytest.mark.parametrize("what", OF_A_RANK)
def test_a_rank_with_other_files_or_flags_is_named_with_what_differs(what):
    plan, changes, said = make_plan(base_sha256="0"), dict(OF_A_RANK[what]), []
    if "facts" in changes:
        changes["facts"] = plan.facts | changes["facts"]
    if "config" in changes:
        changes["config"] = dataclasses.replace(plan.config, **changes["config"])
    world = SimpleNamespace(gather=lambda mine: said.append(mine) or [mine])
    world.error_on_all_ranks = world.min_over_ranks = lambda error: error
    world.arrange_replicas = lambda replicas: None
    for one in (plan, dataclasses.replace(plan, **changes)):
        agree_on_plan(one, world)
    world.gather = lambda mine: [said[0], said[0], said[1]]
    with pytest.raises(DataError, match=re.escape(f"rank 2 has other {what.strip()} than rank 0;")):
        agree_on_plan(plan, world)


@pytest.mark.parametrize("start", [None, "of this base", "of another base"])
def test_wide_ranks_are_told_of_new_updates_alone(start, monkeypatch):
    """Those of an adapter to go on from are as they are; of it another base is told."""
    adapter, said = AdapterConfig(r=1000), []
    monkeypatch.setattr(
        prepare_module, "describe_other_base", lambda adapter, source: "other" if adapter == "of another base" else None
    )
    prepare_module.warn_of_adapter(adapter, start, MODELS["tiny"], "a source", said.append)
    told = {None: "ranks over what the maps can have", "of another base": "other"}.get(start)
    assert len(said) == bool(told) and (not told or said[0].startswith(f"warning: {told}"))


def test_paths_may_differ_between_ranks():
    """Each machine may have its own folders and files, whose contents are compared."""
    plan = make_plan()
    theirs = dataclasses.replace(
        plan, config=dataclasses.replace(plan.config, out="/elsewhere", data=("/d/rows.json",))
    )
    said = []
    world = SimpleNamespace(
        gather=lambda mine: said.append(mine) or [mine], min_over_ranks=lambda n: n, arrange_replicas=lambda n: None
    )
    agree_on_plan(plan, world), agree_on_plan(theirs, world)
    assert said[0] == said[1]


@pytest.mark.parametrize("asked", ["auto", "none"])
@pytest.mark.parametrize("theirs", ["none", "cheap"])
def test_one_rank_that_must_recompute_makes_all_do_so_unless_a_flag_says_none(asked, theirs):
    plan = make_plan(asked)
    other = iter(
        [384, 1, int(theirs == "none")]
    )  # the other rank's tokens, replicas, and whether it recomputes nothing
    arranged = []
    world = SimpleNamespace(
        gather=lambda mine: [mine, mine],
        min_over_ranks=lambda mine: min(mine, next(other)),
        arrange_replicas=arranged.append,
    )
    agreed = agree_on_plan(plan, world)
    assert (agreed.packing.max_tokens, agreed.replicas, arranged) == (384, 1, [1])
    assert agreed.recompute == (theirs if asked == "auto" else "none")
    assert dataclasses.replace(agreed, recompute="none", packing=plan.packing, replicas=2) == plan


MANIFEST = {"format": 1, "step": 3, "files": {"state.safetensors": {"bytes": 1, "sha256": "0"}}}


def test_a_run_goes_on_with_the_states_that_it_recorded(tmp_path):
    """A GPU with other memory would choose others; a flag insists, and --resume never starts anew."""
    config = FinetuneConfig(model="tiny", random_init=True, data=("rows.json",), out=str(tmp_path))
    assert take_recorded_states(config) is config
    recorded = {"settings": {"optimizer_states": "8bit"}}
    (tmp_path / "run.json").write_text(json.dumps({"status": "stopped", "facts": recorded}))
    assert take_recorded_states(config).optimizer_states == "8bit"
    for changes in ({"resume": "never"}, {"optimizer_states": "fp32"}):
        changed = dataclasses.replace(config, **changes)
        assert take_recorded_states(changed) is changed
    named = tmp_path / "elsewhere" / "checkpoint-3"
    named.mkdir(parents=True)
    recorded["settings"]["optimizer_states"] = "bf16"
    (named / "manifest.json").write_text(json.dumps(recorded | MANIFEST))
    assert take_recorded_states(dataclasses.replace(config, resume=str(named))).optimizer_states == "bf16"


FREE = {"max_skips", "spike_threshold", "spike_rollback"}  # of the recipe, what changes no update by itself
CHANGES = {
    "model": "smollm2-135m", "random_init": False, "prompt_style": "chatml", "train_on_prompt": True, "max_length": 64,
    "shuffle": False, "seed": 1, "eval_fraction": 0.5, "epochs": 9, "max_steps": 9, "global_batch_size": 9, "lr": 1.0,
    "lr_schedule": "linear", "warmup_ratio": 0.5, "weight_decay": 0.5, "beta1": 0.5, "beta2": 0.5, "adam_eps": 0.5,
    "grad_clip": 0.5, "loss_norm": "micro-mean", "master_weights": "fp32", "optimizer_states": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_decides_what_is_computed_is_compared_on_resume(name):
    assert set(GROUPS["recipe"]) - FREE <= set(CHANGES), "a flag of the recipe that this test does not know"
    config = FinetuneConfig(model="smollm2-135m" if name == "random_init" else "tiny", random_init=True, data=("x",))
    other = dataclasses.replace(config, **{name: CHANGES[name]})
    assert select_fixed_settings(config, None)[name] != select_fixed_settings(other, None)[name]


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(2, None, 8), (2, 5, 5), (2, 8, 8), (2, 99, 8), (1, 99, 4)])
def test_a_run_ends_with_its_epochs_or_sooner(rows_file, tmp_path, epochs, max_steps, steps):
    config = FinetuneConfig(  # of 24 rows
        model=str(small_model()), data=(str(rows_file),), out=str(tmp_path / "out"), device="cpu", token_cache="off",
        epochs=epochs, max_steps=max_steps, global_batch_size=6, kernels="ref",
    )  # fmt: skip
    assert prepare(config, World(), print).total_steps == steps


@pytest.mark.parametrize(("dtype", "multiple"), [("bf16", 32), ("fp32", 1)])
def test_micro_batches_of_a_cpu_are_padded_in_bf16(dtype, multiple, rows_file, tmp_path):
    config = FinetuneConfig(
        model=str(small_model()), data=(str(rows_file),), out=str(tmp_path / "out"), device="cpu", token_cache="off",
        dtype=dtype, kernels="ref", max_length=40, micro_batch_tokens=70,
    )  # fmt: skip
    plan = prepare(config, World(), print)
    packing = plan.packing
    assert "base_sha256" not in plan.facts, "a state of whole weights goes on without its base"
    assert (packing.multiple, packing.max_tokens) == (multiple, 96 if multiple == 32 else 70)


@pytest.mark.parametrize(("kind", "max_length", "asked", "shares"), [
    (None, 48, True, True), (None, 48, False, False), ("dynamic", 40, True, True), ("dynamic", 48, True, False),
])  # fmt: skip
def test_prefixes_are_shared_unless_positions_turn_by_the_length_of_a_text(
    kind, max_length, asked, shares, rows_file, tmp_path, monkeypatch
):
    scaling = kind and RopeScaling(kind=kind, factor=2.0)
    shape = dataclasses.replace(MODELS["tiny"], vocab_size=70_000, max_seq_len=40 if kind else 48, rope_scaling=scaling)
    monkeypatch.setitem(MODELS, "tiny", shape)
    config = FinetuneConfig(
        model="tiny", random_init=True, tokenizer=str(small_model()), data=(str(rows_file),), device="cpu",
        out=str(tmp_path / "out"), token_cache="off", kernels="ref", max_length=max_length, share_prefix=asked,
    )  # fmt: skip
    assert prepare(config, World(), print).packing.share_prefix == shares


@pytest.mark.parametrize("asked", [True, False])
def test_deterministic_algorithms_are_insisted_on_where_asked(asked, monkeypatch):
    told = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", told.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(DataError, match="no such folder"):  # which is looked for next
        prepare(FinetuneConfig(model="/none", data=("x",), device="cpu", deterministic=asked), World(), print)
    assert told == [True] * asked and ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == asked


def test_sample_prompts_are_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\n\n  \n two \r\n")
    assert read_prompts(str(path)) == ["one", " two "] and len(read_prompts("")) == 3
    path.write_text(" \n")
    with pytest.raises(DataError, match=r"holds no prompt; write one a line"):
        read_prompts(str(path))
    for name in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=r"cannot be read .*; give a UTF-8 text file"):
            read_prompts(str(name))


@pytest.mark.parametrize(
    ("size", "batch", "replicas", "told"),
    [
        (4, 4, None, None), (4, 3, None, "--global-batch-size 3 is under the 4 ranks"), (4, 8, 2, None),
        (4, 8, 4, None),
        (6, 6, 4, "--replicas 4 of 6 ranks; wanted one of 1, 2, 3, 6"), (1, 1, 2, "--replicas 2 of 1 ranks"),
    ],
)  # fmt: skip
def test_what_several_ranks_cannot_follow_is_refused(size, batch, replicas, told):
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), global_batch_size=batch, replicas=replicas,
                            optimizer_states="fp32")  # fmt: skip
    world = SimpleNamespace(size=size)
    if told is None:
        check_ranks(config, MODELS["tiny"], world)
    else:
        with pytest.raises(UsageError, match=told):
            check_ranks(config, MODELS["tiny"], world)


@pytest.mark.parametrize("name, value", [
    ("save_every", "7"), ("keep", 9), ("kernels", "ref"), ("replicas", 2), ("resume", "never"), ("log_every", 9),
    ("out", "elsewhere"), ("tracker", "wandb"), ("micro_batch_tokens", 4096), ("eval_every", "7"), ("max_skips", 99),
])  # fmt: skip
def test_a_setting_that_decides_nothing_of_what_is_computed_may_change_on_resume(name, value):
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), optimizer_states="fp32")
    changed = dataclasses.replace(config, **{name: value})
    assert getattr(changed, name) != getattr(config, name)
    assert select_fixed_settings(changed, None) == select_fixed_settings(config, None)


def test_every_place_of_a_machine_may_be_another_on_another_one():
    places = {
        "model",
        "adapter_dir",
        "tokenizer",
        "data",
        "eval_data",
        "token_cache",
        "out",
        "sample_prompts",
        "resume",
    }
    assert places == PATHS


def test_a_setting_is_compared_only_where_it_decides_something():
    """The cut of a step under micro-mean, what is left out under a rollback, and an adapter where there is one."""

    def settings_of(**more):
        named = {"model": str(small_model()), "data": ("x",), "optimizer_states": "fp32", "save_every": "1"}
        return select_fixed_settings(FinetuneConfig(**named | more), None)

    names = ("micro_batch_size", "spike_rollback", "adapter", "lora_r")
    plain = settings_of(micro_batch_size=3, spike_threshold=4.5)
    assert not plain.keys() & set(names), "states of older versions have none of them"
    assert settings_of(micro_batch_size=3, loss_norm="micro-mean")["micro_batch_size"] == 3
    assert settings_of(spike_rollback=True, spike_threshold=4.5)["spike_rollback"] == 4.5
    with_adapter = settings_of(adapter="lora", lora_r=5)
    assert (with_adapter["adapter"], with_adapter["lora_r"]) == ("lora", 5)

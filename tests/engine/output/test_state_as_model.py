"""A training state's config, of this version and of those before it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import finetune
from engine.base.errors import DataError, run_main
from engine.output import state_as_model as module
from engine.output.folder import STATUSES
from engine.output.state_as_model import ADDED, config_from_state, find_base, open_base, open_training_state
from tests.helpers.checkpoints import SHAPES
from tests.helpers.small_model import small_model


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_comes_back_from_a_manifest(shape):
    problems = []
    assert config_from_state(asdict(SHAPES[shape]), problems) == SHAPES[shape] and not problems


@pytest.mark.parametrize("shape", ["grouped", "llama3-rope"])
def test_a_manifest_of_the_first_version_lacks_fields(shape):
    raw, problems = asdict(SHAPES[shape]), []
    for part in (raw, raw["rope_scaling"] or {}):
        for name in ADDED | {"kind"}:
            part.pop(name, None)
    assert config_from_state(raw, problems) == SHAPES[shape] and not problems


def test_a_kind_of_rope_that_is_not_known_is_a_problem():
    raw, problems = asdict(SHAPES["yarn-rope"]), []
    raw["rope_scaling"]["kind"] = "longrope"
    assert config_from_state(raw, problems) is None
    assert "kind is 'longrope', wanted one of linear, dynamic, yarn, llama3" in problems[0]


@pytest.mark.parametrize("status", [*STATUSES, None])
@pytest.mark.parametrize("has_model", [False, True])
def test_a_run_takes_tokenizer_and_settings_from_its_own_model_only_once_that_is_whole(tmp_path, status, has_model):
    """Of one that has not ended the files may be those of an earlier run, or a part of its own."""
    if has_model:
        (tmp_path / "config.json").write_text("{}")
    if status:
        (tmp_path / "run.json").write_text(json.dumps({"status": status, "config": {"tokenizer": "t"}}))
    found = find_base(tmp_path / "checkpoint-3", {"model": "/models/m"})
    began = Path("/models/m"), "t" if status else None
    assert found == ((tmp_path, "") if status == "done" and has_model else began)
    if found == began:
        assert find_base(tmp_path / "checkpoint-3", {"model": "tiny", "random_init": True})[0] is None


@pytest.mark.parametrize("adapter", [(), ("--adapter", "lora", "--lora-r", 3)], ids=str)
def test_a_state_has_what_its_run_and_its_base_have(adapter, tmp_path, rows_file):
    """The settings of generation, the style of prompts and the adapter; and no more parameters than bytes."""
    out, base, settings = tmp_path / "out", tmp_path / "base", {"temperature": 0.25, "eos_token_id": [2, 7]}
    shutil.copytree(small_model(), base)
    (base / "generation_config.json").write_text(json.dumps(settings))
    flags = ("--model", base, "--data", rows_file, "--out", out, "--dtype", "fp32", "--global-batch-size", 2,
             "--max-length", 64, "--max-steps", 2, "--save-every", 1, *adapter)  # fmt: skip
    assert run_main(finetune.main, [*map(str, flags)]) == 0
    (out / "run.json").write_text(json.dumps({"status": "stopped", "config": {"tokenizer": "t"}}))
    (state,) = out.glob("checkpoint-1")
    found = open_training_state(state)
    assert (found.base, found.tokenizer, found.generation_config) == (base, "t", settings)
    assert found.prompt_style == "alpaca" and (found.adapter.r if adapter else found.adapter) == (
        3 if adapter else None
    )
    manifest = json.loads((state / "manifest.json").read_text())
    n_bytes, shape = sum(entry["bytes"] for entry in manifest["files"].values()), manifest["model"]
    if not adapter:  # half as many parameters as bytes: in fp32 they take twice as many
        shape["vocab_size"] = n_bytes // 2 // (shape["dim"] * (1 if shape["tied"] else 2))
    shape["vocab_size"] *= 1000 if adapter else 1
    (state / "manifest.json").write_text(json.dumps(manifest))
    told = "another shape or other weights" if adapter else r"\d+ parameters by its model, but there are only \d+ bytes"
    with pytest.raises(DataError, match=told):
        open_training_state(state)


@pytest.mark.parametrize("changed", [None, "config", "base_sha256", "base"])
def test_the_base_of_an_adapter_is_the_one_that_it_had(changed, monkeypatch):
    source = SimpleNamespace(config="a shape")
    monkeypatch.setattr(module, "open_source", lambda base: source)
    monkeypatch.setattr(module, "hash_base", lambda one: "ab" if one is source else None)
    manifest = {"base_sha256": "cd" if changed == "base_sha256" else "ab"}
    found = SimpleNamespace(folder=Path("out/checkpoint-1"), manifest=manifest)
    given = None if changed == "base" else Path("b"), "another" if changed == "config" else "a shape"
    if changed is None:
        assert open_base(found, *given) is source
        return
    with pytest.raises(DataError, match="is not named" if changed == "base" else "another shape or other weights"):
        open_base(found, *given)


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_all_that_is_read_of_a_state_is_watched(adapter, monkeypatch):
    """With an adapter that is its base, to which the updates are added."""
    done = []
    source = SimpleNamespace(read_into=lambda model, watch: done.append(("base", model, watch)))
    monkeypatch.setattr(module, "parameters_of", lambda model: f"of {model}")
    monkeypatch.setattr(module.checkpoint, "load", lambda *given: done.append(given))
    monkeypatch.setattr(module, "merge_factors", lambda *given: done.append(given))
    monkeypatch.setattr(module.TrainingState, "read_factors", lambda state: "factors")
    state = module.TrainingState("state", None, None, None, None, {}, None, adapter, source if adapter else None)
    state.read_into("model", watch="watch")
    merged = [("base", "model", "watch"), ("model", "lora", "factors", "watch")]
    assert done == (merged if adapter else [("state", "of model", module.PARAMETERS, "watch")])

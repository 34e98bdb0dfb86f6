"""A training state's config, of this version and of those before it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from engine import finetune
from engine.base.errors import run_main
from engine.output.folder import STATUSES
from engine.output.state_as_model import ADDED, config_from_state, find_base, open_training_state
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


def test_a_state_has_the_settings_of_generation_that_its_base_has(tmp_path, rows_file):
    out, settings = tmp_path / "out", {"temperature": 0.25, "eos_token_id": [2, 7]}
    flags = ("--model", small_model(), "--data", rows_file, "--out", out, "--dtype", "fp32", "--global-batch-size", 2,
             "--max-length", 64, "--max-steps", 1, "--save-every", 1)  # fmt: skip
    assert run_main(finetune.main, [*map(str, flags)]) == 0
    (out / "generation_config.json").write_text(json.dumps(settings))
    (state,) = out.glob("checkpoint-*")
    found = open_training_state(state)
    assert (found.base, found.generation_config) == (out, settings)
    assert found.dtype.is_floating_point and found.adapter is None

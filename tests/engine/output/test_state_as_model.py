"""A training state's config, of this version and of those before it."""

from dataclasses import asdict

import pytest

from engine.output.state_as_model import ADDED, config_from_state
from tests.helpers.checkpoints import SHAPES


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

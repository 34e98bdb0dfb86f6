"""What a recorded run may differ in."""

from types import SimpleNamespace

import pytest

from engine.base.errors import DataError
from engine.training.resume import find_changes
from tests.helpers.run import finetune
from tests.helpers.small_model import small_model


@pytest.mark.parametrize("part", ["settings", "model"])
@pytest.mark.parametrize("odd", ["x", [1], None, 3])
def test_a_manifest_whose_parts_are_no_objects_is_a_data_error(part, odd):
    facts = {"settings": {"loss_norm": "token"}, "model": {}, "dtype": "float32", "data_sha256": "0", "max_tokens": 9}
    plan = SimpleNamespace(
        recorded_facts=lambda tokens: facts,
        config=SimpleNamespace(micro_batch_tokens=9),
        packing=SimpleNamespace(max_tokens=9),
    )
    assert find_changes(plan, facts) == []
    with pytest.raises(DataError, match=f"its {part} are no object"):
        find_changes(plan, facts | {part: odd})


def test_a_run_goes_on_only_as_it_began(tmp_path, rows_file):
    arguments = [
        "--model", small_model(), "--data", rows_file, "--out", tmp_path / "out", "--dtype", "bf16",
        "--global-batch-size", 2, "--max-length", 64, "--save-every", 1, "--optimizer-states", "8bit", "--max-steps", 1,
    ]  # fmt: skip
    finetune(*arguments)
    done = finetune(*arguments, "--master-weights", "stochastic", check=False)
    assert done.returncode == 2 and "master" in done.stderr, done.stderr
    done = finetune(*arguments[:-4], "--optimizer-states", "fp32", "--max-steps", 1, check=False)
    assert done.returncode == 2 and "states" in done.stderr, done.stderr

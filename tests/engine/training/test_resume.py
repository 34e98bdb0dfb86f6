"""What a recorded run may differ in."""

from types import SimpleNamespace

import pytest

from engine.base.errors import DataError
from engine.training.resume import find_changes


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
